"""One run: a contender on a task, from a seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from .tasks import Problem, Task

RUNAWAY = 1e3
"""A loss above this many times the first one ends a run: it has diverged."""


@dataclass(frozen=True)
class Run:
    """What came of it.

    Attributes:
        losses: of the whole training set, after 0, 1, 2, ... epochs; shorter where it diverged.
        seconds: after as many, without what only measures.
        budget: epochs that count.
    """

    losses: list[float]
    seconds: list[float]
    budget: int

    @property
    def final(self) -> float:
        """Loss at the end of the budget; inf: it diverged."""
        return self.losses[self.budget] if len(self.losses) > self.budget else math.inf

    @property
    def diverged(self) -> bool:
        """Whether it ran away, or ended above where it began."""
        return not self.final <= self.losses[0]

    def reached(self, target: float) -> int | None:
        """Epochs to a loss of at most `target`; None: never."""
        return next((i for i, loss in enumerate(self.losses) if loss <= target), None)


def train(
    task: Task,
    seed: int,
    make: Callable[[Iterable], torch.optim.Optimizer],
    *,
    batch: int | None = None,
    target: float | None = None,
) -> Run:
    """Train for the task's epochs; up to half as many more where `target` has not been reached by then.

    Args:
        make: named parameters -> the optimizer.
        batch: samples in a step; None: all of them.
    """
    problem = task.start(seed)
    optimizer = make(list(problem.model.named_parameters()))
    averages = hasattr(optimizer, "eval")  # schedule-free: what counts is not where gradients are taken
    order = torch.Generator().manual_seed(seed)
    losses, seconds, spent = [], [0.0], 0.0
    limit = task.epochs if target is None else task.epochs * 3 // 2
    while True:
        apart = averages or batch is not None
        if apart:
            losses.append(_whole(problem, optimizer))
        started = time.perf_counter()
        for index in _batches(problem.samples, batch, order):
            optimizer.zero_grad()
            loss = problem.loss(index)
            loss.backward()
            if not apart:
                losses.append(loss.item())
            if _over(losses, task.epochs, limit, target):
                return Run(losses, seconds, task.epochs)
            optimizer.step()
        spent += time.perf_counter() - started
        seconds.append(spent)


def _over(losses: list[float], epochs: int, limit: int, target: float | None) -> bool:
    done = len(losses) - 1
    if not losses[-1] <= RUNAWAY * losses[0]:
        losses.pop()
        return True
    return done >= limit or (done >= epochs and (target is None or min(losses) <= target))


def _batches(samples: int, batch: int | None, order: torch.Generator):
    if batch is None or not samples:
        return (None,)
    return torch.randperm(samples, generator=order).split(batch)


@torch.no_grad()
def _whole(problem: Problem, optimizer: torch.optim.Optimizer) -> float:
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    value = problem.loss(None).item()
    if hasattr(optimizer, "train"):
        optimizer.train()
    return value
