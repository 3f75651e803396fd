"""The tables for people, in markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from .results import Row


def _number(value: float, none: str) -> str:
    return none if math.isinf(value) else f"{value:.2f}" if value < 100 else f"{value:.1e}"


def _cell(rows: Sequence[Row], measure: str) -> str:
    """Median over seeds, with the least and the largest where there are several."""
    if not rows:
        return ""
    diverged = sum(row["diverged"] for row in rows)
    if diverged == len(rows):
        return "diverged"
    values = sorted(row[measure] for row in rows)
    text = _number(statistics.median_low(values), "never")
    if len(values) > 1:
        text += f" ({_number(values[0], 'never')} to {_number(values[-1], 'never')})"
    return text + (f", {diverged} diverged" if diverged else "")


def _grid(rows: Sequence[Row], measure: str) -> list[str]:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lines = [f"| contender | {' | '.join(tasks)} |", "|---|" + "---:|" * len(tasks)]
    for name in names:
        cells = [
            _cell([r for r in rows if (r["task"], r["contender"]) == (task, name)], measure) for task in tasks
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _summary(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| contender | median | mean | worst | reached within 1.0 | within 1.5 | diverged | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(row["contender"] for row in rows):
        mine = [row for row in rows if row["contender"] == name]
        ratios = [row["epoch_ratio"] for row in mine]
        seconds = statistics.median_low([row["second_ratio"] for row in mine])
        within = [f"{sum(r <= limit for r in ratios)} of {len(mine)}" for limit in (1.0, 1.5)]
        mean = statistics.geometric_mean([min(ratio, 2.0) for ratio in ratios])
        cells = [_number(statistics.median_low(ratios), "never"), _number(mean, "never")]
        cells += [_number(max(ratios), "never"), *within]
        cells += [str(sum(row["diverged"] for row in mine)), _number(seconds, "never")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def markdown(rows: Sequence[Row]) -> str:
    """All tables, with what their numbers are."""
    first = rows[0]
    batch = "full batch" if first["batch"] is None else f"batches of {first['batch']}"
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    bases = [row for row in rows if row["contender"] == "gd"]
    return "\n".join(
        [
            f"{first['device']}, {first['threads']} thread, torch {first['torch']}, {first['date'][:10]}, "
            f"{batch}, seeds {seeds}.",
            "",
            "Epochs to the loss that gradient descent with its best fixed rate ends with, as a multiple of "
            "the epochs that it takes itself; runs get 1.5 times the budget. Over all tasks and seeds (the "
            "mean is the geometric one, of ratios cut at 2; seconds are the median):",
            "",
            *_summary(rows),
            "",
            "By task, medians over seeds (least to largest):",
            "",
            *_grid(rows, "epoch_ratio"),
            "",
            "Loss at the end of the budget, as a multiple of the best fixed rate's.",
            "",
            *_grid(rows, "final_ratio"),
            "",
            "Best fixed rates: "
            + "; ".join(
                f"{task} " + ", ".join(f"{row['rate']:g}" for row in bases if row["task"] == task)
                for task in dict.fromkeys(row["task"] for row in bases)
            )
            + ".",
            "",
        ]
    )
