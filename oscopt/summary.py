"""What a record says in words: a table with a row for each layer, and a hint with its reason.

The bounds below are chosen, not derived. They are tried on synthetic records and on full-batch gradient
descent at known multiples of 2 / sharpness (tests/oscopt/test_summary.py).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from .history import History

if TYPE_CHECKING:
    import pandas

ALL = "all layers"
"""The name of the row of all layers together."""
MIN_STEPS = 20
"""Pairs of gradients that a hint needs."""
OSCILLATES = -0.2
"""Median correlation from which on downwards a layer oscillates, ..."""
OFTEN_NEGATIVE = 0.6
"""... and the share of steps with a negative correlation that it takes."""
SELDOM_NEGATIVE = 0.1
"""The share up to which gradients agree, ..."""
AGREES, SMOOTH = 0.3, 0.9
"""... and the median correlations from which on they do, and training is smooth. Between `OSCILLATES`
and `AGREES` they hardly agree: noise if all layers together do so too, else a mixture of both."""
GROWS = 1.1
"""Median growth of the gradient's norm in a step that makes oscillation a divergence. At the edge of
stability it grows more slowly, until the curvature gives way."""
FULL_BATCH = 0.98
"""A headroom is told from this median correlation on: below, noise would pass for curvature."""
AMPLE = 20.0
"""A larger headroom is not told as a number: the steps did not meet the curvature that limits the rate."""

_STATES = {
    "diverges": "diverging",
    "edge": "oscillating",
    "mixed": "between",
    "noise": "in noise",
    "agrees": "agreeing",
    "smooth": "smooth",
    "unknown": "with too few steps",
}


@dataclass(frozen=True)
class Row:
    """A layer in the steps looked at, or all layers together.

    Attributes:
        layer: its name; :data:`ALL` for all together.
        steps: pairs of gradients that are known.
        correlation: median of mu; NaN where no pair is known.
        negative: share of these pairs with mu < 0.
        step_curvature: median of the step times the curvature along it, 2 at the edge of stability; NaN where
            it does not follow from the record.
        share: of the layer in the global dot product: mean over the steps of abs(dot) over its sum.
        state: "edge", "diverges", "smooth", "agrees", "mixed", "noise" or "unknown".
        hint: a sentence for people.
    """

    layer: str
    steps: int
    correlation: float
    negative: float
    step_curvature: float
    share: float
    state: str
    hint: str


@dataclass(frozen=True)
class Summary:
    """A table; ``print`` shows it.

    Attributes:
        first, last: numbers of the first and last step looked at; -1 where there is none.
        overall: all layers together.
        layers: one row a layer.
    """

    first: int
    last: int
    overall: Row
    layers: tuple[Row, ...]

    @property
    def tally(self) -> str:
        """How many layers are in which state, the first few of those that oscillate by name."""
        states = [row.state for row in self.layers]
        parts = []
        for state, text in _STATES.items():
            if state in states:
                parts.append(f"{states.count(state)} {text}")
        told = f"{len(states)} layer{'' if len(states) == 1 else 's'}: {', '.join(parts) or 'none'}"
        turning = [row.layer for row in self.layers if row.state in ("edge", "diverges")]
        if not turning or len(turning) == len(states):
            return told
        return f"{told} (oscillating: {', '.join(turning[:3])}{', ...' if len(turning) > 3 else ''})"

    def __str__(self) -> str:
        header = ("layer", "correlation", "negative", "step x curvature", "share", "hint")
        lines = [header, *(cells(row) for row in (self.overall, *self.layers))]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
        table = (
            "  ".join(
                [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=False))]
                + [line[-1]]
            )
            for line in lines
        )
        span = f"steps {self.first} to {self.last}" if self.first >= 0 else "no steps"
        return "\n".join([f"{span}; {self.tally}", *table])

    def to_dataframe(self) -> pandas.DataFrame:
        """One line for each layer and one for all together, indexed by name, with the fields of :class:`Row`.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("Summary.to_dataframe needs pandas: pip install pandas") from error
        names = [field.name for field in fields(Row)]
        return pandas.DataFrame(map(asdict, (self.overall, *self.layers)), columns=names).set_index("layer")


