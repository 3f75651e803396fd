"""Run functions in several processes that form a gloo group on this machine."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(world: int, functions: list[Callable[..., None]], *arguments: Any) -> dict[str, str]:
    """Call each function in `world` processes, one after the other.

    Returns:
        For each function's name "" or what went wrong in which rank. Those after a failure are run too, each
        in a group of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (world, folder, functions, arguments), nprocs=world)
        reports = {f.__name__: "" for f in functions}
        for path in sorted(Path(folder).glob("*.failed")):
            reports[path.name.split("-")[0]] += f"{path.stem}: {path.read_text()}\n"
    return reports


def _work(rank: int, world: int, folder: str, functions, arguments) -> None:
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    for function in functions:
        store = dist.FileStore(f"{folder}/{function.__name__}.store", world)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        try:
            function(rank, world, *arguments)
        except BaseException:
            Path(f"{folder}/{function.__name__}-{rank}.failed").write_text(traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()
    # FSDP's last reduction may leave a gloo thread waiting for the interpreter's lock. An interpreter that
    # ends kills the thread, and that aborts the process (torch 2.14, with any optimizer).
    os._exit(0)
