"""One page that shows a record and opens without a network: lines as SVG, heat maps with values on hover.

Lines need matplotlib, which is loaded when the first one is drawn. The pages of benchmarks/study are made of
the same parts.
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
from .plot import COLUMNS, MAP_COLOURS, binned, stretches
from .summary import Row, Summary, cells, quantity, step_curvature, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_COLOURS = ("#1f4e79", "#d1495b", "#6a994e", "#8d6a9f")
"""Of lines; dark pages have lighter ones, see page.css."""
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
_CELLS = 1_200_000  # of a heat map: 1.6 MB
_POINTS = 1000  # of a line; longer runs are drawn as the least and the greatest value of 500 stretches
_ROWS = 2000  # of the table
_PATH, _LONG = re.compile(r' d="[^"]*"'), re.compile(r"-?\d+\.\d{3,}")
_SVG, _COLOUR = re.compile(r"<svg.*?</svg>", re.DOTALL), re.compile(r"(?<=: )#[0-9a-f]{6}\b")
_Panel = tuple[str, Callable[["Axes"], None]]  # a caption, and what draws below it
_THEMED = {
    "#000000": "currentColor",
    "#ffffff": "var(--paper)",
    "#e0e0e0": "var(--shade)",
    **{colour: f"var(--line{i})" for i, colour in enumerate(LINE_COLOURS)},
}


# ---- the page of a record ----------------------------------------------------------------------------


def write(path: str | os.PathLike, histories: Sequence[History], title: str | None = None) -> None:
    """Write the page of these records; see :meth:`oscopt.History.report`.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: `path` cannot be written.
        ValueError: a history holds no steps.
    """
    with atomic.writing(path, "w") as file:  # before anything is drawn, which may take a while
        file.write(record_page(histories, title))


def record_page(histories: Sequence[History], title: str | None = None) -> str:
    """The page of these records, as HTML.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a history holds no steps.
    """
    if not all(len(history) for history in histories):
        raise ValueError("the history holds no steps yet; there is nothing to show")
    _matplotlib()
    title = title or f"Oscillation of {quantity(histories[0])}"
    parts = [f"<h1>{escaped(title)}</h1>"]
    for i, history in enumerate(histories):
        if i:
            parts.append(f"<h1>{escaped(_sentence(quantity(history)))}</h1>")
        parts += _sections(history)
    return page(title, parts)


def _sections(history: History) -> Iterator[str]:
    steps, names, summary = history.steps, history.layer_names, summarise(history)
    sketched = bool((history.correlation_stderr > 0).any())
    yield (
        f"<p>{escaped(_sentence(quantity(history)))}: {count(len(names), 'layer')}, steps {steps[0]} to "
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
    yield "</div>"
    if summary.overall.state == "noise" and np.isfinite(summary.overall.step_curvature):
        said = "Between mini-batches the step times the curvature is mostly noise, around 1."
        yield f'<p class="note">{said}</p>'
    yield "<h2>Every layer, every step</h2>"
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
    """Caption and SVG of each quantity of all layers together that follows from the record."""
    for find in (_correlations, _curvatures, _alignments, _step_sizes):
        if (found := find(history)) is not None:
            caption, draw = found
            yield caption, panel(draw)


def _correlations(history: History) -> _Panel | None:
    mu = history.global_correlation(_WINDOW)
    what = history.about.get("quantity", "gradients")
    caption = f"Correlation of adjacent {what}, mean in a window of {_WINDOW} steps"
    return caption, lambda axis: _cosines(axis, history.steps, mu, "correlation")


def _curvatures(history: History) -> _Panel | None:
    along = step_curvature(history)[1]
    known = along[np.isfinite(along)]
    if not len(known):
        return None

    def draw(axis: Axes) -> None:
        line(axis, history.steps, along, color=LINE_COLOURS[0], lw=0.9)
        axis.axhline(2, color=LINE_COLOURS[1], lw=1, ls=(0, (6, 3)))
        low, high = np.quantile(known, (0.01, 0.99))
        top = max(3.0, 1.1 * float(high))
        axis.set(ylim=(min(-0.05 * top, 1.1 * float(low)), top), ylabel="step times curvature")

    return "Step times the curvature along it; dashed: 2, the edge of stability", draw


def _alignments(history: History) -> _Panel | None:
    alignment = history.global_alignment_correlation(_WINDOW)
    if not np.isfinite(alignment).any():
        return None
    caption = f"Alignment of the gradient with the momentum, mean of {_WINDOW - 1} steps"
    return caption, lambda axis: _cosines(axis, history.steps, alignment, "cosine")


def _step_sizes(history: History) -> _Panel | None:
    sizes = history.lr * history.step_scale
    sizes = np.where(sizes > 0, sizes, np.nan)
    shown = np.isfinite(sizes).any(1)
    if not shown.any() or np.nanmin(sizes) == np.nanmax(sizes):
        return None
    adapted = bool((history.step_scale != 1).any())
    levels = np.nanquantile(sizes[shown], (0.5, 0, 1), axis=1)
    if alike := bool((levels[1] == levels[2]).all()):
        levels = levels[:1]

    def draw(axis: Axes) -> None:
        for i, level in enumerate(levels):
            style = {"label": ("median", "smallest", "largest")[i], "ls": ("-", "--", ":")[i]}
            line(axis, history.steps[shown], level, color=LINE_COLOURS[i], lw=1.1, **style)
        axis.set(yscale="log", ylabel="step size" if adapted else "learning rate")
        if not alike:
            axis.legend(frameon=False, fontsize=8.5)

    return "Step sizes of the layers (log)" if adapted else "Learning rate (log)", draw


def _cosines(axis: Axes, steps: np.ndarray, values: np.ndarray, label: str) -> None:
    """A line from -1 to 1."""
    line(axis, steps, values, color=LINE_COLOURS[0], lw=1.1)
    axis.axhline(0, color=LINE_COLOURS[3], lw=0.8, ls=":")
    axis.set(ylim=(-1.08, 1.08), ylabel=label)


def _recurrences(history: History) -> Iterator[tuple[str, str]]:
    def recurrence(axis: Axes) -> None:
        plot.plot_recurrence(history, ax=axis)
        axis.set_title("")

    def lags(axis: Axes) -> None:
        plot.plot_lags(history, range(1, min(17, len(history))), ax=axis)
        axis.lines[0].set_color(LINE_COLOURS[0])
        for band in axis.collections:
            band.set_color(LINE_COLOURS[0])
        axis.set_title("")

    yield "Correlation of every pair of steps, all layers together", panel(recurrence, height=3.5)
    yield (
        "Correlation with the gradient a number of steps before: median and quartiles",
        panel(lags, height=3.5),
    )


def summary_table(summary: Summary) -> str:
    """The table of a summary: all layers together, then each, at most those 2,000 with the largest shares."""
    rows: Sequence[Row] = summary.layers
    note = ""
    if len(rows) > _ROWS:
        chosen = np.argsort([-row.share if np.isfinite(row.share) else 0.0 for row in rows], kind="stable")
        rows = [rows[i] for i in np.sort(chosen[:_ROWS])]
        note = (
            f"<p>The {_ROWS} of {len(summary.layers)} layers with the largest shares of the dot product.</p>"
        )
    header = ("layer", "correlation", "negative", "step × curvature", "share of dot product", "hint")
    lines = [f"<tr>{''.join(f'<th>{name}</th>' for name in header)}</tr>"]
    for row in (summary.overall, *rows):
        name, *numbers, hint = map(escaped, cells(row))
        name = re.sub(r"([._])", r"\1<wbr>", name)  # where a long one may be broken
        middle = "".join(
            f'<td class="number" data-label="{label}">{value.replace("-", "−")}</td>'
            for label, value in zip(header[1:-1], numbers, strict=True)
        )
        lines.append(f'<tr class="{row.state}"><td class="name">{name}</td>{middle}<td>{hint}</td></tr>')
    return f'{note}<div class="scroll long"><table class="layers">{"".join(lines)}</table></div>'


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---- parts of pages ----------------------------------------------------------------------------------


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page, light or dark like the reader's system."""
    here = Path(__file__).parent
    body = _SVG.sub(lambda drawn: themed(drawn[0]), "\n".join(parts))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(title)}</title>
