"""What a run will take on this machine, from a few timed passes of its own net: hours, disk, memory."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from . import data, memory, models
from .config import Config
from .errors import UserError
from .train import OTHERS, Trainer

LONG_ENOUGH = 0.5
"""Seconds that a timed pass takes at least, unless it is of a whole micro-batch."""
TURNS = 5
"""How often it is timed."""
_CHECKPOINTS = 2  # that a folder keeps
_PAGES = 8 << 20  # figures, page and tables of a run, at most


@dataclass(frozen=True)
class Estimate:
    """Of one run.

    Attributes:
        seconds: what an epoch takes.
        disk: bytes of the run's folder when it is finished.
        peak: bytes of memory that are needed at once, about.
        problem: why it cannot run here, in words; "": it can.
        note: what it needs besides, in words.
    """

    seconds: float
    disk: int
    peak: int
    problem: str = ""
    note: str = ""


def estimate(config: Config, data_root: str | None, *, beside: int = 1) -> Estimate:
    """What a run with these settings takes here.

    The pictures are random ones of the dataset's size, as time does not depend on what they show: nothing is
    downloaded. Passes of growing parts of a micro-batch are timed until one takes half a second.

    Args:
        beside: how many such runs share the machine's memory.
    """
    count, channels, side = data.SIZES[config.dataset]
    count, side = config.n_train or count, config.image_size or side
    micro_batch = -(-count // -(-count // config.micro_batch))  # the parts are even
    peak, free = _peak(config, count, micro_batch, channels, side), _free(config.device) / beside
    problem = "" if peak <= free else f"needs {_gib(peak)} of memory, and {_gib(free)} are free for it"
    there = data.is_there(config.dataset, data_root)
    note = "" if there else f"{config.dataset} is not in the data folder; it would be downloaded"
    fits = micro_batch if not problem else max(2, int(micro_batch * free / peak / 2))
    size = min(fits, 8)
    try:
        trainer, passes, whole = _timed(config, size, channels, side)
        while passes < LONG_ENOUGH and size < fits:
            size = min(fits, 4 * size)
            trainer, passes, whole = _timed(config, size, channels, side)
    except UserError as error:
        return Estimate(math.nan, 0, peak, str(error), note)
    seconds = passes * count / size + max(0.0, whole - passes)
    return Estimate(seconds, _disk(trainer, config.epochs), peak, problem, note)


def _free(device: str) -> float:
    try:
        return memory.free(torch.device(device))
    except OSError:  # not Linux
        return math.inf


def _timed(config: Config, count: int, channels: int, side: int) -> tuple[Trainer, float, float]:
    """A run on so many pictures; seconds of a pass over them, and of an epoch, which measures and steps too.

    The least of some: whatever else the machine does adds to them.
    """
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(count, channels, side, side, generator=generator)
    labels = torch.randint(models.CLASSES, (count,), generator=generator)
    short = replace(config, n_train=count, micro_batch=count, matrices=(), sharpness_every=0)
    trainer = Trainer(short, loaded=(pictures, labels))
    for _ in range(2):  # the first steps compile, and take memory
        trainer.epoch()
    turns = [(_seconds(trainer, trainer.backward), _seconds(trainer, trainer.epoch)) for _ in range(TURNS)]
    passes, whole = (min(taken) for taken in zip(*turns, strict=True))
    return trainer, passes, whole


def _seconds(trainer: Trainer, do: Callable[[], object]) -> float:
    started = time.perf_counter()
    do()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter() - started


def _peak(config: Config, count: int, micro_batch: int, channels: int, side: int) -> int:
    """Bytes of pictures, weights, gradients and what a micro-batch's pass keeps, counted on a meta net."""
    kept: dict[StorageWeakRef, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[StorageWeakRef(storage)] = storage.nbytes()
        return tensor

    with torch.device("meta"):
        model = models.build(config.model, channels, side, config.width, config.seed)
        pictures = torch.empty(micro_batch, channels, side, side)
        labels = torch.empty(micro_batch, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = F.cross_entropy(model(pictures), labels)
    assert loss.requires_grad  # alive until here, so that all that it keeps was
    weights = sum(p.nbytes for p in model.parameters())
    copies = 3 + 2 * (config.optimizer in OTHERS)  # weights, two gradients; an optimizer's own
    return 4 * count * channels * side**2 + copies * weights + sum(kept.values())


def _disk(trainer: Trainer, epochs: int) -> int:
    """Bytes of the folder: checkpoints and the record, which grow by as much each epoch, and pages."""
    done, size = len(trainer.progress), _bytes(trainer)
    trainer.epoch()
    growth = max(0, _bytes(trainer) - size)
    return (_CHECKPOINTS + 1) * growth * epochs + _CHECKPOINTS * (size - growth * done) + _PAGES


def _bytes(trainer: Trainer) -> int:
    whole = io.BytesIO()
    torch.save(trainer.state_dict(), whole)
    return whole.tell()


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
