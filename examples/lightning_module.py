"""A Lightning Trainer, measured by OscCallback; at the end a page of gradients and updates."""

import argparse

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from oscopt.lightning import OscCallback


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--out", default="lightning.html")
args = parser.parse_args()

pl.seed_everything(0)
x = torch.randn(1024, 20)
data = DataLoader(TensorDataset(x, x[:, :5].sum(1).gt(0).long()), batch_size=64, shuffle=True)

callback = OscCallback(what=("grad", "update"))
trainer = pl.Trainer(max_epochs=args.epochs, callbacks=[callback], logger=False, enable_checkpointing=False)
trainer.fit(Classifier(), data)

(monitor,) = callback.meters  # one for each optimizer
print(monitor.history.summary())
monitor.report(args.out)
