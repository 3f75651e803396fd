"""What all command lines share: each starts with valid input, and ends with one line and its exit code."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import compare
import device_time
import history
import matplotlib.pyplot as plt
import numpy as np
import pytest
import reproduce
import run
import sketch
import throughput
import torch
from study_config import CONFIG

import kernels
import micro.plot
import race.plot
from micro.contenders import BASE, CEILING
from oscopt import History
from study import cli, data, figure, memory
from study.errors import UserError
from study.train import Trainer

BENCHMARKS = Path(run.__file__).parent
SCRIPTS = (
    "run.py",
    "reproduce.py",
    "compare.py",
    "kernels.py",
    "throughput.py",
    "history.py",
    "sketch.py",
    "device_time.py",
)
SMALL = ("--model", "cnn", "--n-train", "64", "--micro-batch", "32", "--width", "8", "--threads", "1")


data._mnist5k = functools.cache(data._mnist5k)  # takes a second to read


def called(main, *arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def test_every_script_is_known_here():
    """A new one is to be started in a test as well."""
    there = {path.name for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text()}
    assert there == set(SCRIPTS)


# ---- valid input; run.py, reproduce.py, compare.py and kernels.py have tests of their own ----------------


def test_history(tmp_path, capsys):
    arguments = ("--steps", 1905, "--layers", 3, "--limit", 512, "--folder", tmp_path / "stream")
    assert called(history.main, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["steps", "us"]
    assert len(lines) == 11 and lines[-1].split()[0] == "1,905"
    assert History.load(tmp_path / "stream").steps.tolist() == list(range(1905))


@pytest.mark.slow
def test_device_time(capsys):
    if torch.cuda.is_available():
        assert called(device_time.main, "--sets", "resnet18") == 0
    else:  # the same by Triton's interpreter, on fewer elements
        device_time.print_table("tiny", [(17_000,), (5,)], torch.device("cpu"))
        assert called(device_time.main) == 2
    printed = capsys.readouterr()
    rows = [line.split()[-2:] for line in printed.out.splitlines() if line.startswith(device_time.KINDS)]
    assert len(rows) == len(device_time.KINDS) and all(float(cell) > 0 for row in rows for cell in row)
    assert torch.cuda.is_available() or "error: this times kernels on a GPU" in printed.err


@pytest.mark.slow
def test_throughput(capsys):
    arguments = ("--models", "linear", "--n-train", 40, "--micro-batch", 16, "--threads", 1, "--turns", 1)
    assert called(throughput.main, *arguments, "--seconds", 0.01, "--device", "cpu") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| linear |")]
    assert len(rows) == 1 and all(float(cell) > 0 for cell in rows[0].split("|")[2:-1])


# ---- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (run.main, [*SMALL, "--epochs", 10**30], "not a whole number up to 1,000,000"),
        (run.main, [*SMALL, "--epochs", "9" * 400], "not a whole number up to"),
        (run.main, ["--model", "cnn", "--width", 10**9], "--width"),
        (run.main, ["--model", "cnn", "--width", 60_000], "GiB are free; use a smaller --width"),
        (run.main, ["--model", "cnn", "--image-size", 10**6], "--image-size"),
        (run.main, ["--model", "cnn", "--image-size", 60_000], "GiB are free; use a smaller --n-train or"),
        (run.main, ["--model", "cnn", "--threads", 10**6], "threads are more than this machine can run"),
        (run.main, ["--model", "cnn", "--threads", 10**10], "--threads"),
        (run.main, [*SMALL, "--device", "meta"], "--device meta cannot be used here"),
        (run.main, [*SMALL, "--device", ""], "argument --device: it is empty"),
        (run.main, [*SMALL, "--data-root", ""], "argument --data-root: it is empty"),
        (run.main, [*SMALL, "--claims", "smooth_first,"], "has an empty name"),
        (
            run.main,
            ["--model", "cnn_bn", "--n-train", 3, "--micro-batch", 2, "--width", 8],
            "two pictures at least",
        ),
        (reproduce.main, ["--only", ""], "has an empty name"),
        (reproduce.main, ["--markdown", "nowhere/results.md"], "--markdown nowhere/results.md"),
        (reproduce.main, ["--markdown", "."], "--markdown .: Is a directory"),
        (reproduce.main, ["--device", "xyz"], "--device xyz cannot be used here"),
        (reproduce.main, ["--data-root", "/nowhere"], "--data-root /nowhere: there is no such folder"),
        (reproduce.main, ["--jobs", 10**30], "--jobs"),
        (compare.main, ["--only", ""], "has an empty name"),
        (compare.main, ["--batch", 10**30], "--batch"),
        (compare.main, ["--threads", 10**6], "threads are more than this machine can run"),
        (compare.main, ["--out", "/dev/null/x"], "--out /dev/null/x"),
        (kernels.main, ["--threads", 10**6], "threads are more than this machine can run"),
        (kernels.main, ["--device", "meta"], "--device meta cannot be used here"),
        (throughput.main, ["--device", "xyz"], "--device xyz cannot be used here"),
        (sketch.main, ["--device", "xyz"], "--device xyz cannot be used here"),
        (throughput.main, ["--models", ""], "has an empty name"),
        (throughput.main, ["--models", "alexnet"], "unknown model 'alexnet'"),
        (throughput.main, ["--dataset", "imagenet"], "imagenet"),
        (throughput.main, ["--data-root", "/nowhere"], "--data-root /nowhere: there is no such folder"),
        (history.main, ["--limit", 100], "--limit 100"),
        (history.main, ["--limit", -5], "'-5' is not a whole number greater than 0"),
        (history.main, ["--steps", 0], "'0' is not a whole number greater than 0"),
        (history.main, ["--steps", 10**30], "--steps"),
        (history.main, ["--layers", 10**6], "the record would take"),
        (history.main, ["--folder", "/dev/null/x"], "--folder /dev/null/x"),
        (history.main, ["--folder", BENCHMARKS], "it is not empty"),
    ],
    ids=lambda v: " ".join(str(a)[:12] for a in v) if isinstance(v, list) else None,
)
def test_bad_input(tmp_path, capsys, monkeypatch, main, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "free", lambda device: 16 << 30)
    assert called(main, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and len(error.splitlines()) == 1, error


def test_another_kernels_csv_is_left_alone(tmp_path, capsys):
    (tmp_path / "kernels.csv").write_text("a,b\n1,2\n")
    assert called(kernels.main, "--sizes", "1e3", "--device", "cpu", "--out", tmp_path) == 2
    assert "has other columns" in capsys.readouterr().err
    assert (tmp_path / "kernels.csv").read_text() == "a,b\n1,2\n"
    (tmp_path / "bad.csv").write_text(",".join(kernels.COLUMNS) + "\n" + "x," * 22 + "x\n")
    assert called(kernels.main, "--markdown", tmp_path / "bad.csv") == 2
    told = capsys.readouterr()
    assert "it is no kernels.csv" in told.err and not told.out


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(7), "there are 8 pictures, but labels of shape (7,)"),
        (np.full(8, 200), "there is a label 200, but only 10 classes"),
        (np.zeros((8, 2, 2)), "labels of shape (8, 1, 2, 2)"),
    ],
)
def test_idx_files_that_do_not_belong_together(tmp_path, labels, words):
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((8, 28, 28)))
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels)
    with pytest.raises(UserError) as raised:
        data.load("mnist", None, None, str(tmp_path), 0)
    assert words in str(raised.value)


# ---- ends ------------------------------------------------------------------------------------------------


SIGNALS = ((signal.SIGINT, 130), (signal.SIGTERM, 143))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "number", "code"),
    [(script, *SIGNALS[i % 2]) for i, script in enumerate((*SCRIPTS, SCRIPTS[-1], SCRIPTS[0]))],
)
def test_a_signal_during_imports(tmp_path, script, number, code):
    """A torch that takes long to import, which swallows exceptions, as libraries do.

    It sleeps in short pieces: a signal that comes just before a sleep is handled after it.
    """
    (tmp_path / "torch.py").write_text(
        "import pathlib, time\n"
        "pathlib.Path('begun').touch()\n"
        "try:\n    for _ in range(600):\n        time.sleep(0.1)\nexcept BaseException:\n    pass\n"
    )
    # history.py imports numpy before torch, which is quick.
    arguments = ["--model", "cnn"] if script == "run.py" else []
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code and len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("interrupted")


@pytest.mark.slow
def test_an_output_that_cannot_be_written(tmp_path):
    """A pipe that nobody reads any more, and a full disk, are noticed at the first line."""
    command = [sys.executable, str(BENCHMARKS / "history.py"), "--steps", "1000000", "--layers", "2"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed, open("/dev/full", "wb") as full:
        for output, reason in ((closed, "Broken pipe"), (full, "No space left on device")):
            done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60)
            assert done.returncode == 2
            assert done.stderr == f"error: the output or a file cannot be read or written ({reason})\n"


def test_pictures_and_tables_are_whole_or_the_earlier_ones(tmp_path, monkeypatch):
    """A kill in the midst of writing leaves what was there."""

    def half(figure, file, **options):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(plt.Figure, "savefig", half)
    (tmp_path / "a.png").write_text("earlier")
    row = dict.fromkeys(kernels.COLUMNS, 1) | {"set": "1e3", "date": "2026-11-25", "threads": 1}
    rows = [row | {"contender": name} for name in (CEILING, BASE)]
    for draw in (
        lambda: race.plot.draw([{"contender": "gd", "epoch_ratio": 1.0}], tmp_path / "a"),
        lambda: micro.plot.draw(rows, tmp_path / "a"),
    ):
        with pytest.raises(KeyboardInterrupt):
            draw()
    (tmp_path / "kernels.csv").write_text("earlier")
    with pytest.raises(ValueError, match="other"):
        kernels.append(tmp_path / "kernels.csv", [row, {"other": 1}])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a.png": "earlier",
        "kernels.csv": "earlier",
    }


def test_what_is_no_users_error_stays_a_traceback(capsys):
    def out_of_memory() -> int:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    def mistake() -> int:
        raise RuntimeError("a mistake of ours")

    assert cli.exit_code(out_of_memory) == 2 and "not enough memory" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a mistake"):
        cli.exit_code(mistake)


# ---- a run's settings, checkpoints and first lines -------------------------------------------------------


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves out most figures: they take longer than the runs."""
    monkeypatch.setattr(figure, "panels", lambda *_: ())
    monkeypatch.setattr(figure, "draw_beyond", lambda *_: plt.figure())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    assert run.main([*SMALL, "--epochs", "3", "--out", str(out)]) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [("experiment", "fig99"), ("model", "alexnet"), ("epochs", "x"), ("epochs", -1), ("threads", 10**6),
     ("lr", "nan"), ("matrices", ["a"]), ("device", ""), ("optimizer", []), ("compile", "yes")],
)  # fmt: skip
def test_settings_that_cannot_be(tmp_path, capsys, finished, key, value):
    out = shutil.copytree(finished, tmp_path / "run")
    content = json.loads((out / "config.json").read_text())
    content["settings"][key] = value
    (out / "config.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert called(run.main, "--resume", "--out", out) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "config.json is damaged" in error and len(error.splitlines()) == 1


def other_model(state):
    return state | {"settings": state["settings"] | {"model": "vgg16"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: [], "it has no settings"),
        (lambda state: {}, "it has no settings"),
        (other_model, "it is of a run with model vgg16"),
        (lambda state: {k: v for k, v in state.items() if k != "optimizer"}, "'optimizer'"),
        (lambda state: state | {"progress": {"loss": torch.zeros(1)}}, "epochs"),
    ],
)
def test_checkpoints_that_are_readable_but_wrong(tmp_path, capsys, undrawn, finished, change, words):
    out = shutil.copytree(finished, tmp_path / "run")
    whole = torch.load(out / "checkpoint.pt", weights_only=True)
    torch.save(change(whole), out / "checkpoint.pt")
    torch.save(whole, out / "checkpoint-older.pt")
    capsys.readouterr()
    assert called(run.main, "--resume", "--out", out) == 0
    assert "checkpoint.pt does not fit" in capsys.readouterr().err
    torch.save(change(whole), out / "checkpoint.pt")
    torch.save(change(whole), out / "checkpoint-older.pt")
    assert called(run.main, "--resume", "--out", out) == 2
    error = capsys.readouterr().err
    assert words in error and "start anew with --overwrite" in error and len(error.splitlines()) == 1


