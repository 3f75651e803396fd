"""CPU: one parallel loop over chunks of all tensors, through a table of addresses, compiled once a dtype.

A chunk is worked off in parts: prefetch a part some way ahead (the processor's own prefetching stops at every
page), sum (reads g_t, g_{t-1}), update (reads g_t again, from the cache; reads and writes the parameter), so
memory is passed over once. How large a part is and whether it is prefetched depends on the processor. Where
the momentum alone is measured against, its sums are taken while updating, which reads it anyway. What is done
is decided at run time by the hyperparameters and by null addresses, so that nothing is compiled twice.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite.binding import get_host_cpu_name
from numba import njit, prange
from numba.core.event import Listener, install_listener
from torch import Tensor

from . import HYPER, SUMS, addresses, addresses_of_some
from .numba_vectors import (
    DTYPES,
    LANES,
    add_products,
    clip,
    copy,
    fma,
    itemsize,
    load,
    multiply,
    prefetch,
    scalar,
    store,
    subtract,
    summed,
    tag_of,
    where,
    wide,
    zeros,
)

__all__ = ["DTYPES"]
NAME = "numba"

_CHUNK = 1 << 15  # elements: the unit of work that threads share
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


def unavailable(device: torch.device) -> str:
    """Runs on CPUs."""
    return "" if device.type == "cpu" else "it runs on CPUs only"


CHUNK = np.dtype([(name, np.int64) for name in ("tensor", "start", "stop", "factor", "first", "seed")])
"""What compiled code is told of a chunk: its tensor, which elements of it, the entry of `scale` and `bound`
(-1: none); for the sketch the first chunk of its tensor, and the seed."""

TAKEN = {
    (pair, momentum): np.array([pair, True, pair, pair, momentum, momentum, pair])
    for pair in (False, True)
    for momentum in (False, True)
}
"""Which sums are taken, the sketch's included: with previous gradients, with a momentum."""

_HYPER = np.dtype([(name, np.float64) for name in HYPER])
_NOWHERE, _NO_COPIES, _NO_SUMS = np.zeros(0, np.int64), np.zeros(0, np.bool_), np.zeros((0, 0))


