"""The figures of a run: the paper's (loss, windowed correlation, pairwise matrices, layers) and more.

All are to be read in print and in grey: lines differ in their dashes, negative phases are shaded, and the
diverging map goes from dark to light as well as from blue to orange.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from oscopt import plot
from oscopt import report as page

from .config import WINDOW, Config
from .rules import Record, phase_signs

_DASHES = ("-", "--", "-.", ":")
_COLOURS, _STYLE = page.LINE_COLOURS, page.STYLE
_EPOCHS, _LAGS = 240, 40  # of a recurrence plot, and of a plot of lags

Matrices = dict[int, dict[str, np.ndarray]]


# ---- whole figures -----------------------------------------------------------------------------------------


def draw(record: Record, matrices: Matrices, config: Config, shows: str = "all") -> Figure:
    """The paper's figure of a run; `shows` is what of it, as in :class:`study.experiments.Row`."""
    run, layers = shows in ("run", "all"), shows in ("layers", "all")
    with plt.rc_context(_STYLE):
        rows = 2 * run + 2 * layers
        figure = plt.figure(figsize=(11, 2.3 * rows + 0.4), layout="constrained")
        grid = figure.add_gridspec(rows, 4)
        if run:
            loss(figure.add_subplot(grid[0, :2]), record)
            correlation(figure.add_subplot(grid[1, :2]), record)
            _pair(figure, grid[:2, 2:].subgridspec(1, 2), matrices)
        if layers:
            layer_correlations(figure.add_subplot(grid[rows - 2, :]), record)
            layer_dots(figure.add_subplot(grid[rows - 1, :]), record)
        figure.suptitle(f"{config.name}, {config.n_train or 'all'} pictures, full batch")
    return figure


def draw_beyond(record: Record, config: Config) -> Figure:
    """What the paper does not show: all layers over all epochs, and the edge of stability."""
    panels = [heatmap]
    if plain_gd(config) or np.isfinite(_sharpness(record)).any():
        panels.append(lambda axis, record: edge_of_stability(axis, record, config))
    with plt.rc_context(_STYLE):
        heights = [max(2.5, 0.11 * len(record.history.layer_names)), *[2.6] * (len(panels) - 1)]
        figure, axes = plt.subplots(
            len(panels),
            figsize=(11, sum(heights)),
            height_ratios=heights,
            layout="constrained",
            squeeze=False,
        )
        for axis, panel in zip(axes[:, 0], panels, strict=True):
            panel(axis, record)
    return figure


def draw_beside(record: Record, config: Config, other: Record, other_config: Config) -> Figure:
    """Two runs that differ in the optimizer: losses, correlations, and all layers of both."""
    maps = [
        (other.layers, f"{_called(other_config)}: gradients"),
        (record.layers, f"{_called(config)}: gradients"),
    ]
    if record.updates is not None:
        maps.append((record.updates.correlation(window=WINDOW), f"{_called(config)}: updates"))
    names = record.history.layer_names
    with plt.rc_context(_STYLE):
        figure = plt.figure(figsize=(11, 3 + max(2.6, 0.1 * len(names))), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=[2.8, max(2.6, 0.1 * len(names))])
        left, right = top.subplots(1, 2)
        for i, (run, label) in enumerate(((other, _called(other_config)), (record, _called(config)))):
            style = {"color": _COLOURS[i], "ls": _DASHES[i], "label": label, "lw": 1.3}
            _line(left, run.loss, **style)
            _line(right, run.windowed, **style)
        if record.updates is not None:
            updates = record.updates.global_correlation(window=WINDOW)
            label = f"{_called(config)}: updates"
            _line(right, updates, color=_COLOURS[2], ls=_DASHES[2], label=label, lw=1.1)
        left.set(yscale="log", xlabel="epoch", title="Training loss")
        right.set(ylim=(-1.08, 1.08), xlabel="epoch", title="Windowed mean correlation, all layers together")
        right.axhline(0, color="0.4", lw=0.8)
        for axis in (left, right):
            axis.legend(frameon=False, fontsize=8)
        axes = bottom.subplots(1, len(maps), sharey=True)
        image = None
        for axis, (values, title) in zip(axes, maps, strict=True):
            image = plot.draw_layers(axis, values, names, np.arange(len(values)))
            axis.set(title=title, xlabel="epoch")
        axes[0].tick_params("y", labelsize=6)
        bottom.colorbar(image, ax=axes, shrink=0.8, label="correlation")
    return figure


