"""A record in words: a table with a row for each layer, and a hint with its reason.

The bounds below are chosen, not derived. They are checked on synthetic records and on full-batch gradient
descent at known multiples of 2 / sharpness (tests/oscopt/test_summary.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from .history import History

if TYPE_CHECKING:
    import pandas

ALL = "all layers"
"""The name of the row of all layers together."""
MIN_STEPS = 20
"""A hint needs this many pairs of gradients."""
OSCILLATES = -0.2
"""A layer oscillates if its median correlation is at most this, ..."""
OFTEN_NEGATIVE = 0.6
"""... and at least this share of its correlations is negative."""
SELDOM_NEGATIVE = 0.1
"""Gradients agree if at most this share of correlations is negative, ..."""
AGREES, SMOOTH = 0.3, 0.9
"""... and the median is at least the first of these; from the second on, training is smooth. Between
`OSCILLATES` and `AGREES` they hardly agree: noise if that is true of all layers together, else mixed."""
IN_PHASES = 1 / 3
"""A correlation that changes sign less often than this, relative to independent signs, comes in phases: it
is not noise, even if its median is near 0."""
GROWS = 1.1
"""Oscillation is a divergence if the gradient's norm grows by more than this factor in the median step. At
the edge of stability it grows more slowly, until the curvature gives way."""
FULL_BATCH = 0.98
"""A headroom is given only from this median correlation on: below, noise would pass for curvature. Updates
that momentum has averaged are smooth from here on: in pure noise they correlate by the momentum, 0.9."""
AMPLE = 20.0
"""A larger headroom is not given as a number: the steps did not meet the curvature that limits the rate."""

_STATES = {
    "diverges": "diverging",
    "edge": "oscillating",
    "mixed": "mixed",
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
        share: of the layer in the global dot product: mean over steps of abs(dot) over its sum over layers.
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
        what: was measured, such as "AdamW's updates".
        first, last: numbers of the first and last step looked at; -1 where there is none.
        overall: all layers together.
        layers: one row a layer.
    """

    what: str
    first: int
    last: int
    overall: Row
    layers: tuple[Row, ...]

    @property
    def tally(self) -> str:
        """How many layers are in which state; the first few of those that oscillate by name."""
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
        return "\n".join([f"{self.what[:1].upper() + self.what[1:]}, {span}; {self.tally}", *table])

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
    room, room_all = _headroom(history)
    run = _Run.of(recent, _lost(history))

    def row(
        name: str, mu: np.ndarray, norms: np.ndarray, along: np.ndarray, room: float, share: float
    ) -> Row:
        evidence = _Evidence(mu[np.isfinite(mu)], norms, room, run)
        state = _state(evidence)
        hint = _HINTS[state](evidence)
        return Row(
            layer=name,
            steps=len(evidence.mu),
            correlation=evidence.median,
            negative=evidence.negative,
            step_curvature=_median(along),
            share=share,
            state=state,
            hint=hint + run.advice if (name, state) == (ALL, "noise") else hint,
        )

    mu = recent.correlation()
    layers = tuple(
        row(name, mu[:, i], sq_norm[:, i], along[:, i], float(room[i]), _mean(shares[:, i]))
        for i, name in enumerate(recent.layer_names)
    )
    share = 1.0 if layers else math.nan
    overall = row(ALL, recent.global_correlation(), sq_norm.sum(1), along_all, room_all, share)
    steps = recent.steps
    first, final = (int(steps[0]), int(steps[-1])) if len(steps) else (-1, -1)
    return Summary(quantity(history), first, final, overall, layers)


def quantity(history: History) -> str:
    """What was measured, such as "gradients" or "AdamW's updates"."""
    what, optimizer = history.about.get("quantity", "gradients"), history.about.get("optimizer")
    return what if optimizer is None else f"{optimizer}'s {what}"


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


@dataclass(frozen=True)
class _Run:
    """What the hints of all layers depend on.

    Attributes:
        what: "gradients" or "updates".
        plain: whether every step was along the gradient: no momentum, no other optimizer.
        noisy: whether the gradients of all layers together hardly agree: noise is in all layers or in none.
        lost: the last step with a finite gradient in any layer, if later ones have none.
        remedies: what helps against oscillation.
    """

    what: str
    plain: bool
    noisy: bool
    lost: int | None
    remedies: str

    @classmethod
    def of(cls, recent: History, lost: int | None) -> _Run:
        what = "updates" if recent.about.get("quantity") == "updates" else "gradients"
        mu = recent.global_correlation()
        known = mu[np.isfinite(mu)]
        noisy = what == "gradients" and OSCILLATES < _median(known) < AGREES and not _in_phases(known)
        plain = recent.about.get("plain", True) and not np.isfinite(recent.momentum_sq_norm).any()
        return cls(what, plain, noisy, lost, _remedies(recent))

    @property
    def advice(self) -> str:
        """Against noise; plain updates are the gradients' multiples and show nothing else."""
        return "; a larger batch shows more" if self.plain else "; look at update correlations"


