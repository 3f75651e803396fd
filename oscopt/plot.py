"""Pictures of a record. Needs matplotlib, which is loaded at the first picture.

Every function draws into `ax` (default: a new figure's) and returns it. Correlations have the same colours
everywhere, also on the pages of :mod:`oscopt.report`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .history import History
from .window import Window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap

MAP_COLOURS = ("#0b2559", "#3a6cb4", "#aaaaaa", "#f3b673", "#fff6dd")
"""Of the correlations -1, -1/2, 0, 1/2, 1: each lighter than the one before."""
COLUMNS = 600
"""Of a heat map; longer runs are averaged over stretches of equal length."""
_RUN = 8  # neighbours in a recurrence plot of a long run


def plot_correlation(history: History, window: int | None = 5, ax: Axes | None = None, **line: Any) -> Axes:
    """The correlation of all layers together at every step.

    Args:
        window: iterations of the windowed mean; None: each step's own.
        line: options of the line, as ``Axes.plot`` takes them.

    Raises:
        ImportError: matplotlib is not installed.
    """
    ax = _axes(ax)
    ax.plot(history.steps, history.global_correlation(window), **line)
    return _finish(ax, window)


def plot_layers(
    history: History,
    layers: Sequence[str] | None = None,
    window: int | None = 5,
    ax: Axes | None = None,
    **line: Any,
) -> Axes:
    """The correlation of single layers at every step.

    Args:
        layers: their names. Default: all, or if there are more than ten, ten from the first to the last.
        window, line: as in :func:`plot_correlation`.

    Raises:
        ImportError: matplotlib is not installed.
        KeyError: there is no such layer.
    """
    names = history.layer_names
    if layers is None:
        layers = [names[i] for i in _spread(len(names), 10)]
    if unknown := [name for name in layers if name not in names]:
        raise KeyError(f"no layer {unknown[0]!r}; there are {', '.join(names)}")
    ax = _axes(ax)
    from matplotlib import colormaps

    mu = history.correlation(window)
    colours = colormaps["viridis"](np.linspace(0, 0.92, len(layers)))
    for name, colour in zip(layers, colours, strict=True):
        ax.plot(history.steps, mu[:, names.index(name)], **{"color": colour, "label": name, "lw": 1} | line)
    ax.legend(fontsize="small", ncols=1 + (len(layers) > 5))
    return _finish(ax, window)


def plot_heatmap(history: History, window: int | None = 5, ax: Axes | None = None) -> Axes:
    """The correlation of every layer (rows, the first on top) at every step (columns), in colours.

    Long runs are averaged over 600 stretches of equal length; white: nothing is known.

    Args:
        window: as in :func:`plot_correlation`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history is empty.
    """
    if not len(history):
        raise ValueError("the history holds no steps yet; there is nothing to draw")
    ax = _axes(ax)
    drawn = draw_layers(ax, history.correlation(window), history.layer_names, history.steps)
    ax.set_xlabel("step")
    ax.figure.colorbar(drawn, ax=ax, label=_label(window))
    return ax


def plot_matrix(window: Window, layer: str | None = None, ax: Axes | None = None) -> Axes:
    """The correlations of all pairs of gradients in a window, with their values.

    Args:
        layer: the layer's name; None: all layers together.

    Raises:
        ImportError: matplotlib is not installed.
        KeyError, RuntimeError: as :meth:`oscopt.Window.matrix`.
    """
    matrix = window.matrix(layer)
    ax = _axes(ax)
    drawn = draw_matrix(ax, matrix)
    ax.set(title=layer or "all layers", xlabel="iteration k", ylabel="iteration j")
    ax.figure.colorbar(drawn, ax=ax, label="correlation")
    return ax


def plot_recurrence(
    history: History,
    layer: str | None = None,
    ax: Axes | None = None,
    marks: Sequence[int] = (),
    most: int = 400,
) -> Axes:
    """The correlations of all pairs of steps of a run, from their sketches, in colours.

    Oscillation is a checkerboard, phases are blocks. Of more than `most` steps, evenly spread runs of 8
    neighbours are drawn: single steps that far apart would not show an oscillation.

    Args:
        layer: the layer's name; None: all layers together.
        marks: steps to mark on both axes.
        most: how many steps are drawn, a multiple of 8; more than a screen has pixels for would blur.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history holds no steps, or no sketches.
        KeyError: there is no such layer.
    """
    if not len(history):
        raise ValueError("the history holds no steps yet; there is nothing to draw")
    steps = history.steps
    if len(steps) > most:
        first = np.linspace(0, len(steps) - _RUN, most // _RUN).astype(int)
        steps = steps[(first[:, None] + np.arange(_RUN)).ravel()]
    image, _ = history.pairwise(layer, steps)
    ax = _axes(ax)
    # Averages of neighbouring cells would hide a checkerboard.
    drawn = ax.imshow(image, cmap=colour_map(), vmin=-1, vmax=1, interpolation="none")
    _number(ax, steps, 7)
    for mark in marks:
        at = int(np.searchsorted(steps, mark))
        ax.axhline(at, color="black", lw=0.6, ls=":")
        ax.axvline(at, color="black", lw=0.6, ls=":")
    ax.set(title=layer or "all layers", xlabel="step", ylabel="step")
    ax.figure.colorbar(drawn, ax=ax, label="correlation")
    return ax


def plot_lags(
    history: History,
    lags: Sequence[int] = range(1, 17),
    layer: str | None = None,
    ax: Axes | None = None,
    steps: Sequence[int] | None = None,
    **line: Any,
) -> Axes:
    """How gradients correlate with those a given number of steps before: median over the run, and quartiles.

    A period of 2 is a zigzag; how far the curve stays above 0 is how long gradients remember.

    Args:
        lags: numbers of steps.
        layer: the layer's name; None: all layers together.
        steps: look back from these steps only, for example those of one phase. Default: all.
        line: as in :func:`plot_correlation`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history holds no sketches, or a lag is less than 1.
        KeyError: there is no such layer.
    """
    chosen = slice(None) if steps is None else np.isin(history.steps, steps)
    found = [history.lagged_correlation(lag, layer)[0][chosen] for lag in lags]
    known = [mu[np.isfinite(mu)] for mu in found]
    quartiles = np.array([np.quantile(mu, (0.25, 0.5, 0.75)) if len(mu) else (np.nan,) * 3 for mu in known])
    ax = _axes(ax)
    style: dict[str, Any] = {"marker": "o", "ms": 3} | line
    (drawn,) = ax.plot(list(lags), quartiles[:, 1], **style)
    ax.fill_between(list(lags), quartiles[:, 0], quartiles[:, 2], alpha=0.25, lw=0, color=drawn.get_color())
    ax.axhline(0.0, color="0.6", lw=0.8, zorder=0)
    ax.set(title=layer or "all layers", xlabel="lag, steps", ylabel="correlation", ylim=(-1.05, 1.05))
    ax.locator_params(axis="x", integer=True)
    return ax


# ---- parts of pictures, without labels and colour bars -----------------------------------------------


def draw_layers(
    ax: Axes, values: np.ndarray, names: Sequence[str], at: np.ndarray, most: int = 24
) -> ScalarMappable:
    """Correlations (T, L) in colours, a row for each layer, the first on top; white: NaN.

    Args:
        names: of the L layers; at most `most` are written.
        at: numbers of the T steps, ascending.

    Returns:
        What a colour bar is of.
    """
    mesh = ax.pcolormesh(
        stretches(at),
        np.arange(len(names) + 1),
        binned(values, at=at).T,
        cmap=colour_map(),
        vmin=-1,
        vmax=1,
        rasterized=True,
    )
    every = max(1, -(-len(names) // most))
    ax.set_yticks(np.arange(0, len(names), every) + 0.5, names[::every], fontsize="small")
    ax.set_facecolor("white")
    ax.set_ylim(max(len(names), 1), 0)
    return mesh


def draw_matrix(ax: Axes, matrix: np.ndarray, first: int = 0) -> ScalarMappable:
    """A matrix (h, h) of correlations in colours, with its values if they can be read.

    Args:
        first: the number of the first row and column.

    Returns:
        What a colour bar is of.
    """
    image = ax.imshow(matrix, cmap=colour_map(), vmin=-1, vmax=1)
    if len(matrix) <= 12:
        for (i, j), value in np.ndenumerate(matrix):
            colour = "white" if value < -0.4 else "black"
            ax.text(j, i, f"{value:+.2f}", ha="center", va="center", fontsize="small", color=colour)
    _number(ax, np.arange(first, first + len(matrix)), 12)
    ax.spines[:].set_visible(False)
    return image


def colour_map() -> Colormap:
    """Of correlations from -1 to 1; unknown ones are white.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.colors import LinearSegmentedColormap
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    return LinearSegmentedColormap.from_list("correlation", MAP_COLOURS).with_extremes(bad="white")


