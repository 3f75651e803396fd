"""Fused measure-and-update kernels: one contract, one file a backend.

A *plan* steps a fixed list of parameters on one device. One call of :meth:`Plan.step` updates every
parameter and, in the same pass over memory, sums for every layer, in float64,

==== ================== ===================================================
row  name               formula
==== ================== ===================================================
0    `dot`              <g_t, g_{t-1}>
1    `sq_norm`          ||g_t||^2
2    `diff_sq_norm`     ||g_t - g_{t-1}||^2, from the differences
3    `prev_sq_norm`     ||g_{t-1}||^2
4    `alignment`        <sign g_t, b_{t-1}>, sign: -1 to maximize, else 1
5    `momentum_sq_norm` ||b_{t-1}||^2
==== ================== ===================================================

with b_{t-1} the momentum buffer as the step finds it (zero where there is none). A sum that is not finite, or
was not taken, is NaN.

The fourth and the sixth sum cost no memory traffic (g_{t-1} and b_{t-1} are being read anyway) and make every
row complete in itself: a correlation never needs the row before it, so skipped steps and restored runs
measure exactly.

A backend is a module with

* ``NAME``: what ``backend=`` calls it,
* ``unavailable(device) -> str``: why it cannot run there (empty: it can),
* ``DTYPES``: the dtypes that it handles; what it does not (another dtype, a gradient of another dtype than
  its parameter, a parameter with gaps in memory) goes to `torch`,
* ``Batch(params, layer_of, num_layers)`` with the method ``step``, as :class:`BatchProtocol` says.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from functools import cached_property
from types import ModuleType
from typing import NamedTuple, Protocol, TypeVar, cast, overload

import numpy as np
import torch
from torch import Tensor

SUMS = ("dot", "sq_norm", "diff_sq_norm", "prev_sq_norm", "alignment", "momentum_sq_norm")
"""Names of the rows of a plan's output."""

BACKENDS = ("triton", "numba", "torch")
"""Names of the backends, the fastest first."""


class Hyper(NamedTuple):
    """A row of the table of hyperparameters: one update, with x the parameter, b the momentum buffer and g
    the gradient::

        d = sign * g + weight_decay * x
        b = momentum * b + one_minus_dampening * d                             (only with a buffer)
        d = d + nesterov_momentum * b  if nesterov_momentum != 0  else  b      (only with a buffer)
        x = x - lr * d

    or, where the step is given a `bound` for the layer, which is a step of bounded momentum with decoupled
    weight decay (a b that is not finite makes x NaN)::

        b = momentum * b + one_minus_dampening * sign * g
        x = x - lr * (clip(b, -bound, bound) + weight_decay * bound * x)
    """

    lr: float
    momentum: float
    """0 in a buffer's first step."""
    one_minus_dampening: float
    """1 in a buffer's first step."""
    weight_decay: float
    nesterov_momentum: float
    """The momentum of Nesterov's form, or 0."""
    sign: float
    """-1 to maximize, else 1."""


HYPER = Hyper._fields
"""Columns of the table of hyperparameters."""


class BatchProtocol(Protocol):
    """What every backend's ``Batch`` does."""

    def __init__(
        self,
        params: Sequence[Tensor],
        layer_of: Sequence[int],
        num_layers: int,
        scale_of: Sequence[int] | None = None,
    ) -> None:
        """Prepare for `params`: same device, same dtype, sorted by `layer_of`; -1 (first): not measured.

        `scale_of`: the layer whose scale each follows, where that is not `layer_of`; -1: none.
        """

    def prepare_capture(self) -> None:
        """Make what a step needs to be captured in a CUDA graph and cannot make then."""

    def step(
        self,
        grads: Sequence[Tensor],
        prevs: Sequence[Tensor] | None,
        bufs: Sequence[Tensor | None] | None,
        copies: Sequence[bool] | None,
        rows: Sequence[int],
        hyper: Sequence[tuple[float, ...]] | None,
        out: Tensor | None,
        scale: Tensor | None = None,
        bound: Tensor | None = None,
    ) -> None:
        """Do one step.

        Args:
            grads: gradients, with the sizes and strides of the parameters.
            prevs: the gradients to measure against, alike; `prevs[i] is grads[i]` where there is none.
                None: `dot`, `diff_sq_norm` and `prev_sq_norm` are not taken.
            bufs: momentum buffers, alike, or None where there is no momentum. None: nowhere, and `alignment`
                and `momentum_sq_norm` are not taken.
            copies: where True, `prevs[i]` holds the values of `grads[i]` afterwards. None: nowhere.
            rows: the row of `hyper` for each parameter.
            hyper: rows of :class:`Hyper`; None: measure only, nothing but `prevs` and `out` is written.
            out: float64 tensor of shape (6, num_layers), overwritten with :data:`SUMS`; None: update only.
            scale: float64 tensor of shape (num_layers,) on the parameters' device, by which each layer's `lr`
                is multiplied; by `scale_of`; elsewhere it stays. None: ones.
            bound: alike, not negative: bounds the update where there is a momentum buffer; infinite: it does
                not. None: nowhere.
        """


