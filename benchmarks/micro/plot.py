"""The roofline: time per parameter over the bytes that must be moved, below it a copy's bandwidth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from oscopt.atomic import writing

from .contenders import BASE, CEILING, READING

_OURS, _PLAIN, _OTHERS = "#1f4e79", "#444444", "#d1495b"


def _kind(name: str) -> tuple[str, str]:
    """Colour and marker of a contender."""
    if name.startswith("oscgd") or "monitor" in name:
        return _OURS, "o"
    return (_OTHERS, "^") if "+" in name or name == "torch.compile" else (_PLAIN, "s")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write `path` as .png and .svg: a roofline for each model and number of threads, and the flat sizes."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["threads"]), []).append(row)
    models = {key: group for key, group in groups.items() if not key[0][0].isdigit()}
    flat = [row for key, group in groups.items() if key not in models for row in group]
    panels = [(title, group, _roofline) for title, group in models.items()]
    if flat:
        panels += [
            ((f"flat sizes, threads {n}",), [r for r in flat if r["threads"] == n], _sweep)
            for n in sorted({r["threads"] for r in flat})
        ]
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        columns = min(2, len(panels))
        lines = -(-len(panels) // columns)
        figure, axes = plt.subplots(
            lines, columns, figsize=(7.2 * columns, 5.4 * lines), squeeze=False, layout="constrained"
        )
        for axis, (title, group, paint) in zip(axes.flat, panels, strict=False):
            paint(axis, group)
            row = group[0]
            head = title[0] if len(title) == 1 else f"{title[0]}, {row['elements'] / 1e6:.1f} M parameters"
            threads = "" if len(title) == 1 or row["threads"] == "" else f", {row['threads']} threads"
            axis.set_title(f"{head}{threads}")
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        row = rows[0]
        figure.suptitle(f"{row['device']}, {row['dtype']}, {row['date'][:10]}", fontsize=10)
        for suffix in ("png", "svg"):
            with writing(path.with_suffix(f".{suffix}")) as file:
                figure.savefig(file, format=suffix, dpi=130)
        plt.close(figure)


def _roofline(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    ceiling = next(row for row in rows if row["contender"] == CEILING)
    points = [row for row in rows if row is not ceiling]
    widest = max(row["bytes_per_parameter"] for row in points)
    limit = [0.8 * ceiling["bytes_per_parameter"], 1.4 * widest]
    nanoseconds = [x / ceiling["gb_per_s"] for x in limit]
    axis.plot(limit, nanoseconds, color="0.35", lw=1.4)
    axis.fill_between(limit, [y / 100 for y in nanoseconds], nanoseconds, color="0.93", lw=0)
    heights = []
    for row in sorted(points, key=lambda r: r["median_ms"]):
        colour, marker = _kind(row["contender"])
        x, y = row["bytes_per_parameter"], row["median_ms"] * 1e6 / row["elements"]
        axis.plot(x, y, marker, color=colour, ms=6)
        heights.append((row["contender"], x, y, colour))
    axis.set(
        xscale="log", yscale="log", xlabel="bytes per parameter that must be moved", ylabel="ns per parameter"
    )
    lowest, highest = min(h[2] for h in heights), max(h[2] for h in heights)
    axis.set(xlim=(limit[0], limit[1] * 3.2), ylim=(lowest / 1.6, highest * 1.5))
    ticks = [8, 12, 16, 20, 24, 28, 36, 44]
    axis.set_xticks(
        [t for t in ticks if limit[0] <= t <= limit[1]],
        labels=[str(t) for t in ticks if limit[0] <= t <= limit[1]],
    )
    decade = range(math.floor(math.log10(lowest)) - 1, math.ceil(math.log10(highest)) + 1)
    ticks = [m * 10.0**k for k in decade for m in (1, 2, 5)]
    ticks = [t for t in ticks if axis.get_ylim()[0] <= t <= axis.get_ylim()[1]]
    axis.set_yticks(ticks, labels=[f"{t:g}" for t in ticks])
    axis.minorticks_off()
    _labels(axis, heights, limit[1] * 1.06)
    text = f"grey: faster than a plain copy, {ceiling['gb_per_s']:.0f} GB/s"
    axis.text(0.66, 0.02, text, transform=axis.transAxes, ha="right", color="0.35", fontsize=8)


def _labels(axis: Axes, points: Sequence[tuple[str, float, float, str]], x: float) -> None:
    """Names in a column at the right, in the order of their points and apart from each other."""
    low, high = axis.get_ylim()
    gap = (high / low) ** 0.052
    at = low * gap
    for name, px, py, colour in points:
        at = max(py, at)
        axis.plot([px, x], [py, at], color=colour, lw=0.4, alpha=0.6)
        axis.text(x * 1.02, at, f"{name}  {py:.2f}", color=colour, va="center", fontsize=7.5)
        at *= gap


def _sweep(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    ends = []
    base = {(r["elements"], r["tensors"]): r["median_ms"] for r in rows if r["contender"] == BASE}
    for name in dict.fromkeys(row["contender"] for row in rows):
        if name in (CEILING, READING) or name.startswith("adamw"):
            continue
        colour, marker = _kind(name)
        for many, style in ((False, "-"), (True, "none")):
            of = [r for r in rows if r["contender"] == name and (r["tensors"] > 1) == many]
            of.sort(key=lambda r: r["elements"])
            x = [r["elements"] for r in of]
            y = [r["median_ms"] / base[r["elements"], r["tensors"]] for r in of]
            axis.plot(x, y, marker, ls=style, color=colour, ms=4, lw=0.9, mfc="none" if many else colour)
            if of and (not many or not ends or ends[-1][0] != name):
                ends.append((name, x[-1], y[-1], colour))
    axis.axhline(1, color="0.5", lw=0.8)
    axis.set(xscale="log", yscale="log", ylabel="time over SGD fused")
    axis.set_xlabel("elements (open marks: in 1,000 tensors)")
    right = axis.get_xlim()[1]
    axis.set_xlim(right=right * (right / axis.get_xlim()[0]) ** 0.7)
    _labels(axis, sorted(ends, key=lambda end: end[2]), right)
