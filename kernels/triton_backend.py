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

from . import SUMS, addresses, addresses_of_some, capturing
from .sketch import BUCKETS, GOLDEN, ODD, ODDER, OFFSETS

NAME = "triton"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

BLOCK = BUCKETS  # elements that a program holds at a time: one run of a sketch
TILE = 8 * BLOCK  # elements of a program
REDUCE_BLOCK = 256
REDUCE_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

_ALIGNED: tl.constexpr = tl.constexpr(1)  # all pointers are multiples of 16 bytes
_COPIED: tl.constexpr = tl.constexpr(2)  # store the gradient into the previous one
_BUFFERED: tl.constexpr = tl.constexpr(4)  # there is a momentum buffer
_GOLDEN: tl.constexpr = tl.constexpr(GOLDEN)
_ODD: tl.constexpr = tl.constexpr(ODD)
_ODDER: tl.constexpr = tl.constexpr(ODDER)
_OFFSETS: tl.constexpr = tl.constexpr(OFFSETS)

_TABLES = 4  # sets of addresses to keep: allocators hand a few out in turn
_SPARES = 8  # tables made ahead for captures in CUDA graphs, which cannot make any
_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable(device: torch.device) -> str:
    """Runs on CUDA and ROCm devices, and by the interpreter on CPUs."""
    if device.type == "cuda" or (device.type == "cpu" and _INTERPRET):
        return ""
    return "it runs on CUDA and ROCm GPUs only (on CPUs with TRITON_INTERPRET=1, for tests)"


