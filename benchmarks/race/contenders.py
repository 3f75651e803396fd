"""What races: methods at their best rates, methods without a rate, step adaptation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn import Parameter

from oscopt import OscGD
from oscopt.adapt import AlignedStep, CosineStep, Decision, Hypergradient, Measured, SecantStep

Named = Iterable[tuple[str, Parameter]]
BASE = "gd"
OURS = "auto"


@dataclass(frozen=True)
class Contender:
    """One method.

    Attributes:
        name: what the tables call it.
        make: (what is tuned, gradient descent's best rate, named parameters) -> the optimizer.
        factor: the grid's spacing, where something is tuned: it is multiplied and divided by this until both
            neighbours of the best are worse; None: nothing is.
        start: gradient descent's best rate -> where that begins.
    """

    name: str
    make: Callable[[float, float, Named], torch.optim.Optimizer]
    factor: float | None = None
    start: Callable[[float], float] = lambda best: 1.0


def _parameters(named: Named) -> list[Parameter]:
    return [p for _, p in named]


def _sgd(**options):
    return lambda rate, best, named: torch.optim.SGD(_parameters(named), lr=rate, **options)


def _adam(kind: type[torch.optim.Optimizer]):
    return lambda rate, best, named: kind(_parameters(named), lr=rate)


def _adapted(policy: Callable[[float], object], times: float):
    """OscGD from `times` the best rate."""
    return lambda rate, best, named: OscGD(named, lr=times * best, adapt=policy(rate))


def _from_packages() -> tuple[list[Contender], list[str]]:
    """Methods that other packages publish, and which of these are not installed."""
    found, absent = [], []
    try:
        from prodigyopt import Prodigy

        found.append(Contender("prodigy", lambda rate, best, named: Prodigy(_parameters(named), lr=1.0)))
    except ImportError:
        absent.append("prodigyopt")
    try:
        from schedulefree import SGDScheduleFree

        def free(rate, best, named):
            optimizer = SGDScheduleFree(_parameters(named), lr=rate)
            optimizer.train()
            return optimizer

        found.append(Contender("schedule-free sgd", free, 2.0, lambda best: 4 * best))
    except ImportError:
        absent.append("schedulefree")
    return found, absent


def contenders() -> tuple[list[Contender], list[str]]:
    """All of them, gradient descent first; and the packages that are absent."""
    others, absent = _from_packages()
    hd = _adapted(lambda rate: Hypergradient(rate, granularity="global"), 0.1)
    return [
        Contender(BASE, _sgd(), 2.0, lambda best: best),
        Contender(OURS, lambda rate, best, named: OscGD(named, adapt="auto")),
        Contender("cosine x1", _adapted(lambda rate: CosineStep(), 1.0)),
        Contender("adaptive gd x0.01", _adapted(lambda rate: SecantStep(), 0.01)),
        Contender("sgd-hd x0.1", hd, 10.0, lambda best: 1e-2 * best),
        Contender("heavy ball", _sgd(momentum=0.9), 2.0, lambda best: best / 4),
        Contender("nesterov", _sgd(momentum=0.9, nesterov=True), 2.0, lambda best: best / 4),
        Contender("adam", _adam(torch.optim.Adam), 2.0, lambda best: 0.016),
        Contender("adamw", _adam(torch.optim.AdamW), 2.0, lambda best: 0.016),
        *others,
    ], absent


class _MeanOnly(AlignedStep):
    """sigma from the mean of ||g||^2 alone."""

    def __call__(self, measured: Measured) -> Decision:
        rho, state, _ = super().__call__(measured)
        mean = state["total"] / state["count"].clamp_min(1.0)
        return Decision(rho, state, self.bound * (mean / (measured.size * (1 - self.momentum**2))).sqrt())


class _AdjacentCorrelation(AlignedStep):
    """rho follows the correlation of adjacent gradients in place of that with the momentum."""

    def __call__(self, measured: Measured) -> Decision:
        rho, state, bound = super().__call__(measured)
        wanted, usual = measured.correlation, measured.alignment_correlation
        change = self.kappa * (wanted.nan_to_num() - usual.nan_to_num())
        return Decision(rho * torch.exp(change), state, bound)


def ablations() -> list[Contender]:
    """The rule of "auto" with one part changed each, after gradient descent and the rule itself."""
    # Where nothing is clipped, rho / c is what multiplies b / sigma: it stays what it was.
    rule = AlignedStep()
    unclipped = AlignedStep(length=rule.length * 1e3 / rule.bound, bound=1e3)
    changed = {
        "rho fixed": AlignedStep(kappa=0.0),
        "kappa / 2": AlignedStep(kappa=rule.kappa / 2),
        "kappa x 2": AlignedStep(kappa=rule.kappa * 2),
        "pull / 10": AlignedStep(pull=rule.pull / 10),
        "lift = pull": AlignedStep(lift=rule.pull),
        "no lift": AlignedStep(lift=1e-9),
        "rho_1 / 10": AlignedStep(length=rule.length / 10),
        "rho_1 x 4": AlignedStep(length=rule.length * 4),
        "bound / 3": AlignedStep(bound=rule.bound / 3),
        "not bounded": unclipped,
        "one rho for all": AlignedStep(granularity="global"),
        "sigma from the mean": _MeanOnly(),
        "adjacent correlation": _AdjacentCorrelation(),
    }

    def make(policy: AlignedStep):
        return lambda rate, best, named: OscGD(named, adapt=policy)

    base, ours = (next(c for c in contenders()[0] if c.name == name) for name in (BASE, OURS))
    return [base, ours, *(Contender(f"{OURS}, {name}", make(policy)) for name, policy in changed.items())]
