"""The record of a run, on the host: the sums of every measured step and layer, and what follows from them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from . import history_files, measures
from .history_files import Contents, Folder
from .layers import some
from .rows import RATES, RECORDED, Block, OpenBlock, Rows, height, joined, unpacked, widened

if TYPE_CHECKING:
    import pandas
    import xarray

    from .summary import Summary

_SKETCHES = tuple(1 << i for i in range(4, 11))
_BLOCK = 256  # steps in a block, or fewer: a quarter of `limit`


class Source(Protocol):
    """Where steps come from: :class:`oscopt.device_log.DeviceLog`."""

    def take(self) -> list[Rows]:
        """The steps that have not been taken yet; waits for the device."""


class History:
    """Sums, learning rates and what follows from them, for T measured steps and L layers.

    Steps gather on the device of the parameters (:mod:`oscopt.device_log`) and move here in blocks, so that
    recording never waits for the device; reading does. A layer's row is NaN where there is nothing to
    compare: in the first step, after a step in which other parameters of the layer had gradients, and where
    the previous gradient was overwritten. Sums that are not finite are NaN.

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

    def __init__(self, limit: int | None = history_files.LIMIT, sketches: int | None = None) -> None:
        if limit is not None and limit < 2 * _BLOCK:
            raise ValueError(f"Invalid limit: {limit}; use at least {2 * _BLOCK} steps, or None")
        if sketches is not None and sketches not in _SKETCHES:
            raise ValueError(f"Invalid sketches: {sketches!r}; use one of {', '.join(map(str, _SKETCHES))}")
        self.about: dict[str, Any] = {}
        self._limit = limit
        self._sketches = sketches
        self._seeds: dict[str, int] = {}  # of the layers' sketches
        self._layer_names: tuple[str, ...] = ()
        self._current: tuple[str, ...] = ()  # the layers that rows are of now
        self._columns: list[int] | None = None  # where they are in the record, if not in the same places
        self._blocks: list[Block] = []  # the oldest first
        self._open: OpenBlock | None = None  # the newest
        self._count = 0  # steps recorded so far, dropped ones included
        self._stride = 1  # of these, every so many are held
        self._drained = -1  # the last step that drain() gave out
        self._folder: Folder | None = None
        self._source: Source | None = None

    def __len__(self) -> int:
        return sum(map(len, self._held()))

    def __repr__(self) -> str:
        steps = self.steps
        span = f"steps {steps[0]} to {steps[-1]}" if len(steps) else "no steps"
        return f"History({span}, {len(self._layer_names)} layers)"

    # ---- recording (the optimizer's side) ----------------------------------------------------------------

    @property
    def next_step(self) -> int:
        """The number of the step after the last one recorded."""
        steps = (block.steps for block in reversed(self._held()) if len(block))
        return int(next(steps, (-1,))[-1]) + 1

    @property
    def sketches(self) -> int | None:
        """How many floats are kept of each layer's gradient, if any."""
        return self._sketches

    @property
    def block_size(self) -> int:
        """How many steps are to gather on the device before they move here."""
        return _BLOCK if self._limit is None else min(_BLOCK, self._limit // 4)

    def read_from(self, source: Source) -> None:
        """From now on steps come from `source`, which has what is not here yet."""
        self._pull()
        self._source = source

    def reads_from(self, source: Source) -> bool:
        """Whether steps come from `source`."""
        return self._source is source

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
                f"history holds layers {some(self._layer_names)}, the optimizer has {some(names)}; "
                "pass the history of the same model, or none"
            )
        if names != self._current:
            self._pull()
            if not self._count:
                self._layer_names = ()
            self._layer_names += tuple(name for name in names if name not in self._layer_names)
            self._current = names
            place = {name: i for i, name in enumerate(self._layer_names)}
            columns = [place[name] for name in names]
            self._columns = None if columns == list(range(len(place))) else columns

    def extend(self, rows: Rows) -> None:
        """Add steps, of the layers that :meth:`add_layers` was last called with."""
        first, count = 0, len(rows.steps)
        while first < count:
            block = self._open
            if block is None or not block.room or block.width != len(self._layer_names):
                block = self._new_block()
            last = min(first + block.room, count)
            block.add(Rows(*(part[first:last] for part in rows)), self._columns)
            self._count += last - first
            first = last

    def cut(self, step: int) -> None:
        """Forget the steps from number `step` on: the run goes back to where it was before that step."""
        if self.next_step <= step:
            return
        self._close()
        self._blocks = [b for b in (block.where(block.steps < step) for block in self._blocks) if len(b)]
        self._count = int(self._blocks[-1].ordinals[-1]) + 1 if self._blocks else 0
        self._drained = min(self._drained, step - 1)
        if self._folder is not None:
            self._folder.last = min(self._folder.last, step - 1)

    def _new_block(self) -> OpenBlock:
        self._close()
        self._thin()
        width = len(self._layer_names)
        self._open = OpenBlock(self.block_size, height(self._sketches), width, self._count)
        return self._open

    def _close(self) -> None:
        """Close the block that is being filled, and write it where all is to be on disk."""
        if self._open is None:
            return
        block = self._open.closed()
        if len(block):
            if self._folder is not None:
                self._folder.append(self._contents([block]))
            self._blocks.append(block)
            self._join(len(self._blocks) - 1)
        self._open = None

    def _thin(self) -> None:
        """Drop steps until another block fits in; the last block, which tells the next step, stays."""
        if self._limit is None:
            return
        while sum(map(len, self._blocks)) + self.block_size > self._limit:
            dense = (i for i, block in enumerate(self._blocks[:-1]) if block.stride < self._stride)
            if (i := next(dense, None)) is None:
                self._stride *= 2
            else:
                self._blocks[i] = self._blocks[i].thinned(self._stride)
                self._join(i)

    def _join(self, i: int) -> None:
        """Put block `i` and the one before together if they are small."""
        if i:
            one, other = self._blocks[i - 1 : i + 1]
            if one.stride == other.stride and len(one) + len(other) <= self.block_size:
                self._blocks[i - 1 : i + 1] = [self._joined([one, other])]

    def _pull(self) -> None:
        """Take what the source has."""
        for rows in self._source.take() if self._source is not None else ():
            self.extend(rows)

    def _held(self) -> list[Block]:
        """All blocks."""
        self._pull()
        return [*self._blocks, *([] if self._open is None else [self._open.so_far()])]

    # ---- reading -----------------------------------------------------------------------------------------

    @property
    def layer_names(self) -> tuple[str, ...]:
        """L names."""
        return self._layer_names

    @property
    def steps(self) -> np.ndarray:
        """Numbers of the measured steps, the optimizer's first being 0: int64, shape (T,)."""
        return np.concatenate([np.zeros(0, np.int64), *(block.steps for block in self._held())])

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
        if self._sketches is None:
            raise ValueError(
                "the history holds no sketches; make the optimizer with measure='sketch' and "
                "history=History(sketches=256)"
            )
        if layer is not None and layer not in self._layer_names:
            raise KeyError(f"no layer {layer!r}; there are {', '.join(self._layer_names)}")
        chosen = range(len(self._layer_names)) if layer is None else [self._layer_names.index(layer)]
        blocks, width = self._held(), len(self._layer_names)
        sq_norms = self.sq_norm[places]
        layers = []
        for i in chosen:
            values = [widened(b.values[:, len(RECORDED) :], width)[:, :, i : i + 1] for b in blocks]
            vectors = unpacked(np.concatenate([np.zeros((0, self._sketches // 2, 1)), *values]))
            layers.append((vectors[places, 0], sq_norms[:, i]))
        return measures.sketched_correlation(layers, products, outer)

    def drain(self) -> History:
        """What is new since the last call, as a history of its own; everything, the first time.

        For live logging: it waits for the device, once, and its cost depends on what is new only. What
        :class:`History` thinned out before it was asked for is gone: drain at least every 256 steps (or
        `limit` / 4, if that is less).
        """
        blocks: list[Block] = []
        for block in reversed(self._held()):
            if not len(block) or block.steps[-1] <= self._drained:
                break
            blocks.insert(0, block.where(block.steps > self._drained))
        self._drained = self.next_step - 1
        return self._history_of(blocks)

    def to_numpy(self) -> dict[str, np.ndarray]:
        """Everything as arrays: `steps` (T,), `layer_names` (L,), the sums, rates and measures (T, L)."""
        return {
            "steps": self.steps,
            "layer_names": np.array(self.layer_names, str),
            **{name: getattr(self, name) for name in (*RECORDED, *RATES)},
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
        blocks: list[Block] = []
        for block in reversed(self._held()):
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
        """Write an .npz file, whole or not at all: `format`, `steps`, `layer_names` and the arrays.

        Raises:
            OSError: it cannot be written; what was there stays.
        """
        history_files.write(path, self._contents(self._held()))

    @classmethod
    def load(cls, path: str | os.PathLike) -> History:
        """Read a file that :meth:`save` wrote, or a folder of :meth:`stream_to`; nothing in it is executed.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, of another version, or something else.
        """
        return cls._of(history_files.read(Path(path)))

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
        target = Folder(Path(folder))
        if target.last >= 0 and not len(self):
            raise ValueError(
                f"{os.fspath(folder)!r} holds a record up to step {target.last} already; go on with "
                "History.load of it, or give another folder"
            )
        target.last = min(target.last, self.next_step - 1)
        target.append(self._contents(self._held()))
        self._folder = target

    def flush(self) -> None:
        """Write what :meth:`stream_to` has not written yet."""
        if self._folder is not None:
            new = [block for block in self._held() if len(block) and block.steps[-1] > self._folder.last]
            self._folder.append(self._contents(new))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and strings only: `torch.load(..., weights_only=True)` reads it back."""
        contents = self._contents(self._held())
        arrays = {name: torch.from_numpy(np.array(value)) for name, value in contents.arrays().items()}
        about = json.dumps(self.about)
        return arrays | {
            "format": history_files.FORMAT,
            "layer_names": list(self.layer_names),
            "about": about,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> History:
        """The history that :meth:`state_dict` described.

        Raises:
            ValueError: `state` is of another version, or something else.
        """
        return cls._of(history_files.parsed({key: np.asarray(v) for key, v in state.items()}, "state"))

    def __getstate__(self) -> dict[str, Any]:
        self._pull()
        return self.__dict__ | {"_folder": None, "_source": None}

    # ---- inside ------------------------------------------------------------------------------------------

    def _contents(self, blocks: Sequence[Block]) -> Contents:
        return Contents(
            limit=self._limit,
            sketches=self._sketches,
            layers=self._layer_names,
            block=self._joined(blocks),
            count=self._count,
            drained=self._drained,
            about=dict(self.about),
            seeds=dict(self._seeds),
        )

    @classmethod
    def _of(cls, contents: Contents) -> History:
        history = cls(contents.limit, contents.sketches)
        history.about, history._seeds = contents.about, contents.seeds
        history._layer_names, history._count = contents.layers, contents.count
        history._drained = contents.drained
        block, size = contents.block, history.block_size
        history._blocks = [block.between(i, i + size) for i in range(0, len(block), size)]
        return history

    def _history_of(self, blocks: Sequence[Block]) -> History:
        """These blocks as a history of its own."""
        history = self._of(replace(self._contents(()), limit=None, drained=-1))
        history._blocks = list(blocks)
        history._count = int(blocks[-1].ordinals[-1]) + 1 if blocks else 0
        return history

    def _joined(self, blocks: Sequence[Block]) -> Block:
        return joined(blocks, height(self._sketches), len(self._layer_names))

    def _sum(self, name: str) -> np.ndarray:
        return self._column([block.values[:, RECORDED.index(name)] for block in self._held()])

    def _rate(self, name: str) -> np.ndarray:
        return self._column([block.rates[:, RATES.index(name)] for block in self._held()])

    def _column(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        width = len(self._layer_names)
        return np.concatenate([np.zeros((0, width)), *(widened(part, width) for part in parts)])

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