@pytest.mark.slow
def test_bad_input_leaves_the_run_that_is_there(capsys, finished):
    before = (finished / "checkpoint.pt").read_bytes()
    assert called(run.main, *SMALL, "--n-train", 10**6, "--overwrite", "--out", finished) == 2
    assert (finished / "checkpoint.pt").read_bytes() == before


@pytest.mark.slow
def test_first_lines(tmp_path, capsys, undrawn):
    assert called(run.main, *SMALL, "--preset", "small", "--epochs", 3, "--lr", 0.02, "--out", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    changed = "lr, epochs, n_train, width, micro_batch"
    assert lines[0] == f"fig2: cnn, preset small (as asked), changed: {changed}"
    first = next(line for line in lines if line.startswith("epoch 1/3"))
    assert "nan" not in first and "?" not in first


def test_micro_batches_are_even():
    """256 pictures, at most 250 at a time: twice 128, not 250 and 6."""

    def sizes(count: int, most: int) -> list[int]:
        trainer = Trainer(replace(CONFIG, n_train=count, micro_batch=most))
        return [len(y) for _, y in trainer.batches]

    assert sizes(256, 250) == [128, 128] and sizes(50, 16) == [13, 13, 12, 12] and sizes(64, 32) == [32, 32]


def test_a_record_longer_than_the_usual_limit_is_whole():
    trainer = Trainer(CONFIG)
    state = trainer.history.state_dict()
    assert state["limit"] == -1  # none: epochs.csv has a line an epoch, and so has the record
