"""benchmarks/run.py as users run it."""

from __future__ import annotations

import csv
import functools
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import run
import torch
from study_config import CONFIG
from torch.nn import functional as F

from oscopt import History
from study import data, figure, results, train
from study.errors import Interrupted, UserError
from study.experiments import TABLE
from study.folder import Folder
from study.train import Trainer

pytestmark = pytest.mark.slow

RUN = Path(__file__).parents[2] / "benchmarks" / "run.py"
FAST = ("--n-train", "64", "--micro-batch", "24", "--width", "8", "--threads", "1")


@dataclass
class Done:
    """What a finished command left."""

    returncode: int
    stdout: str
    stderr: str


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(RUN), *map(str, arguments)]


data._mnist5k = functools.cache(data._mnist5k)  # takes a second to read


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves out most figures: they take longer than the runs."""
    monkeypatch.setattr(figure, "panels", lambda *_: ())
    monkeypatch.setattr(figure, "whole_run_panels", lambda *_: ())
    monkeypatch.setattr(figure, "draw_beyond", lambda *_: plt.figure())
    monkeypatch.setattr(figure, "draw_recurrence", lambda *_: plt.figure())


@pytest.fixture
def call(capsys, undrawn):
    """run.py in this process: it takes seconds to start anew."""
    return caller(capsys)


@pytest.fixture
def call_and_draw(capsys):
    """The same with all figures."""
    return caller(capsys)


def caller(capsys):

    def run_here(*arguments: object) -> Done:
        capsys.readouterr()
        try:
            code = run.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return Done(code, *capsys.readouterr())

    return run_here


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


def assert_same_run(a: Path, b: Path) -> None:
    """The same bits: weights and everything recorded but the seconds."""
    x, y = weights(a), weights(b)
    assert all(torch.equal(x[key], y[key]) for key in x)
    first, second = History.load(a / "history.npz"), History.load(b / "history.npz")
    for name in ("steps", "dot", "sq_norm", "diff_sq_norm", "prev_sq_norm", "lr"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    np.testing.assert_array_equal(*(History.load(out / "recurrence.npz").pairwise()[0] for out in (a, b)))
    rows = [[row[:5] for row in csv.reader((out / "epochs.csv").open())] for out in (a, b)]
    assert rows[0] == rows[1]
    matrices = [torch.load(out / "checkpoint.pt", weights_only=True)["matrices"] for out in (a, b)]
    assert matrices[0].keys() == matrices[1].keys()
    for epoch in matrices[0]:
        assert all(torch.equal(matrices[0][epoch][k], matrices[1][epoch][k]) for k in matrices[0][epoch])


@pytest.mark.parametrize("model", ["linear", "cnn", "cnn_bn", "vgg16", "resnet18", "resnet34"])
def test_every_model_end_to_end(tmp_path, model, call_and_draw):
    out = tmp_path / "run"
    done = call_and_draw("--model", model, "--preset", "small", "--epochs", 3, "--out", out, *FAST)
    assert done.returncode == 0, done.stderr
    assert "preset small (as asked)" in done.stdout and re.search(r"loss +\d", done.stdout)
    names = {"config.json", "history.npz", "epochs.csv", "checkpoint.pt", "figure.svg", "figure.png"}
    names |= {"layers.svg", "layers.png", "matrices.npz", "report.html", "verdict.json"}
    names |= {"recurrence.npz", "recurrence.svg", "recurrence.png"}
    assert names <= {p.name for p in out.iterdir()}
    assert not [p for p in out.iterdir() if p.name.startswith(".") and p.name != ".lock"]
    settings = json.loads((out / "config.json").read_text())["settings"]
    assert settings["model"] == model and settings["epochs"] == 3 and settings["n_train"] == 64
    history = History.load(out / "history.npz")
    assert history.steps.tolist() == [0, 1, 2] and not np.isnan(history.dot[1:]).any()
    rows = list(csv.DictReader((out / "epochs.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert all(np.isfinite(float(row["loss"])) and 0 <= float(row["accuracy"]) <= 1 for row in rows)
    assert float(rows[2]["global_correlation"]) == pytest.approx(history.global_correlation()[2])
    verdict = json.loads((out / "verdict.json").read_text())
    assert verdict["state"] == "finished" and verdict["epochs"] == 3
    assert [v["claim"] for v in verdict["claims"]] == list(TABLE[settings["experiment"]].claims)
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    page = (out / "report.html").read_text()
    assert "<svg" in page and not re.search(r"""(src|href)=["']https?:""", page)
    assert "The whole run: every epoch against every other" in page
    assert History.load(out / "recurrence.npz").pairwise()[0].shape == (3, 3)


