"""What recording costs as a run grows: time a step and memory of a History, over 10^5 steps of 300 layers.

    python benchmarks/history.py --steps 100000 --layers 300

One line every tenth of the run: the median and the longest time to record a step, the steps held, and the
memory that the process has resident. Nothing else is done in a step, so the times are the record's own.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

from study.cli import Parser, exit_code, filled, positive, script, writable_folder
from study.errors import UserError


def resident() -> float:
    """MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def parser() -> Parser:
    p = Parser(prog="history.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=positive(int), default=100_000, help="default: %(default)s")
    p.add_argument("--layers", type=positive(int, 10**6), default=300, help="default: %(default)s")
    p.add_argument(
        "--limit",
        type=positive(int),
        default=16_384,
        help="steps that the History holds (default: %(default)s)",
    )
    p.add_argument("--folder", type=filled, metavar="DIR", help="stream every step there as well")
    return p


def main(arguments: list[str] | None = None) -> int:
    return exit_code(lambda: _main(parser().parse_args(arguments)))


def _main(options: argparse.Namespace) -> int:
    import numpy as np
    import torch

    from oscopt import History
    from oscopt.clock import HostClock
    from oscopt.device_log import DeviceLog
    from oscopt.rows import RECORDED
    from study import memory

    held = min(options.steps, options.limit) * options.layers * 8 * (len(RECORDED) + 2)
    memory.check(held, "the record", "--layers or --limit")
    try:
        history = History(limit=options.limit)
    except ValueError as error:
        raise UserError(f"--limit {options.limit}: {error}") from None
    history.add_layers([f"layer{i}" for i in range(options.layers)])
    if options.folder is not None:
        if any(writable_folder("--folder", options.folder).iterdir()):
            raise UserError(f"--folder {options.folder}: it is not empty; give another one")
        history.stream_to(options.folder)
    sums = torch.rand((len(RECORDED), options.layers), dtype=torch.float64)
    clock = HostClock(range(options.layers), [0] * options.layers, options.layers, 0, (0.1,))
    log = DeviceLog(history.block_size, len(RECORDED), options.layers, torch.device("cpu"), clock)
    history.read_from(log)
    print(f"{'steps':>9} {'us a step':>10} {'longest ms':>10} {'held':>7} {'MiB':>7}")
    tenth = -(-options.steps // 10)
    for start in range(0, options.steps, tenth):
        times, end = [], min(start + tenth, options.steps)
        for t in range(start, end):
            lr = np.full(options.layers, 0.1 / (1 + t))  # changes in every step: the costly case
            begin = time.perf_counter()
            if log.full:
                for rows in log.send():
                    history.extend(rows)
            log.open().copy_(sums)
            log.close((lr, lr))
            clock.advance()
            times.append(time.perf_counter() - begin)
        print(
            f"{end:9,} {np.median(times) * 1e6:10.1f} {max(times) * 1e3:10.1f} {len(history):7,} "
            f"{resident():7.0f}"
        )
    history.flush()
    return 0


if __name__ == "__main__":
    sys.exit(script(main))
