"""Step adaptation: rules that turn what a step has measured into the next multiplier of the learning rate.

A layer's update is p -= lr * s * (...), with s its *scale*, 1 at the start. ``OscGD(..., adapt=policy)`` asks
a policy for the scales after every measured step. A policy is a callable::

    def policy(measured: Measured) -> Tensor: ...

that gets tensors of shape (L,) on the parameters' device and returns one, the new scales, all by tensor
operations: no `.item()`, so that nothing waits for the device. One that remembers something returns it beside
the scales, as a dict of tensors, and finds it in the next step's `measured.state`::

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
* `start`: the scale before the first change; default: 1.
* `warmup`: measured steps before the first change; default: 0.
* `capturable`: False: it does different things in different steps, by `measured.steps`, so that a CUDA graph
  cannot replay a step of it; default: True.

A layer without a valid pair of gradients (the first step, a gradient that is zero or not finite) keeps its
scale, whatever the policy says of it. The displacement and the curvature are those of plain gradient descent:
with momentum or weight decay the rules are heuristics.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import measures

State = Mapping[str, Tensor]
"""What a policy remembers from one step to the next."""

Policy = Callable[["Measured"], Tensor | tuple[Tensor, State]]
"""The scales, or they and the new state."""

# Keys in the optimizer's first parameter group.
_KEY, _USED, _SEEN, _REJECTED = "step_scale", "prev_step_scale", "steps_adapted", "scales_rejected"
_OWN = "policy_"  # and what each of the policy's own begins with


@dataclass(frozen=True)
class Measured:
    """What a step knows of each layer: float64 tensors of shape (L,), or (1,) for all layers together.

    Attributes:
        dot, sq_norm, diff_sq_norm, prev_sq_norm: the sums of :data:`oscopt.kernels.SUMS`.
        scale: the scale that was in force when they were measured.
        lr: the learning rate that the new scale will multiply (as far as known: that of this step).
        prev_step: learning rate times scale of the last step, from x_{t-1} to x_t.
        steps: measured steps up to this one, an int: 1 in the first, which has no pair.
        state: what the policy returned beside the scales of the step before; empty in the first.
    """

    dot: Tensor
    sq_norm: Tensor
    diff_sq_norm: Tensor
    prev_sq_norm: Tensor
    scale: Tensor
    lr: Tensor
    prev_step: Tensor
    steps: int
    state: State = field(default_factory=dict)

    @cached_property
    def correlation(self) -> Tensor:
        """mu, in [-1, 1]; NaN where there is no valid pair."""
        return measures.correlation(self.dot, self.sq_norm, self.prev_sq_norm)

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
        names = [f.name for f in fields(self) if f.name not in ("steps", "state")]
        sums = {name: torch.where(chosen, getattr(self, name), 0.0) for name in names}
        total = {name: value.sum(0, keepdim=True) for name, value in sums.items()}
        moved = (sums["prev_step"] ** 2 * sums["prev_sq_norm"]).sum(0, keepdim=True)
        total["prev_step"] = (moved / total["prev_sq_norm"]).sqrt()
        for name in ("scale", "lr"):
            total[name] = sums[name].amax(0, keepdim=True)
        return Measured(**total, steps=self.steps, state=self.state)


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
class SmoothnessStep(_Rule):
    """Holds each layer's step at a fraction of what its gradient's change allows; ``adapt="auto"``.

    With R = ||g_t - g_{t-1}|| / ||g_{t-1}||, the last step's size times the smoothness along it, of the layer
    (R_l) and of all layers together (R_all)::

        s <- s clip(last step / this step / sqrt(size), 1/10, growth),   size = R_l R_all / target^2

    The noise of mini-batches makes R about sqrt(2) whatever the step is. So the first steps, and one in
    `PERIOD` from then on, are short: R after these is noise alone. c = 2 (R_all^2 - 0.02) after short steps,
    averaged and within [0, 1], says how noisy the gradients are, and::

        size = (1 - c) R_l R_all / target^2 + c R_all^2 / noisy^2

    with the last R_all^2 averaged over a few steps: in noise all layers move together. `growth` is 2 (in
    noise 1.5) until `size` passes 1/4 (in noise: until gradients oppose each other) for the first time,
    `grow` from then on; where the norm of all gradients exceeds that of the last steps by a tenth, it is
    one over that rise.

    Args:
        target: R that is held, greater than 0; a single curvature's edge of stability is 2.
        noisy: R that is held where the gradients are noise.
        grow: the most that a scale grows by in a step, greater than 1.
        start: the first scale, of two short steps, in (0, 1]; ten times that comes next.
    """

    target: float = 1.0
    noisy: float = 1.62
    grow: float = 1.2
    start: float = 0.01
    bounds: tuple[float, float] | None = field(default=(1e-4, 1e6), kw_only=True)

    capturable = False

    SHORT = 0.1
    """A short step's part of a usual one: R^2 is a hundredth, which leaves only noise."""
    PERIOD = 20
    """Steps from one short step to the next where there is noise; five times that where there was none."""
    CLEAN = 0.02
    """R_all^2 after a short step that curvature alone explains."""
    RISE = 1.21
    """Of the squared norm of all gradients over the largest of late: more than that stops growth."""

    def __post_init__(self) -> None:
        _check_positive("target", self.target)
        _check_positive("noisy", self.noisy)
        if not (self.grow > 1 and math.isfinite(self.grow)):
            raise ValueError(f"Invalid grow: {self.grow}; it must be finite and greater than 1")
        if not 0 < self.start <= 1:
            raise ValueError(f"Invalid start: {self.start}; use a scale in (0, 1]")

    def __call__(self, measured: Measured) -> tuple[Tensor, State]:
        state, round_, phase = dict(measured.state), *divmod(measured.steps - 1, self.PERIOD)
        if measured.steps == 1:
            return measured.scale, {"held": measured.scale / self.SHORT}
        valid = measured.correlation == measured.correlation
        sums = torch.stack([measured.diff_sq_norm, measured.dot, measured.prev_sq_norm, measured.sq_norm])
        change, dot, before, now = torch.where(valid, sums, 0.0).sum(1, keepdim=True)
        size_and_agreement = torch.stack([change / before, dot / (before * now).sqrt()])
        mean = state.get("mean", torch.zeros_like(size_and_agreement))
        size_and_agreement = torch.where(before > 0, size_and_agreement, mean)
        size_of_all = size_and_agreement[0]
        # One gradient that jumps is not to be remembered for long.
        state["mean"] = mean = torch.lerp(mean, size_and_agreement.clamp_max(10.0), 0.5)

        # After a short step it goes on from where it was, and R tells the noise.
        scale = state.get("held", measured.scale) if phase == 1 else measured.scale
        ratio = measured.prev_step / (scale * measured.lr)
        may_be_short = phase in (1, 2)
        if may_be_short or "floor" not in state:
            short = valid & (ratio < 2 * self.SHORT)
            last = size_of_all.clamp_max(1.0)
            floor = state.get("floor", last)
            state["floor"] = floor = torch.where(short.any(), torch.lerp(floor, last, 0.5), floor)
            state["noise"] = noise = (2.0 * (floor - self.CLEAN)).clamp(0.0, 1.0)
            state["fast"], state["limit"] = 2.0 - 0.5 * noise, self.RISE * (1.0 + noise)
        noise = state["noise"]

        size = (sums[0] / sums[2] * size_of_all).sqrt() / self.target**2
        size = torch.lerp(size, (mean[0] / self.noisy**2).expand_as(size), noise)
        passed = torch.where(noise > 0.5, mean[1] < 0.0, size > 0.25)
        if may_be_short:
            passed = passed & ~short
        state["found"] = found = torch.where(passed, 1.0, state.get("found", torch.zeros_like(size)))
        # Growth is capped rather than damped: what curvature a step has met shows only after the next one.
        growth = torch.where(found > 0, self.grow, state["fast"])
        high = state.get("high", before)
        growth = torch.where(now > state["limit"] * high, (high / now).sqrt(), growth)
        state["high"] = torch.fmax(now, 0.9 * high)
        factor = torch.where(found > 0, ratio * size.rsqrt(), math.inf)
        new = scale * torch.minimum(factor, growth).clamp_min(0.1)
        if may_be_short:
            new = torch.where(short, scale, new)
        elif phase == 0:
            state["held"] = torch.where(valid, new, scale)
            new = new * (self.SHORT if round_ % 5 == 0 else torch.where(noise > 0, self.SHORT, 1.0))
        return new, state


