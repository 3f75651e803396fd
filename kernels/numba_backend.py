"""CPU: one parallel loop over chunks of all tensors, through a table of addresses, compiled once a dtype.

A chunk is worked off in blocks that fit the first-level cache: sum (reads g_t, g_{t-1}), update (reads g_t
again, from the cache; reads and writes the parameter), so memory is passed over once. What is done is
decided at run time by the hyperparameters and by null addresses, so that nothing is compiled twice.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic, overload
from torch import Tensor

NAME = "numba"

_CHUNK = 1 << 15  # elements: the unit of work that threads share
_BLOCK = 1 << 10  # elements: three blocks of float64 fit the first-level cache
_SERIAL = 1 << 15  # elements in all below which waking other threads costs more than they save

# The storage type that stands for a dtype in compiled code; half types travel as their bits.
_STORAGE = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.bfloat16: np.uint16,
    torch.float16: np.int16,
}
DTYPES = tuple(_STORAGE)
_NO_ADDRESSES = np.zeros(0, np.int64)


def unavailable(device: torch.device) -> str:
    """Runs on CPUs."""
    return "" if device.type == "cpu" else "it runs on CPUs only"


class Batch:
    """See :class:`oscopt.kernels.BatchProtocol`."""

    def __init__(self, params: Sequence[Tensor], layer_of: Sequence[int], num_layers: int) -> None:
        dtype = params[0].dtype
        self._tag = np.zeros(1, _STORAGE[dtype])
        self._itemsize = dtype.itemsize
        self._params = params
        sizes = np.array([p.numel() for p in params], np.int64)
        chunks = -(-sizes // _CHUNK)
        self._tensor = np.repeat(np.arange(len(params)), chunks)
        first = np.cumsum(chunks) - chunks
        self._start = (np.arange(chunks.sum()) - np.repeat(first, chunks)) * _CHUNK
        self._stop = np.minimum(self._start + _CHUNK, sizes[self._tensor])
        self._work = np.cumsum(self._stop - self._start)
        # Tensors are sorted by layer, so a layer's chunks are neighbours: [bounds[l], bounds[l + 1]).
        layer_of_chunk = np.asarray(layer_of, np.int64)[self._tensor]
        self._layer_bounds = np.searchsorted(layer_of_chunk, np.arange(num_layers + 1))
        self._partials = np.zeros((len(self._tensor), 4))
        self._shares: dict[int, np.ndarray] = {}
        self._rows: tuple[Sequence[int] | None, np.ndarray] = (None, _NO_ADDRESSES)
        self._hyper: tuple[object, np.ndarray] = (None, np.zeros((1, 6)))

    def step(self, grads, prevs, bufs, copies, rows, hyper, out) -> None:
        if self._rows[0] != rows:
            self._rows = (list(rows), np.array(rows, np.int64))
        if hyper is not None and self._hyper[0] is not hyper:
            self._hyper = (hyper, np.array(hyper, np.float64))
        of_torch = torch.get_num_threads()
        threads = 1
        if len(self._work) and self._work[-1] > _SERIAL:
            threads = min(of_torch, numba.config.NUMBA_NUM_THREADS)
        arguments = (
            _addresses(self._params) if hyper is not None else _NO_ADDRESSES,
            _addresses(grads),
            _addresses(prevs) if prevs is not None else _NO_ADDRESSES,
            _addresses(bufs) if any(b is not None for b in bufs) else _NO_ADDRESSES,
            np.array(copies, np.bool_) if copies is not None else np.zeros(0, np.bool_),
            self._rows[1],
            self._hyper[1],
            self._tensor,
            self._start,
            self._stop,
            self._share(threads),
            self._itemsize,
            self._tag,
            self._partials,
        )
        numba.set_num_threads(threads)
        _call(_step, arguments, self._params[0].dtype)
        # Starting its threads, numba sets OpenMP's number of threads, which is torch's as well.
        if torch.get_num_threads() != of_torch:
            torch.set_num_threads(of_torch)
        if prevs is not None:
            _reduce(self._partials, self._layer_bounds, out.numpy())

    def _share(self, threads: int) -> np.ndarray:
        """Chunks [share[t], share[t + 1]) are thread t's: an equal number of elements each."""
        if threads not in self._shares:
            total = self._work[-1] if len(self._work) else 0
            share = np.searchsorted(self._work, np.linspace(0, total, threads + 1), side="left")
            share[0], share[-1] = 0, len(self._work)
            self._shares[threads] = share.astype(np.int64)
        return self._shares[threads]


class SampleBatch:
    """See :class:`oscopt.kernels.sampling.SampleBatchProtocol`."""

    def __init__(self, like: Sequence[Tensor], tensor_of, start, stop, position) -> None:
        self._dtype = like[0].dtype
        self._tag = np.zeros(1, _STORAGE[self._dtype])
        self._blocks = tuple(t.numpy() for t in (tensor_of, start, stop, position))
        self._work = int((stop - start).sum())

    def step(self, grads, kept, out) -> None:
        of_torch = torch.get_num_threads()
        count = len(self._blocks[0])
        threads = 1 if self._work <= _SERIAL else min(of_torch, numba.config.NUMBA_NUM_THREADS)
        share = np.linspace(0, count, threads + 1).astype(np.int64)
        tables = (_addresses(grads), _addresses(kept), *self._blocks, share)
        numba.set_num_threads(threads)
        _call(_sample_step, (*tables, self._dtype.itemsize, self._tag, out.numpy()), self._dtype)
        if torch.get_num_threads() != of_torch:
            torch.set_num_threads(of_torch)


