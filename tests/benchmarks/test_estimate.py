"""What a run would take, against runs that were made."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import reproduce
import run
import torch
from study_config import CONFIG

from study import data, estimate, memory
from study.experiments import TABLE
from study.train import Trainer

data._mnist5k = functools.cache(data._mnist5k)  # takes a second to read


@pytest.mark.slow
def test_disk_and_time(tmp_path, monkeypatch):
    """The folder of the run is as large as told, but for its pages; passes take time by the picture."""
    out = tmp_path / "run"
    small = {"n_train": 64, "micro_batch": 16, "width": 8}
    options = "--model cnn --preset small --n-train 64 --micro-batch 16 --width 8 --epochs 60".split()
    assert run.main([*options, "--threads", "1", "--out", str(out)]) == 0
    config = replace(TABLE["fig2"].config("small", threads=1), **small).with_epochs(60)
    found = estimate.estimate(config, None)
    assert not found.problem and not found.note and math.isfinite(found.seconds) and found.seconds > 0
    pages = {".svg", ".png", ".html"}
    written = sum(p.stat().st_size for p in out.iterdir() if p.suffix not in pages)
    assert 0.8 * written < found.disk - estimate._PAGES < 1.6 * written

    timed = estimate._timed
    monkeypatch.setattr(estimate, "_timed", lambda _, n, *a: (timed(_, n, *a)[0], 0.01 * n, 0.01 * n + 0.25))
    assert estimate.estimate(config, None).seconds == pytest.approx(0.64 + 0.25)


@pytest.mark.parametrize("model", ["linear", "cnn"])
def test_memory_is_what_a_pass_keeps(model):
    """Counted on tensors that have no memory, against those of a pass that was made."""
    config = replace(CONFIG, model=model, n_train=48, micro_batch=24, width=8)
    trainer = Trainer(config)
    kept = {}
    pictures, labels = (part.clone() for part in trainer.batches[0])  # not views of the whole set

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = torch.nn.functional.cross_entropy(trainer.model(pictures), labels)
    weights = 4 * sum(p.numel() for p in trainer.model.parameters())
    assert loss.requires_grad
    expected = 48 * pictures[0].nbytes + 3 * weights + sum(kept.values())
    channels, side = pictures.shape[1], pictures.shape[-1]
    assert estimate._peak(config, 48, 24, channels, side) == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_a_run_that_does_not_fit_and_one_without_its_data(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "free", lambda device: 2**28)
    config = replace(TABLE["fig2"].config("paper"), width=8)
    found = estimate.estimate(config, str(tmp_path))
    assert found.problem.startswith("needs ") and found.problem.endswith("and 0.2 GiB are free for it")
    assert found.note == "cifar10 is not in the data folder; it would be downloaded"
    assert math.isfinite(found.seconds)


def test_the_command_tells_all_runs_in_order_and_writes_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    given = iter([estimate.Estimate(2.0, 2**20, 2**30), estimate.Estimate(1.0, 2**20, 2**40, "needs 1 GiB")])
    monkeypatch.setattr(estimate, "estimate", lambda *_, **__: next(given))
    options = ["--preset", "small", "--estimate", "--only", "fig6,fig1", "--seeds", "0,1", "--epochs", "1800"]
    assert reproduce.main(options) == 0
    told = capsys.readouterr().out
    names = ["fig1 seed 0", "fig2 seed 0", "fig1 seed 1", "fig2 seed 1"]
    assert [told.index(name) for name in names] == sorted(told.index(name) for name in names)
    assert "2 hours in all" in told and "2 of 4 runs cannot be made here" in told
    assert "cannot run here: needs 1 GiB" in told and not list(tmp_path.iterdir())