@dataclass(frozen=True)
class _Evidence:
    """What is known of a layer.

    Attributes:
        mu: its known correlations.
        sq_norm: its squared norms at all steps.
        headroom: see :func:`_headroom`.
    """

    mu: np.ndarray
    sq_norm: np.ndarray
    headroom: float
    run: _Run

    @property
    def median(self) -> float:
        return _median(self.mu)

    @property
    def negative(self) -> float:
        return float((self.mu < 0).mean()) if len(self.mu) else math.nan

    @property
    def growth(self) -> float:
        """Of the norm in the median step."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return _median(np.sqrt(self.sq_norm[1:] / self.sq_norm[:-1]))

    @property
    def often(self) -> str:
        return f"in {100 * self.negative:.0f} % of the last {len(self.mu)} steps"


def _state(known: _Evidence) -> str:
    """A key of `_STATES`."""
    if known.run.lost is not None:
        return "diverges"
    if len(known.mu) < MIN_STEPS:
        return "unknown"
    if known.median <= OSCILLATES and known.negative >= OFTEN_NEGATIVE:
        return "diverges" if known.growth > GROWS else "edge"
    if known.median >= AGREES and known.negative <= SELDOM_NEGATIVE:
        averaged = known.run.what == "updates" and not known.run.plain
        return "smooth" if known.median >= (FULL_BATCH if averaged else SMOOTH) else "agrees"
    hardly = OSCILLATES < known.median < AGREES
    return "noise" if hardly and known.run.noisy and not _in_phases(known.mu) else "mixed"


def _in_phases(mu: np.ndarray) -> bool:
    """Whether `mu` (none of them NaN) changes sign much less often than independent values would."""
    if len(mu) < MIN_STEPS:
        return False
    negative = mu < 0
    changes, share = (negative[1:] != negative[:-1]).mean(), negative.mean()
    return bool(changes < IN_PHASES * 2 * share * (1 - share))


def _diverges(known: _Evidence) -> str:
    run = known.run
    if run.lost is not None:
        return f"diverged: no finite {run.what} after step {run.lost}: {run.remedies}"
    return f"diverges: {run.what} reverse {known.often} and grow: {run.remedies}"


def _edge(known: _Evidence) -> str:
    if known.run.what == "updates":
        return f"adjacent updates undo each other {known.often}: {known.run.remedies}"
    return f"oscillates at the edge of stability {known.often}: {known.run.remedies}"


def _smooth(known: _Evidence) -> str:
    median, room = known.median, known.headroom
    reason = f"smooth: mu > {math.floor(100 * median) / 100:.2f}" if median < 1 else "smooth: mu = 1"
    if known.run.what == "updates" or not math.isfinite(room) or median < FULL_BATCH:
        return reason
    if room < 1.5:
        return f"{reason}: earlier steps met the edge at about this rate"
    if room > AMPLE:
        return f"{reason}: the rate can grow: the edge is not in sight"
    return f"{reason}: the rate can grow about {room:.2g}x before the edge"


def _agrees(known: _Evidence) -> str:
    if known.run.what == "updates" and not known.run.plain:
        return f"adjacent updates agree, as a momentum of {known.median:.2f} makes them even in pure noise"
    return f"adjacent {known.run.what} agree without oscillating"


def _mixed(known: _Evidence) -> str:
    what = known.run.what
    if _in_phases(known.mu):
        ending = "and still at the end" if _median(known.mu[-5:]) < 0 else "but no longer at the end"
        return f"in phases: {what} reverse {known.often}, {ending}"
    if known.median >= AGREES:
        return f"{what} reverse {known.often} and agree in most"
    return f"adjacent {what} hardly agree: neither smooth nor oscillating"


_HINTS: dict[str, Callable[[_Evidence], str]] = {
    "diverges": _diverges,
    "edge": _edge,
    "mixed": _mixed,
    "noise": lambda known: "noise, if these are mini-batches: adjacent gradients hardly agree",
    "agrees": _agrees,
    "smooth": _smooth,
    "unknown": lambda known: f"not enough steps: {len(known.mu)} pairs are known, {MIN_STEPS} are needed",
}


def _headroom(history: History) -> tuple[np.ndarray, float]:
    """How many times larger the step could be before the edge, (L,), and of all layers together.

    ||g_t - g_{t-1}|| / ||g_{t-1}|| is the step times ||H u||, u the direction of the step: at most the step
    times the sharpness. Its largest value in the whole record counts, as smooth training soon leaves the
    directions of large curvature, so that recent steps do not meet them; the sharpness may have changed since
    then. NaN where the record gives no curvature.
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
    """What helps against oscillation and is not in use yet."""
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
