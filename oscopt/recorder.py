"""What stands in for the host while a CUDA graph is replayed, where only the device runs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from .history import MEASURED, RECORDED, History
from .kernels import capturing

LEAST, MOST = 256, 16_384
"""Steps that are held, at least and at most, until the history takes them."""

_BYTES = 32 << 20  # that they may take on the device, if LEAST take less


def one_device(params: Sequence[Tensor]) -> torch.device:
    """The device of `params`.

    Raises:
        ValueError: there are several.
    """
    devices = list(dict.fromkeys(p.device for p in params))
    if len(devices) > 1:
        raise ValueError(
            f"capturable=True needs all parameters on one device, not on {devices[0]} and {devices[1]}"
        )
    return devices[0] if devices else torch.device("cpu")


class _Options(TypedDict):
    dtype: torch.dtype
    device: torch.device


class Recorder:
    """Counts the steps, reads the learning rates and keeps the record, all by operations on the device.

    They can be captured in a CUDA graph: no waiting, nothing from the host, always the same memory. Every
    step writes a row into a ring, from which the history takes what is new when somebody reads it. What the
    host cannot know in a replay, which parameters had gradients in the step before, is kept here as well.

    Args:
        layers: the name of each parameter's layer, None: it has none.
        groups: the number of each one's parameter group.
        device: where the parameters lie.
        history: takes the rows.
        step: the number of the next step.
        rates: learning rates of the last step, one a group.

    Attributes:
        entries: for every parameter its place in :meth:`factors`.
        copies: of the last gradients, by number of the parameter: graphs write to them.
    """

    def __init__(
        self,
        layers: Sequence[str | None],
        groups: Sequence[int],
        device: torch.device,
        history: History,
        step: int,
        rates: Sequence[float],
    ) -> None:
        self._description = (list(layers), list(groups), device)
        index: dict[str | None, int] = {}
        for layer in layers:
            if layer is not None:
                index.setdefault(layer, len(index))
        num_layers = len(index)
        homes = [num_layers if layer is None else index[layer] for layer in layers]
        pairs = list(zip(homes, groups, strict=True))
        place = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        self.entries = [place[pair] for pair in pairs]
        members = _by_layer(enumerate(homes), num_layers)
        of_layer = _by_layer(((group, home) for home, group in place), num_layers)
        options: _Options = {"dtype": torch.float64, "device": device}
        self._members = _columns(members, len(layers)).to(device)  # of layers; behind the last: nobody
        self._known = torch.tensor([True] * len(layers) + [False]).to(device)
        self._layer_groups = _columns(of_layer).to(device)
        self._entry_group = torch.tensor([group for _, group in place]).to(device)
        self._entry_layer = torch.tensor([home for home, _ in place]).to(device)  # num_layers: none
        self._one = torch.ones(1, **options)
        self._unbounded = torch.full((1,), math.inf, **options)
        self._count = torch.tensor(step).to(device)
        self._rates = torch.tensor(rates, dtype=torch.float64).to(device)
        self._before = self._rates.clone()
        self._rows = history.rows
        rows = self._rows + 2
        self._row = torch.zeros((rows, num_layers), **options)
        self._row[MEASURED : len(RECORDED)] = 1.0
        steps = max(LEAST, min(_BYTES // (8 * rows * max(num_layers, 1)), MOST))
        self._ring = torch.zeros((steps, *self._row.shape), **options)
        self._history = history
        self._taken = step  # steps that the history has
        self.copies: dict[int, Tensor] = {}
        self._waiting = 0  # steps since, as far as the host knows

    def fits(self, layers: Sequence[str | None], groups: Sequence[int], device: torch.device) -> bool:
        """Whether it is one for these."""
        return self._description == (list(layers), list(groups), device)

    def set_rates(self, rates: Sequence[float | Tensor]) -> None:
        """The learning rates of this step, one a group; captured, a number stays what it is now.

        Those of groups that were added later are left out: they hold none of these parameters.
        """
        for place, rate in zip(self._rates, rates, strict=False):
            if isinstance(rate, Tensor) and rate.device == place.device:
                place.copy_(rate.detach().reshape(()))
            else:
                place.fill_(float(rate))

    def own(self, parameter: int, prev: Tensor) -> Tensor:
        """`prev`, a previous gradient that some state holds, if it is one of `copies`; or a copy that is."""
        if prev is not self.copies.get(parameter):
            self.copies[parameter] = prev.clone()
        return self.copies[parameter]

    def mask(self, present: Sequence[int]) -> Tensor:
        """For :meth:`changed`: which parameters have gradients; an upload."""
        chosen = set(present)
        return torch.tensor([i in chosen for i in range(len(self._known))]).to(self._known.device)

    def changed(self, mask: Tensor) -> Tensor:
        """In which layers other parameters have gradients than in the step before: bool, (L,)."""
        changed = (self._known != mask)[self._members].any(0)
        self._known.copy_(mask)
        return changed

    def forget(self, parameters: Sequence[int]) -> None:
        """That the previous gradients of these are known; an upload."""
        self._known.logical_and_(~self.mask(parameters))

    def unknown(self) -> list[int]:
        """Parameters whose previous gradients are not known; waits for the device."""
        return (~self._known[:-1]).nonzero().flatten().tolist()

    def bounds(self, bound: Tensor) -> Tensor:
        """The bounds of layers (float64, (L,)), one for each of `entries`; infinite for what has no layer."""
        return torch.cat([bound, self._unbounded]).index_select(0, self._entry_layer)

    def factors(self, scale: Tensor | None) -> Tensor:
        """Learning rate times `scale` (float64, (L,)), one for each of `entries`."""
        rates = self._rates.index_select(0, self._entry_group)
        if scale is None:
            return rates
        return rates * torch.cat([scale, self._one]).index_select(0, self._entry_layer)

    def layer_rates(self) -> tuple[Tensor, Tensor]:
        """Learning rates of this step and of the last: float64, (L,), NaN where a layer's groups differ."""
        both = torch.stack([self._rates, self._before])
        of_layers = both[:, self._layer_groups]
        same = (of_layers == of_layers[:, :1]).all(1)
        lr, prev_lr = torch.where(same, of_layers[:, 0], math.nan)
        return lr, prev_lr

    def next_row(self, device: torch.device) -> Tensor:
        """Where the next step's :data:`oscopt.history.RECORDED` go: float64, (9, L), always the same; as in
        :meth:`oscopt.History.next_row`.

        Raises:
            RuntimeError: somebody else records into the history by now.
        """
        if not self._history.follows(self.collect):
            raise RuntimeError(
                "the history of this optimizer has been handed on to another one; give each its own"
            )
        self._row[:MEASURED].zero_()
        return self._row[: self._rows]

    def commit(
        self, step: int, lr: Tensor, prev_lr: Tensor, settle: Callable[[], None] | None = None
    ) -> None:
        """Count a step and put the row and the rates into the ring; as :meth:`oscopt.History.commit`.

        `step` is not looked at: the device counts.
        """
        if settle is not None:
            settle()
        self._row[self._rows :].copy_(torch.stack([lr, prev_lr]))
        place = self._count.remainder(len(self._ring)).reshape(1)
        self._ring.index_copy_(0, place, self._row[None])
        self._count.add_(1)
        self._before.copy_(self._rates)
        self._waiting += 1
        if self._waiting >= len(self._ring) // 2 and not capturing(self._ring.device):
            self._history.pull()

    def count(self) -> Tensor:
        """How many steps there were: int64, 0-dim."""
        return self._count.clone()

    def latest(self) -> Tensor:
        """The row of the last step, float64, (9, L)."""
        place = (self._count - 1).remainder(len(self._ring)).reshape(1)
        return self._ring.index_select(0, place)[0, : len(RECORDED)]

    def state(self) -> tuple[int, list[float]]:
        """The number of the next step, and the learning rates of the last one; waits for the device."""
        return int(self._count), self._before.tolist()

    def collect(self) -> None:
        """Let the history take what is new; waits for the device."""
        if capturing(self._ring.device):
            raise RuntimeError("the history cannot be read while a CUDA graph is being captured")
        count = int(self._count)
        new, self._waiting = count - self._taken, 0
        if new <= 0:
            return
        kept = min(new, len(self._ring))
        if kept < new:
            warnings.warn(
                f"{new - kept} steps are not in the history: they were overwritten before it was read; "
                f"read it (history.drain(), len(history)) at least every {len(self._ring)} steps",
                stacklevel=3,
            )
        steps = np.arange(count - kept, count)
        rows = self._ring[torch.from_numpy(steps % len(self._ring)).to(self._ring.device)].cpu().numpy()
        self._taken = count
        self._history.extend(steps, rows[:, : self._rows], *np.moveaxis(rows[:, self._rows :], 1, 0))


def _by_layer(values: Iterable[tuple[int, int]], num_layers: int) -> list[list[int]]:
    """For each layer the values, in their order, that come with its number."""
    found: list[list[int]] = [[] for _ in range(num_layers + 1)]
    for value, home in values:
        found[home].append(value)
    return found[:num_layers]


def _columns(lists: Sequence[Sequence[int]], filler: int | None = None) -> Tensor:
    """Each list as a column, int64; the rest of it is `filler`, or the list's first entry again."""
    most = max(map(len, lists), default=1)
    rows = [[*x, *[x[0] if filler is None else filler] * (most - len(x))] for x in lists]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(lists), most).T
