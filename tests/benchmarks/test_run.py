"""benchmarks/run.py as users run it."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import run
import torch

from oscopt import History
from study.experiments import TABLE

RUN = Path(__file__).parents[2] / "benchmarks" / "run.py"
FAST = ("--n-train", "64", "--micro-batch", "24", "--width", "4", "--threads", "1")


@dataclass
class Done:
    """What a finished command left."""

    returncode: int
    stdout: str
    stderr: str


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(RUN), *map(str, arguments)]


@pytest.fixture
def call(capsys):
    """run.py in this process: it takes seconds to start anew."""
    threads = torch.get_num_threads()

    def run_here(*arguments: object) -> Done:
        capsys.readouterr()
        try:
            code = run.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return Done(code, *capsys.readouterr())

    yield run_here
    torch.set_num_threads(threads)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


def assert_same_run(a: Path, b: Path) -> None:
    """The same bits: weights and everything recorded but the seconds."""
    x, y = weights(a), weights(b)
    assert all(torch.equal(x[key], y[key]) for key in x)
    first, second = History.load(a / "history.npz"), History.load(b / "history.npz")
    for name in ("steps", "dot", "sq_norm", "diff_sq_norm", "prev_sq_norm", "lr"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    rows = [[row[:5] for row in csv.reader((out / "epochs.csv").open())] for out in (a, b)]
    assert rows[0] == rows[1]
    matrices = [torch.load(out / "checkpoint.pt", weights_only=True)["matrices"] for out in (a, b)]
    assert matrices[0].keys() == matrices[1].keys()
    for epoch in matrices[0]:
        assert all(torch.equal(matrices[0][epoch][k], matrices[1][epoch][k]) for k in matrices[0][epoch])


@pytest.mark.parametrize("model", ["linear", "cnn", "vgg16", "resnet18", "resnet34"])
def test_every_model_end_to_end(tmp_path, model, call):
    out = tmp_path / "run"
    done = call("--model", model, "--preset", "small", "--epochs", 3, "--out", out, *FAST)
    assert done.returncode == 0, done.stderr
    assert "preset small (as asked)" in done.stdout and re.search(r"loss +\d", done.stdout)
    names = {"config.json", "history.npz", "epochs.csv", "checkpoint.pt", "figure.svg", "figure.png"}
    assert names | {"report.html", "verdict.json"} <= {p.name for p in out.iterdir()}
    assert not [p for p in out.iterdir() if p.name.startswith(".") and p.name != ".lock"]
    settings = json.loads((out / "config.json").read_text())["settings"]
    assert settings["model"] == model and settings["epochs"] == 3 and settings["n_train"] == 64
    history = History.load(out / "history.npz")
    assert history.steps.tolist() == [0, 1, 2] and not np.isnan(history.dot[1:]).any()
    rows = list(csv.DictReader((out / "epochs.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert all(np.isfinite(float(row["loss"])) and 0 <= float(row["accuracy"]) <= 1 for row in rows)
    assert float(rows[2]["global_correlation"]) == pytest.approx(history.global_correlation()[2])
    verdicts = json.loads((out / "verdict.json").read_text())
    assert [v["claim"] for v in verdicts] == list(TABLE[settings["experiment"]].claims)
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    page = (out / "report.html").read_text()
    assert "<svg" in page and not re.search(r"""(src|href)=["']https?:""", page)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_other_optimizers_are_measured(tmp_path, optimizer, call):
    out = tmp_path / "run"
    options = ("--model", "cnn", "--epochs", 4, "--optimizer", optimizer, "--out", out)
    done = call(*options, *FAST)
    assert done.returncode == 0, done.stderr
    history = History.load(out / "history.npz")
    assert not np.isnan(history.correlation()[1:]).any()
    if optimizer == "sgd":  # the same trajectory as OscGD's
        other = tmp_path / "oscgd"
        assert call("--model", "cnn", "--epochs", 4, "--out", other, *FAST).returncode == 0
        assert all(
            torch.equal(a, b) for a, b in zip(weights(out).values(), weights(other).values(), strict=True)
        )


def test_experiment_and_layers(tmp_path, call):
    out = tmp_path / "run"
    options = ("--experiment", "fig11", "--epochs", 2, "--layers", "parameter", "--out", out)
    done = call(*options, *FAST)
    assert done.returncode == 0 and "fig11: resnet18" in done.stdout
    assert "fc.bias" in History.load(out / "history.npz").layer_names


SLOW = ("--model", "cnn", "--preset", "small", "--epochs", "400", "--checkpoint-seconds", "0.01", *FAST)


