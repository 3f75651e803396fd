"""Step adaptation: rules that turn what a step has measured into the next multiplier of the learning rate.

A layer's update is p -= lr * s * (...), with s its *scale*, 1 at the start. ``OscGD(..., adapt=policy)`` asks
a policy for the scales after every measured step. A policy is a callable::

    def policy(measured: Measured) -> Tensor: ...

that gets tensors of shape (L,) on the parameters' device and returns one, the new scales, all by tensor
operations: no `.item()`, so that nothing waits for the device. One that remembers something returns it beside
the scales, as a dict of tensors, and finds it in the next step's `measured.state` (NaN there for a layer that
came later, where a tensor has an entry a layer)::

    def smoothed(measured):
        mean = 0.9 * measured.state.get("mean", 0.0) + 0.1 * measured.correlation
        return measured.scale * torch.exp(0.05 * mean), {"mean": mean}

A policy is a pure function: the optimizer keeps the state and saves it, so that several may share one policy.
It is called once with sums that are NaN when the optimizer is made, which shows whether it returns the right
shape. Attributes that it may have:

* `lag`: 1 (the default): the scales decided in step t hold in step t + 1, so that a step is one pass over
  memory; 0: measure, decide, update, in two passes, as most papers have it.
* `granularity`: "layer" (the default), or "global": it gets sums over all adapted layers, of shape (1,), and
  one scale holds for all of them.
* `bounds`: the least and the largest scale; default: None, no bounds.
* `start`: the scale before the first change, or a callable that makes it of the number of layers; default: 1.
* `signal`: "gradient" (the default): a layer without a valid pair of gradients (the first step, a gradient
  that is zero or not finite) keeps its scale, whatever the policy says of it; "momentum": a layer whose
  gradient is zero or not finite does.
* `momentum`: what the optimizer's is to be; default: the user's. A policy with one may bound the update, by a
  third entry beside scales and state (:class:`Decision`).
* `warmup`: measured steps before the first change; default: 0.
* `capturable`: False: it does different things in different steps, by `measured.steps`, so that a CUDA graph
  cannot replay a step of it; default: True.

The displacement and the curvature are those of plain gradient descent:
with momentum or weight decay the rules are heuristics.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import measures
from .kernels import SUMS

State = Mapping[str, Tensor]
"""What a policy remembers from one step to the next."""


class Decision(NamedTuple):
    """What a policy decides for each layer.

    Attributes:
        scale: what the learning rate is multiplied by: shape (L,), finite and not negative.
        state: what it wants to find in the next step's :attr:`Measured.state`; None: what it found in this.
        bound: with b the momentum buffer, the update is -lr scale (clip(b / bound, -1, 1) + weight_decay p)
            from the next step on, and none where the bound is 0: shape (L,), not negative. None: as it was.
    """

    scale: Tensor
    state: State | None = None
    bound: Tensor | None = None


Policy = Callable[["Measured"], Tensor | tuple[Tensor, State] | Decision]
"""What decides on the scales."""

# Keys in the optimizer's first parameter group.
_KEY, _USED, _SEEN, _REJECTED = "step_scale", "prev_step_scale", "steps_adapted", "scales_rejected"
_BOUND = "step_bound"
_OWN = "policy_"  # and what each of the policy's own begins with


@dataclass(frozen=True)
class Measured:
    """What a step knows of each layer: float64 tensors of shape (L,), or (1,) for all layers together.

    Attributes:
        dot, sq_norm, diff_sq_norm, prev_sq_norm, alignment, momentum_sq_norm: the sums of
            :data:`oscopt.kernels.SUMS`; the last two are NaN without momentum.
        size: elements of the layer.
        scale: the scale that was in force when they were measured.
        lr: the learning rate that the new scale will multiply (as far as known: that of this step).
        prev_step: learning rate times scale of the last step, from x_{t-1} to x_t.
        steps: measured steps up to this one, an int: 1 in the first, which has no pair.
        layers: how many layers the optimizer has, an int.
        state: what the policy returned beside the scales of the step before; empty in the first.
    """

    dot: Tensor
    sq_norm: Tensor
    diff_sq_norm: Tensor
    prev_sq_norm: Tensor
    alignment: Tensor
    momentum_sq_norm: Tensor
    size: Tensor
    scale: Tensor
    lr: Tensor
    prev_step: Tensor
    steps: int
    layers: int
    state: State = field(default_factory=dict)

    @cached_property
    def correlation(self) -> Tensor:
        """mu, in [-1, 1]; NaN where there is no valid pair."""
        return measures.correlation(self.dot, self.sq_norm, self.prev_sq_norm)

    @cached_property
    def alignment_correlation(self) -> Tensor:
        """cos(g_t, b_{t-1}), in [-1, 1]; NaN without momentum, and where a norm is 0."""
        return measures.correlation(self.alignment, self.sq_norm, self.momentum_sq_norm)

    @property
    def sharpness(self) -> Tensor:
        """eta s kappa: the last step's size times the curvature along it; 2 is the edge of stability."""
        return 1.0 - self.dot / self.prev_sq_norm

    @property
    def displacement(self) -> Tensor:
        """||x_t - x_{t-1}||."""
        return self.prev_step * self.prev_sq_norm.sqrt()

    def together(self, chosen: Tensor) -> Measured:
        """All `chosen` layers (bool, (L,)) as one.

        Its `prev_step` is such that the displacement is that of all; `scale` and `lr` are their largest.
        """
        names = [f.name for f in fields(self) if f.name not in ("steps", "layers", "state")]
        sums = {name: torch.where(chosen, getattr(self, name), 0.0) for name in names}
        total = {name: value.sum(0, keepdim=True) for name, value in sums.items()}
        moved = (sums["prev_step"] ** 2 * sums["prev_sq_norm"]).sum(0, keepdim=True)
        total["prev_step"] = (moved / total["prev_sq_norm"]).sqrt()
        for name in ("scale", "lr"):
            total[name] = sums[name].amax(0, keepdim=True)
        return Measured(**total, steps=self.steps, layers=self.layers, state=self.state)


