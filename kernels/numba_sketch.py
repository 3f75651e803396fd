"""CPU: the update and the sketch of :mod:`oscopt.kernels.sketch` in one parallel loop over chunks.

32 elements of a gradient at a time are added to the buckets and to the sums, then the parameter is updated
with them. There are twice as many buckets as the sketch has, so that a rotated run need not wrap around; the
halves are added up in the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic, models, register_model
from torch import Tensor

from . import addresses, numba_backend
from .numba_backend import (
    _LANES,
    _NO_ADDRESSES,
    _NO_ENTRIES,
    _SERIAL,
    _STORAGE,
    FORM,
    _addresses_of_some,
    _call,
    _descend,
    _descend_bounded,
    _descend_momentum,
    _fma,
    _itemsize,
    _load,
    _multiply,
    _prefetch,
    _reduce,
    _scalar,
    _scalars,
    _splat,
    _store,
    _subtract,
    _total,
    _wide,
    _zeros,
)
from .sketch import BUCKETS, FOLD, GOLDEN, ODD, ODDER, OFFSETS, SUMS, chunk_size, kept_dtype

_WORD = 4 * _LANES  # elements that are sketched, then updated


class Batch(numba_backend.Batch):
    """See :class:`oscopt.kernels.sketch.Batch`."""

    def __init__(
        self, params: Sequence[Tensor], layer_of, num_layers, scale_of, seeds, align: bool = True
    ) -> None:
        super().__init__(params, layer_of, num_layers, scale_of)
        self._align = align
        self._kept_tag = np.zeros(1, _STORAGE[kept_dtype(params[0].dtype)])
        self._seeds = np.array(seeds, np.uint32)
        self._first = np.searchsorted(self._tensor, self._tensor)  # of its tensor's chunks
        self._sketch_partials = np.zeros((len(self._tensor), len(SUMS)))

    def _chunk_sizes(self, sizes: np.ndarray) -> np.ndarray:
        return np.array([chunk_size(size) for size in sizes.tolist()], np.int64)

    def step(self, grads, prevs, bufs, copies, rows, hyper, out, scale=None, bound=None) -> None:
        if prevs is None:
            super().step(grads, None, bufs, None, rows, hyper, out, scale, bound)
            return
        of_torch = torch.get_num_threads()
        threads = 1
        if self._work[-1] > _SERIAL:
            threads = min(of_torch, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        arguments = (
            self._own if hyper is not None else _NO_ADDRESSES,
            addresses(grads),
            addresses(prevs),
            _addresses_of_some(bufs) if bufs is not None else _NO_ADDRESSES,
            np.array(rows, np.int64),
            np.array(hyper if hyper is not None else [[0.0] * 6], np.float64),
            scale.numpy() if scale is not None else _NO_ENTRIES,
            bound.numpy() if bound is not None else _NO_ENTRIES,
            self._scale_of,
            self._tensor,
            self._start,
            self._stop,
            self._first,
            self._seeds,
            self._share(threads),
            FORM.ahead,
            self._align,
            self._tag,
            self._kept_tag,
            self._sketch_partials,
            self._layer_bounds,
            out.numpy(),
        )
        numba.set_num_threads(threads)
        _call(_step, arguments, self._params[0].dtype)
        # Starting its threads, numba sets OpenMP's number of threads, which is torch's as well.
        if torch.get_num_threads() != of_torch:
            torch.set_num_threads(of_torch)


def fold(
    kept: Sequence[Tensor], layer_of: Sequence[int], seeds: Sequence[int], out: Tensor, cache: dict
) -> None:
    """See :func:`oscopt.kernels.sketch.fold`."""
    dtype = kept[0].dtype
    sizes, bounds = np.array([x.numel() for x in kept], np.int64), np.arange(len(out) + 1)
    bounds = np.searchsorted(np.array(layer_of, np.int64), bounds)
    tag, kept_tag = (np.zeros(1, _STORAGE[d]) for d in (dtype, kept_dtype(dtype)))
    arguments = (addresses(kept), sizes, np.array(seeds, np.uint32), bounds, tag, kept_tag, out.numpy())
    _call(_fold, arguments, dtype)


# ---- compiled code ---------------------------------------------------------------------------------------


class _Bits(types.Type):
    """`lanes` words of 32 bits in a register."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(f"Bits({lanes})")


