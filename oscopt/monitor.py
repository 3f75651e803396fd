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

from .clock import Clock, new_clock, one_device, rates_of
from .distributed import bare
from .history import History
from .kernels import capturing
from .layers import Layers, Listing, assign, members
from .parameters import Gradients, Listed, Reshaped
from .previous import KEYS
from .tracker import GradientTracker, Options, skipped
from .window import Window

QUANTITIES = ("grad", "update")
"""What can be measured."""

_STATES = {"grad": "state", "update": "update_state"}
"""What is kept of each is called so in a checkpoint."""


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
        options = Options(measure, every, copy_gradients, capturable, backend)
        options.check()
        if measure not in ("exact", "sketch"):
            raise ValueError(f"Invalid measure: {measure!r}; use 'exact' or 'sketch'")
        self.what = (what,) if isinstance(what, str) else tuple(what)
        if not self.what or set(self.what) - set(QUANTITIES):
            raise ValueError(f"Invalid what: {what!r}; use 'grad', 'update' or ('grad', 'update')")
        optimizer = _hooked(optimizer)
        held = _held(named_parameters, {p for group in optimizer.param_groups for p in group["params"]})
        for other in _monitors(optimizer):
            shared = [n for n, p in held.items() if any(p is q for q in other._named.values())]
            alike = measure == other.options.measure and set(self.what) & set(other.what)
            if shared and alike:
                raise ValueError(
                    f"the optimizer has a monitor of parameter {shared[0]!r} already; read that one's "
                    "history, or detach() it first"
                )
        self._named: dict[str, Tensor] = held
        self._layers = dict(zip(held, assign(list(held), layers), strict=True))
        self.options: Options = options
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
        self._groups = list(optimizer.param_groups)
        self._warned = False
        self._failed = False  # whether this step cannot be measured
        self._measured: set[str] = set()  # what is, of this step
        self._late = False  # whether the gradients are measured after the step
        self._before: list[Tensor] | None = None  # the parameters before this step
        self._buffers: list[list[Tensor]] = []  # copies of the parameters, in turn
        self._trackers: dict[str, GradientTracker] = {}
        self._listing: Listing | None = self._list(self._groups)
        """Of the groups that the trackers follow; None: they failed to."""
        step = max(history.next_step for history in self._histories.values())
        self._clock = self._new_clock(step, (math.nan,) * len(self._groups))
        self._track(self._clock)
        self._hooks = [
            optimizer.register_step_pre_hook(_Hook(self, self._before_step, after=False)),
            optimizer.register_step_post_hook(_Hook(self, self._after_step, after=True)),
        ]

    # ---- what users read ---------------------------------------------------------------------------------

    @property
    def correlation(self) -> Tensor:
        """Latest correlation mu of each layer's gradients: float64, shape (L,), on the parameters' device."""
        return self._tracker("grad").correlation()

    @property
    def global_correlation(self) -> Tensor:
        """Latest correlation of all layers together: float64, 0-dim, on the parameters' device."""
        return self._tracker("grad").global_correlation()

    @property
    def update_correlation(self) -> Tensor:
        """Latest correlation of each layer's updates: float64, shape (L,), on the parameters' device."""
        return self._tracker("update").correlation()

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the L layers."""
        return self._trackers[self.what[0]].layer_names

    @property
    def history(self) -> History:
        """The record of the gradients so far."""
        return self._tracker("grad").history

    @property
    def update_history(self) -> History:
        """The record of the updates: the same sums and measures, of x_{t+1} - x_t in place of g_t."""
        return self._tracker("update").history

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self._trackers[self.what[0]].table.backend

    def window(self, h: int = 5, what: str = "grad") -> Window:
        """Keep the gradients, or updates, of the next `h` steps; see :meth:`oscopt.OscGD.window`."""
        return self._tracker(what).open_window(h)

    def report(self, path: str | os.PathLike, title: str | None = None) -> None:
        """Write one page of all that is measured; see :meth:`oscopt.History.report`."""
        from .report import write

        write(path, [self._tracker(what).history for what in self.what], title)

    def _tracker(self, what: str) -> GradientTracker:
        if what not in self._trackers:
            raise AttributeError(f"this monitor measures {self.what} only; make it with what={QUANTITIES}")
        return self._trackers[what]

    # ---- measuring ---------------------------------------------------------------------------------------

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
        if "grad" in self._trackers and not self._late and not skipped(optimizer):
            self._measure("grad", self._gradients())
        if "update" in self._trackers and self._trackers["update"].wants():
            self._copy_parameters(self._trackers["update"])

    @torch._disable_dynamo
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        change, self._before = self._before, None
        if skipped(optimizer):
            return
        if self._failed:
            self._record_nothing()
            return
        if "grad" in self._trackers and self._late:
            self._measure("grad", self._gradients())
        if "update" in self._trackers:
            self._measure("update", self._updates(self._trackers["update"], change))
        self._end_step()

    def _gradients(self) -> Gradients:
        tracker = self._trackers["grad"]
        if tracker.untouched:
            self._rebuild_if_moved("grad")
        try:
            found = tracker.gradients()
        except Reshaped:
            self._rebuild("grad")
            found = tracker.gradients()
        # A look at all parameters costs more than one at their gradients, which are read anyway.
        if not found.in_place and self._rebuild_if_moved("grad"):
            found = tracker.gradients()
        return found

    def _copy_parameters(self, tracker: GradientTracker) -> None:
        """Keep the parameters as they are before the step."""
        tracker.check_history()
        self._rebuild_if_moved("update")
        try:
            params = tracker.table.values()
        except Reshaped:
            self._rebuild("update")
            params = tracker.table.values()
        if not self._buffers:
            copies = 1 if self.options.capturable else 2  # what is kept of updates is another then
            self._buffers = [list(map(torch.empty_like, self._listed)) for _ in range(copies)]
        self._before = [bare(buffer) for buffer in self._buffers[0]]
        torch._foreach_copy_(self._before, params)

    def _updates(self, tracker: GradientTracker, before: list[Tensor] | None) -> Gradients:
        """What the step has taken away from the parameters, x_t - x_{t+1}: both of a pair have the other sign
        then, which the sums do not see. `before`: what :meth:`_copy_parameters` has kept; it is overwritten.
        """
        slots = tracker.table.slots
        original: list[Tensor | None] = [None] * len(slots)
        local = list(original)
        if before is not None:
            torch._foreach_sub_(before, tracker.table.values())
            for i, slot in enumerate(slots):
                if slot.outer.grad is not None:
                    original[i], local[i] = self._buffers[0][i], before[i]
            self._buffers.reverse()
        present = [i for i, change in enumerate(local) if change is not None]
        return Gradients(local, original, present, usual=False)

    def _measure(self, what: str, grads: Gradients) -> None:
        tracker = self._trackers[what]
        capture = capturing(tracker.table.device)
        if capture:
            tracker.check_capture(grads)
        tracker.clock.set_rates(self._rates())
        tracker.step(grads, None)
        self._measured.add(what)
        if capture:
            tracker.hold_captured(*(buffer for buffers in self._buffers for buffer in buffers))

    def _rates(self) -> list[Any]:
        """The learning rates of the groups; on the host numbers, NaN where reading one would wait."""
        on_device = self._clock.on_device
        rates = [_rate(group, read=not on_device) for group in self._groups]
        return rates if on_device else [math.nan if isinstance(rate, Tensor) else rate for rate in rates]

    def _end_step(self) -> None:
        # There is one, unless an edit of the groups could not be followed by all trackers.
        for clock in {id(tracker.clock): tracker.clock for tracker in self._trackers.values()}.values():
            if not clock.on_device:
                clock.set_rates(self._rates())  # an optimizer may change its own
            clock.advance()

    # ---- what cannot be measured -------------------------------------------------------------------------

    def _give_up(self, error: Exception, after: bool) -> None:
        """A step could not be measured: a row of NaN in its place, one warning."""
        if any(t.ranks is not None or capturing(t.table.device) for t in self._trackers.values()):
            raise error
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the monitor could not measure step {self._clock.step} and records NaN, here and where it "
                f"happens again: {error}",
                stacklevel=2,
            )
        self._before, self._buffers, self._failed = None, [], not after
        if after:
            self._record_nothing()

    def _record_nothing(self) -> None:
        """A row of NaN of what is not measured yet; none where even that fails, as on a disk that is full."""
        for what, tracker in self._trackers.items():
            if what not in self._measured:
                tracker.clock.set_rates(self._rates())
                with suppress(Exception):
                    tracker.lose()
        self._end_step()

    # ---- groups that have been edited, parameters that have moved ----------------------------------------

    def _list(self, groups: list[dict[str, Any]]) -> Listing:
        """Take up which of the named parameters the optimizer holds now, and in which group."""
        listing = Listing(groups)
        group_of = dict(zip(listing.params, listing.groups, strict=True))
        self._held = {name: group_of[p] for name, p in self._named.items() if p in group_of}
        self._listed = [self._named[name] for name in self._held]
        return listing

    def _listed_for(self, what: str) -> Listed:
        layers = [self._layers[name] for name in self._held]
        return Listed(list(self._held), self._listed, list(self._held.values()), layers, self._states[what])

    def _new_clock(self, step: int, rates: Sequence[float]) -> Clock:
        listed = self._listed_for(self.what[0])
        device = one_device(self._listed) if self.options.capturable else None
        return new_clock(listed.homes, listed.groups, len(listed.layer_names), step, rates, device)

    def _follow_groups(self) -> None:
        """Go on with the groups as they are now; where that fails, the next step tries it again."""
        groups = self._optimizer.param_groups
        if self._listing is not None and self._listing.holds(groups):
            self._groups = list(groups)
            return
        step, rates = self._clock.state()
        before = None if self._listing is None else self._held.keys()
        listing, self._listing = self._list(groups), None
        clock = self._new_clock(step, rates_of(groups, self._groups, rates))
        self._track(clock, edited=self._held.keys() != before)
        self._groups, self._clock, self._listing = list(groups), clock, listing

    def _track(self, clock: Clock, edited: bool = False, loaded: bool = False) -> None:
        """Make the trackers, or let them go on with the parameters that are listed now, by `clock`."""
        ranks = next((tracker.ranks for tracker in self._trackers.values()), None)
        for what in self.what:
            if what in self._trackers:
                self._rebuild(what, clock, edited, loaded)
                continue
            tracker = self._trackers[what] = GradientTracker(
                self.options, self._histories[what], self._listed_for(what), clock, ranks=ranks
            )
            ranks = tracker.ranks

    def _rebuild_if_moved(self, what: str) -> bool:
        """Let the tracker go on with parameters that have moved."""
        if not self._trackers[what].table.moved(self._states[what]):
            return False
        self._rebuild(what)
        return True

    def _rebuild(
        self, what: str, clock: Clock | None = None, edited: bool = False, loaded: bool = False
    ) -> None:
        """Let the tracker go on with the parameters as they are now; `edited`: they are other ones."""
        tracker, states = self._trackers[what], self._states[what]
        if not loaded:
            of_layers = members((self._layers[name], self._named[name]) for name in self._held)
            tracker.previous.drop_spoiled(of_layers)
        if edited:
            for p in states.keys() - set(self._listed):
                del states[p]
        tracker.rebuild(self._listed_for(what), clock or self._clock, edited=edited, loaded=loaded)
        self._buffers = []

    # ---- checkpoints, and the end ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The previous gradients and updates and the number of steps: tensors and plain values only."""
        for tracker in self._trackers.values():
            tracker.previous.drop_spoiled()
        step, rates = self._clock.state()
        states = {
            _STATES[what]: {name: dict(self._states[what].get(p, {})) for name, p in self._named.items()}
            for what in self.what
        }
        return {"step": step, "prev_lr": rates, **states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the histories are cut back to that step.

        Raises:
            ValueError: it holds other parameters.
        """
        loaded = {what: state_dict.get(_STATES[what]) for what in QUANTITIES}
        for states in loaded.values():
            if states is not None and set(states) != set(self._named):
                different = sorted(set(states) ^ set(self._named))
                raise ValueError(f"the monitor's state is of other parameters, such as {different[0]!r}")
        for what, history in self._histories.items():
            history.cut(state_dict["step"])
            self._states[what] = defaultdict(dict)
            for name, p in self._named.items():
                state = (loaded[what] or {}).get(name, {})
                if state:
                    self._states[what][p].update({key: state[key] for key in KEYS if key in state})
        rates = state_dict.get("prev_lr", self._clock.state()[1])
        self._clock = self._new_clock(state_dict["step"], rates)
        self._track(self._clock, loaded=True)

    def detach(self) -> None:
        """Stop measuring and let go of the gradients and updates; the histories stay."""
        for hook in self._hooks:
            hook.remove()
        for states in self._states.values():
            states.clear()
        for tracker in self._trackers.values():
            tracker.let_go()
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