class Batch:
    """See :class:`oscopt.kernels.BatchProtocol`."""

    def __init__(self, params: Sequence[Tensor], layer_of, num_layers, scale_of=None) -> None:
        self._params = params
        self._own = addresses(params)
        self._tag = tag_of(params[0].dtype)
        sizes = np.array([p.numel() for p in params], np.int64)
        size = self._chunk_sizes(sizes)
        counts = -(-sizes // size)
        tensor = np.repeat(np.arange(len(params)), counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        self._chunks = np.zeros(len(tensor), CHUNK)
        self._chunks["tensor"], self._chunks["first"] = tensor, first
        self._chunks["start"] = (np.arange(len(tensor)) - first) * size[tensor]
        self._chunks["stop"] = np.minimum(self._chunks["start"] + size[tensor], sizes[tensor])
        self._chunks["factor"] = np.array(layer_of if scale_of is None else scale_of, np.int64)[tensor]
        self._elements = np.cumsum(self._chunks["stop"] - self._chunks["start"])
        # Tensors are sorted by layer, so a layer's chunks are neighbours: [bounds[l], bounds[l + 1]).
        self._layer_bounds = np.searchsorted(np.asarray(layer_of)[tensor], np.arange(num_layers + 1))
        self._partials = np.zeros((len(tensor), len(SUMS)))
        self._shares: dict[int, np.ndarray] = {}
        self._ones, self._unbounded = np.ones(num_layers), np.full(num_layers, np.inf)
        self._rows: tuple[Sequence[int] | None, np.ndarray] = (None, _NOWHERE)
        self._hyper: tuple[object, np.ndarray] = (None, np.zeros(1, _HYPER))

    def _chunk_sizes(self, sizes: np.ndarray) -> np.ndarray:
        """Elements of a chunk of every tensor."""
        return np.full_like(sizes, _CHUNK)

    def prepare_capture(self) -> None:
        """Nothing is needed."""

    def step(self, grads, prevs, bufs, copies, rows, hyper, out, scale=None, bound=None) -> None:
        work = self._work(grads, prevs, bufs, copies, rows, hyper, scale, bound)
        sums = self._sums(self._partials, prevs is not None, bufs is not None, out)
        self._run(_step, *work, tuple(FORM), self._tag, sums)

    # numba is quicker with plain tuples than with named ones; the compiled code names their entries.

    def _work(self, grads, prevs, bufs, copies, rows, hyper, scale, bound) -> tuple:
        """:class:`Tables`, :data:`CHUNK`, :class:`Rates`."""
        if self._rows[0] != rows:
            self._rows = (list(rows), np.array(rows, np.int64))
        if hyper is not None and self._hyper[0] is not hyper:
            self._hyper = (hyper, np.array(list(hyper), _HYPER))
        tables = (
            self._own if hyper is not None else _NOWHERE,
            addresses(grads),
            addresses(prevs) if prevs is not None else _NOWHERE,
            addresses_of_some(bufs) if bufs is not None else _NOWHERE,
            np.array(copies, np.bool_) if copies is not None else _NO_COPIES,
            self._rows[1],
        )
        scales = self._ones if scale is None else scale.numpy()
        bounds = self._unbounded if bound is None else bound.numpy()
        return tables, self._chunks, (self._hyper[1], scales, bounds)

    def _sums(self, partials, pair: bool, momentum: bool, out: Tensor | None) -> tuple:
        """:class:`Output`."""
        return partials, self._layer_bounds, TAKEN[pair, momentum], _NO_SUMS if out is None else out.numpy()

    def _run(self, kernel, *arguments) -> None:
        """Call `kernel` with the chunks of each thread and the arguments."""
        threads = threads_for(self._elements[-1] if len(self._elements) else 0)
        call(kernel, (self._share(threads), *arguments), self._params[0].dtype, threads)

    def _share(self, threads: int) -> np.ndarray:
        """Chunks [share[t], share[t + 1]) are thread t's: an equal number of elements each."""
        if threads not in self._shares:
            total = self._elements[-1] if len(self._elements) else 0
            share = np.searchsorted(self._elements, np.linspace(0, total, threads + 1), side="left")
            share[0], share[-1] = 0, len(self._elements)
            self._shares[threads] = share.astype(np.int64)
        return self._shares[threads]


def threads_for(elements: int) -> int:
    """How many threads share the work."""
    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    return min(torch.get_num_threads(), most) if elements > _SERIAL else 1


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


def call(kernel, arguments: tuple, dtype: torch.dtype, threads: int) -> None:
    """Call `kernel` with so many threads, saying so if it takes long because it is being compiled."""
    of_torch = torch.get_num_threads()
    numba.set_num_threads(threads)
    if (kernel, dtype) in _called:
        kernel(*arguments)
    else:
        with install_listener("numba:compile", _Announcement(dtype)):
            kernel(*arguments)
        _called.add((kernel, dtype))
    # Starting its threads, numba sets OpenMP's number of threads, which is torch's as well.
    if torch.get_num_threads() != of_torch:
        torch.set_num_threads(of_torch)


# ---- compiled code ---------------------------------------------------------------------------------------

_INNER: dict[str, Any] = {"nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
compiled, inlined = njit(**_INNER), njit(**_INNER, forceinline=True)


def _digest_of_sources() -> str:
    """Of all files that compiled code is made of."""
    digest, folder = hashlib.sha256(), Path(__file__).parent
    for pattern in ("__init__.py", "sketch.py", "numba_*.py"):
        for path in sorted(folder.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


_SOURCES = _digest_of_sources()


def entry(function):
    """What is called from Python: compiled once, kept on disk until any of the kernels' sources changes."""
    # numba itself looks at the file of `function` only, not at those of what is inlined into it.
    function.__qualname__ += f"-{_SOURCES}"
    return njit(nogil=True, cache=True, parallel=True)(function)


class Tables(NamedTuple):
    """Of all tensors: addresses (0, or none at all: there is no such array), which gradients are copied, the
    rows of hyperparameters."""

    param: np.ndarray
    grad: np.ndarray
    prev: np.ndarray
    buf: np.ndarray
    copied: np.ndarray
    row: np.ndarray


class Rates(NamedTuple):
    """The table of :data:`oscopt.kernels.HYPER`, and by what layers' steps are multiplied and bounded."""

    hyper: np.ndarray
    scale: np.ndarray
    bound: np.ndarray


class Output(NamedTuple):
    """Sums of chunks, whose chunks are a layer's, which sums are taken, and those of layers."""

    partials: np.ndarray
    bounds: np.ndarray
    taken: np.ndarray
    out: np.ndarray


class Arrays(NamedTuple):
    """Addresses of elements of one tensor's arrays; 0: there is none."""

    param: int
    grad: int
    prev: int
    buf: int


Rule = namedtuple("Rule", (*HYPER, "bound", "bounded_decay"))  # type: ignore[misc]
"""One update, in numbers of the type in which elements are computed with: :class:`oscopt.kernels.Hyper`, the
bound, and the weight decay of a bounded update times the bound."""

Sums = namedtuple("Sums", SUMS)  # type: ignore[misc]
"""Each of :data:`oscopt.kernels.SUMS`, in a vector or as a number."""


@inlined
def locate(tables, k, offset):
    """Of tensor k, `offset` bytes on."""
    param, grad, prev, buf, _, _ = tables
    return Arrays(
        param[k] + offset if param.size else 0,
        grad[k] + offset,
        prev[k] + offset if prev.size else 0,
        buf[k] + offset if buf.size and buf[k] else 0,
    )


@inlined
def moved(at, n):
    """`n` bytes on."""
    return Arrays(
        at.param + n if at.param else 0,
        at.grad + n,
        at.prev + n if at.prev else 0,
        at.buf + n if at.buf else 0,
    )


@inlined
def rule_for(chunk, row, rates, buffered, tag):
    """The update of `chunk`, with row number `row` of hyperparameters."""
    hyper, scale, bound = rates.hyper[row], 1.0, np.inf
    if chunk.factor >= 0:
        scale, bound = rates.scale[chunk.factor], rates.bound[chunk.factor]
    limit = scalar(bound, tag)
    weight_decay, nesterov_momentum, bounded_decay = hyper.weight_decay, hyper.nesterov_momentum, 0.0
    if buffered and limit < np.inf:
        weight_decay, nesterov_momentum, bounded_decay = 0.0, 0.0, weight_decay * bound
    return Rule(
        scalar(hyper.lr * scale, tag),
        scalar(hyper.momentum, tag),
        scalar(hyper.one_minus_dampening, tag),
        scalar(weight_decay, tag),
        scalar(nesterov_momentum, tag),
        scalar(hyper.sign, tag),
        limit,
        scalar(bounded_decay, tag),
    )


# The kinds of update; `g` is the gradient, a vector, of the elements at the addresses `p` and `buf`.


@inlined
def _descend(p, buf, g, rule, tag):
    x = load(p, tag, g)
    # A sign of 1 or -1 changes no rounding: it goes with the numbers that do not change.
    d = where(rule.weight_decay != 0, fma(rule.sign * rule.weight_decay, x, g), g)
    store(p, tag, fma(-rule.sign * rule.lr, d, x))


@inlined
def _descend_momentum(p, buf, g, rule, tag):
    x = load(p, tag, g)
    d = where(rule.weight_decay != 0, fma(rule.sign * rule.weight_decay, x, g), g)
    b = fma(rule.sign * rule.one_minus_dampening, d, multiply(rule.momentum, load(buf, tag, g)))
    store(buf, tag, b)
    nesterov = rule.nesterov_momentum != 0
    d = where(nesterov, fma(rule.sign * rule.nesterov_momentum, b, d), b)
    store(p, tag, fma(-rule.sign * rule.lr if nesterov else -rule.lr, d, x))


@inlined
def _descend_bounded(p, buf, g, rule, tag):
    x = load(p, tag, g)
    b = fma(rule.sign * rule.one_minus_dampening, g, multiply(rule.momentum, load(buf, tag, g)))
    store(buf, tag, b)
    d = fma(scalar(0.0, tag), b, clip(b, rule.bound))  # 0 times what is not finite is NaN
    d = where(rule.bounded_decay != 0, fma(rule.bounded_decay, x, d), d)
    store(p, tag, fma(-rule.lr, d, x))


@inlined
def update_elements(at, i, g, rule, tag):
    """Those whose gradients `g`, a vector, lie `i` bytes on."""
    if at.buf == 0:
        _descend(at.param + i, 0, g, rule, tag)
    elif rule.bound < np.inf:
        _descend_bounded(at.param + i, at.buf + i, g, rule, tag)
    else:
        _descend_momentum(at.param + i, at.buf + i, g, rule, tag)


@inlined
def _add_norm(sums, a):
    """Of the gradients `a`, a wide vector."""
    dot, sq_norm, diff_sq_norm, prev_sq_norm, alignment, momentum_sq_norm = sums
    return Sums(dot, add_products(a, a, sq_norm), diff_sq_norm, prev_sq_norm, alignment, momentum_sq_norm)


@inlined
def _add_pair(sums, a, q):
    """Of the gradients `a` and the last ones, `q`."""
    d = subtract(a, q)
    return Sums(
        add_products(a, q, sums.dot),
        sums.sq_norm,
        add_products(d, d, sums.diff_sq_norm),
        add_products(q, q, sums.prev_sq_norm),
        sums.alignment,
        sums.momentum_sq_norm,
    )


@inlined
def _add_momentum(sums, a, b):
    """Of the gradients `a` and the momentum `b`."""
    dot, sq_norm, diff_sq_norm, prev_sq_norm, alignment, momentum_sq_norm = sums
    alignment, momentum_sq_norm = add_products(a, b, alignment), add_products(b, b, momentum_sq_norm)
    return Sums(dot, sq_norm, diff_sq_norm, prev_sq_norm, alignment, momentum_sq_norm)


@inlined
def _totals(sums):
    return Sums(
        summed(sums.dot),
        summed(sums.sq_norm),
        summed(sums.diff_sq_norm),
        summed(sums.prev_sq_norm),
        summed(sums.alignment),
        summed(sums.momentum_sq_norm),
    )


# A part is some bytes of each array, from number `start` on, a whole number of vectors. What is known
# beforehand of a pass over memory is an argument of the functions that make its loops.


def prefetching(*, momentum, pair=False):
    @inlined
    def prefetch_part(at, start, n):
        for line in range((n + 63) // 64):
            i = start + 64 * line
            prefetch(at.grad + i)
            if pair:
                prefetch(at.prev + i)
            if at.param:
                prefetch(at.param + i)
            if momentum:
                prefetch(at.buf + i)

    return prefetch_part


def _summing(momentum):
    @inlined
    def sum_part(at, start, stop, sums, tag):
        while start < stop:
            a = wide(load(at.grad + start, tag, LANES))
            sums = _add_pair(_add_norm(sums, a), a, wide(load(at.prev + start, tag, LANES)))
            if momentum:
                sums = _add_momentum(sums, a, wide(load(at.buf + start, tag, LANES)))
            start += LANES * itemsize(tag)
        return sums

    return sum_part


def _descending(descend, align):
    @inlined
    def descend_part(at, start, n, rule, sums, tag):
        for j in range(n // (LANES * itemsize(tag))):  # where n is a constant, LLVM unrolls this
            i = start + j * LANES * itemsize(tag)
            g = load(at.grad + i, tag, LANES)
            if align:
                a = wide(g)
                sums = _add_momentum(_add_norm(sums, a), a, wide(load(at.buf + i, tag, LANES)))
            descend(at.param + i, at.buf + i, g, rule, tag)
        return sums

    return descend_part


def updating(*, momentum, align=False):
    """Update a part; with `align` its norm and its products with the momentum are summed meanwhile."""
    plain = _descending(_descend_momentum if momentum else _descend, align)
    bounded = _descending(_descend_bounded, align)

    @inlined
    def update_part(at, start, n, rule, sums, tag):
        if momentum and rule.bound < np.inf:
            return bounded(at, start, n, rule, sums, tag)
        return plain(at, start, n, rule, sums, tag)

    return update_part


@inlined
def _copy_part(at, start, stop, tag):
    while start < stop:
        copy(at.prev + start, at.grad + start, tag, LANES)
        start += LANES * itemsize(tag)


def _sweeping(*, momentum, pair=False, align=False):
    """One pass over `n` bytes of each array, a whole number of vectors."""
    prefetch_part, sum_part = prefetching(momentum=momentum, pair=pair), _summing(momentum)
    update_part = updating(momentum=momentum, align=align)

    @compiled
    def sweep(at, n, copied, form, rule, tag):
        part, ahead = form
        sums = Sums(zeros(4), zeros(4), zeros(4), zeros(4), zeros(4), zeros(4))  # six of 8 outgrow AVX2
        start = np.int64(0)  # not a literal, of which there would be another specialisation
        while start < n:
            stop = min(start + part, n)
            if ahead:
                prefetch_part(at, start + ahead, min(stop + ahead, n) - start - ahead)
            if pair:
                sums = sum_part(at, start, stop, sums, tag)
            if at.param:
                sums = update_part(at, start, stop - start, rule, sums, tag)
            if pair and copied:
                _copy_part(at, start, stop, tag)
            start = stop
        return _totals(sums)

    return sweep


_update = _sweeping(momentum=False)
_measure = _sweeping(momentum=False, pair=True)
_update_momentum = _sweeping(momentum=True)
_measure_momentum = _sweeping(momentum=True, pair=True)
_align_momentum = _sweeping(momentum=True, align=True)


@compiled
def _sweep(at, n, copied, measured, form, rule, tag):
    """A pass of the kind that fits."""
    if at.buf == 0:
        if at.prev:
            return _measure(at, n, copied, form, rule, tag)
        return _update(at, n, copied, form, rule, tag)
    if at.prev:
        return _measure_momentum(at, n, copied, form, rule, tag)
    if measured:
        return _align_momentum(at, n, copied, form, rule, tag)
    return _update_momentum(at, n, copied, form, rule, tag)


@compiled
def _tail(at, n, copied, rule, tag):
    """A pass of any kind, one element at a time."""
    sums = Sums(zeros(1), zeros(1), zeros(1), zeros(1), zeros(1), zeros(1))
    for i in range(0, n, itemsize(tag)):
        g = load(at.grad + i, tag, 1)
        a = wide(g)
        sums = _add_norm(sums, a)
        if at.prev:
            sums = _add_pair(sums, a, wide(load(at.prev + i, tag, 1)))
        if at.buf:
            sums = _add_momentum(sums, a, wide(load(at.buf + i, tag, 1)))
        if at.param:
            update_elements(at, i, g, rule, tag)
        if copied:
            copy(at.prev + i, at.grad + i, tag, 1)
    return _totals(sums)


@inlined
def _chunk(at, n, copied, measured, form, rule, tag):
    """Sum and update `n` bytes."""
    if measured and at.prev == 0 and (at.buf == 0 or at.param == 0):
        at = Arrays(at.param, at.grad, at.grad, at.buf)  # a pair with itself, which nobody reads
    whole = n - n % (LANES * itemsize(tag))
    a = _sweep(at, whole, copied, measured, form, rule, tag)
    b = _tail(moved(at, whole), n - whole, copied, rule, tag)
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5]


@compiled
def _work_off(first, last, tables, chunks, rates, form, tag, output):
    """Chunks [first, last)."""
    measured = output.out.size > 0
    for c in range(first, last):
        chunk = chunks[c]
        k = chunk.tensor
        at = locate(tables, k, chunk.start * itemsize(tag))
        rule = rule_for(chunk, tables.row[k] if at.param else 0, rates, at.buf != 0, tag)
        copied = tables.copied.size > 0 and tables.copied[k]
        n = (chunk.stop - chunk.start) * itemsize(tag)
        sums = _chunk(at, n, copied, measured, form, rule, tag)
        for s in range(len(sums)):
            output.partials[c, s] = sums[s]
        if at.param:
            output.partials[c, 4] *= rule.sign


@compiled
def reduce(output):
    """Sum the chunks of each layer, in their order: the same bits for any number of threads."""
    partials, bounds, taken, out = output
    for layer in range(out.shape[1]):
        for s in range(partials.shape[1]):
            total = 0.0
            for c in range(bounds[layer], bounds[layer + 1]):
                total += partials[c, s]
            out[s, layer] = total if taken[s] and np.isfinite(total) else np.nan


@entry
def _step(share, tables, chunks, rates, form, tag, output):
    for thread in prange(share.size - 1):
        first, last = share[thread], share[thread + 1]
        _work_off(first, last, Tables(*tables), chunks, Rates(*rates), form, tag, Output(*output))
    reduce(Output(*output))