@dataclass(kw_only=True)
class _Rule:
    """What the policies here share."""

    granularity: str = "layer"
    bounds: tuple[float, float] | None = None
    warmup: int = 0
    lag: int = 1


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"Invalid {name}: {value}; it must be finite and greater than 0")


@dataclass
class CosineStep(_Rule):
    """s <- s exp(beta (mu - target)), within `bounds`.

    With target 0 it is the multiplicative, normalised hypergradient rule: the step grows while adjacent
    gradients agree and shrinks while they oppose each other. On a quadratic of a single curvature h it holds
    lr s within a factor exp(2 beta) of 1/h; exp(beta) with ``lag=0``.

    Args:
        beta: how fast, per step; greater than 0.
        target: the correlation that is held, in (-1, 1).
    """

    beta: float = 0.05
    target: float = 0.0
    bounds: tuple[float, float] | None = field(default=(1e-3, 1e3), kw_only=True)

    def __post_init__(self) -> None:
        _check_positive("beta", self.beta)
        if not -1 < self.target < 1:
            raise ValueError(f"Invalid target: {self.target}; a correlation between -1 and 1 is needed")

    def __call__(self, measured: Measured) -> Tensor:
        return measured.scale * torch.exp(self.beta * (measured.correlation - self.target))


@dataclass
class Hypergradient(_Rule):
    """lr_t = lr_{t-1} + beta <g_t, g_{t-1}>: SGD-HD (Baydin et al., ICLR 2018, Algorithm 4).

    The published rule is that with ``lag=0`` (the default here) and ``granularity="global"``.

    Args:
        beta: the hypergradient learning rate, greater than 0.
    """

    beta: float = 1e-3
    lag: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        _check_positive("beta", self.beta)

    def __call__(self, measured: Measured) -> Tensor:
        # A rate below 0, which the published rule allows, would climb: it stops at 0.
        return (measured.scale + self.beta * measured.dot / measured.lr).clamp_min(0.0)


