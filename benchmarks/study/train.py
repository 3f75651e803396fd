"""Full-batch training with every gradient measured."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oscopt import History, OscGD, OscMonitor, Window

from . import data, memory, models, parallel
from .config import WINDOW, Config
from .errors import Diverged, Interrupted, UserError
from .folder import Folder
from .rules import Record
from .sharpness import top_eigenvalue

OTHERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
"""Other than gradient descent: that is "oscgd", which measures itself, or "sgd", measured by OscMonitor."""


@dataclass
class Progress:
    """What is known after each epoch; one entry an epoch."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    sharpness: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.loss)


class Trainer:
    """One run: model, data, optimizer and what was recorded.

    Attributes:
        progress: loss, accuracy and sharpness (NaN: not asked for) before each step, the step's seconds.
        matrices: epoch -> {"global": (h, h), "first": ..., "last": ...} of the windows so far.
        sketcher: keeps a sketch of each epoch's whole gradient, beside what `meter` measures exactly.

    Args:
        data_root: folder of the datasets.
        ranks: the processes that share the run.
        loaded: pictures and labels, in place of those that `config` names.
    """

    def __init__(
        self,
        config: Config,
        data_root: str | None = None,
        ranks: parallel.Ranks | None = None,
        loaded: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.ranks = ranks or parallel.Ranks()
        torch.set_num_threads(config.threads)
        _set_precision(config)
        self.config = config
        self.device = self.ranks.device(config.device)
        pictures, labels = loaded or data.load(
            config.dataset, config.n_train, config.image_size, data_root, config.seed
        )
        channels, side = pictures.shape[1], pictures.shape[-1]
        if side < models.SMALLEST[config.model]:
            least = models.SMALLEST[config.model]
            raise UserError(f"--image-size {side}: {config.model} takes pictures of at least {least} pixels")
        # Convolutions are 1.3 to 2.3 times as fast so. On some CPUs, torch's with fewer than 8 channels write
        # beyond their memory then.
        narrow = self.device.type == "cpu" and config.width < 8
        layout = torch.contiguous_format if narrow else torch.channels_last
        self.count = len(labels)
        # Even parts: batch norm in a small last one would be another.
        parts = -(-self.count // config.micro_batch)
        pieces = (t.to(self.device).tensor_split(parts) for t in (pictures, labels))
        self.batches = [(x.contiguous(memory_format=layout), y) for x, y in zip(*pieces, strict=True)]
        with torch.device("meta"):
            shapes = models.build(config.model, channels, side, config.width, config.seed)
        self._check(shapes)
        model = models.build(config.model, channels, side, config.width, config.seed)
        self.model = model.to(self.device, memory_format=layout)
        self._labels = torch.cat([y for _, y in self.batches])
        self._precision: Callable[[], AbstractContextManager] = nullcontext
        if config.precision == "bf16":
            self._precision = lambda: torch.autocast(self.device.type, torch.bfloat16)
        self._forward = torch.compile(self.model) if config.compile else self.model
        self._attach(*(new() for new in _HISTORIES.values()))
        self.progress = Progress()
        self.matrices: dict[int, dict[str, np.ndarray]] = {}
        self._window: tuple[int, Window] | None = None

    def _check(self, model: nn.Module) -> None:
        """Raise if this machine cannot train `model`, which has no memory yet."""
        kept = 3 + 2 * (self.config.optimizer in OTHERS)  # weights, two gradients; an optimizer's own
        size = sum(4 * p.numel() for p in model.parameters())
        memory.check(kept * size, "the net", "--width or --image-size", self.device)
        smallest = len(self.batches[-1][1])
        if smallest < 2 and any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            raise UserError(
                f"{self.config.model} has batch norm, which needs two pictures at least in each "
                "micro-batch; use a larger --micro-batch or --n-train"
            )

    @property
    def history(self) -> History:
        """The sums of every step and layer."""
        return self.meter.history

    @property
    def updates(self) -> History | None:
        """The same of the updates; None: plain gradient descent, where they are the gradients times -lr."""
        measured = isinstance(self.meter, OscMonitor) and "update" in self.meter.what
        return self.meter.update_history if measured else None

    @property
    def record(self) -> Record:
        """What has been recorded so far."""
        columns = {name: np.array(values, np.float64) for name, values in vars(self.progress).items()}
        sketches = self.sketcher.history
        recurrence = sketches if len(sketches) else None
        return Record(self.history, updates=self.updates, recurrence=recurrence, **columns)

    # ---- training ----------------------------------------------------------------------------------------

    def epoch(self) -> None:
        """One full-batch step: loss, accuracy and gradient of the mean over all pictures, in one pass.

        Raises:
            Diverged: the loss is not finite; the weights and the record are those before.
        """
        number = len(self.progress)
        if self.ranks.rank == 0:
            self.ranks.say("another epoch")
        every = self.config.sharpness_every
        wanted = every and number % every == 0 and self.ranks.rank == 0
        sharpness = self.sharpness() if wanted else math.nan
        started = time.perf_counter()
        if self.opens_window:
            self._window = (number, self.meter.window(WINDOW))
        # To the host at once: a GPU is waited for once an epoch.
        loss, correct = torch.stack([value.double() for value in self.backward()]).tolist()
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} in epoch {number}; try a smaller --lr")
        self.optimizer.step()
        self.progress.loss.append(loss)
        self.progress.accuracy.append(correct / self.count)
        self.progress.sharpness.append(sharpness)
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
        losses, answers = [], []
        batches = self.ranks.mine(self.batches)
        for x, y in batches:
            with self._precision():
                scores = self._forward(x)
                loss = F.cross_entropy(scores, y, reduction="sum") / self.count
            loss.backward()
            losses.append(loss.detach())
            answers.append(scores.detach())
        if not batches:  # more processes than micro-batches
            return self.ranks.add_up(self.model, *torch.zeros(2, device=self.device))
        # All at once: small operations in the loop would be felt.
        labels = self._labels if self.ranks.size == 1 else torch.cat([y for _, y in batches])
        correct = (torch.cat(answers).argmax(1) == labels).sum()
        return self.ranks.add_up(self.model, torch.stack(losses).sum(), correct)

    def sharpness(self) -> float:
        """The largest eigenvalue of the Hessian of the loss that `backward` takes; changes nothing.

        In float32, whatever the precision of the training.
        """
        buffers = [buffer.clone() for buffer in self.model.buffers()]

        def losses() -> Iterator[Tensor]:
            for x, y in self.batches:
                yield F.cross_entropy(self.model(x), y, reduction="sum") / self.count

        value = top_eigenvalue(losses, list(self.model.parameters()))
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):  # batch norm's running means
            buffer.copy_(before)
        return value

    # ---- checkpoints -------------------------------------------------------------------------------------

    @property
    def opens_window(self) -> bool:
        """Whether the next epoch begins a window."""
        number = len(self.progress)
        return number in self.config.matrices and number + WINDOW <= self.config.epochs

    @property
    def can_checkpoint(self) -> bool:
        """Not while a window is gathering gradients."""
        return self._window is None

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, and everything recorded: tensors and plain values."""
        return {
            "settings": self.config.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "monitor": self.meter.state_dict() if isinstance(self.meter, OscMonitor) else {},
            "sketcher": self.sketcher.state_dict(),
            "history": self.history.state_dict(),
            "update_history": {} if self.updates is None else self.updates.state_dict(),
            "recurrence": self.sketcher.history.state_dict(),
            "progress": {key: torch.tensor(v, dtype=torch.float64) for key, v in vars(self.progress).items()},
            "matrices": {
                epoch: {key: torch.from_numpy(m) for key, m in matrices.items()}
                for epoch, matrices in self.matrices.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, to the same bits on the same machine.

        Raises:
            ValueError: it is of a run with other settings, or its parts are of different epochs.
            Exception: any that its parts raise if it is no checkpoint. Load another then, or go no further.
        """
        if not isinstance(state, dict) or "settings" not in state:
            raise ValueError("it has no settings, as every checkpoint of this version has")
        ours, theirs = self.config.to_dict(), state["settings"]
        if differing := [key for key in ours if ours[key] != theirs.get(key)]:
            raise ValueError(f"it is of a run with {differing[0]} {theirs.get(differing[0])}")
        self.model.load_state_dict(state["model"])
        recorded = [
            History.from_state_dict(state[key]) if state.get(key) else new()
            for key, new in _HISTORIES.items()
        ]
        self._attach(*recorded)
        self.optimizer.load_state_dict(state["optimizer"])
        if isinstance(self.meter, OscMonitor):
            self.meter.load_state_dict(state["monitor"])
        self.progress = Progress(**{key: v.tolist() for key, v in state["progress"].items()})
        unknown = {
            "step": len(self.progress),
            "state": {name: {} for name, _ in self.model.named_parameters()},
        }
        self.sketcher.load_state_dict(state.get("sketcher", unknown))  # older ones have none: it begins here
        self.matrices = {
            epoch: {key: m.numpy() for key, m in matrices.items()}
            for epoch, matrices in state["matrices"].items()
        }
        counts = {len(values) for values in vars(self.progress).values()}
        counts |= {
            len(self.history),
            len(self.sketcher.history) if "recurrence" in state else len(self.history),
        }
        if len(counts) > 1 or len(self.progress) > self.config.epochs:
            raise ValueError(f"its parts are of {' and '.join(map(str, sorted(counts)))} epochs")

    def _attach(self, history: History, update_history: History, recurrence: History) -> None:
        """Make the optimizer and what measures its gradients, and its updates if they differ."""
        config, model = self.config, self.model
        layers: str | dict[str, str] = config.layers
        if layers == "block":
            layers = {name: models.block_of(config.model, name) for name, _ in model.named_parameters()}
        if config.optimizer == "oscgd":
            own = OscGD(model.named_parameters(), lr=config.lr, layers=layers, history=history)
            self.optimizer, self.meter = own, own
        else:
            kind = OTHERS.get(config.optimizer, torch.optim.SGD)
            self.optimizer = kind(model.parameters(), lr=config.lr)
            self.meter = OscMonitor(
                self.optimizer,
                model.named_parameters(),
                ("grad", "update") if config.optimizer in OTHERS else "grad",
                layers=layers,
                history=history,
                update_history=update_history,
            )
        # One layer, not one each: 1 KB an epoch, whatever the model.
        self.sketcher = OscMonitor(
            self.optimizer,
            model.named_parameters(),
            layers={name: "all layers" for name, _ in model.named_parameters()},
            measure="sketch",
            history=recurrence,
        )


