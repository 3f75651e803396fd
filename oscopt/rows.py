"""Rows of the record: what one step leaves of every layer, and blocks of rows on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .kernels import SUMS

RECORDED = (*SUMS, "correlation_stderr", "step_scale", "prev_step_scale")
"""What a row holds for each layer; behind it come the sketches, if there are any."""
MEASURED = len(RECORDED) - 2
"""Of these, how many are measured; the others are settings."""
RATES = ("lr", "prev_lr")
"""What is kept beside the rows: the learning rates of the step and of the one before."""

_SQ_NORM, _PREV_SQ_NORM, _STDERR = (
    RECORDED.index(name) for name in ("sq_norm", "prev_sq_norm", "correlation_stderr")
)
_OF_PAIRS = [RECORDED.index(name) for name in ("dot", "diff_sq_norm", "prev_sq_norm")]
_ROUNDING = 1e-9  # by which a norm may differ that is summed twice, in any order


def height(sketches: int | None) -> int:
    """How many float64 a row has for each layer, with as many float32 of sketches."""
    return len(RECORDED) + (sketches or 0) // 2


class Rows(NamedTuple):
    """T steps as they come from the device.

    Attributes:
        steps: their numbers, int64, (T,).
        values: float64, (T, R, L), R from :func:`height`.
        rates: float64, (T, 2, L): :data:`RATES`.
    """

    steps: np.ndarray
    values: np.ndarray
    rates: np.ndarray


def drop_written(values: np.ndarray | Tensor, sq_norm: np.ndarray | Tensor) -> None:
    """NaN where the last gradient has been written to: where its norm is no longer what it was.

    Args:
        values: rows, (..., R, L).
        sq_norm: that of the step before each, (..., L).
    """
    if isinstance(values, Tensor) and values.device.type == "cpu":  # a tenth of the time per operation
        values, sq_norm = values.numpy(), sq_norm.numpy()  # type: ignore[union-attr]
    written = abs(values[..., _PREV_SQ_NORM, :] - sq_norm) > _ROUNDING * sq_norm
    if isinstance(values, Tensor):  # asking whether there is any would wait for the device
        for i in _OF_PAIRS:
            values[..., i, :].masked_fill_(written, torch.nan)
    elif written.any():
        for i in _OF_PAIRS:
            values[..., i, :][written] = np.nan


def set_stderr(values: np.ndarray) -> None:
    """In rows of sketched gradients, (T, R, L): make the variance of the dot product, which lies in its
    place, the standard error of the correlation."""
    norms = np.sqrt(values[:, _SQ_NORM]) * np.sqrt(values[:, _PREV_SQ_NORM])
    with np.errstate(invalid="ignore", divide="ignore"):
        values[:, _STDERR] = np.sqrt(values[:, _STDERR]) / norms


@dataclass(slots=True)
class Block:
    """Consecutive steps of a record.

    Attributes:
        steps: their numbers, int64, (n,).
        ordinals: how many steps were recorded before each, int64, (n,).
        values: float64, (n, R, layers); later layers come last, and are NaN here.
        rates: float64, (n, 2, layers); one row in memory where they do not change.
        stride: every ordinal is a multiple of it.
    """

    steps: np.ndarray
    ordinals: np.ndarray
    values: np.ndarray
    rates: np.ndarray
    stride: int = 1

    def __len__(self) -> int:
        return len(self.steps)

    def between(self, first: int, last: int) -> Block:
        """Rows `first` to `last` - 1; shares their memory."""
        part = slice(first, last)
        return Block(self.steps[part], self.ordinals[part], self.values[part], self.rates[part], self.stride)

    def where(self, chosen: np.ndarray) -> Block:
        """The rows that are `chosen`, bool, (n,), without the memory of the others."""
        if chosen.all():
            return self
        constant = len(self) > 0 and self.rates.strides[0] == 0
        return Block(
            self.steps[chosen],
            self.ordinals[chosen],
            self.values[chosen],
            _repeated(self.rates[0], chosen.sum()) if constant else self.rates[chosen],
            self.stride,
        )

    def thinned(self, stride: int) -> Block:
        """Every `stride`-th of the steps that were recorded."""
        if stride == self.stride:
            return self
        return replace(self.where(self.ordinals % stride == 0), stride=stride)


class OpenBlock:
    """A block with room for `size` rows, which is being filled.

    Args:
        size, rows, width: of its arrays: `size` steps of `rows` values and `width` layers.
        ordinal: how many steps were recorded before.
    """

    def __init__(self, size: int, rows: int, width: int, ordinal: int) -> None:
        self.width = width
        self._count = 0
        self._steps = np.empty(size, np.int64)
        self._ordinals = np.arange(ordinal, ordinal + size)
        self._values = np.empty((size, rows, width))
        self._rates = np.empty((size, 2, width))

    @property
    def room(self) -> int:
        """Rows that can still be added."""
        return len(self._steps) - self._count

    def add(self, rows: Rows, columns: Sequence[int] | None) -> None:
        """Add rows; `columns`: where their layers are among the block's, if not at the same places."""
        new = slice(self._count, self._count + len(rows.steps))
        place: slice | Sequence[int] = slice(None) if columns is None else columns
        if columns is not None:
            self._values[new] = self._rates[new] = np.nan
        self._steps[new] = rows.steps
        self._values[new, :, place] = rows.values
        self._rates[new, :, place] = rows.rates
        self._count += len(rows.steps)

    def so_far(self) -> Block:
        """What it holds; shares its memory."""
        whole = Block(self._steps, self._ordinals, self._values, self._rates)
        return whole.between(0, self._count)

    def closed(self) -> Block:
        """What it holds, in no more memory than that takes."""
        block = self.so_far()
        if self.room:
            block = Block(block.steps.copy(), block.ordinals.copy(), block.values.copy(), block.rates.copy())
        return replace(block, rates=_once(block.rates))