@dataclass
class SecantStep(_Rule):
    """Adaptive gradient descent (Malitsky and Mishchenko, ICML 2020, Algorithm 1), with lambda = lr s::

        lambda_t = min(sqrt(1 + theta_{t-1}) lambda_{t-1}, ||x_t - x_{t-1}|| / (2 ||g_t - g_{t-1}||))
        theta_t = lambda_t / lambda_{t-1},  theta_0 = inf

    Needs no learning rate on convex problems: `lr` only makes the first step. The published rule is that with
    ``lag=0`` and ``granularity="global"``, the defaults here.
    """

    granularity: str = field(default="global", kw_only=True)
    lag: int = field(default=0, kw_only=True)

    def __call__(self, measured: Measured) -> tuple[Tensor, State]:
        theta = measured.state.get("theta")
        if theta is None:
            theta = torch.full_like(measured.scale, math.inf)
        growing = torch.sqrt(1.0 + theta) * measured.prev_step
        secant = measured.displacement / (2.0 * measured.diff_sq_norm.sqrt())
        step = torch.minimum(growing, secant)
        known = torch.isfinite(step) & (step > 0)
        return step / measured.lr, {"theta": torch.where(known, step / measured.prev_step, theta)}


@dataclass
class AlignedStep(_Rule):
    """Bounded momentum whose length follows how gradients align with it; ``adapt="auto"``.

    For a layer of n elements, with b the momentum buffer and c = `bound`::

        b_t = beta b_{t-1} + g_t,   p -= lr (rho_t clip(b_t / (c sigma_t), -1, 1) + weight decay)
        rho_1 = length / sqrt(number of layers)
        log rho_{t+1} = log rho_t + kappa cos(g_t, b_{t-1}) - forget log(rho_t / rho_1),
        forget = pull above rho_1, lift below
        sigma_{t+1}^2 = max(mean of ||g_i||^2 over i <= t, ||g_t||^2) / (n (1 - beta^2)),   sigma_1 = 0

    sigma is the deviation that an element of b has where gradients are noise of that size. So no element
    moves by more than lr rho, most of those of a layer move by just that, and a loss times any factor makes
    the same steps. rho grows while gradients point along the momentum and shrinks where they oppose it, as
    they do at the edge of stability; how far it is from its start is forgotten, so that it does not drift in
    noise. The first step only fills b. All that a step applies is known before it.

    The optimizer's `lr` multiplies rho; 1 is right. Weight decay is decoupled: p -= lr rho weight_decay p.

    Args:
        length: the length of the first steps, greater than 0: the more layers move at once, the less each.
        kappa: how fast rho follows, not negative; 0: not at all.
        pull: the part of log(rho / rho_1) that a step takes back where rho is above its start, in (0, 1): it
            stays below exp(kappa / pull) rho_1.
        lift: the same below its start: it stays above exp(-kappa / lift) rho_1.
        bound: c, greater than 0; in noise, elements beyond c standard deviations are cut.
        momentum: beta, in (0, 1).
    """

    length: float = 0.006
    kappa: float = 0.2
    pull: float = 0.05
    lift: float = 0.02
    bound: float = 0.3
    momentum: float = 0.9

    signal = "momentum"

    def __post_init__(self) -> None:
        _check_positive("length", self.length)
        _check_positive("bound", self.bound)
        if not (self.kappa >= 0 and math.isfinite(self.kappa)):
            raise ValueError(f"Invalid kappa: {self.kappa}; it must be finite and not negative")
        for name in ("pull", "lift", "momentum"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"Invalid {name}: {getattr(self, name)}; use a number between 0 and 1")

    def start(self, layers: int) -> float:
        """rho_1."""
        return self.length / math.sqrt(layers)

    def __call__(self, measured: Measured) -> Decision:
        norm = torch.where(measured.sq_norm > 0, measured.sq_norm, 0.0)  # NaN is not greater
        total, count = norm, (norm > 0).double()
        if "total" in measured.state:
            total = measured.state["total"].nan_to_num() + total
            count = measured.state["count"].nan_to_num() + count
        size = torch.maximum(total / count.clamp_min(1.0), norm)
        sigma = (size / (measured.size * (1.0 - self.momentum**2))).sqrt()
        start = self.start(measured.layers)
        away = (measured.scale / start).log()
        forgotten = torch.where(away > 0, self.pull * away, self.lift * away)
        cos = measured.alignment_correlation.nan_to_num()
        rho = measured.scale * torch.exp(self.kappa * cos - forgotten)
        return Decision(rho, {"total": total, "count": count}, self.bound * sigma)


