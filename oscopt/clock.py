"""Which step it is, and at which learning rates: on the host or, where graphs replay steps, on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

Rates = tuple[np.ndarray, np.ndarray] | tuple[Tensor, Tensor]
"""The layers' learning rates in this step and in the last: float64, (L,), on the host or on the device."""


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


class HostClock:
    """Counts steps and holds the learning rates of this one and of the last, as numbers.

    Args:
        layers: the number of each parameter's layer, -1: none.
        groups: the number of each one's parameter group.
        num_layers: L.
        step: the number of the next step.
        rates: learning rates of the last step, one a group; NaN: not known.

    Attributes:
        on_device: whether it is a :class:`DeviceClock`.
        scale_of: for every parameter its place in what :meth:`factors` gives.
        step: the number of this step, from 0 on.
    """

    on_device = False

    def __init__(
        self,
        layers: Sequence[int],
        groups: Sequence[int],
        num_layers: int,
        step: int,
        rates: Sequence[float],
    ) -> None:
        self.scale_of: Sequence[int] = layers
        self.step = step
        self._rates = self._before = tuple(rates)
        self._groups: list[set[int]] = [set() for _ in range(num_layers)]  # of each layer
        for layer, group in zip(layers, groups, strict=True):
            if layer >= 0:
                self._groups[layer].add(group)
        self._known: dict[tuple[float, ...], np.ndarray] = {}

    def number(self) -> int:
        """The number of this step, to be kept."""
        return self.step

    def set_rates(self, rates: Sequence[float]) -> None:
        """The learning rates of this step, one a group."""
        self._rates = tuple(rates)

    def layer_rates(self) -> tuple[np.ndarray, np.ndarray]:
        """Those of this step and of the last: float64, (L,), NaN where a layer's groups differ.

        The same arrays while the rates are the same; not to be changed.
        """
        return self._of_layers(self._rates), self._of_layers(self._before)

    def factors(self, scale: Tensor | None) -> Tensor | None:
        """What kernels multiply the learning rates that they are given by: `scale`, float64, (L,)."""
        return scale

    def bounds(self, bound: Tensor | None) -> Tensor | None:
        """`bound`, float64, (L,), at the places of `scale_of`."""
        return bound

    def advance(self) -> None:
        """The step is over."""
        self.step += 1
        self._before = self._rates

    def state(self) -> tuple[int, list[float]]:
        """The number of the next step, and the learning rates of the last one."""
        return self.step, list(self._before)

    def _of_layers(self, rates: tuple[float, ...]) -> np.ndarray:
        if rates not in self._known:
            given = (*rates, *[math.nan] * max(0, len(self._before) - len(rates)))
            found = ({given[group] for group in groups} for groups in self._groups)
            values = [rate.pop() if len(rate) == 1 else math.nan for rate in found]
            if len(self._known) == 2:  # this step's and the last one's
                self._known.pop(next(iter(self._known)))
            self._known[rates] = np.array(values, np.float64)
        return self._known[rates]


class _Options(TypedDict):
    dtype: torch.dtype
    device: torch.device


