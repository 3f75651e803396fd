"""Pictures of a record. Needs matplotlib, which is loaded at the first picture.

Every function draws into `ax` (default: a new figure's) and returns it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .history import History
from .window import Window

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 800  # of a heatmap: more than a screen shows
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
        layers = [
            names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(len(names), 10)).astype(int))
        ]
    if unknown := [name for name in layers if name not in names]:
        raise KeyError(f"no layer {unknown[0]!r}; there are {', '.join(names)}")
    ax = _axes(ax)
    mu = history.correlation(window)
    colours = _colormap("viridis")(np.linspace(0, 0.92, len(layers)))
    for name, colour in zip(layers, colours, strict=True):
        ax.plot(history.steps, mu[:, names.index(name)], **{"color": colour, "label": name, "lw": 1} | line)
    ax.legend(fontsize="small", ncols=1 + (len(layers) > 5))
    return _finish(ax, window)


def plot_heatmap(history: History, window: int | None = 5, ax: Axes | None = None) -> Axes:
    """The correlation of every layer (rows, the first on top) at every step (columns), in colours.

    Steps are gathered into at most 800 columns, which show their means; grey: nothing is known.

    Args:
        window: as in :func:`plot_correlation`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history is empty.
    """
    if not len(history):
        raise ValueError("the history holds no steps yet; there is nothing to draw")
    ax = _axes(ax)
    steps, mu = history.steps, history.correlation(window)
    first, last = steps[0], steps[-1] + 1
    edges = np.linspace(first, last, min(_COLUMNS, last - first, len(steps)) + 1)
    column = np.searchsorted(edges, steps, side="right") - 1
    total, count = np.zeros((2, len(edges) - 1, mu.shape[1]))
    np.add.at(total, column, np.nan_to_num(mu))
    np.add.at(count, column, np.isfinite(mu))
    with np.errstate(invalid="ignore"):
        image = (total / count).T
    colours = _colormap("RdBu_r").with_extremes(bad="0.8")
    mesh = ax.pcolormesh(
        edges, np.arange(len(image) + 1), image, cmap=colours, vmin=-1, vmax=1, rasterized=True
    )
    shown = np.unique(np.linspace(0, len(image) - 1, min(len(image), 24)).astype(int))
    ax.set_yticks(shown + 0.5, [history.layer_names[i] for i in shown], fontsize="small")
    ax.invert_yaxis()
    ax.set_xlabel("step")
    ax.figure.colorbar(mesh, ax=ax, label=_label(window))
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
    image = ax.imshow(matrix, cmap=_colormap("RdBu_r").with_extremes(bad="0.8"), vmin=-1, vmax=1)
    if window.h <= 12:
        for (i, j), value in np.ndenumerate(matrix):
            colour = "white" if abs(value) > 0.6 else "black"
            ax.text(j, i, f"{value:+.2f}", ha="center", va="center", fontsize="small", color=colour)
    ax.set(title=layer or "all layers", xlabel="iteration k", ylabel="iteration j")
    ax.locator_params(integer=True)
    ax.figure.colorbar(image, ax=ax, label="correlation")
    return ax


def plot_recurrence(
    history: History,
    layer: str | None = None,
    ax: Axes | None = None,
    marks: Sequence[int] = (),
    most: int = 400,
) -> Axes:
    """The correlations of all pairs of steps of a run, from their sketches, in colours.

    Oscillation is a checkerboard, phases are blocks. Of more than `most` steps neighbours are drawn, in runs
    of 8 that are spread evenly: single steps that far apart would not show an oscillation.

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
    drawn = ax.imshow(image, cmap=_colormap("RdBu_r").with_extremes(bad="0.8"), vmin=-1, vmax=1)
    places = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 7)).astype(int))
    for set_ticks in (ax.set_xticks, ax.set_yticks):
        set_ticks(places, [str(step) for step in steps[places]])
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
    """How gradients correlate with those of so many steps before: the median over the run, and its quartiles.

    A period of 2 is a zigzag; how far the curve stays above 0 is how long gradients remember.

    Args:
        lags: numbers of steps.
        layer: the layer's name; None: all layers together.
        steps: look back from these only, such as those of one phase. Default: all.
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
    return ax


def _axes(ax: Axes | None) -> Axes:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("oscopt.plot needs matplotlib: pip install matplotlib") from error
    return pyplot.subplots(layout="constrained")[1] if ax is None else ax


def _colormap(name: str) -> Any:
    from matplotlib import colormaps

    return colormaps[name]


def _label(window: int | None) -> str:
    return "correlation" if window is None else f"correlation, mean of {window} steps"


def _finish(ax: Axes, window: int | None) -> Axes:
    ax.axhline(0.0, color="0.6", lw=0.8, zorder=0)
    ax.set(xlabel="step", ylabel=_label(window), ylim=(-1.05, 1.05))
    return ax