POLICIES: dict[str, Callable[[], Policy]] = {
    "auto": AlignedStep,
    "cosine": CosineStep,
    "hypergradient": Hypergradient,
    "secant": SecantStep,
}
"""Policies by the names that ``adapt=`` takes."""


def resolve(adapt: str | Policy | None) -> Policy | None:
    """The policy that `adapt` means.

    Raises:
        ValueError: an unknown name, or an attribute of the policy that makes no sense.
        TypeError: neither a name nor a callable.
    """
    if adapt is None:
        return None
    if isinstance(adapt, str):
        if adapt not in POLICIES:
            raise ValueError(f"Invalid adapt: {adapt!r}; use one of {', '.join(map(repr, POLICIES))}")
        return POLICIES[adapt]()
    if not callable(adapt) or isinstance(adapt, type):
        raise TypeError(f"adapt must be a name, a policy object or None, not {adapt!r}")
    for name, default, makes_sense, remedy in _ATTRIBUTES:
        value = _start(adapt, 1) if name == "start" else getattr(adapt, name, default)
        if not makes_sense(value):
            raise ValueError(f"Invalid {name}: {value!r} of the policy; {remedy}")
    if getattr(adapt, "momentum", None) is not None and getattr(adapt, "lag", 1) == 0:
        raise ValueError("Invalid lag: 0 of a policy with momentum; use 1 (the next step)")
    return adapt


_ATTRIBUTES: tuple[tuple[str, Any, Callable[[Any], bool], str], ...] = (
    (
        "bounds",
        None,
        lambda bounds: bounds is None or 0 < bounds[0] < bounds[1],
        "give two positive scales, the smaller one first, or None",
    ),
    ("lag", 1, lambda lag: lag in (0, 1), "use 1 (the next step) or 0 (this step)"),
    ("granularity", "layer", lambda name: name in ("layer", "global"), "use 'layer' or 'global'"),
    (
        "momentum",
        None,
        lambda value: value is None or (isinstance(value, int | float) and 0 < value < 1),
        "use a number between 0 and 1, or None",
    ),
    ("signal", "gradient", lambda name: name in ("gradient", "momentum"), "use 'gradient' or 'momentum'"),
    (
        "start",
        1.0,
        lambda value: isinstance(value, int | float) and 0 < value < math.inf,
        "use a scale that is positive and finite",
    ),
    (
        "warmup",
        0,
        lambda steps: isinstance(steps, int) and steps >= 0,
        "use a number of steps, 0 or more",
    ),
)
"""What a policy may have: name, default, what makes sense, and what to do about what does not."""


def _start(policy: Policy, layers: int) -> float:
    """What the scale of each of as many layers begins with."""
    start = getattr(policy, "start", 1.0)
    return start(layers) if callable(start) else start


