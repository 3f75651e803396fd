"""The parts of the study: the table, the rules, the gradient, the folder."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from study_config import CONFIG
from torch.nn import functional as F

from study import data, models, summary
from study.errors import UserError
from study.folder import Folder
from study.train import Trainer


@pytest.mark.parametrize("model", ["linear", "cnn"])
def test_gradient_is_that_of_the_whole_set(model):
    """Accumulated over micro-batches of 13, 13, 12 and 12, against one pass in float64."""
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


@pytest.mark.parametrize("optimizer", ["oscgd", "adam"])
def test_the_whole_run_is_sketched(optimizer):
    """Beside what is measured exactly, near to it, and to the same bits after a checkpoint."""
    config = replace(CONFIG, optimizer=optimizer, lr=0.01, epochs=6)
    whole, first, second = (Trainer(config) for _ in range(3))
    for _ in range(6):
        whole.epoch()
    for _ in range(3):
        first.epoch()
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        second.epoch()
    mu, stderr = whole.record.recurrence.pairwise()
    np.testing.assert_array_equal(mu, second.record.recurrence.pairwise()[0])
    assert mu.shape == (6, 6) and np.isfinite(mu).all()
    exact = whole.history.global_correlation()[1:]
    assert (np.abs(np.diagonal(mu, 1) - exact) <= 4 * np.diagonal(stderr, 1) + 1e-6).all()
    assert whole.meter.layer_names != whole.sketcher.layer_names == ("all layers",)


def test_checkpoints_of_before_have_no_sketches():
    """The recurrence begins where the run goes on; all else is whole."""
    first, second = Trainer(replace(CONFIG, epochs=6)), Trainer(replace(CONFIG, epochs=6))
    for _ in range(3):
        first.epoch()
    state = first.state_dict()
    del state["sketcher"], state["recurrence"]
    second.load_state_dict(state)
    assert second.record.recurrence is None
    second.epoch()
    assert second.record.recurrence.steps.tolist() == [3] and second.history.steps.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "name, count", [("resnet18", 41), ("resnet34", 73), ("vgg16", 14), ("cnn", 4), ("cnn_bn", 7)]
)
def test_layers_of_the_models(name, count):
    """Modules that own parameters; a ResNet-18 has about 40 (paper, Sec. III)."""
    net = models.build(name, channels=3, image_size=32, width=8, seed=0)
    assert len({key.rpartition(".")[0] for key, _ in net.named_parameters()}) == count
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    "name, blocks",
    [
        ("linear", ["fc"]),
        ("cnn", ["block1", "block2", "block3", "fc"]),
        ("vgg16", ["block1", "block2", "block3", "block4", "block5", "fc"]),
        ("resnet18", ["stem", *(f"layer{i}.{j}" for i in range(1, 5) for j in range(2)), "fc"]),
    ],
)
def test_blocks_of_the_models(name, blocks):
    """A block is one layer; VGG-16's have 2, 2, 3, 3 and 3 convolutions."""
    config = replace(CONFIG, model=name, image_size=32, n_train=4, layers="block")
    trainer = Trainer(config)
    assert list(trainer.meter.layer_names) == blocks
    if name == "vgg16":
        keys = [key for key, _ in trainer.model.named_parameters() if key.endswith("weight")]
        counts = [sum(models.block_of(name, key) == block for key in keys) for block in blocks]
        assert counts == [2, 2, 3, 3, 3, 1]


@pytest.mark.slow
def test_full_width_models_are_the_papers():
    """Parameters of the usual CIFAR forms."""
    counts = {
        name: sum(p.numel() for p in models.build(name, 3, 32, 64, 0).parameters())
        for name in ("resnet18", "resnet34", "vgg16")
    }
    assert counts == {"resnet18": 11_173_962, "resnet34": 21_282_122, "vgg16": 14_719_818}


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


def test_digits_are_whole():
    x, y = data.load("digits", None, None, None, seed=0)
    assert x.shape == (1797, 1, 8, 8) and y.bincount().tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]
    assert abs(x.mean().item()) < 1e-5 and abs(x.std().item() - 1) < 1e-3


def test_leftovers_of_a_killed_process_go(tmp_path):
    folder = Folder(tmp_path / "run")
    folder.close()
    (tmp_path / "run" / ".checkpoint.pt.part").write_text("half")
    Folder(tmp_path / "run").close()
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
