"""What the compiled CPU code is written in: vectors of numbers, in registers.

Everything is spelled out in vectors with fused multiply-adds: the sums have the same bits however memory is
passed over, and the update rounds as torch.optim.SGD does.

Memory is given by its address, and what lies there by a `tag`, an array of the type that stands for the dtype
in compiled code: half types travel as their bits, and are computed with as float32.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

LANES = 8
"""Elements that are worked on at once."""

_STORAGE = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.bfloat16: np.uint16,
    torch.float16: np.int16,
}
DTYPES = tuple(_STORAGE)


def tag_of(dtype: torch.dtype) -> np.ndarray:
    """The array that stands for `dtype`."""
    return np.zeros(1, _STORAGE[dtype])


class Vector(types.Type):
    """`lanes` numbers of type `dtype` (float32, float64 or uint32) in a register."""

    def __init__(self, dtype: types.Type, lanes: int) -> None:
        self.dtype, self.lanes = dtype, lanes
        super().__init__(f"Vector({dtype}, {lanes})")


_INT32 = ir.IntType(32)
_NUMBERS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.uint32: _INT32}


def ir_type(vector: Vector) -> ir.VectorType:
    """LLVM's type of it."""
    return ir.VectorType(_NUMBERS[vector.dtype], vector.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, ir_type(kind))


def _computed(tag: types.Array) -> types.Float:
    """In what is computed with elements of the storage type of `tag`."""
    return types.float64 if tag.dtype == types.float64 else types.float32


def _lanes_of(lanes) -> int:
    """So many as the literal number says, or as the vector has."""
    return lanes.lanes if isinstance(lanes, Vector) else lanes.literal_value


def constant(kind: ir.VectorType, value: int) -> ir.Constant:
    """`value` in every lane."""
    return ir.Constant(kind, [value] * kind.count)


def splat(builder, value, kind: ir.VectorType):
    """`value`, a number or already a vector, in every lane."""
    if value.type == kind:
        return value
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(one, one, constant(ir.VectorType(_INT32, kind.count), 0))


def _piece(builder, vector, start: int, count: int):
    """`count` lanes from number `start` on."""
    lanes = ir.Constant(ir.VectorType(_INT32, count), list(range(start, start + count)))
    return builder.shuffle_vector(vector, vector, lanes)


# ---- memory ----------------------------------------------------------------------------------------------


def _pointer(context, builder, address, tag, lanes: int):
    """To `lanes` elements as they are stored; and their alignment in bytes."""
    stored = ir.VectorType(context.get_data_type(tag.dtype), lanes)
    return builder.inttoptr(address, stored.as_pointer()), tag.dtype.bitwidth // 8


@intrinsic
def itemsize(typing_context, tag):
    """Bytes of an element, known to the compiler (an array's own itemsize is not)."""
    size = tag.dtype.bitwidth // 8
    return types.int64(tag), lambda context, builder, signature, args: ir.Constant(ir.IntType(64), size)


@intrinsic(prefer_literal=True)
def load(typing_context, address, tag, lanes):
    """The values of the elements at `address`: as many as `lanes`, a literal, says, or has as a vector."""
    vector = Vector(_computed(tag), _lanes_of(lanes))

    def generate(context, builder, signature, args):
        pointer, align = _pointer(context, builder, args[0], tag, vector.lanes)
        raw = builder.load(pointer, align=align)
        if tag.dtype == types.uint16:
            words = ir.VectorType(_INT32, vector.lanes)
            bits = builder.shl(builder.zext(raw, words), constant(words, 16))
            return builder.bitcast(bits, ir_type(vector))
        if tag.dtype == types.int16:
            halves = ir.VectorType(ir.HalfType(), vector.lanes)
            return builder.fpext(builder.bitcast(raw, halves), ir_type(vector))
        return raw

    return vector(types.int64, tag, lanes), generate


@intrinsic
def store(typing_context, address, tag, values):
    """Write `values`, rounded to nearest even, to `address`."""

    def generate(context, builder, signature, args):
        pointer, align = _pointer(context, builder, args[0], tag, values.lanes)
        raw, halves = args[2], ir.VectorType(ir.IntType(16), values.lanes)
        if tag.dtype == types.uint16:
            words = ir.VectorType(_INT32, values.lanes)
            bits = builder.bitcast(raw, words)
            odd = builder.and_(builder.lshr(bits, constant(words, 16)), constant(words, 1))
            rounded = builder.add(builder.add(bits, constant(words, 0x7FFF)), odd)
            nan = builder.fcmp_unordered("uno", raw, raw)
            rounded = builder.select(nan, constant(words, 0x7FC0 << 16), rounded)
            raw = builder.trunc(builder.lshr(rounded, constant(words, 16)), halves)
        elif tag.dtype == types.int16:
            raw = builder.bitcast(builder.fptrunc(raw, ir.VectorType(ir.HalfType(), values.lanes)), halves)
        builder.store(raw, pointer, align=align)
        return context.get_dummy_value()

    return types.void(types.int64, tag, values), generate


