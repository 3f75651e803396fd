"""The newest rows of the record, on the device: recording never waits for it.

A step opens a row, which kernels sum into, and closes it. The history takes the rows when it is read, or when
the log is full.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .clock import DeviceClock, HostClock, Rates
from .kernels import capturing
from .rows import MEASURED, RECORDED, Rows, drop_written, set_stderr

LEAST, MOST = 256, 16_384
"""Steps that a log for CUDA graphs holds, at least and at most."""

_BYTES = 32 << 20  # that they may take on the device, if LEAST take less


class DeviceLog:
    """Gathers a block of rows, and sends it to the host while the next one fills.

    Args:
        size: rows of a block.
        height, width: float64 of a row, (height, width).
        device: where.
        clock: numbers the steps.
        sketched: whether gradients are, so that rows have the variance of the dot product.
    """

    def __init__(
        self,
        size: int,
        height: int,
        width: int,
        device: torch.device,
        clock: HostClock,
        sketched: bool = False,
    ) -> None:
        self._shape, self._device = (size, height, width), device
        self._clock, self._sketched = clock, sketched
        self._block: Tensor | None = None
        self._steps: list[int] = []  # of the rows in it
        self._rates: list[tuple[np.ndarray, np.ndarray]] = []
        self._verified: list[bool] = []
        self._taken = 0  # how many of them the history has
        self._sent: tuple[Rows, np.ndarray, torch.cuda.Event | None] | None = None  # the block before
        self._sq_norm = np.full(width, np.nan)  # of the last row that was taken
        self._opened = False
        self._finish: Callable[[], None] | None = None
        self._last: Tensor | None = None
        self._before: Tensor | None = None  # the row before the last, if that is to be compared with it

    @property
    def full(self) -> bool:
        """Whether the history is to take rows now."""
        return len(self._steps) == self._shape[0]

    def open(self) -> Tensor:
        """The next step's row: float64, (height, width); zeros, and ones for the scales."""
        self.settle()
        if self._block is None:
            self._block = torch.zeros(self._shape, dtype=torch.float64, device=self._device)
            self._block[:, MEASURED : len(RECORDED)] = 1.0
        row = self._block[len(self._steps)]
        if self._opened:  # by a step that failed
            row.zero_()[MEASURED : len(RECORDED)] = 1.0
        self._opened = True
        return row

    def close(self, rates: Rates, finish: Callable[[], None] | None = None, verified: bool = False) -> None:
        """Make the row that was opened part of the record.

        Args:
            rates: from :meth:`oscopt.clock.HostClock.layer_rates`.
            finish: completes the row, whose sums are still on their way between processes.
            verified: whether the norm of the previous gradients is to be that of the row before: this is
                looked at when the row is read, which spares the device six operations a step.
        """
        assert self._block is not None and isinstance(rates[0], np.ndarray)
        self._before = self._last if verified else None
        self._last = self._block[len(self._steps)]
        self._steps.append(self._clock.step)
        self._rates.append(rates)  # type: ignore[arg-type]
        self._verified.append(verified)
        self._finish, self._opened = finish, False

    def settle(self) -> None:
        """Complete the last row."""
        if self._finish is not None:
            finish, self._finish = self._finish, None
            finish()

    def latest(self) -> Tensor | None:
        """The last row that was closed, (height, width); None: there is none yet."""
        self.settle()
        if self._last is not None and self._before is not None:
            drop_written(self._last, self._before[1])
            self._before = None
        return self._last

    def take(self) -> list[Rows]:
        """The steps that have not been taken yet; waits for the device."""
        found = self._arrived()
        if (new := self._untaken()) is not None:
            self._sent = (*self._rows(new.cpu()), None)
            found += self._arrived()
        return found

    def send(self) -> list[Rows]:
        """Let a full block go; what has been sent before and not been taken yet."""
        found = self._arrived()
        if (new := self._untaken()) is not None:
            event = None
            if new.is_cuda:
                host = torch.empty(new.shape, dtype=new.dtype, pin_memory=True)
                host.copy_(new, non_blocking=True)
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(new.device))
                new = host
            self._sent = (*self._rows(new.cpu()), event)
        self._block, self._steps, self._rates, self._verified, self._taken = None, [], [], [], 0
        return found

    def _arrived(self) -> list[Rows]:
        if self._sent is None:
            return []
        (rows, verified, event), self._sent = self._sent, None
        if event is not None:
            event.synchronize()
        before = np.concatenate([self._sq_norm[None], rows.values[:-1, 1]])
        self._sq_norm = rows.values[-1, 1].copy()
        before[~verified] = np.nan  # nothing differs from NaN by more than NaN
        drop_written(rows.values, before)
        if self._sketched:
            set_stderr(rows.values)
        return [rows]

    def _untaken(self) -> Tensor | None:
        """The rows of the block that have not been taken, as they lie there; None: there are none."""
        self.settle()
        if self._block is None or self._taken == len(self._steps):
            return None
        return self._block[self._taken : len(self._steps)]

    def _rows(self, values: Tensor) -> tuple[Rows, np.ndarray]:
        """Take these rows, which come to the host, and which of them are to be verified."""
        first, self._taken = self._taken, len(self._steps)
        steps, rates = np.array(self._steps[first:], np.int64), np.array(self._rates[first:])
        return Rows(steps, values.numpy(), rates), np.array(self._verified[first:])


