"""The parts of the study: the table, the rules, the gradient, the folder."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from oscopt import History
from study import experiments, models, rules, summary
from study.config import Config
from study.errors import UserError
from study.folder import Folder
from study.train import Trainer

CONFIG = Config(
    experiment="fig2",
    preset="small",
    model="cnn",
    dataset="mnist5k",
    optimizer="oscgd",
    lr=0.1,
    epochs=3,
    n_train=50,
    width=4,
    image_size=16,
    micro_batch=16,
    matrices=(),
    seed=0,
    layers="module",
    device="cpu",
    threads=1,
)


@pytest.mark.parametrize("model", ["linear", "cnn"])
def test_gradient_is_that_of_the_whole_set(model):
    """Accumulated over micro-batches of 16, 16, 16 and 2, against one pass in float64."""
    trainer = Trainer(replace(CONFIG, model=model))
    loss, correct = trainer.backward()
    x = torch.cat([x for x, _ in trainer.batches]).double()
    y = torch.cat([y for _, y in trainer.batches])
    gradients = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.double().zero_grad()
    scores = trainer.model(x)
    exact = F.cross_entropy(scores, y)
    exact.backward()
    assert len(trainer.batches) == 4 and abs(loss.item() - exact.item()) < 1e-6
    assert correct.item() == (scores.argmax(1) == y).sum().item()
    for g, p in zip(gradients, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(g.double(), p.grad, rtol=1e-4, atol=1e-7)


def test_seed_decides_everything():
    first, same, other = (Trainer(replace(CONFIG, seed=seed)) for seed in (0, 0, 1))
    for trainer in (first, same, other):
        trainer.epoch()
    assert first.progress.loss == same.progress.loss != other.progress.loss


@pytest.mark.parametrize("name, count", [("resnet18", 41), ("resnet34", 73), ("vgg16", 14), ("cnn", 4)])
def test_layers_of_the_models(name, count):
    """Modules that own parameters; a ResNet-18 has about 40 (paper, Sec. III)."""
    net = models.build(name, channels=3, image_size=32, width=8, seed=0)
    assert len({key.rpartition(".")[0] for key, _ in net.named_parameters()}) == count
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_full_width_models_are_the_papers():
    """Parameters of the usual CIFAR forms."""
    counts = {
        name: sum(p.numel() for p in models.build(name, 3, 32, 64, 0).parameters())
        for name in ("resnet18", "resnet34", "vgg16")
    }
    assert counts == {"resnet18": 11_173_962, "resnet34": 21_282_122, "vgg16": 14_719_818}


def test_table():
    assert set(experiments.DEFAULT_ROW.values()) <= set(experiments.TABLE)
    for row in experiments.TABLE.values():
        assert set(row.claims) <= set(rules.RULES) and row.claims
        for preset in ("paper", "small"):
            settings = row.settings(preset)
            assert all(epoch + 5 <= settings.epochs for epoch in settings.matrices), row.id


def record(correlations, loss=None, layers=None) -> rules.Record:
    """A run with these global correlations; `layers` gives (T, L) ones instead."""
    values = np.asarray(layers if layers is not None else np.array(correlations)[:, None], float)
    history = History()
    history.add_layers([f"layer{i}" for i in range(values.shape[1])])
    for t, row in enumerate(values):
        target = history.next_row(torch.device("cpu"))
        target[:] = 1.0
        target[0] = torch.tensor(row if t else np.nan)
        history.commit(t, np.ones(values.shape[1]), np.ones(values.shape[1]))
    return rules.Record(
        history, np.asarray(loss if loss is not None else np.linspace(2, 1, len(values)), float)
    )


DOWN_EARLY, DOWN_LATE = [2.0] * 10 + [0.5] * 50, [2.0] * 40 + [0.5] * 20
SWITCH = [-0.8] * 30 + [0.99] * 30
OTHER = [0.99] * 30 + [-0.8] * 30
TWO = np.ones((60, 2))
CASES = {
    "correlated_throughout": (record([0.95] * 60), record([0.95] * 30 + [0.1] * 30)),
    "smooth_first": (record(OTHER), record(SWITCH)),
    "oscillates_first": (record(SWITCH), record([-0.8] * 4 + [0.9] * 56)),
    "oscillates_later": (record(OTHER), record(SWITCH)),
    "stable_later": (record(SWITCH), record(OTHER)),
    "decrease_while_negative": (record(SWITCH, DOWN_EARLY), record(SWITCH, DOWN_LATE)),
    "layers_agree": (record(None, layers=-0.9 * TWO), record(None, layers=TWO * [-0.9, 0.5])),
    "first_layer_negative": (record(None, layers=TWO * [-0.9, 0.9]), record(None, layers=TWO * [0.9, -0.9])),
    "last_layer_positive": (record(None, layers=TWO * [-0.9, 0.95]), record(None, layers=TWO * [0.95, 0.2])),
    "first_layer_dominates": (record(None, layers=TWO * [-0.9, 0.1]), record(None, layers=TWO * [0.1, 0.9])),
    "suppressed": (record([0.4] * 60), record([0.4] * 40 + [-0.4] * 20)),
}


@pytest.mark.parametrize("claim", rules.RULES)
def test_rules_can_hold_and_fail(claim):
    holds, fails = CASES[claim]
    (yes,), (no,) = rules.judge((claim,), holds), rules.judge((claim,), fails)
    assert yes.held and not no.held, (yes, no)


def test_too_short_a_run_holds_nothing():
    assert not any(v.held for v in rules.judge(tuple(rules.RULES), record([0.5])))


def test_single_spikes_do_not_make_a_phase():
    signs = rules.phase_signs(np.array([np.nan, 0.05, 0.9, -0.05, 0.9, -0.5, -0.5, 0.05, -0.5]))
    assert signs.tolist() == [0, 0, 1, 1, 1, -1, -1, -1, -1]


def test_decrease_share():
    loss = np.array([4.0, 3.0, 3.5, 1.0, 0.0])
    assert rules.decrease_share(loss, np.array([1, -1, -1, 1, 1])) == (-0.5 + 2.5) / 4
    assert np.isnan(rules.decrease_share(loss[::-1], np.ones(5)))


def test_sparkline():
    assert summary.sparkline(np.array([-1.0, 0.0, 1.0, np.nan])) == "▁▅█ "
    assert summary.sparkline(np.array([])) == "" and len(summary.sparkline(np.zeros(500))) == 60


def test_files_are_whole_or_not_there(tmp_path):
    folder = Folder(tmp_path / "run")
    with folder.writing("a.txt") as file:
        file.write("old")
    with pytest.raises(RuntimeError), folder.writing("a.txt") as file:
        file.write("half")
        raise RuntimeError
    assert (folder / "a.txt").read_text() == "old"
    with pytest.raises(UserError, match=r"a.txt could not be written.*earlier files are whole"):
        with folder.writing("a.txt") as file:
            raise OSError(28, "No space left on device")
    assert sorted(p.name for p in folder.path.iterdir()) == [".lock", "a.txt"]
    folder.close()


def test_checkpoint_executes_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("boom",))

    folder = Folder(tmp_path / "run")
    torch.save({"model": Bomb()}, folder / "checkpoint.pt")
    with pytest.raises(UserError, match="damaged"):
        folder.load_checkpoint()
    folder.close()
