"""GPUs: one launch for all tensors of a dtype through a table of pointers, then one that sums up layers.

The work is cut into tiles of :data:`TILE` elements, one program each. A program reads its tensor's pointers
from a table, passes over its elements once, and writes six float64 partial sums; programs of a layer are
neighbours, so the second, small kernel adds them in a fixed order. No atomics: two runs agree bit for bit.

Whole tiles of tensors whose four pointers are multiples of 16 bytes take a path without masks, in which every
access is 128 bits wide; the rest is masked.

With TRITON_INTERPRET=1 in the environment before the first import, it runs on CPU tensors.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import SUMS, addresses, capturing

NAME = "triton"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

BLOCK = 1024  # elements that a program holds at a time
TILE = 8 * BLOCK  # elements of a program
REDUCE_BLOCK = 256
REDUCE_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

_ALIGNED: tl.constexpr = tl.constexpr(1)  # all pointers are multiples of 16 bytes
_COPIED: tl.constexpr = tl.constexpr(2)  # store the gradient into the previous one
_BUFFERED: tl.constexpr = tl.constexpr(4)  # there is a momentum buffer

_TABLES = 4  # sets of addresses to keep: allocators hand a few out in turn
_SPARES = 8  # tables made ahead for captures in CUDA graphs, which cannot make any
_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable(device: torch.device) -> str:
    """Runs on CUDA and ROCm devices, and by the interpreter on CPUs."""
    if device.type == "cuda" or (device.type == "cpu" and _INTERPRET):
        return ""
    return "it runs on CUDA and ROCm GPUs only (on CPUs with TRITON_INTERPRET=1, for tests)"


@triton.jit
def _update(
    x,
    g,
    b,
    lr,
    decay,
    gain,
    weight_decay,
    lookahead,
    sign,
    bound,
    shrink,
    buffered,
    MOMENTUM: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """One update of :data:`oscopt.kernels.HYPER`, rounded as torch.optim.SGD rounds it: x, b."""
    d = g * sign
    # An infinite parameter times a weight decay of 0 would be NaN.
    d = tl.where(weight_decay != 0, tl.fma(x, weight_decay, d), d)
    if MOMENTUM:
        b = tl.fma(d, gain, b * decay)
        d = tl.where(buffered, tl.where(lookahead != 0, tl.fma(b, lookahead, d), b), d)
        if BOUNDED:
            clipped = tl.where(d > bound, bound, tl.where(d < -bound, -bound, d))
            clipped += d * 0.0  # 0 times what is not finite is NaN
            clipped = tl.where(shrink != 0, tl.fma(x, shrink, clipped), clipped)
            d = tl.where(bound < float("inf"), clipped, d)
    return tl.fma(d, -lr, x), b


@triton.jit
def _pass(
    p_ptr,
    g_ptr,
    q_ptr,
    b_ptr,
    count,
    lr,
    decay,
    gain,
    weight_decay,
    lookahead,
    sign,
    bound,
    shrink,
    copied,
    buffered,
    partial_ptr,
    ELEMENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    UPDATE: tl.constexpr,
    MEASURE: tl.constexpr,
    PAIR: tl.constexpr,
    MOMENTUM: tl.constexpr,
    COPY: tl.constexpr,
    BOUNDED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update `count` elements from the pointers on, a multiple of BLOCK unless MASKED; store their sums."""
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.float64)
    dot, sq_norm, diff_sq_norm, prev_sq_norm = zero, zero, zero, zero
    alignment, momentum_sq_norm = zero, zero
    for offset in range(0, count, BLOCK):
        at = offset + lanes
        if MASKED:
            mask = at < count
            buffer_mask = mask & buffered
            copy_mask = mask & copied
        else:
            mask = None
            buffer_mask = buffered
            copy_mask = copied
        g_raw = tl.load(g_ptr + at, mask=mask)
        g = g_raw.to(COMPUTE)
        g64 = g.to(tl.float64)
        if MASKED:
            g64 = tl.where(mask, g64, 0.0)
        if PAIR:
            q = tl.load(q_ptr + at, mask=mask).to(tl.float64)
            if MASKED:
                q = tl.where(mask, q, 0.0)
        if MOMENTUM:
            b = tl.load(b_ptr + at, mask=buffer_mask, other=0.0).to(COMPUTE)
            if MEASURE:
                b64 = b.to(tl.float64)
                alignment = tl.fma(g64, b64, alignment)
                momentum_sq_norm = tl.fma(b64, b64, momentum_sq_norm)
        if UPDATE:
            x = tl.load(p_ptr + at, mask=mask).to(COMPUTE)
            if MOMENTUM:
                x, b = _update(
                    x, g, b, lr, decay, gain, weight_decay, lookahead, sign, bound, shrink, buffered,
                    True, BOUNDED,
                )  # fmt: skip
                tl.store(b_ptr + at, b.to(ELEMENT), mask=buffer_mask)
            else:
                x, _ = _update(
                    x, g, x, lr, decay, gain, weight_decay, lookahead, sign, bound, shrink, buffered,
                    False, False,
                )  # fmt: skip
            tl.store(p_ptr + at, x.to(ELEMENT), mask=mask)
        if COPY:
            tl.store(q_ptr + at, g_raw, mask=copy_mask)
        if MEASURE:
            sq_norm = tl.fma(g64, g64, sq_norm)
            if PAIR:
                diff = g64 - q
                dot = tl.fma(g64, q, dot)
                diff_sq_norm = tl.fma(diff, diff, diff_sq_norm)
                prev_sq_norm = tl.fma(q, q, prev_sq_norm)
    if MEASURE:
        tl.store(partial_ptr, tl.sum(dot))
        tl.store(partial_ptr + 1, tl.sum(sq_norm))
        tl.store(partial_ptr + 2, tl.sum(diff_sq_norm))
        tl.store(partial_ptr + 3, tl.sum(prev_sq_norm))
        tl.store(partial_ptr + 4, tl.sum(alignment) * sign)
        tl.store(partial_ptr + 5, tl.sum(momentum_sq_norm))


