"""Full-batch gradient descent on your own model: which layers oscillate, and is it at the edge?"""

import argparse

import torch
from torch import nn

from oscopt import OscGD

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--lr", type=float, default=0.3)
parser.add_argument("--out", default="full_batch.html")
args = parser.parse_args()

torch.manual_seed(0)
x = torch.randn(256, 20)
y = torch.sin(3 * x[:, :5].sum(1)).sign().long().clamp(min=0)  # put your data and model here
model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))

optimizer = OscGD(model.named_parameters(), lr=args.lr)
for _step in range(args.steps):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()

print(f"loss {loss.item():.3g}")
print(optimizer.history.summary())
optimizer.history.report(args.out)
