"""The parameters that are measured, as they lie in memory, and their gradients.

A table is made anew whenever parameters have moved, or come or gone; nothing else is.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from . import kernels
from .distributed import bare, is_dtensor, piece
from .kernels import sketch
from .layers import members

_GRAD = attrgetter("grad")

Plans = list[tuple[list[int] | None, kernels.Plan]]
"""For each device the slots (None: all) and their plan."""

MOST_PLANS = 8
"""Patterns of missing gradients for which plans are kept."""


class Reshaped(Exception):
    """A parameter has changed its shape where it lies: another table is needed."""


@dataclass(slots=True)
class Slot:
    """One parameter, as an optimizer lists it.

    Attributes:
        outer: the parameter, as users have it.
        param: the real tensor in memory behind it; mostly the same object.
        layer: the number of its layer, -1: not measured, here.
        home: the same, also where another rank measures this piece; -1: it has none.
        group: the number of its parameter group.
        again: how many times the parameter has been listed before this one.
        seed: of its sketches.
        state: the parameter's state in the optimizer, None: there is none yet.
    """

    name: str
    outer: Tensor
    param: Tensor
    layer: int
    home: int
    group: int
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    dense: bool
    again: int
    seed: int
    state: dict[str, Any] | None


@dataclass(slots=True)
class Gradients:
    """The gradients of one step, None where a parameter has none.

    Attributes:
        local: as real tensors in memory, with the parameters' strides.
        original: as users have them: DTensors, complex ones.
        present: the slots that have one.
        usual: whether all have one, and `local` holds the very tensors of `original`.
        in_place: whether they lie where the parameters lie, and in their order.
    """

    local: Sequence[Tensor | None]
    original: Sequence[Tensor | None]
    present: list[int]
    usual: bool
    in_place: bool = True

    def each(self) -> list[tuple[int, Tensor, Tensor]]:
        """Slot, local and original tensor of those that are there."""
        given = ((i, self.local[i], self.original[i]) for i in self.present)
        return cast(list[tuple[int, Tensor, Tensor]], list(given))


@dataclass(slots=True)
class Pairs:
    """What gradients are measured against.

    Attributes:
        against: for every slot the previous gradient, or its sketch; the gradient itself where there is none.
        overwritten: which of them the kernel overwrites with the gradient, None: none.
        lost: the layers that have no valid pair, as far as the host knows.
        changed: likewise as the device knows, bool, (L,).
    """

    against: Sequence[Tensor | None]
    overwritten: Sequence[bool] | None
    lost: Sequence[int]
    changed: Tensor | None = None


@dataclass(slots=True)
class Update:
    """How a step updates the parameters, see :class:`oscopt.kernels.BatchProtocol`.

    Attributes:
        buffers: the momentum buffer of every slot, None: none.
        rows: the row of `hyper` for every slot.
        hyper: rows of :data:`oscopt.kernels.HYPER`.
    """

    buffers: Sequence[Tensor | None] | None
    rows: Sequence[int]
    hyper: Sequence[tuple[float, ...]]


@dataclass(slots=True)
class Listed:
    """What a table is made of.

    Attributes:
        names, params: the parameters' names and tensors; one may be listed twice.
        groups: the number of each one's parameter group.
        layers: the name of each one's layer, None: not measured.
        states: the state of each parameter (an optimizer's); one that has none gets it when there is any.
    """

    names: Sequence[str]
    params: Sequence[Tensor]
    groups: Sequence[int]
    layers: Sequence[str | None]
    states: Mapping[Tensor, dict[str, Any]]

    @property
    def layer_names(self) -> tuple[str, ...]:
        """L names, in the order of their first parameters."""
        return tuple(dict.fromkeys(layer for layer in self.layers if layer is not None))

    @property
    def homes(self) -> list[int]:
        """The number of each parameter's layer, -1: none."""
        index: dict[str | None, int] = {name: i for i, name in enumerate(self.layer_names)}
        return [index.get(layer, -1) for layer in self.layers]


class ParameterTable:
    """A fixed list of parameters: names, layers, real tensors, kernels.

    Args:
        listed: the parameters. One that is listed twice is measured once, and updated as often as it is
            listed.
        counted: whether this process measures each; None: it does.
        backend: "auto" or one of :data:`oscopt.kernels.BACKENDS`.
        scale_of: for every parameter its place in the scales that kernels get.
        sketched: whether gradients are sketched.
        align: whether sketching takes the sums with the momentum.

    Raises:
        ValueError, RuntimeError: as :func:`oscopt.kernels.backend`.
    """

    def __init__(
        self,
        listed: Listed,
        counted: Sequence[bool] | None,
        backend: str,
        scale_of: Sequence[int],
        sketched: bool,
        align: bool,
    ) -> None:
        self.layer_names = listed.layer_names
        self.params = list(listed.params)
        self.slots = _slots(listed, counted)
        self.rows = [2 * slot.group for slot in self.slots]
        """The row of hyperparameters of every parameter, as :class:`oscopt.OscGD` makes them."""
        self.everyone = list(range(len(self.slots)))
        self.all_measured = all(slot.layer >= 0 for slot in self.slots)
        devices = dict.fromkeys(slot.device for slot in self.slots)
        self.device = next(iter(devices), torch.device("cpu"))
        """Where the sums gather: the device of the first parameter."""
        self._backends = {device: backend_for(backend, device) for device in devices}
        self.backend = "+".join(dict.fromkeys(module.NAME for module in self._backends.values()))
        self._scale_of, self._sketched, self._align = scale_of, sketched, align
        self._plain = all(slot.outer is slot.param for slot in self.slots)
        self._addresses = [slot.param.data_ptr() for slot in self.slots]
        self._guards = _guards([slot.param for slot in self.slots])
        self._plans: dict[tuple, Plans] = {}
        self._states = listed.states
        self._known_states = list(listed.states.values())
        self._forked = _forked

    # ---- what has changed --------------------------------------------------------------------------------

    def moved(self, states: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether another table is needed: a parameter has moved (to another device, dtype, layout), or its
        state has been taken away or replaced.
        """
        if _forked != self._forked or states is not self._states or len(states) != len(self._known_states):
            return True
        if not all(map(is_, states.values(), self._known_states)):
            return True
        params = self.params if self._plain else map(bare, self.params)
        return list(map(Tensor.data_ptr, params)) != self._addresses  # of another dtype, it lies elsewhere

    def lost_states(self, key: str) -> set[int]:
        """The layers of parameters whose state has been replaced by one without `key`, that had it."""
        return {
            slot.home
            for slot in self.slots
            if slot.state is not None
            and slot.state is not (now := self._states.get(slot.outer, {}))
            and key in slot.state
            and key not in now
        }

    def differing(self, now: Mapping[str, set[int]]) -> set[int]:
        """The layers that are not made of the parameters `now` (:func:`oscopt.layers.members`)."""
        mine = members((self.layer_names[s.home], s.outer) for s in self.slots if s.home >= 0)
        return {i for i, name in enumerate(self.layer_names) if mine[name] != now.get(name)}

    # ---- reading -----------------------------------------------------------------------------------------

    def gradients(self) -> Gradients:
        """The parameters' gradients.

        Raises:
            RuntimeError: a gradient is sparse.
            ValueError: a gradient has another shape than its parameter.
            Reshaped: a parameter has changed its shape where it lies.
        """
        grads = kernels.Tensors(map(_GRAD, self.params))
        if self._alike(grads):
            return Gradients(grads, grads, self.everyone, usual=True)
        original: list[Tensor | None] = list(grads)
        local = original
        if not self._plain:
            original = [_placed(slot, g) for slot, g in zip(self.slots, grads, strict=True)]
            local = [None if g is None else bare(g) for g in original]
        fitted = [None if g is None else _fitted(slot, g) for slot, g in zip(self.slots, local, strict=True)]
        return Gradients(
            fitted,
            original,
            [i for i, g in enumerate(fitted) if g is not None],
            usual=False,
            in_place=all(
                g is None or (g.device == slot.device and g.stride() == slot.stride)
                for g, slot in zip(local, self.slots, strict=True)
            ),
        )

    def values(self) -> list[Tensor]:
        """The parameters, as real tensors in memory.

        Raises:
            Reshaped: one has changed its shape.
        """
        values = [slot.param if slot.outer is slot.param else bare(slot.outer) for slot in self.slots]
        for slot, value in zip(self.slots, values, strict=True):
            if value.shape != slot.shape:
                raise Reshaped(slot.name)
        return values

    def states_of(self, key: str) -> kernels.Tensors | None:
        """What the parameters' states hold under `key`, if each is a tensor like its parameter."""
        found = kernels.Tensors(slot.state.get(key) if slot.state else None for slot in self.slots)
        return found if self._alike(found) else None

    def state(self, slot: Slot) -> dict[str, Any]:
        """The state of its parameter, to be written."""
        if slot.state is None:
            slot.state = self._states[slot.outer]
            self._known_states.append(slot.state)
        return slot.state

    def sketch_seeds(self) -> dict[str, int]:
        """What tells whether two sketches of a layer were made in the same way."""
        seeds: dict[str, list[int]] = {name: [] for name in self.layer_names}
        for slot in self.slots:
            if slot.home >= 0:
                seeds[self.layer_names[slot.home]] += [slot.seed, slot.param.numel()]
        return {name: zlib.crc32(str(values).encode()) for name, values in seeds.items()}

    def let_go(self) -> None:
        """Hold no state any more."""
        for slot in self.slots:
            slot.state = None
        self._known_states = []

    def _alike(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether each is like its parameter: the usual case."""
        return self._plain and self._guards is not None and self._guards.check(*tensors)

    # ---- kernels -----------------------------------------------------------------------------------------

    def run(
        self,
        plans: Plans,
        grads: Gradients,
        pairs: Pairs | None,
        update: Update | None,
        sums: Tensor | None,
        scale: Tensor | None = None,
        bound: Tensor | None = None,
    ) -> None:
        """One call of each device's plan.

        Args:
            plans: from :meth:`plans`.
            pairs: what is measured against; None: nothing.
            update: None: measure only.
            sums: zeros, float64, (R, L), that get the sums of all devices; None: update only.
            scale, bound: as :class:`oscopt.kernels.BatchProtocol` has them.
        """
        for n, (index, plan) in enumerate(plans):
            out = sums
            if sums is not None and (n or plan.device != self.device):
                out = torch.empty_like(sums, device=plan.device)
            plan.step(
                chosen(grads.local, index),
                None if pairs is None else chosen(pairs.against, index),
                None if update is None else kernels.pick(update.buffers, index),
                None if pairs is None else kernels.pick(pairs.overwritten, index),
                kernels.pick(self.rows if update is None else update.rows, index),
                None if update is None else update.hyper,
                out,
                None if scale is None else scale.to(plan.device),
                None if bound is None else bound.to(plan.device),
            )
            if sums is not None and out is not None and out is not sums:
                sums += out.to(sums.device)

    def fold(self, plans: Plans, kept: Sequence[Tensor | None], size: int) -> Tensor:
        """Sketches of each layer's gradient for the record, of what is `kept` of it: float32, (L, size)."""
        shape = (len(self.layer_names), size)
        vectors = torch.zeros(shape, device=self.device)
        for index, plan in plans:
            there = torch.empty(shape, device=plan.device)
            plan.fold(chosen(kept, index), there)
            vectors += there.to(self.device)
        return vectors

    def plans(self, grads: Gradients) -> Plans:
        """The plans for a step with these gradients."""
        odd: list[tuple[int, torch.dtype]] = []
        if not grads.usual:
            odd = [(i, g.dtype) for i, g, _ in grads.each() if g.dtype != self.slots[i].dtype]
        everything = len(grads.present) == len(self.slots)
        key = (None if everything else tuple(grads.present), tuple(odd))
        if key not in self._plans:
            if len(self._plans) == MOST_PLANS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = self._new_plans(grads, everything)
        return self._plans[key]

    def all_plans(self) -> list[Plans]:
        """Those that there are."""
        return list(self._plans.values())

    def _new_plans(self, grads: Gradients, everything: bool) -> Plans:
        calls: dict[tuple, list[int]] = {}
        for i in grads.present:
            calls.setdefault((self.slots[i].again, self.slots[i].device), []).append(i)
        return [
            (
                None if everything and len(calls) == 1 else index,
                kernels.Plan(
                    [self.slots[i].param for i in index],
                    chosen(grads.local, index),
                    [self.slots[i].layer for i in index],
                    len(self.layer_names),
                    self._backends[device],
                    [self._scale_of[i] for i in index],
                    [self.slots[i].seed for i in index] if self._sketched else None,
                    self._align,
                ),
            )
            for (_, device), index in calls.items()
        ]


def _slots(listed: Listed, counted: Sequence[bool] | None) -> list[Slot]:
    slots, times = [], dict.fromkeys(listed.params, 0)
    for i, (p, home) in enumerate(zip(listed.params, listed.homes, strict=True)):
        local, again = bare(p), times[p]
        times[p] += 1
        home = -1 if again else home
        slots.append(
            Slot(
                name=listed.names[i],
                outer=p,
                param=local,
                layer=home if counted is None or counted[i] else -1,
                home=home,
                group=listed.groups[i],
                device=local.device,
                dtype=local.dtype,
                shape=local.shape,
                stride=local.stride(),
                dense=kernels.dense(local),
                again=again,
                seed=sketch.seed_of(listed.names[i], piece(p)),
                state=listed.states.get(p),
            )
        )
    return slots


def _guards(params: Sequence[Tensor]) -> Any:
    """What tells at C's speed whether tensors are like `params`: in class, shape, strides (where they
    matter), dtype, device, layout, without a history of their own or a mark that their memory is negated.

    None: this torch has none (they are torch.compile's own), and each gradient is looked at instead.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        # Their types are not what torch's stub says, which is of one tensor.
        sizes: list[Any] = [list(p.shape) for p in params]
        strides: list[Any] = [
            [stride if size > 1 else None for stride, size in zip(p.stride(), p.shape, strict=True)]
            for p in params
        ]
        return TensorGuards(
            *(p.detach() for p in params), dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
        )
    except (ImportError, TypeError):
        return None


def _placed(slot: Slot, grad: Tensor | None) -> Tensor | None:
    """A gradient, with the placements of its parameter if that is a DTensor."""
    outer = slot.outer
    if grad is None or not is_dtensor(grad) or not is_dtensor(outer) or grad.placements == outer.placements:
        return grad
    return grad.redistribute(outer.device_mesh, outer.placements)


def _fitted(slot: Slot, grad: Tensor) -> Tensor:
    """A gradient as kernels take it, like the parameter."""
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"the gradient of {slot.name!r} is sparse ({grad.layout}); use a dense one "
            "(for torch.nn.Embedding: sparse=False)"
        )
    if grad.shape != slot.shape:
        now = bare(slot.outer).shape
        if now != slot.shape:
            raise Reshaped(slot.name)
        raise ValueError(
            f"the gradient of {slot.name!r} has shape {tuple(grad.shape)}, the parameter {tuple(now)}; "
            "set it to None when you change the shape of a parameter"
        )
    if grad.requires_grad:
        grad = grad.detach()
    if grad.is_neg():  # a mark that its memory holds the negative, as of an imaginary part
        grad = grad.resolve_neg()
    if grad._is_zerotensor():  # a mark that it is zeros and has no memory
        grad = torch.zeros_like(slot.param, dtype=grad.dtype)
    return grad if grad.device != slot.device else like_parameter(slot, grad)


def chosen(values: Sequence[Tensor | None], index: Sequence[int] | None) -> Sequence[Tensor]:
    """Those of `values` at `index` (None: all), none of which is None."""
    return cast(Sequence[Tensor], kernels.pick(values, index))


def like_parameter(slot: Slot, tensor: Tensor) -> Tensor:
    """`tensor` with the strides of the slot's parameter, if that is dense; itself where it has them."""
    if not slot.dense or tensor.stride() == slot.stride or tensor.shape != slot.param.shape:
        return tensor
    pairs = zip(tensor.stride(), slot.stride, slot.param.shape, strict=True)
    if all(a == b for a, b, size in pairs if size > 1) or tensor.numel() == 0:
        return tensor
    return torch.empty_like(slot.param, dtype=tensor.dtype).copy_(tensor)


_forked = False
"""Whether this process is a fork of one that had run the CPU kernel."""


def _note_fork() -> None:
    global _forked
    backend = sys.modules.get(f"{kernels.__name__}.numba_backend")
    _forked = backend is not None and backend.has_run()


os.register_at_fork(after_in_child=_note_fork)


def backend_for(name: str, device: torch.device) -> ModuleType:
    """As :func:`oscopt.kernels.backend`; in a fork, in which OpenMP has no threads, not `numba`."""
    if _forked and device.type == "cpu" and name in ("auto", "numba"):
        name = "torch"
    return kernels.backend(name, device)