def _addresses(tensors: Sequence[Tensor | None]) -> np.ndarray:
    return np.array([0 if t is None else t.data_ptr() for t in tensors], np.int64)


_compiled: set = set()


def _call(kernel, arguments, dtype: torch.dtype) -> None:
    """Call `kernel`, saying so when it takes long because it is being compiled."""
    key = (kernel, dtype)
    if key in _compiled:
        kernel(*arguments)
        return
    text = "compiling oscopt's CPU kernel for %s: some seconds, once on this machine (it is cached on disk)"
    said = threading.Timer(1.0, logging.getLogger("oscopt").warning, (text, dtype))
    said.daemon = True
    said.start()
    try:
        kernel(*arguments)
    finally:
        said.cancel()
    _compiled.add(key)


# ---- compiled code ---------------------------------------------------------------------------------------

# Sums may be reordered and contracted; NaNs, infinities and signed zeros stay what they are. The update is
# spelled out with fused multiply-adds where torch has them, so that it rounds as torch.optim.SGD does.
_SUM = {"contract", "reassoc"}


@intrinsic
def _fma(typing_context, a, b, c):
    def generate(context, builder, signature, args):
        return builder.fma(*args)

    return a(a, a, a), generate


@intrinsic
def _pointer(typing_context, address, tag):
    """`address` (int64) as a pointer to elements of the array `tag`."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(tag.dtype)(address, tag), generate


@intrinsic
def _bits_to_float(typing_context, bits):
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _float_to_bits(typing_context, value):
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _half_to_float(typing_context, bits):
    def generate(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@intrinsic
def _float_to_half(typing_context, value):
    def generate(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate


def _load(x):
    """The value of a stored element, in float32 or float64."""
    raise NotImplementedError


def _store(like, value):
    """The stored element of type `like` for a value, rounded to nearest even."""
    raise NotImplementedError


@overload(_load)
def _load_overload(x):
    if x == types.uint16:
        return lambda x: _bits_to_float(np.uint32(x) << np.uint32(16))
    if x == types.int16:
        return lambda x: _half_to_float(x)
    return lambda x: x


@overload(_store)
def _store_overload(like, value):
    if like == types.uint16:

        def bfloat16(like, value):
            bits = _float_to_bits(np.float32(value))
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            return np.uint16(0x7FC0) if nan else np.uint16(rounded)

        return bfloat16
    if like == types.int16:
        return lambda like, value: _float_to_half(np.float32(value))
    return lambda like, value: value


@njit(fastmath=_SUM, nogil=True, cache=True)
def _sum(g, q):
    dot = sq_norm = diff_sq_norm = prev_sq_norm = 0.0
    for i in range(g.size):
        a = np.float64(_load(g[i]))
        b = np.float64(_load(q[i]))
        d = a - b
        dot += a * b
        sq_norm += a * a
        diff_sq_norm += d * d
        prev_sq_norm += b * b
    return dot, sq_norm, diff_sq_norm, prev_sq_norm


# One loop per form of the update: a branch inside would keep them from vectorising.


@njit(nogil=True, cache=True)
def _descend(p, g, lr, sign):
    for i in range(p.size):
        p[i] = _store(p[i], _fma(-lr, sign * _load(g[i]), _load(p[i])))


@njit(nogil=True, cache=True)
def _descend_decayed(p, g, lr, sign, weight_decay):
    for i in range(p.size):
        x = _load(p[i])
        p[i] = _store(p[i], _fma(-lr, _fma(weight_decay, x, sign * _load(g[i])), x))


@njit(nogil=True, cache=True)
def _descend_momentum(p, g, buf, lr, sign, decay, gain, weight_decay):
    for i in range(p.size):
        x = _load(p[i])
        d = sign * _load(g[i])
        if weight_decay != 0:
            d = _fma(weight_decay, x, d)
        b = _fma(gain, d, decay * _load(buf[i]))
        buf[i] = _store(buf[i], b)
        p[i] = _store(p[i], _fma(-lr, b, x))


@njit(nogil=True, cache=True)
def _descend_nesterov(p, g, buf, lr, sign, decay, gain, weight_decay, lookahead):
    for i in range(p.size):
        x = _load(p[i])
        d = sign * _load(g[i])
        if weight_decay != 0:
            d = _fma(weight_decay, x, d)
        b = _fma(gain, d, decay * _load(buf[i]))
        buf[i] = _store(buf[i], b)
        p[i] = _store(p[i], _fma(-lr, _fma(lookahead, b, d), x))


@njit(nogil=True, cache=True)
def _copy(to, source):
    for i in range(to.size):
        to[i] = source[i]


@njit(nogil=True, cache=True)
def _chunk(p, g, q, buf, copy, n, row, itemsize, tag):
    """Sum and update `n` elements at the addresses `p`, `g`, `q`, `buf`; 0 leaves its part out."""
    scalar = _load(tag[0])
    lr = scalar + type(scalar)(row[0])
    decay = scalar + type(scalar)(row[1])
    gain = scalar + type(scalar)(row[2])
    weight_decay = scalar + type(scalar)(row[3])
    lookahead = scalar + type(scalar)(row[4])
    sign = scalar + type(scalar)(row[5])
    dot = sq_norm = diff_sq_norm = prev_sq_norm = 0.0
    for start in range(0, n, _BLOCK):
        size = min(_BLOCK, n - start)
        offset = start * itemsize
        g_block = numba.carray(_pointer(g + offset, tag), size)
        if q != 0:
            q_block = numba.carray(_pointer(q + offset, tag), size)
            sums = _sum(g_block, q_block)
            dot += sums[0]
            sq_norm += sums[1]
            diff_sq_norm += sums[2]
            prev_sq_norm += sums[3]
            if copy:
                _copy(q_block, g_block)
        if p != 0:
            p_block = numba.carray(_pointer(p + offset, tag), size)
            if buf != 0:
                b_block = numba.carray(_pointer(buf + offset, tag), size)
                if lookahead != 0:
                    _descend_nesterov(
                        p_block, g_block, b_block, lr, sign, decay, gain, weight_decay, lookahead
                    )
                else:
                    _descend_momentum(p_block, g_block, b_block, lr, sign, decay, gain, weight_decay)
            elif weight_decay != 0:
                _descend_decayed(p_block, g_block, lr, sign, weight_decay)
            else:
                _descend(p_block, g_block, lr, sign)
    return dot, sq_norm, diff_sq_norm, prev_sq_norm


@njit(nogil=True, cache=True, parallel=True)
def _step(p, g, q, buf, copy, rows, hyper, tensor, start, stop, share, itemsize, tag, partials):
    for thread in prange(share.size - 1):
        for c in range(share[thread], share[thread + 1]):
            k = tensor[c]
            offset = start[c] * itemsize
            sums = _chunk(
                p[k] + offset if p.size else 0,
                g[k] + offset,
                q[k] + offset if q.size else 0,
                buf[k] + offset if buf.size and buf[k] else 0,
                copy.size > 0 and copy[k],
                stop[c] - start[c],
                hyper[rows[k]],
                itemsize,
                tag,
            )
            partials[c, 0] = sums[0]
            partials[c, 1] = sums[1]
            partials[c, 2] = sums[2]
            partials[c, 3] = sums[3]


@njit(nogil=True, cache=True, parallel=True)
def _sample_step(g, kept, tensor, start, stop, position, share, itemsize, tag, out):
    for thread in prange(share.size - 1):
        for b in range(share[thread], share[thread + 1]):
            k, n = tensor[b], stop[b] - start[b]
            g_block = numba.carray(_pointer(g[k] + start[b] * itemsize, tag), n)
            q_block = numba.carray(_pointer(kept[k] + position[b] * itemsize, tag), n)
            sums = _sum(g_block, q_block)
            out[b, 0] = sums[0]
            out[b, 1] = sums[1]
            out[b, 2] = sums[2]
            out[b, 3] = sums[3]
            _copy(q_block, g_block)


@njit(nogil=True, cache=True, error_model="numpy")
def estimate(blocks, lengths, scale, correction, row):
    """What :meth:`oscopt.kernels.sampling.SamplePlan.step` writes to `row`, in two passes over the blocks."""
    first = 0
    for layer in range(lengths.size):
        last = first + lengths[layer]
        total = np.zeros(4)
        for b in range(first, last):
            for s in range(4):
                total[s] += blocks[b, s]
        for s in range(4):
            value = total[s] * scale[layer]
            row[s, layer] = value if np.isfinite(value) else np.nan
        row[4, layer] = 0.0
        if correction[layer] != 0:
            # Deviations from the estimate itself, which the mean without one block differs from by O(1 / m).
            centre = total[0] / np.sqrt(total[1] * total[3])
            away = squares = 0.0
            for b in range(first, last):
                product = (total[1] - blocks[b, 1]) * (total[3] - blocks[b, 3])
                d = (total[0] - blocks[b, 0]) / np.sqrt(product) - centre
                away += d
                squares += d * d
            count = last - first
            row[4, layer] = np.sqrt(correction[layer] * max(squares - away * away / count, 0.0))
        first = last


@njit(nogil=True, cache=True)
def _reduce(partials, bounds, out):
    """Sum the chunks of each layer, in their order: the same bits for any number of threads."""
    for layer in range(bounds.size - 1):
        for s in range(4):
            total = 0.0
            for c in range(bounds[layer], bounds[layer + 1]):
                total += partials[c, s]
            out[s, layer] = total if np.isfinite(total) else np.nan
