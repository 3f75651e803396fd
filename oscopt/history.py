"""The record of a run: the sums of every measured step and layer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

import numpy as np
import torch
from torch import Tensor

from . import atomic, measures
from .kernels import SUMS
from .measures import Array

if TYPE_CHECKING:
    import pandas
    import xarray

    from .summary import Summary

RECORDED = (*SUMS, "correlation_stderr", "step_scale", "prev_step_scale")
"""What one row of the record holds for each layer."""
MEASURED = len(RECORDED) - 2
"""Of these, how many are measured; the others are settings."""
_HOST = ("lr", "prev_lr")
_FORMAT = 2
_SKETCHES = tuple(1 << i for i in range(4, 11))
_BLOCK = 256  # steps that gather on the device before they move to the host, or fewer: a quarter of `limit`


class History:
    """Sums, learning rates and what follows from them, for T measured steps and L layers.

    It grows on the device of the parameters and moves to the host in blocks, so recording never waits for
    the device; reading does. A layer's row is NaN where there is nothing to compare: in the first step, after
    a step in which other parameters of the layer had gradients, and where the previous gradient was
    overwritten. Sums that are not finite are NaN.

    Args:
        limit: how many steps are held at most. Beyond, the record is thinned: every second step is dropped,
            the oldest first, until every second step is left, then every fourth, and so on; the last 256
            steps (or `limit` / 4, if that is less) stay. Each row is complete in itself, so what is left
            stays exact; `steps` tells which. A step of L layers takes 72 L + 16 bytes, and 16 L more where
            learning rates change; time a step does not depend on T. None: no limit. :meth:`stream_to` keeps
            every step on disk.
        sketches: how many floats are kept of every layer's gradient, for the correlation of any two steps
            (:meth:`pairwise`, :meth:`lagged_correlation`) with a standard error of at most
            1 / sqrt(sketches); 4 bytes each and step. Needs ``measure="sketch"``. None: none are.

    Raises:
        ValueError: `limit` is less than 512, or `sketches` is no power of two from 16 to 1024.

    Attributes:
        about: what the record is of, as the optimizer or monitor says when it is made, saved with it:
            `optimizer` (its class), `quantity` ("gradients" or "updates"), `plain` (False: steps are other
            ones than the learning rate times the gradient, so that no curvature follows).
    """

    def __init__(self, limit: int | None = 32_768, sketches: int | None = None) -> None:
        if limit is not None and limit < 2 * _BLOCK:
            raise ValueError(f"Invalid limit: {limit}; use at least {2 * _BLOCK} steps, or None")
        if sketches is not None and sketches not in _SKETCHES:
            raise ValueError(f"Invalid sketches: {sketches!r}; use one of {', '.join(map(str, _SKETCHES))}")
        self.about: dict[str, Any] = {}
        self._limit = limit
        self._sketches = sketches
        self._seeds: dict[str, int] = {}  # of the layers' sketches
        self._size = _BLOCK if limit is None else min(_BLOCK, limit // 4)  # steps in a block
        self._layer_names: tuple[str, ...] = ()
        self._current: tuple[str, ...] = ()  # the layers that rows are of now
        self._columns: list[int] | None = None  # where they are in the record, if not in the same places
        self._blocks: list[_Block[np.ndarray]] = []  # on the host, the oldest first
        self._arriving: _Block[Tensor] | None = None  # on its way there
        self._block: Tensor | None = None  # (_size, 9, L) on the device
        self._steps: list[int] = []  # of the filled rows of it
        self._rates: list[tuple[np.ndarray, ...]] = []  # lr and prev_lr of them
        self._settle_last: Callable[[], None] | None = None
        self._source: Callable[[], None] | None = None  # brings what was recorded without the host
        self._count = 0  # steps recorded so far, dropped ones included
        self._stride = 1  # of these, every so many are held
        self._held = 0  # steps in _blocks
        self._drained = -1  # the last step that drain() gave out
        self._folder: _Folder | None = None

    def __len__(self) -> int:
        self.pull()
        arriving = len(self._arriving) if self._arriving is not None else 0
        return self._held + arriving + len(self._steps)

    def __repr__(self) -> str:
        steps = self.steps
        span = f"steps {steps[0]} to {steps[-1]}" if len(steps) else "no steps"
        return f"History({span}, {len(self._layer_names)} layers)"

    # ---- recording (the optimizer's side) ----------------------------------------------------------------

    @property
    def next_step(self) -> int:
        """The number of the step after the last one recorded."""
        self.pull()
        if self._steps:
            return self._steps[-1] + 1
        last = self._arriving or (self._blocks[-1] if self._blocks else None)
        return int(last.steps[-1]) + 1 if last is not None else 0

    @property
    def sketches(self) -> int | None:
        """How many floats are kept of each layer's gradient, if any."""
        return self._sketches

    @property
    def rows(self) -> int:
        """Of what :meth:`next_row` gives."""
        return len(RECORDED) + (self._sketches or 0) // 2

    def sketch_with(self, seeds: Mapping[str, int]) -> None:
        """From now on sketches are made with `seeds`, one a layer.

        Raises:
            ValueError: those so far were made with others, or by another version.
        """
        for layer, seed in seeds.items():
            if self._seeds.get(layer, seed) != seed:
                raise ValueError(
                    f"history holds sketches of layer {layer!r} that were made in another way (of "
                    "parameters of other names, other pieces of them, or by another version of oscopt), so "
                    "they cannot be compared with new ones; give a new History(sketches=...)"
                )
        self._seeds |= seeds

    def add_layers(self, names: Sequence[str], *, edited: bool = False) -> None:
        """From now on rows are of the layers `names`. Those that are new are NaN so far, others from now on.

        Args:
            names: the layers.
            edited: whether they are those of the model that was recorded, after parameters came or went.

        Raises:
            ValueError: the history holds other layers.
        """
        names = tuple(names)
        held = set(self._layer_names)
        if not (edited or held <= set(names) or held >= set(names)):
            raise ValueError(
                f"history holds layers {_some(self._layer_names)}, the optimizer has {_some(names)}; "
                "pass the history of the same model, or none"
            )
        if names != self._current:
            self._close_block()
            if not self._count:
                self._layer_names = ()
            self._layer_names += tuple(name for name in names if name not in self._layer_names)
            self._current = names
            place = {name: i for i, name in enumerate(self._layer_names)}
            columns = [place[name] for name in names]
            self._columns = None if columns == list(range(len(place))) else columns

    def next_row(self, device: torch.device) -> Tensor:
        """Where the next step's :data:`RECORDED` go: float64, shape (9, L), on `device`.

        The sums in it are zeros, the scales ones. With `sketches`, they follow, as :func:`packed` has them.
        """
        if self._block is not None and (len(self._steps) == self._size or self._block.device != device):
            self._close_block()
        self.settle()
        if self._block is None:
            self._make_room()
            shape = (self._size, self.rows, len(self._current))
            self._block = torch.zeros(shape, dtype=torch.float64, device=device)
            self._block[:, MEASURED : len(RECORDED)] = 1.0  # scales
        return self._block[len(self._steps)]

    def commit(
        self, step: int, lr: np.ndarray, prev_lr: np.ndarray, settle: Callable[[], None] | None = None
    ) -> None:
        """Make the row last asked for part of the record.

        Args:
            step: its number.
            lr, prev_lr: learning rates of this step and the one before, shape (L,); not to be changed later.
            settle: finishes the row, which is still being summed; called before anything reads it.
        """
        self._steps.append(step)
        self._rates.append((lr, prev_lr))
        self._settle_last = settle

    def follow(self, source: Callable[[], None] | None) -> None:
        """From now on call `source` before the record is read: it may have more, for :meth:`extend`."""
        self.pull()
        self._source = source

    def follows(self, source: Callable[[], None]) -> bool:
        """Whether :meth:`follow` was last called with it."""
        return self._source == source

    def pull(self) -> None:
        """Take what :meth:`follow` has brought up."""
        if self._source is not None:
            source, self._source = self._source, None  # which reads on its part
            try:
                source()
            finally:
                self._source = source

    def extend(self, steps: np.ndarray, sums: np.ndarray, lr: np.ndarray, prev_lr: np.ndarray) -> None:
        """Add T steps that were recorded elsewhere.

        Args:
            steps: their numbers, (T,).
            sums: their :data:`RECORDED`, float64, (T, 9, L).
            lr, prev_lr: as in :meth:`commit`, (T, L).
        """
        last = (np.zeros(0), np.zeros(0))
        for step, row, *rates in zip(steps.tolist(), torch.from_numpy(sums), lr, prev_lr, strict=True):
            self.next_row(torch.device("cpu")).copy_(row)
            if not all(map(partial(np.array_equal, equal_nan=True), rates, last)):
                last = rates[0], rates[1]  # a record keeps what is the same array once
            self.commit(step, *last)

    def cut(self, step: int) -> None:
        """Forget the steps from number `step` on: the run goes back to where it was before that step."""
        if self.next_step <= step:
            return
        self._close_block()
        self._absorb()
        self._blocks = [b for b in (block.where(block.steps < step) for block in self._blocks) if len(b)]
        self._held = sum(map(len, self._blocks))
        self._count = int(self._blocks[-1].ordinals[-1]) + 1 if self._blocks else 0
        self._drained = min(self._drained, step - 1)
        if self._folder is not None:
            self._folder.last = min(self._folder.last, step - 1)

    def settle(self) -> None:
        """Finish the row that is still being summed."""
        if self._settle_last is not None:
            settle, self._settle_last = self._settle_last, None
            settle()

    def _open_block(self, first: int = 0) -> _Block[Tensor]:
        """The filled rows of the block on the device from number `first` on, as they lie there."""
        assert self._block is not None
        self.settle()
        width, count = len(self._layer_names), len(self._steps) - first
        rates = {}
        for i, name in enumerate(_HOST):
            rows = [row[i] for row in self._rates[first:]]
            constant = all(row is rows[0] for row in rows)
            rate = np.stack(rows[:1] if constant else rows)
            if self._columns is not None:
                given = rate
                rate = np.full((len(given), width), np.nan)
                rate[:, self._columns] = given
            rates[name] = np.broadcast_to(rate[0], (count, width)) if constant else rate
        ordinals = np.arange(self._count + first, self._count + len(self._steps))
        sums = self._block[first : len(self._steps)]
        if self._columns is not None:
            narrow = sums
            sums = narrow.new_full((count, self.rows, width), np.nan)
            sums[..., self._columns] = narrow
        return _Block(np.array(self._steps[first:], np.int64), ordinals, sums, rates)

    def _close_block(self) -> None:
        """Send the block on the device to the host; take up the one before, which has arrived meanwhile."""
        self.pull()
        if self._block is not None and self._steps:
            self._absorb()
            self._arriving = block = self._open_block()
            self._count += len(self._steps)
            if block.sums.device.type == "cuda":
                host = torch.empty(block.sums.shape, dtype=block.sums.dtype, pin_memory=True)
                host.copy_(block.sums, non_blocking=True)
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(block.sums.device))
                block.sums, block.event = host, event
            else:
                block.sums = block.sums.cpu()
        self._block, self._steps, self._rates = None, [], []

    def _absorb(self) -> None:
        """Store the block that was on its way, on disk if asked."""
        if self._arriving is None:
            return
        block, self._arriving = self._arriving.on_host(), None
        if self._folder is not None:
            self._folder.append(self._history_of([block]))
        self._blocks.append(block)
        self._held += len(block)
        self._join(len(self._blocks) - 1)

    def _make_room(self) -> None:
        """Thin the record until another block fits in; its last block, which tells the next step, stays."""
        if self._limit is None:
            return
        arriving = 0 if self._arriving is None else len(self._arriving)
        while self._held + arriving + self._size > self._limit:
            others = self._blocks if arriving else self._blocks[:-1]
            dense = (i for i, block in enumerate(others) if block.stride < self._stride)
            if (i := next(dense, None)) is None:
                self._stride *= 2
                continue
            before = len(self._blocks[i])
            self._blocks[i] = self._blocks[i].thinned(self._stride)
            self._held -= before - len(self._blocks[i])
            self._join(i)

    def _join(self, i: int) -> None:
        """Put block `i` and the one before together if they are small."""
        if i:
            pair = self._blocks[i - 1 : i + 1]
            if pair[0].stride == pair[1].stride and len(pair[0]) + len(pair[1]) <= self._size:
                self._blocks[i - 1 : i + 1] = [_joined(pair, len(self._layer_names))]

    # ---- reading -----------------------------------------------------------------------------------------

    @property
    def layer_names(self) -> tuple[str, ...]:
        """L names."""
        return self._layer_names

    @property
    def steps(self) -> np.ndarray:
        """Numbers of the measured steps, the optimizer's first being 0: int64, shape (T,)."""
        self.pull()
        parts = [block.steps for block in (*self._blocks, self._arriving) if block is not None]
        return np.concatenate([*parts, np.array(self._steps, np.int64)])

    @property
    def dot(self) -> np.ndarray:
        """<g_t, g_{t-1}>: float64, shape (T, L)."""
        return self._sum("dot")

    @property
    def sq_norm(self) -> np.ndarray:
        """||g_t||^2: float64, shape (T, L)."""
        return self._sum("sq_norm")

    @property
    def diff_sq_norm(self) -> np.ndarray:
        """||g_t - g_{t-1}||^2: float64, shape (T, L)."""
        return self._sum("diff_sq_norm")

    @property
    def prev_sq_norm(self) -> np.ndarray:
        """||g_{t-1}||^2: float64, shape (T, L)."""
        return self._sum("prev_sq_norm")

    @property
    def alignment(self) -> np.ndarray:
        """<g_t, b_{t-1}>, with b_{t-1} the momentum buffer as the step finds it: float64, shape (T, L).

        The buffer is b_t = momentum b_{t-1} + (1 - dampening) (g_t + weight_decay x_t), with g_t negated to
        maximize (here, too), and without weight decay where `adapt` bounds the update. NaN without momentum.
        """
        return self._sum("alignment")

    @property
    def momentum_sq_norm(self) -> np.ndarray:
        """||b_{t-1}||^2: float64, shape (T, L); NaN without momentum."""
        return self._sum("momentum_sq_norm")

    @property
    def correlation_stderr(self) -> np.ndarray:
        """Standard error of `correlation()` where it is estimated, else 0: float64, shape (T, L)."""
        return self._sum("correlation_stderr")

    @property
    def lr(self) -> np.ndarray:
        """Learning rate of the step: float64, shape (T, L); NaN where a layer's parameters differ in it."""
        return self._rate("lr")

    @property
    def prev_lr(self) -> np.ndarray:
        """Learning rate of the step before: float64, shape (T, L)."""
        return self._rate("prev_lr")

    @property
    def step_scale(self) -> np.ndarray:
        """Multiplier of the learning rate in the step: float64, shape (T, L), all ones without adaptation."""
        return self._sum("step_scale")

    @property
    def prev_step_scale(self) -> np.ndarray:
        """Multiplier of the learning rate in the step before: float64, shape (T, L)."""
        return self._sum("prev_step_scale")

    @property
    def prev_step_size(self) -> np.ndarray:
        """Learning rate times scale of the step before, the one from t - 1 to t: float64, shape (T, L)."""
        return self.prev_lr * self.prev_step_scale

    def correlation(self, window: int | None = None) -> np.ndarray:
        """mu_t for every layer: float64, shape (T, L); paper, eq. (2).

        Args:
            window: the mean over the last `window` iterations instead, that is over their at most
                `window` - 1 adjacent pairs (paper, Sec. II-A); pairs that are NaN are left out.

        Raises:
            ValueError: `window` is less than 2.
        """
        mu = measures.correlation(self.dot, self.sq_norm, self.prev_sq_norm)
        return mu if window is None else self._trailing_mean(mu, window)

    def global_correlation(self, window: int | None = None) -> np.ndarray:
        """mu_t of all layers together: float64, shape (T,); see :meth:`correlation`."""
        mu = measures.correlation(self.dot.sum(1), self.sq_norm.sum(1), self.prev_sq_norm.sum(1))
        return mu if window is None else self._trailing_mean(mu[:, None], window)[:, 0]

    def alignment_correlation(self, window: int | None = None) -> np.ndarray:
        """cos(g_t, b_{t-1}), of the gradient with the momentum, for every layer: float64, shape (T, L).

        Args:
            window: the mean over the last `window` - 1 steps instead, as in :meth:`correlation`.

        Raises:
            ValueError: `window` is less than 2.
        """
        cos = measures.correlation(self.alignment, self.sq_norm, self.momentum_sq_norm)
        return cos if window is None else self._trailing_mean(cos, window)

    def global_alignment_correlation(self, window: int | None = None) -> np.ndarray:
        """The same of all layers together: float64, shape (T,)."""
        cos = measures.correlation(self.alignment.sum(1), self.sq_norm.sum(1), self.momentum_sq_norm.sum(1))
        return cos if window is None else self._trailing_mean(cos[:, None], window)[:, 0]

    def global_correlation_stderr(self) -> np.ndarray:
        """Standard error of :meth:`global_correlation` where it is estimated, else 0: float64, shape (T,)."""
        product = self.sq_norm * self.prev_sq_norm
        variance = np.where(product == 0, 0.0, self.correlation_stderr**2 * product)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.sqrt(variance.sum(1) / (self.sq_norm.sum(1) * self.prev_sq_norm.sum(1)))

    def curvature(self) -> np.ndarray:
        """Directional curvature kappa_t along the step from t - 1 to t: float64, shape (T, L).

        Holds for plain gradient descent; momentum and weight decay move along another direction.
        """
        return measures.curvature(self.dot, self.prev_sq_norm, self.prev_step_size)

    def smoothness(self) -> np.ndarray:
        """Directional smoothness along the step from t - 1 to t: float64, shape (T, L)."""
        return measures.smoothness(self.diff_sq_norm, self.prev_sq_norm, self.prev_step_size)

    def pairwise(
        self, layer: str | None = None, steps: Sequence[int] | np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The correlation of any two steps' gradients, from their sketches, and its standard error.

        Args:
            layer: the layer's name; None: all layers together.
            steps: numbers of T steps. Default: all that are held; T^2 numbers are returned.

        Returns:
            Two arrays, float64, shape (T, T), symmetric; the diagonals are 1 and 0. NaN where a norm is 0 or
            not finite.

        Raises:
            ValueError: there are no sketches, or a step is not held: it was thinned out, not measured or
                not taken.
            KeyError: there is no such layer.
        """
        held = self.steps
        chosen = held if steps is None else np.asarray(steps, np.int64)
        places = np.searchsorted(held, chosen)
        found = places < len(held)
        found[found] = held[places[found]] == chosen[found]
        if not found.all():
            raise ValueError(
                f"step {chosen[~found][0]} is not in the history: it was thinned out, not measured or not "
                "taken; `steps` has those that are there"
            )
        correlation, stderr = self._estimates(layer, places, lambda v: v @ v.T, lambda n: n[:, None] * n)
        known = np.isfinite(correlation.diagonal())
        correlation[np.diag_indices(len(chosen))] = np.where(known, 1.0, np.nan)
        stderr[np.diag_indices(len(chosen))] = np.where(known, 0.0, np.nan)
        return correlation, stderr

    def lagged_correlation(self, lag: int, layer: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The correlation of each step's gradient with that of `lag` steps before, and its standard error.

        Args:
            lag: at least 1.
            layer: the layer's name; None: all layers together.

        Returns:
            Two arrays, float64, shape (T,); NaN where the earlier step is not held.

        Raises:
            ValueError: there are no sketches, or `lag` is less than 1.
            KeyError: there is no such layer.
        """
        if lag < 1:
            raise ValueError(f"Invalid lag: {lag}; use a number of steps, 1 or more")
        held = self.steps
        later = np.flatnonzero(np.isin(held - lag, held))
        earlier = np.searchsorted(held, held[later] - lag)
        places, n = np.concatenate([earlier, later]), len(later)
        both = self._estimates(layer, places, lambda v: (v[:n] * v[n:]).sum(1), lambda x: x[:n] * x[n:])
        values = np.full((2, len(held)), np.nan)
        values[:, later] = both
        return values[0], values[1]

    def _estimates(
        self,
        layer: str | None,
        places: np.ndarray,
        products: Callable[[np.ndarray], np.ndarray],
        outer: Callable[[np.ndarray], np.ndarray],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Correlations and their standard errors of pairs of the steps at `places`.

        `products` and `outer` pair up vectors, (n, k'), and numbers, (n,).
        """
        k = self._sketches
        if k is None:
            raise ValueError(
                "the history holds no sketches; make the optimizer with measure='sketch' and "
                "history=History(sketches=256)"
            )
        if layer is not None and layer not in self._layer_names:
            raise KeyError(f"no layer {layer!r}; there are {', '.join(self._layer_names)}")
        chosen = range(len(self._layer_names)) if layer is None else [self._layer_names.index(layer)]
        sq_norms = self.sq_norm[places]
        width, first = len(self._layer_names), len(RECORDED)
        dot: float | np.ndarray = 0.0
        variance: float | np.ndarray = 0.0
        total: float | np.ndarray = 0.0
        blocks = self._all_blocks()
        for i in chosen:
            rows = [_widened(block.sums[:, first:], width)[:, :, i : i + 1] for block in blocks]
            vectors = _unpacked(np.concatenate([np.zeros((0, k // 2, 1)), *rows]))[places, 0].astype(
                np.float64
            )
            weight = outer(np.sqrt(sq_norms[:, i]))
            with np.errstate(divide="ignore", invalid="ignore"):
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
                cosine = np.clip(products(vectors), -1.0, 1.0)
                rest = 1 - cosine * cosine
                # A layer without a gradient adds nothing.
                dot = dot + np.where(weight == 0, 0.0, weight * cosine * (1 + rest / (2 * k)))
                variance = variance + np.where(weight == 0, 0.0, (weight * rest) ** 2 / k)
            total = total + sq_norms[:, i]
        norms = outer(np.sqrt(total))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.clip(dot / norms, -1.0, 1.0), np.sqrt(variance) / norms

    def drain(self) -> History:
        """What is new since the last call, as a history of its own; everything, the first time.

        For live logging: it waits for the device, once, and its cost depends on what is new only. What
        :class:`History` thinned out before it was asked for is gone: drain at least every 256 steps (or
        `limit` / 4, if that is less).
        """
        self.pull()
        blocks: list[_Block[np.ndarray]] = []
        held: list[_Block[np.ndarray] | _Block[Tensor]] = [*self._blocks]
        if self._arriving is not None:
            held.append(self._arriving)
        for block in reversed(held):
            if block.steps[-1] <= self._drained:
                break
            blocks.insert(0, block.on_host().where(block.steps > self._drained))
        if self._steps and self._steps[-1] > self._drained:
            first = int(np.searchsorted(self._steps, self._drained, side="right"))
            blocks.append(self._open_block(first).on_host())
        self._drained = self.next_step - 1
        return self._history_of(blocks)

    def to_numpy(self) -> dict[str, np.ndarray]:
        """Everything as arrays: `steps` (T,), `layer_names` (L,), the sums, rates and measures (T, L)."""
        return {
            "steps": self.steps,
            "layer_names": np.array(self.layer_names, str),
            **{name: getattr(self, name) for name in (*RECORDED, *_HOST)},
            "correlation": self.correlation(),
            "curvature": self.curvature(),
        }

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each step and layer, indexed by both. Needs pandas.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("History.to_pandas needs pandas: pip install pandas") from error
        arrays = self.to_numpy()
        levels = [arrays.pop("steps"), arrays.pop("layer_names")]
        index = pandas.MultiIndex.from_product(levels, names=["step", "layer"])
        return pandas.DataFrame({k: v.ravel() for k, v in arrays.items()}, index=index)

    def to_xarray(self) -> xarray.Dataset:
        """A dataset with the dimensions `step` and `layer`. Needs xarray.

        Raises:
            ImportError: xarray is not installed.
        """
        try:
            import xarray
        except ImportError as error:
            raise ImportError("History.to_xarray needs xarray: pip install xarray") from error
        arrays = self.to_numpy()
        coordinates = {"step": arrays.pop("steps"), "layer": arrays.pop("layer_names")}
        return xarray.Dataset({k: (("step", "layer"), v) for k, v in arrays.items()}, coordinates)

    def last(self, count: int) -> History:
        """The last `count` of the steps that are held, as a history of its own."""
        blocks: list[_Block] = []
        for block in reversed(self._all_blocks()):
            if count <= 0:
                break
            blocks.insert(0, block.between(max(0, len(block) - count), len(block)))
            count -= len(block)
        return self._history_of(blocks)

    def summary(self, last: int = 500) -> Summary:
        """What the last steps say of each layer and of all together: ``print(history.summary())``.

        Args:
            last: how many of the measured steps that are held.

        Raises:
            ValueError: `last` is less than 1.
        """
        from .summary import summarise

        return summarise(self, last)

    def report(self, path: str | os.PathLike, title: str | None = None) -> None:
        """Write one page that shows the record and opens without a network. Needs matplotlib.

        Args:
            path: of the .html file, which appears when it is whole.
            title: above the page. Default: what was measured.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the history holds no steps.
        """
        from .report import write

        write(path, [self], title)

    # ---- files -------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write an .npz file, whole or not at all: `format`, `steps`, `layer_names` and the arrays."""
        with atomic.writing(path) as file:
            np.savez_compressed(file, **self._arrays())

    @classmethod
    def load(cls, path: str | os.PathLike) -> History:
        """Read a file that :meth:`save` wrote, or a folder of :meth:`stream_to`; nothing in it is executed.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, of another version, or something else.
        """
        path = Path(path)
        if path.is_dir():
            return cls._from_folder(path)
        try:
            file = np.load(path, allow_pickle=False)
            if isinstance(file, np.ndarray):  # .npy
                raise ValueError("it holds a single array")
            with file:
                data = {name: file[name] for name in file.files}
        except FileNotFoundError:
            raise
        except Exception as error:  # of a damaged file: zlib's and zipfile's own, NotImplementedError, ...
            raise ValueError(f"{os.fspath(path)!r} is no history, or a damaged one: {error}") from None
        return cls._from_arrays(data, repr(os.fspath(path)))

    def stream_to(self, folder: str | os.PathLike) -> None:
        """From now on also append every step to `folder`, thinned or not, in files of up to 256 steps.

        A file appears when it is complete; a kill loses the steps that were not written yet, which
        :meth:`flush` writes. What the folder lacks of the record so far is written first. Where this history
        goes on from a point before the folder's end (a run resumed from a checkpoint), it replaces what the
        folder has from there on. ``History.load(folder)`` reads all of it. With several processes, call it in
        one.

        Raises:
            ValueError: the folder holds the record of another run, and this history is empty.
        """
        target = _Folder(Path(folder))
        if target.last >= 0 and not len(self):
            raise ValueError(
                f"{os.fspath(folder)!r} holds a record up to step {target.last} already; go on with "
                "History.load of it, or give another folder"
            )
        target.last = min(target.last, self.next_step - 1)
        self._close_block()
        self._absorb()
        if self._blocks:
            target.append(self._history_of(self._blocks))
        self._folder = target

    def flush(self) -> None:
        """Write what :meth:`stream_to` has not written yet."""
        self._close_block()
        self._absorb()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and strings only: `torch.load(..., weights_only=True)` reads it back."""
        arrays = {
            name: torch.from_numpy(np.array(value)) for name, value in self._arrays(names=False).items()
        }
        about = json.dumps(self.about)
        return arrays | {"format": _FORMAT, "layer_names": list(self.layer_names), "about": about}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> History:
        """The history that :meth:`state_dict` described.

        Raises:
            ValueError: `state` is of another version, or something else.
        """
        return cls._from_arrays({k: np.asarray(v) for k, v in state.items()}, "state")

    def _arrays(self, names: bool = True) -> dict[str, Any]:
        """What a file holds: format, limit (-1: none), steps so far, the last drained one, and the rest."""
        whole = _joined(self._all_blocks(), len(self._layer_names))
        return {
            "format": np.array(_FORMAT),
            "limit": np.array(-1 if self._limit is None else self._limit),
            "count": np.array(self._count + len(self._steps)),
            "drained": np.array(self._drained),
            "steps": whole.steps,
            "ordinals": whole.ordinals,
            **(
                {"layer_names": np.array(self.layer_names, str), "about": np.array(json.dumps(self.about))}
                if names
                else {}
            ),
            **{name: np.ascontiguousarray(whole.sums[:, i]) for i, name in enumerate(RECORDED)},
            **whole.rates,
            **self._sketch_arrays(whole),
        }

    def _sketch_arrays(self, whole: _Block[np.ndarray]) -> dict[str, np.ndarray]:
        """The sketches, float32, (T, L, k'), and the seeds of the layers'; -1: a layer has none yet."""
        if self._sketches is None:
            return {}
        seeds = [self._seeds.get(name, -1) for name in self._layer_names]
        vectors = _unpacked(whole.sums[:, len(RECORDED) :])
        return {
            "sketches": vectors.reshape(len(whole), len(seeds), self._sketches),
            "sketch_seeds": np.array(seeds, np.int64),
        }

    @classmethod
    def _from_arrays(cls, data: dict[str, np.ndarray], source: str) -> History:
        if missing := [name for name in ("format", "steps", "layer_names") if name not in data]:
            raise ValueError(f"{source} is no history: it lacks {missing[0]!r}")
        if int(data["format"]) != _FORMAT:
            raise ValueError(
                f"{source} is a history of format {int(data['format'])}, this oscopt reads {_FORMAT}"
            )
        if missing := [name for name in (*RECORDED, *_HOST) if name not in data]:
            raise ValueError(f"{source} is damaged: it lacks {missing[0]!r}")
        count = len(data["steps"])
        shape = (count, len(data["layer_names"]))
        for name in (*RECORDED, *_HOST):
            if data[name].shape != shape:
                raise ValueError(f"{source} is damaged: {name!r} has shape {data[name].shape}, not {shape}")
        sketches = None
        if "sketches" in data:
            sketches = data["sketches"].shape[-1]
            if data["sketches"].shape != (*shape, sketches) or data["sketch_seeds"].shape != shape[1:]:
                raise ValueError(f"{source} is damaged: 'sketches' has shape {data['sketches'].shape}")
        limit = int(data.get("limit", 32_768))
        history = cls(None if limit < 0 else limit, sketches)
        history._layer_names = tuple(str(name) for name in data["layer_names"])
        if sketches is not None:
            seeds = zip(history._layer_names, data["sketch_seeds"].tolist(), strict=True)
            history._seeds = {name: seed for name, seed in seeds if seed >= 0}
        history._count = int(data.get("count", count))
        history._drained = int(data.get("drained", -1))
        history.about = json.loads(str(data.get("about", "{}")))
        ordinals = np.asarray(data.get("ordinals", np.arange(count)), np.int64)
        if count:
            sums = np.stack([data[name] for name in RECORDED], axis=1)
            if sketches is not None:
                vectors = torch.from_numpy(np.asarray(data["sketches"], np.float32))
                sums = np.concatenate([sums, packed(vectors).numpy()], axis=1)
            rates = {name: np.asarray(data[name]) for name in _HOST}
            block = _Block(np.asarray(data["steps"], np.int64), ordinals, sums, rates)
            history._blocks = [block.between(i, i + history._size) for i in range(0, count, history._size)]
            history._held = count
        return history

    @classmethod
    def _from_folder(cls, folder: Path) -> History:
        parts = [cls.load(path) for path in _files(folder)]
        if not parts:
            raise ValueError(f"{os.fspath(folder)!r} is no history: it holds no files of steps")
        history = parts[-1]
        blocks: list[_Block[np.ndarray]] = []
        for part in parts:  # a later file replaces what earlier ones have of its steps and those after
            if part.layer_names != history.layer_names[: len(part.layer_names)]:
                raise ValueError(
                    f"{os.fspath(folder)!r} mixes records of the layers {_some(part.layer_names)} and "
                    f"{_some(history.layer_names)}"
                )
            blocks = [block.where(block.steps < part._blocks[0].steps[0]) for block in blocks]
            blocks = [block for block in blocks if len(block)] + part._blocks
        history._blocks, history._held = blocks, sum(map(len, blocks))
        history._count = int(blocks[-1].ordinals[-1]) + 1
        return history

    def __getstate__(self) -> dict[str, Any]:
        self._close_block()
        self._absorb()
        return self.__dict__ | {"_folder": None, "_source": None}

    # ---- inside ------------------------------------------------------------------------------------------

    def _all_blocks(self) -> list[_Block[np.ndarray]]:
        self.pull()
        blocks = list(self._blocks)
        if self._arriving is not None:
            blocks.append(self._arriving.on_host())
        if self._steps:
            blocks.append(self._open_block().on_host())
        return blocks

    def _history_of(self, blocks: Sequence[_Block[np.ndarray]]) -> History:
        history = History(limit=None, sketches=self._sketches)
        history.about = dict(self.about)
        history._seeds = dict(self._seeds)
        history._layer_names, history._blocks = self._layer_names, list(blocks)
        history._held = sum(map(len, blocks))
        history._count = int(blocks[-1].ordinals[-1]) + 1 if blocks else 0
        return history

    def _sum(self, name: str) -> np.ndarray:
        row, width = RECORDED.index(name), len(self._layer_names)
        parts = (_widened(block.sums[:, row], width) for block in self._all_blocks())
        return np.concatenate([np.zeros((0, width)), *parts])

    def _rate(self, name: str) -> np.ndarray:
        width = len(self._layer_names)
        parts = (_widened(block.rates[name], width) for block in self._all_blocks())
        return np.concatenate([np.zeros((0, width)), *parts])

    def _trailing_mean(self, mu: np.ndarray, window: int) -> np.ndarray:
        if window < 2:
            raise ValueError(f"Invalid window: {window}; at least 2 iterations make a pair")
        known = np.isfinite(mu)
        zero = np.zeros((1, mu.shape[1]))
        total = np.concatenate([zero, np.cumsum(np.where(known, mu, 0.0), axis=0)])
        count = np.concatenate([zero, np.cumsum(known, axis=0)])
        # The pair (t - 1, t) lies in the last `window` iterations before s if s - window + 1 < t <= s.
        first = np.searchsorted(self.steps, self.steps - window + 2)
        last = np.arange(1, len(mu) + 1)
        with np.errstate(invalid="ignore"):
            return (total[last] - total[first]) / (count[last] - count[first])


@dataclass(slots=True)
class _Block(Generic[Array]):
    """Consecutive steps of a record.

    Attributes:
        steps: their numbers, (n,).
        ordinals: how many steps were recorded before each, (n,).
        sums: (n, 9, layers); a tensor until :meth:`on_host`, an array from then on.
        rates: `lr` and `prev_lr`, (n, layers); one row in memory where they do not change.
        stride: every ordinal is a multiple of it.
        event: when `sums` has arrived.
    """

    steps: np.ndarray
    ordinals: np.ndarray
    sums: Array
    rates: dict[str, np.ndarray]
    stride: int = 1
    event: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def on_host(self) -> _Block[np.ndarray]:
        if not isinstance(self.sums, Tensor):
            return self
        if self.event is not None:
            self.event.synchronize()
        return _Block(self.steps, self.ordinals, self.sums.cpu().numpy(), self.rates, self.stride)

    def between(self, first: int, last: int) -> _Block[Array]:
        rates = {name: rate[first:last] for name, rate in self.rates.items()}
        part = slice(first, last)
        return replace(
            self,
            steps=self.steps[part],
            ordinals=self.ordinals[part],
            sums=self.sums[part],
            rates=rates,
        )

    def where(self, chosen: np.ndarray) -> _Block[Array]:
        """The chosen steps only, without the memory of the others."""
        if chosen.all():
            return self
        rates = {}
        for name, rate in self.rates.items():
            constant = len(rate) and rate.strides[0] == 0
            rates[name] = (
                np.broadcast_to(rate[0], (chosen.sum(), rate.shape[1])) if constant else rate[chosen]
            )
        return replace(
            self,
            steps=self.steps[chosen],
            ordinals=self.ordinals[chosen],
            sums=self.sums[chosen],
            rates=rates,
        )

    def thinned(self, stride: int) -> _Block[Array]:
        return (
            self if stride == self.stride else replace(self.where(self.ordinals % stride == 0), stride=stride)
        )


def _joined(blocks: Sequence[_Block[np.ndarray]], width: int) -> _Block[np.ndarray]:
    """One block of `width` layers."""
    none = np.zeros(0, np.int64)
    rows = blocks[0].sums.shape[1] if blocks else len(RECORDED)
    rates = {}
    for name in _HOST:
        parts = [block.rates[name] for block in blocks if len(block)]
        row = parts[0][:1] if parts else np.zeros((1, width))
        if all(p.strides[0] == 0 and np.array_equal(p[:1], row, equal_nan=True) for p in parts):
            rates[name] = np.broadcast_to(_widened(row, width)[0], (sum(map(len, parts)), width))
        else:
            rates[name] = np.concatenate([_widened(p, width) for p in parts])
    return _Block(
        np.concatenate([none, *(block.steps for block in blocks)]),
        np.concatenate([none, *(block.ordinals for block in blocks)]),
        np.concatenate([np.zeros((0, rows, width)), *(_widened(b.sums, width) for b in blocks)]),
        rates,
        blocks[0].stride if blocks else 1,
    )


class _Folder:
    """Files of consecutive steps, each whole or not there.

    Attributes:
        last: the number of the last step that is to stay, -1: none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        files = _files(path)
        self.last = int(History.load(files[-1]).steps[-1]) if files else -1
        self._next = int(files[-1].stem.split("-")[1]) + 1 if files else 0

    def append(self, history: History) -> None:
        new = history._history_of(
            [b for b in (x.where(x.steps > self.last) for x in history._blocks) if len(b)]
        )
        if len(new):
            with atomic.writing(self.path / f"steps-{self._next:08d}.npz") as file:
                np.savez(file, **new._arrays())
            self._next, self.last = self._next + 1, int(new.steps[-1])


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("steps-????????.npz"))


def packed(vectors: Tensor) -> Tensor:
    """float32 (..., L, k') as float64 (..., k' / 2, L), two of them in the place of one: a record's row."""
    pairs = vectors.unflatten(-1, (-1, 2)).transpose(-3, -2).contiguous()
    return pairs.view(torch.float64).squeeze(-1)


def _unpacked(rows: np.ndarray) -> np.ndarray:
    """What :func:`packed` was given."""
    pairs = np.ascontiguousarray(rows)[..., None].view(np.float32)
    return np.moveaxis(pairs, -3, -2).reshape(*rows.shape[:-2], rows.shape[-1], 2 * rows.shape[-2])


def _widened(rows: np.ndarray, width: int) -> np.ndarray:
    """`rows` with NaN for layers that came later, which are the last axis."""
    missing = width - rows.shape[-1]
    if not missing:
        return rows
    return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)], constant_values=np.nan)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "") if names else "none"
