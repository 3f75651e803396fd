"""OscGD: gradient descent that measures gradient oscillation."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from .adapt import Adapter, Policy, resolve
from .distributed import Ranks, bare
from .engine import (
    KEYS,
    MEASURES,
    PREVIOUS,
    SKETCH,
    Engine,
    Reshaped,
    backend_for,
    check_settings,
    no_correlation,
    skipped,
)
from .history import History
from .kernels import capturing
from .layers import Layers, Listing, assign, follow, members
from .recorder import Recorder, one_device
from .window import Window

_ADDED = {
    "nesterov": False,
    "maximize": False,
    "foreach": None,
    "differentiable": False,
    "fused": None,
    "prev_lr": math.nan,
}
"""What the groups of an older state may lack."""


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
        lr: learning rate eta; a float or a 1-element tensor. Default: 1e-3; with ``adapt="auto"``, whose
            steps it multiplies, 1.
        momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
        foreach, fused: the update is one pass over all tensors either way. `fused=True` also takes unscaling
            and skipping over from a ``torch.amp.GradScaler``, and waits for the device to know which.
        capturable: steps can be captured in a CUDA graph and replayed (docs/guide.md); a learning rate that
            is a tensor on the parameters' device may change between replays. The previous gradient is copied
            then, and the device counts the steps and keeps those that `history` has not taken, which it does
            when it is read: at least the last 256.
        differentiable: the update is made of torch's own operations, which autograd records.
        copy_gradients: copy the previous gradient (20 bytes a float32 parameter and step instead of 16)
            rather than keep the tensor. For training loops that write to a gradient after the step where
            autograd does not see it (`p.grad.data`, numpy) and leave its norm as it was, as a change of signs
            does, or do so with `every` > 1: other writes are noticed.
        layers: which parameters make up a layer. "module": those that one module owns directly, named by its
            path. "parameter": each its own. A dict, parameter name -> layer name (None: update, do not
            measure) or layer name -> list of parameter names. A callable, parameter name -> layer or None;
            if it cannot be pickled (a lambda), a pickled optimizer has its answers so far, as a dict.
        measure: "exact": against the last gradient, and with momentum also against that. "sketch": against a
            random projection of the last gradient, some 3 % of it: nothing else is kept, a step costs little
            more than SGD's, and the correlation has a standard error (`history.correlation_stderr`, see
            docs/sketch.md); against the momentum only where `adapt` asks for it.
            "alignment": against the momentum alone, which costs nothing and keeps no gradient; the
            correlation is NaN then.
        every: measure every `every`-th step; the others cost what SGD costs.
        adapt: a policy of :mod:`oscopt.adapt`, or its name, that sets a multiplier of `lr` for each layer
            from what was measured; None: all stay 1. "auto" needs neither `lr` nor `momentum`. A group with
            ``"adapt": False`` is left out.
        backend: "auto", "triton" (CUDA, ROCm), "numba" (CPU) or "torch" (anywhere).
        history: record into this one, which goes on where it ends. Default: a new one.

    Raises:
        ValueError: a hyperparameter is out of its range, `layers` loses a parameter, `backend` is unknown, or
            `history` belongs to other layers.
        TypeError: a parameter is neither floating-point nor complex (a complex one is measured and updated as
            its real and imaginary parts).
        RuntimeError: `backend` cannot run on the parameters' device, or two arguments exclude each other.

    Example:
        >>> optimizer = OscGD(model.named_parameters(), lr=0.1)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     loss_fn(model(x), y).backward()
        ...     optimizer.step()
        >>> optimizer.history.global_correlation(window=5)

    Source: Morchdi, Zhou, Ding, Wang, "Exploring Gradient Oscillation in Deep Neural Network Training", 2023.
    """

    _constructing = False  # torch.optim.Optimizer.__init__ calls methods of ours

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor | None = None,
        momentum: float | None = None,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        copy_gradients: bool = False,
        layers: Layers = "module",
        measure: str = "exact",
        every: int = 1,
        adapt: str | Policy | None = None,
        backend: str = "auto",
        history: History | None = None,
    ) -> None:
        check_settings(every, capturable)
        policy = resolve(adapt)
        if history is not None and not isinstance(history, History):
            raise TypeError(f"history must be an oscopt.History or None, not {type(history).__name__}")
        if measure not in MEASURES:
            raise ValueError(f"Invalid measure: {measure!r}; use one of {', '.join(map(repr, MEASURES))}")
        if policy is not None and measure == "alignment" and getattr(policy, "signal", "") != "momentum":
            raise ValueError(
                f"measure='alignment' does not measure what the policy {policy!r} needs; use measure='exact'"
            )
        own_momentum = getattr(policy, "momentum", None)
        if own_momentum is not None and momentum is not None:
            raise ValueError(
                f"Invalid momentum: {momentum}; leave it out, as `adapt` has its own, {own_momentum}"
            )
        momentum = momentum if momentum is not None else own_momentum or 0.0
        if lr is None:
            lr = 1e-3 if own_momentum is None else 1.0
        elif own_momentum is not None and not isinstance(lr, Tensor) and not lr > 0:
            raise ValueError(
                f"Invalid lr: {lr}; the policy of `adapt` has steps of its own, which it multiplies: use 1"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "step": history.next_step if history is not None else 0,
            "prev_lr": math.nan,
        }
        _check(defaults)
        if differentiable and policy is not None:
            raise RuntimeError("`differentiable` does not support `adapt`")
        if fused and differentiable:
            raise RuntimeError("`fused` does not support `differentiable`")
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if capturable and differentiable:
            raise RuntimeError("`capturable` does not support `differentiable`")
        if fused:
            self._step_supports_amp_scaling = True
        self._layers = layers
        self._constructing = True
        self._names: dict[Tensor, str] = {}  # of the parameters, as they were when last looked at
        self._assigned: dict[str, str | None] = {}  # name -> layer, also of parameters that are gone
        self._every = every
        self._measure = measure
        self._copy_gradients = bool(copy_gradients)
        self._backend = backend
        self._policy = policy
        self._adapter: Adapter | None = None
        self._capturable = capturable
        self._recorder: Recorder | None = None
        # Whose steps graphs have captured, and what they use, by `id`.
        self._captured: tuple[Engine | None, dict[int, Any]] = (None, {})
        self._history = History() if history is None else history
        self._engine: Engine | None = None
        self._listing: Listing | None = None  # what the engine was made for
        self._windows: list[Window] = []
        self._ranks: Ranks | None = None
        self._hyper: tuple[tuple[float, ...], ...] = ()
        super().__init__(params, defaults)
        if measure == "alignment" and not any(group["momentum"] for group in self.param_groups):
            raise ValueError("measure='alignment' is against the momentum: give one, such as momentum=0.9")
        self._name_all()
        self._ensure_engine()
        self._history.about |= {"optimizer": "OscGD", "quantity": "gradients"}
        if any(group["weight_decay"] for group in self.param_groups):
            self._history.about["plain"] = False  # momentum shows in the record

    # ---- what users read ---------------------------------------------------------------------------------

    @property
    def correlation(self) -> Tensor:
        """Latest correlation mu of each layer: float64, shape (L,), on the parameters' device, no waiting."""
        if self._engine is None:
            return no_correlation(self._device(), len(self.layer_names))
        return self._engine.correlation()

    @property
    def global_correlation(self) -> Tensor:
        """Latest correlation of all layers together: float64, 0-dim, on the device, no waiting."""
        return no_correlation(self._device()) if self._engine is None else self._engine.global_correlation()

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the L layers, in the order of their first parameters, as of the last step."""
        if self._engine is not None:
            return self._engine.layer_names
        return tuple(dict.fromkeys(x for x in map(self._assigned.get, self._names.values()) if x is not None))

    @property
    def step_scale(self) -> Tensor:
        """Multiplier of each layer's learning rate in the next step: float64, shape (L,), on the device."""
        if self._adapter is not None:
            self._history.settle()
            return self._adapter.scale.clone()
        scale = torch.ones(len(self.layer_names), dtype=torch.float64, device=self._device())
        if self._policy is not None and self.param_groups and len(scale):
            return self._new_adapter(self._policy, self._device()).scale
        return scale

    @property
    def rejected_scales(self) -> Tensor:
        """How many scales of the policy were negative or not finite, and so not used: int64, 0-dim."""
        if self._adapter is None:
            return torch.zeros((), dtype=torch.int64, device=self._device())
        self._history.settle()
        return self._adapter.rejected.clone()

    @property
    def history(self) -> History:
        """The record so far."""
        return self._history

    @property
    def backend(self) -> str:
        """Name of the backend in use; joined by "+" where parameters lie on several kinds of devices."""
        if self._engine is not None:
            return self._engine.backend
        devices = dict.fromkeys(p.device for p in self._names)
        return "+".join(dict.fromkeys(backend_for(self._backend, device).NAME for device in devices))

    def window(self, h: int = 5) -> Window:
        """Keep the gradients of the next `h` steps for their pairwise correlations.

        A context manager: leaving it early gives up. Takes `h` copies of the measured gradients meanwhile.

        Raises:
            ValueError: `h` is less than 2.
        """
        return self._ensure_engine().open_window(h)

    # ---- the step ----------------------------------------------------------------------------------------

    @torch._disable_dynamo  # a compiled train step breaks here: kernels are called by address
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Measure and update.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            RuntimeError: a gradient is sparse, or the process group of sharded parameters is gone.
            ValueError: a gradient or a momentum buffer has another shape than its parameter.
            Exception: what the policy of `adapt` raised in the last step, where the update came first.

        No parameter has been changed by then. The groups may be edited by hand between two steps, as those of
        ``torch.optim.SGD``; what has no previous gradient is NaN in the record.

        If a ``torch.amp.GradScaler`` leaves unscaling to this optimizer (`fused=True`) and has found a
        gradient that is not finite, the step is skipped: no update, no measurement, and the next one pairs
        with the last that was applied.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if self._unscale():
                self._measure_and_update()
        return loss

    def _unscale(self) -> bool:
        """Do what a GradScaler has left to do; False: this step is to be skipped."""
        if skipped(self):
            return False
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            by_device: dict[torch.device, list[Tensor]] = {}
            for p in dict.fromkeys(p for group in self.param_groups for p in group["params"]):
                if p.grad is not None:
                    g = bare(p.grad)
                    by_device.setdefault(g.device, []).append(g)
            for device, grads in by_device.items():
                torch._foreach_div_(grads, scale.to(device, non_blocking=True))
        return True

    def _measure_and_update(self) -> None:
        if not self.param_groups:
            return
        engine = self._ensure_engine()
        try:
            grads, wholes = engine.gradients()
        except Reshaped:
            self._drop_engine()
            engine = self._ensure_engine()
            grads, wholes = engine.gradients()
        if capturing(engine.device):
            self._check_capture(engine, grads)
        hyper = []
        for group in self.param_groups:
            self._check_adapted(group)
            # The recorder has the rate then.
            lr = 1.0 if self._recorder is not None else _number(group["lr"])
            momentum, damp = float(group["momentum"]), float(group["dampening"])
            decay, ahead = _number(group["weight_decay"]), momentum if group["nesterov"] else 0.0
            sign = -1.0 if group["maximize"] else 1.0
            hyper.append((lr, momentum, 1.0 - damp, decay, ahead, sign))
            hyper.append((lr, 0.0, 1.0, decay, ahead, sign))  # a momentum buffer's first step
        if tuple(hyper) != self._hyper:
            self._hyper = tuple(hyper)
        differentiable = any(group.get("differentiable") for group in self.param_groups)
        bufs, rows = None, engine.rows
        if any(row[1] for row in hyper) and not differentiable:
            bufs, rows = self._buffers(engine, grads, grads is wholes, hyper)
        step = self._step()
        rates = tuple(row[0] for row in hyper[::2])
        if self._recorder is not None:
            rates = tuple(group["lr"] for group in self.param_groups)
            self._recorder.set_rates(rates)
        if step == 0 and engine.untouched and not any(map(_may_move, rates)) and _all_zero(grads):
            # torch.distributed.checkpoint has an optimizer make its state by such a step. It is none.
            engine.begin(grads, wholes)
            return
        before = tuple(group.get("prev_lr", math.nan) for group in self.param_groups)
        update = None if differentiable else self._hyper
        engine.step(step, grads, wholes, bufs, rows, update, rates, before)
        if capturing(engine.device):
            if self._captured[0] is not engine:  # what was captured before it cannot be replayed any more
                self._captured = engine, {}
            # By `id`: capturing the same step again holds nothing more.
            self._captured[1].update(engine.in_use() | {id(b): b for b in bufs or ()})
        if differentiable:
            self._update_differentiably()
        else:
            # Kernels write through raw pointers: autograd must learn of it.
            present = engine.params
            if grads is not wholes:
                present = [p for p, g in zip(present, grads, strict=True) if g is not None]
            increment_version(present)
        if self._recorder is None:
            for group, lr in zip(self.param_groups, rates, strict=True):
                group["step"], group["prev_lr"] = step + 1, lr

    def _buffers(
        self,
        engine: Engine,
        grads: Sequence[Tensor | None],
        regular: bool,
        hyper: Sequence[tuple[float, ...]],
    ) -> tuple[Sequence[Tensor | None], list[int]]:
        """The momentum buffers, and the rows of `hyper`: in a buffer's first step, the one for that."""
        if regular and all(row[1] for row in hyper[::2]):
            everyone = engine.entries("momentum_buffer")
            if everyone is not None:
                return everyone, engine.rows
        used = [i for i, g in enumerate(grads) if g is not None and hyper[engine.rows[i]][1]]
        for slot in (engine.slots[i] for i in used):
            buf = slot.state.get("momentum_buffer") if slot.state else None
            if buf is not None and (bare(buf).shape, bare(buf).device) != (slot.shape, slot.device):
                raise ValueError(
                    f"parameter {slot.name!r} has shape {tuple(slot.outer.shape)} on {slot.device}, its "
                    f"momentum buffer {tuple(buf.shape)} on {buf.device}; change both, or delete the buffer "
                    "(optimizer.state[p].pop('momentum_buffer'))"
                )
        bufs: list[Tensor | None] = [None] * len(grads)
        rows = list(engine.rows)
        begun: dict[Tensor, int] = {}  # in which group
        for i in used:
            slot = engine.slots[i]
            state = engine.state(slot)
            buf = state.get("momentum_buffer")
            if buf is None:
                buf = state["momentum_buffer"] = torch.zeros_like(slot.outer)
                begun[slot.outer] = slot.group
            if begun.get(slot.outer) == slot.group:
                rows[i] += 1
            if buf.dtype != slot.outer.dtype or buf.stride() != slot.outer.stride():
                # Somebody's own: kernels need it like its parameter.
                buf = state["momentum_buffer"] = torch.empty_like(slot.outer).copy_(buf)
            bufs[i] = buf if slot.outer is slot.param else bare(buf)
        return bufs, rows

    def _check_capture(self, engine: Engine, grads: list[Tensor | None]) -> None:
        """Raise where a step could not be captured in a CUDA graph."""
        engine.check_capture(grads)
        for group in self.param_groups:
            if isinstance(group["lr"], Tensor) and group["lr"].device != engine.device:
                raise RuntimeError(
                    f"lr is a tensor on {group['lr'].device}, which a graph cannot read at every replay; "
                    f"put it on {engine.device}"
                )
        for slot, g in zip(engine.slots, grads, strict=True):
            if g is None or not self.param_groups[slot.group]["momentum"]:
                continue
            buf = (slot.state or {}).get("momentum_buffer")
            if buf is None or buf.dtype != slot.outer.dtype or buf.stride() != slot.outer.stride():
                raise RuntimeError(
                    f"parameter {slot.name!r} has no momentum buffer yet, and every replay would begin a new "
                    "one; take 3 steps with momentum before capturing"
                )

    def _update_differentiably(self) -> None:
        """By torch's own operations, which autograd records."""
        with torch.set_grad_enabled(True):
            for group in self.param_groups:
                params = [p for p in group["params"] if p.grad is not None]
                bufs = [self.state[p].get("momentum_buffer") if group["momentum"] else None for p in params]
                sgd(
                    params,
                    [p.grad for p in params],
                    bufs,
                    has_sparse_grad=False,
                    foreach=False,
                    fused=False,
                    **{key: group[key] for key in ("weight_decay", "momentum", "lr", "dampening")},
                    **{key: group[key] for key in ("nesterov", "maximize")},
                )
                if group["momentum"]:
                    for p, buf in zip(params, bufs, strict=True):
                        self.state[p]["momentum_buffer"] = buf

    # ---- torch.optim's protocol --------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.add_param_group``; new layers are NaN in the history up to now."""
        self._show_state()
        own_momentum = getattr(self._policy, "momentum", None)
        if own_momentum is not None and isinstance(param_group, dict) and not param_group.get("adapt", True):
            if "lr" not in param_group:
                raise ValueError(
                    "a group with 'adapt': False needs its own 'lr': that of the others multiplies the steps "
                    "of the policy"
                )
            param_group = {"momentum": 0.0} | param_group
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            group["step"] = self._step()
            _check(group)
            self._check_adapted(group)
            for p in group["params"]:
                if not (p.is_floating_point() or p.is_complex()):
                    raise TypeError(f"OscGD needs floating-point or complex parameters, not {p.dtype}")
                if not is_lazy(p) and (p.is_conj() or p.is_neg()):
                    raise TypeError(
                        "OscGD needs parameters whose memory holds their values, not a lazy conjugate or "
                        "negative; make it of p.resolve_conj().resolve_neg()"
                    )
                if group["differentiable"] and self._policy is not None:
                    raise RuntimeError("`differentiable` does not support `adapt`")
                if group["fused"] and p.is_complex():
                    raise RuntimeError(
                        f"`fused=True` requires all the params to be floating point Tensors, not {p.dtype}"
                    )
            if self._constructing:  # the groups are added first
                return
            self._name_all()
        except BaseException:
            self.param_groups.pop()
            raise
        self._drop_engine()
        self._ensure_engine()  # ranks that share parameters meet here, not where one of them reads

    def _check_adapted(self, group: Mapping[str, Any]) -> None:
        """Raise where a group cannot have the updates of a policy with a momentum of its own."""
        momentum = getattr(self._policy, "momentum", None)
        if momentum is None or not group.get("adapt", True):
            return
        for name, value in (("momentum", momentum), ("dampening", 0.0), ("nesterov", False)):
            if group[name] != value:
                raise ValueError(
                    f"Invalid {name}: {group[name]} in a group that the policy {self._policy!r} adapts; "
                    f"leave it at {value} (also in a scheduler), or give the group 'adapt': False"
                )

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``; the scales of `adapt` are in the first group."""
        self._show_state()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.load_state_dict``; also takes the state of a ``torch.optim.SGD``.

        The history is cut back to the state's step.
        """
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(numbers, params, strict=False):
            # torch has made it of the parameter's dtype, which a gradient need not have.
            for key in (PREVIOUS, SKETCH):
                prev = state_dict["state"].get(i, {}).get(key)
                if prev is not None and prev.dtype != p.dtype:
                    self.state[p][key] = prev.to(p.device)
        for group in self.param_groups:
            group.setdefault("step", self._history.next_step)
        self._history.cut(self._step())
        self._drop_engine()
        self._adapter = self._recorder = None
        self._ensure_engine()

    def _drop_engine(self) -> None:
        """Another is to be made; what is left of this one is in the parameters' state, and its windows.

        Of parameters that are gone nothing is left.
        """
        names = follow(self.param_groups, self._names)
        if self._engine is not None:
            self._engine.drop_spoiled(members((self._layer(name), p) for p, name in names.items()))
            self._windows, self._engine = self._engine.windows, None
        for p in self._names.keys() - names.keys():
            if p in self.state:
                for key in KEYS:
                    self.state[p].pop(key, None)
                if not self.state[p]:  # SGD has none, and nothing to save
                    del self.state[p]

    def _show_state(self) -> None:
        """Make the state what it is saved as: only good gradients, and adaptation's in the first group."""
        if self._constructing:
            return
        if self._listing is None or not self._listing.holds(self.param_groups):
            self._drop_engine()
        elif self._engine is not None:
            self._engine.drop_spoiled()
        if not self.param_groups:
            return
        if self._recorder is not None:
            step, rates = self._recorder.state()
            for group, rate in zip(self.param_groups, rates, strict=False):  # one may have just been added
                group["step"], group["prev_lr"] = step, rate
        if self._adapter is not None:
            self._history.settle()
            self.param_groups[0].update(self._adapter.state())

    def __getstate__(self) -> dict[str, Any]:
        self._show_state()
        own = {
            name: getattr(self, name)
            for name in (
                "_every",
                "_measure",
                "_copy_gradients",
                "_backend",
                "_history",
                "_assigned",
                "_policy",
                "_capturable",
            )
        }
        own["_names"] = follow(self.param_groups, self._names)
        own["_layers"] = self._layers if _can_be_pickled(self._layers) else dict(self._assigned)
        return super().__getstate__() | own

    def __deepcopy__(self, memo: dict[int, Any]) -> OscGD:
        memo[id(self)] = copied = self.__class__.__new__(self.__class__)
        copied.__setstate__(copy.deepcopy(self.__getstate__() | {"_layers": self._layers}, memo))
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in _ADDED.items():
                group.setdefault(key, value)
        if any(group["fused"] for group in self.param_groups):
            self._step_supports_amp_scaling = True
        self._engine, self._ranks, self._hyper = None, getattr(self, "_ranks", None), ()
        self._adapter, self._recorder, self._windows = None, None, []
        self._listing, self._captured = None, getattr(self, "_captured", (None, {}))
        self._capturable = getattr(self, "_capturable", False)  # it came later
        self._measure = getattr(self, "_measure", "exact")

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-2]}\nbackend: {self.backend}, {len(self.layer_names)} layers\n)"

    # ---- inside ------------------------------------------------------------------------------------------

    def _step(self) -> int:
        """The number of the next step."""
        step = next((group["step"] for group in self.param_groups if "step" in group), None)
        return self._history.next_step if step is None else step  # groups made by hand have none

    def _device(self) -> torch.device:
        """Where what users read lies: that of the first parameter."""
        if self._engine is not None:
            return self._engine.device
        return next((p.device for p in self._names), torch.device("cpu"))

    def _name_all(self) -> None:
        """Give names and layers, as the user says, to all parameters that have none."""
        listed = [p for group in self.param_groups for p in group["params"]]
        given = [name for group in self.param_groups for name in group.get("param_names", ())]
        if len(set(given)) < len(given):
            twice = next(name for i, name in enumerate(given) if name in given[:i])
            pairs = zip(given, listed, strict=False)
            if len({p for name, p in pairs if name == twice}) > 1:
                raise ValueError(f"two parameters are called {twice!r}; give them different names")
        names = follow(self.param_groups, self._names)
        new = [name for name in names.values() if name not in self._assigned]
        layers = assign(new, self._layers, named=bool(given), whole=self._constructing)
        self._assigned |= dict(zip(new, layers, strict=True))
        self._names, self._constructing = names, False

    def _layer(self, name: str) -> str | None:
        """The layer of a parameter that may have come in by hand."""
        if name not in self._assigned:
            given = any(name in group.get("param_names", ()) for group in self.param_groups)
            asked = given and (not isinstance(self._layers, Mapping) or name in self._layers)
            self._assigned[name] = assign([name], self._layers, whole=False)[0] if asked else name
        return self._assigned[name]

    def _ensure_engine(self) -> Engine:
        """The engine of the parameters as they are now."""
        held = self._listing is not None and self._listing.holds(self.param_groups)
        if self._engine is None or not held or self._engine.stale(self.state):
            self._drop_engine()
            self._listing = listing = Listing(self.param_groups)
            now = follow(self.param_groups, self._names)
            edited = list(map(id, now)) != list(map(id, self._names))
            self._names = now
            names = [self._names[p] for p in listing.params]
            layers = [self._layer(name) for name in names]
            if self._capturable:
                self._recorder = self._new_recorder(listing.params, listing.groups, layers)
            if self._policy is not None and any(layer is not None for layer in layers):
                self._adapter = self._new_adapter(self._policy, listing.params[0].device)
            engine = Engine(
                names=names,
                params=listing.params,
                states=self.state,
                groups=listing.groups,
                layers=layers,
                every=self._every,
                measure=self._measure,
                backend=self._backend,
                history=self._history,
                ranks=self._ranks,
                adapter=self._adapter,
                recorder=self._recorder,
                edited=edited,
                copy_gradients=self._copy_gradients,
            )
            engine.windows = self._windows
            self._engine, self._ranks = engine, engine.ranks
        return self._engine

    def _new_adapter(self, policy: Policy, device: torch.device) -> Adapter:
        """What decides on the layers' scales, going on from the state in the first group."""
        adapted: dict[str, bool] = {}
        members: dict[str, dict[Tensor, int]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                layer = self._layer(self._names[p])
                if layer is not None and not is_lazy(p):
                    adapted[layer] = adapted.get(layer, True) and group.get("adapt", True)
                    members.setdefault(layer, {})[p] = p.numel() * (2 if p.is_complex() else 1)
        state = self.param_groups[0]
        if self._adapter is not None:
            self._history.settle()
            state = dict(self._adapter.state(tuple(adapted)))
        sizes = [sum(members[layer].values()) for layer in adapted]
        return Adapter(policy, adapted, sizes, device, state, in_place=self._capturable)

    def _new_recorder(self, params: list[Tensor], groups: list[int], layers: list[str | None]) -> Recorder:
        """What counts and records on the device; the one there is, if it fits."""
        device = one_device(params)
        if self._recorder is not None and self._recorder.fits(layers, groups, device):
            return self._recorder
        self._show_state()
        step, rates = self._step(), [group.get("prev_lr", math.nan) for group in self.param_groups]
        return Recorder(layers, groups, device, self._history, step, rates)


def _can_be_pickled(value: object) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # PicklingError, AttributeError, TypeError: pickle has no common one
        return False
    return True


def _number(value: float | Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def _may_move(lr: float | Tensor) -> bool:
    """Whether a learning rate is not known to be 0."""
    return (isinstance(lr, Tensor) and lr.device.type != "cpu") or float(lr) != 0.0


def _all_zero(grads: list[Tensor | None]) -> bool:
    return not any(bool(g.any()) for g in grads if g is not None)


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
        if not (group[name] >= 0.0 and math.isfinite(_number(group[name]))):
            raise ValueError(f"Invalid {text}: {group[name]}; it must be finite and not negative")
    if not math.isfinite(group["dampening"]):
        raise ValueError(f"Invalid dampening value: {group['dampening']}; it must be finite")
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
