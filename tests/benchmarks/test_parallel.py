"""The study over several processes: the same micro-batches, the trajectory of one process within rounding."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from oscopt import History

pytestmark = pytest.mark.slow

RUN = str(Path(__file__).parents[2] / "benchmarks" / "run.py")
SETTINGS = (
    "--model resnet18 --n-train 90 --micro-batch 20 --width 8 --image-size 12 --lr 0.01 --threads 1".split()
)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def start(out: Path, *options: str, processes: int = 1) -> subprocess.Popen:
    before = [*TORCHRUN, str(processes)] if processes > 1 else []
    command = [sys.executable, *before, RUN, "--out", str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return out + err


def losses(folder: Path) -> list[float]:
    with open(folder / "epochs.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_two_processes(tmp_path):
    """Five micro-batches, the last one smaller: three for one process and two for the other."""
    started = [
        start(tmp_path / str(n), *SETTINGS, "--epochs", "4", "--device", "cpu", processes=n) for n in (1, 2)
    ]
    assert "2 processes" in [finish(process) for process in started][1]
    one, two = (History.load(tmp_path / str(n) / "history.npz") for n in (1, 2))
    assert one.steps.tolist() == two.steps.tolist() == list(range(4))
    np.testing.assert_allclose(losses(tmp_path / "1"), losses(tmp_path / "2"), rtol=1e-5)
    np.testing.assert_allclose(two.sq_norm, one.sq_norm, rtol=1e-3)
    np.testing.assert_allclose(two.correlation(), one.correlation(), atol=1e-3)
    assert one.sq_norm.min() > 0 and len({*losses(tmp_path / "2")}) == 4


def test_bad_input_ends_all_processes(tmp_path):
    said = finish(start(tmp_path / "bad", "--experiment", "fig99", processes=2), code=1)
    assert "unknown experiment 'fig99'" in said
    assert said.count("error: ") == 1


def test_interrupted_and_resumed(tmp_path):
    """Even if torchrun gives the processes no time to end: to the bits of the undisturbed run."""
    options = [*SETTINGS, "--epochs", "120", "--device", "cpu"]
    finish(start(tmp_path / "whole", *options, processes=2))
    process = start(tmp_path / "part", *options, "--checkpoint-epochs", "1", processes=2)
    deadline = time.monotonic() + 120
    while not (tmp_path / "part" / "checkpoint-older.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    finish(process, code=1)
    finish(start(tmp_path / "part", "--resume", processes=2))
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
