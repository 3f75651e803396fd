"""A callback for Lightning: measures its optimizers and logs what they measure. Needs lightning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

try:
    import lightning.pytorch as pl
except ImportError:  # the older name of the same package
    try:
        import pytorch_lightning as pl  # type: ignore[no-redef]
    except ImportError as error:
        raise ImportError("oscopt.lightning needs Lightning: pip install lightning") from error

from .history import History
from .loggers import log_picture, new_scalars
from .monitor import OscMonitor
from .optimizer import OscGD


class OscCallback(pl.Callback):
    """Measures every optimizer of a ``Trainer`` and logs to all its loggers, every `log_every_n_steps` steps.

    An :class:`oscopt.OscGD` measures itself; other optimizers get an :class:`oscopt.OscMonitor` during `fit`.
    Checkpoints hold the state and the records of the monitors; saving an OscGD's history is up to you.

    Args:
        prefix: of the logged names, followed by the optimizer's number if there are several.
        log_layers: whether single layers are logged as well.
        picture_every: after this many steps, and at the end, a picture of all layers goes to the loggers that
            take one (TensorBoard, Weights & Biases), as `prefix/layers`; needs matplotlib. None: no pictures.
        options: for the monitors: `what`, `layers`, `every`, ...

    Attributes:
        meters: an OscGD or OscMonitor for each optimizer; their `history` remains after `fit`.

    Raises:
        ValueError: `picture_every` is less than 1.
    """

    def __init__(
        self,
        prefix: str = "oscopt",
        log_layers: bool = True,
        picture_every: int | None = None,
        **options: Any,
    ) -> None:
        if picture_every is not None and picture_every < 1:
            raise ValueError(
                f"Invalid picture_every: {picture_every}; use a number of steps, 1 or more, or None"
            )
        self._picture_every = picture_every
        self.meters: list[OscGD | OscMonitor] = []
        self._prefix, self._log_layers, self._options = prefix, log_layers, options
        self._restored: list[dict[str, Any]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._let_go()
        self.meters = []
        for i, optimizer in enumerate(trainer.optimizers):
            if isinstance(optimizer, OscGD):
                self.meters.append(optimizer)
                continue
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            named = [(name, p) for name, p in pl_module.named_parameters() if id(p) in held]
            state = self._restored[i] if i < len(self._restored) else {}
            options = self._options | {
                key: History.from_state_dict(value) for key, value in state.items() if key != "monitor"
            }
            monitor = OscMonitor(optimizer, named, **options)
            if state:
                monitor.load_state_dict(state["monitor"])
            self.meters.append(monitor)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log(trainer)
        if self._picture_every and trainer.global_step % self._picture_every == 0:
            self._log_pictures(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(trainer)
        if self._picture_every:
            self._log_pictures(trainer)
        self._let_go()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: Any) -> None:
        self._let_go()

    def _let_go(self) -> None:
        for meter in self.meters:
            if isinstance(meter, OscMonitor):
                meter.detach()

    def _log(self, trainer: pl.Trainer) -> None:
        for prefix, history in self._named():
            for step, values in new_scalars(history, prefix, self._log_layers):
                for logger in trainer.loggers:
                    logger.log_metrics(values, step=step)

    def _log_pictures(self, trainer: pl.Trainer) -> None:
        for prefix, history in self._named():
            for logger in trainer.loggers:
                log_picture(getattr(logger, "experiment", None), history, f"{prefix}/layers")

    def _named(self) -> Iterator[tuple[str, History]]:
        for i, meter in enumerate(self.meters):
            for key, history in _histories(meter).items():
                number = str(i) if len(self.meters) > 1 else ""
                yield self._prefix + number + ("_update" if key == "update_history" else ""), history

    def state_dict(self) -> dict[str, Any]:
        states: list[dict[str, Any]] = []
        for meter in self.meters:
            histories = {key: history.state_dict() for key, history in _histories(meter).items()}
            monitor = meter.state_dict() if isinstance(meter, OscMonitor) else None
            states.append({"monitor": monitor, **histories})
        return {"meters": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["meters"]


def _histories(meter: OscGD | OscMonitor) -> dict[str, History]:
    """What a meter records, by the name of the attribute."""
    if isinstance(meter, OscGD):
        return {"history": meter.history}
    names = {"grad": "history", "update": "update_history"}
    return {names[what]: getattr(meter, names[what]) for what in meter.what}