def backend(name: str, device: torch.device) -> ModuleType:
    """The module of the backend called `name` ("auto": the fastest that runs) for `device`.

    Raises:
        ValueError: `name` is unknown.
        RuntimeError: the backend cannot run on `device`; the message says why and what can.
    """
    if name == "auto":
        name = _fastest(device.type)
    elif name not in BACKENDS:
        raise ValueError(f"Invalid backend: {name!r}; use one of 'auto', {', '.join(map(repr, BACKENDS))}")
    module = importlib.import_module(f"{__name__}.{name}_backend")
    if why := module.unavailable(device):
        raise RuntimeError(
            f"backend={name!r} cannot run on device {str(device)!r}: {why}. Use backend='auto'"
        )
    return module


def sketching(backend: ModuleType) -> ModuleType:
    """The module that sketches as `backend` steps, see :mod:`oscopt.kernels.sketch`."""
    name = {"torch": "sketch"}.get(backend.NAME, f"{backend.NAME}_sketch")
    return importlib.import_module(f"{__name__}.{name}")


def _fastest(device_type: str) -> str:
    preferred = {"cuda": "triton", "cpu": "numba"}.get(device_type, "torch")
    if preferred != "torch" and importlib.util.find_spec(preferred) is None:
        remedy = "pip install 'oscopt[cpu]'" if preferred == "numba" else "pip install triton"
        _hint(f"{preferred} is not installed: oscopt uses its slower torch backend. Mend it with: {remedy}")
        return "torch"
    return preferred


_hinted: set[str] = set()


def _hint(text: str) -> None:
    if text not in _hinted:
        _hinted.add(text)
        warnings.warn(text, stacklevel=2)


