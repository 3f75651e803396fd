"""One step of training, from top to bottom: what OscGD and OscMonitor share.

A tracker lasts as long as its optimizer or monitor; what depends on how the parameters lie in memory is made
anew by :meth:`GradientTracker.rebuild`. docs/architecture.md has the order of a step and who owns what.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import kernels, measures
from .adapt import Adapter
from .clock import Clock, DeviceClock, HostClock, Rates
from .device_log import DeviceLog, GraphLog
from .distributed import Ranks, describe, is_dtensor
from .history import History
from .kernels import capturing, sketch
from .parameters import Gradients, Listed, Pairs, ParameterTable, Plans, Update, chosen
from .previous import Gradient, Previous, Replayed, Sketch
from .rows import MEASURED, RECORDED, drop_written, height, packed
from .window import Window

MEASURES = ("exact", "sketch", "alignment")
"""What gradients can be measured against, see :class:`oscopt.OscGD`; a monitor knows no momentum."""


@dataclass(frozen=True)
class Options:
    """How to measure, see :class:`oscopt.OscGD`."""

    measure: str = "exact"
    every: int = 1
    copy_gradients: bool = False
    capturable: bool = False
    backend: str = "auto"

    def check(self) -> None:
        """Check what :class:`oscopt.OscGD` and :class:`oscopt.OscMonitor` both take.

        Raises:
            ValueError: one is out of its range, or they exclude each other.
        """
        every = self.every
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"Invalid every: {every!r}; use a whole number of steps, 1 or more")
        if self.capturable and every > 1:
            raise ValueError(
                f"Invalid every: {every} with capturable=True, where all steps are the same; use 1"
            )


class GradientTracker:
    """Measures, and on request updates, the parameters that it was last rebuilt for.

    Args:
        options: how to measure.
        history: where the record goes.
        listed, clock, adapter, ranks, edited: as in :meth:`rebuild`.

    Attributes:
        table: the parameters, as they lie in memory.
        previous: what is kept of their previous gradients.
        clock: which step it is; whoever steps advances it.
        adapter: what decides on the layers' scales; None: they are ones.
        ranks: the processes that share the parameters; None: there is one.
        windows: those that are open.

    Raises:
        ValueError: the ranks disagree, or `history` is of other layers or takes sketches, but none are made.
    """

    table: ParameterTable
    previous: Previous
    clock: Clock
    log: DeviceLog | GraphLog

    def __init__(
        self,
        options: Options,
        history: History,
        listed: Listed,
        clock: Clock,
        adapter: Adapter | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if history.sketches and options.measure != "sketch":
            raise ValueError(
                f"history was made with sketches={history.sketches}, but measure={options.measure!r} takes "
                "none; use measure='sketch', or a History without sketches"
            )
        self.options, self.history = options, history
        self.ranks = ranks
        self.windows: list[Window] = []
        self._replayed: Replayed | None = None
        self._recorded = -1  # the number of the last row
        self._captured: tuple[ParameterTable | None, dict[int, Any]] = (None, {})
        self.rebuild(listed, clock, adapter)

    def rebuild(
        self,
        listed: Listed,
        clock: Clock,
        adapter: Adapter | None = None,
        edited: bool = False,
        loaded: bool = False,
    ) -> None:
        """Go on with the parameters as they are now. What has been kept is in their states.

        Args:
            listed: the parameters.
            clock: which step it is.
            adapter: what decides on the layers' scales.
            edited: whether they are other ones than those that the history is of so far.
            loaded: whether the states come from elsewhere, so that nothing else goes on.
        """
        if loaded:
            self._replayed, self.windows = None, []
        options = self.options
        self.ranks = _ranks(listed, options, self.ranks)
        counted = None if self.ranks is None else self.ranks.counted
        sketched = options.measure == "sketch"
        # For sketches the sums with the momentum cost the CPU as much as the sketch does.
        align = adapter is not None
        table = ParameterTable(listed, counted, options.backend, clock.scale_of, sketched, align)
        self.history.add_layers(table.layer_names, edited=edited)
        if self.history.sketches:
            self.history.sketch_with(table.sketch_seeds())
        self.table, self.clock, self.adapter = table, clock, adapter
        self._sums = len(sketch.SUMS if sketched else kernels.SUMS)
        self.previous = self._new_previous(listed.homes)
        self.log = self._new_log()
        self.history.read_from(self.log)
        self.untouched = True
        """Whether nothing has been measured since."""

    def _new_previous(self, homes: list[int]) -> Previous:
        measure, table = self.options.measure, self.table
        if measure == "alignment":
            return Previous(table)
        if self.clock.on_device:
            shape = (homes, len(table.layer_names), table.device)
            if self._replayed is None or not self._replayed.fits(*shape):
                self._replayed = Replayed(*shape)
        if measure == "sketch":
            return Sketch(table, self._replayed)
        return Gradient(table, self._replayed, self.options.copy_gradients)

    def _new_log(self) -> DeviceLog | GraphLog:
        shape = (height(self.history.sketches), len(self.table.layer_names), self.table.device)
        sketched = self.options.measure == "sketch"
        if not isinstance(self.clock, DeviceClock):
            return DeviceLog(self.history.block_size, *shape, self.clock, sketched)
        log = getattr(self, "log", None)
        if isinstance(log, GraphLog) and log.fits(*shape, self.clock) and self.history.reads_from(log):
            return log
        return GraphLog(*shape, self.clock, sketched)

    # ---- a step ------------------------------------------------------------------------------------------

    def gradients(self) -> Gradients:
        """The gradients that the next step is made of.

        Raises:
            RuntimeError: a gradient is sparse, the process group of sharded parameters is gone, or the
                history records somebody else's steps by now.
            ValueError: a gradient has another shape than its parameter.
            Exception: what the policy raised in the last step.
            Reshaped: a parameter has changed its shape where it lies.

        Nothing has been changed by then.
        """
        if self.ranks is not None:
            self.ranks.check()
        if self.adapter is not None:
            self.adapter.check()
        self.check_history()
        return self.table.gradients()

    def check_history(self) -> None:
        """Raise where somebody else records into the history by now.

        Raises:
            RuntimeError: so it is.
        """
        if not self.history.reads_from(self.log):
            raise RuntimeError(
                "the history of this optimizer has been handed on to another one; give each its own"
            )

    def step(self, grads: Gradients, update: Update | None) -> None:
        """Measure, and update unless `update` is None.

        Args:
            grads: from :meth:`gradients`, or like it.
            update: for every slot.
        """
        row, kept_next = self._open_row(), self._due(1)
        pairs = sums = None
        if row is not None:
            pairs, sums = self.previous.pair(grads), row[: self._sums]
        elif self.previous.continuous and (kept_next or self.windows):
            pairs, sums = self.previous.pair(grads), self._scratch()
        plans = self._plans(grads)
        if self.adapter is not None:
            self.log.settle()  # the scales are to be known now
        two_passes = row is not None and self.adapter is not None and self.adapter.lag == 0
        if sums is not None or (update is not None and not two_passes):
            # In a pass of its own, measuring knows no update: neither its sign nor its momentum.
            self._run(plans, grads, pairs, None if two_passes else update, sums)
        if row is not None:
            self._close_row(row, pairs, self._vectors(plans, pairs))
        if two_passes:
            self.log.settle()
            self._run(plans, grads, None, update, None)
        if self.adapter is not None:
            self.adapter.used = self.adapter.scale if row is None else row[MEASURED]
        self._add_to_windows(grads, pairs)
        self.previous.keep(grads, grads.present if kept_next else [], copied=row is not None)

    def lose(self) -> None:
        """Record that the gradients of a step could not be measured; the next ones have no pair."""
        self.previous.forget(set(range(len(self.table.layer_names))))
        self.previous.kept = []
        row = self._open_row() if self.table.slots else None
        if row is not None:
            row.fill_(torch.nan)[MEASURED : len(RECORDED)] = 1.0
            self.log.close(self.clock.layer_rates())
            self.untouched = False

    def wants(self) -> bool:
        """Whether the gradients of this step are measured, or kept for the next one."""
        return self._due(0) or (self.options.measure != "alignment" and self._due(1))

    def _due(self, ahead: int) -> bool:
        """Whether the step after as many is measured; where the device counts, all are."""
        every = self.options.every
        return every == 1 or (self.clock.step + ahead + 1) % every == 0

    def _open_row(self) -> Tensor | None:
        """Where this step is recorded: zeros, float64, (R, L); None: it is not measured."""
        if not self._due(0):
            return None
        if isinstance(self.clock, HostClock):
            if self._recorded == self.clock.step:  # a step that failed halfway has left its row
                self.history.cut(self._recorded)
                self.untouched = True  # the row before is not the last one that the log has
            self._recorded = self.clock.step
        if self.log.full:
            for rows in self.log.send():
                self.history.extend(rows)
        return self.log.open()

    def _scratch(self) -> Tensor:
        shape = (self._sums, len(self.table.layer_names))
        return torch.zeros(shape, dtype=torch.float64, device=self.table.device)

    def _plans(self, grads: Gradients) -> Plans:
        plans = self.table.plans(grads)
        if self.clock.on_device and not capturing(self.table.device):
            for _, plan in plans:
                plan.prepare_capture()
        return plans

    def _run(
        self, plans: Plans, grads: Gradients, pairs: Pairs | None, update: Update | None, sums: Tensor | None
    ) -> None:
        scale = bound = None
        if update is not None:
            if self.adapter is not None:
                scale, bound = self.adapter.factor, self.adapter.bound
            scale, bound = self.clock.factors(scale), self.clock.bounds(bound)
        self.table.run(plans, grads, pairs, update, sums, scale, bound)

    def _vectors(self, plans: Plans, pairs: Pairs | None) -> Tensor | None:
        """The sketch of each layer's gradient that the record takes, if any: float32, (L, k')."""
        size = self.history.sketches
        return self.table.fold(plans, pairs.against, size) if size and pairs is not None else None

    def _close_row(self, row: Tensor, pairs: Pairs | None, vectors: Tensor | None) -> None:
        """Make the row part of the record, and complete it once the sums are those of all ranks."""
        sums, ranks, rates = row[: self._sums], self.ranks, self.clock.layer_rates()
        if pairs is not None:
            _without_pair(sums, pairs, len(self.table.layer_names))
        verified = self.previous.verifies and self.options.every == 1 and not self.untouched
        now = verified and self.adapter is not None  # the policy is to see what is right
        before, later = self.log.latest() if now else None, verified and not now
        if self.adapter is not None:
            row[MEASURED : len(RECORDED)].copy_(torch.stack([self.adapter.scale, self.adapter.used]))
        self.untouched = False
        complete = partial(self._complete, row, before, rates)
        if ranks is None:
            complete(vectors)
            self.log.close(rates, verified=later)
            return
        together = sums if vectors is None else torch.cat([sums, vectors.T])
        work = ranks.reduce(together)

        def finish() -> None:
            ranks.wait(work)
            if vectors is not None:
                sums.copy_(together[: self._sums])
            complete(None if vectors is None else together[self._sums :].T)

        self.log.close(rates, finish, later)

    def _complete(self, row: Tensor, before: Tensor | None, rates: Rates, vectors: Tensor | None) -> None:
        """What is to be known of `row` in the next step. `before`: the row of the last one."""
        if vectors is not None:
            row[len(RECORDED) :].copy_(packed(vectors.float()))
        if before is not None:
            drop_written(row, before[1])
        if self.adapter is not None:
            lr, prev_lr = (self._on_device(rate) for rate in rates)
            self.adapter.decide(row[: len(kernels.SUMS)], lr, prev_lr * row[MEASURED + 1])
            if self.adapter.lag == 0:
                row[MEASURED] = self.adapter.scale

    def _on_device(self, values: np.ndarray | Tensor) -> Tensor:
        if isinstance(values, Tensor):
            return values
        return torch.from_numpy(values).to(self.table.device, non_blocking=True)

    def _add_to_windows(self, grads: Gradients, pairs: Pairs | None) -> None:
        if not self.windows:
            return
        sketched = self.previous.continuous and pairs is not None
        slots = [self.table.slots[i] for i in grads.present]
        values = chosen(pairs.against if sketched and pairs is not None else grads.local, grads.present)
        kinds = [sketched and sketch.sketched(slot.param) for slot in slots]
        for window in tuple(self.windows):
            window.add(self.clock.number(), grads.present, [slot.layer for slot in slots], values, kinds)

    # ---- what users read ---------------------------------------------------------------------------------

    @property
    def layer_names(self) -> tuple[str, ...]:
        """L names."""
        return self.table.layer_names

    def correlation(self) -> Tensor:
        """Latest mu of each layer: float64, shape (L,)."""
        row = None if self.untouched else self.log.latest()
        if row is None:
            return no_correlation(self.table.device, len(self.layer_names))
        return measures.correlation(row[0], row[1], row[3])

    def global_correlation(self) -> Tensor:
        """Latest mu of all layers together: float64, 0-dim."""
        row = None if self.untouched else self.log.latest()
        if row is None:
            return no_correlation(self.table.device)
        dot, sq_norm, _, prev_sq_norm = row[:4].sum(1)
        return measures.correlation(dot, sq_norm, prev_sq_norm)

    def settled_adapter(self) -> Adapter | None:
        """What decides on the scales, once it has seen all that has been measured."""
        self.log.settle()
        return self.adapter

    def open_window(self, h: int) -> Window:
        """A window on the next `h` steps.

        Raises:
            ValueError: `h` is less than 2.
        """

        def leave(window: Window) -> None:
            if window in self.windows:
                self.windows.remove(window)

        window = Window(h, self.layer_names, leave, self.table.device, self.ranks)
        self.windows.append(window)
        return window

    # ---- CUDA graphs -------------------------------------------------------------------------------------

    def check_capture(self, grads: Gradients) -> None:
        """Raise where a step with these gradients could not be captured in a CUDA graph.

        Raises:
            RuntimeError: the clock is on the host, something that a step needs is not there yet, or a window
                is open.
        """
        if not self.clock.on_device:
            raise RuntimeError(
                "an optimizer or monitor with capturable=False cannot be captured in a CUDA graph; "
                "make it with capturable=True"
            )
        if self.untouched or self.previous.lacks(grads) or self.previous.kept != grads.present:
            raise RuntimeError(
                "the last step was none with gradients of the same parameters, and what a graph captures is "
                "the same in every replay; take 3 such steps before capturing"
            )
        if self.adapter is not None:
            self.adapter.check_capture()
        if self.windows:
            raise RuntimeError("a window is open, which a graph cannot fill; capture after it is complete")

    def hold_captured(self, *used: object) -> None:
        """Keep alive what a step that has just been captured reads and writes: graphs do not.

        What was captured before the last :meth:`rebuild` cannot be replayed any more, and is let go.
        """
        if self._captured[0] is not self.table:
            self._captured = self.table, {}
        own = (self.adapter, self.clock, self.log, *self.table.all_plans(), *self.previous.in_use())
        self._captured[1].update({id(x): x for x in (*own, *used)})  # captured again, nothing is held twice

    def let_go(self) -> None:
        """Hold no gradient any more."""
        self.table.let_go()
        self.previous.let_go()
        self.windows = []


def _without_pair(sums: Tensor, pairs: Pairs, num_layers: int) -> None:
    """NaN for the layers that have no valid pair: all sums but those of this gradient alone."""
    if not pairs.lost and pairs.changed is None:
        return
    parts = (sums[0], sums[2], sums[3], *sums[len(kernels.SUMS) :])
    if pairs.lost:
        # As at the start: no index to upload.
        lost = slice(None) if len(pairs.lost) == num_layers else pairs.lost
        for part in parts:
            part[lost] = torch.nan
    if pairs.changed is not None:
        for part in parts:
            part.masked_fill_(pairs.changed, torch.nan)


def _ranks(listed: Listed, options: Options, known: Ranks | None) -> Ranks | None:
    """The processes that share the parameters, None: there is one. Those known, if nothing has changed."""
    if not any(map(is_dtensor, listed.params)):
        return None
    settings = {"every": options.every, "measure": options.measure}
    described = (listed.names, listed.params, listed.layers, settings)
    if known is not None and known.description == describe(*described):
        return known
    return Ranks(*described)


def no_correlation(device: torch.device, *shape: int) -> Tensor:
    """What there is before the first step: NaN, float64."""
    return torch.full(shape, torch.nan, dtype=torch.float64, device=device)


def skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a GradScaler has found that this step is to be skipped, and left that to the optimizer.

    Raises:
        RuntimeError: it cannot be told, as a CUDA graph is being captured.
    """
    found = getattr(optimizer, "found_inf", None)
    if found is not None and capturing(found.device):
        raise RuntimeError(
            "whether a GradScaler skips a step cannot be told while capturing a CUDA graph; use bfloat16, or "
            "capture forward and backward only"
        )
    return found is not None and bool(found.item())
