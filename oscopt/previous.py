"""What is kept of the previous gradients, in the parameters' state: one class for each way of measuring.

The gradient that a step used is kept by reference: the next backward pass allocates a new one, so nothing is
copied. If that tensor turns out to have been reused or written to (its identity, address or version tells),
the pair is lost, recorded as NaN, and from then on that parameter's gradient is copied by the kernel. A write
that leaves no such trace (through `.data` or numpy, then a new tensor) shows in the norm: that of the last
gradient, as it is read again, is no longer what it was. That pair is NaN, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor

from . import kernels
from .clock import columns
from .distributed import bare, copyable
from .kernels import sketch
from .parameters import MOST_PLANS, Gradients, Pairs, ParameterTable, Slot, like_parameter

PREVIOUS = "prev_grad"
"""Key of a parameter's previous gradient in the optimizer's state."""

COPIED = "prev_grad_copied"
"""Key of a mark there: the previous gradient is a copy of ours, as the tensor itself is being reused."""

SKETCH, SEED = "grad_sketch", "grad_sketch_seed"
"""Keys of what is kept of a sketched gradient there, and of the seed that it was sketched with."""

KEYS = (PREVIOUS, COPIED, SKETCH, SEED)
"""All of them."""

_VERSION = attrgetter("_version")


class Replayed:
    """What steps that a CUDA graph replays keep of the last one, on the device, for the host is not asked.

    Args:
        homes: the number of each parameter's layer, -1: none.
        num_layers: L.
        device: where.

    Attributes:
        copies: of the last gradients, by number of the parameter: graphs write to them.
    """

    def __init__(self, homes: Sequence[int], num_layers: int, device: torch.device) -> None:
        self._description = (list(homes), num_layers, device)
        members: list[list[int]] = [[] for _ in range(num_layers + 1)]
        for i, home in enumerate(homes):
            members[home].append(i)  # -1: behind the last
        self._members = columns(members[:num_layers], len(homes)).to(device)  # filled up with nobody
        self._known = torch.tensor([True] * len(homes) + [False], device=device)
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self.copies: dict[int, Tensor] = {}

    def fits(self, homes: Sequence[int], num_layers: int, device: torch.device) -> bool:
        """Whether it is one for these."""
        return self._description == (list(homes), num_layers, device)

    def own(self, parameter: int, prev: Tensor) -> Tensor:
        """`prev`, a previous gradient that some state holds, if it is one of `copies`; or a copy that is."""
        if prev is not self.copies.get(parameter):
            self.copies[parameter] = prev.clone()
        return self.copies[parameter]

    def changed(self, present: Sequence[int]) -> Tensor:
        """In which layers other parameters than those `present` had gradients in the step before: bool, (L,).

        The next step is compared with these.
        """
        key = tuple(present)
        mask = self._masks.pop(key, None)
        if mask is None:
            mask = self._mask(present)
            if len(self._masks) == MOST_PLANS:
                self._masks.pop(next(iter(self._masks)))
        self._masks[key] = mask
        changed = (self._known != mask)[self._members].any(0)
        self._known.copy_(mask)
        return changed

    def forget(self, parameters: Sequence[int]) -> None:
        """That the previous gradients of these are known; an upload."""
        if parameters:
            self._known.logical_and_(~self._mask(parameters))

    def unknown(self) -> list[int]:
        """Parameters whose previous gradients are not known; waits for the device."""
        return (~self._known[:-1]).nonzero().flatten().tolist()

    def in_use(self) -> list[object]:
        """What a captured step reads and writes."""
        return [self, *self._masks.values()]

    def _mask(self, parameters: Sequence[int]) -> Tensor:
        among = set(parameters)
        return torch.tensor([i in among for i in range(len(self._known))], device=self._known.device)


class Previous:
    """Keeps nothing: gradients are measured against the momentum alone.

    Args:
        table: the parameters. What their states hold is taken up where it fits them, else dropped.
        replayed: for steps that CUDA graphs replay.

    Attributes:
        kept: the slots whose gradients are kept.
        tensors: what is kept, for every slot.
    """

    keys: tuple[str, ...] = ()
    """In the state; under the first is what is kept."""
    continuous = False
    """Whether all steps are measured, also those that are not recorded."""
    verifies = False
    """Whether the last gradients are read again, so that their norms can be compared with what they were."""

    def __init__(self, table: ParameterTable, replayed: Replayed | None = None) -> None:
        self._table, self._slots, self.replayed = table, table.slots, replayed
        self.tensors: Sequence[Tensor | None] = [None] * len(table.slots)
        self.kept: list[int] = []
        for slot in self._slots:
            for key in KEYS:
                if slot.state and key not in self.keys:  # of another way of measuring
                    slot.state.pop(key, None)

    def pair(self, grads: Gradients) -> Pairs | None:
        """What these gradients are measured against; None: nothing."""
        return None

    def keep(self, grads: Gradients, kept: list[int], copied: bool) -> None:
        """Keep the gradients of the slots `kept` for the next step, and no others.

        `copied`: the kernel has overwritten what :meth:`pair` told it to.
        """
        self.kept = kept

    def begin(self, grads: Gradients) -> None:
        """Keep gradients that no step was made of."""
        self.keep(grads, grads.present, copied=False)

    def drop_spoiled(self, now: Mapping[str, set[int]] | None = None) -> None:
        """Forget what whoever goes on from the states could not tell to be wrong: previous gradients that
        have been written to or whose state has been taken away, and those of layers that are not made of the
        parameters `now` (:func:`oscopt.layers.members`). What is left can be copied and saved.
        """

    def forget(self, layers: set[int]) -> None:
        """Forget the previous gradients of `layers`."""

    def let_go(self) -> None:
        """Hold nothing any more."""
        self.tensors, self.kept = [None] * len(self._slots), []

    def lacks(self, grads: Gradients) -> bool:
        """Whether memory would have to be allocated to keep one of these gradients."""
        return False

    def in_use(self) -> list[object]:
        """What a captured step reads and writes."""
        return [*self.tensors, *(self.replayed.in_use() if self.replayed is not None else ())]


class _Stored(Previous):
    """What sketches and gradients have in common."""

    def __init__(self, table: ParameterTable, replayed: Replayed | None = None) -> None:
        super().__init__(table, replayed)
        found = [self._restored(i, slot, slot.state) for i, slot in enumerate(self._slots)]
        self.tensors = found
        self.kept = [i for i, kept in enumerate(found) if kept is not None]
        if replayed is not None:
            replayed.forget(sorted(set(table.everyone).difference(self.kept)))

    def begin(self, grads: Gradients) -> None:
        if self.replayed is not None:
            self._changed(grads, self.replayed)
        super().begin(grads)

    def drop_spoiled(self, now: Mapping[str, set[int]] | None = None) -> None:
        if self.replayed is not None:
            for i in self.replayed.unknown():  # graphs write to what is kept of them: it stays
                kept = self.tensors[i]
                if kept is not None:
                    kept.fill_(torch.nan)
        layers = self._written() | self._table.lost_states(self.keys[0])
        if now is not None:
            layers |= self._table.differing(now)
        self.forget(layers)

    def forget(self, layers: set[int]) -> None:
        """Each as a whole: a part of it would make a wrong pair with the next gradients if those are of the
        same part.
        """
        if layers:
            self._drop([i for i, slot in enumerate(self._slots) if slot.home in layers and slot.state])

    def _drop(self, slots: Sequence[int]) -> None:
        self.tensors = list(self.tensors)
        for i in slots:
            self.tensors[i] = None
            self._table.state(self._slots[i]).pop(self.keys[0], None)

    def _drop_others(self, kept: list[int]) -> None:
        """Drop what is kept of other slots than these; graphs write to it, so with them it stays."""
        if kept != self.kept and self.replayed is None:
            self._drop(sorted(set(self.kept).difference(kept)))

    def lacks(self, grads: Gradients) -> bool:
        return any(self._slots[i].layer >= 0 and not self._suits(i, g) for i, g, _ in grads.each())

    def _restored(self, i: int, slot: Slot, state: dict[str, Any] | None) -> Tensor | None:
        """What the state holds, if it is like what would be kept here; else it is dropped."""
        raise NotImplementedError

    def _written(self) -> set[int]:
        """The layers whose previous gradients have been written to."""
        return set()

    def _suits(self, i: int, grad: Tensor) -> bool:
        """Whether what is kept of a parameter is of gradients like `grad`."""
        kept = self.tensors[i]
        return kept is not None and kept.dtype == grad.dtype

    def _make_copy(self, i: int, dtype: torch.dtype) -> None:
        """Allocate a copy of a parameter's gradients."""
        raise NotImplementedError

    def _others(self, present: list[int]) -> set[int]:
        """Layers in which other parameters have gradients than last time; -1 may be among them."""
        if self.kept == present or self.replayed is not None:  # the device knows
            return set()
        return {self._slots[i].layer for i in set(self.kept).symmetric_difference(present)}

    def _changed(self, grads: Gradients, replayed: Replayed) -> Tensor:
        """The layers that have no valid pair, bool, (L,). Allocates what is to be kept."""
        missing = []
        for i, g, _ in grads.each():
            if self._kept_here(self._slots[i]) and not self._suits(i, g):
                missing.append(i)
                self._make_copy(i, g.dtype)
        replayed.forget(missing)
        return replayed.changed(grads.present)

    def _kept_here(self, slot: Slot) -> bool:
        return slot.home >= 0