def binned(values: np.ndarray, most: int = COLUMNS, at: np.ndarray | None = None) -> np.ndarray:
    """Rows (T, L) averaged over equal stretches so that at most `most` are left; NaN where nothing is known.

    Args:
        at: numbers of the rows, ascending, of which stretches are made. Default: 0, 1, ...
    """
    if at is None:
        if len(values) <= most:
            return values
        at = np.arange(len(values))
    rows = np.searchsorted(at, stretches(at, most))
    known = np.isfinite(values)
    total = np.add.reduceat(np.where(known, values, 0.0), rows[:-1])
    count = np.add.reduceat(known.astype(int), rows[:-1])
    count[rows[:-1] == rows[1:]] = 0  # a stretch without a row, of a record that was thinned
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(count > 0, total / count, np.nan)


def stretches(at: np.ndarray, most: int = COLUMNS) -> np.ndarray:
    """The edges of at most `most` equally long stretches of the ascending numbers `at`: float64, one more."""
    return np.linspace(at[0], at[-1] + 1, min(len(at), most) + 1)


def _axes(ax: Axes | None) -> Axes:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("oscopt.plot needs matplotlib: pip install matplotlib") from error
    return pyplot.subplots(layout="constrained")[1] if ax is None else ax


def _spread(count: int, most: int) -> np.ndarray:
    """At most `most` of the numbers below `count`, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


def _number(ax: Axes, numbers: np.ndarray, most: int) -> None:
    """Write at most `most` of the `numbers` of rows and columns at both axes."""
    places = _spread(len(numbers), most)
    for set_ticks in (ax.set_xticks, ax.set_yticks):
        set_ticks(places, [str(number) for number in numbers[places]])


def _label(window: int | None) -> str:
    return "correlation" if window is None else f"correlation, mean of {window} steps"


def _finish(ax: Axes, window: int | None) -> Axes:
    ax.axhline(0.0, color="0.6", lw=0.8, zorder=0)
    ax.set(xlabel="step", ylabel=_label(window), ylim=(-1.05, 1.05))
    return ax
