"""One page that shows a record and opens without a network: lines as SVG, heat maps with values on hover.

Lines need matplotlib, which is loaded at the first one. The pages of benchmarks/study are made of the same
parts.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import atomic, plot
from .history import History
from .summary import Row, Summary, cells, step_curvature, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

MAP_COLOURS = ("#0b2559", "#3a6cb4", "#aaaaaa", "#f3b673", "#fff6dd")
"""Of the correlations -1, -1/2, 0, 1/2, 1: each lighter than the one before."""
LINE_COLOURS = ("#1f4e79", "#d1495b", "#6a994e", "#8d6a9f")
"""Of lines; a page in the dark has lighter ones, see page.css."""
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "svg.fonttype": "none",  # text stays text: a tenth of the size
    "svg.hashsalt": "oscopt",
}
"""Of matplotlib's figures."""
_WINDOW = 5  # iterations of a windowed mean, as in the paper
_COLUMNS = 600  # of a heat map; longer runs are averaged over stretches of equal length
_CELLS = 1_200_000  # of a heat map: 1.6 MB
_POINTS = 1000  # of a line; longer runs are drawn as the least and greatest value of so many stretches
_ROWS = 2000  # of the table
_PATH, _LONG = re.compile(r' d="[^"]*"'), re.compile(r"-?\d+\.\d{3,}")
_SVG, _COLOUR = re.compile(r"<svg.*?</svg>", re.DOTALL), re.compile(r"(?<=: )#[0-9a-f]{6}\b")
_THEMED = {
    "#000000": "currentColor",
    "#ffffff": "var(--paper)",
    "#e0e0e0": "var(--shade)",
    **{colour: f"var(--line{i})" for i, colour in enumerate(LINE_COLOURS)},
}


# ---- the page of a record ----------------------------------------------------------------------------


def write(path: str | os.PathLike, histories: Sequence[History], title: str | None = None) -> None:
    """Write the page of these records; see :meth:`oscopt.History.report`."""
    text = record_page(histories, title)
    with atomic.writing(path, "w") as file:
        file.write(text)


def record_page(histories: Sequence[History], title: str | None = None) -> str:
    """The page of these records, as HTML.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a history holds no steps.
    """
    if not all(len(history) for history in histories):
        raise ValueError("the history holds no steps yet; there is nothing to show")
    _matplotlib()
    title = title or f"Oscillation of {_quantity(histories[0])}"
    parts = [f"<h1>{escaped(title)}</h1>"]
    for i, history in enumerate(histories):
        if i:
            parts.append(f"<h1>{escaped(_sentence(_quantity(history)))}</h1>")
        parts += _sections(history)
    return page(title, parts)


def _sections(history: History) -> Iterator[str]:
    steps, names, summary = history.steps, history.layer_names, summarise(history)
    sketched = bool(np.nanmax(history.correlation_stderr, initial=0.0, where=_known(history)) > 0)
    yield (
        f"<p>{escaped(_sentence(_quantity(history)))}: {count(len(names), 'layer')}, steps {steps[0]} to "
        f"{steps[-1]}{'' if len(steps) == steps[-1] - steps[0] + 1 else f' ({len(steps)} held)'}; "
        f"correlations of adjacent {history.about.get('quantity', 'gradients')} are "
        f"{'estimated from sketches' if sketched else 'exact'}.</p>"
    )
    yield (
        f'<p class="hint {summary.overall.state}">All layers together: '
        f"{escaped(summary.overall.hint)}.<br>{escaped(_sentence(summary.tally))}.</p>"
    )
    yield '<h2>All layers together</h2><div class="panels">'
    for caption, drawn in _panels(history):
        yield f"<figure><figcaption>{escaped(caption)}</figcaption>{drawn}</figure>"
    yield "</div><h2>Every layer, every step</h2>"
    yield heat_map(history.correlation(_WINDOW), names, "correlation of adjacent steps", steps, "step")
    if np.isfinite(history.alignment).any():
        yield "<h3>Alignment with the momentum</h3>"
        yield heat_map(history.alignment_correlation(_WINDOW), names, "alignment", steps, "step")
    if history.sketches is not None and len(steps) > 1:
        yield '<h2>Any two steps</h2><div class="panels">'
        for caption, drawn in _recurrences(history):
            yield f"<figure><figcaption>{escaped(caption)}</figcaption>{drawn}</figure>"
        yield "</div>"
    yield f"<h2>Layer by layer, steps {summary.first} to {summary.last}</h2>"
    yield summary_table(summary)


