"""CPU: the update and the sketch of :mod:`oscopt.kernels.sketch` in one parallel loop over chunks.

A *word*, 32 elements of a gradient, is added to the buckets and to the sums, then the parameter is updated
with it. There are twice as many buckets as the sketch has, so that a rotated run need not wrap around; the
halves are added up in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic
from torch import Tensor

from . import addresses, numba_backend
from .numba_backend import (
    FORM,
    Arrays,
    Output,
    Rates,
    Rule,
    Tables,
    call,
    compiled,
    entry,
    inlined,
    locate,
    moved,
    prefetching,
    reduce,
    rule_for,
    threads_for,
    update_elements,
    updating,
)
from .numba_vectors import (
    LANES,
    Vector,
    add,
    constant,
    fma,
    ir_type,
    itemsize,
    load,
    multiply,
    scalar,
    splat,
    store,
    subtract,
    summed,
    tag_of,
    wide,
    zeros,
)
from .sketch import BUCKETS, FOLD, GOLDEN, ODD, ODDER, OFFSETS, SUMS, chunk_size, kept_dtype

_WORD = 4 * LANES  # elements
_BLOCK = 32 * LANES  # elements that share a vector of hashes, a bit each


class Batch(numba_backend.Batch):
    """See :class:`oscopt.kernels.sketch.Batch`."""

    def __init__(
        self, params: Sequence[Tensor], layer_of, num_layers, scale_of, seeds, align: bool = True
    ) -> None:
        super().__init__(params, layer_of, num_layers, scale_of)
        self._align = align
        self._kept_tag = tag_of(kept_dtype(params[0].dtype))
        self._chunks["seed"] = np.array(seeds, np.int64)[self._chunks["tensor"]]
        self._sketch_partials = np.zeros((len(self._chunks), len(SUMS)))

    def _chunk_sizes(self, sizes: np.ndarray) -> np.ndarray:
        return np.array([chunk_size(size) for size in sizes.tolist()], np.int64)

    def step(self, grads, prevs, bufs, copies, rows, hyper, out, scale=None, bound=None) -> None:
        if prevs is None:
            super().step(grads, None, bufs, None, rows, hyper, out, scale, bound)
            return
        work = self._work(grads, prevs, bufs, None, rows, hyper, scale, bound)
        sums = self._sums(self._sketch_partials, True, bufs is not None and self._align, out)
        self._run(_step, *work, (FORM.ahead, self._align), self._tag, self._kept_tag, sums)


def fold(
    kept: Sequence[Tensor], layer_of: Sequence[int], seeds: Sequence[int], out: Tensor, cache: dict
) -> None:
    """See :func:`oscopt.kernels.sketch.fold`."""
    dtype = kept[0].dtype
    sizes = np.array([x.numel() for x in kept], np.int64)
    bounds = np.searchsorted(np.array(layer_of, np.int64), np.arange(len(out) + 1))
    tensors = addresses(kept), sizes, np.array(seeds, np.int64)
    arguments = tensors, bounds, tag_of(dtype), tag_of(kept_dtype(dtype)), out.numpy()
    call(_fold, arguments, dtype, threads_for(sizes.sum()))


# ---- compiled code ---------------------------------------------------------------------------------------


class Map(NamedTuple):
    """One map S, and how elements are passed over."""

    seed: int
    buckets: int
    ahead: int
    align: bool
    """Whether products with the momentum are summed."""


@intrinsic(prefer_literal=True)
def _hashed(typing_context, index, seed, lanes):
    """:func:`oscopt.kernels.sketch.hashed` of `index` and the numbers after it, one a lane."""
    vector = Vector(types.uint32, lanes.literal_value)

    def generate(context, builder, signature, args):
        kind, word = ir_type(vector), ir.IntType(32)
        index, seed = (splat(builder, builder.trunc(value, word), kind) for value in args[:2])
        index = builder.add(index, ir.Constant(kind, list(range(vector.lanes))))
        x = builder.add(builder.mul(index, constant(kind, GOLDEN)), seed)
        for shift, odd in ((16, ODD), (15, ODDER)):
            x = builder.mul(builder.xor(x, builder.lshr(x, constant(kind, shift))), constant(kind, odd))
        return builder.xor(x, builder.lshr(x, constant(kind, 16)))

    return vector(types.int64, types.int64, lanes), generate


@intrinsic
def _first_lane(typing_context, bits):
    def generate(context, builder, signature, args):
        return builder.zext(builder.extract_element(args[0], ir.Constant(ir.IntType(32), 0)), ir.IntType(64))

    return types.int64(bits), generate


@intrinsic
def _shifted(typing_context, bits, count):
    """Each word `count` bits to the left."""

    def generate(context, builder, signature, args):
        return builder.shl(args[0], splat(builder, builder.trunc(args[1], ir.IntType(32)), args[0].type))

    return bits(bits, types.int64), generate


@intrinsic
def _flipped(typing_context, values, bits):
    """`values`, the sign changed where the top bit is set."""

    def generate(context, builder, signature, args):
        sign = builder.and_(args[1], constant(args[1].type, 1 << 31))
        if values.dtype.bitwidth == 64:
            double = ir.VectorType(ir.IntType(64), values.lanes)
            sign = builder.shl(builder.zext(sign, double), constant(double, 32))
        return builder.bitcast(builder.xor(builder.bitcast(args[0], sign.type), sign), args[0].type)

    return values(values, bits), generate


@inlined
def _add_to_bucket(bucket, values, bits, kept_tag):
    store(bucket, kept_tag, add(load(bucket, kept_tag, values), _flipped(values, bits)))


def _sketching(momentum):
    """Whole words, `n` bytes from element number `first` of their tensor on, within one run.

    They are added to the buckets at the address `bucket`; their squares are summed, and where there is a
    momentum, and with `align`, their products with it, and its squares.
    """
    prefetch_part, update_part = prefetching(momentum=momentum), updating(momentum=momentum)

    @compiled
    def sketch(at, bucket, first, n, map_, rule, tag, kept_tag):
        sq_norm, alignment, momentum_sq_norm = zeros(LANES), zeros(LANES), zeros(LANES)
        size, vector, word = itemsize(tag), LANES * itemsize(tag), _WORD * itemsize(tag)
        i = np.int64(0)
        while i < n:
            number = first + i // size
            place = number % _BLOCK
            bits = _shifted(_hashed(number // _BLOCK * LANES, map_.seed, LANES), place // LANES)
            end = min(n, i + (_BLOCK - place) * size)
            while i < end:
                if map_.ahead:
                    prefetch_part(at, i + map_.ahead, word)
                for j in range(_WORD // LANES):
                    values = load(at.grad + i + j * vector, tag, LANES)
                    _add_to_bucket(bucket + j * LANES * itemsize(kept_tag), values, bits, kept_tag)
                    bits = _shifted(bits, 1)
                    sq_norm = fma(wide(values), wide(values), sq_norm)
                bucket += _WORD * itemsize(kept_tag)
                if momentum and map_.align:
                    for j in range(_WORD // LANES):
                        at_j = i + j * vector
                        a, b = wide(load(at.grad + at_j, tag, LANES)), wide(load(at.buf + at_j, tag, LANES))
                        alignment = fma(a, b, alignment)
                        momentum_sq_norm = fma(b, b, momentum_sq_norm)
                if at.param:
                    update_part(at, i, word, rule, None, tag)  # adds to no sums
                i += word
        return summed(sq_norm), summed(alignment), summed(momentum_sq_norm)

    return sketch


_plain, _momentum = _sketching(False), _sketching(True)


@compiled
def _words(at, bucket, first, n, map_, rule, tag, kept_tag):
    if at.buf:
        return _momentum(at, bucket, first, n, map_, rule, tag, kept_tag)
    return _plain(at, bucket, first, n, map_, rule, tag, kept_tag)


@compiled
def _tail(at, bucket, first, n, map_, rule, tag, kept_tag):
    """As :func:`_words`, one element at a time."""
    sq_norm, alignment, momentum_sq_norm = zeros(1), zeros(1), zeros(1)
    for i in range(0, n, itemsize(tag)):
        number = first + i // itemsize(tag)
        hashes = _hashed(number // _BLOCK * LANES + number % LANES, map_.seed, 1)
        values = load(at.grad + i, tag, 1)
        _add_to_bucket(bucket, values, _shifted(hashes, number % _BLOCK // LANES), kept_tag)
        bucket += itemsize(kept_tag)
        a = wide(values)
        sq_norm = fma(a, a, sq_norm)
        if at.buf and map_.align:
            b = wide(load(at.buf + i, tag, 1))
            alignment = fma(a, b, alignment)
            momentum_sq_norm = fma(b, b, momentum_sq_norm)
        if at.param:
            update_elements(at, i, values, rule, tag)
    return summed(sq_norm), summed(alignment), summed(momentum_sq_norm)


@inlined
def _runs(at, twice, first, n, map_, rule, tag, kept_tag):
    """Elements from number `first` on, in runs, each rotated: sums as of :func:`_sketching`."""
    sq_norm = alignment = momentum_sq_norm = 0.0
    for start in range(first, first + n, map_.buckets):
        hashes = _hashed(start // map_.buckets, map_.seed ^ OFFSETS, 1)
        bucket = twice + _first_lane(hashes) % map_.buckets * itemsize(kept_tag)
        count = min(first + n - start, map_.buckets)
        whole = count - count % _WORD
        a = _words(at, bucket, start, whole * itemsize(tag), map_, rule, tag, kept_tag)
        at, bucket, rest = (
            moved(at, whole * itemsize(tag)),
            bucket + whole * itemsize(kept_tag),
            count - whole,
        )
        b = _tail(at, bucket, start + whole, rest * itemsize(tag), map_, rule, tag, kept_tag)
        at = moved(at, rest * itemsize(tag))
        sq_norm += a[0] + b[0]
        alignment += a[1] + b[1]
        momentum_sq_norm += a[2] + b[2]
    return sq_norm, alignment, momentum_sq_norm


@inlined
def _halves(twice, kept_tag):
    """Add the second half of the buckets to the first; its squared norm."""
    sq_norm = zeros(LANES)
    size = itemsize(kept_tag)
    for i in range(0, BUCKETS * size, LANES * size):
        both = add(load(twice + i, kept_tag, LANES), load(twice + BUCKETS * size + i, kept_tag, LANES))
        store(twice + i, kept_tag, both)
        sq_norm = fma(wide(both), wide(both), sq_norm)
    return summed(sq_norm)


@inlined
def _keep(new, old, stretch, kept_tag):
    """Dot, squared difference and squared norm of `stretch` times the buckets at `new`, and those at `old`;
    which are overwritten."""
    dot, diff_sq_norm, prev_sq_norm = zeros(LANES), zeros(LANES), zeros(LANES)
    size = itemsize(kept_tag)
    factor = scalar(stretch, kept_tag)
    for i in range(0, BUCKETS * size, LANES * size):
        values = load(new + i, kept_tag, LANES)
        a, b = multiply(stretch, wide(values)), wide(load(old + i, kept_tag, LANES))
        d = subtract(a, b)
        dot = fma(a, b, dot)
        diff_sq_norm = fma(d, d, diff_sq_norm)
        prev_sq_norm = fma(b, b, prev_sq_norm)
        store(old + i, kept_tag, multiply(factor, values))
    return summed(dot), summed(diff_sq_norm), summed(prev_sq_norm)


@compiled
def _compare(sq_norm, twice, kept, runs, kept_tag):
    """What :data:`oscopt.kernels.sketch.ESTIMATED` names, of a chunk of so many runs; its sketch is kept."""
    buckets_sq_norm = _halves(twice, kept_tag)
    stretch = np.sqrt(sq_norm / buckets_sq_norm) if sq_norm != 0 else 0.0
    dot, diff_sq_norm, prev_sq_norm = _keep(twice, kept, stretch, kept_tag)
    product = sq_norm * prev_sq_norm
    rest = 1 - dot * dot / product if product != 0 else 0.0
    dot *= 1 + rest / (2 * BUCKETS)
    return dot, diff_sq_norm, prev_sq_norm, product * rest * rest * (1 - 1 / runs) / BUCKETS


@compiled
def _work_off(first, last, tables, chunks, rates, way, tag, kept_tag, partials):
    """Chunks [first, last)."""
    ahead, align = way
    buckets = np.empty(2 * BUCKETS, kept_tag.dtype)
    twice = np.int64(buckets.ctypes.data)
    for c in range(first, last):
        chunk = chunks[c]
        k, n = chunk.tensor, chunk.stop - chunk.start
        at = locate(tables, k, chunk.start * itemsize(tag))
        at = Arrays(at.param, at.grad, 0, at.buf)  # what is kept has places of its own
        rule = rule_for(chunk, tables.row[k] if at.param else 0, rates, at.buf != 0, tag)
        map_ = Map(chunk.seed, BUCKETS, ahead, align)
        buckets[:] = 0
        sums = _runs(at, twice, chunk.start, n, map_, rule, tag, kept_tag)
        sq_norm, alignment, momentum_sq_norm = sums
        kept = tables.prev[k] + (c - chunk.first) * BUCKETS * itemsize(kept_tag)
        runs = (n + BUCKETS - 1) // BUCKETS
        dot, diff_sq_norm, prev_sq_norm, variance = _compare(sq_norm, twice, kept, runs, kept_tag)
        if at.param:
            alignment *= rule.sign
        row = partials[c]
        row[0], row[1], row[2], row[3] = dot, sq_norm, diff_sq_norm, prev_sq_norm
        row[4], row[5], row[6] = alignment, momentum_sq_norm, variance


@entry
def _step(share, tables, chunks, rates, way, tag, kept_tag, output):
    for thread in prange(share.size - 1):
        first, last = share[thread], share[thread + 1]
        _work_off(first, last, Tables(*tables), chunks, Rates(*rates), way, tag, kept_tag, output[0])
    reduce(Output(*output))


@compiled
def _fold_layer(first, last, tensors, tag, kept_tag, row):
    """Tensors [first, last)."""
    kept, sizes, seeds = tensors
    buckets = np.zeros(2 * row.size, kept_tag.dtype)
    none = scalar(0.0, tag)
    rule = Rule(none, none, none, none, none, none, none, none)
    for k in range(first, last):
        map_ = Map(seeds[k] ^ FOLD, row.size, 0, False)
        _runs(Arrays(0, kept[k], 0, 0), np.int64(buckets.ctypes.data), 0, sizes[k], map_, rule, tag, kept_tag)
    for i in range(row.size):
        row[i] += buckets[i] + buckets[row.size + i]


@entry
def _fold(tensors, bounds, tag, kept_tag, out):
    for layer in prange(out.shape[0]):
        _fold_layer(bounds[layer], bounds[layer + 1], tensors, tag, kept_tag, out[layer])
