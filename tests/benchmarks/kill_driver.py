"""Start run.py again and again, and kill it at random moments: kill_driver.py KILLS OUT OPTIONS...

Forks instead of starting Python anew, which takes seconds; nothing here may start threads before a fork.
Every third kill waits for the write of a checkpoint, which takes a while: the disk is slow.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import run
import torch._dynamo  # noqa: F401  (an optimizer imports it, which takes a second)

from oscopt.kernels import numba_backend  # noqa: F401
from study import data, figure, train  # noqa: F401  (imported before the forks)

kills, out, options = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
data._mnist5k = functools.cache(data._mnist5k)
data._mnist5k()


def slowly(operation):
    """`operation` on a slow disk."""

    def delayed(*arguments):
        time.sleep(0.003)
        operation(*arguments)
        time.sleep(0.003)

    return delayed


os.fsync, os.replace = slowly(os.fsync), slowly(os.replace)


def written(path) -> int:
    """When `path` was last written; 0: it is not there, which a look may find while it is replaced."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


generator = random.Random(0)
done = inside = 0
checkpoint = out / "checkpoint.pt"
while done < kills:
    known = written(checkpoint)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        resume = ["--resume", "--out", str(out)]
        os._exit(run.main(resume if (out / "config.json").exists() else [*options, "--out", str(out)]))
    # Let it get one checkpoint further, then strike at any moment.
    deadline = time.monotonic() + 30
    while written(checkpoint) in (0, known):
        if time.monotonic() > deadline:
            sys.exit("the run does not get on")
        time.sleep(0.001)
    if done % 3 == 0:
        while not list(out.glob(".checkpoint.pt.*")) and time.monotonic() < deadline:
            pass
        time.sleep(generator.uniform(0, 0.012))
    else:
        time.sleep(generator.uniform(0, 0.05))
    inside += bool(list(out.glob(".checkpoint.pt.*")))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(f"the run ended with {os.WEXITSTATUS(status)} before it was killed")
    done += 1
print(json.dumps({"kills": done, "inside_a_write": inside}))