def _panels(history: History) -> Iterator[tuple[str, str]]:
    steps = history.steps
    what = history.about.get("quantity", "gradients")

    def correlations(axis: Axes) -> None:
        line(axis, steps, history.global_correlation(_WINDOW), color=LINE_COLOURS[0], lw=1.1)
        axis.axhline(0, color=LINE_COLOURS[3], lw=0.8, ls=":")
        axis.set(ylim=(-1.08, 1.08), ylabel="correlation")

    yield f"Correlation of adjacent {what}, mean in a window of {_WINDOW} steps", panel(correlations)

    along = step_curvature(history)[1]
    if np.isfinite(along).any():

        def curvature(axis: Axes) -> None:
            line(axis, steps, along, color=LINE_COLOURS[0], lw=0.9)
            axis.axhline(2, color=LINE_COLOURS[1], lw=1, ls=(0, (6, 3)))
            known = along[np.isfinite(along)]
            top = max(3.0, 1.1 * float(np.quantile(known, 0.99)))
            axis.set(ylim=(min(-0.05 * top, 1.1 * float(np.quantile(known, 0.01))), top))
            axis.set(ylabel="step times curvature")

        yield "Step times the curvature along it; dashed: 2, the edge of stability", panel(curvature)

    alignment = history.global_alignment_correlation(_WINDOW)
    if np.isfinite(alignment).any():

        def aligned(axis: Axes) -> None:
            line(axis, steps, alignment, color=LINE_COLOURS[0], lw=1.1)
            axis.axhline(0, color=LINE_COLOURS[3], lw=0.8, ls=":")
            axis.set(ylim=(-1.08, 1.08), ylabel="cosine")

        yield f"Alignment of the gradient with the momentum, mean of {_WINDOW - 1} steps", panel(aligned)

    sizes = history.lr * history.step_scale
    sizes = np.where(sizes > 0, sizes, np.nan)
    if np.isfinite(sizes).any() and np.nanmin(sizes) < np.nanmax(sizes):
        adapted = bool((history.step_scale != 1).any())

        def step_sizes(axis: Axes) -> None:
            shown = np.isfinite(sizes).any(1)
            levels = np.nanquantile(sizes[shown], (0, 0.5, 1), axis=1)
            labels = ("smallest", "median", "largest") if sizes.shape[1] > 1 else ("", None, "")
            for i, (level, label) in enumerate(zip(levels, labels, strict=True)):
                if label != "":
                    style = {"ls": ("--", "-", ":")[i], "color": LINE_COLOURS[(1, 0, 2)[i]]}
                    line(axis, steps[shown], level, label=label, lw=1.1, **style)
            axis.set(yscale="log", ylabel="step size")
            if sizes.shape[1] > 1:
                axis.legend(frameon=False, fontsize=8)

        caption = "Step sizes of the layers (log)" if adapted else "Learning rate (log)"
        yield caption, panel(step_sizes)


def _recurrences(history: History) -> Iterator[tuple[str, str]]:
    def recurrence(axis: Axes) -> None:
        plot.plot_recurrence(history, ax=axis)
        axis.images[0].set_cmap(colour_map())
        axis.set_title("")

    def lags(axis: Axes) -> None:
        plot.plot_lags(history, range(1, min(17, len(history))), ax=axis)
        axis.lines[0].set_color(LINE_COLOURS[0])
        for band in axis.collections:
            band.set_color(LINE_COLOURS[0])
        axis.set_title("")

    yield "Correlation of every pair of steps, all layers together", panel(recurrence, height=4.2)
    yield "Correlation with the step so many steps before: median and quartiles", panel(lags, height=4.2)


def summary_table(summary: Summary) -> str:
    """The table of a summary: all layers together, then each, at most those 2,000 with the largest shares."""
    rows: Sequence[Row] = summary.layers
    note = ""
    if len(rows) > _ROWS:
        chosen = np.argsort([-row.share if np.isfinite(row.share) else 0.0 for row in rows], kind="stable")
        rows = [rows[i] for i in np.sort(chosen[:_ROWS])]
        note = f"<p>The {_ROWS} of {len(summary.layers)} layers that have most of the dot product.</p>"
    header = ("layer", "correlation", "negative", "step × curvature", "share of dot product", "hint")
    lines = [f"<tr>{''.join(f'<th>{name}</th>' for name in header)}</tr>"]
    for row in (summary.overall, *rows):
        name, *numbers, hint = map(escaped, cells(row))
        middle = "".join(
            f'<td class="number" data-label="{label}">{value.replace("-", "−")}</td>'
            for label, value in zip(header[1:-1], numbers, strict=True)
        )
        lines.append(f'<tr class="{row.state}"><td class="name">{name}</td>{middle}<td>{hint}</td></tr>')
    return f'{note}<div class="scroll long"><table class="layers">{"".join(lines)}</table></div>'


def _quantity(history: History) -> str:
    what, optimizer = history.about.get("quantity", "gradients"), history.about.get("optimizer")
    return what if optimizer is None else f"{what} of {optimizer}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _known(history: History) -> np.ndarray:
    return np.isfinite(history.correlation_stderr)


# ---- parts of pages ----------------------------------------------------------------------------------


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page, light or dark as the reader's system is."""
    here = Path(__file__).parent
    body = _SVG.sub(lambda drawn: themed(drawn[0]), "\n".join(parts))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(title)}</title>
