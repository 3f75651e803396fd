"""What OscGD and OscMonitor share: which gradient pairs with which, and where the sums go.

The gradient that a step used is kept by reference: the next backward pass allocates a new one, so nothing
is copied. If that tensor turns out to have been reused or written to (its identity, address or version
tells), the pair is lost, recorded as NaN, and from then on that parameter's gradient is copied by the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import kernels, measures
from .history import History
from .kernels.sampling import NOTHING, draw, estimate
from .window import Window

PREVIOUS = "prev_grad"
"""Key of a parameter's previous gradient in the optimizer's state."""

COPIED = "prev_grad_copied"
"""Key of a mark there: the previous gradient is a copy of ours, as the tensor itself is being reused."""

SAMPLE = "prev_sample"
"""Key of the drawn blocks of a parameter's previous gradient there, when only a part is measured."""

SAMPLE_LAYOUT = "prev_sample_layout"
"""Key of the strides that these blocks were cut by."""

_PLANS = 8  # patterns of missing gradients whose plans are kept


@dataclass(slots=True)
class Slot:
    """One parameter and what is known about it from the last step."""

    name: str
    param: Tensor
    state: dict[str, Any]
    layer: int  # -1: not measured
    group: int  # of hyperparameters
    address: int
    stride: tuple[int, ...]
    dense: bool
    copied: bool  # the previous gradient is ours, the kernel copies into it
    version: int = 0  # of the previous gradient when it was kept


