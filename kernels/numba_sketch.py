"""CPU: the update and the sketch of :mod:`oscopt.kernels.sketch` in one parallel loop over chunks.

A chunk is worked off in parts: a part of the gradient is added to the buckets, and to the sum of squares,
then the parameter is updated with it, which is in the first-level cache by then. There are twice as many
buckets as the sketch has, so that a rotated run need not wrap around; the halves are added up in the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from torch import Tensor

from . import addresses
from .numba_backend import (
    _SERIAL,
    _STORAGE,
    _SUM,
    _addresses_of_some,
    _call,
    _descend,
    _descend_momentum,
    _load,
    _pointer,
    _reduce,
)
from .sketch import BUCKETS, FOLD, GOLDEN, ODD, ODDER, OFFSETS, SUMS, WHOLE, chunk_size, kept_dtype, kept_size

_PART = 256  # elements: more, and the memory waits for the arithmetic


class Batch:
    """See :class:`oscopt.kernels.BatchProtocol`."""

    def __init__(self, params: Sequence[Tensor], layer_of, num_layers, scale_of, seeds) -> None:
        dtype = params[0].dtype
        self._dtype = dtype
        self._tag, self._kept_tag = (np.zeros(1, _STORAGE[d]) for d in (dtype, kept_dtype(dtype)))
        self._own = addresses(params)
        self._params = params
        sizes = [p.numel() for p in params]
        layer_of, seeds = np.array(layer_of, np.int64), np.array(seeds, np.uint32)
        self._sizes, kept_sizes = np.array(sizes, np.int64), np.array([kept_size(n) for n in sizes], np.int64)
        self._chunk = np.array([chunk_size(n) for n in sizes], np.int64)
        chunks = -(-self._sizes // self._chunk)
        self._tensor = np.repeat(np.arange(len(params)), chunks)
        self._start = np.arange(chunks.sum()) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        self._start *= self._chunk[self._tensor]
        lengths = np.minimum(self._chunk[self._tensor], self._sizes[self._tensor] - self._start)
        self._work = np.cumsum(lengths)
        self._bounds = np.searchsorted(layer_of[self._tensor], np.arange(num_layers + 1))
        self._measured = layer_of >= 0
        self._partials = np.zeros((len(self._tensor), len(SUMS)))
        self._scale_of = np.array(scale_of, np.int64)
        self._seeds = seeds
        self._fold = kept_sizes, seeds, np.searchsorted(layer_of, np.arange(num_layers + 1))

    def prepare_capture(self) -> None:
        """Nothing is needed."""

    def step(self, grads, prevs, bufs, copies, rows, hyper, out, scale=None) -> None:
        total = int(self._work[-1]) if len(self._work) else 0
        threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS) if total > _SERIAL else 1
        share = np.searchsorted(self._work, np.linspace(0, total, threads + 1))
        share[0], share[-1] = 0, len(self._work)
        nothing = np.zeros(len(grads), np.int64)
        arguments = (
            self._own if hyper is not None else nothing,
            addresses(grads),
            nothing if prevs is None else np.where(self._measured, addresses(prevs), 0),
            nothing if bufs is None else _addresses_of_some(bufs),
            np.array(rows, np.int64),
            np.array(hyper or [(0.0,) * 6], np.float64),
            np.zeros(0) if scale is None else scale.numpy(),
            self._scale_of,
            self._tensor,
            self._start,
            self._chunk,
            self._sizes,
            self._seeds,
            share,
            self._tag,
            self._kept_tag,
            self._partials,
            self._bounds,
            np.zeros((0, 0)) if prevs is None else out.numpy(),
        )
        self._run(_step, arguments, threads)

    def fold(self, kept, out) -> None:
        """See :meth:`oscopt.kernels.Plan.fold`."""
        addressed = np.where(self._measured, addresses(kept), 0)
        self._run(_fold, (addressed, *self._fold, self._kept_tag, out.numpy()), torch.get_num_threads())

    def _run(self, kernel, arguments, threads: int) -> None:
        of_torch = torch.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        _call(kernel, arguments, self._dtype)
        # Starting its threads, numba sets OpenMP's number of threads, which is torch's as well.
        if torch.get_num_threads() != of_torch:
            torch.set_num_threads(of_torch)


# ---- compiled code ---------------------------------------------------------------------------------------


@intrinsic
def _hashed(typing_context, index, seed):
    """:func:`oscopt.kernels.sketch.hashed`; numba would make 64 bits of each sum and product of uint32."""

    def generate(context, builder, signature, args):
        word = ir.IntType(32)
        x = builder.add(builder.mul(builder.trunc(args[0], word), ir.Constant(word, GOLDEN)), args[1])
        for shift, odd in ((16, ODD), (15, ODDER)):
            x = builder.xor(x, builder.lshr(x, ir.Constant(word, shift)))
            x = builder.mul(x, ir.Constant(word, odd))
        return builder.xor(x, builder.lshr(x, ir.Constant(word, 16)))

    return types.uint32(types.int64, types.uint32), generate


@intrinsic
def _add_word(typing_context, g, buckets, bits, squares, tag, kept_tag):
    """Add 32 elements at address `g`, with signs from `bits`, to the buckets at address `buckets`; and their
    squares to the 8 float64s at address `squares`.

    Spelled out in vectors of 8: of such a loop the compiler makes scalar code, several times as slow.
    """

    def generate(context, builder, signature, args):
        g, buckets, bits, squares, _, _ = args
        stored, kept = (signature.args[i].dtype for i in (4, 5))
        double = ir.VectorType(ir.DoubleType(), 8)
        fma = builder.module.declare_intrinsic("llvm.fma.v8f64", (), ir.FunctionType(double, [double] * 3))
        total = ir.Constant(double, [0.0] * 8)
        raw = ir.VectorType(context.get_data_type(stored), 8)
        value = ir.VectorType(context.get_data_type(kept), 8)
        word = ir.VectorType(ir.IntType(32), 8)
        spread = builder.insert_element(ir.Constant(word, ir.Undefined), bits, ir.Constant(ir.IntType(32), 0))
        spread = builder.shuffle_vector(spread, spread, ir.Constant(word, [0] * 8))
        for first in range(0, 32, 8):

            def at(address, kind, size, first=first):
                offset = ir.Constant(ir.IntType(64), first * size)
                return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

            x = builder.load(at(g, raw, stored.bitwidth // 8), align=stored.bitwidth // 8)
            if stored == types.uint16:
                x = builder.bitcast(builder.shl(builder.zext(x, word), ir.Constant(word, [16] * 8)), value)
            elif stored == types.int16:
                x = builder.fpext(builder.bitcast(x, ir.VectorType(ir.HalfType(), 8)), value)
            wide = x if kept == types.float64 else builder.fpext(x, double)
            total = builder.call(fma, (wide, wide, total))
            sign = builder.shl(spread, ir.Constant(word, list(range(first, first + 8))))
            sign = builder.and_(sign, ir.Constant(word, [1 << 31] * 8))
            if kept == types.float64:
                wide = ir.VectorType(ir.IntType(64), 8)
                sign = builder.shl(builder.zext(sign, wide), ir.Constant(wide, [32] * 8))
            x = builder.bitcast(builder.xor(builder.bitcast(x, sign.type), sign), value)
            place, size = at(buckets, value, kept.bitwidth // 8), kept.bitwidth // 8
            builder.store(builder.fadd(builder.load(place, align=size), x), place, align=size)
        place = builder.inttoptr(squares, double.as_pointer())
        builder.store(builder.fadd(builder.load(place, align=8), total), place, align=8)
        return context.get_dummy_value()

    return types.void(g, buckets, types.uint32, squares, tag, kept_tag), generate


@intrinsic
def _flipped(typing_context, value, bits, place):
    """`value` with the sign changed if bit number `place` of `bits`, from the top one down, is set."""

    def generate(context, builder, signature, args):
        word = ir.IntType(signature.return_type.bitwidth)
        shifted = builder.shl(args[1], builder.trunc(args[2], ir.IntType(32)))
        sign = builder.and_(shifted, ir.Constant(ir.IntType(32), 1 << 31))
        if word.width == 64:
            sign = builder.shl(builder.zext(sign, word), ir.Constant(word, 32))
        return builder.bitcast(builder.xor(builder.bitcast(args[0], word), sign), args[0].type)

    return value(value, types.uint32, types.int64), generate


@njit(fastmath=_SUM, nogil=True)
def _square(g, size):
    total = 0.0
    for i in range(size):
        a = np.float64(_load(g[i]))
        total += a * a
    return total


@njit(nogil=True)
def _add(g, buckets, first, seed, squares, tag, kept_tag):
    """Add elements with random signs to as many buckets, and their squares to 8 `squares`.

    `first`: the number of the first of them, a multiple of 32 unless they are fewer.
    """
    words = g.size // 32
    for i in range(0, 32 * words, 32):
        place = buckets.ctypes.data + i * kept_tag.itemsize
        bits = _hashed((first + i) // 32, seed)
        _add_word(g.ctypes.data + i * tag.itemsize, place, bits, squares.ctypes.data, tag, kept_tag)
    bits = _hashed(first // 32 + words, seed)
    for i in range(32 * words, g.size):
        value = _load(g[i])
        buckets[i] += _flipped(value, bits, (first + i) % 32)
        squares[0] += np.float64(value) * np.float64(value)


@njit(nogil=True)
def _offset(first, seed, buckets):
    """By how much the run that begins at element `first` is rotated."""
    return np.int64(_hashed(first // buckets, seed ^ np.uint32(OFFSETS))) % buckets


@njit(fastmath=_SUM, nogil=True)
def _compare(new, old, stretch):
    """Dot, squared difference and squared norm of `new` times `stretch` and `old`."""
    dot = diff_sq_norm = prev_sq_norm = 0.0
    for i in range(new.size):
        a, b = np.float64(_load(new[i])) * stretch, np.float64(old[i])
        dot += a * b
        diff_sq_norm += (a - b) * (a - b)
        prev_sq_norm += b * b
    return dot, diff_sq_norm, prev_sq_norm


@njit(nogil=True)
def _keep(new, old, stretch):
    for i in range(new.size):
        old[i] = _load(new[i]) * stretch


@njit(nogil=True)
def _descend_all(p, g, m, size, lr, decay, gain, weight_decay, lookahead, sign):
    for i in range(size):
        _descend(p, m, i, sign * _load(g[i]), lr, decay, gain, weight_decay, lookahead)


@njit(nogil=True)
def _descend_all_momentum(p, g, m, size, lr, decay, gain, weight_decay, lookahead, sign):
    for i in range(size):
        _descend_momentum(p, m, i, sign * _load(g[i]), lr, decay, gain, weight_decay, lookahead)


@njit(nogil=True, cache=True, parallel=True)
def _step(
    p,
    g,
    q,
    buf,
    rows,
    hyper,
    scale,
    scale_of,
    tensor,
    start,
    chunk,
    sizes,
    seeds,
    share,
    tag,
    kept_tag,
    partials,
    bounds,
    out,
):
    zero = _load(tag[0])
    for thread in prange(share.size - 1):
        buckets = np.empty(2 * BUCKETS, kept_tag.dtype)
        squares = np.empty(8)
        for c in range(share[thread], share[thread + 1]):
            k = tensor[c]
            row = hyper[rows[k]]
            lr = zero + type(zero)(row[0] * (scale[scale_of[k]] if scale.size and scale_of[k] >= 0 else 1.0))
            decay = zero + type(zero)(row[1])
            gain = zero + type(zero)(row[2])
            weight_decay = zero + type(zero)(row[3])
            lookahead = zero + type(zero)(row[4])
            sign = zero + type(zero)(row[5])
            stop = min(start[c] + chunk[k], sizes[k])
            whole = sizes[k] <= WHOLE
            kept = q[k] + (0 if whole else start[c] // chunk[k] * BUCKETS * kept_tag.itemsize)
            sq_norm = dot = diff_sq_norm = prev_sq_norm = variance = 0.0
            offset = 0
            buckets[:] = 0
            squares[:] = 0
            for first in range(start[c], stop, _PART):
                size = min(_PART, stop - first)
                y = numba.carray(_pointer(g[k] + first * tag.itemsize, tag), size)
                if q[k] and whole:
                    old = numba.carray(_pointer(kept + first * kept_tag.itemsize, kept_tag), size)
                    sq_norm += _square(y, size)
                    sums = _compare(y, old, 1.0)
                    dot += sums[0]
                    diff_sq_norm += sums[1]
                    prev_sq_norm += sums[2]
                    _keep(y, old, zero + 1)
                elif q[k]:
                    if first % BUCKETS == 0:
                        offset = _offset(first, seeds[k], BUCKETS)
                    place = buckets[offset + first % BUCKETS :]
                    _add(y, place, first, seeds[k], squares, tag, kept_tag)
                if p[k]:
                    x = numba.carray(_pointer(p[k] + first * tag.itemsize, tag), size)
                    m = numba.carray(_pointer(buf[k] + first * tag.itemsize, tag), size)
                    if buf[k]:
                        _descend_all_momentum(x, y, m, size, lr, decay, gain, weight_decay, lookahead, sign)
                    else:
                        _descend_all(x, y, m, size, lr, decay, gain, weight_decay, lookahead, sign)
            if q[k] and not whole:
                new, old = buckets[:BUCKETS], numba.carray(_pointer(kept, kept_tag), BUCKETS)
                new += buckets[BUCKETS:]
                sq_norm = squares.sum()
                stretch = np.sqrt(sq_norm / _square(new, BUCKETS)) if sq_norm != 0 else 0.0
                dot, diff_sq_norm, prev_sq_norm = _compare(new, old, stretch)
                product = sq_norm * prev_sq_norm
                rest = 1 - dot * dot / product if product != 0 else 0.0
                variance = product * rest * rest / BUCKETS
                dot *= 1 + rest / (2 * BUCKETS)
                _keep(new, old, zero + type(zero)(stretch))
            partials[c, 0] = dot
            partials[c, 1] = sq_norm
            partials[c, 2] = diff_sq_norm
            partials[c, 3] = prev_sq_norm
            partials[c, 4] = variance
    if out.size:
        _reduce(partials, bounds, out)


@njit(nogil=True, cache=True, parallel=True)
def _fold(kept, sizes, seeds, bounds, tag, out):
    count = out.shape[1]
    for layer in prange(out.shape[0]):
        buckets, squares = np.zeros(2 * count, tag.dtype), np.zeros(8)
        for k in range(bounds[layer], bounds[layer + 1]):
            seed = seeds[k] ^ np.uint32(FOLD)
            for first in range(0, sizes[k], count):
                size = min(count, sizes[k] - first)
                x = numba.carray(_pointer(kept[k] + first * tag.itemsize, tag), size)
                _add(x, buckets[_offset(first, seed, count) :], first, seed, squares, tag, tag)
        for i in range(count):
            out[layer, i] = buckets[i] + buckets[count + i]
