"""The table of a record: numbers by closed forms, hints on synthetic records and on runs of known state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import Quadratic
from torch import nn

from oscopt import History, OscGD, OscMonitor
from oscopt.kernels import SUMS
from oscopt.summary import step_curvature


def record(mu: np.ndarray, sq_norm: np.ndarray | float = 1.0, scale: np.ndarray | float = 1.0) -> History:
    """These correlations, (T, L), of gradients of these squared norms; the first row has no pair."""
    mu = np.asarray(mu, float)
    norms = np.broadcast_to(sq_norm, mu.shape)
    scales = np.broadcast_to(scale, mu.shape)
    history = History()
    history.add_layers([f"layer{i}" for i in range(mu.shape[1])])
    for step in range(len(mu)):
        row = history.next_row(torch.device("cpu"))
        before = norms[step - 1] if step else np.full(mu.shape[1], np.nan)
        dot = mu[step] * np.sqrt(norms[step] * before)
        nothing = np.full(mu.shape[1], np.nan)
        sums = {
            "dot": dot,
            "sq_norm": norms[step],
            "prev_sq_norm": before,
            "diff_sq_norm": norms[step] + before - 2 * dot,
            "alignment": nothing,
            "momentum_sq_norm": nothing,
        }
        row[: len(SUMS)] = torch.from_numpy(np.stack([sums[name] for name in SUMS]))
        row[-2] = torch.from_numpy(scales[step].copy())
        row[-1] = torch.from_numpy(scales[max(step - 1, 0)].copy())
        history.commit(step, np.full(mu.shape[1], 0.1), np.full(mu.shape[1], 0.1))
    return history


def waves(median: float, spread: float = 0.05, steps: int = 200) -> np.ndarray:
    values = median + spread * np.random.default_rng(0).standard_normal((steps, 2))
    return np.clip(values, -1, 1)


@pytest.mark.parametrize(
    ("mu", "sq_norm", "state"),
    [
        (waves(-0.98), 1.0, "edge"),
        (waves(-0.4, 0.2), 1.0, "edge"),
        (waves(-0.98), np.geomspace(1, 1e6, 200)[:, None], "diverges"),
        (waves(0.995, 0.001), 1.0, "smooth"),
        (waves(0.6, 0.1), 1.0, "agrees"),
        (waves(0.05, 0.1), 1.0, "noise"),
        (waves(-0.05, 0.1), 1.0, "noise"),
        (waves(-0.98)[:20], 1.0, "unknown"),
        (np.full((200, 2), np.nan), 1.0, "unknown"),
    ],
)
def test_states_of_synthetic_records(mu, sq_norm, state):
    summary = record(mu, sq_norm).summary()
    assert {row.state for row in (summary.overall, *summary.layers)} == {state}
    assert state in summary.overall.hint or state in ("edge", "agrees", "unknown")


def test_numbers():
    """Of the last steps only; shares are of the sizes of dot products; unknown pairs are left out."""
    mu = np.stack([np.full(60, 0.5), np.full(60, -0.5)], axis=1)
    mu[:30] = 0.9
    mu[40:45, 1] = np.nan
    mu[50:53, 0] = -0.1
    row = record(mu, np.array([3.0, 1.0])).summary(last=30)
    first, second = row.layers
    assert (row.first, row.last, first.steps, second.steps) == (30, 59, 30, 25)
    assert first.correlation == pytest.approx(0.5) and second.correlation == pytest.approx(-0.5)
    assert first.negative == pytest.approx(0.1) and second.negative == 1.0
    assert first.step_curvature == pytest.approx(0.5) and second.step_curvature == pytest.approx(1.5)
    shares = np.where(np.isnan(mu[30:, 1]), 1.0, np.abs(mu[30:, 0]) * 3 / (np.abs(mu[30:]) @ [3.0, 1.0]))
    assert first.share == pytest.approx(shares.mean())
    assert "edge" in second.hint and "in 100 % of the last 25 steps" in second.hint


def test_step_curvature_is_that_of_the_quadratic():
    """With a scale a layer and a rate that changes, too: <dx, H dx> in the metric of the steps."""
    torch.manual_seed(0)
    a = torch.randn(6, 6, dtype=torch.float64)
    hessian = a @ a.T
    net = Quadratic(hessian, torch.randn(6))
    lr = 1.2 / torch.linalg.eigvalsh(hessian)[-1].item()
    optimizer = OscGD(net.named_parameters(), lr=lr, backend="torch")
    expected = []
    for _ in range(8):
        optimizer.zero_grad()
        net().backward()
        g = net.x.grad.clone()
        optimizer.step()
        expected.append((lr * (g @ hessian @ g) / (g @ g)).item())
    layers, overall = step_curvature(optimizer.history)
    np.testing.assert_allclose(layers[1:, 0], expected[:-1], rtol=1e-9)
    np.testing.assert_allclose(overall[1:], expected[:-1], rtol=1e-9)
    mu = waves(0.3)
    overall = step_curvature(record(mu, scale=np.array([1.0, 3.0])))[1]
    np.testing.assert_allclose(overall[1:], ((1 - mu) @ [1.0, 3.0] / 4)[1:])


@pytest.mark.parametrize("kind", ["momentum", "weight_decay", "adamw", "update"])
def test_no_curvature_where_it_does_not_follow(kind, tmp_path):
    net = nn.Linear(3, 2)
    if kind in ("momentum", "weight_decay"):
        optimizer = OscGD(net.named_parameters(), lr=0.1, backend="torch", **{kind: 0.1})
        history = optimizer.history
    else:
        optimizer = (torch.optim.AdamW if kind == "adamw" else torch.optim.SGD)(net.parameters(), lr=0.1)
        monitor = OscMonitor(optimizer, net.named_parameters(), what=("grad", "update"), backend="torch")
        history = monitor.update_history if kind == "update" else monitor.history
        if kind == "update":
            assert monitor.history.about == {"optimizer": "SGD", "quantity": "gradients"}
    for _ in range(30):
        optimizer.zero_grad()
        net(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
    history.save(tmp_path / "history.npz")
    for kept in (
        history,
        History.load(tmp_path / "history.npz"),
        History.from_state_dict(history.state_dict()),
    ):
        assert kept.about == history.about
        summary = kept.summary()
        assert summary.overall.steps == 29 and np.isnan(summary.overall.step_curvature)
    assert "momentum" not in summary.overall.hint or kind == "weight_decay"


def test_as_text_and_frame():
    history = record(waves(-0.9))
    summary = history.summary(last=100)
    lines = str(summary).splitlines()
    assert len(lines) == 5 and "all layers" in lines[2]
    at = lines[1].index("hint")
    assert all(line[at - 2 : at] == "  " and line[at] != " " for line in lines[2:])
    frame = summary.to_dataframe()
    assert list(frame.index) == ["all layers", "layer0", "layer1"]
    assert frame.loc["layer1", "correlation"] == summary.layers[1].correlation
    assert frame.loc["all layers", "state"] == "edge"


def test_an_empty_history_and_wrong_arguments():
    assert "no steps" in str(History().summary())
    with pytest.raises(ValueError, match="Invalid last: 0"):
        History().summary(last=0)


def test_reading_changes_nothing():
    history = record(waves(0.2))
    before = history.to_numpy()
    history.summary()
    np.testing.assert_equal(history.to_numpy(), before)
    assert len(history.last(70)) == 70 and len(history) == 200
    np.testing.assert_array_equal(history.last(70).steps, history.steps[-70:])
