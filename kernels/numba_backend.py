"""CPU: one parallel loop over chunks of all tensors, through a table of addresses, compiled once a dtype.

A chunk is worked off in parts: ask for the memory of a part some way ahead (the processor's own prefetching
stops at every page), sum (reads g_t, g_{t-1}), update (reads g_t again, from the cache; reads and writes the
parameter), so memory is passed over once. What is done is decided at run time by the hyperparameters and by
null addresses, so that nothing is compiled twice.
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

from . import Tensors, addresses

NAME = "numba"

_CHUNK = 1 << 15  # elements: the unit of work that threads share
_PART = 1 << 7  # elements: more make the requests for memory come in bursts
_AHEAD = 1 << 11  # bytes from a part to the one that is asked for
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
_NO_SCALE = np.zeros(0)
_NO_SUMS = np.zeros((0, 0))


def unavailable(device: torch.device) -> str:
    """Runs on CPUs."""
    return "" if device.type == "cpu" else "it runs on CPUs only"


class Batch:
    """See :class:`oscopt.kernels.BatchProtocol`."""

    def __init__(self, params: Sequence[Tensor], layer_of, num_layers, scale_of=None) -> None:
        dtype = params[0].dtype
        self._tag = np.zeros(1, _STORAGE[dtype])
        self._itemsize = dtype.itemsize
        self._params = params
        self._own = addresses(params)
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
        self._scale_of = np.array(layer_of if scale_of is None else scale_of, np.int64)
        self._rows: tuple[Sequence[int] | None, np.ndarray] = (None, _NO_ADDRESSES)
        self._hyper: tuple[object, np.ndarray] = (None, np.zeros((1, 6)))

    def prepare_capture(self) -> None:
        """Nothing is needed."""

    def step(self, grads, prevs, bufs, copies, rows, hyper, out, scale=None) -> None:
        if self._rows[0] != rows:
            self._rows = (list(rows), np.array(rows, np.int64))
        if hyper is not None and self._hyper[0] is not hyper:
            self._hyper = (hyper, np.array(hyper, np.float64))
        of_torch = torch.get_num_threads()
        threads = 1
        if len(self._work) and self._work[-1] > _SERIAL:
            threads = min(of_torch, numba.config.NUMBA_NUM_THREADS)
        arguments = (
            self._own if hyper is not None else _NO_ADDRESSES,
            addresses(grads),
            addresses(prevs) if prevs is not None else _NO_ADDRESSES,
            _addresses_of_some(bufs) if bufs is not None else _NO_ADDRESSES,
            np.array(copies, np.bool_) if copies is not None else np.zeros(0, np.bool_),
            self._rows[1],
            self._hyper[1],
            scale.numpy() if scale is not None else _NO_SCALE,
            self._scale_of,
            self._tensor,
            self._start,
            self._stop,
            self._share(threads),
            self._itemsize,
            self._tag,
            self._partials,
            self._layer_bounds,
            out.numpy() if prevs is not None else _NO_SUMS,
        )
        numba.set_num_threads(threads)
        _call(_step, arguments, self._params[0].dtype)
        # Starting its threads, numba sets OpenMP's number of threads, which is torch's as well.
        if torch.get_num_threads() != of_torch:
            torch.set_num_threads(of_torch)

    def _share(self, threads: int) -> np.ndarray:
        """Chunks [share[t], share[t + 1]) are thread t's: an equal number of elements each."""
        if threads not in self._shares:
            total = self._work[-1] if len(self._work) else 0
            share = np.searchsorted(self._work, np.linspace(0, total, threads + 1), side="left")
            share[0], share[-1] = 0, len(self._work)
            self._shares[threads] = share.astype(np.int64)
        return self._shares[threads]


def _addresses_of_some(tensors: Sequence[Tensor | None]) -> np.ndarray:
    if isinstance(tensors, Tensors):
        return tensors.addresses
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


