"""CPU: one parallel loop over chunks of all tensors, through a table of addresses, compiled once a dtype.

A chunk is worked off in parts: prefetch a part some way ahead (the processor's own prefetching stops at every
page), sum (reads g_t, g_{t-1}), update (reads g_t again, from the cache; reads and writes the parameter), so
memory is passed over once. How large a part is and whether it is prefetched depends on the processor. Where
the momentum alone is measured against, its sums are taken while updating, which reads it anyway. What is done
is decided at run time by the hyperparameters and by null addresses, so that nothing is compiled twice.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from llvmlite.binding import get_host_cpu_name
from numba import njit, prange, types
from numba.core.event import Listener, install_listener
from numba.extending import intrinsic, models, register_model
from torch import Tensor

from . import HYPER, SUMS, Tensors, addresses

NAME = "numba"

_CHUNK = 1 << 15  # elements: the unit of work that threads share
_LANES = 8  # elements that are worked on at once
_SUM_LANES = 4  # of a sum: with more, all six need more registers than AVX2 has
_SERIAL = 1 << 15  # elements in all below which waking other threads costs more than they save


class Form(NamedTuple):
    """How memory is passed over: it changes the speed of a step, never its bits."""

    part: int
    """Bytes of each array that are summed, then updated: a multiple of 64."""
    ahead: int
    """Bytes from a part to the one that is prefetched meanwhile; 0: none is."""


# By LLVM's name of the processor; the measurements are in docs/performance.md. Prefetches of more lines at a
# time than the processor can have in flight stall it.
_FORMS = {
    "znver1": Form(128, 1024),
    "znver4": Form(2048, 0),
    "sapphirerapids": Form(512, 2048),
    "emeraldrapids": Form(512, 2048),
}
_UNKNOWN = Form(1024, 0)  # a compromise, the best on none of these


def chosen_form(processor: str, wanted: str | None) -> Form:
    """The form for `processor`, or `wanted`, "PART,AHEAD" in bytes (the environment's OSCOPT_CPU_FORM).

    Raises:
        ValueError: `wanted` is not two multiples of 64, the first positive.
    """
    if not wanted:
        return _FORMS.get(processor, _UNKNOWN)
    match = re.fullmatch(r"(\d{1,9}),(\d{1,9})", wanted)
    part, ahead = map(int, match.groups()) if match else (0, 0)
    if part == 0 or part % 64 or ahead % 64:
        raise ValueError(
            f"OSCOPT_CPU_FORM={wanted!r}: give PART,AHEAD in bytes, multiples of 64, such as 512,2048"
        )
    return Form(part, ahead)


PROCESSOR = get_host_cpu_name()
"""LLVM's name of it."""

FORM = chosen_form(PROCESSOR, os.environ.get("OSCOPT_CPU_FORM"))
"""What this process uses."""

# The storage type that stands for a dtype in compiled code; half types travel as their bits.
_STORAGE = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.bfloat16: np.uint16,
    torch.float16: np.int16,
}
DTYPES = tuple(_STORAGE)
_NO_ADDRESSES = np.zeros(0, np.int64)
_NO_COPIES = np.zeros(0, np.bool_)
_NO_ENTRIES = np.zeros(0)
_NO_SUMS = np.zeros((0, 0))


def unavailable(device: torch.device) -> str:
    """Runs on CPUs."""
    return "" if device.type == "cpu" else "it runs on CPUs only"


