"""What recording costs as a run grows: time a step and memory of a History, over 10^5 steps of 300 layers.

    python benchmarks/history.py --steps 100000 --layers 300

One line every tenth of the run: the median and the longest time to record a step, the steps held, and the
memory that the process has resident. Nothing else is done in a step, so the times are the record's own.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch

from oscopt import History


def resident() -> float:
    """MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=100_000)
    p.add_argument("--layers", type=int, default=300)
    p.add_argument("--limit", type=int, default=16_384, help="steps that the History holds")
    p.add_argument("--folder", help="stream every step there as well")
    options = p.parse_args()
    history = History(limit=options.limit)
    history.add_layers([f"layer{i}" for i in range(options.layers)])
    if options.folder:
        history.stream_to(options.folder)
    sums = torch.rand((5, options.layers), dtype=torch.float64)
    device = torch.device("cpu")
    print(f"{'steps':>9} {'us a step':>10} {'longest ms':>10} {'held':>7} {'MiB':>7}")
    tenth = max(1, options.steps // 10)
    for start in range(0, options.steps, tenth):
        times = []
        for t in range(start, start + tenth):
            lr = np.full(options.layers, 0.1 / (1 + t))  # changes in every step: the costly case
            begin = time.perf_counter()
            history.next_row(device).copy_(sums)
            history.commit(t, lr, lr)
            times.append(time.perf_counter() - begin)
        print(
            f"{start + tenth:9,} {np.median(times) * 1e6:10.1f} {max(times) * 1e3:10.1f} {len(history):7,} "
            f"{resident():7.0f}"
        )


if __name__ == "__main__":
    main()
