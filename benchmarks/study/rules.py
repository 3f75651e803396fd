"""The paper's claims as rules over a recorded run, each with a number that decides it.

All rules look at w, the mean correlation in a window of h = 5 iterations (paper, Sec. II-A), of all layers
together or of single ones. Two notions serve most of them: the *phases* of a run (:func:`phase_signs`) and
its *stretches* (:func:`stretches`). docs/method.md derives both.
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
class Curves:
    """What the rules look at, of T epochs and L layers.

    Attributes:
        windowed: w of all layers together, float64 (T,).
        layers: w of each layer, float64 (T, L).
        dot: <g_t, g_{t-1}> of each layer, float64 (T, L).
        loss: before each step, (T,).
        beside: of the run that this one is compared with.
    """

    windowed: np.ndarray
    layers: np.ndarray
    dot: np.ndarray
    loss: np.ndarray
    beside: Curves | None = None

    @classmethod
    def of(cls, record: Record) -> Curves:
        """Those of a run."""
        beside = None if record.beside is None else cls.of(record.beside)
        return cls(record.windowed, record.layers, record.history.dot, record.loss, beside)

    def begin(self, share: float) -> Curves:
        """Of the first epochs, this share of them: what a shorter run would have recorded."""
        end = int(share * len(self.loss))
        beside = None if self.beside is None else self.beside.begin(share)
        return Curves(self.windowed[:end], self.layers[:end], self.dot[:end], self.loss[:end], beside)


@dataclass(frozen=True)
class Verdict:
    """What a rule found.

    Attributes:
        measured: NaN where the run cannot tell, which holds nothing.
        settled: whether the first 80 % of the epochs (:data:`SHORTER`) give the same verdict.
        why: the reason in a few words, where it is not held.
    """

    claim: str
    rule: str
    measured: float
    held: bool
    settled: bool
    why: str = ""


SHORTER = 0.8
"""The share of its epochs that a run is judged by once more."""


# ---- phases and stretches ----------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Stretch:
    """Epochs `start` to `stop` - 1, smooth (`sign` 1) or oscillating (-1)."""

    sign: int
    start: int
    stop: int

    def median(self, windowed: np.ndarray) -> float:
        """Of w in these epochs."""
        return float(np.nanmedian(windowed[self.start : self.stop]))


def stretches(windowed: np.ndarray) -> list[Stretch]:
    """The run cut where its w turns, by turns smooth and oscillating; none where w never adds up to h.

    A stretch ends where the sum of w was at its extreme, if from there on w adds up to h against it: five
    epochs at full correlation, ten at half of it. It is the change detection by cumulative sums (Page 1954).
    What comes later never moves an end, and less than h against it, at the beginning or the end of the run
    too, belongs to the stretch beside it.
    """
    begins: list[tuple[int, int]] = []
    sign = 0
    high = low = (0.0, 0)  # the sum of w, and the epoch before which it was reached
    for epoch, total in enumerate(np.cumsum(np.nan_to_num(windowed)), start=1):
        high = (total, epoch) if total > high[0] else high
        low = (total, epoch) if total < low[0] else low
        if sign != 1 and total - low[0] >= WINDOW:
            sign, start, high = 1, low[1], (total, epoch)
        elif sign != -1 and high[0] - total >= WINDOW:
            sign, start, low = -1, high[1], (total, epoch)
        else:
            continue
        begins.append((sign, start if begins else 0))
    stops = [start for _, start in begins[1:]] + [len(windowed)]
    return [Stretch(sign, start, stop) for (sign, start), stop in zip(begins, stops, strict=False)]


def decrease_share(loss: np.ndarray, signs: np.ndarray) -> float:
    """Share of the loss decrease that the steps of negative phases made; NaN if the loss did not decrease.

    The step of epoch t takes the loss from loss[t] to loss[t + 1], so it counts loss[t] - loss[t + 1], rises
    included. The denominator is the decrease over all steps, those before the first phase included.
    """
    total = loss[0] - loss[-1]
    if not total > 0:
        return float("nan")
    return float(-np.diff(loss)[signs[:-1] < 0].sum() / total)


def _negative_share(curves: Curves) -> float:
    """Share of all (epoch, layer) pairs in which the layer's w is negative."""
    layers = curves.layers[np.isfinite(curves.layers)]
    return float((layers < 0).mean()) if len(layers) else float("nan")


# ---- what the rules measure --------------------------------------------------------------------------------


def _least(curves: Curves) -> float:
    return np.nanmin(curves.windowed)


def _first(curves: Curves) -> float:
    found = stretches(curves.windowed)
    return found[0].median(curves.windowed) if found else float("nan")


