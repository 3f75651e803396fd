"""OscGD: gradient descent that measures gradient oscillation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from .engine import Engine
from .history import History
from .layers import Layers, assign
from .window import Window


class OscGD(Optimizer):
    r"""Gradient descent, as ``torch.optim.SGD`` does it, that measures how adjacent gradients correlate.

    Every step sums, for each layer and in the same pass over memory that updates the parameters,
    :math:`\langle g_t, g_{t-1}\rangle`, :math:`\|g_t\|^2`, :math:`\|g_t - g_{t-1}\|^2` and
    :math:`\|g_{t-1}\|^2`, where :math:`g_t` is `p.grad` as `step` finds it: after unscaling and clipping,
    before weight decay and momentum. See :class:`oscopt.History` for what follows from them.

    The previous gradient is kept by reference, not copied: use ``zero_grad(set_to_none=True)``, torch's
    default. Where the tensor is reused instead, one measurement is lost (NaN) and from then on it is copied.

    Args:
        params: parameters, `named_parameters()` (best: layers get their names), or dicts of groups.
        lr: learning rate eta; a float or a 1-element tensor.
        momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
        layers: which parameters make up a layer. "module": those that one module owns directly, named by its
            path. "parameter": each its own. A dict, parameter name -> layer name (None: update, do not
            measure) or layer name -> list of parameter names. A callable, parameter name -> layer or None.
        every: measure every `every`-th step; the others cost what SGD costs.
        sample: in (0, 1]. Less than 1: measure a fixed pseudo-random choice of aligned blocks that holds this
            fraction of each parameter (at least 16,384 elements, or all of it), and keep only their previous
            gradient. The sums are then unbiased estimates; `correlation_stderr` tells the error.
        adapt: reserved; must be None.
        backend: "auto", "triton" (CUDA, ROCm), "numba" (CPU) or "torch" (anywhere).
        history: record into this one, which goes on where it ends. Default: a new one.

    Raises:
        ValueError: a hyperparameter is out of its range, `layers` loses a parameter, `backend` is unknown, or
            `history` belongs to other layers.
        TypeError: a parameter is complex or not floating-point.
        RuntimeError: `backend` cannot run on the parameters' device.
        NotImplementedError: `adapt` is used.

    Example:
        >>> optimizer = OscGD(model.named_parameters(), lr=0.1)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     loss_fn(model(x), y).backward()
        ...     optimizer.step()
        >>> optimizer.history.global_correlation(window=5)

    Source: Morchdi, Zhou, Ding, Wang, "Exploring Gradient Oscillation in Deep Neural Network Training", 2023.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        layers: Layers = "module",
        every: int = 1,
        sample: float = 1.0,
        adapt: None = None,
        backend: str = "auto",
        history: History | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"Invalid every: {every!r}; use a whole number of steps, 1 or more")
        if not (isinstance(sample, int | float) and 0.0 < sample <= 1.0):
            raise ValueError(f"Invalid sample: {sample!r}; use a fraction greater than 0 and at most 1")
        if adapt is not None:
            raise NotImplementedError(f"adapt={adapt!r} is not available yet; use adapt=None")
        if history is not None and not isinstance(history, History):
            raise TypeError(f"history must be an oscopt.History or None, not {type(history).__name__}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "step": len(history) and int(history.steps[-1]) + 1 if history is not None else 0,
        }
        _check(defaults)
        self._layers = layers
        self._assigned: dict[str, str | None] = {}  # parameter -> layer
        self._every = every
        self._sample = float(sample)
        self._backend = backend
        self._history = History() if history is None else history
        self._engine: Engine | None = None
        self._hyper: tuple[tuple[float, ...], ...] = ()
        super().__init__(params, defaults)
        self._assign_layers()
        self._ensure_engine()

    # ---- what users read ---------------------------------------------------------------------------------

    @property
    def correlation(self) -> Tensor:
        """Latest correlation mu of each layer: float64, shape (L,), on the parameters' device, no waiting."""
        return self._ensure_engine().correlation()

    @property
    def correlation_stderr(self) -> Tensor:
        """Standard error of `correlation` with `sample` < 1, else 0: float64, shape (L,), on the device."""
        return self._ensure_engine().correlation_stderr()

    @property
    def global_correlation(self) -> Tensor:
        """Latest correlation of all layers together: float64, 0-dim, on the device, no waiting."""
        return self._ensure_engine().global_correlation()

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the L layers, in the order of their first parameters."""
        return self._ensure_engine().layer_names

    @property
    def step_scale(self) -> Tensor:
        """Multiplier of the learning rate of each layer: float64, shape (L,), all ones without adaptation."""
        engine = self._ensure_engine()
        return torch.ones(len(engine.layer_names), dtype=torch.float64, device=engine.device)

    @property
    def history(self) -> History:
        """The record so far."""
        return self._history

    @property
    def backend(self) -> str:
        """Name of the backend in use; joined by "+" where parameters lie on several kinds of devices."""
        return self._ensure_engine().backend

    def window(self, h: int = 5) -> Window:
        """Keep the gradients of the next `h` steps for their pairwise correlations.

        A context manager: leaving it early gives up. Takes `h` copies of the measured gradients meanwhile.

        Raises:
            ValueError: `h` is less than 2.
        """
        return self._ensure_engine().open_window(h)

    # ---- the step ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Measure and update.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            RuntimeError: a gradient is sparse. No parameter has been changed by then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        engine = self._ensure_engine()
        grads = engine.gradients()
        hyper = []
        for group in self.param_groups:
            lr, momentum, damp = float(group["lr"]), float(group["momentum"]), float(group["dampening"])
            decay, ahead = float(group["weight_decay"]), momentum if group["nesterov"] else 0.0
            sign = -1.0 if group["maximize"] else 1.0
            hyper.append((lr, momentum, 1.0 - damp, decay, ahead, sign))
            hyper.append((lr, 0.0, 1.0, decay, ahead, sign))  # a momentum buffer's first step
        if tuple(hyper) != self._hyper:
            self._hyper = tuple(hyper)
        bufs: list[Tensor | None] = [None] * len(grads)
        rows = [2 * slot.group for slot in engine.slots]
        if any(row[1] for row in hyper):
            for i, slot in enumerate(engine.slots):
                if grads[i] is not None and hyper[rows[i]][1]:
                    bufs[i] = slot.state.get("momentum_buffer")
                    if bufs[i] is None:
                        bufs[i] = slot.state["momentum_buffer"] = torch.zeros_like(slot.param)
                        rows[i] += 1
        step = self.param_groups[0]["step"]
        engine.step(step, grads, bufs, rows, self._hyper, tuple(row[0] for row in hyper[::2]))
        # Kernels write through raw pointers: autograd must learn of it.
        increment_version([slot.param for slot, g in zip(engine.slots, grads, strict=True) if g is not None])
        for group in self.param_groups:
            group["step"] = step + 1
        return loss

    # ---- torch.optim's protocol --------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.add_param_group``; new layers are NaN in the history up to now."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
            for p in self.param_groups[-1]["params"]:
                if not p.is_floating_point():
                    raise TypeError(f"OscGD needs real floating-point parameters, not {p.dtype}")
            if self._assigned:  # while the constructor adds its groups, the layers are not known yet
                self._assign_layers()
        except BaseException:
            self.param_groups.pop()
            raise
        self._engine = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.load_state_dict``; also takes the state of a ``torch.optim.SGD``."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.setdefault("step", 0)
        self._engine = None

    def __getstate__(self) -> dict[str, Any]:
        own = {
            name: getattr(self, name) for name in ("_every", "_sample", "_backend", "_history", "_assigned")
        }
        own["_layers"] = self._layers if isinstance(self._layers, str) else dict(self._assigned)
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._engine, self._hyper = None, ()

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-2]}\nbackend: {self.backend}, {len(self.layer_names)} layers\n)"

    # ---- inside ------------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        """Names of all parameters, in the order of the groups."""
        names: list[str] = []
        for group in self.param_groups:
            first, count = len(names), len(group["params"])
            names += group.get("param_names") or [f"param{first + i}" for i in range(count)]
        return names

    def _assign_layers(self) -> None:
        names = self._names()
        if len(set(names)) < len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise ValueError(f"two parameters are called {twice!r}; give them different names")
        named = "param_names" in self.param_groups[0]
        self._assigned = dict(zip(names, assign(names, self._layers, named=named), strict=True))

    def _ensure_engine(self) -> Engine:
        """The engine of the parameters as they are now."""
        if self._engine is None or self._engine.stale():
            params = [p for group in self.param_groups for p in group["params"]]
            engine = Engine(
                names=list(self._assigned),
                params=params,
                states=[self.state[p] for p in params],
                groups=[i for i, group in enumerate(self.param_groups) for _ in group["params"]],
                layers=list(self._assigned.values()),
                every=self._every,
                sample=self._sample,
                backend=self._backend,
                history=self._history,
            )
            if self._engine is not None:
                engine.windows = self._engine.windows
            self._engine = engine
        return self._engine


def _check(group: dict[str, Any]) -> None:
    """Raise where ``torch.optim.SGD`` does, and for numbers that are not finite."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, not of shape {tuple(lr.shape)}")
    for name, text in (
        ("lr", "learning rate"),
        ("momentum", "momentum value"),
        ("weight_decay", "weight_decay value"),
    ):
        if not (group[name] >= 0.0 and math.isfinite(group[name])):
            raise ValueError(f"Invalid {text}: {group[name]}; it must be finite and not negative")
    if not math.isfinite(group["dampening"]):
        raise ValueError(f"Invalid dampening value: {group['dampening']}; it must be finite")
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