@intrinsic
def _prefetch(typing_context, address):
    """Ask for the cache line at `address`."""

    def generate(context, builder, signature, args):
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
        to_read, near, data = (ir.Constant(number, value) for value in (0, 3, 1))
        builder.call(function, [builder.inttoptr(args[0], byte), to_read, near, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@njit(nogil=True, cache=True)
def _copy(to, source):
    for i in range(to.size):
        to[i] = source[i]


# The forms of the update, of one element; `d` is its gradient.


@njit(nogil=True)
def _nothing(p, buf, i, d, lr, decay, gain, weight_decay, lookahead):
    pass


@njit(nogil=True)
def _descend(p, buf, i, d, lr, decay, gain, weight_decay, lookahead):
    x = _load(p[i])
    if weight_decay != 0:
        d = _fma(weight_decay, x, d)
    p[i] = _store(p[i], _fma(-lr, d, x))


@njit(nogil=True)
def _descend_momentum(p, buf, i, d, lr, decay, gain, weight_decay, lookahead):
    x = _load(p[i])
    if weight_decay != 0:
        d = _fma(weight_decay, x, d)
    b = _fma(gain, d, decay * _load(buf[i]))
    buf[i] = _store(buf[i], b)
    p[i] = _store(p[i], _fma(-lr, _fma(lookahead, b, d) if lookahead != 0 else b, x))


def _loop(update, measured):
    """The pass over a chunk with one form of the update: a call for every part would take a tenth more."""
    updated, buffered = update is not _nothing, update is _descend_momentum

    @njit(nogil=True)
    def loop(p, g, q, buf, copy, n, room, lr, sign, decay, gain, weight_decay, lookahead, itemsize, tag):
        dot = sq_norm = diff_sq_norm = prev_sq_norm = 0.0
        for start in range(0, n, _PART):
            offset = start * itemsize
            size = min(_PART, n - start)
            for line in range(offset + _AHEAD, min(offset + _AHEAD + _PART * itemsize, room * itemsize), 64):
                _prefetch(g + line)
                if measured:
                    _prefetch(q + line)
                if updated:
                    _prefetch(p + line)
                if buffered:
                    _prefetch(buf + line)
            x = numba.carray(_pointer(p + offset, tag), size)
            y = numba.carray(_pointer(g + offset, tag), size)
            z = numba.carray(_pointer(q + offset, tag), size)
            m = numba.carray(_pointer(buf + offset, tag), size)
            if measured:
                sums = _sum(y, z)
                dot += sums[0]
                sq_norm += sums[1]
                diff_sq_norm += sums[2]
                prev_sq_norm += sums[3]
            for i in range(size):
                update(x, m, i, sign * _load(y[i]), lr, decay, gain, weight_decay, lookahead)
            if measured and copy:
                _copy(z, y)
        return dot, sq_norm, diff_sq_norm, prev_sq_norm

    return loop


_measure = _loop(_nothing, True)
_update, _measure_update = _loop(_descend, False), _loop(_descend, True)
_update_momentum, _measure_update_momentum = _loop(_descend_momentum, False), _loop(_descend_momentum, True)


@njit(nogil=True, cache=True)
def _chunk(p, g, q, buf, copy, n, room, row, scale, itemsize, tag):
    """Sum and update `n` elements at the addresses `p`, `g`, `q`, `buf`; 0 leaves its part out."""
    scalar = _load(tag[0])
    lr = scalar + type(scalar)(row[0] * scale)
    decay = scalar + type(scalar)(row[1])
    gain = scalar + type(scalar)(row[2])
    weight_decay = scalar + type(scalar)(row[3])
    lookahead = scalar + type(scalar)(row[4])
    sign = scalar + type(scalar)(row[5])
    given = (p, g, q, buf, copy, n, room, lr, sign, decay, gain, weight_decay, lookahead, itemsize, tag)
    if p == 0:
        return _measure(*given)
    if buf == 0:
        return _measure_update(*given) if q != 0 else _update(*given)
    return _measure_update_momentum(*given) if q != 0 else _update_momentum(*given)


@njit(nogil=True, cache=True)
def _reduce(partials, bounds, out):
    """Sum the chunks of each layer, in their order: the same bits for any number of threads."""
    for layer in range(bounds.size - 1):
        for s in range(partials.shape[1]):
            total = 0.0
            for c in range(bounds[layer], bounds[layer + 1]):
                total += partials[c, s]
            out[s, layer] = total if np.isfinite(total) else np.nan


@njit(nogil=True, cache=True, parallel=True)
def _step(
    p,
    g,
    q,
    buf,
    copy,
    rows,
    hyper,
    scale,
    scale_of,
    tensor,
    start,
    stop,
    share,
    itemsize,
    tag,
    partials,
    bounds,
    out,
):
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
                stop[c] - start[c],
                hyper[rows[k] if p.size else 0],
                scale[scale_of[k]] if scale.size and scale_of[k] >= 0 else 1.0,
                itemsize,
                tag,
            )
            partials[c, 0] = sums[0]
            partials[c, 1] = sums[1]
            partials[c, 2] = sums[2]
            partials[c, 3] = sums[3]
    if out.size:
        _reduce(partials, bounds, out)