_HISTORIES: dict[str, Callable[[], History]] = {
    "history": lambda: History(limit=None),
    "update_history": lambda: History(limit=None),
    "recurrence": lambda: History(limit=None, sketches=256),
}
"""What a run records, as its checkpoints call it, and empty."""


def _set_precision(config: Config) -> None:
    """float32 products in float32, unless TF32 is asked for (torch's own default for convolutions)."""
    allowed = "tf32" if config.precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = allowed
    torch.backends.cudnn.conv.fp32_precision = allowed


def run(
    trainer: Trainer,
    folder: Folder,
    on_epoch: Callable[[Trainer], None],
    *,
    checkpoint_seconds: float = 30.0,
    checkpoint_epochs: int | None = None,
) -> None:
    """Train to the last epoch, with a checkpoint every so many seconds or epochs and one at the end.

    Raises:
        Diverged: the loss is not finite. A checkpoint of everything before it has been written.
        Interrupted: SIGINT or SIGTERM came. The epoch has been finished, and there is a checkpoint from which
            the run goes on to the same bits: of this moment, or of the start of the window that was open.
    """
    last = time.monotonic()
    with _signals() as caught:
        while (done := len(trainer.progress)) < trainer.config.epochs:
            if trainer.opens_window:  # there will be none until it closes
                folder.save_checkpoint(trainer.state_dict())
                last = time.monotonic()
            try:
                trainer.epoch()
            except Diverged:
                folder.save_checkpoint(trainer.state_dict())
                raise
            on_epoch(trainer)
            due = time.monotonic() - last >= checkpoint_seconds
            due |= checkpoint_epochs is not None and (done + 1) % checkpoint_epochs == 0
            if trainer.can_checkpoint and (due or caught):
                folder.save_checkpoint(trainer.state_dict())
                last = time.monotonic()
            if caught and done + 1 < trainer.config.epochs:
                raise Interrupted(caught[0])
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
