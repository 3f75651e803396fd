"""AdamW on mini-batches, measured by OscMonitor; at the end a page of its gradients and updates."""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from oscopt import OscMonitor

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--out", default="monitor_adamw.html")
args = parser.parse_args()

torch.manual_seed(0)
x = torch.randn(1024, 20)
data = DataLoader(TensorDataset(x, x[:, :5].sum(1).gt(0).long()), batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
with OscMonitor(optimizer, model.named_parameters(), what=("grad", "update")) as monitor:
    for _epoch in range(args.epochs):
        for batch, labels in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), labels).backward()
            optimizer.step()

print(monitor.history.summary())
print(monitor.update_history.summary())
monitor.report(args.out)
