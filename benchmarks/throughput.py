"""What an epoch of run.py costs: beside a bare loop, and beside the loop that studies usually write.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --models resnet34 --device cuda --micro-batch 1000 --n-train 10000

* `bare`: forward and backward over the same micro-batches in the same memory format, no optimizer, no record.
* `usual`: contiguous pictures from a DataLoader over a TensorDataset, torch.optim.SGD, and a second pass for
  the loss; nothing is measured.

The three take turns, so that a machine that slows down slows them all; medians are of each turn's ratio.
Memory is the peak of a process of its own, above what it had before model and data.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from run import PRECISIONS, machine
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from oscopt import OscGD
from study.cli import Parser, positive
from study.config import Config
from study.errors import UserError
from study.experiments import DEFAULT_ROW, TABLE
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
    loader = DataLoader(TensorDataset(pictures, labels), batch_size=config.micro_batch)
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


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="cnn,vgg16,resnet18,resnet34", help="by commas")
    parser.add_argument("--preset", choices=("small", "paper"), default="small")
    parser.add_argument("--dataset")
    parser.add_argument("--data-root")
    parser.add_argument("--n-train", type=positive(int))
    parser.add_argument("--micro-batch", type=positive(int))
    parser.add_argument("--width", type=positive(int))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=positive(int), default=torch.get_num_threads())
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of run.py and bare")
    parser.add_argument("--turns", type=positive(int), default=9)
    parser.add_argument("--seconds", type=positive(float), default=0.5, help="that a loop takes in each turn")
    options = parser.parse_args(arguments)
    try:
        return _main(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(options: argparse.Namespace) -> int:
    unknown = [model for model in options.models.split(",") if model not in DEFAULT_ROW]
    if unknown:
        raise UserError(f"--models: unknown model {unknown[0]!r}; there are {', '.join(DEFAULT_ROW)}")
    given = {
        key: getattr(options, key) for key in ("dataset", "n_train", "micro_batch", "width", "precision")
    }
    given = {key: value for key, value in given.items() if value is not None}
    about = machine()
    print(
        f"{about['gpu' if options.device.startswith('cuda') else 'processor']}, {options.threads} threads, "
        f"torch {about['torch']}, {str(about['date'])[:10]}, preset {options.preset} {given or ''}\n"
    )
    print("| model | run.py, ms an epoch | over bare | over usual | peak, MiB | over (1.1 bare + gradient) |")
    print("|---|---|---|---|---|---|")
    for model in options.models.split(","):
        config = TABLE[DEFAULT_ROW[model]].config(
            options.preset, device=options.device, threads=options.threads
        )
        # A window of gradients would be kept in a few epochs only.
        config = replace(config, matrices=(), epochs=sys.maxsize, **given)
        taken = times(config, options.turns, options.seconds, options.data_root)
        over = {
            name: statistics.median(a / b for a, b in zip(taken["run.py"], taken[name], strict=True))
            for name in LOOPS
        }
        peaks = {}
        for name in ("run.py", "bare"):  # each in a process of its own
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                peaks[name], gradient = pool.submit(peak, name, config, options.data_root).result()
        allowed = 1.1 * peaks["bare"] + gradient
        print(
            f"| {model} | {1000 * statistics.median(taken['run.py']):.1f} | {over['bare']:.3f} | "
            f"{over['usual']:.3f} | {peaks['run.py'] / 2**20:.0f} | {peaks['run.py'] / allowed:.3f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