@register_model(_Bits)
class _BitsModel(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.IntType(32), kind.lanes))


@intrinsic(prefer_literal=True)
def _hashed(typing_context, index, seed, lanes):
    """:func:`oscopt.kernels.sketch.hashed` of `index` and the numbers after it, one a lane."""

    def generate(context, builder, signature, args):
        count = signature.args[2].literal_value
        vector = ir.VectorType(ir.IntType(32), count)

        def constant(value):
            return ir.Constant(vector, [value] * count)

        index = _splat(builder, builder.trunc(args[0], ir.IntType(32)), vector)
        x = builder.mul(builder.add(index, ir.Constant(vector, list(range(count)))), constant(GOLDEN))
        x = builder.add(x, _splat(builder, args[1], vector))
        for shift, odd in ((16, ODD), (15, ODDER)):
            x = builder.mul(builder.xor(x, builder.lshr(x, constant(shift))), constant(odd))
        return builder.xor(x, builder.lshr(x, constant(16)))

    return _Bits(lanes.literal_value)(types.int64, types.uint32, lanes), generate


@intrinsic
def _first_lane(typing_context, bits):
    def generate(context, builder, signature, args):
        return builder.extract_element(args[0], ir.Constant(ir.IntType(32), 0))

    return types.uint32(bits), generate


@intrinsic
def _shifted(typing_context, bits, count):
    """Each word `count` bits to the left."""

    def generate(context, builder, signature, args):
        return builder.shl(args[0], _splat(builder, builder.trunc(args[1], ir.IntType(32)), args[0].type))

    return bits(bits, types.int64), generate


@intrinsic
def _flipped(typing_context, values, bits):
    """`values`, the sign changed where the top bit is set."""

    def generate(context, builder, signature, args):
        count, width = values.lanes, values.dtype.bitwidth
        sign = builder.and_(args[1], ir.Constant(args[1].type, [1 << 31] * count))
        if width == 64:
            wide = ir.VectorType(ir.IntType(64), count)
            sign = builder.shl(builder.zext(sign, wide), ir.Constant(wide, [32] * count))
        return builder.bitcast(builder.xor(builder.bitcast(args[0], sign.type), sign), args[0].type)

    return values(values, bits), generate


@intrinsic
def _plus(typing_context, a, b):
    return a(a, b), lambda context, builder, signature, args: builder.fadd(*args)