@triton.jit
def step_tile(
    k,
    start,
    stop,
    pointers_ptr,
    flags_ptr,
    row_ptr,
    hyper_ptr,
    scale_of_ptr,
    scale_ptr,
    bound_ptr,
    partial_ptr,
    N,
    ELEMENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    UPDATE: tl.constexpr,
    MEASURE: tl.constexpr,
    PAIR: tl.constexpr,
    MOMENTUM: tl.constexpr,
    COPY: tl.constexpr,
    SCALED: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Update elements [start, stop) of tensor k, at most TILE, and store their sums, as the step kernel."""
    flags = tl.load(flags_ptr + k)
    element = tl.pointer_type(ELEMENT)
    g_ptr = tl.load(pointers_ptr + N + k).to(element) + start
    p_ptr = tl.load(pointers_ptr + k).to(element) + start
    q_ptr = tl.load(pointers_ptr + 2 * N + k).to(element) + start
    b_ptr = tl.load(pointers_ptr + 3 * N + k).to(element) + start
    lr = 0.0
    decay = 0.0
    gain = 0.0
    weight_decay = 0.0
    lookahead = 0.0
    sign = 1.0
    bound = float("inf")
    shrink = 0.0
    if UPDATE:
        hyper_ptr += 6 * tl.load(row_ptr + k)
        lr = tl.load(hyper_ptr)
        entry = tl.load(scale_of_ptr + k)
        if SCALED:
            lr *= tl.load(scale_ptr + entry, mask=entry >= 0, other=1.0)
        lr = lr.to(COMPUTE)
        decay = tl.load(hyper_ptr + 1).to(COMPUTE)
        gain = tl.load(hyper_ptr + 2).to(COMPUTE)
        weight_decay = tl.load(hyper_ptr + 3).to(COMPUTE)
        lookahead = tl.load(hyper_ptr + 4).to(COMPUTE)
        sign = tl.load(hyper_ptr + 5).to(COMPUTE)
        if BOUNDED:
            there = (entry >= 0) & ((flags & _BUFFERED) != 0)
            bound = tl.load(bound_ptr + entry, mask=there, other=float("inf")).to(COMPUTE)
            bounded = bound < float("inf")
            shrink = tl.where(bounded, weight_decay * bound, 0.0)
            weight_decay = tl.where(bounded, 0.0, weight_decay)
            lookahead = tl.where(bounded, 0.0, lookahead)
    copied = (tl.zeros((BLOCK,), tl.int32) + (flags & _COPIED)) != 0
    buffered = (tl.zeros((BLOCK,), tl.int32) + (flags & _BUFFERED)) != 0
    # One loop, compiled twice: without masks every access is 128 bits wide.
    if (flags & _ALIGNED) != 0 and start + TILE <= stop:
        p_ptr = tl.multiple_of(p_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        q_ptr = tl.multiple_of(q_ptr, 16)
        b_ptr = tl.multiple_of(b_ptr, 16)
        _pass(
            p_ptr, g_ptr, q_ptr, b_ptr, TILE, lr, decay, gain, weight_decay, lookahead, sign, bound, shrink,
            copied, buffered, partial_ptr, ELEMENT, COMPUTE, UPDATE, MEASURE, PAIR, MOMENTUM, COPY, BOUNDED,
            False, BLOCK,
        )  # fmt: skip
    else:
        rest = (stop - start).to(tl.int32)
        _pass(
            p_ptr, g_ptr, q_ptr, b_ptr, rest, lr, decay, gain, weight_decay, lookahead, sign, bound, shrink,
            copied, buffered, partial_ptr, ELEMENT, COMPUTE, UPDATE, MEASURE, PAIR, MOMENTUM, COPY, BOUNDED,
            True, BLOCK,
        )  # fmt: skip


@triton.jit
def step_kernel(
    pointers_ptr,  # int64 (4, N): addresses of parameters, gradients, previous gradients, momentum buffers
    tensor_ptr,  # int32 (tiles,): each tile's tensor
    start_ptr,  # int64 (tiles,): its first element
    size_ptr,  # int64 (N,)
    flags_ptr,  # int32 (N,): the sum of ALIGNED, COPIED and BUFFERED, where they hold
    row_ptr,  # int32 (N,): row of hyper
    hyper_ptr,  # float64 (rows, 6)
    scale_of_ptr,  # int32 (N,): each tensor's entry in the scales and bounds, -1: none
    scale_ptr,  # float64 (L,): what multiplies a layer's learning rate, if SCALED
    bound_ptr,  # float64 (L,): what bounds a layer's update, if BOUNDED
    partial_ptr,  # float64 (tiles, 6)
    N,
    ELEMENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    UPDATE: tl.constexpr,
    MEASURE: tl.constexpr,
    PAIR: tl.constexpr,
    MOMENTUM: tl.constexpr,
    COPY: tl.constexpr,
    SCALED: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Update the elements of one tile and take its sums."""
    tile = tl.program_id(0)
    k = tl.load(tensor_ptr + tile)
    start = tl.multiple_of(tl.load(start_ptr + tile), TILE)
    stop = tl.minimum(start + TILE, tl.load(size_ptr + k))
    step_tile(
        k, start, stop, pointers_ptr, flags_ptr, row_ptr, hyper_ptr, scale_of_ptr, scale_ptr, bound_ptr,
        partial_ptr + 6 * tile.to(tl.int64), N, ELEMENT, COMPUTE, UPDATE, MEASURE, PAIR, MOMENTUM, COPY,
        SCALED, BOUNDED, BLOCK, TILE,
    )  # fmt: skip


@triton.jit
def reduce_kernel(
    partial_ptr,  # float64 (tiles, SUMS)
    bounds_ptr,  # int32 (L + 1,): each layer's first tile
    out_ptr,  # float64 (SUMS, L), rows `stride` apart
    stride,
    SUMS: tl.constexpr,
    PAIR: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the partial sums of one layer and one of the sums, in a fixed order; NaN where it was not taken."""
    layer = tl.program_id(0)
    s = tl.program_id(1)
    first = tl.load(bounds_ptr + layer)
    last = tl.load(bounds_ptr + layer + 1)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, last, BLOCK):
        tiles = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + SUMS * tiles.to(tl.int64) + s, mask=tiles < last, other=0.0)
    value = tl.sum(total)
    of_momentum = (s == 4) | (s == 5)
    taken = (s == 1) | (of_momentum & ALIGN) | ((s != 1) & (of_momentum == 0) & PAIR)
    # Not finite (x - x is 0 for nothing else): NaN.
    tl.store(out_ptr + s * stride + layer, tl.where((value - value == 0) & taken, value, float("nan")))


_ELEMENT = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def constants(
    dtype: torch.dtype,
    *,
    update: bool,
    measure: bool,
    pair: bool,
    momentum: bool,
    copy: bool,
    scaled: bool,
    bounded: bool,
) -> dict:
    """The compile-time arguments of :func:`step_kernel`: `pair`: there are previous gradients."""
    return {
        "ELEMENT": _ELEMENT[dtype],
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "UPDATE": update,
        "MEASURE": measure,
        "PAIR": pair,
        "MOMENTUM": momentum,
        "COPY": copy,
        "SCALED": scaled,
        "BOUNDED": bounded,
        "BLOCK": BLOCK,
        "TILE": TILE,
    }


def options(dtype: torch.dtype, warp_size: int = 64 if torch.version.hip else 32) -> dict:
    """The compiler's options for the step kernel: as many threads as make an access 16 bytes wide."""
    return {"num_warps": BLOCK * dtype.itemsize // (16 * warp_size), "enable_fp_fusion": False}


class Batch:
    """See :class:`oscopt.kernels.BatchProtocol`."""

    def __init__(self, params: Sequence[Tensor], layer_of, num_layers, scale_of=None) -> None:
        self._params = params
        self._dtype = params[0].dtype
        self._device = params[0].device
        self._num_layers = num_layers
        sizes = np.array([p.numel() for p in params], np.int64)
        tensor, start = _tiles(sizes, TILE)
        self._tensor, self._start, self._sizes = (
            self._upload(tensor),
            self._upload(start),
            self._upload(sizes),
        )
        self._scale_of = self._upload(np.array(layer_of if scale_of is None else scale_of, np.int32))
        bounds = np.searchsorted(np.asarray(layer_of)[tensor], np.arange(num_layers + 1))
        self._bounds = self._upload(bounds.astype(np.int32))
        self._ones = self._upload(np.ones(num_layers))
        self._partials = torch.empty((len(tensor), len(SUMS)), dtype=torch.float64, device=self._device)
        self._tables: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()
        self._spares: list[tuple[Tensor, Tensor]] = []  # on the host and on the device
        self._captured: dict[object, tuple[Tensor, ...]] = {}  # what graphs read
        self._rows: tuple[Sequence[int] | None, Tensor | None] = (None, None)
        self._hyper: tuple[object, Tensor | None] = (None, None)

    def prepare_capture(self) -> None:
        """Tables, which are in pinned memory: none can be had later."""
        while len(self._spares) < _SPARES:
            shape, pin = (5, len(self._params)), self._device.type != "cpu"
            spare = torch.empty(shape, dtype=torch.int64, pin_memory=pin)
            self._spares.append((spare, torch.empty_like(spare, device=self._device)))

    def step(self, grads, prevs, bufs, copies, rows, hyper, out, scale=None, bound=None) -> None:
        measure, pair = out is not None, out is not None and prevs is not None
        if len(self._tensor) and (measure or hyper is not None):
            if scale is None and bound is not None:
                scale = self._ones  # saves a variant to compile: who bounds steps scales them, too
            arguments = self._arguments(grads, prevs, bufs, copies, rows, hyper, scale, bound)
            chosen = constants(
                self._dtype,
                update=hyper is not None,
                measure=measure,
                pair=pair,
                copy=pair and copies is not None,
                **_variant(bufs, hyper, scale, bound),
            )
            step_kernel[(len(self._tensor),)](**arguments, **chosen, **options(self._dtype))
        if measure:
            self._reduce(self._partials, self._bounds, pair, bufs is not None, out)

    def _arguments(self, grads, prevs, bufs, copies, rows, hyper, scale, bound) -> dict[str, object]:
        """The step kernel's arguments, by name."""
        pointers, flags = self._table(grads, prevs, bufs, copies)
        if hyper is not None:
            if self._rows[0] != rows:
                self._rows = (list(rows), self._upload(np.array(rows, np.int32)))
            if self._hyper[0] is not hyper:
                self._hyper = (hyper, self._upload(np.array(hyper, np.float64)))
            if capturing(self._device):
                for uploaded in (self._rows[1], self._hyper[1]):
                    if uploaded is not None:
                        self._captured[id(uploaded)] = (uploaded,)
        return {
            "pointers_ptr": pointers,
            "tensor_ptr": self._tensor,
            "start_ptr": self._start,
            "size_ptr": self._sizes,
            "flags_ptr": flags,
            # Not read where nothing is updated.
            "row_ptr": self._rows[1] if hyper is not None else self._scale_of,
            "hyper_ptr": self._hyper[1] if hyper is not None else self._partials,
            "scale_of_ptr": self._scale_of,
            "scale_ptr": self._partials if scale is None else scale,
            "bound_ptr": self._partials if bound is None else bound,
            "partial_ptr": self._partials,
            "N": len(grads),
        }

    def _reduce(self, partials: Tensor, bounds: Tensor, pair: bool, align: bool, out: Tensor) -> None:
        """Sum up layers."""
        if self._num_layers:
            reduce_kernel[(self._num_layers, partials.shape[1])](
                partials,
                bounds,
                out,
                out.stride(0),
                SUMS=partials.shape[1],
                PAIR=pair,
                ALIGN=align,
                BLOCK=REDUCE_BLOCK,
                **REDUCE_OPTIONS,
            )

    def _table(self, grads, prevs, bufs, copies) -> tuple[Tensor, Tensor]:
        """Pointers and flags on the device; uploaded only if these addresses are not among the last few."""
        table = np.zeros((5, len(grads)), np.int64)
        table[0], table[1] = addresses(self._params), addresses(grads)
        table[2] = table[1] if prevs is None else addresses(prevs)
        table[3] = table[1]
        flags = table[4].view(np.int32)[: len(grads)]
        if bufs is not None:
            there = [b is not None for b in bufs]
            table[3, there] = addresses([b for b in bufs if b is not None])
            flags += _BUFFERED.value * np.array(there, np.int32)
        if copies is not None:
            flags += _COPIED.value * np.array(copies, np.int32)
        flags += _ALIGNED.value * (table[:4] % 16 == 0).all(0).astype(np.int32)
        if capturing(self._device):
            return _parts(self._upload_captured(table))
        key = table.tobytes()
        if key in self._tables:
            self._tables.move_to_end(key)
        else:
            if len(self._tables) == _TABLES:
                self._tables.popitem(last=False)
            on_device = self._upload(table)
            self._tables[key] = _parts(on_device)
        return self._tables[key]

    def _upload(self, array: np.ndarray) -> Tensor:
        if capturing(self._device):
            raise RuntimeError(
                "something has changed since the last step (a hyperparameter, a first momentum buffer, which "
                "parameters have gradients), and a graph captures no upload; take 3 steps before capturing"
            )
        host = torch.from_numpy(array)
        if self._device.type == "cpu":
            return host
        # Pinned, so that the copy does not wait for the device; torch keeps the pages until it is done.
        return host.pin_memory().to(self._device, non_blocking=True)

    def _upload_captured(self, table: np.ndarray) -> Tensor:
        """A table that a graph uploads at every replay from memory that nobody writes to any more."""
        key = table.tobytes()
        if key not in self._captured:  # else another graph has captured the same
            if not self._spares:
                raise RuntimeError(
                    "the tables made ahead for captures are used up; take a step that is not captured"
                )
            self._captured[key] = self._spares.pop()
            self._captured[key][0].numpy()[:] = table
        host, on_device = self._captured[key]
        return on_device.copy_(host, non_blocking=True)


def _variant(bufs, hyper, scale, bound) -> dict[str, bool]:
    """Of the update that a step does: compile-time arguments of :func:`step_tile`."""
    momentum = bufs is not None and any(b is not None for b in bufs)
    return {
        "momentum": momentum,
        "scaled": scale is not None,
        "bounded": momentum and hyper is not None and bound is not None,
    }


def _parts(table: Tensor) -> tuple[Tensor, Tensor]:
    """Pointers, int64 (4, N), and flags, int32."""
    return table[:4], table[4].view(torch.int32)


def _tiles(sizes: np.ndarray, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """The tensor (int32) and the first element (int64) of every tile of `tile` elements."""
    tiles = -(-sizes // tile)
    tensor = np.repeat(np.arange(len(sizes), dtype=np.int32), tiles)
    start = (np.arange(len(tensor)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * tile
    return tensor, start
