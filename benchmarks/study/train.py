"""Full-batch training with every gradient measured."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oscopt import History, OscGD, OscMonitor, Window

from . import data, models
from .config import WINDOW, Config
from .errors import Diverged, Interrupted, UserError
from .folder import Folder

OPTIMIZERS = ("oscgd", "sgd", "adam")


@dataclass
class Progress:
    """What is known after each epoch; one entry an epoch."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    correlation: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.loss)


class Trainer:
    """One run: model, data, optimizer and what was recorded.

    Attributes:
        progress: loss and accuracy before each step, the step's global correlation, its seconds.
        matrices: epoch -> {"global": (h, h), "first": ..., "last": ...} of the windows so far.
    """

    def __init__(self, config: Config, data_root: str | None = None) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        self.device = torch.device(config.device)
        pictures, labels = data.load(
            config.dataset, config.n_train, config.image_size, data_root, config.seed
        )
        channels, side = pictures.shape[1], pictures.shape[-1]
        if side < models.SMALLEST[config.model]:
            least = models.SMALLEST[config.model]
            raise UserError(f"--image-size {side}: {config.model} takes pictures of at least {least} pixels")
        # Convolutions are 1.3 to 2.3 times as fast so.
        layout = torch.channels_last
        self.count = len(labels)
        self.batches = list(
            zip(
                pictures.to(self.device).split(config.micro_batch),
                labels.to(self.device).split(config.micro_batch),
                strict=True,
            )
        )
        self.batches = [(x.contiguous(memory_format=layout), y) for x, y in self.batches]
        model = models.build(config.model, channels, side, config.width, config.seed)
        self.model = model.to(self.device, memory_format=layout)
        self.optimizer, self.meter = _optimizer(config, self.model, History())
        self.progress = Progress()
        self.matrices: dict[int, dict[str, np.ndarray]] = {}
        self._window: tuple[int, Window] | None = None

    @property
    def history(self) -> History:
        """The sums of every step and layer."""
        return self.meter.history

    # ---- training ----------------------------------------------------------------------------------------

    def epoch(self) -> None:
        """One full-batch step: loss, accuracy and gradient of the mean over all pictures, in one pass.

        Raises:
            Diverged: the loss is not finite; the weights and the record are those before.
        """
        started = time.perf_counter()
        number = len(self.progress)
        if number in self.config.matrices:
            self._window = (number, self.meter.window(WINDOW))
        loss, correct = self.backward()
        if not torch.isfinite(loss):
            raise Diverged(f"the loss is {loss.item()} in epoch {number}; try a smaller --lr")
        self.optimizer.step()
        self.progress.loss.append(loss.item())
        self.progress.accuracy.append(correct.item() / self.count)
        self.progress.correlation.append(self.meter.global_correlation.item())
        self.progress.seconds.append(time.perf_counter() - started)
        if self._window is not None and self._window[1].complete:
            start, window = self._window
            names = self.meter.layer_names
            wanted = {"global": None, "first": names[0], "last": names[-1]}
            self.matrices[start] = {key: window.matrix(layer=layer) for key, layer in wanted.items()}
            self._window = None

    def backward(self) -> tuple[Tensor, Tensor]:
        """The mean loss over all pictures, its gradient in the parameters, the number of right answers."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for x, y in self.batches:
            scores = self.model(x)
            loss = F.cross_entropy(scores, y, reduction="sum") / self.count
            loss.backward()
            total += loss.detach()
            correct += (scores.detach().argmax(1) == y).sum()
        return total, correct

    # ---- checkpoints -------------------------------------------------------------------------------------

    @property
    def can_checkpoint(self) -> bool:
        """Not while a window is gathering gradients."""
        return self._window is None

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, and everything recorded: tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "monitor": self.meter.state_dict() if isinstance(self.meter, OscMonitor) else {},
            "history": self.history.state_dict(),
            "progress": {key: torch.tensor(v, dtype=torch.float64) for key, v in vars(self.progress).items()},
            "matrices": {
                epoch: {key: torch.from_numpy(m) for key, m in matrices.items()}
                for epoch, matrices in self.matrices.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, to the same bits on the same machine."""
        history = History.from_state_dict(state["history"])
        self.model.load_state_dict(state["model"])
        self.optimizer, self.meter = _optimizer(self.config, self.model, history)
        self.optimizer.load_state_dict(state["optimizer"])
        if isinstance(self.meter, OscMonitor):
            self.meter.load_state_dict(state["monitor"])
        self.progress = Progress(**{key: v.tolist() for key, v in state["progress"].items()})
        self.matrices = {
            epoch: {key: m.numpy() for key, m in matrices.items()}
            for epoch, matrices in state["matrices"].items()
        }


def _optimizer(config: Config, model: nn.Module, history: History) -> tuple[Any, OscGD | OscMonitor]:
    """The optimizer, and what measures (OscGD does so itself)."""
    if config.optimizer == "oscgd":
        own = OscGD(model.named_parameters(), lr=config.lr, layers=config.layers, history=history)
        return own, own
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[config.optimizer]
    optimizer = kind(model.parameters(), lr=config.lr)
    return optimizer, OscMonitor(optimizer, model.named_parameters(), layers=config.layers, history=history)


def run(
    trainer: Trainer,
    folder: Folder,
    checkpoint_seconds: float,
    on_epoch: Callable[[Trainer], None],
) -> None:
    """Train to the last epoch, with a checkpoint every so many seconds and one at the end.

    Raises:
        Diverged: the loss is not finite. A checkpoint of everything before it has been written.
        Interrupted: SIGINT or SIGTERM came. The epoch has been finished and a checkpoint written.
    """
    last = time.monotonic()
    with _signals() as caught:
        try:
            while len(trainer.progress) < trainer.config.epochs:
                trainer.epoch()
                on_epoch(trainer)
                if caught and trainer.can_checkpoint:
                    raise Interrupted(caught[0])
                if trainer.can_checkpoint and time.monotonic() - last >= checkpoint_seconds:
                    folder.save_checkpoint(trainer.state_dict())
                    last = time.monotonic()
        finally:
            folder.save_checkpoint(trainer.state_dict())


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM go into a list; a second one acts as usual."""
    caught: list[int] = []
    wanted = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in wanted}

    def catch(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    for number in wanted:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number in wanted:
            signal.signal(number, before[number])