class Gradient(_Stored):
    """Keeps the gradients themselves, or copies of them.

    Args:
        copies: copy all of them. Else those are kept that steps found, and copied only where a tensor turns
            out to be reused.
    """

    keys = (PREVIOUS, COPIED)

    def __init__(self, table: ParameterTable, replayed: Replayed | None = None, copies: bool = False) -> None:
        self._copied = [copies or replayed is not None] * len(table.slots)
        self._version = [0] * len(table.slots)  # of each when it was kept
        self._by_reference = False  # whether all are those of the last step themselves
        self._state_dicts: list[dict[str, Any]] = []
        self.verifies = replayed is None  # graphs leave nothing to compare with
        super().__init__(table, replayed)

    def pair(self, grads: Gradients) -> Pairs:
        if grads.usual and self._by_reference:
            before = kernels.Tensors(self.tensors)
            reused = before.addresses == kernels.addresses(grads.local)
            if list(map(_VERSION, before)) == self._version and not reused.any():
                return Pairs(before, None, [])
        changed = None if self.replayed is None else self._changed(grads, self.replayed)
        against, overwritten = list(grads.local), [False] * len(grads.local)
        lost = self._others(grads.present)
        for i, g, original in grads.each():
            slot, kept = self._slots[i], self.tensors[i]
            if slot.layer < 0:
                continue
            if kept is None or not self._suits(i, g):
                lost.add(slot.layer)
            elif self._copied[i]:
                against[i], overwritten[i] = kept, True
            elif kept is g or kept._version != self._version[i] or kept.data_ptr() == g.data_ptr() != 0:
                lost.add(slot.layer)
                self._copy(i, original)
            else:
                against[i] = kept
        return Pairs(against, overwritten if any(overwritten) else None, sorted(lost - {-1}), changed)

    def keep(self, grads: Gradients, kept: list[int], copied: bool) -> None:
        self._drop_others(kept)
        if self._can_be_referenced(grads, kept):
            self._reference(grads.local)
        else:
            self.tensors, self._version, self._by_reference = list(self.tensors), list(self._version), False
            among = set(kept)
            for i, g, original in grads.each():
                if i in among and self._slots[i].home >= 0:
                    self._keep_one(i, g, original, copied)
        self.kept = kept

    def _can_be_referenced(self, grads: Gradients, kept: list[int]) -> bool:
        usual = grads.usual and kept is self._table.everyone and self._table.all_measured
        return usual and (self._by_reference or not any(self._copied))

    def _reference(self, grads: Sequence[Tensor | None]) -> None:
        """Keep all gradients of a usual step."""
        if not self._by_reference:
            self._state_dicts = [self._table.state(slot) for slot in self._slots]
        for state, grad in zip(self._state_dicts, grads, strict=True):
            state[PREVIOUS] = grad
        self.tensors, self._version = grads, list(map(_VERSION, grads))
        self._by_reference = True

    def _keep_one(self, i: int, grad: Tensor, original: Tensor, copied: bool) -> None:
        slot, last = self._slots[i], self.tensors[i]
        if not self._copied[i]:
            plain = slot.outer is slot.param
            self._table.state(slot)[PREVIOUS] = grad if plain else original.detach()
            cast(list[Tensor | None], self.tensors)[i] = grad
            self._version[i] = grad._version
        elif last is None or last.dtype != grad.dtype:
            self._copy(i, original)
        elif not copied or slot.layer < 0:
            last.copy_(grad)

    def drop_spoiled(self, now: Mapping[str, set[int]] | None = None) -> None:
        super().drop_spoiled(now)
        for slot in self._slots:
            if slot.outer is not slot.param and slot.state and slot.state.get(PREVIOUS) is not None:
                slot.state[PREVIOUS] = copyable(slot.state[PREVIOUS])

    def let_go(self) -> None:
        super().let_go()
        self._state_dicts, self._by_reference = [], False

    def _drop(self, slots: Sequence[int]) -> None:
        super()._drop(slots)
        self._by_reference = False

    def _written(self) -> set[int]:
        known = zip(self._slots, self.tensors, self._copied, self._version, strict=True)
        return {
            slot.home
            for slot, kept, copied, version in known
            if kept is not None and not copied and kept._version != version
        }

    def _copy(self, i: int, original: Tensor) -> None:
        """Keep a copy of a gradient, from now on."""
        self._make_copy(i, original.dtype)
        state = self._table.state(self._slots[i])
        state[PREVIOUS].copy_(original.detach())
        state[COPIED] = True

    def _make_copy(self, i: int, dtype: torch.dtype) -> None:
        slot = self._slots[i]
        copy = self._table.state(slot)[PREVIOUS] = torch.zeros_like(slot.outer, dtype=dtype)
        if self.replayed is not None:
            self.replayed.copies[i] = copy
        if self._by_reference:
            self.tensors, self._by_reference = list(self.tensors), False
        cast(list[Tensor | None], self.tensors)[i] = bare(copy)
        self._copied[i] = True

    def _restored(self, i: int, slot: Slot, state: dict[str, Any] | None) -> Tensor | None:
        if state is None or slot.again:
            return None
        self._copied[i] = self._copied[i] or state.get(COPIED, False)
        kept = state.get(PREVIOUS)
        if kept is None:
            return None
        local = bare(kept)
        if local.shape != slot.shape or local.device != slot.device:
            del state[PREVIOUS]
            return None
        if like_parameter(slot, local) is not local:
            kept = state[PREVIOUS] = torch.empty_like(slot.outer, dtype=kept.dtype).copy_(kept)
        if self.replayed is not None:
            kept = state[PREVIOUS] = self.replayed.own(i, kept)
        local = bare(kept)
        self._version[i] = local._version
        return local


