"""Pictures, TensorBoard, Weights & Biases, Lightning, Hugging Face: the real packages, where they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import append, batch, small_net, train
from torch import nn

from oscopt import History, OscGD, OscMonitor, loggers
from oscopt.rows import RECORDED

pytestmark = pytest.mark.slow


def trained(steps: int = 8, **options) -> OscGD:
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.05, **options)
    with optimizer.window(4) as window:
        train(net, optimizer, steps)
    optimizer.seen = window
    return optimizer


# ---- pictures --------------------------------------------------------------------------------------------


@pytest.fixture
def plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from oscopt import plot

    yield plot
    pyplot.close("all")


def test_plot_lines(plot):
    optimizer = trained()
    history = optimizer.history
    ax = plot.plot_correlation(history, window=None, color="red")
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), history.global_correlation())
    assert ax.lines[0].get_color() == "red" and ax.get_xlabel() == "step"
    assert plot.plot_correlation(history, ax=ax) is ax and "mean of 5" in ax.get_ylabel()
    ax = plot.plot_layers(history, ["4", "0"], window=None)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["4", "0"]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), history.correlation()[:, 2])
    assert len(plot.plot_layers(history).lines) == 3 + 1
    with pytest.raises(KeyError, match="no layer 'fc'; there are 0, 1, 4"):
        plot.plot_layers(history, ["fc"])


@pytest.mark.parametrize("steps", [1, 8, 3000])
def test_plot_heatmap(plot, steps):
    history = History()
    history.add_layers(["first", "last"])
    for t in range(steps):
        row = np.ones((len(RECORDED), 2))
        row[0, 1] = -1.0 if t else math.nan
        append(history, t, row, lr=1.0)
    ax = plot.plot_heatmap(history, window=None)
    image = ax.collections[0].get_array()
    assert image.shape == (2, min(steps, 600)) and (image[0] == 1.0).all() and (image[1, 1:] == -1.0).all()
    assert [text.get_text() for text in ax.get_yticklabels()] == ["first", "last"]
    with pytest.raises(ValueError, match="holds no steps yet"):
        plot.plot_heatmap(History())


def test_plot_heatmap_of_no_layer(plot):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = OscGD([("q", p)], lr=0.1, layers={None: ["q"]})
    p.grad = torch.ones(3)
    optimizer.step()
    assert not plot.plot_heatmap(optimizer.history).get_yticklabels()


def test_plot_matrix(plot):
    optimizer = trained()
    ax = plot.plot_matrix(optimizer.seen, "4")
    np.testing.assert_array_equal(ax.images[0].get_array(), optimizer.seen.matrix("4"))
    assert len(ax.texts) == 16 and ax.get_title() == "4"
    with pytest.raises(KeyError):
        plot.plot_matrix(optimizer.seen, "fc")


# ---- loggers ---------------------------------------------------------------------------------------------


def test_new_scalars():
    optimizer = trained(3)
    first = dict(loggers.new_scalars(optimizer.history, "run"))
    assert list(first) == [1, 2]
    assert set(first[1]) == {"run/correlation", *(f"run/correlation/{n}" for n in "014")}
    assert first[2]["run/correlation"] == pytest.approx(optimizer.global_correlation.item(), abs=1e-15)
    assert not dict(loggers.new_scalars(optimizer.history))
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert set(dict(loggers.new_scalars(optimizer.history, layers=False))[3]) == {"oscopt/correlation"}


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    optimizer = trained(5)
    with SummaryWriter(tmp_path) as writer:
        loggers.log_to_tensorboard(writer, optimizer.history, picture=True)
    events = EventAccumulator(str(tmp_path)).Reload()
    logged = events.Scalars("oscopt/correlation/4")
    assert [event.step for event in logged] == [1, 2, 3, 4]
    wanted = optimizer.history.correlation()[1:, 2]
    np.testing.assert_allclose([event.value for event in logged], wanted, rtol=1e-6)
    (picture,) = events.Images("oscopt/layers")
    assert picture.step == 4 and picture.width > 500


def test_pictures_go_where_they_can(tmp_path):
    pytest.importorskip("matplotlib")
    assert not loggers.log_picture(object(), trained(3).history)
    with pytest.raises(ValueError, match="no steps"):
        loggers.layers_picture(History())


def test_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    optimizer = trained(4)
    run = wandb.init(mode="offline", dir=tmp_path, project="test")
    logged = []
    monkeypatch.setattr(run, "log", lambda values, log=run.log: (logged.append(values), log(values)))
    loggers.log_to_wandb(run, optimizer.history, picture=True)
    summary = dict(run.summary)
    run.finish()
    wandb.teardown()  # or later runs of this process begin in today's working directory
    *logged, picture = logged
    assert [values["oscopt/step"] for values in logged] == [1, 2, 3]
    assert isinstance(picture["oscopt/layers"], wandb.Image)
    assert logged[-1]["oscopt/correlation"] == optimizer.global_correlation.item()
    assert summary["oscopt/correlation/4"] == optimizer.correlation[2].item()


# ---- Lightning -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["oscgd", "adam"])
def test_lightning(tmp_path, kind):
    pytest.importorskip("lightning")
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from oscopt.lightning import OscCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = small_net(device="cpu")

        def training_step(self, pair):
            return nn.functional.cross_entropy(self.net(pair[0]), pair[1])

        def configure_optimizers(self):
            if kind == "oscgd":
                return OscGD(self.named_parameters(), lr=0.05)
            return torch.optim.Adam(self.parameters(), lr=0.01)

    class Saver(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 2:
                trainer.save_checkpoint(tmp_path / "third.ckpt")

    def fit(epochs, checkpoint=None):
        callback = OscCallback(what=("grad", "update"), picture_every=4)
        logger = CSVLogger(tmp_path, version=str(epochs), flush_logs_every_n_steps=1)
        board = TensorBoardLogger(tmp_path, name="board", version=str(epochs))
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=[logger, board],
            callbacks=[callback, Saver()],
            log_every_n_steps=2,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        pictures = [tuple(t.cpu() for t in batch(seed)) for seed in range(3)]
        trainer.fit(Module(), torch.utils.data.DataLoader(pictures, batch_size=None), ckpt_path=checkpoint)
        return callback.meters[0], (tmp_path / "lightning_logs" / str(epochs) / "metrics.csv").read_text()

    meter, logged = fit(3)
    assert meter.history.steps.tolist() == list(range(9)) and not meter.correlation.isnan().any()
    assert "oscopt/correlation/net.4" in logged and len(logged.splitlines()) >= 9
    events = EventAccumulator(str(tmp_path / "board" / "3")).Reload()
    assert [picture.step for picture in events.Images("oscopt/layers")] == [3, 7, 8]
    if kind == "adam":
        assert "oscopt_update/correlation" in logged and len(meter.update_history) == 9
        again, logged = fit(5, tmp_path / "third.ckpt")
        assert again.history.steps.tolist() == list(range(15))
        assert not np.isnan(again.history.correlation()[1:]).any()
        assert not again._optimizer._optimizer_step_pre_hooks


def test_lightning_training_that_raises(tmp_path):
    pytest.importorskip("lightning")
    import lightning.pytorch as pl

    from oscopt.lightning import OscCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = small_net(device="cpu")
            self.optimizer = torch.optim.Adam(self.parameters())

        def training_step(self, pair, number):
            if number == self.ends_at:
                raise RuntimeError("out of luck")
            return nn.functional.cross_entropy(self.net(pair[0]), pair[1])

        def configure_optimizers(self):
            return self.optimizer

    def fit():
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            callbacks=[callback],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, torch.utils.data.DataLoader(pictures, batch_size=None))

    pictures = [tuple(t.cpu() for t in batch(seed)) for seed in range(3)]
    module, callback = Module(), OscCallback()
    module.ends_at = 2
    with pytest.raises(RuntimeError, match="out of luck"):
        fit()
    assert len(callback.meters[0].history) == 2 and not module.optimizer._optimizer_step_pre_hooks
    module.ends_at = None
    fit()
    assert len(callback.meters[0].history) == 3 and not module.optimizer._optimizer_step_pre_hooks


# ---- Hugging Face ----------------------------------------------------------------------------------------


class Loss(nn.Module):
    """A model as the Trainer wants it; its forward pass number `ends_at` raises."""

    def __init__(self, ends_at=None):
        super().__init__()
        self.net = small_net(device="cpu")
        self.ends_at, self.passes = ends_at, 0

    def forward(self, x, labels):
        self.passes += 1
        if self.passes == self.ends_at:
            raise RuntimeError("CUDA out of memory.")
        scores = self.net(x)
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def trainer_of(model, callback, folder, optimizer=None, **options):
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    batches = [batch(seed, device="cpu") for seed in range(2)]
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            **options,
        ),
        train_dataset=[{"x": x, "labels": y} for pair in batches for x, y in zip(*pair, strict=True)],
        callbacks=[callback],
        optimizers=(optimizer, None),
    )


@pytest.mark.parametrize("kind", ["oscgd", "adamw"])
def test_hugging_face(tmp_path, kind):
    pytest.importorskip("transformers")
    from oscopt.huggingface import OscTrainerCallback

    model, said, shown = Loss(), [], []
    callback = OscTrainerCallback(
        log=said.append,
        log_layers=True,
        picture=lambda figure, step: shown.append((type(figure).__name__, step)),
        picture_every=4,
        what=("grad", "update"),
    )
    trainer = trainer_of(
        model,
        callback,
        tmp_path,
        OscGD(model.named_parameters(), lr=0.01) if kind == "oscgd" else None,
        max_steps=6,
        logging_steps=2,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    assert callback.meter.history.steps.tolist() == list(range(6))
    assert shown == [("Figure", 4), ("Figure", 6)]
    entries = [entry for entry in trainer.state.log_history if "oscopt/correlation" in entry]
    assert len(entries) >= 3 and entries[0]["oscopt/correlation/net.4"] == said[0]["oscopt/correlation/net.4"]
    mu = callback.meter.history.global_correlation()
    assert entries[1]["oscopt/correlation"] == pytest.approx(mu[2:4].mean())
    assert ("oscopt_update/correlation" in entries[0]) == (kind == "adamw")
    if kind == "adamw":
        assert isinstance(callback.meter, OscMonitor)
        assert not callback.meter._optimizer._optimizer_step_pre_hooks


def test_hugging_face_training_that_raises(tmp_path):
    """A Trainer tells nobody: the next training lets go of what this one has left, or `detach` does."""
    pytest.importorskip("transformers")
    from oscopt.huggingface import OscTrainerCallback

    model, callback = Loss(ends_at=3), OscTrainerCallback()
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = trainer_of(model, callback, tmp_path, optimizer, max_steps=4)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    left = callback.meter
    assert len(left.history) == 2
    trainer.train()
    assert callback.meter is not left and len(callback.meter.history) == 4 and len(left.history) == 2
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    model.passes = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    callback.detach()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_hugging_face_finds_the_batch_size(tmp_path):
    """It begins a training again after one that raised, in one call."""
    pytest.importorskip("transformers")
    from oscopt.huggingface import OscTrainerCallback

    model, callback = Loss(ends_at=2), OscTrainerCallback()
    optimizer = torch.optim.AdamW(model.parameters())
    trainer_of(model, callback, tmp_path, optimizer, max_steps=3, auto_find_batch_size=True).train()
    assert model.passes == 2 + 3 and callback.meter.history.steps.tolist() == [0, 1, 2]
    assert not optimizer._optimizer_step_pre_hooks