def capturing(device: torch.device) -> bool:
    """Whether operations on `device` are being captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in any order of dimensions."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != filled:
            return tensor.numel() == 0
        filled *= size
    return True


class Plan:
    """Steps a fixed list of parameters on one device: batches of one dtype, each in one call of a backend.

    Args:
        params: the parameters, all on one device.
        grads: gradients like those that will come; where the parameter is :func:`dense`, with its strides.
        layer_of: the index of each parameter's layer, -1: not measured.
        num_layers: L.
        backend: the backend's module, from :func:`backend`.
        scale_of: as :class:`BatchProtocol` has it.
        seeds: of the parameters' sketches; None: nothing is sketched.
        align: whether `alignment` and `momentum_sq_norm` are taken where gradients are sketched.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        layer_of: Sequence[int],
        num_layers: int,
        backend: ModuleType,
        scale_of: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        align: bool = True,
    ) -> None:
        from . import sketch, torch_backend

        scale_of = layer_of if scale_of is None else scale_of
        self._layer_of, self._seeds, self._backend = layer_of, seeds, backend
        self._align = align or seeds is None
        self._folds: dict = {}  # what the backend keeps of one fold for the next
        groups: dict[tuple, list[int]] = {}
        for i in sorted(range(len(params)), key=layer_of.__getitem__):
            p, g = params[i], grads[i]
            suits = p.dtype in backend.DTYPES and g.dtype == p.dtype and dense(p)
            sketched = seeds is not None and layer_of[i] >= 0 and sketch.sketched(p)
            groups.setdefault((backend if suits else torch_backend, p.dtype, sketched), []).append(i)
        self.device = params[0].device
        natural = list(range(len(params)))
        self._batches: list[tuple[list[int] | None, BatchProtocol, int]] = []
        """The parameters' places, their batch and how many sums that takes."""
        for (module, _, sketched), index in groups.items():
            values = (*(pick(v, index) for v in (params, layer_of)), num_layers, pick(scale_of, index))
            if sketched:
                batch = sketching(module).Batch(*values, pick(seeds, index), align)
            else:
                batch = module.Batch(*values)
            sums = sketch.SUMS if sketched else SUMS
            self._batches.append((None if index == natural else index, batch, len(sums)))

    def prepare_capture(self) -> None:
        """Make ready for a step that is captured in a CUDA graph."""
        for _, batch, _ in self._batches:
            batch.prepare_capture()

    def step(
        self,
        grads: Sequence[Tensor],
        prevs: Sequence[Tensor] | None,
        bufs: Sequence[Tensor | None] | None,
        copies: Sequence[bool] | None,
        rows: Sequence[int],
        hyper: Sequence[tuple[float, ...]] | None,
        out: Tensor | None,
        scale: Tensor | None = None,
        bound: Tensor | None = None,
    ) -> None:
        """Do one step of all parameters; the arguments are :meth:`BatchProtocol.step`'s.

        Where gradients are sketched, `prevs` is what :func:`oscopt.kernels.sketch.kept_like` makes room for,
        with `copies` everywhere, and `out` has :data:`oscopt.kernels.sketch.SUMS`.
        """
        for n, (index, batch, sums) in enumerate(self._batches):
            target = out if n == 0 or out is None else torch.empty_like(out)
            batch.step(
                pick(grads, index),
                pick(prevs, index),
                pick(bufs, index),
                pick(copies, index),
                pick(rows, index),
                hyper,
                target if target is None else target[:sums],
                scale,
                bound,
            )
            if target is not None and sums < len(target):
                target[sums:] = 0.0
            if n and out is not None and target is not None:
                out += target
        if out is not None and not self._align and bufs is not None:
            out[4:6] = torch.nan
        if out is not None and prevs is None and self._seeds is not None:
            out[len(SUMS) :] = torch.nan  # of the sketch's, too

    def fold(self, kept: Sequence[Tensor], out: Tensor) -> None:
        """Sketch what is kept of each layer's gradients once more, to one vector a layer.

        Args:
            kept: of all parameters, as :meth:`step` has left it.
            out: float32, shape (L, k'), overwritten; k' is a power of two, at most 1024.
        """
        out.zero_()
        index = sorted(
            (i for i, layer in enumerate(self._layer_of) if layer >= 0), key=self._layer_of.__getitem__
        )
        for dtype in dict.fromkeys(kept[i].dtype for i in index):
            chosen = [i for i in index if kept[i].dtype == dtype]
            values = (pick(v, chosen) for v in (kept, self._layer_of, self._seeds))
            sketching(self._backend).fold(*values, out, self._folds)


class Tensors(list[Tensor | None]):
    """A list of tensors that looks up their addresses once; not to be changed after that."""

    @cached_property
    def addresses(self) -> np.ndarray:
        """int64, shape (N,); of tensors none of which is None."""
        return np.fromiter(map(Tensor.data_ptr, cast(list[Tensor], self)), np.int64, len(self))


def addresses(tensors: Sequence[Tensor | None]) -> np.ndarray:
    """Addresses of `tensors`: int64, shape (N,)."""
    return (tensors if isinstance(tensors, Tensors) else Tensors(tensors)).addresses


def addresses_of_some(tensors: Sequence[Tensor | None]) -> np.ndarray:
    """The same where some of `tensors` are None: 0 for these."""
    if isinstance(tensors, Tensors):
        return tensors.addresses
    return np.array([0 if t is None else t.data_ptr() for t in tensors], np.int64)


Value = TypeVar("Value")


@overload
def pick(values: None, index: Sequence[int] | None) -> None: ...
@overload
def pick(values: Sequence[Value], index: Sequence[int] | None) -> Sequence[Value]: ...
@overload
def pick(values: Sequence[Value] | None, index: Sequence[int] | None) -> Sequence[Value] | None: ...
def pick(values: Sequence[Value] | None, index: Sequence[int] | None) -> Sequence[Value] | None:
    """The `values` at `index`; None for no values, all of them for no index."""
    return values if values is None or index is None else [values[i] for i in index]
