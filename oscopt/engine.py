"""What OscGD and OscMonitor share: which gradient pairs with which, and where the sums go.

The gradient that a step used is kept by reference: the next backward pass allocates a new one, so nothing
is copied. If that tensor turns out to have been reused or written to (its identity, address or version
tells), the pair is lost, recorded as NaN, and from then on that parameter's gradient is copied by the kernel.
A write that leaves no such trace (through `.data` or numpy, then a new tensor) shows in the norm: that of the
last gradient, as it is read again, is no longer what it was. That pair is NaN, too.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, is_
from types import ModuleType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from . import kernels, measures
from .adapt import Adapter
from .distributed import Ranks, bare, copyable, describe, is_dtensor, piece
from .history import MEASURED, RECORDED, History, packed
from .kernels import sketch
from .layers import members
from .recorder import Recorder
from .window import Window

PREVIOUS = "prev_grad"
"""Key of a parameter's previous gradient in the optimizer's state."""

SKETCH, SEED = "grad_sketch", "grad_sketch_seed"
"""Keys of what is kept of a sketched gradient there, and of the seed that it was sketched with."""

COPIED = "prev_grad_copied"
"""Key of a mark there: the previous gradient is a copy of ours, as the tensor itself is being reused."""

KEYS = (PREVIOUS, COPIED, SKETCH, SEED)
"""All of them."""

MEASURES = ("exact", "sketch", "alignment")
"""What gradients can be measured against, see :class:`oscopt.OscGD`; a monitor knows no momentum."""

_GRAD, _VERSION = map(attrgetter, ("grad", "_version"))

_ROUNDING = 1e-9  # by which a norm may differ that is summed twice, in any order

_Plans = list[tuple[list[int] | None, kernels.Plan]]
"""For each device the slots (None: all) and their plan."""

_PLANS = 8  # patterns of missing gradients whose plans are kept


@dataclass(slots=True)
class Slot:
    """One parameter and what is known about it from the last step."""

    name: str
    outer: Tensor  # the parameter, as users have it
    param: Tensor  # the real tensor in memory behind it; mostly the same object
    layer: int  # -1: not measured, here
    home: int  # the layer, also where another rank measures this piece; -1: none
    group: int  # of hyperparameters
    address: int
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    dense: bool
    copied: bool  # the previous gradient is ours, the kernel copies into it
    again: int  # how many times the parameter has been listed before this one
    seed: int  # of its sketches
    state: dict[str, Any] | None = None  # None: there is none yet


class Pairs(NamedTuple):
    """What gradients are measured against.

    Attributes:
        prevs: for every gradient the previous one, or the sketch; the gradient itself where there is none.
        copies: which of `prevs` the kernel overwrites with the gradient, None: none.
        lost: the layers that have no valid pair.
    """

    prevs: Sequence[Tensor | None]
    copies: Sequence[bool] | None
    lost: Sequence[int]


Rates = tuple[np.ndarray, np.ndarray] | tuple[Tensor, Tensor]
"""The layers' learning rates in this step and in the last: float64, (L,), on the host or on the device."""


