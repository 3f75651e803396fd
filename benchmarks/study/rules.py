"""The paper's claims as rules over a recorded run, each with a number that decides it.

All rules look at the windowed mean w_t of the global correlation (h = 5 iterations; paper, Sec. II-A). A
*phase* is a maximal stretch of epochs in which w keeps its sign; a sign counts as changed once w passes 0 by
more than `HYSTERESIS`, so that noise around 0 and single spikes do not cut a phase in two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from oscopt import History

from .config import WINDOW

HYSTERESIS = 0.1
START = 10  # epochs, of which the paper says that a CNN begins with about as many smooth ones


@dataclass(frozen=True)
class Record:
    """A run: its history (T rows) and the loss before each of the T steps."""

    history: History
    loss: np.ndarray

    @property
    def windowed(self) -> np.ndarray:
        """w: float64, shape (T,)."""
        return self.history.global_correlation(window=WINDOW)


@dataclass(frozen=True)
class Verdict:
    """What a rule found."""

    claim: str
    rule: str
    measured: float
    held: bool


def phase_signs(windowed: np.ndarray) -> np.ndarray:
    """The sign of each epoch's phase, -1 or 1; 0 until there is one: int, shape (T,)."""
    signs = np.zeros(len(windowed), int)
    sign = 0
    for t, w in enumerate(windowed):
        if abs(w) > HYSTERESIS:
            sign = 1 if w > 0 else -1
        signs[t] = sign
    return signs


def decrease_share(loss: np.ndarray, signs: np.ndarray) -> float:
    """Share of the loss decrease that the steps of negative phases made; NaN if the loss did not decrease.

    The step of epoch t takes the loss from loss[t] to loss[t + 1], so it counts loss[t] - loss[t + 1], rises
    included.
    """
    total = loss[0] - loss[-1]
    if not total > 0:
        return float("nan")
    return float(-np.diff(loss)[signs[:-1] < 0].sum() / total)


def _end(record: Record) -> float:
    """Mean of w over the last tenth of the epochs."""
    windowed = record.windowed
    return float(np.nanmean(windowed[-max(1, len(windowed) // 10) :]))


def _least_windowed(record: Record) -> float:
    return float(np.nanmin(record.windowed))


def _start(record: Record) -> float:
    """Mean of w over the first `START` epochs."""
    return float(np.nanmean(record.windowed[: START + 1]))


def _early_negative(record: Record) -> float:
    return _negative_share(record.windowed[: max(2, len(record.windowed) // 5)])


def _decrease(record: Record) -> float:
    return decrease_share(record.loss, phase_signs(record.windowed))


def _agreement(record: Record) -> float:
    layers = record.history.correlation(window=WINDOW)
    signs = phase_signs(record.windowed)[:, None]
    known = np.isfinite(layers) & (signs != 0)
    return float((np.sign(layers) == signs)[known].mean())


def _negative_share(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float((values < 0).mean())


def _first_layer_negative(record: Record) -> float:
    return _negative_share(record.history.correlation(window=WINDOW)[:, 0])


def _last_layer(record: Record) -> float:
    return float(np.nanmedian(record.history.correlation(window=WINDOW)[:, -1]))


def _first_layer_share(record: Record) -> float:
    size = np.abs(record.history.dot[1:])
    return float(np.nanmedian(size[:, 0] / size.sum(1)))


def _negative_epochs(record: Record) -> float:
    return _negative_share(record.windowed)


@dataclass(frozen=True)
class Rule:
    """`measure(record)` decides by `holds(value)`; `text` says so in words."""

    text: str
    measure: Callable[[Record], float]
    holds: Callable[[float], bool]


RULES: dict[str, Rule] = {
    "correlated_throughout": Rule("smallest w >= 0.9", _least_windowed, lambda v: v >= 0.9),
    "smooth_first": Rule(f"mean w of the first {START} epochs >= 0.8", _start, lambda v: v >= 0.8),
    "oscillates_first": Rule(
        "w negative in more than half of the first fifth of the epochs", _early_negative, lambda v: v > 0.5
    ),
    "oscillates_later": Rule("mean w of the last tenth <= -0.5", _end, lambda v: v <= -0.5),
    "stable_later": Rule("mean w of the last tenth >= 0.9", _end, lambda v: v >= 0.9),
    "decrease_while_negative": Rule(
        "more than half of the loss decrease in negative phases", _decrease, lambda v: v > 0.5
    ),
    "layers_agree": Rule(
        "layers have the sign of the global phase in >= 75 % of all epochs", _agreement, lambda v: v >= 0.75
    ),
    "first_layer_negative": Rule(
        "first layer's w negative in more than half of the epochs", _first_layer_negative, lambda v: v > 0.5
    ),
    "last_layer_positive": Rule("median of the last layer's w >= 0.9", _last_layer, lambda v: v >= 0.9),
    "first_layer_dominates": Rule(
        "median share of the first layer in the sizes of the dot products > 0.5",
        _first_layer_share,
        lambda v: v > 0.5,
    ),
    "suppressed": Rule("w negative in at most 10 % of the epochs", _negative_epochs, lambda v: v <= 0.1),
}
"""By claim."""


def judge(claims: tuple[str, ...], record: Record) -> list[Verdict]:
    """The verdict on each claim; a value that is NaN (too short a run) holds nothing."""
    verdicts = []
    for claim in claims:
        rule = RULES[claim]
        with np.errstate(invalid="ignore"):
            value = rule.measure(record) if len(record.history) > 1 else float("nan")
        verdicts.append(Verdict(claim, rule.text, value, bool(rule.holds(value))))
    return verdicts
