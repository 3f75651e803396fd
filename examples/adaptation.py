"""No learning rate to tune: every layer's step follows how its gradients agree with the momentum."""

import argparse

import torch
from torch import nn

from oscopt import OscGD

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--out", default="adaptation.html")
args = parser.parse_args()

torch.manual_seed(0)
x = torch.randn(256, 20)
y = x[:, :5].prod(1).gt(0).long()
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

optimizer = OscGD(model.named_parameters(), adapt="auto")
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
for step in range(args.steps):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.3g}")

print(f"loss {loss.item():.3g}")
optimizer.history.report(args.out)
