"""The record of a run: the sums of every measured step and layer."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import measures
from .kernels import SUMS

if TYPE_CHECKING:
    import pandas

RECORDED = (*SUMS, "correlation_stderr")
"""What one row of the record holds for each layer."""
_HOST = ("lr", "prev_lr")
_FORMAT = 1
_BLOCK = 256  # steps that gather on the device before they move to the host


class History:
    """Sums, learning rates and what follows from them, for T measured steps and L layers.

    It grows on the device of the parameters and moves to the host in blocks, so recording never waits for
    the device; reading does. A layer's row is NaN where there is nothing to compare: in the first step, after
    a step in which other parameters of the layer had gradients, and where the previous gradient was
    overwritten. Sums that are not finite are NaN.
    """

    def __init__(self) -> None:
        self._layer_names: tuple[str, ...] = ()
        self._steps: list[int] = []
        self._host: dict[str, list[np.ndarray]] = {name: [] for name in _HOST}
        self._blocks: list[np.ndarray | Tensor] = []  # (steps, 5, layers), on the host or on their way
        self._block: Tensor | None = None  # (_BLOCK, 5, L) on the device
        self._filled = 0

    def __len__(self) -> int:
        return len(self._steps)

    def __repr__(self) -> str:
        span = f"steps {self._steps[0]} to {self._steps[-1]}" if self._steps else "no steps"
        return f"History({span}, {len(self._layer_names)} layers)"

    # ---- recording (the optimizer's side) ----------------------------------------------------------------

    def add_layers(self, names: Sequence[str]) -> None:
        """Set the layers to `names`, which begin with those there are; new ones are NaN so far.

        Raises:
            ValueError: the history holds other layers.
        """
        names = tuple(names)
        if names[: len(self._layer_names)] != self._layer_names:
            raise ValueError(
                f"history holds layers {_some(self._layer_names)}, the optimizer has {_some(names)}; "
                "pass the history of the same model, or none"
            )
        if names != self._layer_names:
            self._close_block()
            self._layer_names = names

    def next_row(self, device: torch.device) -> Tensor:
        """Where the next step's :data:`RECORDED` go: float64, shape (5, L), on `device`."""
        if self._block is not None and (self._filled == _BLOCK or self._block.device != device):
            self._close_block()
        if self._block is None:
            self._block = torch.empty(
                (_BLOCK, len(RECORDED), len(self._layer_names)), dtype=torch.float64, device=device
            )
        return self._block[self._filled]

    def commit(self, step: int, lr: np.ndarray, prev_lr: np.ndarray) -> None:
        """Make the row last asked for part of the record: step number, learning rates of shape (L,)."""
        self._filled += 1
        self._steps.append(step)
        self._host["lr"].append(lr)
        self._host["prev_lr"].append(prev_lr)

    def _close_block(self) -> None:
        if self._block is not None and self._filled:
            block = self._block[: self._filled]
            if block.device.type == "cpu":
                self._blocks.append(block.numpy())
            else:
                host = torch.empty(block.shape, dtype=block.dtype, pin_memory=True)
                host.copy_(block, non_blocking=True)
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(block.device))
                self._blocks.append(_Moving(host, event))
        self._block, self._filled = None, 0

    # ---- reading -----------------------------------------------------------------------------------------

    @property
    def layer_names(self) -> tuple[str, ...]:
        """L names."""
        return self._layer_names

    @property
    def steps(self) -> np.ndarray:
        """Numbers of the measured steps, the optimizer's first being 0: int64, shape (T,)."""
        return np.array(self._steps, np.int64)

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
    def correlation_stderr(self) -> np.ndarray:
        """Standard error of `correlation()` if a sample is measured, else 0: float64, shape (T, L)."""
        return self._sum("correlation_stderr")

    @property
    def lr(self) -> np.ndarray:
        """Learning rate of the step: float64, shape (T, L); NaN where a layer's parameters differ in it."""
        return self._per_layer("lr")

    @property
    def prev_lr(self) -> np.ndarray:
        """Learning rate of the step before: float64, shape (T, L)."""
        return self._per_layer("prev_lr")

    @property
    def step_scale(self) -> np.ndarray:
        """Multiplier of the learning rate: float64, shape (T, L), all ones without adaptation."""
        return np.ones((len(self), len(self._layer_names)))

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

    def curvature(self) -> np.ndarray:
        """Directional curvature kappa_t along the step from t - 1 to t: float64, shape (T, L).

        Holds for plain gradient descent; momentum and weight decay move along another direction.
        """
        return measures.curvature(self.dot, self.prev_sq_norm, self.prev_lr)

    def smoothness(self) -> np.ndarray:
        """Directional smoothness along the step from t - 1 to t: float64, shape (T, L)."""
        return measures.smoothness(self.diff_sq_norm, self.prev_sq_norm, self.prev_lr)

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each step and layer, indexed by both. Needs pandas.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("History.to_pandas needs pandas: pip install pandas") from error
        index = pandas.MultiIndex.from_product([self.steps, self.layer_names], names=["step", "layer"])
        columns = {name: getattr(self, name) for name in (*RECORDED, "lr", "step_scale")}
        columns["correlation"] = self.correlation()
        columns["curvature"] = self.curvature()
        return pandas.DataFrame({k: v.ravel() for k, v in columns.items()}, index=index)

    # ---- files -------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write an .npz file, whole or not at all: `format`, `steps`, `layer_names` and the arrays."""
        path = Path(path)
        arrays = {name: getattr(self, name) for name in (*RECORDED, *_HOST, "step_scale")}
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez_compressed(
                    file,
                    format=_FORMAT,
                    steps=self.steps,
                    layer_names=np.array(self.layer_names, str),
                    **arrays,
                )
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike) -> History:
        """Read a file that :meth:`save` wrote; nothing in it is executed.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, of another version, or something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                data = {name: file[name] for name in file.files}
        except (ValueError, EOFError, OSError, zipfile.BadZipFile, AttributeError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"{os.fspath(path)!r} is no history, or a damaged one: {error}") from None
        return cls._from_arrays(data, repr(os.fspath(path)))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and strings only: `torch.load(..., weights_only=True)` reads it back."""
        arrays = {name: torch.from_numpy(getattr(self, name).copy()) for name in (*RECORDED, *_HOST)}
        return {
            "format": _FORMAT,
            "steps": torch.from_numpy(self.steps),
            "layer_names": list(self.layer_names),
            **arrays,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> History:
        """The history that :meth:`state_dict` described.

        Raises:
            ValueError: `state` is of another version, or something else.
        """
        return cls._from_arrays({k: np.asarray(v) for k, v in state.items()}, "state")

    @classmethod
    def _from_arrays(cls, data: dict[str, np.ndarray], source: str) -> History:
        wanted = ("format", "steps", "layer_names", *RECORDED, *_HOST)
        if missing := [name for name in wanted if name not in data]:
            raise ValueError(f"{source} is no history: it lacks {missing[0]!r}")
        if int(data["format"]) != _FORMAT:
            raise ValueError(
                f"{source} is a history of format {int(data['format'])}, this oscopt reads {_FORMAT}"
            )
        shape = (len(data["steps"]), len(data["layer_names"]))
        for name in (*RECORDED, *_HOST):
            if data[name].shape != shape:
                raise ValueError(f"{source} is damaged: {name!r} has shape {data[name].shape}, not {shape}")
        history = cls()
        history._layer_names = tuple(str(name) for name in data["layer_names"])
        history._steps = [int(step) for step in data["steps"]]
        if history._steps:
            history._blocks = [np.stack([data[name] for name in RECORDED], axis=1)]
        for name in _HOST:
            history._host[name] = list(data[name])
        return history

    def __getstate__(self) -> dict[str, Any]:
        self._close_block()
        return self.__dict__ | {"_blocks": [_on_host(block) for block in self._blocks]}

    # ---- inside ------------------------------------------------------------------------------------------

    def _sum(self, name: str) -> np.ndarray:
        row, width = RECORDED.index(name), len(self._layer_names)
        blocks = [_on_host(block)[:, row] for block in self._blocks]
        if self._block is not None and self._filled:
            blocks.append(self._block[: self._filled, row].cpu().numpy())
        return np.concatenate([np.zeros((0, width)), *(_widened(block, width) for block in blocks)])

    def _per_layer(self, name: str) -> np.ndarray:
        width = len(self._layer_names)
        rows = [row if len(row) == width else _widened(row[None], width)[0] for row in self._host[name]]
        return np.array(rows, np.float64).reshape(len(rows), width)

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


class _Moving:
    """A block on its way from the device to pinned memory."""

    def __init__(self, host: Tensor, event: torch.cuda.Event) -> None:
        self._host = host
        self._event = event

    def numpy(self) -> np.ndarray:
        self._event.synchronize()
        return self._host.numpy()


def _on_host(block: np.ndarray | _Moving) -> np.ndarray:
    return block if isinstance(block, np.ndarray) else block.numpy()


def _widened(rows: np.ndarray, width: int) -> np.ndarray:
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=np.nan)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "") if names else "none"