def test_killed_runs_resume_to_the_same_bits(tmp_path, call):
    """kill -9 at 30 random moments, each time --resume: nothing differs from a run in one piece."""
    assert call(*SLOW, "--out", tmp_path / "whole").returncode == 0
    driver = [
        sys.executable,
        str(Path(__file__).parent / "kill_driver.py"),
        "30",
        str(tmp_path / "killed"),
        *SLOW,
    ]
    done = subprocess.run(driver, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kills"] == 30, done.stdout
    assert call("--resume", "--out", tmp_path / "killed").returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_finish_the_epoch_and_say_how_to_resume(tmp_path, number, code):
    out = tmp_path / "run"
    options = ("--model", "cnn", "--epochs", 100000, "--checkpoint-seconds", 0.05, "--out", out, *FAST)
    process = subprocess.Popen(command(*options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert f"--resume --out {out}" in stderr and "Traceback" not in stderr
    epochs = len(History.load(out / "history.npz"))
    assert len((out / "epochs.csv").read_text().splitlines()) == epochs + 1 > 1


def test_diverging_run_keeps_its_record(tmp_path, call):
    out = tmp_path / "run"
    done = call("--model", "cnn", "--epochs", 50, "--lr", 1e6, "--out", out, *FAST)
    assert done.returncode == 3, done.stderr
    assert "the loss is" in done.stderr and "smaller --lr" in done.stderr and "Traceback" not in done.stderr
    history = History.load(out / "history.npz")
    assert 1 <= len(history) < 50 and (out / "report.html").exists()


def assert_refused(done: Done, *texts: str) -> None:
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr
    for text in texts:
        assert text in done.stderr


@pytest.mark.parametrize(
    "arguments, texts",
    [
        (["--model", "alexnet"], ["alexnet", "resnet34"]),
        (["--model", "cnn", "--dataset", "imagenet"], ["imagenet", "fashion-mnist"]),
        (["--model", "cnn", "--preset", "huge"], ["huge", "small"]),
        (["--experiment", "fig99"], ["unknown experiment 'fig99'", "fig1"]),
        (["--experiment", "fig2", "--model", "vgg16"], ["fig2 is about cnn"]),
        ([], ["--model resnet34"]),
        (["--model", "cnn", "--lr", "-1"], ["--lr", "'-1' is not a number greater than 0"]),
        (["--model", "cnn", "--lr", "nan"], ["'nan'"]),
        (["--model", "cnn", "--epochs", "0"], ["'0' is not a whole number"]),
        (["--model", "cnn", "--epochs", "1.5"], ["'1.5' is not a whole number"]),
        (["--model", "cnn", "--n-train", "999999"], ["mnist5k has 5000 pictures"]),
        (["--model", "vgg16", "--image-size", "16"], ["vgg16 takes pictures of at least 32 pixels"]),
        (["--model", "cnn", "--device", "abacus"], ["--device abacus", "--device cpu"]),
        (["--model", "cnn", "--device", "cuda:77"], ["--device cuda:77"]),
        (["--model", "cnn", "--seed", "x"], ["--seed"]),
        (
            ["--model", "cnn", "--dataset", "cifar10", "--data-root", "/nowhere"],
            ["/nowhere: there is no such"],
        ),
        (["--model", "cnn", "--resume", "--overwrite"], ["exclude each other"]),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) and v and v[0].startswith("--") else "",
)
def test_bad_input(tmp_path, arguments, texts, call):
    assert_refused(call(*arguments, "--out", tmp_path / "run"), *texts)


def test_no_network(tmp_path, monkeypatch, call):
    """Data that is neither there nor to be had."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    options = ("--model", "cnn", "--dataset", "svhn", "--data-root", tmp_path)
    assert_refused(call(*options, "--out", tmp_path / "run"), "svhn is not in", "--dataset mnist5k")


def write_idx(folder: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    for name, shape in (("train-images-idx3-ubyte", (count, 28, 28)), ("train-labels-idx1-ubyte", (count,))):
        header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
        values = generator.integers(0, 10 if len(shape) == 1 else 256, shape).astype(np.uint8)
        (folder / name).write_bytes(header + values.tobytes())


def test_idx_files_and_truncated_ones(tmp_path, call):
    write_idx(tmp_path, 100)
    options = ("--model", "linear", "--dataset", "fashion-mnist", "--data-root", tmp_path, "--epochs", 2)
    done = call(*options, "--out", tmp_path / "run", *FAST)
    assert done.returncode == 0, done.stderr
    images = tmp_path / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:5000])
    assert_refused(call(*options, "--out", tmp_path / "other", *FAST), "train-images-idx3-ubyte", "truncated")


def test_folders_that_hold_a_run(tmp_path, call):
    out = tmp_path / "run"
    options = ("--model", "linear", "--epochs", 3, "--out", out, *FAST)
    assert call(*options).returncode == 0
    before = (out / "checkpoint.pt").read_bytes()
    assert_refused(call(*options), "holds a run already", "--resume", "--overwrite")
    done = call("--resume", "--out", out, "--lr", 0.5, "--seed", 3)
    assert_refused(done, "other settings", "lr (0.01, now 0.5)", "seed (0, now 3)")
    assert (out / "checkpoint.pt").read_bytes() == before
    assert_refused(call("--resume", "--out", tmp_path / "empty"), "holds no run to resume")
    assert call(*options, "--overwrite").returncode == 0
    assert call("--resume", "--out", out).returncode == 0


def undisturbed(call, folder: Path) -> Path:
    assert call(*SLOW, "--out", folder).returncode == 0
    return folder


def test_damaged_checkpoints(tmp_path, call):
    whole = undisturbed(call, tmp_path / "whole")
    older = whole / "checkpoint-older.pt"
    assert older.exists()
    newest = whole / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    done = call("--resume", "--out", whole)
    assert done.returncode == 0 and "going on from checkpoint-older.pt" in done.stderr
    reference = undisturbed(call, tmp_path / "reference")
    assert_same_run(whole, reference)
    for path in (newest, older):
        path.write_bytes(b"rubbish")
    assert_refused(call("--resume", "--out", whole), "are damaged", "--overwrite")
    (whole / "config.json").write_text("{")
    assert_refused(call("--resume", "--out", whole), "config.json is damaged")


def test_two_processes_on_one_folder(tmp_path, call):
    from study.folder import Folder

    folder = Folder(tmp_path / "run")
    assert_refused(call("--model", "linear", "--out", tmp_path / "run"), "another process is running there")
    folder.close()