class Adapter:
    """Holds the scales of L layers, and what a policy remembers, and lets the policy change them.

    Args:
        policy: from :func:`resolve`.
        adapted: the layers, and which of them it may change.
        sizes: how many elements each has.
        device: where the scales lie.
        state: what :meth:`state` returned, to go on from.
        in_place: whether all stays where it is in memory, so that steps can be captured in a CUDA graph.

    Raises:
        ValueError: the policy returns something of another shape, or the state is of more layers.
    """

    def __init__(
        self,
        policy: Policy,
        adapted: dict[str, bool],
        sizes: Sequence[int],
        device: torch.device,
        state: dict[str, Any],
        in_place: bool = False,
    ) -> None:
        self.policy = policy
        self.lag = getattr(policy, "lag", 1)
        self._together = getattr(policy, "granularity", "layer") == "global"
        self._bounds = getattr(policy, "bounds", None) or (0.0, math.inf)
        self._warmup = getattr(policy, "warmup", 0)
        self._layers = tuple(adapted)
        self._some_out = not all(adapted.values())
        self._adapted = torch.tensor(list(adapted.values()), dtype=torch.bool, device=device)
        ones = torch.ones(len(adapted), dtype=torch.float64, device=device)
        start = torch.where(self._adapted, _start(policy, len(adapted)) * ones, ones)
        self._sizes = torch.tensor(sizes, dtype=torch.float64, device=device)
        # An update that is to be bounded is none before there is a bound.
        bounded = getattr(policy, "momentum", None) is not None
        none_yet = torch.where(self._adapted, 0.0 * ones, math.inf)

        def resumed(key: str, start: Tensor) -> Tensor:
            known = state.get(key, start[:0]).to(start)
            if len(known) > len(start):
                raise ValueError(
                    f"the state has scales of {len(known)} layers, the optimizer has {len(start)}"
                )
            return torch.cat([known, start[len(known) :]])

        self.scale = resumed(_KEY, start)
        """What multiplies the learning rate of each layer in the next step: float64, (L,)."""
        self.used = resumed(_USED, start)
        """What did so in the last one."""
        self.bound = resumed(_BOUND, none_yet) if bounded else None
        """What elements of the momentum are cut at in the next step: float64, (L,); None: nowhere."""
        self._seen = int(state.get(_SEEN, 0))
        self.rejected = torch.as_tensor(state.get(_REJECTED, 0), dtype=torch.int64, device=device)
        """How many scales that are not finite or negative the policy has returned: 0-dim."""
        self._in_place = in_place
        self._warned = in_place  # a look at what there is to warn of would wait for the device
        self._own: dict[str, Tensor] = {}
        """What the policy remembers."""
        self._failure: Exception | None = None
        before = len(state.get(_KEY, ()))
        for key, value in state.items():
            if key.startswith(_OWN):
                value = value.to(start)
                if value.shape == (before,) and not self._together:  # NaN for layers that have been added
                    value = torch.cat([value, value.new_full((len(start) - before,), math.nan)])
                self._own[key[len(_OWN) :]] = value
        # Whatever is wrong with the policy shows before there is a step.
        unknown = torch.full((len(SUMS), len(start)), math.nan, dtype=torch.float64, device=device)
        self._ask(self._measured(unknown, ones, ones))

    def state(self, layers: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
        """What :class:`Adapter` takes to go on, by keys for a parameter group.

        Args:
            layers: the names of the layers that it is to go on with, if not these.
        """
        layers = self._layers if layers is None else tuple(layers)

        def of_layers(value: Tensor, missing: float) -> Tensor:
            if layers == self._layers or value.shape != self.scale.shape:
                return value.clone()
            known = dict(zip(self._layers, value, strict=True))
            return torch.stack([known.get(name, value.new_full((), missing)) for name in layers])

        start = _start(self.policy, len(layers))
        yield _SEEN, self._seen
        yield _REJECTED, self.rejected.clone()
        yield _KEY, of_layers(self.scale, start)
        yield _USED, of_layers(self.used, start)
        if self.bound is not None:
            yield _BOUND, of_layers(self.bound, 0.0)
        for key, value in self._own.items():
            yield _OWN + key, value.clone() if self._together else of_layers(value, math.nan)

    def check_capture(self) -> None:
        """Raise where a step of now is not what a CUDA graph would replay.

        Raises:
            RuntimeError: the policy does different things in different steps, or is warming up.
        """
        if not getattr(self.policy, "capturable", True):
            raise RuntimeError(
                f"the policy {self.policy!r} does not do the same in every step, but a graph would; "
                "take adapt='cosine' or another one"
            )
        if self._seen < self._warmup:
            raise RuntimeError(
                f"the policy {self.policy!r} is warming up, and so would every replay be; capture after that"
            )

    def decide(self, sums: Tensor, lr: Tensor, prev_step: Tensor) -> None:
        """Let the policy see a step's `sums` (6, L) and set the scale.

        What goes wrong in the policy is raised here with `lag` 0, where the update comes after this, and by
        :meth:`check` before the next step with `lag` 1.
        """
        self._seen += 1
        if self._some_out:
            sums = torch.where(self._adapted, sums, math.nan)
        measured = self._measured(sums, lr, prev_step)
        if getattr(self.policy, "signal", "gradient") == "momentum":
            valid = self._adapted & (measured.sq_norm > 0)  # NaN is not
        else:
            valid = self._adapted & (measured.correlation == measured.correlation)
        try:
            new, own, bound = self._ask(measured, valid)
        except Exception as error:
            if self.lag == 0:
                raise  # the parameters are updated after this
            self._failure = error
            return
        if own is not None:
            self._keep(own)
        if self.bound is not None and bound is not None:
            good = valid & (bound >= 0) & (bound < math.inf)
            self._set("bound", torch.where(good, bound.to(self.bound), self.bound))
        if self._seen <= self._warmup:
            return
        usable = valid & (new >= 0) & (new < math.inf)
        bad = (valid > usable).sum()
        self.rejected += bad
        if not self._warned and bad.device.type == "cpu" and bad.item():
            self._warned = True
            warnings.warn(
                f"the policy {self.policy!r} returned a scale that is negative or not finite; the last good "
                "ones are kept, here and from now on (rejected_scales counts them)",
                stacklevel=2,
            )
        self._set("scale", torch.where(usable, new.to(self.scale).clamp(*self._bounds), self.scale))

    def _set(self, name: str, value: Tensor) -> None:
        """Let attribute `name` be `value`; where it was in memory, if it is to stay in place."""
        if self._in_place:
            getattr(self, name).copy_(value)
        else:
            setattr(self, name, value)

    @property
    def factor(self) -> Tensor:
        """The scale as kernels take it, which do not divide what they clip by its bound: float64, (L,)."""
        if self.bound is None:
            return self.scale
        of_clipped = torch.where(self.bound > 0, self.scale / self.bound, 0.0)
        return torch.where(self.bound < math.inf, of_clipped, self.scale)

    def check(self) -> None:
        """Raise what the policy raised, or what was wrong with its answer, after the last update."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _measured(self, sums: Tensor, lr: Tensor, prev_step: Tensor) -> Measured:
        return Measured(
            **dict(zip(SUMS, sums, strict=True)),
            size=self._sizes,
            scale=self.scale,
            lr=lr,
            prev_step=prev_step,
            steps=max(self._seen, 1),
            layers=len(self._layers),
            state=self._own,
        )

    def _ask(self, measured: Measured, valid: Tensor | None = None) -> Decision:
        """What the policy says. `valid`: layers that count."""
        if self._together:
            measured = measured.together(self._adapted if valid is None else valid)
        answer: Any = self.policy(measured)  # whatever it is
        several = isinstance(answer, tuple) and len(answer) in (2, 3)
        new, own, bound = Decision(*answer) if several else Decision(answer)
        shape = measured.scale.shape
        for value, kind in ((new, "scales"), (bound, "bounds"))[: 1 if bound is None else 2]:
            if not isinstance(value, Tensor) or value.shape != shape:
                what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(
                    f"the policy {self.policy!r} returned {what}; return {kind} of shape {tuple(shape)}"
                )
        if bound is not None and self.bound is None:
            raise ValueError(
                f"the policy {self.policy!r} bounds the update; give it the attribute `momentum`"
            )
        if own is not None and not (
            isinstance(own, Mapping) and all(isinstance(value, Tensor) for value in own.values())
        ):
            raise ValueError(
                f"the policy {self.policy!r} returned the state {own!r}; return a dict of tensors beside the "
                "scales"
            )
        return Decision(new, own, bound)

    def _keep(self, own: State) -> None:
        """Take over the policy's new state; where it was, if it is to stay in place."""
        if not self._in_place:
            self._own = dict(own)
            return
        # It may hold the scales themselves, a row of sums, or one value under two names.
        new = {key: value.clone() for key, value in own.items()}
        self._own = {key: self._own[key].copy_(new[key]) if key in self._own else new[key] for key in new}
