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


LONG = (*SETTINGS, "--epochs", "60", "--device", "cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of two processes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("parallel") / "whole"
    assert "2 processes" in finish(start(folder, *LONG, processes=2))
    return folder


def test_two_processes(tmp_path, whole):
    """Five micro-batches, the last one smaller: three for one process and two for the other."""
    finish(start(tmp_path / "one", *SETTINGS, "--epochs", "4", "--device", "cpu"))
    one, two = (History.load(folder / "history.npz") for folder in (tmp_path / "one", whole))
    assert one.steps.tolist() == list(range(4)) and two.steps.tolist() == list(range(60))
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(whole)[:4], rtol=1e-5)
    np.testing.assert_allclose(two.sq_norm[:4], one.sq_norm, rtol=1e-3)
    np.testing.assert_allclose(two.correlation()[:4], one.correlation(), atol=1e-3)
    assert one.sq_norm.min() > 0 and len({*losses(whole)[:4]}) == 4


def test_bad_input_ends_all_processes(tmp_path):
    said = finish(start(tmp_path / "bad", "--experiment", "fig99", processes=2), code=1)
    assert "unknown experiment 'fig99'" in said
    assert said.count("error: ") == 1


def test_interrupted_and_resumed(tmp_path, whole):
    """Even if torchrun gives the processes no time to end: to the bits of the undisturbed run."""
    process = start(tmp_path / "part", *LONG, "--checkpoint-epochs", "1", processes=2)
    deadline = time.monotonic() + 120
    while not (tmp_path / "part" / "checkpoint-older.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    finish(process, code=1)
    finish(start(tmp_path / "part", "--resume", processes=2))
    assert losses(tmp_path / "part") == losses(whole)