class Batch:
    """See :class:`oscopt.kernels.BatchProtocol`."""

    def __init__(self, params: Sequence[Tensor], layer_of, num_layers, scale_of=None) -> None:
        self._tag = np.zeros(1, _STORAGE[params[0].dtype])
        self._params = params
        self._own = addresses(params)
        sizes = np.array([p.numel() for p in params], np.int64)
        chunk = self._chunk_sizes(sizes)
        chunks = -(-sizes // chunk)
        self._tensor = np.repeat(np.arange(len(params)), chunks)
        first = np.cumsum(chunks) - chunks
        self._start = (np.arange(chunks.sum()) - np.repeat(first, chunks)) * chunk[self._tensor]
        self._stop = np.minimum(self._start + chunk[self._tensor], sizes[self._tensor])
        self._work = np.cumsum(self._stop - self._start)
        # Tensors are sorted by layer, so a layer's chunks are neighbours: [bounds[l], bounds[l + 1]).
        layer_of_chunk = np.asarray(layer_of, np.int64)[self._tensor]
        self._layer_bounds = np.searchsorted(layer_of_chunk, np.arange(num_layers + 1))
        self._partials = np.zeros((len(self._tensor), len(SUMS)))
        self._shares: dict[int, np.ndarray] = {}
        self._scale_of = np.array(layer_of if scale_of is None else scale_of, np.int64)
        self._rows: tuple[Sequence[int] | None, np.ndarray] = (None, _NO_ADDRESSES)
        self._hyper: tuple[object, np.ndarray] = (None, np.zeros((1, len(HYPER))))

    def _chunk_sizes(self, sizes: np.ndarray) -> np.ndarray:
        """Elements of a chunk of every tensor."""
        return np.full_like(sizes, _CHUNK)

    def prepare_capture(self) -> None:
        """Nothing is needed."""

    def step(self, grads, prevs, bufs, copies, rows, hyper, out, scale=None, bound=None) -> None:
        if self._rows[0] != rows:
            self._rows = (list(rows), np.array(rows, np.int64))
        if hyper is not None and self._hyper[0] is not hyper:
            self._hyper = (hyper, np.array(hyper, np.float64))
        of_torch = torch.get_num_threads()
        threads = 1
        if len(self._work) and self._work[-1] > _SERIAL:
            threads = min(of_torch, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        arguments = (
            self._own if hyper is not None else _NO_ADDRESSES,
            addresses(grads),
            addresses(prevs) if prevs is not None else _NO_ADDRESSES,
            _addresses_of_some(bufs) if bufs is not None else _NO_ADDRESSES,
            np.array(copies, np.bool_) if copies is not None else _NO_COPIES,
            self._rows[1],
            self._hyper[1],
            scale.numpy() if scale is not None else _NO_ENTRIES,
            bound.numpy() if bound is not None else _NO_ENTRIES,
            self._scale_of,
            self._tensor,
            self._start,
            self._stop,
            self._share(threads),
            FORM.part,
            FORM.ahead,
            self._tag,
            self._partials,
            self._layer_bounds,
            out.numpy() if out is not None else _NO_SUMS,
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


class _Announcement(Listener):
    """Says, once, that a kernel is being compiled; numba tells of no event where it loads one from disk."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._said = dtype, False

    def on_start(self, event: object) -> None:
        if not self._said:
            self._said = True
            text = "compiling oscopt's CPU kernel for %s: up to half a minute, once on this machine"
            logging.getLogger("oscopt").warning(text, self._dtype)

    def on_end(self, event: object) -> None:
        """Nothing is to be said."""


_called: set = set()


def has_run() -> bool:
    """Whether a kernel has run in this process, or in that of which it is a fork: OpenMP has threads then."""
    return bool(_called)


def _call(kernel, arguments, dtype: torch.dtype) -> None:
    """Call `kernel`, saying so if it takes long because it is being compiled."""
    if (kernel, dtype) in _called:
        kernel(*arguments)
        return
    with install_listener("numba:compile", _Announcement(dtype)):
        kernel(*arguments)
    _called.add((kernel, dtype))


# ---- compiled code ---------------------------------------------------------------------------------------

# Everything is spelled out in vectors with fused multiply-adds: the sums have the same bits in every form,
# and the update rounds as torch.optim.SGD does.


class _Vector(types.Type):
    """`lanes` numbers of type `dtype`, float32 or float64, in a register."""

    def __init__(self, dtype: types.Float, lanes: int) -> None:
        self.dtype, self.lanes = dtype, lanes
        super().__init__(f"Vector({dtype}, {lanes})")


def _ir_type(vector: _Vector) -> ir.Type:
    return ir.VectorType({32: ir.FloatType(), 64: ir.DoubleType()}[vector.dtype.bitwidth], vector.lanes)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, _ir_type(kind))


def _computed(tag: types.Array) -> types.Float:
    """In what is computed with elements of the storage type of `tag`."""
    return types.float64 if tag.dtype == types.float64 else types.float32


def _raw_pointer(context, builder, address, tag, lanes):
    raw = ir.VectorType(context.get_data_type(tag.dtype), lanes)
    return builder.inttoptr(address, raw.as_pointer()), tag.dtype.bitwidth // 8


def _splat(builder, value, vector):
    """`value`, a number or already a vector, in every lane."""
    if value.type == vector:
        return value
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, one, lanes)


@intrinsic
def _scalar(typing_context, value, tag):
    """The float64 `value` as the type in which elements are computed with."""

    def generate(context, builder, signature, args):
        return context.cast(builder, args[0], types.float64, signature.return_type)

    return _computed(tag)(types.float64, tag), generate


@intrinsic(prefer_literal=True)
def _load(typing_context, address, tag, lanes):
    """The values of the `lanes` elements at `address`."""
    count = lanes.literal_value

    def generate(context, builder, signature, args):
        stored, out = signature.args[1].dtype, _ir_type(signature.return_type)
        pointer, align = _raw_pointer(context, builder, args[0], signature.args[1], count)
        raw = builder.load(pointer, align=align)
        if stored == types.uint16:
            bits = builder.zext(raw, ir.VectorType(ir.IntType(32), count))
            return builder.bitcast(builder.shl(bits, ir.Constant(bits.type, [16] * count)), out)
        if stored == types.int16:
            return builder.fpext(builder.bitcast(raw, ir.VectorType(ir.HalfType(), count)), out)
        return raw

    return _Vector(_computed(tag), count)(types.int64, tag, lanes), generate


@intrinsic
def _store(typing_context, address, tag, values):
    """Write `values`, rounded to nearest even, to `address`."""

    def generate(context, builder, signature, args):
        stored, count = signature.args[1].dtype, signature.args[2].lanes
        pointer, align = _raw_pointer(context, builder, args[0], signature.args[1], count)
        raw = args[2]
        if stored == types.uint16:
            words = ir.VectorType(ir.IntType(32), count)

            def constant(value):
                return ir.Constant(words, [value] * count)

            bits = builder.bitcast(raw, words)
            odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
            rounded = builder.lshr(builder.add(builder.add(bits, constant(0x7FFF)), odd), constant(16))
            nan = builder.fcmp_unordered("uno", raw, raw)
            rounded = builder.select(nan, constant(0x7FC0), rounded)
            raw = builder.trunc(rounded, ir.VectorType(ir.IntType(16), count))
        elif stored == types.int16:
            half = builder.fptrunc(raw, ir.VectorType(ir.HalfType(), count))
            raw = builder.bitcast(half, ir.VectorType(ir.IntType(16), count))
        builder.store(raw, pointer, align=align)
        return context.get_dummy_value()

    return types.void(types.int64, tag, values), generate


@intrinsic(prefer_literal=True)
def _copy(typing_context, to, source, tag, lanes):
    """Copy `lanes` elements."""

    def generate(context, builder, signature, args):
        count = signature.args[3].literal_value
        of, align = _raw_pointer(context, builder, args[1], signature.args[2], count)
        into, _ = _raw_pointer(context, builder, args[0], signature.args[2], count)
        builder.store(builder.load(of, align=align), into, align=align)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, tag, lanes), generate


@intrinsic
def _itemsize(typing_context, tag):
    """Bytes of an element, known to the compiler (an array's own itemsize is not)."""
    size = tag.dtype.bitwidth // 8
    return types.int64(tag), lambda context, builder, signature, args: ir.Constant(ir.IntType(64), size)


@intrinsic(prefer_literal=True)
def _zeros(typing_context, lanes):
    """float64."""
    vector = _Vector(types.float64, lanes.literal_value)
    return vector(lanes), lambda context, builder, signature, args: ir.Constant(_ir_type(vector), None)


@intrinsic
def _wide(typing_context, values):
    """As float64."""
    wide = _Vector(types.float64, values.lanes)

    def generate(context, builder, signature, args):
        return args[0] if values == wide else builder.fpext(args[0], _ir_type(wide))

    return wide(values), generate


@intrinsic
def _subtract(typing_context, a, b):
    return a(a, b), lambda context, builder, signature, args: builder.fsub(*args)


@intrinsic
def _multiply(typing_context, a, b):
    """The scalar `a` times the vector `b`."""

    def generate(context, builder, signature, args):
        return builder.fmul(_splat(builder, args[0], args[1].type), args[1])

    return b(b.dtype, b), generate


def _llvm_fma(builder, of):
    """LLVM's function that multiplies and adds vectors of type `of`, rounding once."""
    vector = _ir_type(of)
    name = f"llvm.fma.v{of.lanes}f{of.dtype.bitwidth}"
    return builder.module.declare_intrinsic(name, (), ir.FunctionType(vector, [vector] * 3))


@intrinsic
def _fma(typing_context, a, b, c):
    """a * b + c, rounded once; `a` a vector or a scalar."""

    def generate(context, builder, signature, args):
        return builder.call(_llvm_fma(builder, c), [_splat(builder, args[0], _ir_type(c)), *args[1:]])

    return c(a if isinstance(a, _Vector) else c.dtype, b, c), generate


@intrinsic
def _add_products(typing_context, a, b, total):
    """`total` plus a * b, whose lanes are more: `a` and `b` are cut into pieces, which are added in order."""

    def generate(context, builder, signature, args):
        function, result = _llvm_fma(builder, total), args[2]
        for at in range(0, a.lanes, total.lanes):
            lanes = ir.VectorType(ir.IntType(32), total.lanes)
            piece = ir.Constant(lanes, list(range(at, at + total.lanes)))
            result = builder.call(
                function, [*(builder.shuffle_vector(x, x, piece) for x in args[:2]), result]
            )
        return result

    return total(a, b, total), generate


@intrinsic
def _where(typing_context, condition, a, b):
    """The vector `a` if `condition`, else `b`, without a branch."""

    def generate(context, builder, signature, args):
        return builder.select(_splat(builder, args[0], ir.VectorType(ir.IntType(1), a.lanes)), *args[1:])

    return a(types.boolean, a, a), generate


@intrinsic
def _clip(typing_context, values, bound):
    """The vector `values`, between minus `bound` and `bound`; NaN stays."""

    def generate(context, builder, signature, args):
        high = _splat(builder, args[1], args[0].type)
        low = builder.fneg(high)
        clipped = builder.select(builder.fcmp_ordered(">", args[0], high), high, args[0])
        return builder.select(builder.fcmp_ordered("<", clipped, low), low, clipped)

    return values(values, values.dtype), generate


@intrinsic
def _total(typing_context, values):
    """The sum over the lanes: halves are added until one is left."""

    def generate(context, builder, signature, args):
        vector, count = args[0], values.lanes
        while count > 1:
            count //= 2
            kind = ir.VectorType(ir.IntType(32), count)
            halves = (ir.Constant(kind, list(range(at, at + count))) for at in (0, count))
            vector = builder.fadd(*(builder.shuffle_vector(vector, vector, half) for half in halves))
        return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

    return values.dtype(values), generate


@intrinsic
def _prefetch(typing_context, address):
    """Prefetch the cache line at `address`."""

    def generate(context, builder, signature, args):
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
        to_read, near, data = (ir.Constant(number, value) for value in (0, 3, 1))
        builder.call(function, [builder.inttoptr(args[0], byte), to_read, near, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


# The kinds of update; `g` is the gradient of the elements at the addresses `p` and `buf`.


def _descend(lanes):
    @njit(nogil=True)
    def descend(p, buf, g, row, tag):
        lr, decay, gain, weight_decay, lookahead, sign, bound, shrink = row
        x = _load(p, tag, lanes)
        # A sign of 1 or -1 changes no rounding: it goes with the numbers that do not change.
        d = _where(weight_decay != 0, _fma(sign * weight_decay, x, g), g)
        _store(p, tag, _fma(-sign * lr, d, x))

    return descend


def _descend_momentum(lanes):
    @njit(nogil=True)
    def descend_momentum(p, buf, g, row, tag):
        lr, decay, gain, weight_decay, lookahead, sign, bound, shrink = row
        x = _load(p, tag, lanes)
        d = _where(weight_decay != 0, _fma(sign * weight_decay, x, g), g)
        b = _fma(sign * gain, d, _multiply(decay, _load(buf, tag, lanes)))
        _store(buf, tag, b)
        ahead = lookahead != 0
        d = _where(ahead, _fma(sign * lookahead, b, d), b)
        _store(p, tag, _fma(-sign * lr if ahead else -lr, d, x))

    return descend_momentum


def _descend_bounded(lanes):
    @njit(nogil=True)
    def descend_bounded(p, buf, g, row, tag):
        lr, decay, gain, weight_decay, lookahead, sign, bound, shrink = row
        x = _load(p, tag, lanes)
        b = _fma(sign * gain, g, _multiply(decay, _load(buf, tag, lanes)))
        _store(buf, tag, b)
        d = _fma(_scalar(0.0, tag), b, _clip(b, bound))  # 0 times what is not finite is NaN
        d = _where(shrink != 0, _fma(shrink, x, d), d)
        _store(p, tag, _fma(-lr, d, x))

    return descend_bounded


def _add_momentum(lanes):
    @njit(nogil=True)
    def add_momentum(buf, g, alignment, momentum_sq_norm, tag):
        b = _wide(_load(buf, tag, lanes))
        return _add_products(g, b, alignment), _add_products(b, b, momentum_sq_norm)

    return add_momentum


def _sweep(momentum, pair, measured, lanes):
    """One pass over `n` bytes of each array, a whole number of vectors."""
    descend, descend_bounded = (_descend_momentum if momentum else _descend)(lanes), _descend_bounded(lanes)
    add_momentum = _add_momentum(lanes)
    align = momentum and measured and not pair
    few = min(lanes, _SUM_LANES)

    @njit(nogil=True)
    def sweep(p, g, q, buf, copy, updated, n, part, ahead, row, tag):
        width = lanes * _itemsize(tag)
        dot = _zeros(few)
        sq_norm = _zeros(few)
        diff_sq_norm = _zeros(few)
        prev_sq_norm = _zeros(few)
        alignment = _zeros(few)
        momentum_sq_norm = _zeros(few)
        bounded = momentum and row[6] < np.inf
        start = 0
        while start < n:
            stop = min(start + part, n)
            if ahead:
                line = start + ahead
                last = min(stop + ahead, n)
                while line < last:
                    _prefetch(g + line)
                    if pair:
                        _prefetch(q + line)
                    if updated:
                        _prefetch(p + line)
                    if momentum:
                        _prefetch(buf + line)
                    line += 64
            if pair:
                i = start
                while i < stop:
                    a = _wide(_load(g + i, tag, lanes))
                    b = _wide(_load(q + i, tag, lanes))
                    d = _subtract(a, b)
                    dot = _add_products(a, b, dot)
                    sq_norm = _add_products(a, a, sq_norm)
                    diff_sq_norm = _add_products(d, d, diff_sq_norm)
                    prev_sq_norm = _add_products(b, b, prev_sq_norm)
                    if momentum:
                        alignment, momentum_sq_norm = add_momentum(
                            buf + i, a, alignment, momentum_sq_norm, tag
                        )
                    i += width
            i = start
            if updated and bounded:
                while i < stop:
                    values = _load(g + i, tag, lanes)
                    if align:
                        a = _wide(values)
                        sq_norm = _add_products(a, a, sq_norm)
                        alignment, momentum_sq_norm = add_momentum(
                            buf + i, a, alignment, momentum_sq_norm, tag
                        )
                    descend_bounded(p + i, buf + i, values, row, tag)
                    i += width
            elif updated:
                while i < stop:
                    values = _load(g + i, tag, lanes)
                    if align:
                        a = _wide(values)
                        sq_norm = _add_products(a, a, sq_norm)
                        alignment, momentum_sq_norm = add_momentum(
                            buf + i, a, alignment, momentum_sq_norm, tag
                        )
                    descend(p + i, buf + i, values, row, tag)
                    i += width
            if pair and copy:
                i = start
                while i < stop:
                    _copy(q + i, g + i, tag, lanes)
                    i += width
            start = stop
        return (
            _total(dot),
            _total(sq_norm),
            _total(diff_sq_norm),
            _total(prev_sq_norm),
            _total(alignment),
            _total(momentum_sq_norm),
        )

    return sweep


def _loop(*, momentum, pair, measured):
    """A chunk: whole vectors, then one element at a time."""
    wide, narrow = (_sweep(momentum, pair, measured, lanes) for lanes in (_LANES, 1))

    @njit(nogil=True)
    def loop(p, g, q, buf, copy, n, part, ahead, row, tag):
        whole = n - n % (_LANES * _itemsize(tag))
        updated = p != 0
        a = wide(p, g, q, buf, copy, updated, whole, part, ahead, row, tag)
        p, g, q, buf, n = p + whole, g + whole, q + whole, buf + whole, n - whole
        b = narrow(p, g, q, buf, copy, updated, n, part, 0, row, tag)
        return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5]

    return loop


_update = _loop(momentum=False, pair=False, measured=False)
_measure = _loop(momentum=False, pair=True, measured=True)
_update_momentum = _loop(momentum=True, pair=False, measured=False)
_measure_momentum = _loop(momentum=True, pair=True, measured=True)
_align_momentum = _loop(momentum=True, pair=False, measured=True)


@njit(nogil=True)
def _scalars(row, scale, bound, buffered, tag):
    """What an update takes: hyperparameters, the bound, and the weight decay of a bounded update."""
    limit = _scalar(bound, tag)
    weight_decay, lookahead, shrink = row[3], row[4], 0.0
    if buffered and limit < np.inf:
        weight_decay, lookahead, shrink = 0.0, 0.0, weight_decay * bound
    return (
        _scalar(row[0] * scale, tag),
        _scalar(row[1], tag),
        _scalar(row[2], tag),
        _scalar(weight_decay, tag),
        _scalar(lookahead, tag),
        _scalar(row[5], tag),
        limit,
        _scalar(shrink, tag),
    )


@njit(nogil=True, cache=True)
def _chunk(p, g, q, buf, copy, n, part, ahead, measured, row, scale, bound, tag):
    """Sum and update `n` bytes at the addresses `p`, `g`, `q`, `buf`; 0 leaves its part out."""
    scalars = _scalars(row, scale, bound, buf != 0, tag)
    paired = q != 0
    if not paired:
        q = g  # a pair with itself, which nobody reads
    if buf == 0:
        if paired or measured:
            return _measure(p, g, q, buf, copy, n, part, ahead, scalars, tag)
        return _update(p, g, q, buf, copy, n, part, ahead, scalars, tag)
    if paired or (measured and p == 0):
        return _measure_momentum(p, g, q, buf, copy, n, part, ahead, scalars, tag)
    if measured:
        return _align_momentum(p, g, q, buf, copy, n, part, ahead, scalars, tag)
    return _update_momentum(p, g, q, buf, copy, n, part, ahead, scalars, tag)


@njit(nogil=True, cache=True)
def _reduce(partials, bounds, pair, align, out):
    """Sum the chunks of each layer, in their order: the same bits for any number of threads."""
    for layer in range(bounds.size - 1):
        for s in range(partials.shape[1]):
            taken = s == 1 or (align if s > 3 else pair)
            total = 0.0
            for c in range(bounds[layer], bounds[layer + 1]):
                total += partials[c, s]
            out[s, layer] = total if taken and np.isfinite(total) else np.nan


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
    bound,
    scale_of,
    tensor,
    start,
    stop,
    share,
    part,
    ahead,
    tag,
    partials,
    layer_bounds,
    out,
):
    itemsize = _itemsize(tag)
    for thread in prange(share.size - 1):
        for c in range(share[thread], share[thread + 1]):
            k = tensor[c]
            offset = start[c] * itemsize
            row = hyper[rows[k] if p.size else 0]
            entry = scale_of[k]
            sums = _chunk(
                p[k] + offset if p.size else 0,
                g[k] + offset,
                q[k] + offset if q.size else 0,
                buf[k] + offset if buf.size and buf[k] else 0,
                copy.size > 0 and copy[k],
                (stop[c] - start[c]) * itemsize,
                part,
                ahead,
                out.size > 0,
                row,
                scale[entry] if scale.size and entry >= 0 else 1.0,
                bound[entry] if bound.size and entry >= 0 else np.inf,
                tag,
            )
            for s in range(4):
                partials[c, s] = sums[s]
            partials[c, 4] = sums[4] * row[5] if p.size else sums[4]
            partials[c, 5] = sums[5]
    if out.size:
        _reduce(partials, layer_bounds, q.size > 0, buf.size > 0, out)