@triton.jit
def _load(pointers, mask, WANTED: tl.constexpr, MASKED: tl.constexpr):
    """Zeros where nothing is loaded."""
    if not WANTED:
        return tl.zeros(pointers.shape, pointers.dtype.element_ty)
    elif MASKED:
        return tl.load(pointers, mask=mask, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store(pointers, values, mask, WANTED: tl.constexpr, MASKED: tl.constexpr):
    if WANTED and MASKED:
        tl.store(pointers, values, mask=mask)
    elif WANTED:
        tl.store(pointers, values)


@triton.jit
def _pair_sums(dot, sq_norm, diff_sq_norm, prev_sq_norm, g, q, PAIR: tl.constexpr):
    """What a block adds to these of :data:`oscopt.kernels.SUMS`; g: float64."""
    sq_norm += _of_thread(g * g, sq_norm)
    if PAIR:
        q = q.to(tl.float64)
        diff = g - q
        dot += _of_thread(g * q, dot)
        diff_sq_norm += _of_thread(diff * diff, dot)
        prev_sq_norm += _of_thread(q * q, dot)
    return dot, sq_norm, diff_sq_norm, prev_sq_norm


@triton.jit
def _momentum_sums(alignment, momentum_sq_norm, g, b, MOMENTUM: tl.constexpr):
    """The same for the others."""
    if MOMENTUM:
        b = b.to(tl.float64)
        alignment += _of_thread(g * b, alignment)
        momentum_sq_norm += _of_thread(b * b, alignment)
    return alignment, momentum_sq_norm


@triton.jit
def _of_thread(values, like):
    """Sums of what each thread holds, in a quarter of the registers of a sum a lane, so more blocks run."""
    threads: tl.constexpr = like.shape[0]
    return tl.sum(tl.reshape(values, (threads, values.shape[0] // threads)), axis=1)


@triton.jit
def _updated(x, g, b, rule, buffered, MOMENTUM: tl.constexpr, BOUNDED: tl.constexpr):
    """One update of :data:`oscopt.kernels.HYPER`, rounded as torch.optim.SGD rounds it: x, b."""
    lr, momentum, one_minus_dampening, weight_decay, nesterov_momentum, sign, bound, bounded_decay = rule
    d = g * sign
    # An infinite parameter times a weight decay of 0 would be NaN.
    d = tl.where(weight_decay != 0, tl.fma(x, weight_decay, d), d)
    if MOMENTUM:
        b = tl.fma(d, one_minus_dampening, b * momentum)
        nesterov = tl.where(nesterov_momentum != 0, tl.fma(b, nesterov_momentum, d), b)
        d = tl.where(buffered, nesterov, d)
        if BOUNDED:
            clipped = tl.where(d > bound, bound, tl.where(d < -bound, -bound, d))
            clipped += d * 0.0  # 0 times what is not finite is NaN
            clipped = tl.where(bounded_decay != 0, tl.fma(x, bounded_decay, clipped), clipped)
            d = tl.where(bound < float("inf"), clipped, d)
    return tl.fma(d, -lr, x), b


@triton.jit
def _hashed(index, seed):
    """:func:`oscopt.kernels.sketch.hashed`, of uint32."""
    x = index * _GOLDEN + seed
    x = (x ^ (x >> 16)) * _ODD
    x = (x ^ (x >> 15)) * _ODDER
    return x ^ (x >> 16)


@triton.jit
def sketched_run(x_ptr, run, count, seed, COMPUTE: tl.constexpr, MASKED: tl.constexpr, BUCKETS: tl.constexpr):
    """What one run of consecutive elements adds to its buckets, see :mod:`oscopt.kernels.sketch`.

    Bucket b reads element (b - o) mod k of a run that is rotated by o, so nothing is scattered.

    Args:
        x_ptr: the run's first element.
        run: its number in its tensor, int64.
        count: how many elements there are; read if MASKED, else BUCKETS.
    """
    first = run * BUCKETS
    offset = _hashed(run.to(tl.uint32), seed ^ _OFFSETS).to(tl.int32)
    at = (tl.arange(0, BUCKETS) - offset) & (BUCKETS - 1)
    value = _load(x_ptr + at, at < count, True, MASKED).to(COMPUTE)
    # 32 elements share a hash, 8 apart; numbers of 64 bits would cost twice the instructions.
    number = (first & 255).to(tl.int32) + at
    bits = _hashed((first // 256 * 8).to(tl.uint32) + ((number >> 8) * 8 + (number & 7)).to(tl.uint32), seed)
    minus = (bits >> (31 - ((number >> 3) & 31)).to(tl.uint32)) & 1
    return tl.where(minus == 1, -value, value)


@triton.jit
def _pass(
    pointers,
    first_run,
    seed,
    count,
    rule,
    copied,
    buffered,
    partial_ptr,
    bucket_ptr,
    UPDATE: tl.constexpr,
    MEASURE: tl.constexpr,
    PAIR: tl.constexpr,
    MOMENTUM: tl.constexpr,
    COPY: tl.constexpr,
    BOUNDED: tl.constexpr,
    SKETCH: tl.constexpr,
    MASKED: tl.constexpr,
    ELEMENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update `count` elements from the pointers on, a multiple of BLOCK unless MASKED; store their sums.

    A sum that is not stored is not taken: the compiler drops it.
    """
    p_ptr, g_ptr, q_ptr, b_ptr = pointers
    THREADS: tl.constexpr = BLOCK * ELEMENT.primitive_bitwidth // 128
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros((THREADS,), tl.float64)
    dot, sq_norm, diff_sq_norm, prev_sq_norm, alignment, momentum_sq_norm = zero, zero, zero, zero, zero, zero
    buckets = tl.zeros((BLOCK,), COMPUTE)
    for offset in range(0, count, BLOCK):
        at = offset + lanes
        mask = at < count
        buffer_mask, copy_mask = buffered, copied
        if MASKED:
            buffer_mask, copy_mask = mask & buffered, mask & copied
        # The order of loads and stores matters: with momentum, any other was 3 to 9 % slower on an H200.
        g_raw = _load(g_ptr + at, mask, True, MASKED)
        q = _load(q_ptr + at, mask, PAIR, MASKED)
        b = _load(b_ptr + at, buffer_mask, MOMENTUM, True).to(COMPUTE)
        g = g_raw.to(COMPUTE)
        g64 = g.to(tl.float64)
        alignment, momentum_sq_norm = _momentum_sums(alignment, momentum_sq_norm, g64, b, MOMENTUM)
        x = _load(p_ptr + at, mask, UPDATE, MASKED).to(COMPUTE)
        if UPDATE:
            x, b = _updated(x, g, b, rule, buffered, MOMENTUM, BOUNDED)
            _store(b_ptr + at, b.to(ELEMENT), buffer_mask, MOMENTUM, True)
            _store(p_ptr + at, x.to(ELEMENT), mask, True, MASKED)
        _store(q_ptr + at, g_raw, copy_mask, COPY, True)
        dot, sq_norm, diff_sq_norm, prev_sq_norm = _pair_sums(
            dot, sq_norm, diff_sq_norm, prev_sq_norm, g64, q, PAIR
        )
        if SKETCH:  # of the same elements, which the first-level cache still holds
            run = first_run + offset // BLOCK
            buckets += sketched_run(g_ptr + offset, run, count - offset, seed, COMPUTE, MASKED, BLOCK)
    if MEASURE:
        tl.store(partial_ptr, tl.sum(dot))
        tl.store(partial_ptr + 1, tl.sum(sq_norm))
        tl.store(partial_ptr + 2, tl.sum(diff_sq_norm))
        tl.store(partial_ptr + 3, tl.sum(prev_sq_norm))
        tl.store(partial_ptr + 4, tl.sum(alignment) * rule[5])
        tl.store(partial_ptr + 5, tl.sum(momentum_sq_norm))
    if SKETCH:
        tl.store(bucket_ptr + lanes, buckets)


@triton.jit
def _rule(
    k,
    buffered,
    row_ptr,
    hyper_ptr,
    scale_of_ptr,
    scale_ptr,
    bound_ptr,
    COMPUTE: tl.constexpr,
    SCALED: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """What an update of tensor k needs to know."""
    hyper_ptr += 6 * tl.load(row_ptr + k)
    lr = tl.load(hyper_ptr)
    entry = tl.load(scale_of_ptr + k)
    if SCALED:
        lr *= tl.load(scale_ptr + entry, mask=entry >= 0, other=1.0)
    lr = lr.to(COMPUTE)
    momentum = tl.load(hyper_ptr + 1).to(COMPUTE)
    one_minus_dampening = tl.load(hyper_ptr + 2).to(COMPUTE)
    weight_decay = tl.load(hyper_ptr + 3).to(COMPUTE)
    nesterov_momentum = tl.load(hyper_ptr + 4).to(COMPUTE)
    sign = tl.load(hyper_ptr + 5).to(COMPUTE)
    bound = float("inf")
    bounded_decay = 0.0
    if BOUNDED:
        bound = tl.load(bound_ptr + entry, mask=(entry >= 0) & buffered, other=float("inf")).to(COMPUTE)
        bounded = bound < float("inf")
        bounded_decay = tl.where(bounded, weight_decay * bound, 0.0)
        weight_decay = tl.where(bounded, 0.0, weight_decay)
        nesterov_momentum = tl.where(bounded, 0.0, nesterov_momentum)
    return lr, momentum, one_minus_dampening, weight_decay, nesterov_momentum, sign, bound, bounded_decay


@triton.jit
def step_kernel(
    pointers_ptr,  # int64 (4, N): addresses of parameters, gradients, previous gradients, momentum buffers
    tensor_ptr,  # int32 (tiles,): each tile's tensor
    start_ptr,  # int64 (tiles,): its first element
    stop_ptr,  # int64 (tiles,): behind its last one
    flags_ptr,  # int32 (N,): the sum of ALIGNED, COPIED and BUFFERED, where they hold
    row_ptr,  # int32 (N,): row of hyper
    hyper_ptr,  # float64 (rows, 6)
    scale_of_ptr,  # int32 (N,): each tensor's entry in the scales and bounds, -1: none
    scale_ptr,  # float64 (L,): what multiplies a layer's learning rate, if SCALED
    bound_ptr,  # float64 (L,): what bounds a layer's update, if BOUNDED
    partial_ptr,  # float64 (tiles, 6)
    seed_ptr,  # int64 (N,), if SKETCH
    bucket_ptr,  # COMPUTE (tiles, BLOCK): the sketch of each tile, if SKETCH
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
    SKETCH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Update the elements of one tile, and take its sums and its sketch."""
    tile = tl.program_id(0)
    k = tl.load(tensor_ptr + tile)
    start = tl.multiple_of(tl.load(start_ptr + tile), BLOCK)
    stop = tl.load(stop_ptr + tile)
    flags = tl.load(flags_ptr + k)
    element = tl.pointer_type(ELEMENT)
    p_ptr = tl.load(pointers_ptr + k).to(element) + start
    g_ptr = tl.load(pointers_ptr + N + k).to(element) + start
    q_ptr = tl.load(pointers_ptr + 2 * N + k).to(element) + start
    b_ptr = tl.load(pointers_ptr + 3 * N + k).to(element) + start
    rule = 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0
    if UPDATE:
        there = (flags & _BUFFERED) != 0
        rule = _rule(
            k, there, row_ptr, hyper_ptr, scale_of_ptr, scale_ptr, bound_ptr, COMPUTE, SCALED, BOUNDED
        )
    first_run, seed = start // BLOCK, start
    if SKETCH:
        seed = tl.load(seed_ptr + k).to(tl.uint32)
    copied = (tl.zeros((BLOCK,), tl.int32) + (flags & _COPIED)) != 0
    buffered = (tl.zeros((BLOCK,), tl.int32) + (flags & _BUFFERED)) != 0
    partial_ptr += 6 * tile.to(tl.int64)
    bucket_ptr += BLOCK * tile.to(tl.int64)
    # One loop, compiled twice: without masks every access is 128 bits wide.
    if (flags & _ALIGNED) != 0 and start + TILE <= stop:
        p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
        q_ptr, b_ptr = tl.multiple_of(q_ptr, 16), tl.multiple_of(b_ptr, 16)
        _pass(
            (p_ptr, g_ptr, q_ptr, b_ptr), first_run, seed, TILE, rule, copied, buffered,
            partial_ptr, bucket_ptr, UPDATE, MEASURE, PAIR, MOMENTUM, COPY, BOUNDED, SKETCH, False, ELEMENT,
            COMPUTE, BLOCK,
        )  # fmt: skip
    else:
        rest = (stop - start).to(tl.int32)
        _pass(
            (p_ptr, g_ptr, q_ptr, b_ptr), first_run, seed, rest, rule, copied, buffered,
            partial_ptr, bucket_ptr, UPDATE, MEASURE, PAIR, MOMENTUM, COPY, BOUNDED, SKETCH, True, ELEMENT,
            COMPUTE, BLOCK,
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


ELEMENT = {
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
    sketch: bool = False,
    tile: int = TILE,
) -> dict:
    """The compile-time arguments of :func:`step_kernel`: `pair`: there are previous gradients."""
    return {
        "ELEMENT": ELEMENT[dtype],
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "UPDATE": update,
        "MEASURE": measure,
        "PAIR": pair,
        "MOMENTUM": momentum,
        "COPY": copy,
        "SCALED": scaled,
        "BOUNDED": bounded,
        "SKETCH": sketch,
        "BLOCK": BLOCK,
        "TILE": tile,
    }


def options(dtype: torch.dtype, warp_size: int = 64 if torch.version.hip else 32) -> dict:
    """The compiler's options for the step kernel: as many threads as make an access 16 bytes wide."""
    return {"num_warps": BLOCK * dtype.itemsize // (16 * warp_size), "enable_fp_fusion": False}


class Batch:
    """See :class:`oscopt.kernels.BatchProtocol`."""

    def __init__(self, params: Sequence[Tensor], layer_of, num_layers, scale_of=None) -> None:
        self._params = params  # held, so that their memory stays where it is
        self._own = addresses(params)
        self._dtype = params[0].dtype
        self._device = params[0].device
        self._num_layers = num_layers
        sizes = np.array([p.numel() for p in params], np.int64)
        tensor, start, stop = cut(sizes, TILE)
        self._tiles = self._tables_of(tensor, start, stop)
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

    def _tables_of(self, tensor: np.ndarray, start: np.ndarray, stop: np.ndarray) -> dict[str, Tensor]:
        """Arguments of the step kernel that tell its tiles."""
        return {
            "tensor_ptr": self._upload(tensor),
            "start_ptr": self._upload(start),
            "stop_ptr": self._upload(stop),
        }

    def prepare_capture(self) -> None:
        """Tables, which are in pinned memory: none can be had later."""
        while len(self._spares) < _SPARES:
            shape, pin = (5, len(self._own)), self._device.type != "cpu"
            spare = torch.empty(shape, dtype=torch.int64, pin_memory=pin)
            self._spares.append((spare, torch.empty_like(spare, device=self._device)))

    def step(self, grads, prevs, bufs, copies, rows, hyper, out, scale=None, bound=None) -> None:
        measure, pair = out is not None, out is not None and prevs is not None
        if len(self._partials) and (measure or hyper is not None):
            variant = {"measure": measure, "pair": pair, "copy": pair and copies is not None}
            arguments = self._arguments(grads, prevs, bufs, copies, rows, hyper)
            self._launch(self._tiles, arguments, variant, bufs, hyper, scale, bound)
        if measure:
            self._reduce(self._partials, self._bounds, pair, bufs is not None, out)

    def _launch(self, tiles: dict[str, Tensor], arguments, variant, bufs, hyper, scale, bound) -> None:
        """The step kernel, on `tiles`.

        Args:
            arguments: from :meth:`_arguments`.
            variant: of the arguments of :func:`constants`, those that do not follow from the others.
        """
        if scale is None and bound is not None:
            scale = self._ones  # saves a variant to compile: who bounds steps scales them, too
        momentum = bufs is not None and any(b is not None for b in bufs)
        chosen = constants(
            self._dtype,
            update=hyper is not None,
            momentum=momentum,
            scaled=scale is not None,
            bounded=momentum and hyper is not None and bound is not None,
            **variant,
        )
        step_kernel[(len(tiles["start_ptr"]),)](
            **arguments,
            **tiles,
            scale_ptr=self._partials if scale is None else scale,
            bound_ptr=self._partials if bound is None else bound,
            **chosen,
            **options(self._dtype),
        )

    def _arguments(self, grads, prevs, bufs, copies, rows, hyper) -> dict[str, object]:
        """Of the step kernel, by name: all but tiles, scales and bounds."""
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
            "flags_ptr": flags,
            # Not read where nothing is updated.
            "row_ptr": self._rows[1] if hyper is not None else self._scale_of,
            "hyper_ptr": self._hyper[1] if hyper is not None else self._partials,
            "scale_of_ptr": self._scale_of,
            "partial_ptr": self._partials,
            # Not read where nothing is sketched.
            "seed_ptr": self._scale_of,
            "bucket_ptr": self._partials,
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
        table[0], table[1] = self._own, addresses(grads)
        table[2] = table[1] if prevs is None else addresses(prevs)
        table[3] = table[1]
        flags = table[4].view(np.int32)[: len(grads)]
        if bufs is not None:
            buffers = addresses_of_some(bufs)
            table[3] = np.where(buffers, buffers, table[1])
            flags[buffers != 0] += _BUFFERED.value
        if copies is not None:
            flags[copies] += _COPIED.value
        flags[~(np.bitwise_or.reduce(table[:4]) & 15).astype(bool)] += _ALIGNED.value
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


def _parts(table: Tensor) -> tuple[Tensor, Tensor]:
    """Pointers, int64 (4, N), and flags, int32."""
    return table[:4], table[4].view(torch.int32)


def cut(sizes: np.ndarray, pieces: int | Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut tensors of `sizes` elements into pieces of at most so many.

    Returns:
        Whose each piece is (int32), its first element and the one behind its last (int64), in order.
    """
    size = np.broadcast_to(np.asarray(pieces, np.int64), sizes.shape)
    counts: np.ndarray = -(-sizes // size)
    owner = np.repeat(np.arange(len(sizes), dtype=np.int32), counts)
    start = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * size[owner]
    return owner, start, np.minimum(start + size[owner], sizes[owner])
