"""A callback for the Hugging Face ``Trainer``: measures its optimizer. Needs transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("oscopt.huggingface needs transformers: pip install transformers accelerate") from error

import numpy as np

from .history import History
from .loggers import layers_picture
from .monitor import OscMonitor
from .optimizer import OscGD

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class OscTrainerCallback(TrainerCallback):
    """Measures the optimizer of a ``Trainer``; each log entry gets the mean correlation since the last.

    The entry is the one in `trainer.state.log_history`. Reporters that were added before this callback have
    already seen it by then: pass them the numbers with `log`.

    A ``Trainer`` does not say when training ends with an error: call :meth:`detach` to stop measuring, which
    the next training also does, even one that `auto_find_batch_size` starts.

    Args:
        log: called with the numbers by name, for example ``wandb.log``.
        prefix: of the names under which numbers are logged.
        log_layers: whether single layers are logged as well.
        picture: called with a picture of all layers over all steps (a matplotlib figure) and the step, after
            every `picture_every` steps and at the end, for example
            ``lambda figure, step: wandb.log({"oscopt/layers": wandb.Image(figure)})``.
        picture_every: steps between two pictures.
        options: for the :class:`oscopt.OscMonitor`: `what`, `layers`, `every`, ... An
            :class:`oscopt.OscGD` measures itself and needs none.

    Attributes:
        meter: the OscMonitor or OscGD, None before training; its `history` remains after training.

    Raises:
        ValueError: `picture_every` is less than 1.
    """

    def __init__(
        self,
        log: Callable[[dict[str, float]], Any] | None = None,
        prefix: str = "oscopt",
        log_layers: bool = False,
        picture: Callable[[Figure, int], Any] | None = None,
        picture_every: int = 500,
        **options: Any,
    ) -> None:
        if picture_every < 1:
            raise ValueError(f"Invalid picture_every: {picture_every}; use a number of steps, 1 or more")
        self._picture, self._picture_every = picture, picture_every
        self.meter: OscGD | OscMonitor | None = None
        self._log, self._prefix, self._log_layers, self._options = log, prefix, log_layers, options

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self.detach()
        while not isinstance(optimizer, OscGD) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer  # from inside accelerate's wrapper
        if isinstance(optimizer, OscGD):
            self.meter = optimizer
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = [(name, p) for name, p in model.named_parameters() if id(p) in held]
        self.meter = OscMonitor(optimizer, named, **self._options)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self.meter is None or logs is None:
            return
        values: dict[str, float] = {}
        if isinstance(self.meter, OscGD) or "grad" in self.meter.what:
            values |= self._means(self.meter.history, self._prefix)
        if isinstance(self.meter, OscMonitor) and "update" in self.meter.what:
            values |= self._means(self.meter.update_history, f"{self._prefix}_update")
        if values:
            logs.update(values)
            state.log_history[-1].update(values)
            if self._log is not None:
                self._log(values)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._picture_every == 0:
            self._show(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(state)
        self.detach()

    def _show(self, state: Any) -> None:
        if self._picture is None or self.meter is None:
            return
        meter = self.meter
        history = meter.history if isinstance(meter, OscGD) or "grad" in meter.what else meter.update_history
        if len(history):
            self._picture(layers_picture(history), state.global_step)

    def detach(self) -> None:
        """Stop measuring; the meter's history remains."""
        if isinstance(self.meter, OscMonitor):
            self.meter.detach()

    def _means(self, history: History, prefix: str) -> dict[str, float]:
        new = history.drain()
        columns = {f"{prefix}/correlation": new.global_correlation()}
        if self._log_layers:
            columns |= {
                f"{prefix}/correlation/{n}": new.correlation()[:, i] for i, n in enumerate(new.layer_names)
            }
        return {name: float(np.nanmean(v)) for name, v in columns.items() if np.isfinite(v).any()}
