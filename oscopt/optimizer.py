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
from .clock import Clock, DeviceClock, new_clock, one_device, rates_of
from .distributed import bare
from .history import History
from .kernels import capturing
from .layers import Layers, Listing, assign, follow, members
from .parameters import Gradients, Listed, ParameterTable, Reshaped, Slot, Update, backend_for
from .previous import KEYS, PREVIOUS, SKETCH
from .tracker import MEASURES, GradientTracker, Options, no_correlation, skipped
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
    _hyper: tuple[tuple[float, ...], ...] = ()

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
        options = Options(measure, every, bool(copy_gradients), capturable, backend)
        options.check()
        policy = resolve(adapt)
        if history is not None and not isinstance(history, History):
            raise TypeError(f"history must be an oscopt.History or None, not {type(history).__name__}")
        _check_measure(measure, policy)
        lr, momentum = _own_defaults(policy, lr, momentum)
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
        _check_combination(differentiable, fused, foreach, capturable, policy)
        if fused:
            self._step_supports_amp_scaling = True
        self._layers = layers
        self._constructing = True
        self._names: dict[Tensor, str] = {}  # of the parameters, as they were when last looked at
        self._assigned: dict[str, str | None] = {}  # name -> layer, also of parameters that are gone
        self._options = options
        self._policy = policy
        self._history = History() if history is None else history
        self._tracker: GradientTracker | None = None
        self._listing: Listing | None = None  # what it was made for; None: it is to be made anew
        self._timed: list[dict[str, Any]] = []  # the groups whose learning rates its clock has
        super().__init__(params, defaults)
        if measure == "alignment" and not any(group["momentum"] for group in self.param_groups):
            raise ValueError("measure='alignment' is against the momentum: give one, such as momentum=0.9")
        self._name_all()
        self._current_tracker()
        self._history.about |= {"optimizer": "OscGD", "quantity": "gradients"}
        if any(group["weight_decay"] for group in self.param_groups):
            self._history.about["plain"] = False  # momentum shows in the record

    # ---- what users read ---------------------------------------------------------------------------------

    @property
    def correlation(self) -> Tensor:
        """Latest correlation mu of each layer: float64, shape (L,), on the parameters' device, no waiting."""
        if self._tracker is None:
            return no_correlation(self._device(), len(self.layer_names))
        return self._tracker.correlation()

    @property
    def global_correlation(self) -> Tensor:
        """Latest correlation of all layers together: float64, 0-dim, on the device, no waiting."""
        return no_correlation(self._device()) if self._tracker is None else self._tracker.global_correlation()

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the L layers, in the order of their first parameters, as of the last step."""
        if self._tracker is not None:
            return self._tracker.layer_names
        return tuple(dict.fromkeys(x for x in map(self._assigned.get, self._names.values()) if x is not None))

    @property
    def step_scale(self) -> Tensor:
        """Multiplier of each layer's learning rate in the next step: float64, shape (L,), on the device."""
        adapter = None if self._tracker is None else self._tracker.settled_adapter()
        if adapter is None and self._policy is not None and self.param_groups and self.layer_names:
            adapter = self._new_adapter(self._policy, self._device())
        if adapter is not None:
            return adapter.scale.clone()
        return torch.ones(len(self.layer_names), dtype=torch.float64, device=self._device())

    @property
    def rejected_scales(self) -> Tensor:
        """How many scales of the policy were negative or not finite, and so not used: int64, 0-dim."""
        adapter = None if self._tracker is None else self._tracker.settled_adapter()
        if adapter is None:
            return torch.zeros((), dtype=torch.int64, device=self._device())
        return adapter.rejected.clone()

    @property
    def history(self) -> History:
        """The record so far."""
        return self._history

    @property
    def backend(self) -> str:
        """Name of the backend in use; joined by "+" where parameters lie on several kinds of devices."""
        if self._tracker is not None:
            return self._tracker.table.backend
        devices = dict.fromkeys(p.device for p in self._names)
        names = (backend_for(self._options.backend, device).NAME for device in devices)
        return "+".join(dict.fromkeys(names))

    def window(self, h: int = 5) -> Window:
        """Keep the gradients of the next `h` steps for their pairwise correlations.

        A context manager: leaving it early gives up. Takes `h` copies of the measured gradients meanwhile.

        Raises:
            ValueError: `h` is less than 2.
        """
        return self._current_tracker().open_window(h)

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
        tracker = self._current_tracker()
        try:
            grads = tracker.gradients()
        except Reshaped:
            tracker = self._rebuilt_tracker()
            grads = tracker.gradients()
        capture = capturing(tracker.table.device)
        if capture:
            self._check_capture(tracker, grads)
        differentiable = any(group.get("differentiable") for group in self.param_groups)
        update = self._update(tracker, grads, buffers=not differentiable)
        clock, rates = tracker.clock, [group["lr"] for group in self.param_groups]
        # With a clock on the host rates are numbers, which `hyper` has.
        clock.set_rates(rates if isinstance(clock, DeviceClock) else [row[0] for row in update.hyper[::2]])
        if tracker.untouched and _is_no_step(clock, rates, grads):
            tracker.previous.begin(grads)
            return
        tracker.step(grads, None if differentiable else update)
        if differentiable:
            self._update_differentiably()
        else:
            # Kernels write through raw pointers: autograd must learn of it.
            params = tracker.table.params
            increment_version(params if grads.usual else [params[i] for i in grads.present])
        clock.advance()
        if capture:
            tracker.hold_captured(*(update.buffers or ()))

    def _update(self, tracker: GradientTracker, grads: Gradients, buffers: bool = True) -> Update:
        """How this step updates the parameters; `buffers`: with momentum buffers, where there is momentum.

        Raises:
            ValueError: a momentum buffer has another shape than its parameter, or a group has what the
                policy cannot have.
        """
        hyper = []
        for group in self.param_groups:
            self._check_adapted(group)
            lr = 1.0 if tracker.clock.on_device else _number(group["lr"])  # the clock has it there
            momentum, damp = float(group["momentum"]), float(group["dampening"])
            decay, ahead = _number(group["weight_decay"]), momentum if group["nesterov"] else 0.0
            sign = -1.0 if group["maximize"] else 1.0
            hyper.append((lr, momentum, 1.0 - damp, decay, ahead, sign))
            hyper.append((lr, 0.0, 1.0, decay, ahead, sign))  # a momentum buffer's first step
        if tuple(hyper) != self._hyper:
            self._hyper = tuple(hyper)  # the same object while nothing changes: kernels need not look
        table = tracker.table
        if not buffers or not any(row[1] for row in hyper):
            return Update(None, table.rows, self._hyper)
        if grads.usual and all(row[1] for row in hyper[::2]):
            found = table.states_of("momentum_buffer")
            if found is not None:
                return Update(found, table.rows, self._hyper)
        return self._begun_update(table, [i for i in grads.present if hyper[table.rows[i]][1]])

    def _begun_update(self, table: ParameterTable, used: Sequence[int]) -> Update:
        """The same where some of the slots `used` have no momentum buffer yet, or one that does not fit."""
        for slot in (table.slots[i] for i in used):
            buffer = slot.state.get("momentum_buffer") if slot.state else None
            if buffer is not None and (bare(buffer).shape, bare(buffer).device) != (slot.shape, slot.device):
                raise ValueError(
                    f"parameter {slot.name!r} has shape {tuple(slot.outer.shape)} on {slot.device}, its "
                    f"momentum buffer {tuple(buffer.shape)} on {buffer.device}; change both, or delete the "
                    "buffer (optimizer.state[p].pop('momentum_buffer'))"
                )
        buffers: list[Tensor | None] = [None] * len(table.slots)
        rows = list(table.rows)
        begun: dict[Tensor, int] = {}  # in which group
        for i in used:
            slot = table.slots[i]
            state = table.state(slot)
            buffer = state.get("momentum_buffer")
            if buffer is None:
                buffer = state["momentum_buffer"] = torch.zeros_like(slot.outer)
                begun[slot.outer] = slot.group
            if begun.get(slot.outer) == slot.group:
                rows[i] += 1
            if not _fits(buffer, slot):  # somebody's own: kernels need it like its parameter
                buffer = state["momentum_buffer"] = torch.empty_like(slot.outer).copy_(buffer)
            buffers[i] = buffer if slot.outer is slot.param else bare(buffer)
        return Update(buffers, rows, self._hyper)

    def _check_capture(self, tracker: GradientTracker, grads: Gradients) -> None:
        """Raise where a step could not be captured in a CUDA graph."""
        tracker.check_capture(grads)
        device = tracker.table.device
        for group in self.param_groups:
            if isinstance(group["lr"], Tensor) and group["lr"].device != device:
                raise RuntimeError(
                    f"lr is a tensor on {group['lr'].device}, which a graph cannot read at every replay; "
                    f"put it on {device}"
                )
        for slot in (tracker.table.slots[i] for i in grads.present):
            buffer = (slot.state or {}).get("momentum_buffer")
            if self.param_groups[slot.group]["momentum"] and not (buffer is not None and _fits(buffer, slot)):
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
        """As ``torch.optim.Optimizer.add_param_group``; new layers are NaN in the history up to now.

        Raises:
            ValueError: as torch does; also a rate or a factor that is not finite, a name that is taken, or
                what a policy with a momentum of its own cannot have.
            TypeError: a parameter is neither floating-point nor complex, or a lazy conjugate or negative.
            RuntimeError: `differentiable` with a policy, or `fused` with a complex parameter.

        The groups are then what they were.
        """
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
            group["step"] = self._step(None if self._constructing else self._tracker)
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
        self._rebuilt_tracker()  # ranks that share parameters meet here, not where one of them reads

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
        """As ``torch.optim.Optimizer.state_dict``.

        The groups have the number of the next step and the last learning rate, as of this call; the scales of
        `adapt` are in the first.
        """
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
        self._history.cut(self.param_groups[0]["step"] if self.param_groups else 0)
        self._rebuilt_tracker(loaded=True)

    def _let_go(self, spoiled: bool = True) -> None:
        """Leave what is kept of parameters that are there in their state, and of others nothing.

        `spoiled`: also drop what whoever goes on from the states could not tell to be wrong.
        """
        names = follow(self.param_groups, self._names)
        if self._tracker is not None and spoiled:
            of_layers = members((self._layer(name), p) for p, name in names.items())
            self._tracker.previous.drop_spoiled(of_layers)
        for p in self._names.keys() - names.keys():
            if p in self.state:
                for key in KEYS:
                    self.state[p].pop(key, None)
                if not self.state[p]:  # SGD has none, and nothing to save
                    del self.state[p]
        self._listing = None

    def _show_state(self) -> None:
        """Make the state what it is saved as: only good gradients, and in the groups what else goes on."""
        if self._constructing or self._tracker is None:
            return
        if self._listing is None or not self._listing.holds(self.param_groups):
            self._let_go()
        else:
            self._tracker.previous.drop_spoiled()
        step, rates = self._timing(self._tracker)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["step"], group["prev_lr"] = step, rate
        adapter = self._tracker.settled_adapter()
        if adapter is not None and self.param_groups:
            self.param_groups[0].update(adapter.state())

    def __getstate__(self) -> dict[str, Any]:
        self._show_state()
        own = {name: getattr(self, name) for name in ("_options", "_history", "_assigned", "_policy")}
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
        self._listing = None
        if "_options" in state:  # unpickled or copied; else torch loads a state
            self._tracker, self._timed = None, []

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-2]}\nbackend: {self.backend}, {len(self.layer_names)} layers\n)"

    # ---- inside ------------------------------------------------------------------------------------------

    def _step(self, tracker: GradientTracker | None) -> int:
        """The number of the next step."""
        if tracker is not None:
            return tracker.clock.step
        step = next((group["step"] for group in self.param_groups if "step" in group), None)
        return self._history.next_step if step is None else step  # groups made by hand have none

    def _device(self) -> torch.device:
        """Where what users read lies: that of the first parameter."""
        if self._tracker is not None:
            return self._tracker.table.device
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

    def _timing(self, tracker: GradientTracker | None) -> tuple[int, list[float]]:
        """The number of the next step, and the groups' learning rates in the last one (NaN: not known)."""
        if tracker is None:
            return self._step(None), [group.get("prev_lr", math.nan) for group in self.param_groups]
        step, rates = tracker.clock.state()
        return step, rates_of(self.param_groups, self._timed, rates)

    def _current_tracker(self) -> GradientTracker:
        """The tracker, of the parameters as they are now."""
        listing = self._listing
        if (
            self._tracker is None
            or listing is None
            or not listing.holds(self.param_groups)
            or self._tracker.table.moved(self.state)
        ):
            return self._rebuilt_tracker()
        return self._tracker

    def _rebuilt_tracker(self, loaded: bool = False) -> GradientTracker:
        """The tracker, made to fit the parameters as they are now; `loaded`: a state has been loaded."""
        self._let_go(spoiled=not loaded)
        listing = Listing(self.param_groups)
        now = follow(self.param_groups, self._names)
        edited = list(map(id, now)) != list(map(id, self._names))
        self._names = now
        names = [now[p] for p in listing.params]
        layers = [self._layer(name) for name in names]
        listed = Listed(names, listing.params, listing.groups, layers, self.state)
        last = None if loaded else self._tracker
        clock, adapter = self._new_clock(listed, last), None
        if self._policy is not None and listed.layer_names:
            adapter = self._new_adapter(self._policy, listing.params[0].device, last)
        if self._tracker is None:
            self._tracker = GradientTracker(self._options, self._history, listed, clock, adapter)
        else:
            self._tracker.rebuild(listed, clock, adapter, edited, loaded)
        self._listing, self._timed = listing, list(self.param_groups)
        return self._tracker

    def _new_clock(self, listed: Listed, last: GradientTracker | None) -> Clock:
        """The clock of the `last` tracker, if it fits, or one that goes on from it, or from the groups."""
        shape = (listed.homes, listed.groups, len(listed.layer_names))
        device = one_device(listed.params) if self._options.capturable else None
        known = None if last is None else last.clock
        if isinstance(known, DeviceClock) and device is not None and known.fits(*shape, device):
            return known
        return new_clock(*shape, *self._timing(last), device)

    def _new_adapter(
        self, policy: Policy, device: torch.device, last: GradientTracker | None = None
    ) -> Adapter:
        """What decides on the scales, going on from the `last` tracker's, or the state in the first group."""
        adapted: dict[str, bool] = {}
        members: dict[str, dict[Tensor, int]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                layer = self._layer(self._names[p])
                if layer is not None and not is_lazy(p):
                    adapted[layer] = adapted.get(layer, True) and group.get("adapt", True)
                    members.setdefault(layer, {})[p] = p.numel() * (2 if p.is_complex() else 1)
        before = None if last is None else last.settled_adapter()
        state = self.param_groups[0] if before is None else dict(before.state(tuple(adapted)))
        sizes = [sum(members[layer].values()) for layer in adapted]
        return Adapter(policy, adapted, sizes, device, state, in_place=self._options.capturable)


def _can_be_pickled(value: object) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # PicklingError, AttributeError, TypeError: pickle has no common one
        return False
    return True


def _number(value: float | Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def _fits(buffer: Tensor, slot: Slot) -> bool:
    """Whether kernels can use a momentum buffer as it is."""
    return buffer.dtype == slot.outer.dtype and bare(buffer).stride() == slot.stride


def _is_no_step(clock: Clock, rates: Sequence[float | Tensor], grads: Gradients) -> bool:
    """Whether it is the step by which torch.distributed.checkpoint has an optimizer make its state."""
    if any((isinstance(lr, Tensor) and lr.device.type != "cpu") or float(lr) != 0.0 for lr in rates):
        return False
    return clock.step == 0 and not any(bool(g.any()) for g in grads.local if g is not None)


def _check_measure(measure: str, policy: Policy | None) -> None:
    if measure not in MEASURES:
        raise ValueError(f"Invalid measure: {measure!r}; use one of {', '.join(map(repr, MEASURES))}")
    if policy is not None and measure == "alignment" and getattr(policy, "signal", "") != "momentum":
        raise ValueError(
            f"measure='alignment' does not measure what the policy {policy!r} needs; use measure='exact'"
        )


def _own_defaults(
    policy: Policy | None, lr: float | Tensor | None, momentum: float | None
) -> tuple[float | Tensor, float]:
    """Learning rate and momentum, with defaults that depend on the policy."""
    own = getattr(policy, "momentum", None)
    if own is None:
        return 1e-3 if lr is None else lr, momentum or 0.0
    if momentum is not None:
        raise ValueError(f"Invalid momentum: {momentum}; leave it out, as `adapt` has its own, {own}")
    if lr is not None and not isinstance(lr, Tensor) and not lr > 0:
        raise ValueError(
            f"Invalid lr: {lr}; the policy of `adapt` has steps of its own, which it multiplies: use 1"
        )
    return 1.0 if lr is None else lr, own


def _check_combination(
    differentiable: bool, fused: bool | None, foreach: bool | None, capturable: bool, policy: Policy | None
) -> None:
    if differentiable and policy is not None:
        raise RuntimeError("`differentiable` does not support `adapt`")
    if fused and differentiable:
        raise RuntimeError("`fused` does not support `differentiable`")
    if fused and foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if capturable and differentiable:
        raise RuntimeError("`capturable` does not support `differentiable`")


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