def draw_recurrence(record: Record, matrices: Matrices, config: Config) -> Figure:
    """Every epoch of the run against every other, and how far back gradients correlate."""
    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
        recurrence(left, record, matrices)
        lags(right, record)
        left.set_title("The whole run: every epoch against every other")
        right.set_title("Correlation with the gradient of so many epochs before")
        figure.suptitle(config.name)
    return figure


def panels(record: Record, matrices: Matrices, config: Config) -> Iterator[tuple[str, str]]:
    """The parts of a run's figures one by one, to be laid out by a page: (caption, SVG)."""
    drawn: list[tuple[str, Callable[[Axes, Record], object]]] = [
        ("Training loss before each step (log); negative phases shaded", loss),
        (
            "Mean correlation of adjacent gradients in a window of 5 iterations, all layers together",
            correlation,
        ),
        ("The same for the first and the last layers", layer_correlations),
        ("Dot products of adjacent gradients of these layers (symmetric log)", layer_dots),
    ]
    if plain_gd(config) or np.isfinite(_sharpness(record)).any():
        caption = "Curvature times the learning rate; at 2 plain gradient descent is at the edge of stability"
        drawn.append((caption, lambda axis, record: edge_of_stability(axis, record, config)))
    if record.updates is not None:
        drawn.append(("Mean correlation of adjacent updates, beside that of the gradients", updates))
    with plt.rc_context(_STYLE | {"axes.titlesize": 0}):
        for caption, panel in drawn:
            figure, axis = plt.subplots(figsize=(4.9, 2.7), layout="constrained")
            panel(axis, record)
            for side in ("left", "center"):  # the page has captions
                axis.set_title("", loc=side)
            yield caption, svg(figure)
        for epoch in sorted(matrices):
            figure, axis = plt.subplots(figsize=(4.9, 2.7), layout="constrained")
            image = plot.draw_matrix(axis, matrices[epoch]["global"], epoch)
            figure.colorbar(image, ax=axis, label="correlation")
            yield (
                f"Correlations of all pairs of gradients, epochs {epoch} to {epoch + WINDOW - 1}",
                svg(figure),
            )


def whole_run_panels(record: Record, matrices: Matrices) -> Iterator[tuple[str, str]]:
    """Likewise the two parts of :func:`draw_recurrence`; none without sketches."""
    if record.recurrence is None:
        return
    marked = "; dotted: the epochs of the matrices above" if matrices else ""
    drawn: list[tuple[str, Callable[[Axes], None]]] = [
        (
            f"The whole run: every epoch against every other, from sketches{marked}",
            lambda axis: recurrence(axis, record, matrices),
        ),
        (
            "Correlation with the gradient of so many epochs before, by phase: median, quartiles",
            lambda axis: lags(axis, record),
        ),
    ]
    with plt.rc_context(_STYLE):
        for caption, panel in drawn:
            figure, axis = plt.subplots(figsize=(4.9, 3.9), layout="constrained")
            panel(axis)
            yield caption, svg(figure)


def svg(figure: Figure) -> str:
    """`figure` as an SVG that stands alone; closes it."""
    plt.close(figure)
    return page.svg(figure)


def plain_gd(config: Config) -> bool:
    """Whether the updates are the gradients times the learning rate, so that a curvature follows."""
    return config.optimizer in ("oscgd", "sgd")


# ---- panels ------------------------------------------------------------------------------------------------


def loss(axis: Axes, record: Record) -> None:
    """The loss, on a logarithmic scale."""
    _shade(axis, record)
    _line(axis, record.loss, color=_COLOURS[0])
    axis.set(yscale="log", ylabel="loss", xlabel="epoch", title="Training loss (shaded: negative phases)")