def test_runs_of_before_lack_the_recurrence(tmp_path, call):
    """Their folders are read, drawn and gone on with; the whole run begins where they go on."""
    out = tmp_path / "run"
    assert call("--model", "linear", "--epochs", 3, "--out", out, *FAST).returncode == 0
    for file in out.glob("recurrence.*"):
        file.unlink()
    read = results.read(out)
    assert read.record.recurrence is None
    with closing(Folder(out)) as folder:
        checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
        del checkpoint["sketcher"], checkpoint["recurrence"]
        folder.save_checkpoint(checkpoint)
        results.write(folder, read.record, read.matrices, read.config, read.state, ())
    assert "The whole run" not in (out / "report.html").read_text() and not list(out.glob("recurrence.*"))
    assert call("--resume", "--out", out).returncode == 0
    assert not list(out.glob("recurrence.*")) and results.read(out).state == "finished"


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_other_optimizers_are_measured(tmp_path, optimizer, call):
    out = tmp_path / "run"
    options = ("--model", "cnn", "--epochs", 4, "--optimizer", optimizer, "--out", out)
    done = call(*options, *FAST)
    assert done.returncode == 0, done.stderr
    history = History.load(out / "history.npz")
    assert not np.isnan(history.correlation()[1:]).any()
    lr = {"sgd": TABLE["fig2"].small.lr}.get(optimizer, 0.001)  # a row's own is for gradient descent
    assert json.loads((out / "config.json").read_text())["settings"]["lr"] == lr
    if optimizer == "sgd":  # the same trajectory as OscGD's
        other = tmp_path / "oscgd"
        assert call("--model", "cnn", "--epochs", 4, "--out", other, *FAST).returncode == 0
        assert all(
            torch.equal(a, b) for a, b in zip(weights(out).values(), weights(other).values(), strict=True)
        )


def test_updates_are_measured(tmp_path, call):
    """The correlations of Adam's updates against those from the weights of every epoch, saved in between."""
    out = tmp_path / "run"
    saved = []

    def keep(trainer):
        saved.append([p.detach().clone() for p in trainer.model.parameters()])

    trainer = Trainer(replace(CONFIG, optimizer="adam", lr=0.01, epochs=6))
    keep(trainer)
    with closing(Folder(out)) as folder:
        train.run(trainer, folder, keep)
    moves = [
        torch.cat([(b - a).reshape(-1) for a, b in zip(x, y, strict=True)]).double()
        for x, y in pairwise(saved)
    ]
    expected = [F.cosine_similarity(a, b, dim=0).item() for a, b in pairwise(moves)]
    measured = trainer.record.updates.global_correlation()
    np.testing.assert_allclose(measured[1:], expected, atol=1e-5)
    assert trainer.record.updates.layer_names == trainer.history.layer_names
    assert Trainer(CONFIG).record.updates is None  # gradient descent's are its gradients