@intrinsic(prefer_literal=True)
def copy(typing_context, to, source, tag, lanes):
    """Copy `lanes` elements, bit by bit."""

    def generate(context, builder, signature, args):
        count = _lanes_of(lanes)
        (into, align), (of, _) = (_pointer(context, builder, address, tag, count) for address in args[:2])
        builder.store(builder.load(of, align=align), into, align=align)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, tag, lanes), generate


@intrinsic
def prefetch(typing_context, address):
    """Prefetch the cache line at `address`."""

    def generate(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _INT32, _INT32, _INT32])
        function = builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
        to_read, near, data = (ir.Constant(_INT32, value) for value in (0, 3, 1))
        builder.call(function, [builder.inttoptr(args[0], byte), to_read, near, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


# ---- numbers ---------------------------------------------------------------------------------------------


@intrinsic
def scalar(typing_context, value, tag):
    """The float64 `value` as the type in which elements are computed with."""

    def generate(context, builder, signature, args):
        return context.cast(builder, args[0], types.float64, signature.return_type)

    return _computed(tag)(types.float64, tag), generate


@intrinsic
def wide(typing_context, values):
    """As float64."""
    vector = Vector(types.float64, values.lanes)

    def generate(context, builder, signature, args):
        return args[0] if values == vector else builder.fpext(args[0], ir_type(vector))

    return vector(values), generate


@intrinsic
def add(typing_context, a, b):
    """The sum of two vectors."""
    return a(a, b), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic
def subtract(typing_context, a, b):
    """The difference of two vectors."""
    return a(a, b), lambda context, builder, signature, args: builder.fsub(*args)


@intrinsic
def multiply(typing_context, a, b):
    """The scalar `a` times the vector `b`."""

    def generate(context, builder, signature, args):
        return builder.fmul(splat(builder, args[0], args[1].type), args[1])

    return b(b.dtype, b), generate


def _llvm_fma(builder, of):
    """LLVM's function that multiplies and adds vectors of type `of`, rounding once."""
    kind = ir_type(of)
    name = f"llvm.fma.v{of.lanes}f{of.dtype.bitwidth}"
    return builder.module.declare_intrinsic(name, (), ir.FunctionType(kind, [kind] * 3))


@intrinsic
def fma(typing_context, a, b, c):
    """a * b + c, rounded once; `a` a vector or a scalar."""

    def generate(context, builder, signature, args):
        return builder.call(_llvm_fma(builder, c), [splat(builder, args[0], ir_type(c)), *args[1:]])

    return c(a if isinstance(a, Vector) else c.dtype, b, c), generate


@intrinsic
def where(typing_context, condition, a, b):
    """The vector `a` if `condition`, else `b`, without a branch."""

    def generate(context, builder, signature, args):
        return builder.select(splat(builder, args[0], ir.VectorType(ir.IntType(1), a.lanes)), *args[1:])

    return a(types.boolean, a, a), generate


@intrinsic
def clip(typing_context, values, bound):
    """The vector `values`, between minus `bound` and `bound`; NaN stays."""

    def generate(context, builder, signature, args):
        high = splat(builder, args[1], args[0].type)
        low = builder.fneg(high)
        clipped = builder.select(builder.fcmp_ordered(">", args[0], high), high, args[0])
        return builder.select(builder.fcmp_ordered("<", clipped, low), low, clipped)

    return values(values, values.dtype), generate


# ---- sums ------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def zeros(typing_context, lanes):
    """float64."""
    vector = Vector(types.float64, lanes.literal_value)
    return vector(lanes), lambda context, builder, signature, args: ir.Constant(ir_type(vector), None)


@intrinsic
def add_products(typing_context, a, b, total):
    """`total` plus a * b, which may have more lanes: they are cut into pieces, which are added in order."""

    def generate(context, builder, signature, args):
        result = args[2]
        for start in range(0, a.lanes, total.lanes):
            pieces = [_piece(builder, x, start, total.lanes) for x in args[:2]]
            result = builder.call(_llvm_fma(builder, total), [*pieces, result])
        return result

    return total(a, b, total), generate


@intrinsic
def summed(typing_context, values):
    """The sum over the lanes: halves are added until one is left."""

    def generate(context, builder, signature, args):
        vector, count = args[0], values.lanes
        while count > 1:
            count //= 2
            vector = builder.fadd(*(_piece(builder, vector, start, count) for start in (0, count)))
        return builder.extract_element(vector, ir.Constant(_INT32, 0))

    return values.dtype(values), generate