class Sketch(_Stored):
    """Keeps a sketch of each gradient, see :mod:`oscopt.kernels.sketch`."""

    keys = (SKETCH, SEED)
    continuous = True

    def __init__(self, table: ParameterTable, replayed: Replayed | None = None) -> None:
        self._steady: Pairs | None = None  # of the last step, if it was a usual one
        super().__init__(table, replayed)

    def pair(self, grads: Gradients) -> Pairs:
        changed = None if self.replayed is None else self._changed(grads, self.replayed)
        everyone = self._table.everyone
        usual = grads.present is everyone and self.kept is everyone
        if usual and self._steady is not None:
            self._steady.changed = changed
            return self._steady
        lost, mine = self._others(grads.present), set()
        for i, g, _ in grads.each():
            if self._kept_here(self._slots[i]):
                mine.add(i)
                if not self._suits(i, g):
                    self._make_copy(i, g.dtype)
                    lost.add(self._slots[i].layer)
        against = kernels.Tensors(self.tensors[i] if i in mine else g for i, g in enumerate(grads.local))
        overwritten = [i in mine for i in everyone]
        if grads.present is everyone and self._table.all_measured:
            self._steady = Pairs(against, overwritten, [], changed)
        return Pairs(against, overwritten, sorted(lost - {-1}), changed)

    def keep(self, grads: Gradients, kept: list[int], copied: bool) -> None:
        self._drop_others(kept)
        self.kept = kept

    def begin(self, grads: Gradients) -> None:
        self.pair(grads)
        self.keep(grads, grads.present, copied=True)

    def _drop(self, slots: Sequence[int]) -> None:
        super()._drop(slots)
        self._steady = None

    def _kept_here(self, slot: Slot) -> bool:
        return slot.layer >= 0

    def _suits(self, i: int, grad: Tensor) -> bool:
        kept, dtype = self.tensors[i], grad.dtype
        if sketch.sketched(self._slots[i].param):
            dtype = sketch.kept_dtype(dtype)
        return kept is not None and kept.dtype == dtype

    def _make_copy(self, i: int, dtype: torch.dtype) -> None:
        slot = self._slots[i]
        state = self._table.state(slot)
        state[SKETCH], state[SEED] = sketch.kept_like(slot.param, dtype), slot.seed
        if self.replayed is not None:
            self.replayed.copies[i] = state[SKETCH]
        cast(list[Tensor | None], self.tensors)[i] = state[SKETCH]
        self._steady = None

    def _restored(self, i: int, slot: Slot, state: dict[str, Any] | None) -> Tensor | None:
        if state is None or slot.again:
            return None
        kept = state.get(SKETCH)
        if kept is None:
            return None
        like = sketch.kept_like(slot.param, kept.dtype)
        if state.get(SEED) != slot.seed or kept.shape != like.shape or kept.device != slot.device:
            del state[SKETCH]
            return None
        if kept.stride() != like.stride():
            kept = state[SKETCH] = like.copy_(kept)
        if self.replayed is not None:
            kept = state[SKETCH] = self.replayed.own(i, kept)
        return kept
