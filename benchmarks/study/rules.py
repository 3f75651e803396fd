"""The paper's claims as rules over a recorded run, each with a number that decides it.

All rules look at w, the mean correlation in a window of h = 5 iterations (paper, Sec. II-A), of all layers
together or of single ones. Two notions serve most of them: the *phases* of a run (:func:`phase_signs`) and
its *turn* (:func:`turn`). docs/method.md derives both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from oscopt import History

from .config import WINDOW
from .errors import UserError


@dataclass(frozen=True)
class Record:
    """What a run left.

    Attributes:
        history: the sums of T steps and L layers.
        loss: before each step, shape (T,).
        accuracy, seconds: likewise.
        sharpness: top eigenvalue of the Hessian before each step, NaN where it was not asked for.
        updates: the same sums for the updates x_{t+1} - x_t; None: plain gradient descent, where they are
            the gradients' but for a factor.
        beside: the run that this one is compared with.
        recurrence: sketches of the whole gradient, for the correlation of any two epochs; None: not kept.
    """

    history: History
    loss: np.ndarray
    accuracy: np.ndarray | None = None
    seconds: np.ndarray | None = None
    sharpness: np.ndarray | None = None
    updates: History | None = None
    beside: Record | None = None
    recurrence: History | None = None

    @property
    def windowed(self) -> np.ndarray:
        """w of all layers together: float64, shape (T,)."""
        return self.history.global_correlation(window=WINDOW)

    @property
    def layers(self) -> np.ndarray:
        """w of each layer: float64, shape (T, L)."""
        return self.history.correlation(window=WINDOW)


@dataclass(frozen=True)
class Verdict:
    """What a rule found; `measured` is NaN where the run cannot tell, which holds nothing."""

    claim: str
    rule: str
    measured: float
    held: bool


# ---- phases and the turn -----------------------------------------------------------------------------------


def phase_signs(windowed: np.ndarray) -> np.ndarray:
    """The sign of the phase that each epoch belongs to, -1 or 1; 0 before the first: int, shape (T,).

    A phase begins where w changes its sign for at least h epochs. One odd pair of gradients enters h - 1
    windowed means, so it can neither begin nor cut a phase, however large it is.
    """
    signs = np.zeros(len(windowed), int)
    known = np.flatnonzero(np.isfinite(windowed) & (windowed != 0))
    if not len(known):
        return signs
    # Where w is unknown or exactly 0 it keeps the sign that it had.
    filled = np.sign(windowed[known[np.searchsorted(known, np.arange(len(windowed)), side="right") - 1]])
    filled[: known[0]] = 0
    starts = np.flatnonzero(np.diff(filled, prepend=np.nan) != 0)
    sign = 0
    for start, stop in zip(starts, [*starts[1:], len(windowed)], strict=True):
        if stop - start >= WINDOW:
            sign = int(filled[start])
        signs[start:stop] = sign
    return signs


def turn(windowed: np.ndarray) -> int | None:
    """The epoch that best cuts w into two stretches of constant mean, in least squares.

    Either stretch has at least h epochs; None: the run is too short for that.
    """
    first = 1  # no gradient comes before that of epoch 0
    w = np.nan_to_num(windowed[first:])
    n = len(w)
    if n < 2 * WINDOW:
        return None
    cut = np.arange(WINDOW, n - WINDOW + 1)
    before = np.cumsum(w)[cut - 1]
    explained = before**2 / cut + (w.sum() - before) ** 2 / (n - cut)
    return int(cut[np.argmax(explained)]) + first


def decrease_share(loss: np.ndarray, signs: np.ndarray) -> float:
    """Share of the loss decrease that the steps of negative phases made; NaN if the loss did not decrease.

    The step of epoch t takes the loss from loss[t] to loss[t + 1], so it counts loss[t] - loss[t + 1], rises
    included. The denominator is the decrease over all steps, those before the first phase included.
    """
    total = loss[0] - loss[-1]
    if not total > 0:
        return float("nan")
    return float(-np.diff(loss)[signs[:-1] < 0].sum() / total)


def negative_share(record: Record) -> float:
    """Share of all (epoch, layer) pairs in which the layer's w is negative."""
    layers = record.layers[np.isfinite(record.layers)]
    return float((layers < 0).mean()) if len(layers) else float("nan")


# ---- what the rules measure --------------------------------------------------------------------------------


def _least(record: Record) -> float:
    return np.nanmin(record.windowed)


def _before(record: Record) -> float:
    at = turn(record.windowed)
    return float("nan") if at is None else np.nanmedian(record.windowed[:at])


def _after(record: Record) -> float:
    at = turn(record.windowed)
    return float("nan") if at is None else np.nanmedian(record.windowed[at:])


def _decrease(record: Record) -> float:
    return decrease_share(record.loss, phase_signs(record.windowed))


def _agreement(record: Record) -> float:
    layers, signs = record.layers, phase_signs(record.windowed)[:, None]
    known = np.isfinite(layers) & (signs != 0)
    return (np.sign(layers) == signs)[known].mean()


def _orders_apart(record: Record) -> float:
    size = np.nanmedian(np.abs(record.history.dot), axis=0)
    return abs(np.log10(size[0]) - np.log10(size[-1]))


def _first_layer(record: Record) -> float:
    return np.nanmedian(record.layers[:, 0])