def joined(blocks: Sequence[Block], rows: int, width: int) -> Block:
    """One block of all, of `rows` values and `width` layers."""
    none = np.zeros(0, np.int64)
    return Block(
        np.concatenate([none, *(block.steps for block in blocks)]),
        np.concatenate([none, *(block.ordinals for block in blocks)]),
        np.concatenate([np.zeros((0, rows, width)), *(widened(b.values, width) for b in blocks)]),
        _once(np.concatenate([np.zeros((0, 2, width)), *(widened(b.rates, width) for b in blocks)])),
        blocks[0].stride if blocks else 1,
    )


def widened(values: np.ndarray, width: int) -> np.ndarray:
    """`values` with NaN for layers that came later, which are the last axis."""
    missing = width - values.shape[-1]
    if not missing:
        return values
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)], constant_values=np.nan)


def _repeated(row: np.ndarray, count: int) -> np.ndarray:
    return np.broadcast_to(row, (count, *row.shape))


def _once(rates: np.ndarray) -> np.ndarray:
    """`rates` with one row in memory if all rows are the same."""
    if len(rates) and np.array_equal(rates, _repeated(rates[0], len(rates)), equal_nan=True):
        return _repeated(rates[0].copy(), len(rates))
    return rates


def packed(vectors: Tensor) -> Tensor:
    """float32 (..., L, k') as float64 (..., k' / 2, L), two of them in the place of one: a row's sketches."""
    pairs = vectors.unflatten(-1, (-1, 2)).transpose(-3, -2).contiguous()
    return pairs.view(torch.float64).squeeze(-1)


def unpacked(values: np.ndarray) -> np.ndarray:
    """What :func:`packed` was given: float32, (..., L, k')."""
    pairs = np.ascontiguousarray(values)[..., None].view(np.float32)
    return np.moveaxis(pairs, -3, -2).reshape(*values.shape[:-2], values.shape[-1], 2 * values.shape[-2])
