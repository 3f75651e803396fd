"""Performance profiles (Dolan and More 2002): the share of runs done within a multiple of the epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from oscopt.atomic import writing

from .results import Row

_STARTS = {"x0.01": ":", "x0.1": "-.", "x1": "-", "x10": "--"}
_OURS = {"auto": "#d1495b", "cosine": "#1f4e79"}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write `path` as .png and .svg: step adaptation on the right, everything else on the left."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    ours = [name for name in names if name.split()[0] in _OURS]
    others = [name for name in names if name not in ours]
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
        lines = ["-", "--", "-.", ":"]
        for i, name in enumerate(others):
            style = {"color": f"C{i}", "linestyle": lines[i % 4]} if i else {"color": "black"}
            _profile(axes[0], rows, name, **style)
        for name in ours:
            kind, start = name.split()
            _profile(axes[1], rows, name, color=_OURS[kind], linestyle=_STARTS[start])
        axes[0].set_title("tuned, or from their sources")
        axes[1].set_title("step adaptation, from multiples of the best rate")
        for axis in axes:
            axis.axvline(1.0, color="#bbbbbb", linewidth=0.8, zorder=0)
            axis.set(xscale="log", xlim=(0.1, 1.6), ylim=(0, 1.02))
            axis.set_xticks([0.1, 0.2, 0.5, 1.0, 1.5], ["0.1", "0.2", "0.5", "1", "1.5"], minor=False)
            axis.set_xticks([], minor=True)
            axis.set_xlabel("epochs to the target, as a multiple of the best fixed rate's")
            if axis.lines[1:]:
                axis.legend(frameon=False, fontsize=8, loc="upper left")
        axes[0].set_ylabel("share of tasks and seeds")
        for suffix in ("png", "svg"):
            with writing(path.with_suffix(f".{suffix}")) as file:
                figure.savefig(file, format=suffix, dpi=130)
        plt.close(figure)


def _profile(axis, rows: Sequence[Row], name: str, **style) -> None:
    ratios = np.sort([row["epoch_ratio"] for row in rows if row["contender"] == name])
    done = np.arange(1, len(ratios) + 1) / len(ratios)
    reached = np.isfinite(ratios)
    x = np.concatenate([[1e-3], ratios[reached], [10.0]])
    y = np.concatenate([[0.0], done[reached], [reached.mean()]])
    axis.step(x, y, where="post", label=name, linewidth=1.4, **style)