<style>{(here / "page.css").read_text()}</style></head><body>
{body}
<script>{(here / "page.js").read_text()}</script>
</body></html>
"""


def escaped(value: object) -> str:
    """`value` as text of a page."""
    return html.escape(str(value))


def count(number: int, what: str) -> str:
    """Such as "1 layer", "2 layers"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def heat_map(
    values: np.ndarray, names: Sequence[str], what: str, at: np.ndarray | None = None, unit: str = "epoch"
) -> str:
    """An element that shows (T, L) correlations and tells each on hover.

    Args:
        values: from -1 to 1, NaN where nothing is known.
        names: of the L layers.
        what: is shown, for those who cannot see it.
        at: numbers of the T rows, ascending. Default: 0, 1, ...
        unit: what these numbers count.
    """
    most = max(1, min(_COLUMNS, _CELLS // max(1, len(names))))
    numbers = np.arange(len(values)) if at is None else at
    edges = np.ceil(_edges(numbers, most)).astype(int)
    shown = binned(values, most, numbers).T
    bytes_ = np.where(np.isfinite(shown), np.round(np.nan_to_num(shown) * 100), -128).astype(np.int8)
    content = {
        "layers": list(names),
        "unit": unit,
        "first": edges[:-1].tolist(),
        "last": (edges[1:] - 1).tolist(),
        "values": base64.b64encode(bytes_.tobytes()).decode(),
        "colours": [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in MAP_COLOURS],
    }
    scale = f"linear-gradient(to right, {', '.join(MAP_COLOURS)})"
    return (
        f'<div class="heat" data-map="{escaped(json.dumps(content, separators=(",", ":")))}">'
        f'<div class="axis"><span>{escaped(names[0])} (first layer) above</span>'
        f'<span class="key">−1 <span class="scale" style="background: {scale}"></span> +1</span></div>'
        f'<canvas tabindex="0" role="img" '
        f'aria-label="{escaped(what)} of {count(len(names), "layer")}"></canvas><output></output>'
        f'<div class="axis"><span>{unit} {numbers[0]}</span>'
        f"<span>{escaped(names[-1])} (last layer) below</span>"
        f"<span>{numbers[-1]}</span></div></div>"
    )


def binned(values: np.ndarray, most: int = _COLUMNS, at: np.ndarray | None = None) -> np.ndarray:
    """Rows (T, L) averaged over equal stretches so that at most `most` are left; NaN where nothing is known.

    Args:
        at: numbers of the rows, ascending, of which stretches are made. Default: 0, 1, ...
    """
    if at is None:
        if len(values) <= most:
            return values
        at = np.arange(len(values))
    rows = np.searchsorted(at, _edges(at, most))
    known = np.isfinite(values)
    total = np.add.reduceat(np.where(known, values, 0.0), rows[:-1])
    count = np.add.reduceat(known.astype(int), rows[:-1])
    count[rows[:-1] == rows[1:]] = 0  # a stretch without a row, of a record that was thinned
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(count > 0, total / count, np.nan)


def _edges(at: np.ndarray, most: int) -> np.ndarray:
    """Of at most `most` equally long stretches of the numbers `at`."""
    return np.linspace(at[0], at[-1] + 1, min(len(at), most) + 1)


def line(axis: Axes, x: np.ndarray, y: np.ndarray, **style: Any) -> None:
    """Draw a line; of a long one the least and the greatest value of each of 500 stretches."""
    if len(y) > _POINTS:
        edges = np.linspace(0, len(y), _POINTS // 2 + 1).astype(int)
        keep: list[int] = []
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            part = y[start:stop]
            if np.isfinite(part).any():
                keep += sorted({start + int(np.nanargmin(part)), start + int(np.nanargmax(part))})
        x, y = x[keep], y[keep]
    axis.plot(x, y, **style)


def panel(draw: Callable[[Axes], None], height: float = 2.7) -> str:
    """The SVG of one small figure over steps."""
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.9, height), layout="constrained")
        axis = figure.subplots()
        draw(axis)
        if not axis.get_xlabel():
            axis.set_xlabel("step")
    return svg(figure)


def svg(figure: Figure) -> str:
    """`figure` as an SVG that stands alone."""
    text = io.StringIO()
    with _matplotlib().rc_context(STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    whole = text.getvalue()
    # A hundredth of a point is finer than any screen or printer; more digits are half of the size.
    return _PATH.sub(_rounded, whole[whole.index("<svg") :])


def themed(drawn: str) -> str:
    """An SVG with the page's colours of text and lines; one with pictures in it keeps its own, on white."""
    if "<image" in drawn:
        return drawn.replace("<svg", '<svg class="paper"', 1)
    return _COLOUR.sub(lambda colour: _THEMED.get(colour[0], colour[0]), drawn)


def _rounded(path: re.Match) -> str:
    return _LONG.sub(lambda number: f"{float(number[0]):.2f}", path[0])


def colour_map() -> Colormap:
    """Of correlations, for matplotlib."""
    _matplotlib()
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("correlation", MAP_COLOURS)


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("a page needs matplotlib: pip install matplotlib") from error
    return matplotlib
