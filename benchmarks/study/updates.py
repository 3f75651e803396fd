"""The correlation of adjacent updates x_{t+1} - x_t, for optimizers whose updates are not their gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from oscopt import History, OscMonitor


class UpdateMeter:
    """Measures the updates of `optimizer` as :class:`oscopt.OscMonitor` measures gradients.

    Each parameter has a shadow that follows it; the shadow's gradient is the update, and a monitor looks at
    an optimizer of the shadows. Costs three copies of the parameters.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        layers: str = "module",
        history: History,
    ) -> None:
        named = list(named_parameters)
        self._parameters = [p for _, p in named]
        self._shadows = [p.detach().clone().requires_grad_() for p in self._parameters]
        names = [name for name, _ in named]
        self._follower = SGD(self._shadows, lr=0.0)
        self._monitor = OscMonitor(
            self._follower, zip(names, self._shadows, strict=True), layers=layers, history=history
        )
        optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        for shadow, parameter in zip(self._shadows, self._parameters, strict=True):
            shadow.grad = parameter - shadow
        self._follower.step()
        torch._foreach_copy_(self._shadows, self._parameters)

    @property
    def history(self) -> History:
        """The sums of every step and layer, of updates instead of gradients."""
        return self._monitor.history

    def state_dict(self) -> dict[str, Any]:
        """The previous update: tensors and plain values only."""
        return self._monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the parameters must be loaded before."""
        with torch.no_grad():
            torch._foreach_copy_(self._shadows, self._parameters)
        self._monitor.load_state_dict(state_dict)