def summarise(history: History, last: int = 500) -> Summary:
    """See :meth:`oscopt.History.summary`."""
    if last < 1:
        raise ValueError(f"Invalid last: {last}; use a number of steps, 1 or more")
    recent = history.last(last)
    dot, sq_norm = recent.dot, recent.sq_norm
    sizes = np.abs(dot)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = sizes / np.nansum(sizes, axis=1, keepdims=True)
    along, along_all = step_curvature(recent)
    remedies = _remedies(recent)
    room, room_all = _headroom(history)

    whole = recent.global_correlation()
    lost = _lost(history)
    noisy = OSCILLATES < _median(whole) < AGREES

    def row(
        name: str, mu: np.ndarray, norms: np.ndarray, along: np.ndarray, room: float, share: float
    ) -> Row:
        known = mu[np.isfinite(mu)]
        state, hint = _judged(known, norms, room, remedies, recent.about.get("quantity"), noisy, lost)
        return Row(
            layer=name,
            steps=len(known),
            correlation=_median(known),
            negative=float((known < 0).mean()) if len(known) else math.nan,
            step_curvature=_median(along),
            share=share,
            state=state,
            hint=hint,
        )

    mu = recent.correlation()
    layers = tuple(
        row(name, mu[:, i], sq_norm[:, i], along[:, i], float(room[i]), _mean(shares[:, i]))
        for i, name in enumerate(recent.layer_names)
    )
    share = 1.0 if layers else math.nan
    overall = row(ALL, whole, sq_norm.sum(1), along_all, room_all, share)
    steps = recent.steps
    first, final = (int(steps[0]), int(steps[-1])) if len(steps) else (-1, -1)
    return Summary(first, final, overall, layers)


