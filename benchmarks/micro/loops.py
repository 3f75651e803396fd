"""The loops whose epochs are timed side by side, and their memory."""

from __future__ import annotations

import ctypes
import gc
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from oscopt import OscGD
from study.config import Config
from study.train import Trainer

LOOPS = ("run.py", "bare", "usual")


def make_loop(name: str, config: Config, data_root: str | None) -> tuple[Callable[[], object], nn.Module]:
    """A function that does one epoch, and the model that it trains."""
    trainer = Trainer(config, data_root)
    if name == "run.py":
        return trainer.epoch, trainer.model
    if name == "bare":
        return lambda: _bare(trainer.model, trainer.batches), trainer.model
    device = trainer.device
    model = trainer.model.to(memory_format=torch.contiguous_format)
    pictures = torch.cat([x for x, _ in trainer.batches]).cpu().contiguous()
    labels = torch.cat([y for _, y in trainer.batches]).cpu()
    loader = DataLoader(TensorDataset(pictures, labels), batch_size=len(trainer.batches[0][1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    return lambda: _usual(model, loader, optimizer, len(labels), device), model


def _bare(model: nn.Module, batches: list) -> None:
    count = sum(len(y) for _, y in batches)
    model.zero_grad(set_to_none=True)
    for x, y in batches:
        (F.cross_entropy(model(x), y, reduction="sum") / count).backward()


def _usual(model: nn.Module, loader: DataLoader, optimizer, count: int, device: torch.device) -> float:
    optimizer.zero_grad()
    for x, y in loader:
        (F.cross_entropy(model(x.to(device)), y.to(device), reduction="sum") / count).backward()
    optimizer.step()
    with torch.no_grad():
        losses = [F.cross_entropy(model(x.to(device)), y.to(device), reduction="sum") for x, y in loader]
    return sum(losses).item() / count


def times(config: Config, turns: int, seconds: float, data_root: str | None) -> dict[str, list[float]]:
    """Seconds an epoch of each loop, turn by turn; a turn takes each loop about `seconds` long."""
    loops = {name: make_loop(name, config, data_root)[0] for name in LOOPS}
    synchronise = torch.cuda.synchronize if config.device.startswith("cuda") else lambda: None

    def measure(epoch: Callable[[], object], count: int) -> float:
        synchronise()
        started = time.perf_counter()
        for _ in range(count):
            epoch()
        synchronise()
        return (time.perf_counter() - started) / count

    for epoch in loops.values():  # kernels are compiled and buffers allocated
        measure(epoch, 2)
    counts = {name: max(1, round(seconds / measure(epoch, 1))) for name, epoch in loops.items()}
    taken: dict[str, list[float]] = {name: [] for name in LOOPS}
    for turn in range(turns):
        for name in LOOPS if turn % 2 else reversed(LOOPS):
            taken[name].append(measure(loops[name], counts[name]))
    return taken


def peak(name: str, config: Config, data_root: str | None) -> tuple[int, int]:
    """Bytes at the peak of three epochs, above those before model and data; bytes of the gradient."""
    with suppress(AttributeError, OSError):  # glibc: freed blocks go back at once, so the peak is what lives
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    tiny = nn.Conv2d(1, 1, 3)
    tiny(torch.zeros(1, 1, 8, 8)).sum().backward()
    OscGD(tiny.named_parameters(), lr=0.1).step()  # libraries are loaded
    cuda = config.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else _resident("VmRSS")
    epoch, model = make_loop(name, config, data_root)
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    for _ in range(3):
        epoch()
    most = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")
    return most - before, sum(p.numel() * p.element_size() for p in model.parameters())


def _resident(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
