"""The paper's figure of a run: loss, windowed correlation, pairwise matrices, first and last layers."""

from __future__ import annotations

import math

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .config import WINDOW, Config
from .rules import Record, phase_signs

_STYLES = ("-", "--", "-.", ":")
_GREYS = ("#1f4e79", "#d1495b", "#6a994e", "#8d6a9f")


def draw(record: Record, matrices: dict[int, dict[str, np.ndarray]], config: Config) -> Figure:
    """One page: loss (log), windowed global correlation with negative phases shaded, two matrices, layers."""
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=(11, 9.5), layout="constrained")
        grid = figure.add_gridspec(4, 4)
        _loss(figure.add_subplot(grid[0, :2]), record)
        _correlation(figure.add_subplot(grid[1, :2]), record)
        epochs = sorted(matrices)[:2]
        axes = [figure.add_subplot(grid[:2, 2 + i]) for i in range(2)]
        image = None
        for axis, epoch in zip(axes, epochs, strict=False):
            image = _matrix(axis, matrices[epoch]["global"], epoch)
        for axis in axes[len(epochs) :]:
            axis.set_axis_off()
        if image is not None:
            figure.colorbar(image, ax=axes, location="bottom", shrink=0.7, label="correlation")
        names = record.history.layer_names
        shown = list(dict.fromkeys([*range(min(2, len(names))), *range(max(0, len(names) - 2), len(names))]))
        _layers(figure.add_subplot(grid[2, :]), record, shown)
        _dots(figure.add_subplot(grid[3, :]), record, shown)
        figure.suptitle(
            f"{config.model} on {config.dataset}, {config.optimizer}, lr {config.lr:g}, "
            f"{config.n_train or 'all'} pictures, full batch"
        )
    return figure


def _shade(axis: Axes, record: Record) -> None:
    signs = phase_signs(record.windowed)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], signs < 0, [0]]).astype(int)))
    for start, stop in edges.reshape(-1, 2):
        axis.axvspan(start - 0.5, stop - 0.5, color="0.88", lw=0, zorder=0)


def _loss(axis: Axes, record: Record) -> None:
    _shade(axis, record)
    axis.plot(record.loss, color=_GREYS[0])
    axis.set_yscale("log")
    axis.set(ylabel="loss", title="Training loss (grey: negative phases)")


def _correlation(axis: Axes, record: Record) -> None:
    _shade(axis, record)
    axis.axhline(0, color="0.4", lw=0.8)
    axis.plot(record.windowed, color=_GREYS[0])
    axis.set(ylim=(-1.08, 1.08), xlabel="epoch", title=f"Mean correlation in a window of {WINDOW} iterations")
    axis.set_ylabel("correlation")


def _matrix(axis: Axes, matrix: np.ndarray, epoch: int):
    image = axis.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1)
    ticks = range(len(matrix))
    axis.set_xticks(ticks, [str(epoch + i) for i in ticks])
    axis.set_yticks(ticks, [str(epoch + i) for i in ticks])
    axis.spines[:].set_visible(False)
    for i in ticks:
        for j in ticks:
            value = matrix[i, j]
            colour = "white" if abs(value) > 0.6 else "black"
            axis.text(j, i, f"{value:+.2f}", ha="center", va="center", color=colour, fontsize=7)
    axis.set_title(f"Pairs, epochs {epoch} to {epoch + len(matrix) - 1}")
    axis.set_anchor("S")
    return image


def _layers(axis: Axes, record: Record, shown: list[int]) -> None:
    _shade(axis, record)
    axis.axhline(0, color="0.4", lw=0.8)
    values = record.history.correlation(window=WINDOW)
    for i, layer in enumerate(shown):
        name = record.history.layer_names[layer]
        axis.plot(values[:, layer], _STYLES[i], color=_GREYS[i], label=name, lw=1.3)
    axis.set(ylim=(-1.08, 1.08), ylabel="correlation", title="First and last layers, windowed mean")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _dots(axis: Axes, record: Record, shown: list[int]) -> None:
    _shade(axis, record)
    values = record.history.dot
    known = np.abs(values[:, shown])
    known = known[np.isfinite(known) & (known > 0)]
    for i, layer in enumerate(shown):
        name = record.history.layer_names[layer]
        axis.plot(values[:, layer], _STYLES[i], color=_GREYS[i], label=name, lw=1.3)
    if len(known):
        _signed_log(axis, float(np.quantile(known, 0.1)), float(known.max()))
    axis.axhline(0, color="0.4", lw=0.8)
    axis.set(xlabel="epoch", ylabel="dot product", title="Dot products of adjacent gradients (symmetric log)")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _signed_log(axis: Axes, smallest: float, largest: float) -> None:
    """A symmetric log scale with at most four labels on either side of 0."""
    low, high = math.floor(math.log10(smallest)), math.ceil(math.log10(largest))
    axis.set_yscale("symlog", linthresh=10.0**low)
    powers = range(high, low, -max(1, math.ceil((high - low) / 4)))
    axis.set_yticks([-(10.0**k) for k in powers] + [0.0] + [10.0**k for k in reversed(powers)])
    axis.minorticks_off()