def step_curvature(history: History) -> tuple[np.ndarray, np.ndarray]:
    """The step times the curvature along it, 2 at the edge of stability: float64, (T, L), and (T,) of all.

    1 - <g_t, g_{t-1}> / ||g_{t-1}||^2, which needs no learning rate; of all layers together each counts by
    its step. NaN with momentum, and wherever else a step was not along the gradient (`history.about`).
    """
    dot, prev, step = history.dot, history.prev_sq_norm, history.prev_step_size
    if history.about.get("plain", True):
        dot = np.where(np.isfinite(history.momentum_sq_norm), np.nan, dot)
    else:
        dot = np.full_like(dot, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 - dot / prev, (step * (prev - dot)).sum(1) / (step * prev).sum(1)


def cells(row: Row) -> tuple[str, ...]:
    """The columns of a table, as text."""
    return (
        row.layer,
        _number(row.correlation, "+.3f"),
        _number(100 * row.negative, ".0f", " %"),
        _number(row.step_curvature, ".3g"),
        _number(100 * row.share, ".1f", " %"),
        row.hint,
    )


def _judged(
    mu: np.ndarray,
    sq_norm: np.ndarray,
    headroom: float,
    remedies: str,
    quantity: str | None,
    noisy: bool,
    lost: int | None,
) -> tuple[str, str]:
    """A state and what to tell of it.

    Args:
        mu: correlations, none of them NaN.
        noisy: whether all layers together hardly agree: noise is in all layers, or it is none.
        lost: the last step with a finite gradient in any layer, if later ones have none.
    """
    if lost is not None:
        return "diverges", f"diverged: no finite {quantity or 'gradients'} after step {lost}: {remedies}"
    count, what = len(mu), "updates" if quantity == "updates" else "gradients"
    if count < MIN_STEPS:
        return "unknown", f"not enough steps: {count} pairs are known, {MIN_STEPS} are needed"
    median, negative = float(np.median(mu)), float((mu < 0).mean())
    if median <= OSCILLATES and negative >= OFTEN_NEGATIVE:
        share = f"in {100 * negative:.0f} % of the last {count} steps"
        with np.errstate(divide="ignore", invalid="ignore"):
            growth = np.sqrt(sq_norm[1:] / sq_norm[:-1])
        if _median(growth) > GROWS:
            return "diverges", f"diverges: {what} turn round {share} and grow: {remedies}"
        if what == "updates":
            return "edge", f"adjacent updates undo each other {share}: {remedies}"
        return "edge", f"oscillates at the edge of stability {share}: {remedies}"
    if median >= AGREES and negative > SELDOM_NEGATIVE:
        return (
            "mixed",
            f"{what} turn round in {100 * negative:.0f} % of the last {count} steps and agree in most",
        )
    if median >= SMOOTH:
        reason = f"smooth: mu > {math.floor(100 * median) / 100:.2f}" if median < 1 else "smooth: mu = 1"
        if what == "updates" or not math.isfinite(headroom) or median < FULL_BATCH:
            return "smooth", reason
        if headroom < 1.5:
            return "smooth", f"{reason}: earlier steps met the edge at about this rate"
        if headroom > AMPLE:
            return "smooth", f"{reason}: the rate can grow: the edge is not in sight"
        return "smooth", f"{reason}: the rate can grow about {headroom:.2g}x before the edge"
    if median >= AGREES:
        return "agrees", f"adjacent {what} agree (mu {median:+.2f}) without oscillating"
    hardly = f"adjacent {what} hardly agree (mu {median:+.2f})"
    if what == "updates" or not noisy or median <= OSCILLATES:
        return "mixed", f"{hardly}: neither smooth nor oscillating"
    return "noise", f"noise, if these are mini-batches: {hardly}; look at update correlations"


def _headroom(history: History) -> tuple[np.ndarray, float]:
    """How many times larger the step could be before the edge, (L,), and of all layers together.

    ||g_t - g_{t-1}|| / ||g_{t-1}|| is the step times ||H u||, u the direction of the step: at most the step
    times the sharpness. Its largest in the whole record counts, as smooth training leaves the directions of
    large curvature soon, so that recent steps do not meet it; the sharpness may have changed since then. NaN
    where no curvature follows.
    """
    along, along_all = step_curvature(history)
    step, rates = history.prev_step_size, history.prev_lr
    diff, prev = history.diff_sq_norm, history.prev_sq_norm
    if not len(step):
        return np.full(along.shape[1], np.nan), math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        now = history.lr[-1] / rates
        layers = np.where(np.isfinite(along), now * np.sqrt(diff / prev), np.nan)
        together = now.mean(1) * np.sqrt((step * diff).sum(1) / (step * prev).sum(1))
        together = np.where(np.isfinite(along_all), together, np.nan)
        columns = np.concatenate([layers, together[:, None]], axis=1)
        largest = np.where(np.isfinite(columns), columns, 0.0).max(0)
        room = np.where(largest > 0, 2 / largest, np.nan)
    return room[:-1], float(room[-1])


def _lost(history: History) -> int | None:
    """The last step with a finite gradient in any layer, if there is one and later steps have none."""
    finite = np.flatnonzero(np.isfinite(history.sq_norm).any(1))
    return int(history.steps[finite[-1]]) if len(finite) and finite[-1] < len(history) - 1 else None


def _remedies(history: History) -> str:
    """What helps against oscillation, where it is not there already."""
    about = history.about
    own, plain = about.get("optimizer", "OscGD") == "OscGD", about.get("plain", True)
    remedies = ["a smaller rate here"]
    if (own or plain) and not np.isfinite(history.momentum_sq_norm).any():
        remedies.append("or momentum")
    if (own or plain) and not (np.isfinite(history.step_scale) & (history.step_scale != 1)).any():
        remedies.append("or adapt='auto'")
    return ", ".join(remedies)


def _median(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def _number(value: float, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if math.isfinite(value) else "-"
