"""OscMonitor: measures the gradients of any optimizer, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .engine import COPIED, PREVIOUS, SAMPLE, SAMPLE_LAYOUT, Engine
from .history import History
from .layers import Layers, assign
from .window import Window

_KEYS = (PREVIOUS, COPIED, SAMPLE, SAMPLE_LAYOUT)


class OscMonitor:
    """Measures, at each step of `optimizer`, how the gradients that it finds correlate with the last ones.

    Args:
        optimizer: any ``torch.optim.Optimizer``. Its trajectory stays what it is, bit for bit.
        named_parameters: `model.named_parameters()`; those that `optimizer` holds are measured.
        layers, every, sample, backend, history: as in :class:`oscopt.OscGD`.

    Raises:
        ValueError: `optimizer` holds none of the parameters; or as in :class:`oscopt.OscGD`.

    The recorded `lr` is the optimizer's; a curvature follows from it only if that is plain gradient descent.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        layers: Layers = "module",
        every: int = 1,
        sample: float = 1.0,
        backend: str = "auto",
        history: History | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"Invalid every: {every!r}; use a whole number of steps, 1 or more")
        if not (isinstance(sample, int | float) and 0.0 < sample <= 1.0):
            raise ValueError(f"Invalid sample: {sample!r}; use a fraction greater than 0 and at most 1")
        group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        held = {name: p for name, p in named_parameters if p in group_of}
        if not held:
            raise ValueError("the optimizer holds none of the named parameters; pass those that it updates")
        self._history = History() if history is None else history
        self._step = int(self._history.steps[-1]) + 1 if len(self._history) else 0
        self._optimizer = optimizer
        self._states: dict[str, dict[str, Any]] = {name: {} for name in held}
        self._options: dict[str, Any] = {
            "names": list(held),
            "params": list(held.values()),
            "groups": [group_of[p] for p in held.values()],
            "layers": assign(list(held), layers),
            "every": every,
            "sample": float(sample),
            "backend": backend,
            "history": self._history,
        }
        self._engine = self._new_engine()
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def _new_engine(self) -> Engine:
        return Engine(states=list(self._states.values()), **self._options)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if self._engine.stale():
            windows = self._engine.windows
            self._engine = self._new_engine()
            self._engine.windows = windows
        grads = self._engine.gradients()
        lr = tuple(float(group.get("lr", torch.nan)) for group in optimizer.param_groups)
        nothing = [None] * len(grads)
        self._engine.step(self._step, grads, nothing, [0] * len(grads), None, lr)
        self._step += 1

    @property
    def correlation(self) -> Tensor:
        """Latest correlation mu of each layer: float64, shape (L,), on the parameters' device."""
        return self._engine.correlation()

    @property
    def correlation_stderr(self) -> Tensor:
        """Standard error of `correlation` with `sample` < 1, else 0: float64, shape (L,)."""
        return self._engine.correlation_stderr()

    @property
    def global_correlation(self) -> Tensor:
        """Latest correlation of all layers together: float64, 0-dim, on the parameters' device."""
        return self._engine.global_correlation()

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the L layers."""
        return self._engine.layer_names

    @property
    def history(self) -> History:
        """The record so far."""
        return self._history

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self._engine.backend

    def window(self, h: int = 5) -> Window:
        """Keep the gradients of the next `h` steps; see :meth:`oscopt.OscGD.window`."""
        return self._engine.open_window(h)

    def state_dict(self) -> dict[str, Any]:
        """The previous gradients and the number of steps: tensors and plain values only."""
        return {"step": self._step, "state": {name: dict(state) for name, state in self._states.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: it holds other parameters.
        """
        if set(state_dict["state"]) != set(self._states):
            different = sorted(set(state_dict["state"]) ^ set(self._states))
            raise ValueError(f"the monitor's state is of other parameters, such as {different[0]!r}")
        self._step = state_dict["step"]
        for name, state in self._states.items():
            state.clear()
            state.update(
                {key: state_dict["state"][name][key] for key in _KEYS if key in state_dict["state"][name]}
            )
        self._engine = self._new_engine()

    def detach(self) -> None:
        """Stop measuring and let go of the gradients."""
        self._hook.remove()
        for state in self._states.values():
            state.clear()

    def __enter__(self) -> OscMonitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()
