"""Accuracy on pictures that were not trained on."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from study.models import build

from .contenders import OURS, contenders
from .longer import Make, Runs, grid, method, summary, where
from .results import Row
from .tasks import load


@dataclass(frozen=True)
class Pictures:
    """What is trained, on how many of mnist5k's pictures; as many others as `held_out` says are held out."""

    model: str
    width: int
    side: int
    epochs: int
    train: int = 4000
    held_out: int = 1000
    batch: int = 128


TASKS = {"cnn_bn": Pictures("cnn_bn", 16, 12, 12), "resnet18": Pictures("resnet18", 8, 8, 8)}
QUICK = {"cnn_bn": Pictures("cnn_bn", 2, 8, 2, 64, 32, 32)}

# What is run: of a grid, the first seed takes all, the others the rate that was most accurate there.
DECAY = f"{OURS}, decay"
RATES = {
    OURS: (1.0,),
    DECAY: (1.0,),
    "adamw": (1e-3, 3e-3, 1e-2),
    "heavy ball": (0.03, 0.1, 0.3),
    "prodigy": (1.0,),
    "schedule-free sgd": (0.3, 1.0, 3.0),
}


def train(task: Pictures, make: Make, seed: int) -> Row:
    """Train with cosine decay (schedule-free methods without), from a split and a start that `seed` draws.

    Returns:
        The columns of its line: training losses are of batches, the final one the mean of the last epoch;
        held out: the accuracy at the end.
    """
    x, y = load("mnist5k", task.train + task.held_out, task.side, None, seed)
    model = build(task.model, 1, task.side, task.width, seed)
    optimizer = make(list(model.named_parameters()))
    free = hasattr(optimizer, "eval")
    parts = -(-task.train // task.batch)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.epochs * parts)
    order = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(task.epochs):
        for index in torch.randperm(task.train, generator=order).split(task.batch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[index]), y[index])
            loss.backward()
            losses.append(loss.item())
            if not losses[-1] <= 1e3 * losses[0]:
                return summary(losses, 1, 0.0)
            optimizer.step()
            if not free:
                scheduler.step()
    if free:
        optimizer.eval()
        _norm_anew(model, x[: task.train], task.batch)
    return summary(losses, parts, _accuracy(model, x[task.train :], y[task.train :]))


@torch.no_grad()
def _norm_anew(model: torch.nn.Module, x: Tensor, batch: int) -> None:
    """Batch norm's means for the averaged parameters, which saw no picture yet."""
    for part in x.split(batch):
        model(part)


@torch.no_grad()
def _accuracy(model: torch.nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    return (model(x).argmax(1) == y).float().mean().item()


def fill(runs: Runs, seeds: list[int], quick: bool) -> None:
    """Every method on every task; what is not installed is left out."""
    there = {c.name for c in contenders()[0]} | {DECAY}
    best: dict[tuple[str, str], float] = {}
    for seed in seeds:
        for name, task in (QUICK if quick else TASKS).items():

            def once(contender: str, rate: float, seed=seed, name=name, task=task) -> float:
                run = runs.once(
                    name,
                    seed,
                    task.batch,
                    contender,
                    rate,
                    lambda: train(task, method(contender, rate), seed),
                )
                return run["held_out"]

            for contender, rates in RATES.items():
                if contender not in there:
                    continue
                if (name, contender) in best:
                    once(contender, best[name, contender])
                else:
                    found = {rate: once(contender, rate) for rate in rates}
                    best[name, contender] = max(rates, key=found.__getitem__)


def markdown(rows: list[Row]) -> str:
    """The table, with what its numbers are."""
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = [
        [name, *(cell for task in tasks for cell in _cells(rows, task, name, seeds[0]))]
        for name in RATES
        if any(row["contender"] == name for row in rows)
    ]
    head = ["method", *(title for t in tasks for title in (f"{t}: accuracy", "rate", "training loss"))]
    steps = ", ".join(f"{t} {next(r['steps'] + 1 for r in rows if r['task'] == t)} steps" for t in tasks)
    return "\n".join(
        [
            where(rows[0], seeds),
            "",
            "Accuracy on mnist5k's pictures that were held out, in per cent: mean over seeds (least to "
            f"largest), each with its own split. Batches of {rows[0]['batch']}, {steps}, cosine decay for "
            "all but schedule-free SGD, no augmentation. Where a rate is tuned it is the most accurate of "
            "three **on the held-out pictures of the first seed themselves**, which favours it over methods "
            f"without a rate. `{DECAY}` has a weight decay of 0.05, AdamW its default of 0.01, the others "
            "none. The training loss is the last epoch's, mean over seeds.",
            "",
            grid(head, lines),
            "",
            *(_rates(rows, task, seeds[0]) for task in tasks),
            "",
        ]
    )


def _best(rows: list[Row], task: str, name: str, first: int) -> list[Row]:
    """The lines of a method at the rate that was most accurate on the first seed."""
    mine = [row for row in rows if (row["task"], row["contender"]) == (task, name)]
    tuned = max((row for row in mine if row["seed"] == first), key=lambda r: r["held_out"], default=None)
    return [row for row in mine if tuned and row["rate"] == tuned["rate"]]


def _cells(rows: list[Row], task: str, name: str, first: int) -> list[str]:
    found = _best(rows, task, name, first)
    if not found:
        return ["", "", ""]
    values = [100 * row["held_out"] for row in found]
    text = f"{statistics.mean(values):.2f}"
    if len(values) > 1:
        text += f" ({min(values):.1f} to {max(values):.1f})"
    loss = statistics.mean(row["final"] for row in found)
    rate = "" if len(RATES[name]) == 1 else f"{found[0]['rate']:g}"
    return [text, rate, "diverged" if math.isinf(loss) else f"{loss:.2g}"]


def _rates(rows: list[Row], task: str, first: int) -> str:
    """All rates of the grids."""
    parts = []
    for name in RATES:
        mine = [r for r in rows if (r["task"], r["contender"], r["seed"]) == (task, name, first)]
        if len(mine) > 1:
            tried = sorted((row["rate"], row["held_out"]) for row in mine)
            parts.append(f"{name} " + ", ".join(f"{rate:g}: {100 * value:.1f}" for rate, value in tried))
    return f"{task}, rates tried on seed {first}: {'; '.join(parts)}.\n"
