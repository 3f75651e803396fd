"""Performance profiles (Dolan and More 2002): the share of runs done within a multiple of the epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from oscopt.atomic import writing

from .contenders import BASE, OURS
from .results import Row

_STYLES = {
    OURS: {"color": "#d1495b", "linewidth": 2.6, "zorder": 3},
    BASE: {"color": "black"},
}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write `path` as .png and .svg."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lines = ["-", "--", "-.", ":"]
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
        for i, name in enumerate(names):
            _profile(
                axis, rows, name, **_STYLES.get(name, {"color": f"C{i % 10}", "linestyle": lines[i % 4]})
            )
        axis.axvline(1.0, color="#bbbbbb", linewidth=0.8, zorder=0)
        axis.set(xscale="log", xlim=(0.1, 1.6), ylim=(0, 1.02))
        axis.set_xticks([0.1, 0.2, 0.5, 1.0, 1.5], ["0.1", "0.2", "0.5", "1", "1.5"], minor=False)
        axis.set_xticks([], minor=True)
        axis.set_xlabel("epochs to the target, as a multiple of the best fixed rate's")
        axis.set_ylabel("share of runs")
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
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
    axis.step(x, y, where="post", label=name, **({"linewidth": 1.4} | style))