class DeviceClock:
    """The same by operations on the device, which can be captured in a CUDA graph and replayed.

    Nothing waits, nothing comes from the host, and all stays at the same place in memory. Kernels multiply by
    the learning rate times the scale, which they find for each pair of a layer and a parameter group.

    Args:
        layers, groups, num_layers, step, rates: as in :class:`HostClock`.
        device: where the parameters lie.
    """

    on_device = True

    def __init__(
        self,
        layers: Sequence[int],
        groups: Sequence[int],
        num_layers: int,
        step: int,
        rates: Sequence[float],
        device: torch.device,
    ) -> None:
        self._description = (list(layers), list(groups), num_layers, device)
        homes = [num_layers if layer < 0 else layer for layer in layers]  # behind the last: none
        pairs = list(zip(homes, groups, strict=True))
        places = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        self.scale_of: Sequence[int] = [places[pair] for pair in pairs]
        of_layer: list[list[int]] = [[] for _ in range(num_layers + 1)]
        for home, group in places:
            of_layer[home].append(group)
        options: _Options = {"dtype": torch.float64, "device": device}
        self._layer_groups = columns(of_layer[:num_layers]).to(device)
        self._group_at = torch.tensor([group for _, group in places], dtype=torch.int64, device=device)
        self._layer_at = torch.tensor([home for home, _ in places], dtype=torch.int64, device=device)
        self._one = torch.ones(1, **options)
        self._unbounded = torch.full((1,), math.inf, **options)
        self._rates = torch.tensor(list(rates), **options)
        self._before = self._rates.clone()
        self.count = torch.tensor(step, device=device)
        """The number of this step: int64, 0-dim."""

    def fits(
        self, layers: Sequence[int], groups: Sequence[int], num_layers: int, device: torch.device
    ) -> bool:
        """Whether it is one for these."""
        return self._description == (list(layers), list(groups), num_layers, device)

    @property
    def step(self) -> int:
        """The number of this step; waits for the device."""
        return int(self.count)

    def number(self) -> Tensor:
        """As in :class:`HostClock`: int64, 0-dim, nothing waits."""
        return self.count.clone()

    def set_rates(self, rates: Sequence[float | Tensor]) -> None:
        """The learning rates of this step, one a group; captured, a number stays what it is now.

        Those of groups that were added later are left out: they hold none of these parameters.
        """
        for place, rate in zip(self._rates, rates, strict=False):
            if isinstance(rate, Tensor) and rate.device == place.device:
                place.copy_(rate.detach().reshape(()))
            else:
                place.fill_(float(rate))

    def layer_rates(self) -> tuple[Tensor, Tensor]:
        """As :meth:`HostClock.layer_rates`, on the device."""
        both = torch.stack([self._rates, self._before])
        of_layers = both[:, self._layer_groups]
        same = (of_layers == of_layers[:, :1]).all(1)
        lr, prev_lr = torch.where(same, of_layers[:, 0], math.nan)
        return lr, prev_lr

    def factors(self, scale: Tensor | None) -> Tensor:
        """Learning rate times `scale` (float64, (L,)), at the places of `scale_of`."""
        rates = self._rates.index_select(0, self._group_at)
        if scale is None:
            return rates
        return rates * torch.cat([scale, self._one]).index_select(0, self._layer_at)

    def bounds(self, bound: Tensor | None) -> Tensor | None:
        """`bound` (float64, (L,)) at the places of `scale_of`; infinite for what has no layer."""
        if bound is None:
            return None
        return torch.cat([bound, self._unbounded]).index_select(0, self._layer_at)

    def advance(self) -> None:
        """The step is over."""
        self.count.add_(1)
        self._before.copy_(self._rates)

    def state(self) -> tuple[int, list[float]]:
        """As :meth:`HostClock.state`; waits for the device."""
        return int(self.count), self._before.tolist()


Clock = HostClock | DeviceClock


def new_clock(
    layers: Sequence[int],
    groups: Sequence[int],
    num_layers: int,
    step: int,
    rates: Sequence[float],
    device: torch.device | None,
) -> Clock:
    """A clock on the host or, with `device`, there; the rest as in :class:`HostClock`."""
    if device is None:
        return HostClock(layers, groups, num_layers, step, rates)
    return DeviceClock(layers, groups, num_layers, step, rates, device)


def rates_of(groups: Sequence[object], known: Sequence[object], rates: Sequence[float]) -> list[float]:
    """The rate of each of the parameter groups `groups`, of which `known` have `rates`; NaN: it has none."""
    by_group = {id(group): rate for group, rate in zip(known, rates, strict=False)}
    return [by_group.get(id(group), math.nan) for group in groups]


def columns(lists: Sequence[Sequence[int]], filler: int | None = None) -> Tensor:
    """Each list as a column, int64; the rest of it is `filler`, or the list's first entry again."""
    most = max(map(len, lists), default=1)
    rows = [[*x, *[x[0] if filler is None else filler] * (most - len(x))] for x in lists]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(lists), most).T