class Engine:
    """Measures, and on request updates, a fixed list of parameters.

    Args:
        names, params, groups: the parameters' names, tensors and the numbers of their parameter groups.
        states: the state of each parameter (an optimizer's); one that has none gets it when there is any.
        layers: the name of each parameter's layer, None: not measured.
        every: measure every so many steps.
        measure: "exact": against the last gradient; "sketch": against its sketch; "alignment": against the
            momentum alone.
        backend: "auto" or one of :data:`oscopt.kernels.BACKENDS`.
        history: where the sums go.
        ranks: the processes that share the parameters, if they have found each other already.
        adapter: what decides on the layers' scales; None: they are ones.
        recorder: what stands in for the host in a CUDA graph, where steps can be captured; None: they cannot.
        edited: whether the parameters are other ones than those that the history is of so far.
        copy_gradients: copy each previous gradient, instead of keeping the tensor itself.

    A parameter that is listed twice is measured once, and updated as often as it is listed.

    Raises:
        ValueError: the ranks disagree.
    """

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        states: Mapping[Tensor, dict[str, Any]],
        groups: Sequence[int],
        layers: Sequence[str | None],
        every: int,
        backend: str,
        history: History,
        measure: str = "exact",
        ranks: Ranks | None = None,
        adapter: Adapter | None = None,
        recorder: Recorder | None = None,
        edited: bool = False,
        copy_gradients: bool = False,
    ) -> None:
        self.layer_names = tuple(dict.fromkeys(layer for layer in layers if layer is not None))
        index: dict[str | None, int] = {name: i for i, name in enumerate(self.layer_names)} | {None: -1}
        self.ranks = _ranks(names, params, layers, {"every": every, "measure": measure}, ranks)
        counted = self.ranks.counted if self.ranks is not None else [True] * len(params)
        self._pairs_up = measure != "alignment"
        """Whether previous gradients are kept and measured against."""
        self._sketch = measure == "sketch"
        """Whether their sketches are, in their place."""
        self._key = SKETCH if self._sketch else PREVIOUS
        self._sums = len(sketch.SUMS if self._sketch else kernels.SUMS)
        self._steady: Pairs | None = None  # what the last step's sketches were
        self._recorder = recorder
        self._states = states
        self._known_states = list(states.values())
        self._forked = _forked
        self.slots = []
        listed: dict[Tensor, int] = {}
        for i, p in enumerate(params):
            local, again = bare(p), listed.get(p, 0)
            home = -1 if again else index[layers[i]]
            listed[p] = again + 1
            self.slots.append(
                Slot(
                    name=names[i],
                    outer=p,
                    param=local,
                    layer=home if counted[i] else -1,
                    home=home,
                    group=groups[i],
                    address=local.data_ptr(),
                    device=local.device,
                    dtype=local.dtype,
                    shape=local.shape,
                    stride=local.stride(),
                    dense=kernels.dense(local),
                    copied=self._pairs_up and (copy_gradients or self._sketch or recorder is not None),
                    again=again,
                    seed=sketch.seed_of(names[i], piece(p)),
                    state=states.get(p),
                )
            )
        self.params = list(params)
        self.rows = [2 * group for group in groups]
        """The row of hyperparameters of every parameter, as :class:`oscopt.OscGD` makes them."""
        self._scale_of = [index[layer] for layer in layers] if recorder is None else recorder.entries
        self._plain = all(slot.outer is slot.param for slot in self.slots)
        self._everyone = list(range(len(self.slots)))
        self._addresses = [slot.address for slot in self.slots]
        self._guards = _guards([slot.param for slot in self.slots])
        devices = dict.fromkeys(slot.param.device for slot in self.slots)
        self.backends = {device: backend_for(backend, device) for device in devices}
        self.backend = "+".join(dict.fromkeys(module.NAME for module in self.backends.values()))
        self._every = every
        self.history = history
        if history.sketches and not self._sketch:
            raise ValueError(
                f"history was made with sketches={history.sketches}, but measure={measure!r} takes none; use "
                "measure='sketch', or a History without sketches"
            )
        history.add_layers(self.layer_names, edited=edited)
        if history.sketches:
            history.sketch_with(self._layer_seeds())
        history.follow(None if recorder is None else recorder.collect)
        self._record = history if recorder is None else recorder
        self.device = next(iter(devices), torch.device("cpu"))
        """Where the record gathers: the device of the first parameter."""
        self.fits = True
        """Whether the last gradients lay where the parameters lie, and in their order."""
        self._last_row: Tensor | None = None
        self._plans: dict[tuple, _Plans] = {}
        self._prev: list[Tensor | None] = [None] * len(self.slots)
        """The previous gradients, as tensors like `param`."""
        self._version = [0] * len(self.slots)
        """Their versions when they were kept."""
        for i, slot in enumerate(self.slots):
            self._take_up(i, slot)
        self._kept = [i for i, prev in enumerate(self._prev) if prev is not None]
        if recorder is not None and self._pairs_up:
            recorder.forget(sorted(set(self._everyone).difference(self._kept)))
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self._by_reference = False
        """Whether all previous gradients are those of the last step themselves."""
        self._state_dicts: list[dict[str, Any]] = []
        self._all_measured = all(slot.layer >= 0 for slot in self.slots)
        self._rates: dict[tuple[float, ...], np.ndarray] = {}
        self._adapter = adapter
        self.windows: list[Window] = []

    def _layer_seeds(self) -> dict[str, int]:
        """What tells whether two sketches of a layer were made in the same way."""
        seeds: dict[str, list[int]] = {name: [] for name in self.layer_names}
        for slot in self.slots:
            if slot.home >= 0:
                seeds[self.layer_names[slot.home]] += [slot.seed, slot.param.numel()]
        return {name: zlib.crc32(str(values).encode()) for name, values in seeds.items()}

    @property
    def untouched(self) -> bool:
        """Whether nothing has been measured yet."""
        return self._last_row is None

    def stale(self, states: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether a new engine is needed: a parameter has moved (to another device, dtype, layout), or its
        state has been taken away or replaced.
        """
        if _forked != self._forked or states is not self._states or len(states) != len(self._known_states):
            return True
        if not all(map(is_, states.values(), self._known_states)):
            return True
        params = self.params if self._plain else map(bare, self.params)
        return list(map(Tensor.data_ptr, params)) != self._addresses  # of another dtype, it lies elsewhere

    def drop_spoiled(self, now: Mapping[str, set[int]] | None = None) -> None:
        """Forget previous gradients that have been written to, or whose state has been taken away: whoever
        goes on from the states cannot tell. And those of layers that are not made of the same parameters
        `now` (:func:`oscopt.layers.members`). What is left can be copied and saved.
        """
        if self._recorder is not None and self._pairs_up:
            for i in self._recorder.unknown():  # graphs write to what is kept of them: it stays
                kept = self._prev[i]
                if kept is not None:
                    kept.fill_(torch.nan)
        layers: set[int] = set()
        for i, slot in enumerate(self.slots):
            prev, state = self._prev[i], self._states.get(slot.outer, {})
            if prev is not None and not slot.copied and prev._version != self._version[i]:
                layers.add(slot.home)
            elif slot.state is not None and slot.state is not state:
                if not state.keys() >= slot.state.keys() & {self._key}:
                    layers.add(slot.home)
        if now is not None:
            before = members((self.layer_names[s.home], s.outer) for s in self.slots if s.home >= 0)
            layers |= {i for i, name in enumerate(self.layer_names) if before[name] != now.get(name)}
        self._forget(layers)
        if not self._plain:
            for slot in self.slots:
                if slot.state and slot.state.get(PREVIOUS) is not None:
                    slot.state[PREVIOUS] = copyable(slot.state[PREVIOUS])

    def _forget(self, layers: set[int]) -> None:
        """Forget the previous gradients of `layers`: each as a whole, as a part of it would make a wrong pair
        with the next gradients if those are of the same part.
        """
        if not layers:
            return
        self._prev, self._by_reference, self._steady = list(self._prev), False, None
        for i, slot in enumerate(self.slots):
            if slot.home in layers and slot.state is not None:
                self._prev[i] = None
                slot.state.pop(self._key, None)

    def state(self, slot: Slot) -> dict[str, Any]:
        """The state of its parameter, to be written."""
        if slot.state is None:
            slot.state = self._states[slot.outer]
            self._known_states.append(slot.state)
        return slot.state

    def entries(self, key: str) -> kernels.Tensors | None:
        """What the parameters' states hold under `key`, if each is a tensor like its parameter."""
        found = kernels.Tensors(slot.state.get(key) if slot.state else None for slot in self.slots)
        return found if self._alike(found) else None

    def correlation(self) -> Tensor:
        """Latest mu of each layer: float64, shape (L,)."""
        if self._last_row is None:
            return no_correlation(self.device, len(self.layer_names))
        self.history.settle()
        dot, sq_norm, _, prev_sq_norm = self._latest()[:4]
        return measures.correlation(dot, sq_norm, prev_sq_norm)

    def global_correlation(self) -> Tensor:
        """Latest mu of all layers together: float64, 0-dim."""
        if self._last_row is None:
            return no_correlation(self.device)
        self.history.settle()
        dot, sq_norm, _, prev_sq_norm = self._latest()[:4].sum(1)
        return measures.correlation(dot, sq_norm, prev_sq_norm)

    def open_window(self, h: int) -> Window:
        """A window on the next `h` steps."""
        window = Window(
            h,
            self.layer_names,
            lambda w: self.windows.remove(w) if w in self.windows else None,
            self.device,
            self.ranks,
        )
        self.windows.append(window)
        return window

    def _latest(self) -> Tensor:
        """The row of the last step, of which there is one."""
        assert self._last_row is not None
        return self._last_row if self._recorder is None else self._recorder.latest()

    def wants(self, step: int) -> bool:
        """Whether the gradients of step number `step` are measured, or kept for the one after it."""
        return (step + 1) % self._every == 0 or (self._pairs_up and (step + 2) % self._every == 0)

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

    def let_go(self) -> None:
        """Hold no gradient any more."""
        for slot in self.slots:
            slot.state = None
        self._state_dicts, self._known_states = [], []
        self._prev, self._by_reference = [None] * len(self.slots), False
        self._kept, self.windows = [], []

    def gradients(self) -> tuple[list[Tensor | None], Sequence[Tensor | None]]:
        """The gradients: as real tensors in memory with the parameters' strides, and as users have them.

        It is one list, twice, where every parameter has a gradient that can be taken as it is.

        Raises:
            RuntimeError: a gradient is sparse, or the process group of sharded parameters is gone.
            ValueError: a gradient has another shape than its parameter.
            Exception: what the policy raised in the last step.
            Reshaped: a parameter has changed its shape where it lies.

        Nothing has been changed by then.
        """
        if self.ranks is not None:
            self.ranks.check()
        if self._adapter is not None:
            self._adapter.check()
        grads: list[Tensor | None] = kernels.Tensors(map(_GRAD, self.params))
        if self._alike(grads):
            self.fits = True
            return grads, grads
        wholes: Sequence[Tensor | None] = list(grads)
        if not self._plain:
            wholes = [_placed(slot, g) for slot, g in zip(self.slots, grads, strict=True)]
            grads = [None if g is None else bare(g) for g in wholes]
        self.fits = True
        for i, (slot, g) in enumerate(zip(self.slots, grads, strict=True)):
            if g is None:
                continue
            if g.layout is not torch.strided:
                raise RuntimeError(
                    f"the gradient of {slot.name!r} is sparse ({g.layout}); use a dense one "
                    "(for torch.nn.Embedding: sparse=False)"
                )
            if g.shape != slot.shape:
                now = bare(slot.outer).shape
                if now != slot.shape:
                    raise Reshaped(slot.name)
                raise ValueError(
                    f"the gradient of {slot.name!r} has shape {tuple(g.shape)}, the parameter {tuple(now)}; "
                    "set it to None when you change the shape of a parameter"
                )
            if g.requires_grad:
                g = grads[i] = g.detach()
            if g.is_neg():  # a mark that its memory holds the negative, as of an imaginary part
                g = grads[i] = g.resolve_neg()
            if g._is_zerotensor():  # a mark that it is zeros and has no memory
                g = grads[i] = torch.zeros_like(slot.param, dtype=g.dtype)
            if g.device != slot.device:
                self.fits = False
            elif g.stride() != slot.stride:
                grads[i], self.fits = _like(slot, g), False
        return grads, wholes

    def _alike(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether each is like its parameter: the usual case."""
        return self._plain and self._guards is not None and self._guards.check(*tensors)

    def check_capture(self, grads: Sequence[Tensor | None]) -> None:
        """Raise where a step with these gradients could not be captured in a CUDA graph.

        Raises:
            RuntimeError: there is no recorder, something that it needs is not there yet, or a window is open.
        """
        if self._recorder is None:
            raise RuntimeError(
                "an optimizer or monitor with capturable=False cannot be captured in a CUDA graph; "
                "make it with capturable=True"
            )
        present = [i for i, g in enumerate(grads) if g is not None]
        lacking = self._pairs_up and any(
            g is not None and self.slots[i].layer >= 0 and not self._suits(i, g) for i, g in enumerate(grads)
        )
        if self.untouched or lacking or self._kept != present:
            raise RuntimeError(
                "the last step was none with gradients of the same parameters, and what a graph captures is "
                "the same in every replay; take 3 such steps before capturing"
            )
        if self._adapter is not None and not getattr(self._adapter.policy, "capturable", True):
            raise RuntimeError(
                f"the policy {self._adapter.policy!r} does not do the same in every step, but a graph would; "
                "take adapt='cosine' or another one"
            )
        if self._adapter is not None and self._adapter.warming_up:
            raise RuntimeError(
                f"the policy {self._adapter.policy!r} is warming up, and so would every replay be; "
                "capture after that"
            )
        if self.windows:
            raise RuntimeError("a window is open, which a graph cannot fill; capture after it is complete")

    def in_use(self) -> dict[int, Any]:
        """What a captured step reads and writes, by `id`: graphs do not keep it alive."""
        plans, masks = self._plans.values(), self._masks.values()
        return {id(x): x for x in (*plans, *masks, *self._prev, self._adapter, self._recorder)}

    def begin(self, grads: list[Tensor | None], wholes: Sequence[Tensor | None]) -> None:
        """Keep gradients that no step was made of."""
        present = [i for i, g in enumerate(grads) if g is not None]
        if self._recorder is not None and self._pairs_up:
            self._changed(self._recorder, grads, present)
        if self._sketch:
            self._sketches(grads, present)
        self.keep(grads, wholes, present, copied=False)

    def step(
        self,
        step: int,
        grads: list[Tensor | None],
        wholes: Sequence[Tensor | None],
        bufs: Sequence[Tensor | None] | None,
        rows: Sequence[int],
        hyper: Sequence[tuple[float, ...]] | None,
        lr: tuple[float, ...],
        prev_lr: tuple[float, ...],
    ) -> None:
        """Measure and update.

        Args:
            step: its number, from 0.
            grads, wholes: from :meth:`gradients`, or like it.
            bufs, rows, hyper: for every parameter, as :class:`oscopt.kernels.BatchProtocol` has them.
            lr, prev_lr: the learning rates of every parameter group in this step and the one before.
        """
        regular = grads is wholes
        present = self._everyone if regular else [i for i, g in enumerate(grads) if g is not None]
        measured = (step + 1) % self._every == 0
        keep = (step + 2) % self._every == 0
        pairs: Pairs | None = None
        changed = before = sums = None
        if self._recorder is not None and self._pairs_up:
            changed = self._changed(self._recorder, grads, present)
        row = self._record.next_row(self.device) if measured else None
        if row is not None:
            if self._pairs_up:
                # Graphs and other steps in between leave nothing to compare with.
                by_norm = self._every == 1 and self._recorder is None and not self._sketch
                before = self._last_row if by_norm else None
                pairs = self._pairs(grads, wholes, present)
            sums = row[: self._sums]  # zeros until now
        elif self._sketch and (keep or self.windows):
            pairs = self._sketches(grads, present)
            sums = torch.zeros((self._sums, len(self.layer_names)), dtype=torch.float64, device=self.device)
        adapter, plans = self._adapter, self._plan(present, grads, regular)
        if self._recorder is not None and not kernels.capturing(self.device):
            for _, plan in plans:
                plan.prepare_capture()
        if adapter is not None:
            self.history.settle()  # the scales are to be known now
        twice = adapter is not None and adapter.lag == 0 and row is not None
        first = None if twice else hyper
        if sums is not None or first is not None:
            # Without the update nothing is known of its sign, nor is the momentum that of this step.
            self._run(plans, grads, pairs, None if twice else bufs, rows, first, sums)
        if row is not None and sums is not None:
            if pairs is not None and pairs.lost:
                # As at the start: no index to upload.
                lost = slice(None) if len(pairs.lost) == len(self.layer_names) else pairs.lost
                for part in (sums[0], sums[2], sums[3], *sums[len(kernels.SUMS) :]):
                    part[lost] = torch.nan
            if changed is not None:
                for part in (sums[:1], sums[2:4], sums[len(kernels.SUMS) :]):
                    part.masked_fill_(changed, torch.nan)
            self._last_row = row
            if adapter is not None:
                row[MEASURED : len(RECORDED)].copy_(torch.stack([adapter.scale, adapter.used]))
            vectors = None
            if self.history.sketches and pairs is not None:
                vectors = self._vectors(self.history.sketches, plans, pairs.prevs)
            self._commit(step, lr, prev_lr, partial(self._finish, row, vectors, before))
        if twice:
            self.history.settle()
            self._run(plans, grads, None, bufs, rows, hyper, None)
        if adapter is not None:
            adapter.used = adapter.scale if row is None else row[MEASURED]
        for window in tuple(self.windows):
            number = step if self._recorder is None else self._recorder.count()
            values = pairs.prevs if self._sketch and pairs is not None else grads
            slots = [self.slots[i] for i in present]
            sketched = [self._sketch and sketch.sketched(slot.param) for slot in slots]
            window.add(number, present, [s.layer for s in slots], _chosen(values, present), sketched)
        self.keep(grads, wholes, present if keep else [], copied=measured)

    def lose(self, step: int, lr: tuple[float, ...], prev_lr: tuple[float, ...]) -> None:
        """Record that the gradients of a step could not be measured; the next ones have no pair."""
        self._forget(set(range(len(self.layer_names))))
        self._kept = []
        if (step + 1) % self._every == 0 and self.slots:
            row = self._record.next_row(self.device)
            row.fill_(torch.nan)[MEASURED : len(RECORDED)] = 1.0
            self._commit(step, lr, prev_lr, lambda rates: None)
            self._last_row = row

    def _commit(
        self,
        step: int,
        lr: tuple[float, ...],
        prev_lr: tuple[float, ...],
        finish: Callable[[Rates], Callable[[], None] | None],
    ) -> None:
        """Make the row part of the record, with the layers' learning rates, of which `finish` finishes it."""
        if self._recorder is None:
            on_host = self._layer_lr(lr), self._layer_lr(prev_lr)
            self.history.commit(step, *on_host, finish(on_host))
        else:
            on_device = self._recorder.layer_rates()
            self._recorder.commit(step, *on_device, finish(on_device))

    def _changed(self, recorder: Recorder, grads: Sequence[Tensor | None], present: list[int]) -> Tensor:
        """The layers that have no valid pair, bool, (L,). Makes room for what is kept."""
        missing = []
        for i, g in zip(present, _chosen(grads, present), strict=True):
            slot = self.slots[i]
            if (slot.layer if self._sketch else slot.home) < 0 or self._suits(i, g):
                continue
            missing.append(i)
            self._make_copy(i, g.dtype)
        if missing:
            recorder.forget(missing)
        key = tuple(present)
        mask = self._masks.pop(key, None)
        if mask is None:
            mask = recorder.mask(present)
            if len(self._masks) == _PLANS:
                self._masks.pop(next(iter(self._masks)))
        self._masks[key] = mask
        return recorder.changed(mask)

    def _run(
        self,
        plans: _Plans,
        grads: Sequence[Tensor | None],
        pairs: Pairs | None,
        bufs: Sequence[Tensor | None] | None,
        rows: Sequence[int],
        hyper: Sequence[tuple[float, ...]] | None,
        sums: Tensor | None,
    ) -> None:
        """One call of each device's plan."""
        scale = bound = None
        if hyper is not None:
            if self._adapter is not None:
                scale, bound = self._adapter.factor, self._adapter.bound
            if self._recorder is not None:
                scale = self._recorder.factors(scale)
                bound = None if bound is None else self._recorder.bounds(bound)
        for n, (index, plan) in enumerate(plans):
            out = sums
            if sums is not None and (n or plan.device != self.device):
                out = torch.empty_like(sums, device=plan.device)
            plan.step(
                _chosen(grads, index),
                None if pairs is None else _chosen(pairs.prevs, index),
                kernels.pick(bufs, index),
                None if pairs is None else kernels.pick(pairs.copies, index),
                kernels.pick(rows, index),
                hyper,
                out,
                None if scale is None else scale.to(plan.device),
                None if bound is None else bound.to(plan.device),
            )
            if sums is not None and out is not None and out is not sums:
                sums += out.to(sums.device)

    def _vectors(self, size: int, plans: _Plans, prevs: Sequence[Tensor | None]) -> Tensor:
        """The sketch of each layer's gradient that the record takes: float32, (L, size)."""
        shape = (len(self.layer_names), size)
        vectors = torch.zeros(shape, device=self.device)
        for index, plan in plans:
            there = torch.empty(shape, device=plan.device)
            plan.fold(_chosen(prevs, index), there)
            vectors += there.to(self.device)
        return vectors

    def _finish(
        self, row: Tensor, vectors: Tensor | None, before: Tensor | None, rates: Rates
    ) -> Callable[[], None] | None:
        """Bring the ranks' sums together and finish the row; what of it is left for later, if any."""
        sums, ranks = row[: self._sums], self.ranks
        if ranks is None:
            self._complete(row, sums, vectors, before, rates)
            return None
        if vectors is not None:
            sums = torch.cat([sums, vectors.T])
        work = ranks.reduce(sums)

        def settle() -> None:
            ranks.wait(work)
            reduced = None if vectors is None else sums[self._sums :].T
            self._complete(row, sums[: self._sums], reduced, before, rates)

        return settle

    def _complete(
        self, row: Tensor, sums: Tensor, vectors: Tensor | None, before: Tensor | None, rates: Rates
    ) -> None:
        """What follows once the sums are those of all ranks. `before`: the row of the last step."""
        if vectors is not None:
            row[len(RECORDED) :].copy_(packed(vectors.float()))
            row[: self._sums].copy_(sums)
        if before is not None:
            # The last gradient has been written to where its norm is no longer what it was.
            if row.device.type == "cpu":  # the same with a tenth of the time per operation
                values, norm = row.numpy(), before[1].numpy()
                written = abs(values[3] - norm) > _ROUNDING * norm
                if written.any():
                    values[np.ix_([0, 2, 3], written)] = np.nan
            else:
                written = (row[3] - before[1]).abs_() > _ROUNDING * before[1]
                row[:1].masked_fill_(written, torch.nan)
                row[2:4].masked_fill_(written, torch.nan)
        if self._sketch:
            row[self._sums - 1].sqrt_().div_(row[1].sqrt() * row[3].sqrt())  # of the dot; of the correlation
        if self._adapter is not None:
            lr, prev_lr = (
                rate
                if isinstance(rate, Tensor)
                else torch.from_numpy(rate).to(self.device, non_blocking=True)
                for rate in rates
            )
            self._adapter.decide(row[: len(kernels.SUMS)], lr, prev_lr * row[MEASURED + 1])
            if self._adapter.lag == 0:
                row[MEASURED] = self._adapter.scale

    def _pairs(
        self, grads: Sequence[Tensor | None], wholes: Sequence[Tensor | None], present: list[int]
    ) -> Pairs:
        """What these gradients are measured against."""
        if self._sketch:
            return self._sketches(grads, present)
        if grads is wholes and self._by_reference:
            before = kernels.Tensors(self._prev)
            reused = before.addresses == kernels.addresses(grads)
            if list(map(_VERSION, before)) == self._version and not reused.any():
                return Pairs(before, None, [])
        prevs = list(grads)
        copies = None
        lost: set[int] = set()
        for i, g, whole in zip(present, _chosen(grads, present), _chosen(wholes, present), strict=True):
            slot, prev = self.slots[i], self._prev[i]
            if slot.layer < 0:
                continue
            if prev is None or not self._suits(i, g):
                lost.add(slot.layer)
            elif slot.copied:
                prevs[i] = prev
                copies = copies or [False] * len(grads)
                copies[i] = True
            elif prev is g or prev._version != self._version[i] or prev.data_ptr() == g.data_ptr() != 0:
                lost.add(slot.layer)
                self._copy(i, whole)
            else:
                prevs[i] = prev
        lost |= self._others(present)
        return Pairs(prevs, copies, sorted(lost - {-1}))

    def _sketches(self, grads: Sequence[Tensor | None], present: list[int]) -> Pairs:
        """As :meth:`_pairs`; makes room where there is nothing yet."""
        if present is self._everyone and self._steady is not None and self._kept is present:
            return self._steady
        lost: set[int] = set()
        mine = [i for i in present if self.slots[i].layer >= 0]
        for i in mine:
            g = grads[i]
            if g is not None and not self._suits(i, g):
                self._make_copy(i, g.dtype)
                lost.add(self.slots[i].layer)
        lost |= self._others(present)
        chosen = set(mine)
        prevs = kernels.Tensors(self._prev[i] if i in chosen else g for i, g in enumerate(grads))
        copies = [i in chosen for i in range(len(grads))]
        steady = present is self._everyone and self._all_measured
        self._steady = Pairs(prevs, copies, []) if steady else None
        return Pairs(prevs, copies, sorted(lost - {-1}))

    def _others(self, present: list[int]) -> set[int]:
        """Layers of which other parameters have gradients than last time; with a recorder, that knows."""
        if self._kept == present or self._recorder is not None:
            return set()
        return {self.slots[i].layer for i in set(self._kept).symmetric_difference(present)}

    def _suits(self, i: int, grad: Tensor) -> bool:
        """Whether what is kept of a parameter is of gradients like `grad`."""
        prev, dtype = self._prev[i], grad.dtype
        if self._sketch and sketch.sketched(self.slots[i].param):
            dtype = sketch.kept_dtype(dtype)
        return prev is not None and prev.dtype == dtype

    def _copy(self, i: int, whole: Tensor) -> None:
        """Keep a copy of a gradient, from now on."""
        self._make_copy(i, whole.dtype)
        state = self.state(self.slots[i])
        state[PREVIOUS].copy_(whole.detach())
        state[COPIED] = True

    def _make_copy(self, i: int, dtype: torch.dtype) -> None:
        """Room for a copy of a parameter's gradients."""
        slot = self.slots[i]
        state = self.state(slot)
        if self._sketch:
            state[SKETCH], state[SEED] = sketch.kept_like(slot.param, dtype), slot.seed
        else:
            state[PREVIOUS] = torch.zeros_like(slot.outer, dtype=dtype)
        if self._recorder is not None:
            self._recorder.copies[i] = state[self._key]
        self._prev[i] = bare(state[self._key])
        slot.copied, self._by_reference, self._steady = True, False, None

    def keep(
        self,
        grads: list[Tensor | None],
        wholes: Sequence[Tensor | None],
        kept: list[int],
        copied: bool,
    ) -> None:
        """Keep the gradients of the slots `kept` for the next step, and no others.

        `copied`: the kernel has overwritten the copies already.
        """
        if not self._pairs_up or (self._sketch and self._recorder is not None):
            self._kept = kept
            return
        if self._recorder is not None:
            due = [i for i in kept if self.slots[i].home >= 0 and (not copied or self.slots[i].layer < 0)]
            for prev, g in zip(_chosen(self._prev, due), _chosen(grads, due), strict=True):
                prev.copy_(g)
            self._kept = kept
            return
        if kept != self._kept:
            for i in set(self._kept).difference(kept):
                self._prev[i], self._steady = None, None
                self.state(self.slots[i]).pop(self._key, None)
        if self._sketch:
            self._kept = kept
            return
        usual = grads is wholes and kept is self._everyone and self._all_measured
        if usual and (self._by_reference or not any(slot.copied for slot in self.slots)):
            if not self._by_reference:
                self._state_dicts = [self.state(slot) for slot in self.slots]
            for state, grad in zip(self._state_dicts, grads, strict=True):
                state[PREVIOUS] = grad
            self._prev, self._version = grads, list(map(_VERSION, grads))
            self._kept, self._by_reference = kept, True
            return
        self._prev, self._version, self._by_reference = list(self._prev), list(self._version), False
        for i, g, whole in zip(kept, _chosen(grads, kept), _chosen(wholes, kept), strict=True):
            slot, last = self.slots[i], self._prev[i]
            if slot.home < 0:
                continue
            if not slot.copied:
                self.state(slot)[PREVIOUS] = g if slot.outer is slot.param else whole.detach()
                self._prev[i], self._version[i] = g, g._version
            elif last is None or last.dtype != g.dtype:
                self._copy(i, whole)
            elif not copied or slot.layer < 0:
                last.copy_(g)
        self._kept = kept

    def _plan(self, present: list[int], grads: Sequence[Tensor | None], regular: bool) -> _Plans:
        """For each device, its slots (None: all) and its plan."""
        odd = []
        if not regular:
            dtypes = ((i, g.dtype) for i, g in zip(present, _chosen(grads, present), strict=True))
            odd = [(i, dtype) for i, dtype in dtypes if dtype != self.slots[i].dtype]
        everything = len(present) == len(self.slots)
        key = (None if everything else tuple(present), tuple(odd))
        if key not in self._plans:
            calls: dict[tuple, list[int]] = {}
            for i in present:
                calls.setdefault((self.slots[i].again, self.slots[i].device), []).append(i)
            if len(self._plans) == _PLANS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = [
                (
                    None if everything and len(calls) == 1 else index,
                    kernels.Plan(
                        [self.slots[i].param for i in index],
                        _chosen(grads, index),
                        [self.slots[i].layer for i in index],
                        len(self.layer_names),
                        self.backends[device],
                        [self._scale_of[i] for i in index],
                        [self.slots[i].seed for i in index] if self._sketch else None,
                        # It costs the CPU as much as the sketch does.
                        self._adapter is not None,
                    ),
                )
                for (_, device), index in calls.items()
            ]
        return self._plans[key]

    def _take_up(self, i: int, slot: Slot) -> None:
        """Go on with what the state holds of a parameter; forget a gradient that does not fit it."""
        state = slot.state
        if state is None or slot.again:
            return
        if self._sketch:
            for key in (PREVIOUS, COPIED):
                state.pop(key, None)
            self._take_up_sketch(i, slot, state)
        else:
            for key in (SKETCH, SEED):
                state.pop(key, None)
        for key in (PREVIOUS, "momentum_buffer"):
            if state.get(key) is None:
                continue
            value = bare(state[key])
            if value.shape != slot.shape or value.device != slot.device:
                if key == PREVIOUS:
                    del state[key]
                continue
            dtype = slot.outer.dtype if key == "momentum_buffer" else state[key].dtype
            if _like(slot, value) is not value or dtype != state[key].dtype:
                state[key] = torch.empty_like(slot.outer, dtype=dtype).copy_(state[key])
        if state.get(PREVIOUS) is not None:
            self._prev[i] = prev = bare(state[PREVIOUS])
            self._version[i] = prev._version
        if self._recorder is not None and self._prev[i] is not None:
            state[self._key] = self._recorder.own(i, state[self._key])
            self._prev[i] = bare(state[self._key])
        slot.copied = slot.copied or state.get(COPIED, False)

    def _take_up_sketch(self, i: int, slot: Slot, state: dict[str, Any]) -> None:
        """Go on with the sketch that the state holds, if it is one that would be taken here."""
        kept = state.get(SKETCH)
        if kept is None:
            return
        like = sketch.kept_like(slot.param, kept.dtype)
        if state.get(SEED) != slot.seed or kept.shape != like.shape or kept.device != slot.device:
            del state[SKETCH]
            return
        if kept.stride() != like.stride():
            state[SKETCH] = kept = like.copy_(kept)
        self._prev[i] = kept

    def _layer_lr(self, lr: tuple[float, ...]) -> np.ndarray:
        """Rate of every layer, NaN where its parameters differ; the same array while the rates are."""
        if lr not in self._rates:
            of_layer: list[set[float]] = [set() for _ in self.layer_names]
            for slot in self.slots:
                if slot.home >= 0:
                    of_layer[slot.home].add(lr[slot.group])
            rates = [rates.pop() if len(rates) == 1 else np.nan for rates in of_layer]
            if len(self._rates) == 2:  # this step's and the last one's
                self._rates.pop(next(iter(self._rates)))
            self._rates[lr] = np.array(rates, np.float64)
        return self._rates[lr]


class Reshaped(Exception):
    """A parameter has changed its shape where it lies: another engine is needed."""


def no_correlation(device: torch.device, *shape: int) -> Tensor:
    """What there is before the first step: NaN, float64."""
    return torch.full(shape, torch.nan, dtype=torch.float64, device=device)


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


def check_settings(every: int, capturable: bool) -> None:
    """Check what :class:`oscopt.OscGD` and :class:`oscopt.OscMonitor` both take.

    Raises:
        ValueError: one is out of its range, or they exclude each other.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"Invalid every: {every!r}; use a whole number of steps, 1 or more")
    if capturable and every > 1:
        raise ValueError(f"Invalid every: {every} with capturable=True, where all steps are the same; use 1")


def skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a GradScaler has found that this step is to be skipped, and left that to the optimizer.

    Raises:
        RuntimeError: it cannot be told, as a CUDA graph is being captured.
    """
    found = getattr(optimizer, "found_inf", None)
    if found is not None and kernels.capturing(found.device):
        raise RuntimeError(
            "whether a GradScaler skips a step cannot be told while capturing a CUDA graph; use bfloat16, or "
            "capture forward and backward only"
        )
    return found is not None and bool(found.item())


def _ranks(
    names: Sequence[str],
    params: Sequence[Tensor],
    layers: Sequence[str | None],
    settings: dict[str, Any],
    known: Ranks | None,
) -> Ranks | None:
    """The processes that share the parameters, None: there is one. Those known, if nothing has changed."""
    if not any(map(is_dtensor, params)):
        return None
    if known is not None and known.description == describe(names, params, layers, settings):
        return known
    return Ranks(names, params, layers, settings)


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


def _chosen(values: Sequence[Tensor | None], index: Sequence[int] | None) -> Sequence[Tensor]:
    """Those of `values` at `index` (None: all), none of which is None."""
    return cast(Sequence[Tensor], kernels.pick(values, index))


def _like(slot: Slot, tensor: Tensor) -> Tensor:
    """`tensor` with the strides of the slot's parameter, if that is dense; itself where it has them."""
    if not slot.dense or tensor.stride() == slot.stride or tensor.shape != slot.param.shape:
        return tensor
    pairs = zip(tensor.stride(), slot.stride, slot.param.shape, strict=True)
    if all(a == b for a, b, size in pairs if size > 1) or tensor.numel() == 0:
        return tensor
    return torch.empty_like(slot.param, dtype=tensor.dtype).copy_(tensor)