class Engine:
    """Measures, and on request updates, a fixed list of parameters.

    Args:
        names, params, states, groups: the parameters' names, tensors, state dicts (of an optimizer) and the
            numbers of their parameter groups.
        layers: the name of each parameter's layer, None: not measured.
        every: measure every so many steps.
        sample: the fraction of each layer that is measured.
        backend: "auto" or one of :data:`oscopt.kernels.BACKENDS`.
        history: where the sums go.
    """

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        groups: Sequence[int],
        layers: Sequence[str | None],
        every: int,
        sample: float,
        backend: str,
        history: History,
    ) -> None:
        self.layer_names = tuple(dict.fromkeys(layer for layer in layers if layer is not None))
        index = {name: i for i, name in enumerate(self.layer_names)}
        self.slots = [
            Slot(
                name=name,
                param=p,
                state=state,
                layer=-1 if layer is None else index[layer],
                group=group,
                address=p.data_ptr(),
                stride=p.stride(),
                dense=kernels.dense(p),
                copied=state.get(COPIED, False),
            )
            for name, p, state, group, layer in zip(names, params, states, groups, layers, strict=True)
        ]
        for slot in self.slots:
            for key in (PREVIOUS, "momentum_buffer"):
                if slot.state.get(key) is not None:
                    slot.state[key] = _like(slot, slot.state[key])
            if slot.state.get(PREVIOUS) is not None:
                slot.version = slot.state[PREVIOUS]._version
        devices = dict.fromkeys(p.device for p in params)
        self.backends = {device: kernels.backend(backend, device) for device in devices}
        self.backend = "+".join(dict.fromkeys(module.NAME for module in self.backends.values()))
        self._every = every
        self._drawn = None
        if sample < 1.0:
            self._drawn = [
                draw(slot.param.numel(), sample, slot.name) if slot.layer >= 0 else NOTHING
                for slot in self.slots
            ]
        self.history = history
        history.add_layers(self.layer_names)
        self.device = next(iter(devices), torch.device("cpu"))
        """Where the record gathers: the device of the first parameter."""
        self._last_row: Tensor | None = None
        self._plans: dict[tuple, list[tuple[list[int] | None, kernels.Plan]]] = {}
        for slot in self.slots:
            self._drop_what_does_not_fit(slot)
        key = PREVIOUS if self._drawn is None else SAMPLE
        self._kept = [i for i, slot in enumerate(self.slots) if key in slot.state]
        self._lr: tuple[tuple, np.ndarray] = ((), np.zeros(0))
        self._prev_lr = np.full(len(self.layer_names), np.nan)
        self.windows: list[Window] = []

    def stale(self) -> bool:
        """Whether a parameter has moved (to another device, dtype, layout): a new engine is needed."""
        return any(slot.param.data_ptr() != slot.address for slot in self.slots)

    def correlation(self) -> Tensor:
        """Latest mu of each layer: float64, shape (L,)."""
        if self._last_row is None:
            return torch.full((len(self.layer_names),), torch.nan, dtype=torch.float64)
        dot, sq_norm, _, prev_sq_norm = self._last_row[:4]
        return measures.correlation(dot, sq_norm, prev_sq_norm)

    def global_correlation(self) -> Tensor:
        """Latest mu of all layers together: float64, 0-dim."""
        if self._last_row is None:
            return torch.tensor(torch.nan, dtype=torch.float64)
        dot, sq_norm, _, prev_sq_norm = self._last_row[:4].sum(1)
        return measures.correlation(dot, sq_norm, prev_sq_norm)

    def open_window(self, h: int) -> Window:
        """A window on the next `h` steps."""
        window = Window(h, self.layer_names, lambda w: self.windows.remove(w) if w in self.windows else None)
        self.windows.append(window)
        return window

    def gradients(self) -> list[Tensor | None]:
        """The parameters' gradients, with the strides of the parameters.

        Raises:
            RuntimeError: a gradient is sparse or complex. Nothing has been changed by then.
        """
        grads = [slot.param.grad for slot in self.slots]
        for i, (slot, g) in enumerate(zip(self.slots, grads, strict=True)):
            if g is None:
                continue
            if g.layout is not torch.strided:
                raise RuntimeError(
                    f"the gradient of {slot.name!r} is sparse ({g.layout}); use a dense one "
                    "(for torch.nn.Embedding: sparse=False)"
                )
            if g.requires_grad:
                g = grads[i] = g.detach()
            if g.stride() != slot.stride:
                grads[i] = _like(slot, g)
        return grads

    def step(
        self,
        step: int,
        grads: Sequence[Tensor | None],
        bufs: Sequence[Tensor | None],
        rows: Sequence[int],
        hyper: Sequence[tuple[float, ...]] | None,
        lr: tuple[float, ...],
    ) -> None:
        """Measure and update.

        Args:
            step: its number, from 0.
            grads: from :meth:`gradients`.
            bufs, rows, hyper: for every parameter, as :class:`oscopt.kernels.BatchProtocol` has them.
            lr: the learning rate of every parameter group.
        """
        present = [i for i, g in enumerate(grads) if g is not None]
        measured = (step + 1) % self._every == 0
        keep = (step + 2) % self._every == 0
        prevs, copies, lost, sums = None, None, [], None
        row = self.history.next_row(self.device) if measured else None
        if self._drawn is not None and (measured or keep):
            prevs, lost = self._kept_samples(grads, present)
            sums = torch.zeros((10, len(self.layer_names)), dtype=torch.float64, device=self.device)
        elif self._drawn is None and measured:
            prevs, copies, lost = self._pairs(grads, present)
            sums = row.zero_()[:4]
        if prevs is not None or hyper is not None:
            for n, (index, plan) in enumerate(self._plan(present, grads)):
                out = sums
                if n and sums is not None:
                    out = torch.empty_like(sums, device=plan.device)
                plan.step(*(kernels.pick(v, index) for v in (grads, prevs, bufs, copies, rows)), hyper, out)
                if n and sums is not None:
                    sums += out.to(sums.device)
        if row is not None:
            if self._drawn is not None:
                estimate(sums, row)
        lr_row = self._layer_lr(lr)
        if row is not None:
            if lost:
                row[0, lost] = row[2, lost] = row[3, lost] = row[4, lost] = torch.nan
            self._last_row = row
            self.history.commit(step, lr_row, self._prev_lr)
        self._prev_lr = lr_row
        for window in tuple(self.windows):
            window.add([self.slots[i].layer for i in present], [grads[i] for i in present])
        if self._drawn is None:
            self._keep(grads, present if keep else [], copied=measured)

    def _kept_samples(self, grads, present) -> tuple[list, list[int]]:
        """The kept blocks of the previous gradients, and the layers that have no valid pair."""
        lost: set[int] = set()
        if self._kept != present:
            changed = set(self._kept).symmetric_difference(present)
            lost.update(self.slots[i].layer for i in changed)
            for i in changed.difference(present):
                self.slots[i].state.pop(SAMPLE, None)
        kept: list[Tensor | None] = list(grads)
        for i in present:
            slot = self.slots[i]
            if slot.layer < 0:
                continue
            if SAMPLE not in slot.state:
                slot.state[SAMPLE] = grads[i].new_zeros(self._drawn[i].kept_size)
                slot.state[SAMPLE_LAYOUT] = list(slot.stride)
            kept[i] = slot.state[SAMPLE]
        self._kept = present
        return kept, sorted(lost - {-1})

    def _pairs(self, grads, present) -> tuple[list, list[bool] | None, Sequence[int]]:
        """The previous gradients, which of them to overwrite, and the layers that have no valid pair."""
        prevs: list[Tensor | None] = list(grads)
        copies = None
        lost: set[int] = set()
        for i in present:
            slot, g = self.slots[i], grads[i]
            if slot.layer < 0:
                continue
            prev = slot.state.get(PREVIOUS)
            if prev is None:
                lost.add(slot.layer)
            elif slot.copied:
                prevs[i] = prev
                copies = copies or [False] * len(grads)
                copies[i] = True
            elif prev is g or prev._version != slot.version or prev.data_ptr() == g.data_ptr() != 0:
                lost.add(slot.layer)
                slot.state[PREVIOUS] = g.clone()
                slot.copied = slot.state[COPIED] = True
            else:
                prevs[i] = prev
        if self._kept != present:
            lost.update(self.slots[i].layer for i in set(self._kept).symmetric_difference(present))
        return prevs, copies, sorted(lost - {-1})

    def _keep(self, grads, kept: list[int], copied: bool) -> None:
        """Keep the gradients of the slots `kept` for the next step, and no others.

        `copied`: the kernel has overwritten the copies already.
        """
        if kept != self._kept:
            for i in set(self._kept).difference(kept):
                self.slots[i].state.pop(PREVIOUS, None)
        for i in kept:
            slot, g = self.slots[i], grads[i]
            if slot.layer < 0:
                continue
            if not slot.copied:
                slot.state[PREVIOUS] = g
                slot.version = g._version
            elif PREVIOUS not in slot.state:
                slot.state[PREVIOUS] = g.clone()
            elif not copied:
                slot.state[PREVIOUS].copy_(g)
        self._kept = kept

    def _plan(self, present, grads) -> list[tuple[list[int] | None, kernels.Plan]]:
        """For each device, its slots (None: all) and its plan."""
        odd = [i for i in present if grads[i].dtype != self.slots[i].param.dtype]
        everything = len(present) == len(self.slots)
        key = (None if everything else tuple(present), tuple(odd))
        if key not in self._plans:
            by_device: dict[torch.device, list[int]] = {}
            for i in present:
                by_device.setdefault(self.slots[i].param.device, []).append(i)
            if len(self._plans) == _PLANS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = [
                (
                    None if everything and len(by_device) == 1 else index,
                    kernels.Plan(
                        [self.slots[i].param for i in index],
                        [grads[i] for i in index],
                        [self.slots[i].layer for i in index],
                        len(self.layer_names),
                        self.backends[device],
                        kernels.pick(self._drawn, index),
                    ),
                )
                for device, index in by_device.items()
            ]
        return self._plans[key]

    def _drop_what_does_not_fit(self, slot: Slot) -> None:
        """Forget what was kept in another mode, or with another order of memory."""
        if self._drawn is None or slot.state.get(SAMPLE_LAYOUT) != list(slot.stride):
            slot.state.pop(SAMPLE, None)
            slot.state.pop(SAMPLE_LAYOUT, None)
        if self._drawn is not None:
            slot.state.pop(PREVIOUS, None)
            slot.state.pop(COPIED, None)

    def correlation_stderr(self) -> Tensor:
        """Standard error of the latest mu of each layer: float64, shape (L,); 0 where all is measured."""
        if self._last_row is None:
            return torch.full((len(self.layer_names),), torch.nan, dtype=torch.float64)
        return self._last_row[4]

    def _layer_lr(self, lr: tuple[float, ...]) -> np.ndarray:
        """Learning rate of every layer, NaN where its parameters differ; the same array until it changes."""
        if self._lr[0] != lr:
            of_layer: list[set[float]] = [set() for _ in self.layer_names]
            for slot in self.slots:
                if slot.layer >= 0:
                    of_layer[slot.layer].add(lr[slot.group])
            self._lr = (lr, np.array([rates.pop() if len(rates) == 1 else np.nan for rates in of_layer]))
        return self._lr[1]


def _like(slot: Slot, tensor: Tensor) -> Tensor:
    """`tensor` with the strides of the slot's parameter, if that is dense; itself where it has them."""
    if not slot.dense or tensor.stride() == slot.stride or tensor.shape != slot.param.shape:
        return tensor
    pairs = zip(tensor.stride(), slot.stride, slot.param.shape, strict=True)
    if all(a == b for a, b, size in pairs if size > 1) or tensor.numel() == 0:
        return tensor
    return torch.empty_like(slot.param, dtype=tensor.dtype).copy_(tensor)