def _second(curves: Curves) -> float:
    found = stretches(curves.windowed)
    return found[1].median(curves.windowed) if len(found) > 1 else float("nan")


def _last(curves: Curves) -> float:
    found = stretches(curves.windowed)
    return found[-1].median(curves.windowed) if len(found) > 1 else float("nan")


def _until_oscillation_ends(curves: Curves) -> float:
    found = stretches(curves.windowed)
    number = next((i for i, stretch in enumerate(found) if stretch.sign < 0), None)
    # After a smooth beginning, an oscillation that is not over may be its first part or the run's later one.
    if number is None or 0 < number == len(found) - 1:
        return float("nan")
    return np.nanmedian(curves.windowed[: found[number].stop])


def _decrease(curves: Curves) -> float:
    return decrease_share(curves.loss, phase_signs(curves.windowed))


def _agreement(curves: Curves) -> float:
    layers, signs = curves.layers, phase_signs(curves.windowed)[:, None]
    known = np.isfinite(layers) & (signs != 0)
    return (np.sign(layers) == signs)[known].mean()


def _orders_apart(curves: Curves) -> float:
    size = np.nanmedian(np.abs(curves.dot), axis=0)
    return abs(np.log10(size[0]) - np.log10(size[-1]))


def _first_layer(curves: Curves) -> float:
    return np.nanmedian(curves.layers[:, 0])


def _last_layer(curves: Curves) -> float:
    return np.nanmedian(curves.layers[:, -1])


def _first_layer_share(curves: Curves) -> float:
    size = np.abs(curves.dot)
    return np.nanmedian(size[:, 0] / size.sum(1))


def _first_layer_distance(curves: Curves) -> float:
    return np.nanmedian(np.abs(curves.layers[:, 0] - curves.windowed))


def _last_layer_lead(curves: Curves) -> float:
    while_negative = phase_signs(curves.windowed) < 0
    if not while_negative.any():
        return float("nan")
    return np.nanmedian((curves.layers[:, -1] - curves.windowed)[while_negative])


def _beside(curves: Curves) -> float:
    if curves.beside is None:
        return float("nan")
    theirs = _negative_share(curves.beside)
    return _negative_share(curves) / theirs if theirs > 0 else float("nan")


# ---- the rules ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A claim in the paper's words, and the number that decides it.

    It holds where `measure(curves)` is on the right side of `bound`; `sign` is ">=", "<=" or ">".
    """

    says: str
    quantity: str
    sign: str
    bound: float
    measure: Callable[[Curves], float]

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
        "median w in the first stretch", ">=", 0.8, _first,
    ),
    "oscillates_later": Rule(
        "then it drops to highly negative values close to -1 (Sec. III-A)",
        "median w in the second stretch", "<=", -0.5, _second,
    ),
    "oscillates_first": Rule(
        "highly negative in the initial training phase (Sec. III-B)",
        "median w up to the end of the first oscillating stretch", "<=", -0.5, _until_oscillation_ends,
    ),
    "stable_later": Rule(
        "then it increases to highly positive values when approaching the minimizer (Sec. III-B)",
        "median w in the last of several stretches", ">=", 0.9, _last,
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
        "share of (epoch, layer) pairs with negative w", "<=", 0.1, _negative_share,
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
    whole = Curves.of(record)
    shorter = whole.begin(SHORTER)
    verdicts = []
    for rule, claim in ((RULES[claim], claim) for claim in claims):
        value = _measure(rule, whole)
        held = rule.holds(value)
        settled = held == rule.holds(_measure(rule, shorter))
        why = "" if held else _why(rule, value, stretches(whole.windowed))
        verdicts.append(Verdict(claim, rule.text, value, held, settled, why))
    return verdicts


def _why(rule: Rule, value: float, found: Sequence[Stretch]) -> str:
    """In a few words, why the claim is not held by a run of these stretches."""
    if rule.quantity.startswith("median w"):
        if np.isfinite(value):
            same = np.sign(value) == np.sign(rule.bound)
            return "in the paper's direction, but less than the bound" if same else "the other way round"
        if rule.measure is _until_oscillation_ends and any(stretch.sign < 0 for stretch in found):
            return "it oscillates after a smooth beginning, and no end of that is in the run"
        only = "smooth" if found and found[0].sign > 0 else "oscillating"
        return f"{only} to the end of the run" if found else "too short or too noisy a run for any stretch"
    return "" if np.isfinite(value) else "the run cannot tell"


def _measure(rule: Rule, curves: Curves) -> float:
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means and medians of nothing are NaN
        return float(rule.measure(curves)) if len(curves.loss) > 1 else float("nan")