POLICIES: dict[str, Callable[[], Policy]] = {
    "auto": SmoothnessStep,
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
    if (bounds := getattr(adapt, "bounds", None)) is not None and not 0 < bounds[0] < bounds[1]:
        raise ValueError(
            f"Invalid bounds: {bounds}; give two positive scales, the smaller one first, or None"
        )
    if getattr(adapt, "lag", 1) not in (0, 1):
        raise ValueError(f"Invalid lag: {adapt.lag!r}; use 1 (the next step) or 0 (this step)")
    if getattr(adapt, "granularity", "layer") not in ("layer", "global"):
        raise ValueError(f"Invalid granularity: {adapt.granularity!r}; use 'layer' or 'global'")
    start = getattr(adapt, "start", 1.0)
    if not (isinstance(start, int | float) and 0 < start < math.inf):
        raise ValueError(f"Invalid start: {start!r}; use a scale that is positive and finite")
    warmup = getattr(adapt, "warmup", 0)
    if not (isinstance(warmup, int) and warmup >= 0):
        raise ValueError(f"Invalid warmup: {warmup!r}; use a number of steps, 0 or more")
    return adapt


class Adapter:
    """Holds the scales of L layers, and what a policy remembers, and lets the policy change them.

    Args:
        policy: from :func:`resolve`.
        adapted: the layers, and which of them it may change.
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
        ones = torch.where(self._adapted, float(getattr(policy, "start", 1.0)), 1.0).double()
        known, used = (state.get(key, ones[:0]).to(ones) for key in (_KEY, _USED))
        if len(known) > len(ones):
            raise ValueError(f"the state has scales of {len(known)} layers, the optimizer has {len(ones)}")
        self.scale = torch.cat([known, ones[len(known) :]])
        """What multiplies the learning rate of each layer in the next step: float64, (L,)."""
        self.used = torch.cat([used, ones[len(used) :]])
        """What did so in the last one."""
        self._seen = int(state.get(_SEEN, 0))
        self.rejected = torch.as_tensor(state.get(_REJECTED, 0), dtype=torch.int64, device=device)
        """How many scales that are not finite or negative the policy has returned: 0-dim."""
        self._in_place = in_place
        self._warned = in_place  # a look at what there is to warn of would wait for the device
        self._own: dict[str, Tensor] = {}
        """What the policy remembers."""
        self._failure: Exception | None = None
        if self._together or len(known) == len(ones):  # otherwise layers have been added
            self._own = {
                key[len(_OWN) :]: value.to(ones) for key, value in state.items() if key.startswith(_OWN)
            }
        # Whatever is wrong with the policy shows before there is a step.
        unknown = torch.full((4, len(ones)), math.nan, dtype=torch.float64, device=device)
        self._ask(Measured(*unknown, scale=self.scale, lr=ones, prev_step=ones, steps=1))

    def state(self, layers: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
        """What :class:`Adapter` takes to go on, by keys for a parameter group.

        Args:
            layers: the names of the layers that it is to go on with, if not these.
        """
        layers = self._layers if layers is None else tuple(layers)
        yield _SEEN, self._seen
        yield _REJECTED, self.rejected.clone()
        for key, value in ((_KEY, self.scale), (_USED, self.used)):
            if layers == self._layers:
                yield key, value.clone()
                continue
            known = dict(zip(self._layers, value, strict=True))
            start = torch.as_tensor(float(getattr(self.policy, "start", 1.0))).to(value)
            yield key, torch.stack([known.get(name, start) for name in layers])
        if self._together or layers == self._layers:
            for key, value in self._own.items():
                yield _OWN + key, value.clone()

    @property
    def warming_up(self) -> bool:
        """Whether the next step's sums do not change the scales yet."""
        return self._seen < self._warmup

    def decide(self, sums: Tensor, lr: Tensor, prev_step: Tensor) -> None:
        """Let the policy see a step's `sums` (4, L) and set the scale.

        What goes wrong in the policy is raised here with `lag` 0, where the update comes after this, and by
        :meth:`check` before the next step with `lag` 1.
        """
        self._seen += 1
        if self._some_out:
            sums = torch.where(self._adapted, sums, math.nan)
        measured = Measured(
            *sums, scale=self.scale, lr=lr, prev_step=prev_step, steps=self._seen, state=self._own
        )
        valid = self._adapted & (measured.correlation == measured.correlation)
        try:
            new, own = self._ask(measured, valid)
        except Exception as error:
            if self.lag == 0:
                raise  # the parameters are updated after this
            self._failure = error
            return
        if own is not None:
            self._keep(own)
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
        scale = torch.where(usable, new.to(self.scale).clamp(*self._bounds), self.scale)
        if self._in_place:
            self.scale.copy_(scale)
        else:
            self.scale = scale

    def check(self) -> None:
        """Raise what the policy raised, or what was wrong with its answer, after the last update."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _ask(self, measured: Measured, valid: Tensor | None = None) -> tuple[Tensor, State | None]:
        """What the policy says: scales, and the new state if it has one. `valid`: layers that count."""
        if self._together:
            measured = measured.together(self._adapted if valid is None else valid)
        answer = self.policy(measured)
        new, own = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, None)
        shape = measured.scale.shape
        if not isinstance(new, Tensor) or new.shape != shape:
            what = f"a tensor of shape {tuple(new.shape)}" if isinstance(new, Tensor) else repr(new)
            raise ValueError(
                f"the policy {self.policy!r} returned {what}; return scales of shape {tuple(shape)}"
            )
        if own is not None and not (
            isinstance(own, Mapping) and all(isinstance(value, Tensor) for value in own.values())
        ):
            raise ValueError(
                f"the policy {self.policy!r} returned the state {own!r}; return a dict of tensors beside the "
                "scales"
            )
        return new, own

    def _keep(self, own: State) -> None:
        """Take over the policy's new state; where it was, if it is to stay in place."""
        if not self._in_place:
            self._own = dict(own)
            return
        # It may hold the scales themselves, a row of sums, or one value under two names.
        new = {key: value.clone() for key, value in own.items()}
        self._own = {key: self._own[key].copy_(new[key]) if key in self._own else new[key] for key in new}