<style>{(here / "page.css").read_text(encoding="utf-8")}</style></head><body>
{body}
<script>{(here / "page.js").read_text(encoding="utf-8")}</script>
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
    """An element that shows (T, L) correlations, and each value on hover.

    Args:
        values: from -1 to 1, NaN where nothing is known.
        names: of the L layers.
        what: is shown, as text for those who cannot see it.
        at: numbers of the T rows, ascending. Default: 0, 1, ...
        unit: what these numbers count.
    """
    most = max(1, min(COLUMNS, _CELLS // max(1, len(names))))
    numbers = np.arange(len(values)) if at is None else at
    edges = np.ceil(stretches(numbers, most)).astype(int)
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
    first, final, last = escaped(names[0]), escaped(names[-1]), edges[-1] - 1
    quarters = np.arange(5) if last - numbers[0] >= 4 else np.array([0, 4])
    ticks = "".join(f"<span>{n}</span>" for n in numbers[0] + (last - numbers[0]) * quarters // 4)
    return (
        f'<div class="heat" data-map="{escaped(json.dumps(content, separators=(",", ":")))}">'
        f'<div class="axis"><span class="ends">{first} (first layer) above</span>'
        f'<span class="key">−1 <span class="scale" style="background: {scale}"></span> +1</span></div>'
        f'<div class="rows" aria-hidden="true"></div><div class="cells"><canvas tabindex="0" role="img" '
        f'aria-label="{escaped(what)} of {count(len(names), "layer")}"></canvas><output></output></div>'
        f'<div class="axis ticks">{ticks}</div>'
        f'<div class="axis"><span class="ends">{final} (last layer) below</span><span>{unit}</span></div>'
        f"</div>"
    )


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


def panel(draw: Callable[[Axes], None], height: float = 2.4) -> str:
    """The SVG of one small figure over steps."""
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.1, height), layout="constrained")
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
    """An SVG with the page's colours for text and lines; one with a picture keeps its own, on white."""
    if "<image" in drawn:
        return drawn.replace("<svg", '<svg class="paper"', 1)
    return _COLOUR.sub(lambda colour: _THEMED.get(colour[0], colour[0]), drawn)


def _rounded(path: re.Match) -> str:
    return _LONG.sub(lambda number: f"{float(number[0]):.2f}", path[0])


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("a page needs matplotlib: pip install matplotlib") from error
    return matplotlib
