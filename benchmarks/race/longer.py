"""What the tables of language.py, generalize.py and limits.py share: methods by name, and runs made once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from oscopt import OscGD

from .contenders import OURS, Named, contenders
from .results import Results, Row

Make = Callable[[Named], torch.optim.Optimizer]


def method(name: str, rate: float) -> Make:
    """The contender called `name` at a rate; "auto" and what begins so: times the rate.

    Raises:
        KeyError: there is none, or its package is not installed.
    """
    if name == OURS:
        return lambda named: OscGD(named, lr=rate, adapt="auto")
    if name == f"{OURS}, decay":
        return lambda named: OscGD(named, lr=rate, adapt="auto", weight_decay=0.05)
    make = {c.name: c.make for c in contenders()[0]}[name]
    return lambda named: make(rate, rate, named)


@dataclass(frozen=True)
class Runs:
    """Makes the runs that a file lacks.

    Attributes:
        results: the lines that are there, and where new ones go.
        about: columns that all have: date, machine, versions.
    """

    results: Results
    about: dict[str, Any]

    def once(
        self, task: str, seed: int, batch: int | None, name: str, rate: float, run: Callable[[], Row]
    ) -> Row:
        """The line of a run; `run` makes its columns `steps`, `first`, `final`, `lowest` and `held_out`
        if it is not there. One that ends above its start has diverged."""
        key = (task, seed, batch, name, f"{rate:.6g}")
        row = self.results.get(key)
        if row is None:
            started = time.perf_counter()
            values = run()
            values |= {"seconds": time.perf_counter() - started}
            values["diverged"] = int(not values["final"] <= values["first"])
            row = self.results.add(key, self.about | values)
            told = f"{row['final']:.4g}"
            if row["held_out"] is not None:
                told += f", {row['held_out']:.4g} held out"
            print(f"{task} seed {seed}: {name} {rate:.3g}: {told}, {row['seconds']:.0f} s", flush=True)
        return row


def summary(losses: list[float], last: int = 1, held_out: float | None = None) -> Row:
    """The columns of a run with these training losses; its final one is the mean of the `last` ones."""
    end = losses[-last:]
    final = sum(end) / len(end)
    known = [loss for loss in losses if math.isfinite(loss)]
    return {
        "steps": len(losses) - 1,
        "first": losses[0],
        "final": final if math.isfinite(final) else math.inf,
        "lowest": min(known),
        "held_out": held_out,
    }


def grid(head: list[str], lines: list[list[str]]) -> str:
    """A table in markdown, the first column as text, the others as numbers."""
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def where(row: Row, seeds: list[int]) -> str:
    """The line that says where the numbers come from."""
    listed = ", ".join(map(str, seeds))
    return (
        f"{row['device']}, {row['threads']} thread, torch {row['torch']}, {row['date'][:10]}, seeds {listed}."
    )