def _last_layer(record: Record) -> float:
    return np.nanmedian(record.layers[:, -1])


def _first_layer_share(record: Record) -> float:
    size = np.abs(record.history.dot)
    return np.nanmedian(size[:, 0] / size.sum(1))


def _first_layer_distance(record: Record) -> float:
    return np.nanmedian(np.abs(record.layers[:, 0] - record.windowed))


def _last_layer_lead(record: Record) -> float:
    while_negative = phase_signs(record.windowed) < 0
    if not while_negative.any():
        return float("nan")
    return np.nanmedian((record.layers[:, -1] - record.windowed)[while_negative])


def _beside(record: Record) -> float:
    if record.beside is None:
        return float("nan")
    theirs = negative_share(record.beside)
    return negative_share(record) / theirs if theirs > 0 else float("nan")


# ---- the rules ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A claim in the paper's words, and the number that decides it.

    It holds where `measure(record)` is on the right side of `bound`; `sign` is ">=", "<=" or ">".
    """

    says: str
    quantity: str
    sign: str
    bound: float
    measure: Callable[[Record], float]

    @property
    def text(self) -> str:
        """The rule in words."""
        return f"{self.quantity} {self.sign} {self.bound:g}"

    def holds(self, value: float) -> bool:
        """Whether `value` is on the right side; NaN is on neither."""
        sides = {">=": value >= self.bound, "<=": value <= self.bound, ">": value > self.bound}
        return bool(sides[self.sign])


# "Close to +1" is read as at least 0.9 where it is said of a whole run or of its end, and 0.8 of its
# beginning; "highly negative" as at most -0.5; "most" as more than half; "all" as 75 %.
RULES: dict[str, Rule] = {
    "correlated_throughout": Rule(
        "very close to +1 throughout the training (Sec. II-B)", "smallest w", ">=", 0.9, _least
    ),
    "smooth_first": Rule(
        "at the very beginning, the correlation is close to +1 (Sec. III-A)",
        "median w before the turn", ">=", 0.8, _before,
    ),
    "oscillates_later": Rule(
        "then it drops to highly negative values close to -1 (Sec. III-A)",
        "median w after the turn", "<=", -0.5, _after,
    ),
    "oscillates_first": Rule(
        "highly negative in the initial training phase (Sec. III-B)",
        "median w before the turn", "<=", -0.5, _before,
    ),
    "stable_later": Rule(
        "then it increases to highly positive values when approaching the minimizer (Sec. III-B)",
        "median w after the turn", ">=", 0.9, _after,
    ),
    "decrease_while_negative": Rule(
        "most of the loss decrease is achieved with oscillating gradients (Secs. III-A, III-B)",
        "share of the loss decrease in negative phases", ">", 0.5, _decrease,
    ),
    "layers_agree": Rule(
        "the correlation behaves consistently across different layers (Sec. III-C)",
        "share of (epoch, layer) pairs with the sign of the global phase", ">=", 0.75, _agreement,
    ),
    "dots_of_one_order": Rule(
        "layer-wise dot products are of similar numerical order (Sec. III-C)",
        "orders of magnitude between the median sizes of the first and the last layer's dot products",
        "<=", 1.0, _orders_apart,
    ),
    "first_layer_negative": Rule(
        "the first layer's correlation is highly negative in most of the epochs (Sec. IV)",
        "median w of the first layer", "<=", -0.5, _first_layer,
    ),
    "last_layer_positive": Rule(
        "the last layer's correlation is close to +1 (Sec. IV)",
        "median w of the last layer", ">=", 0.9, _last_layer,
    ),
    "first_layer_dominates": Rule(
        "the dot product of the first layer dominates that of all the layers (Sec. IV)",
        "median share of the first layer in the sizes of the dot products", ">", 0.5, _first_layer_share,
    ),
    "first_layer_follows": Rule(
        "the first layer's correlation is highly consistent with the global one (Sec. IV)",
        "median distance of the first layer's w from the global w", "<=", 0.2, _first_layer_distance,
    ),
    "last_layer_higher": Rule(
        "the last layer's correlation is substantially higher (Sec. IV)",
        "median of the last layer's w less the global w, in negative phases", ">=", 0.5, _last_layer_lead,
    ),
    "suppressed": Rule(
        "Adam suppresses the oscillation across different layers (Sec. V)",
        "share of (epoch, layer) pairs with negative w", "<=", 0.1, negative_share,
    ),
    "suppressed_beside_gd": Rule(
        "as a comparison with gradient descent (Sec. V)",
        "share of (epoch, layer) pairs with negative w, over that of gradient descent", "<=", 0.5, _beside,
    ),
}  # fmt: skip
"""By claim."""


def check_claims(claims: Sequence[str]) -> tuple[str, ...]:
    """`claims`, if there is a rule for each.

    Raises:
        UserError: one has none.
    """
    for claim in claims:
        if claim not in RULES:
            raise UserError(f"unknown rule {claim!r}; there are {', '.join(RULES)}")
    return tuple(claims)


def judge(claims: Sequence[str], record: Record) -> list[Verdict]:
    """The verdict on each claim."""
    verdicts = []
    for claim in claims:
        rule = RULES[claim]
        with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # means and medians of nothing are NaN
            value = float(rule.measure(record)) if len(record.history) > 1 else float("nan")
        verdicts.append(Verdict(claim, rule.text, value, rule.holds(value)))
    return verdicts