def correlation(axis: Axes, record: Record) -> None:
    """The windowed mean correlation of all layers together."""
    _shade(axis, record)
    axis.axhline(0, color="0.4", lw=0.8)
    _line(axis, record.windowed, color=_COLOURS[0])
    axis.set(ylim=(-1.08, 1.08), xlabel="epoch", title=f"Mean correlation in a window of {WINDOW} iterations")
    axis.set_ylabel("correlation")


def updates(axis: Axes, record: Record) -> None:
    """The windowed mean correlations of updates and gradients."""
    correlation(axis, record)
    axis.lines[-1].set_label("gradients")
    values = record.updates.global_correlation(window=WINDOW)
    _line(axis, values, color=_COLOURS[1], ls="--", label="updates")
    axis.legend(frameon=False, fontsize=8)


def layer_correlations(axis: Axes, record: Record) -> None:
    """The windowed mean correlations of the first and last layers."""
    _shade(axis, record)
    axis.axhline(0, color="0.4", lw=0.8)
    _layer_lines(axis, record, record.layers)
    axis.set(ylim=(-1.08, 1.08), ylabel="correlation", xlabel="epoch")
    axis.set_title("First and last layers, windowed mean", loc="left")


def layer_dots(axis: Axes, record: Record) -> None:
    """The dot products of the first and last layers."""
    _shade(axis, record)
    shown = _layer_lines(axis, record, record.history.dot)
    sizes = np.abs(record.history.dot[:, shown])
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    if len(sizes):
        _signed_log(axis, float(np.quantile(sizes, 0.1)), float(sizes.max()))
    axis.axhline(0, color="0.4", lw=0.8)
    axis.set(xlabel="epoch", ylabel="dot product")
    axis.set_title("Dot products of adjacent gradients (symmetric log)", loc="left")


def recurrence(axis: Axes, record: Record, matrices: Matrices) -> None:
    """The correlations of all pairs of epochs, from sketches, with the first epochs of `matrices` marked."""
    marks = sorted(set(matrices).intersection(record.recurrence.steps.tolist()))
    plot.plot_recurrence(record.recurrence, ax=axis, marks=marks, most=_EPOCHS)
    axis.spines[:].set_visible(False)
    axis.set(title="", xlabel="epoch", ylabel="epoch")


def lags(axis: Axes, record: Record) -> None:
    """How the gradients of positive and of negative phases correlate with those of so many epochs before."""
    lags = range(1, max(2, min(_LAGS + 1, len(record.recurrence))))
    signs = phase_signs(record.windowed)
    for i, (kind, chosen) in enumerate((("positive", signs > 0), ("negative", signs < 0))):
        if chosen.any():
            style = {"color": _COLOURS[i], "ls": _DASHES[i], "label": f"epochs of {kind} phases"}
            epochs = np.flatnonzero(chosen)
            plot.plot_lags(record.recurrence, lags, ax=axis, steps=epochs, **style)
    axis.set(title="", xlabel="lag, epochs", ylabel="correlation", xlim=(0, lags[-1] + 1), ylim=(-1.08, 1.08))
    axis.axhline(0, color="0.4", lw=0.8)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8, loc="lower left")


def heatmap(axis: Axes, record: Record) -> None:
    """The windowed mean correlation of every layer at every epoch."""
    names, epochs = record.history.layer_names, np.arange(len(record.layers))
    image = plot.draw_layers(axis, record.layers, names, epochs, most=40)
    axis.tick_params("y", labelsize=6)
    axis.set(xlabel="epoch", title="Every layer, windowed mean correlation")
    axis.figure.colorbar(image, ax=axis, label="correlation", pad=0.01)


