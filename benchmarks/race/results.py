"""compare.csv and its kind: one line a finished run, appended at once."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oscopt.atomic import writing

from .contenders import BASE

KEY = ("task", "seed", "batch", "contender", "rate")
_WHERE = ("date", "device", "threads", "torch", "oscopt")
COLUMNS = (*KEY, "epochs", "target", "reached", "seconds", "final", "diverged", *_WHERE)
_NUMBERS = {"seed": int, "batch": int, "epochs": int, "reached": int, "diverged": int}
_NUMBERS |= {"rate": float, "target": float, "seconds": float, "final": float}

LONGER = (*KEY, "steps", "seconds", "first", "final", "lowest", "held_out", "diverged", *_WHERE)
"""What the tables of language.py, generalize.py and limits.py are made from: training losses at the start and
at the end, the lowest one, and what was measured on held-out data."""
_NUMBERS |= {"steps": int, "first": float, "lowest": float, "held_out": float}

Row = dict[str, Any]


class Results:
    """The lines of a file.

    Args:
        path: it is made if it is not there.
        columns: :data:`KEY` and what else a line has.

    Raises:
        OSError: it cannot be read or written.
        ValueError, KeyError: it is no such file.
    """

    def __init__(self, path: Path, columns: Sequence[str] = COLUMNS) -> None:
        self._path, self._columns = path, columns
        self._rows: dict[tuple, Row] = {}
        if not path.exists():
            with writing(path, "w") as file:
                csv.writer(file, lineterminator="\n").writerow(columns)
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        for texts in csv.DictReader(whole):  # the last line may be half of one: it is made again
            row = {key: _NUMBERS.get(key, str)(texts[key]) if texts[key] else None for key in columns}
            self._rows[self._key(row)] = row
        if whole and not path.read_text().endswith("\n"):
            with writing(path, "w") as file:
                file.write("".join(whole))

    @staticmethod
    def _key(row: Row) -> tuple:
        return *(row[key] for key in KEY[:-1]), f"{row['rate']:.6g}"

    def get(self, key: tuple) -> Row | None:
        """The line of (task, seed, batch, contender, rate as text), if it is there."""
        return self._rows.get(key)

    def add(self, key: tuple, values: Row) -> Row:
        """Append a line."""
        row = dict(zip(KEY, key, strict=True)) | values | {"rate": float(key[-1])}
        with open(self._path, "a", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self._rows[key] = row
        return row

    def rows(self) -> list[Row]:
        """All lines."""
        return list(self._rows.values())

    def best(self, task: str, seed: int, batch: int | None, contender: str) -> Row | None:
        """The line with the lowest final loss of what was tuned; None: there is none yet."""
        wanted = (task, seed, batch, contender)
        rows = [row for row in self._rows.values() if tuple(row[key] for key in KEY[:-1]) == wanted]
        return min(rows, key=lambda row: math.inf if row["diverged"] else row["final"], default=None)

    def batches(self) -> list[int | None]:
        """The batch sizes that there are runs of."""
        return sorted({row["batch"] for row in self._rows.values()}, key=lambda batch: batch or 0)

    def chosen(self, batch: int | None) -> list[Row]:
        """The best line of each (task, seed, contender), with its ratios to gradient descent's best:
        `epoch_ratio` and `second_ratio` to the target (inf: not reached), `final_ratio`."""
        found = []
        groups = dict.fromkeys(
            (r["task"], r["seed"], r["contender"]) for r in self._rows.values() if r["batch"] == batch
        )
        for task, seed, contender in groups:
            base, row = (self.best(task, seed, batch, name) for name in (BASE, contender))
            ratios = {"epoch_ratio": math.inf, "second_ratio": math.inf}
            if row["reached"] is not None:
                ratios = {
                    "epoch_ratio": row["reached"] / base["reached"],
                    "second_ratio": row["seconds"] / base["seconds"],
                }
            final = math.inf if row["diverged"] else row["final"] / base["final"]
            found.append(row | ratios | {"final_ratio": final})
        return found