@njit(nogil=True)
def _offset(first, seed, buckets):
    """By how much the run that begins at element `first` is rotated."""
    return np.int64(_first_lane(_hashed(first // buckets, seed ^ np.uint32(OFFSETS), 1))) % buckets


def _run(momentum, lanes):
    """`n` elements from number `first` of their tensor on, within one run: a whole number of words.

    They are added to the buckets at the address `place`; their squares are summed, and with a momentum buffer
    and `align` their products with it, and its squares.
    """
    update, update_bounded = (_descend_momentum if momentum else _descend)(lanes), _descend_bounded(lanes)
    vectors = _WORD // lanes if lanes > 1 else 1
    word = vectors * lanes

    @njit(nogil=True)
    def run(p, g, buf, place, first, n, seed, ahead, updated, align, row, tag, kept_tag):
        size, kept_size = _itemsize(tag), _itemsize(kept_tag)
        sq_norm, alignment, momentum_sq_norm = _zeros(lanes), _zeros(lanes), _zeros(lanes)
        bounded = momentum and row[6] < np.inf
        i = 0
        while i < n:
            at = first + i
            bits = _shifted(_hashed((at >> 8 << 3) + (at & 7), seed, lanes), at >> 3 & 31)
            stop = min(n, i + 256 - (at & 255)) if lanes > 1 else i + 1
            while i < stop:
                if ahead:
                    line = i * size + ahead
                    last = line + word * size
                    while line < last:
                        _prefetch(g + line)
                        if momentum:
                            _prefetch(buf + line)
                        if updated:
                            _prefetch(p + line)
                        line += 64
                for j in range(vectors):
                    at = (i + j * lanes) * size
                    bucket = place + (i + j * lanes) * kept_size
                    values = _load(g + at, tag, lanes)
                    _store(bucket, kept_tag, _plus(_load(bucket, kept_tag, lanes), _flipped(values, bits)))
                    bits = _shifted(bits, 1)
                    a = _wide(values)
                    sq_norm = _fma(a, a, sq_norm)
                if momentum and align:
                    for j in range(vectors):
                        at = (i + j * lanes) * size
                        a, b = _wide(_load(g + at, tag, lanes)), _wide(_load(buf + at, tag, lanes))
                        alignment = _fma(a, b, alignment)
                        momentum_sq_norm = _fma(b, b, momentum_sq_norm)
                if updated and not bounded:
                    for j in range(vectors):
                        at = (i + j * lanes) * size
                        update(p + at, buf + at, _load(g + at, tag, lanes), row, tag)
                if momentum and updated and bounded:
                    for j in range(vectors):
                        at = (i + j * lanes) * size
                        update_bounded(p + at, buf + at, _load(g + at, tag, lanes), row, tag)
                i += word
        return _total(sq_norm), _total(alignment), _total(momentum_sq_norm)

    return run


def _runs(momentum):
    """Elements from number `first` on, in runs of `buckets`, each rotated; sums as of :func:`_run`."""
    wide, narrow = _run(momentum, _LANES), _run(momentum, 1)

    @njit(nogil=True)
    def runs(p, g, buf, twice, buckets, first, n, seed, ahead, align, row, tag, kept_tag):
        sq_norm = alignment = momentum_sq_norm = 0.0
        size, kept_size, updated = _itemsize(tag), _itemsize(kept_tag), p != 0
        for start in range(0, n, buckets):
            place = twice + _offset(first + start, seed, buckets) * kept_size
            count = min(n - start, buckets)
            words = count - count % _WORD
            at, number = start * size, first + start
            given = (updated, align, row, tag, kept_tag)
            a = wide(p + at, g + at, buf + at, place, number, words, seed, ahead, *given)
            place += words * kept_size
            at, number, count = at + words * size, number + words, count - words
            b = narrow(p + at, g + at, buf + at, place, number, count, seed, 0, *given)
            sq_norm += a[0] + b[0]
            alignment += a[1] + b[1]
            momentum_sq_norm += a[2] + b[2]
        return sq_norm, alignment, momentum_sq_norm

    return runs


_plain, _momentum = _runs(momentum=False), _runs(momentum=True)


@njit(nogil=True)
def _halves(twice, count, kept_tag):
    """Add the second half of the buckets to the first; its squared norm."""
    sq_norm = _zeros(_LANES)
    size = _itemsize(kept_tag)
    for i in range(0, count * size, _LANES * size):
        both = _plus(_load(twice + i, kept_tag, _LANES), _load(twice + count * size + i, kept_tag, _LANES))
        _store(twice + i, kept_tag, both)
        sq_norm = _fma(_wide(both), _wide(both), sq_norm)
    return _total(sq_norm)


@njit(nogil=True)
def _keep(new, old, stretch, kept_tag):
    """Dot, squared difference and squared norm of `stretch` times the buckets at `new`, and those at `old`;
    which are overwritten."""
    dot, diff_sq_norm, prev_sq_norm = _zeros(_LANES), _zeros(_LANES), _zeros(_LANES)
    size = _itemsize(kept_tag)
    factor = _scalar(stretch, kept_tag)
    for i in range(0, BUCKETS * size, _LANES * size):
        values = _load(new + i, kept_tag, _LANES)
        a, b = _multiply(stretch, _wide(values)), _wide(_load(old + i, kept_tag, _LANES))
        d = _subtract(a, b)
        dot = _fma(a, b, dot)
        diff_sq_norm = _fma(d, d, diff_sq_norm)
        prev_sq_norm = _fma(b, b, prev_sq_norm)
        _store(old + i, kept_tag, _multiply(factor, values))
    return _total(dot), _total(diff_sq_norm), _total(prev_sq_norm)


@njit(nogil=True, cache=True)
def _chunk(p, g, kept, buf, twice, first, n, seed, ahead, align, row, scale, bound, tag, kept_tag):
    """Sketch and update `n` elements from number `first` on, at the addresses `p`, `g`, `buf` (0: none)."""
    scalars = _scalars(row, scale, bound, buf != 0, tag)
    if buf == 0:
        sums = _plain(p, g, buf, twice, BUCKETS, first, n, seed, ahead, align, scalars, tag, kept_tag)
    else:
        sums = _momentum(p, g, buf, twice, BUCKETS, first, n, seed, ahead, align, scalars, tag, kept_tag)
    sq_norm, alignment, momentum_sq_norm = sums
    buckets_sq_norm = _halves(twice, BUCKETS, kept_tag)
    stretch = np.sqrt(sq_norm / buckets_sq_norm) if sq_norm != 0 else 0.0
    dot, diff_sq_norm, prev_sq_norm = _keep(twice, kept, stretch, kept_tag)
    product = sq_norm * prev_sq_norm
    rest = 1 - dot * dot / product if product != 0 else 0.0
    dot *= 1 + rest / (2 * BUCKETS)
    runs = (n + BUCKETS - 1) // BUCKETS
    variance = product * rest * rest * (1 - 1 / runs) / BUCKETS
    sign = row[5] if p != 0 else 1.0
    return dot, sq_norm, diff_sq_norm, prev_sq_norm, sign * alignment, momentum_sq_norm, variance


@njit(nogil=True, cache=True, parallel=True)
def _step(
    p,
    g,
    kept,
    buf,
    rows,
    hyper,
    scale,
    bound,
    scale_of,
    tensor,
    start,
    stop,
    first_chunk,
    seeds,
    share,
    ahead,
    align,
    tag,
    kept_tag,
    partials,
    bounds,
    out,
):
    itemsize = _itemsize(tag)
    for thread in prange(share.size - 1):
        twice = np.empty(2 * BUCKETS, kept_tag.dtype)
        for c in range(share[thread], share[thread + 1]):
            k = tensor[c]
            offset = start[c] * itemsize
            entry = scale_of[k]
            twice[:] = 0
            sums = _chunk(
                p[k] + offset if p.size else 0,
                g[k] + offset,
                kept[k] + (c - first_chunk[c]) * BUCKETS * _itemsize(kept_tag),
                buf[k] + offset if buf.size and buf[k] else 0,
                twice.ctypes.data,
                start[c],
                stop[c] - start[c],
                seeds[k],
                ahead,
                align,
                hyper[rows[k] if p.size else 0],
                scale[entry] if scale.size and entry >= 0 else 1.0,
                bound[entry] if bound.size and entry >= 0 else np.inf,
                tag,
                kept_tag,
            )
            for s in range(7):
                partials[c, s] = sums[s]
    _reduce(partials, bounds, True, align and buf.size > 0, out)
    for layer in range(out.shape[1]):  # no matter whether there is a momentum
        total = 0.0
        for c in range(bounds[layer], bounds[layer + 1]):
            total += partials[c, 6]
        out[6, layer] = total if np.isfinite(total) else np.nan


@njit(nogil=True, cache=True, parallel=True)
def _fold(kept, sizes, seeds, bounds, tag, kept_tag, out):
    count = out.shape[1]
    for layer in prange(out.shape[0]):
        twice = np.zeros(2 * count, kept_tag.dtype)
        none = _scalars(np.zeros(6), 1.0, np.inf, False, tag)
        for k in range(bounds[layer], bounds[layer + 1]):
            seed = seeds[k] ^ np.uint32(FOLD)
            _plain(0, kept[k], 0, twice.ctypes.data, count, 0, sizes[k], seed, 0, False, none, tag, kept_tag)
        for i in range(count):
            out[layer, i] += twice[i] + twice[count + i]