class GraphLog:
    """The same for steps that a CUDA graph replays: a ring of rows, always at the same place in memory.

    Args:
        height, width, device: as in :class:`DeviceLog`.
        clock: counts the steps, on the device.
        sketched: whether gradients are, so that rows have the variance of the dot product.
    """

    def __init__(
        self, height: int, width: int, device: torch.device, clock: DeviceClock, sketched: bool
    ) -> None:
        self._clock, self._sketched = clock, sketched
        self._height = height
        rows = height + 2  # with the learning rates
        self._row = torch.zeros((rows, width), dtype=torch.float64, device=device)
        self._row[MEASURED : len(RECORDED)] = 1.0
        size = max(LEAST, min(_BYTES // (8 * rows * max(width, 1)), MOST))
        self._ring = torch.zeros((size, *self._row.shape), dtype=torch.float64, device=device)
        self._taken = clock.step
        self._waiting = 0  # rows that have not been taken, as far as the host knows

    def fits(self, height: int, width: int, device: torch.device, clock: DeviceClock) -> bool:
        """Whether it is one for these."""
        return (height, width, device) == (self._height, self._row.shape[1], self._row.device) and (
            clock is self._clock
        )

    @property
    def full(self) -> bool:
        """As in :class:`DeviceLog`."""
        return self._waiting >= len(self._ring) // 2 and not capturing(self._ring.device)

    def open(self) -> Tensor:
        """As in :class:`DeviceLog`."""
        self._row[:MEASURED].zero_()
        return self._row[: self._height]

    def close(self, rates: Rates, finish: Callable[[], None] | None = None, verified: bool = False) -> None:
        """As in :class:`DeviceLog`, but `verified`: what graphs keep is a copy, which nobody writes to."""
        if finish is not None:
            finish()
        self._row[self._height :].copy_(torch.stack(rates))  # type: ignore[arg-type]
        place = self._clock.count.remainder(len(self._ring)).reshape(1)
        self._ring.index_copy_(0, place, self._row[None])
        self._waiting += 1

    def settle(self) -> None:
        """As in :class:`DeviceLog`; a row is complete when it is closed."""

    def latest(self) -> Tensor | None:
        """The last row that was closed, (height, width); the device alone knows whether there is one."""
        place = (self._clock.count - 1).remainder(len(self._ring)).reshape(1)
        return self._ring.index_select(0, place)[0, : self._height]

    def take(self) -> list[Rows]:
        """As in :class:`DeviceLog`.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        if capturing(self._ring.device):
            raise RuntimeError("the history cannot be read while a CUDA graph is being captured")
        count = self._clock.step
        new, self._waiting = count - self._taken, 0
        if new <= 0:
            return []
        kept = min(new, len(self._ring))
        if kept < new:
            warnings.warn(
                f"{new - kept} steps are not in the history: they were overwritten before it was read; "
                f"read it (history.drain(), len(history)) at least every {len(self._ring)} steps",
                stacklevel=4,
            )
        steps = np.arange(count - kept, count)
        rows = self._ring[torch.from_numpy(steps % len(self._ring)).to(self._ring.device)].cpu().numpy()
        self._taken = count
        if self._sketched:
            set_stderr(rows)
        return [Rows(steps, rows[:, : self._height], rows[:, self._height :])]

    def send(self) -> list[Rows]:
        """As in :class:`DeviceLog`."""
        return self.take()
