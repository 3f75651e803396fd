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
import multiprocessing
import signal
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

from run import machine

from study.cli import (
    Parser,
    check_device,
    check_folder,
    exit_code,
    filled,
    name_list,
    positive,
    script,
    threads,
)
from study.config import DATASETS, LARGEST, PRECISIONS, PRESETS
from study.errors import UserError
from study.experiments import DEFAULT_ROW, TABLE


def parser() -> Parser:
    p = Parser(
        prog="throughput.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ("cnn", "vgg16", "resnet18", "resnet34")
    p.add_argument(
        "--models", type=name_list, default=default, metavar="NAME,...", help=f"default: {','.join(default)}"
    )
    p.add_argument("--preset", choices=PRESETS, default="small")
    p.add_argument("--dataset", choices=DATASETS)
    p.add_argument("--data-root", type=filled, metavar="DIR", help="folder of the datasets (default: data)")
    p.add_argument("--n-train", type=positive(int, LARGEST["n_train"]), metavar="N")
    p.add_argument("--micro-batch", type=positive(int, LARGEST["micro_batch"]), metavar="N")
    p.add_argument("--width", type=positive(int, LARGEST["width"]))
    p.add_argument("--device", type=filled, help="default: cuda where there is a GPU, else cpu")
    p.add_argument("--threads", type=threads, help="of the CPU (default: torch's)")
    p.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of run.py and bare")
    p.add_argument("--turns", type=positive(int), default=9, help="default: %(default)s")
    p.add_argument("--seconds", type=positive(float), default=0.5, help="that a loop takes in each turn")
    return p


def main(arguments: list[str] | None = None) -> int:
    return exit_code(lambda: _main(parser().parse_args(arguments)))


def _main(options: argparse.Namespace) -> int:
    unknown = [model for model in options.models if model not in DEFAULT_ROW]
    if unknown:
        raise UserError(f"--models: unknown model {unknown[0]!r}; there are {', '.join(DEFAULT_ROW)}")
    import torch

    from micro.loops import LOOPS, peak, times

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.threads = options.threads or torch.get_num_threads()
    check_device(options.device)
    check_folder("--data-root", options.data_root)
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
    for model in options.models:
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
        peaks, ignored = {}, (signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches both processes
        for name in ("run.py", "bare"):  # each in a process of its own
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), signal.signal, ignored) as pool:
                peaks[name], gradient = pool.submit(peak, name, config, options.data_root).result()
        allowed = 1.1 * peaks["bare"] + gradient
        print(
            f"| {model} | {1000 * statistics.median(taken['run.py']):.1f} | {over['bare']:.3f} | "
            f"{over['usual']:.3f} | {peaks['run.py'] / 2**20:.0f} | {peaks['run.py'] / allowed:.3f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(script(main))