def test_adam_beside_gradient_descent(tmp_path, call):
    gd, adam = tmp_path / "gd", tmp_path / "adam"
    assert call("--model", "cnn", "--epochs", 12, "--out", gd, *FAST).returncode == 0
    options = ("--experiment", "adam-cnn", "--epochs", 12, "--beside", gd, "--out", adam)
    done = call(*options, *FAST)
    assert done.returncode == 0, done.stderr
    claims = json.loads((adam / "verdict.json").read_text())["claims"]
    assert [c["claim"] for c in claims] == ["suppressed", "suppressed_beside_gd"]
    assert {"beside.svg", "beside.png", "updates.npz"} <= {p.name for p in adam.iterdir()}
    assert "Adam: updates" in (adam / "beside.svg").read_text()


def test_other_claims(tmp_path, call):
    out = tmp_path / "run"
    options = ("--model", "linear", "--epochs", 12, "--claims", "smooth_first,suppressed", "--out", out)
    assert call(*options, *FAST).returncode == 0
    claims = json.loads((out / "verdict.json").read_text())["claims"]
    assert [(c["claim"], c["held"]) for c in claims] == [("smooth_first", True), ("suppressed", True)]


def test_sharpness_is_recorded(tmp_path, call_and_draw):
    out = tmp_path / "run"
    options = ("--model", "cnn", "--epochs", 5, "--sharpness-every", 2, "--out", out)
    assert call_and_draw(*options, *FAST).returncode == 0
    values = [float(row["sharpness"]) for row in csv.DictReader((out / "epochs.csv").open())]
    assert np.isfinite(values).tolist() == [True, False, True, False, True]
    assert "largest of all directions" in (out / "layers.svg").read_text()


def test_experiment_and_layers(tmp_path, call):
    out = tmp_path / "run"
    options = ("--experiment", "fig11", "--epochs", 2, "--layers", "parameter", "--out", out)
    done = call(*options, *FAST)
    assert done.returncode == 0 and "fig11: resnet18" in done.stdout
    assert "fc.bias" in History.load(out / "history.npz").layer_names


SLOW = ("--model", "cnn", "--preset", "small", "--epochs", "300", "--checkpoint-seconds", "0.01", *FAST)


def test_killed_runs_resume_to_the_same_bits(tmp_path, call, undisturbed):
    """kill -9 at 10 random moments, each time --resume: nothing differs from a run in one piece."""
    driver = [
        sys.executable,
        str(Path(__file__).parent / "kill_driver.py"),
        "10",
        str(tmp_path / "killed"),
        *SLOW,
    ]
    done = subprocess.run(driver, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] == 10 and told["inside_a_write"] >= 1, told
    assert call("--resume", "--out", tmp_path / "killed").returncode == 0
    assert_same_run(undisturbed, tmp_path / "killed")


def test_a_folder_moves_to_another_machine(tmp_path, call, undisturbed, monkeypatch):
    """Weights, record and settings are all in it; the machine is noted, here one that computes alike."""
    begun, moved = tmp_path / "begun", tmp_path / "elsewhere" / "moved"
    stop = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    show = run.Display.__call__
    with monkeypatch.context() as patch:
        patch.setattr(run.Display, "__call__", lambda *a: (len(a[1].progress) == 150 and stop(), show(*a)))
        assert call(*SLOW, "--out", begun).returncode == 143
    moved.parent.mkdir()
    shutil.copytree(begun, moved)
    shutil.rmtree(begun)
    here = run.machine()
    monkeypatch.setattr(run, "machine", lambda: here | {"processor": "another one"})
    done = call("--resume", "--out", moved)
    assert done.returncode == 0 and f"(processor {here['processor']}, now another one)" in done.stdout
    assert_same_run(undisturbed, moved)
    told = json.loads((moved / "config.json").read_text())["machine"]
    assert told["processor"] == here["processor"]  # where it began
    (resumed,) = told["resumed"]
    assert (resumed["epoch"], resumed["processor"]) == (150, "another one")
    assert "begun elsewhere" not in call("--resume", "--out", moved).stdout


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