def edge_of_stability(axis: Axes, record: Record, config: Config) -> None:
    """eta times the directional curvature, and the sharpness where it was measured, with the line at 2."""
    _shade(axis, record)
    axis.axhline(2, color="black", lw=0.9, ls=(0, (6, 3)))
    top = 3.0
    if plain_gd(config):
        along = scaled_curvature(record)
        _line(axis, along, color=_COLOURS[0], lw=0.9, label="along the step, $\\eta\\kappa$")
        if np.isfinite(along).any():
            top = max(top, 1.1 * float(np.nanquantile(along, 0.99)))
    sharpness = config.lr * _sharpness(record)
    known = np.flatnonzero(np.isfinite(sharpness))
    if len(known):
        style = {"color": _COLOURS[1], "ls": "--", "marker": "o", "ms": 2.5, "lw": 1.2}
        axis.plot(known, sharpness[known], label="largest of all directions, $\\eta\\lambda_1$", **style)
        top = max(top, 1.1 * float(np.quantile(sharpness[known], 0.99)))
    axis.set(ylim=(min(0.0, -0.05 * top), top), xlabel="epoch", ylabel="curvature times $\\eta$")
    right = axis.secondary_yaxis("right", functions=(lambda y: y / config.lr, lambda y: y * config.lr))
    right.set_ylabel(f"curvature (2/$\\eta$ = {2 / config.lr:g})")
    axis.set_title("Edge of stability: curvature times learning rate (dashed line: 2)")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)


def scaled_curvature(record: Record) -> np.ndarray:
    """eta kappa of all layers together, 1 - <g_t, g_{t-1}> / ||g_{t-1}||^2: float64, shape (T,)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - record.history.dot.sum(1) / record.history.prev_sq_norm.sum(1)


# ---- parts -------------------------------------------------------------------------------------------------


def _called(config: Config) -> str:
    return (
        "GD"
        if plain_gd(config)
        else {"adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}[config.optimizer]
    )


def _sharpness(record: Record) -> np.ndarray:
    return np.full(len(record.loss), np.nan) if record.sharpness is None else record.sharpness


def _line(axis: Axes, values: np.ndarray, **style) -> None:
    page.line(axis, np.arange(len(values)), values, **style)


def _shade(axis: Axes, record: Record) -> None:
    negative = phase_signs(record.windowed) < 0
    edges = np.flatnonzero(np.diff(np.concatenate([[0], negative, [0]]).astype(int)))
    for start, stop in edges.reshape(-1, 2):
        axis.axvspan(start - 0.5, stop - 0.5, color="0.88", lw=0, zorder=0)
    axis.set_xlim(-0.5, len(negative) - 0.5)


def _layer_lines(axis: Axes, record: Record, values: np.ndarray) -> list[int]:
    """Draw the first two and the last two layers; which they are."""
    names = record.history.layer_names
    shown = list(dict.fromkeys([*range(min(2, len(names))), *range(max(0, len(names) - 2), len(names))]))
    for i, layer in enumerate(shown):
        _line(axis, values[:, layer], ls=_DASHES[i], color=_COLOURS[i], label=names[layer], lw=1.3)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=4, frameon=False, fontsize=7.5)
    return shown


def _pair(figure: Figure, grid, matrices: Matrices) -> None:
    axes = [figure.add_subplot(grid[i]) for i in range(2)]
    image = None
    for axis, epoch in zip(axes, sorted(matrices), strict=False):
        matrix = matrices[epoch]["global"]
        image = plot.draw_matrix(axis, matrix, epoch)
        axis.set_title(f"Pairs, epochs {epoch} to {epoch + len(matrix) - 1}")
    for axis in axes[len(matrices) :]:
        axis.set_axis_off()
    if image is not None:
        figure.colorbar(image, ax=axes, location="bottom", shrink=0.7, label="correlation")


def _signed_log(axis: Axes, smallest: float, largest: float) -> None:
    """A symmetric log scale with at most four labels on either side of 0."""
    low, high = math.floor(math.log10(smallest)), math.ceil(math.log10(largest))
    axis.set_yscale("symlog", linthresh=10.0**low)
    powers = range(high, low, -max(1, math.ceil((high - low) / 4)))
    axis.set_yticks([-(10.0**k) for k in powers] + [0.0] + [10.0**k for k in reversed(powers)])
    axis.minorticks_off()
