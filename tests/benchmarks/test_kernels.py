"""benchmarks/kernels.py as users run it."""

from __future__ import annotations

import csv
import statistics

import pytest
import torch

import kernels
from micro import contenders, timing
from micro.sets import MODELS, SWEEP, flat_set, model_set
from study import memory


def rows_in(folder):
    with open(folder / "kernels.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_small_run(tmp_path, capsys):
    arguments = ["--sizes", "1e3", "3000x30", "--seconds", "0.2", "--device", "cpu", "--no-compile"]
    assert kernels.main([*arguments, "--threads", "1", "2", "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path)
    assert list(rows[0]) == kernels.COLUMNS
    names = [c.name for c in contenders.contenders(kernels.backends(torch.device("cpu")), compiled=False)]
    assert [r["contender"] for r in rows] == names * 4
    assert {(r["set"], r["threads"]) for r in rows} == {(s, t) for s in ("1e3", "3000x30") for t in "12"}
    for r in rows:
        low, middle, high = (float(r[key]) for key in ("min_ms", "median_ms", "max_ms"))
        assert 0 < low <= middle <= high and int(r["rounds"]) >= 5 and float(r["host_ms"]) > 0
        elements = int(r["elements"])
        moved = float(r["bytes_per_parameter"]) * elements
        assert float(r["gb_per_s"]) == pytest.approx(moved / middle / 1e6, rel=1e-3)
    of = {r["contender"]: r for r in rows}
    assert float(of["sgd fused"]["ratio"]) == 1 and of["sgd fused momentum"]["base"] == "sgd fused"
    assert of["oscgd momentum"]["base"] == "sgd fused momentum"
    assert of["oscgd adapt"]["base"] == "oscgd momentum"
    extra = {name: float(r["extra_bytes_per_parameter"]) for name, r in of.items()}
    assert extra["oscgd numba"] == 4 and extra["sgd fused"] == 0 and extra["oscgd momentum"] == 8
    for name in ("kernels.png", "kernels.svg"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert "oscgd numba" in capsys.readouterr().out
    assert kernels.main(["--markdown", str(tmp_path / "kernels.csv")]) == 0
    table = capsys.readouterr().out
    assert "**3000x30**: 3,000 parameters in 30 tensors" in table
    assert "| sgd fused | 12 | " in table and "| ms, 1 threads | ratio | ms, 2 threads | ratio |" in table
    # A second run adds to the file.
    assert kernels.main([*arguments, "--out", str(tmp_path)]) == 0
    assert len(rows_in(tmp_path)) == 6 * len(names)


def test_the_sets_are_the_models():
    assert model_set("resnet34").elements == 21_289_802 and len(model_set("resnet34").shapes) == 110
    assert model_set("gpt2").elements == 124_439_808 and model_set("llama-1b").elements == 1_235_814_400
    for text in (*SWEEP, "1e9"):
        what = flat_set(text)
        assert what.elements == float(text.split("x")[0])
        assert len(what.shapes) == int((text.split("x") + ["1"])[1])
    assert flat_set("10x3").shapes == ((4,), (3,), (3,))


def test_contenders_do_what_they_say():
    """All that update leave the same parameters after some steps; those with the same arithmetic exactly."""
    problem = timing.Problem.of([(300, 20), (50,)], torch.float32, torch.device("cpu"))
    start = [p.detach().clone() for p in problem.params]
    ends = {}
    for contender in contenders.contenders(["numba", "torch"], compiled=False):
        for p, s in zip(problem.params, start, strict=True):
            p.data.copy_(s)
        runner = timing._Runner(contender, problem)
        for _ in range(10 // contender.repeat):
            runner()
        ends[contender.name] = [p.detach().clone() for p in problem.params]
    idle = ("copy", "read two arrays")
    assert all(torch.equal(ends[name][0], start[0]) for name in idle)
    for name, params in ends.items():
        others = (*idle, "adamw", "momentum", "alignment", "adapt")
        if not any(word in name for word in others):
            for p, q in zip(params, ends["sgd foreach"], strict=True):
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8, msg=name)
    assert not torch.equal(ends["oscgd adapt"][0], ends["sgd foreach"][0])
    for name in ("oscgd momentum", "oscgd alignment"):
        for p, q in zip(ends[name], ends["sgd fused momentum"], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_ratios_are_paired_by_round():
    """A drift that hits all contenders alike does not show."""
    base = timing.Timing(None, step_ms=[1.0, 10.0, 100.0])
    other = timing.Timing(None, step_ms=[2.0, 20.0, 200.0])
    assert timing.paired_ratio(other, base) == 2
    assert statistics.median(other.step_ms) / statistics.median(base.step_ms) == 2


def test_some_contenders_and_what_they_are_compared_to(tmp_path):
    arguments = ["--sizes", "1e3", "--seconds", "0.1", "--device", "cpu", "--contenders", "oscgd adapt"]
    assert kernels.main([*arguments, "--out", str(tmp_path)]) == 0
    names = [r["contender"] for r in rows_in(tmp_path)]
    assert names == ["copy", "sgd fused", "sgd fused momentum", "oscgd momentum", "oscgd adapt"]


@pytest.mark.slow
def test_not_enough_memory_skips_the_set(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "free", lambda device: 10**6)
    arguments = ["--sizes", "1e3", "1e7", "--seconds", "0.1", "--cold", "--device", "cpu"]
    arguments += ["--contenders", "sgd fused"]
    assert kernels.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "skipped: it needs 0.2 GiB of memory, 0.0 GiB are free" in capsys.readouterr().out
    assert {r["set"] for r in rows_in(tmp_path)} == {"1e3"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sets", "resnet50"], "unknown parameter set 'resnet50'; there are " + ", ".join(MODELS)),
        (["--sizes", "big"], "unknown size 'big'; use ELEMENTS or ELEMENTSxTENSORS"),
        (["--sizes", "10x20"], "unknown size '10x20'"),
        (["--sizes", "0"], "unknown size '0'"),
        (["--sizes", "1.5"], "unknown size '1.5'"),
        (["--markdown", "nowhere.csv"], "--markdown nowhere.csv: it is no kernels.csv"),
        (["--markdown", __file__], "it is no kernels.csv"),
        (["--device", "nonsense"], "--device nonsense cannot be used here"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["--out", "/dev/null/x"], "--out /dev/null/x"),
        (["--contenders", "adam"], "--contenders: there is no 'adam'; there are copy, read two arrays, sgd"),
    ],
)
def test_bad_input(arguments, words, capsys):
    assert kernels.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--dtype", "int8"], ["--threads", "0"], ["--seconds", "-1"]])
def test_bad_values(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        kernels.main(arguments)
    assert stopped.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