@pytest.mark.parametrize("optimizer", ["oscgd", "adam"])
@pytest.mark.parametrize("stop", [2, 5, 8])
def test_stopped_between_epochs_resumes_to_the_same_bits(tmp_path, stop, optimizer):
    """Before, within and after the window of epochs 4 to 8."""
    config = replace(CONFIG, optimizer=optimizer, lr=0.01, epochs=12, matrices=(4,), sharpness_every=3)

    def kill(trainer):
        if len(trainer.progress) == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = Trainer(config)
    with closing(Folder(tmp_path / "whole")) as folder:
        train.run(whole, folder, lambda _: None)
    with closing(Folder(tmp_path / "cut")) as folder:
        with pytest.raises(Interrupted) as stopped:
            first = Trainer(config)
            train.run(first, folder, kill)
        assert stopped.value.exit_code == 143 and len(first.progress) == stop  # not an epoch more
        resumed = Trainer(config)
        folder.load_checkpoint(resumed.load_state_dict)
        assert len(resumed.progress) == min(stop, 4) if stop < 8 else stop
        train.run(resumed, folder, lambda _: None)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    a, b = whole.record, resumed.record
    for name in ("loss", "accuracy", "sharpness"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_array_equal(a.history.dot, b.history.dot)
    if optimizer == "adam":
        np.testing.assert_array_equal(a.updates.dot, b.updates.dot)
    np.testing.assert_array_equal(whole.matrices[4]["global"], resumed.matrices[4]["global"])


def test_checkpoints_every_so_many_epochs(tmp_path):
    kept = []
    with closing(Folder(tmp_path / "run")) as folder:
        trainer = Trainer(replace(CONFIG, epochs=7))
        save = folder.save_checkpoint
        folder.save_checkpoint = lambda state: (kept.append(len(state["progress"]["loss"])), save(state))
        train.run(trainer, folder, lambda _: None, checkpoint_epochs=3)
    assert kept == [3, 6, 7]


def test_full_disk(tmp_path, call, undisturbed):
    """A checkpoint that grows over the largest file allowed: one line, and what was there stays whole."""
    out = tmp_path / "run"
    size = (undisturbed / "checkpoint.pt").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 20_000, before[1]))
    try:
        done = call(*SLOW, "--checkpoint-epochs", 20, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_refused(done, "checkpoint.pt could not be written", "earlier files are whole")
    assert not [p.name for p in out.iterdir() if p.name.endswith(".part")]
    done_epochs = len(torch.load(out / "checkpoint.pt", weights_only=True)["progress"]["loss"])
    assert 20 <= done_epochs < 300
    done = call("--resume", "--out", out)
    assert done.returncode == 0 and f"at epoch {done_epochs}" in done.stdout
    assert_same_run(undisturbed, out)


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
        (["--model", "cnn", "--seed", "x"], ["--seed", "'x' is not a whole number"]),
        (["--model", "cnn", "--sharpness-every", "0"], ["--sharpness-every"]),
        (["--model", "cnn", "--optimizer", "lion"], ["lion", "adamw"]),
        (["--model", "cnn", "--bf16", "--tf32"], ["--tf32", "--bf16"]),
        (["--model", "cnn", "--claims", "smooth_first,rises"], ["unknown rule 'rises'", "smooth_first"]),
        (["--model", "cnn", "--beside", "/nowhere"], ["/nowhere holds no run"]),
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
    assert_refused(call("--resume", "--out", tmp_path / "empty"), "holds no run", "config.json")
    assert call(*options, "--overwrite").returncode == 0
    assert call("--resume", "--out", out).returncode == 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The folder of a run of many checkpoints in one piece."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run.main([*SLOW, "--out", str(out)]) == 0
    return out


def test_damaged_checkpoints(tmp_path, call, undisturbed):
    whole = shutil.copytree(undisturbed, tmp_path / "whole")
    older = whole / "checkpoint-older.pt"
    assert older.exists()
    newest = whole / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    done = call("--resume", "--out", whole)
    assert done.returncode == 0 and "going on from checkpoint-older.pt" in done.stderr
    assert_same_run(whole, undisturbed)
    for path in (newest, older):
        path.write_bytes(b"rubbish")
    assert_refused(
        call("--resume", "--out", whole),
        "checkpoint.pt is damaged and checkpoint-older.pt is damaged",
        "--overwrite",
    )
    (whole / "config.json").write_text("{")
    assert_refused(call("--resume", "--out", whole), "config.json is damaged")


def test_two_processes_on_one_folder(tmp_path, call):
    folder = Folder(tmp_path / "run")
    assert_refused(call("--model", "linear", "--out", tmp_path / "run"), "another process is running there")
    folder.close()


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def npz_bomb(path: Path, fuse: Path) -> None:
    np.savez(path.open("wb"), format=1, steps=np.array([Bomb(fuse)], dtype=object))


@pytest.mark.parametrize(
    "name, damage, text",
    [
        (
            "history.npz",
            lambda p, fuse: p.write_bytes(p.read_bytes()[:500]),
            "is no history, or a damaged one",
        ),
        ("history.npz", lambda p, fuse: p.write_bytes(b""), "cannot be read"),
        ("history.npz", lambda p, fuse: np.savez(p.open("wb"), format=99), "cannot be read"),
        ("history.npz", lambda p, fuse: np.save(p.open("wb"), np.ones(3)), "is no history"),
        ("history.npz", npz_bomb, "is no history, or a damaged one"),
        ("history.npz", lambda p, fuse: p.write_bytes(pickle.dumps(Bomb(fuse))), "cannot be read"),
        ("matrices.npz", npz_bomb, "cannot be read"),
        ("verdict.json", lambda p, fuse: p.write_text("[]"), "cannot be read"),
        ("epochs.csv", lambda p, fuse: p.write_text(p.read_text()[:100]), "cannot be read"),
        ("epochs.csv", lambda p, fuse: p.write_text("".join(p.read_text().splitlines(True)[:3])), "2 epochs"),
        ("config.json", lambda p, fuse: p.unlink(), "holds no run: it lacks config.json"),
        ("history.npz", lambda p, fuse: p.unlink(), "lacks history.npz"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_damaged_runs_are_refused_and_execute_nothing(tmp_path, call, finished, name, damage, text):
    out = shutil.copytree(finished, tmp_path / "run")
    fuse = tmp_path / "boom"
    damage(out / name, fuse)
    with pytest.raises(UserError, match=text):
        results.read(out)
    done = call("--model", "cnn", "--epochs", 3, "--beside", out, "--out", tmp_path / "other", *FAST)
    assert_refused(done, str(out))
    assert not fuse.exists() and not (tmp_path / "other").exists()


def test_a_checkpoint_bomb_executes_nothing(tmp_path, call, finished):
    out = shutil.copytree(finished, tmp_path / "run")
    for name in ("checkpoint.pt", "checkpoint-older.pt"):
        torch.save({"model": Bomb(tmp_path / "boom")}, out / name)
    assert_refused(
        call("--resume", "--out", out), "checkpoint.pt is damaged and checkpoint-older.pt is damaged"
    )
    assert not (tmp_path / "boom").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run, to be copied."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run.main(["--model", "cnn", "--epochs", "8", "--out", str(out), *FAST]) == 0
    return out


def test_what_is_read_back_is_what_was_recorded(finished):
    read = results.read(finished)
    assert read.state == "finished" and read.config.epochs == 8 and read.machine["torch"] == torch.__version__
    assert (
        read.matrices.keys() == torch.load(finished / "checkpoint.pt", weights_only=True)["matrices"].keys()
    )
    assert len(read.record.loss) == len(read.record.history) == 8
