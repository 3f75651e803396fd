"""OscMonitor: measures the gradients and updates of any optimizer, and changes nothing."""

from __future__ import annotations

import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .distributed import Ranks, bare
from .engine import KEYS, Engine, Reshaped, check_settings, skipped
from .history import History
from .kernels import capturing
from .layers import Layers, Listing, assign, members
from .recorder import Recorder, one_device
from .window import Window

QUANTITIES = ("grad", "update")
"""What can be measured."""


class OscMonitor:
    """Measures, at each step of `optimizer`, how its gradients and updates correlate with the last ones.

    Args:
        optimizer: any ``torch.optim.Optimizer``, or a library's wrapper around one. Its trajectory stays what
            it is, bit for bit.
        named_parameters: `model.named_parameters()`, or some of them; frozen ones are left out. A tensor with
            two names (tied weights) is measured once, in the layer of its first name.
        what: "grad": the gradients that a step finds (that it ends with, where it calls a closure or unscales
            them itself). "update": what it has added to the parameters, x_{t+1} - x_t; this takes two copies
            of the parameters. Or both, as a tuple.
        measure: "exact" or "sketch", as in :class:`oscopt.OscGD`.
        layers, every, copy_gradients, capturable, backend: as there. For a CUDA graph the optimizer must be
            `capturable` as well.
        history, update_history: record into these, which go on where they end. Default: new ones.

    Raises:
        ValueError: `optimizer` does not hold a parameter, or has a monitor that measures the same of it in
            the same way; `what` is unknown; or as in :class:`oscopt.OscGD`.
        TypeError: `named_parameters` gives no names, or `optimizer` holds none of torch's optimizers.

    A monitor never ends a training run. Parameters that leave the optimizer are NaN from then on, until they
    come back; those that join it later are not watched, unless they are among the named ones and had left.
    What cannot be measured (sparse gradients) is NaN, with one warning; only where ranks share the
    parameters, or in the capture of a CUDA graph, it is an error.

    The recorded `lr` is the optimizer's (NaN where it is no number, or a tensor on a GPU, which reading would
    wait for); a curvature follows from it only if that is plain gradient descent. A step that a GradScaler
    skips is not measured; the next one pairs with the last that was applied.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]],
        what: str | Sequence[str] = ("grad",),
        *,
        layers: Layers = "module",
        measure: str = "exact",
        every: int = 1,
        copy_gradients: bool = False,
        capturable: bool = False,
        backend: str = "auto",
        history: History | None = None,
        update_history: History | None = None,
    ) -> None:
        check_settings(every, capturable)
        if measure not in ("exact", "sketch"):
            raise ValueError(f"Invalid measure: {measure!r}; use 'exact' or 'sketch'")
        self.what = (what,) if isinstance(what, str) else tuple(what)
        if not self.what or set(self.what) - set(QUANTITIES):
            raise ValueError(f"Invalid what: {what!r}; use 'grad', 'update' or ('grad', 'update')")
        optimizer = _hooked(optimizer)
        held = _held(named_parameters, {p for group in optimizer.param_groups for p in group["params"]})
        for other in _monitors(optimizer):
            shared = [n for n, p in held.items() if any(p is q for q in other._named.values())]
            alike = measure == other._options["measure"] and set(self.what) & set(other.what)
            if shared and alike:
                raise ValueError(
                    f"the optimizer has a monitor of parameter {shared[0]!r} already; read that one's "
                    "history, or detach() it first"
                )
        self._named: dict[str, Tensor] = held
        self._layers = dict(zip(held, assign(list(held), layers), strict=True))
        self._options: dict[str, Any] = {
            "measure": measure,
            "every": every,
            "copy_gradients": copy_gradients,
            "backend": backend,
        }
        given = {"grad": history, "update": update_history}
        self._optimizer = optimizer
        self._histories = {w: History() if (h := given[w]) is None else h for w in self.what}
        plain = type(optimizer) is torch.optim.SGD and not any(
            group["momentum"] or group["weight_decay"] for group in optimizer.param_groups
        )
        for quantity, record in self._histories.items():
            record.about |= {
                "optimizer": type(optimizer).__name__,
                "quantity": {"grad": "gradients", "update": "updates"}[quantity],
            }
            if quantity == "update" or not plain:
                record.about["plain"] = False
        self._states: dict[str, dict[Tensor, dict[str, Any]]] = {w: defaultdict(dict) for w in self.what}
        self._ranks: Ranks | None = None
        self._step = max(history.next_step for history in self._histories.values())
        self._groups = list(optimizer.param_groups)
        self._prev_lr = (math.nan,) * len(self._groups)  # of these groups
        self._warned = False
        self._capturable = capturable
        self._recorders: dict[str, Recorder] = {}
        # Of each quantity, whose steps graphs have captured, and what they use, by `id`.
        self._captured: dict[str, tuple[Engine, dict[int, Any]]] = {}
        self._failed = False  # whether this step cannot be measured
        self._measured: set[str] = set()  # what is, of this step
        self._list()
        self._engines = {w: self._new_engine(w) for w in self.what}
        self._late = False
        self._before: list[Tensor] | None = None  # the parameters before this step
        self._buffers: list[list[Tensor]] = []  # copies of the parameters, in turn
        self._hooks = [
            optimizer.register_step_pre_hook(_Hook(self, self._before_step, after=False)),
            optimizer.register_step_post_hook(_Hook(self, self._after_step, after=True)),
        ]

    # ---- what users read ---------------------------------------------------------------------------------

    @property
    def correlation(self) -> Tensor:
        """Latest correlation mu of each layer's gradients: float64, shape (L,), on the parameters' device."""
        return self._engine("grad").correlation()

    @property
    def global_correlation(self) -> Tensor:
        """Latest correlation of all layers together: float64, 0-dim, on the parameters' device."""
        return self._engine("grad").global_correlation()

    @property
    def update_correlation(self) -> Tensor:
        """Latest correlation of each layer's updates: float64, shape (L,), on the parameters' device."""
        return self._engine("update").correlation()

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the L layers."""
        return self._engines[self.what[0]].layer_names

    @property
    def history(self) -> History:
        """The record of the gradients so far."""
        return self._engine("grad").history

    @property
    def update_history(self) -> History:
        """The record of the updates: the same sums and measures, of x_{t+1} - x_t in place of g_t."""
        return self._engine("update").history

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self._engines[self.what[0]].backend

    def window(self, h: int = 5, what: str = "grad") -> Window:
        """Keep the gradients, or updates, of the next `h` steps; see :meth:`oscopt.OscGD.window`."""
        return self._engine(what).open_window(h)

    def report(self, path: str | os.PathLike, title: str | None = None) -> None:
        """Write one page of all that is measured; see :meth:`oscopt.History.report`."""
        from .report import write

        write(path, [self._engine(what).history for what in self.what], title)

    def _engine(self, what: str) -> Engine:
        if what not in self._engines:
            raise AttributeError(f"this monitor measures {self.what} only; make it with what={QUANTITIES}")
        return self._engines[what]

    # ---- measuring ---------------------------------------------------------------------------------------

    def _give_up(self, error: Exception, after: bool) -> None:
        """A step could not be measured: a row of NaN in its place, one warning."""
        if any(engine.ranks is not None or capturing(engine.device) for engine in self._engines.values()):
            raise error
        if not self._warned:
            self._warned = True
            self._count()
            warnings.warn(
                f"the monitor could not measure step {self._step} and records NaN, here and where it happens "
                f"again: {error}",
                stacklevel=2,
            )
        self._before, self._buffers, self._failed = None, [], not after
        if after:
            self._record_nothing()

    def _record_nothing(self) -> None:
        """A row of NaN of what is not measured yet; none where even that fails, as on a disk that is full."""
        for what, engine in self._engines.items():
            if what in self._measured:
                continue
            with suppress(Exception):
                if not self._capturable:
                    engine.history.cut(self._step)
                engine.lose(self._step, self._lr(), self._prev_lr)
        self._next_step()

    @torch._disable_dynamo
    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self._failed = False
        self._measured.clear()
        self._follow_groups()
        # What a closure computes, or the optimizer unscales itself, is to be seen only afterwards.
        closure = kwargs.get("closure") or next(
            (a for a in args if a is not optimizer and a is not None), None
        )
        self._late = closure is not None or getattr(optimizer, "grad_scale", None) is not None
        if "grad" in self._engines and not self._late and not skipped(optimizer):
            self._measure("grad", *self._gradients())
        if "update" in self._engines and self._engines["update"].wants(self._step):
            self._renew_if_stale("update")
            try:
                params = self._engines["update"].values()
            except Reshaped:
                self._renew("update")
                params = self._engines["update"].values()
            if not self._buffers:
                copies = 1 if self._capturable else 2  # the engine has another then
                self._buffers = [list(map(torch.empty_like, self._listed)) for _ in range(copies)]
            self._before = [bare(buffer) for buffer in self._buffers[0]]
            torch._foreach_copy_(self._before, params)

    @torch._disable_dynamo
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        change, self._before = self._before, None
        if skipped(optimizer):
            return
        if self._failed:
            self._record_nothing()
            return
        if "grad" in self._engines and self._late:
            self._measure("grad", *self._gradients())
        if "update" in self._engines:
            engine = self._engines["update"]
            wholes: list[Tensor | None] = [None] * len(engine.slots)
            grads = list(wholes)
            if change is not None:
                # x_t - x_{t+1}: both gradients of a pair have the other sign, the sums do not see it.
                torch._foreach_sub_(change, engine.values())
                for i, slot in enumerate(engine.slots):
                    if slot.outer.grad is not None:
                        wholes[i], grads[i] = self._buffers[0][i], change[i]
                self._buffers.reverse()
            self._measure("update", grads, wholes)
        self._next_step()

    def _next_step(self) -> None:
        if not self._capturable:
            self._step += 1
            self._prev_lr = self._lr()

    def _list(self) -> None:
        """Take up which of the named parameters the optimizer holds now, and in which group."""
        self._listing = Listing(self._groups)
        group_of = dict(zip(self._listing.params, self._listing.groups, strict=True))
        self._held = {name: group_of[p] for name, p in self._named.items() if p in group_of}
        self._listed = [self._named[name] for name in self._held]

    def _follow_groups(self) -> None:
        """Make new engines if the groups have been edited; where that fails, the next step tries it again."""
        groups = self._optimizer.param_groups
        if self._listing.holds(groups):
            self._groups = list(groups)
            return
        names = ("_groups", "_prev_lr", "_listing", "_held", "_listed", "_engines", "_recorders")
        before = {name: getattr(self, name) for name in names}
        self._engines, self._recorders = dict(self._engines), dict(self._recorders)
        try:
            self._take_over(groups)
        except Exception:
            vars(self).update(before)
            for what, history in self._histories.items():
                history.add_layers(self._engines[what].layer_names, edited=True)
                if what in self._recorders:
                    history.follow(self._recorders[what].collect)
            raise

    def _take_over(self, groups: list[dict[str, Any]]) -> None:
        known = {id(group): rate for group, rate in zip(self._groups, self._prev_lr, strict=False)}
        self._groups = list(groups)
        self._prev_lr = tuple(known.get(id(group), math.nan) for group in groups)
        before = self._held.keys()
        self._list()
        edited = self._held.keys() != before
        for what in self.what:
            self._renew(what, edited)

    def _gradients(self) -> tuple[list[Tensor | None], Sequence[Tensor | None]]:
        if self._engines["grad"].untouched:
            self._renew_if_stale("grad")
        try:
            found = self._engines["grad"].gradients()
        except Reshaped:
            self._renew("grad")
            found = self._engines["grad"].gradients()
        # A look at all parameters costs more than one at their gradients, which are read anyway.
        if not self._engines["grad"].fits and self._renew_if_stale("grad"):
            found = self._engines["grad"].gradients()
        return found

    def _renew_if_stale(self, what: str) -> bool:
        """Make a new engine if parameters have moved."""
        if not self._engines[what].stale(self._states[what]):
            return False
        self._renew(what)
        return True

    def _renew(self, what: str, edited: bool = False) -> None:
        """Make a new engine, of the parameters as they are now; `edited`: they are other ones."""
        engine = self._engines[what]
        engine.drop_spoiled(members((self._layers[name], self._named[name]) for name in self._held))
        if edited:
            for p in self._states[what].keys() - set(self._listed):
                del self._states[what][p]
        self._engines[what] = self._new_engine(what, edited)
        self._engines[what].windows = engine.windows
        self._buffers = []

    def _measure(self, what: str, grads: list[Tensor | None], wholes: Sequence[Tensor | None]) -> None:
        engine = self._engines[what]
        if capturing(engine.device):
            engine.check_capture(grads)
        lr: tuple[float, ...] = ()
        if self._capturable:
            self._recorders[what].set_rates([_rate(group, read=False) for group in self._groups])
        else:
            engine.history.cut(self._step)  # a step that failed halfway has left its row
            lr = self._lr()
        engine.step(self._step, grads, wholes, None, [0] * len(grads), None, lr, self._prev_lr)
        self._measured.add(what)
        if capturing(engine.device):
            self._captured = {w: kept for w, kept in self._captured.items() if self._engines[w] is kept[0]}
            kept = self._captured.setdefault(what, (engine, {}))[1]
            kept.update(engine.in_use() | {id(buffer): buffer for buffer in self._buffers})

    def _lr(self) -> tuple[float, ...]:
        rates = map(_rate, self._groups)
        return tuple(math.nan if isinstance(rate, Tensor) else rate for rate in rates)

    def _new_engine(self, what: str, edited: bool = False) -> Engine:
        layers, groups = [self._layers[name] for name in self._held], list(self._held.values())
        recorder: Recorder | None = None
        if self._capturable:
            self._count()
            device = one_device(self._listed)
            known = self._recorders.get(what)
            if known is None or not known.fits(layers, groups, device):
                missing = len(self._groups) - len(self._prev_lr)
                rates = self._prev_lr + (math.nan,) * missing
                known = Recorder(layers, groups, device, self._histories[what], self._step, rates)
            recorder = known
        engine = Engine(
            names=list(self._held),
            params=self._listed,
            groups=groups,
            layers=layers,
            edited=edited,
            states=self._states[what],
            history=self._histories[what],
            ranks=self._ranks,
            recorder=recorder,
            **self._options,
        )
        if recorder is not None:
            self._recorders[what] = recorder
        self._ranks = engine.ranks
        return engine

    def _count(self) -> None:
        """Take over from the device how many steps there were, if it counts."""
        if self._recorders:
            states = [recorder.state() for recorder in self._recorders.values()]
            self._step, rates = min(states, key=lambda state: state[0])  # some may be a step ahead
            self._prev_lr = tuple(rates)

    # ---- checkpoints, and the end ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The previous gradients and updates and the number of steps: tensors and plain values only."""
        for engine in self._engines.values():
            engine.drop_spoiled()
        self._count()
        states = {
            key: {name: dict(self._states[what].get(p, {})) for name, p in self._named.items()}
            for what, key in (("grad", "state"), ("update", "update_state"))
            if what in self._states
        }
        return {"step": self._step, "prev_lr": list(self._prev_lr), **states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the histories are cut back to that step.

        Raises:
            ValueError: it holds other parameters.
        """
        names = list(self._named)
        loaded = {what: state_dict.get(key) for what, key in (("grad", "state"), ("update", "update_state"))}
        for states in loaded.values():
            if states is not None and set(states) != set(names):
                different = sorted(set(states) ^ set(names))
                raise ValueError(f"the monitor's state is of other parameters, such as {different[0]!r}")
        for history in self._histories.values():
            history.cut(state_dict["step"])
        self._recorders.clear()
        self._step = state_dict["step"]
        self._prev_lr = tuple(state_dict.get("prev_lr", self._prev_lr))
        for what in self.what:
            states = defaultdict(dict)
            for name, p in self._named.items():
                state = (loaded[what] or {}).get(name, {})
                if state:
                    states[p].update({key: state[key] for key in KEYS if key in state})
            self._states[what] = states
            self._engines[what] = self._new_engine(what)

    def detach(self) -> None:
        """Stop measuring and let go of the gradients and updates; the histories stay."""
        for hook in self._hooks:
            hook.remove()
        for states in self._states.values():
            states.clear()
        for engine in self._engines.values():
            engine.let_go()
        self._buffers = []

    def __enter__(self) -> OscMonitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()


class _Hook:
    """A hook, before or after the step, that never ends the training."""

    def __init__(self, monitor: OscMonitor, hook: Callable[..., None], after: bool) -> None:
        self.monitor = monitor
        self._hook, self._after = hook, after

    def __call__(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        try:
            self._hook(optimizer, args, kwargs)
        except Exception as error:
            self.monitor._give_up(error, self._after)


def _hooked(optimizer: Any) -> Optimizer:
    """The optimizer of torch whose `step` is taken: `optimizer`, or what a library has wrapped in it.

    Raises:
        TypeError: there is none.
    """
    inner, seen = optimizer, []
    while "_optimizer_step_post_hooks" not in getattr(inner, "__dict__", {}):
        seen.append(inner)
        held = getattr(inner, "__dict__", {})
        inner = next((x for x in held.values() if isinstance(x, Optimizer)), held.get("optimizer"))
        if inner is None or any(inner is x for x in seen):
            raise TypeError(
                f"optimizer is {type(optimizer).__name__}, which is no torch.optim.Optimizer and holds none; "
                "pass the one that updates the parameters"
            )
    return inner


def _rate(group: Mapping[str, Any], read: bool = True) -> float | Tensor:
    """The learning rate of a group: NaN where it is no number; a tensor as it is where reading it would wait,
    or if it is not to be read."""
    lr: Any = group.get("lr")
    try:
        if isinstance(lr, Tensor) and (not read or lr.device.type != "cpu"):
            return lr if lr.numel() == 1 and not lr.is_complex() else math.nan
        return float(lr - 0)  # `float` alone would read text
    except Exception:  # an object of any library's: its conversion may raise anything
        return math.nan


def _held(named_parameters: Iterable[tuple[str, Tensor]], listed: set[Tensor]) -> dict[str, Tensor]:
    """Those of the parameters that the optimizer holds, by name; each once."""
    held: dict[str, Tensor] = {}
    known: set[Tensor] = set()
    strange = []
    for pair in named_parameters:
        if isinstance(pair, Tensor) or not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(
                "named_parameters must give (name, parameter) pairs: pass model.named_parameters()"
            )
        name, p = pair
        if p in listed:
            if p not in known:
                held[name] = p
                known.add(p)
        elif p.requires_grad:
            strange.append(name)
    if not held:
        raise ValueError("the optimizer holds none of the named parameters; pass those that it updates")
    if strange:
        raise ValueError(
            f"the optimizer does not hold parameter {strange[0]!r}"
            f"{f' and {len(strange) - 1} more' if len(strange) > 1 else ''}; leave out what it "
            "does not update"
        )
    return held


def _monitors(optimizer: Optimizer) -> list[OscMonitor]:
    """Those that are attached to it."""
    hooks = optimizer._optimizer_step_post_hooks.values()
    return [hook.monitor for hook in hooks if isinstance(hook, _Hook)]
