"""The table of a record: numbers by closed forms, hints on synthetic records and on runs of known state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import Quadratic, append
from torch import nn

from oscopt import History, OscGD, OscMonitor
from oscopt.kernels import SUMS
from oscopt.rows import RECORDED
from oscopt.summary import step_curvature
from study.sharpness import top_eigenvalue


def record(mu: np.ndarray, sq_norm: np.ndarray | float = 1.0, scale: np.ndarray | float = 1.0) -> History:
    """These correlations, (T, L), of gradients of these squared norms; the first row has no pair."""
    mu = np.asarray(mu, float)
    norms = np.broadcast_to(sq_norm, mu.shape)
    scales = np.broadcast_to(scale, mu.shape)
    history = History()
    history.add_layers([f"layer{i}" for i in range(mu.shape[1])])
    for step in range(len(mu)):
        row = np.empty((len(RECORDED), mu.shape[1]))
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
        row[: len(SUMS)] = [sums[name] for name in SUMS]
        row[-3:] = 0.0
        row[-2] = scales[step]
        row[-1] = scales[max(step - 1, 0)]
        append(history, step, row)
    return history


def waves(median: float, spread: float = 0.05, steps: int = 200) -> np.ndarray:
    values = median + spread * np.random.default_rng(0).standard_normal((steps, 2))
    return np.clip(values, -1, 1)


@pytest.mark.parametrize(
    ("mu", "sq_norm", "state"),
    [
        (waves(-0.98), 1.0, "edge"),
        (waves(-0.4, 0.2), 1.0, "edge"),
        (waves(-0.98), np.geomspace(1, 1e30, 200)[:, None], "diverges"),
        (waves(0.995, 0.001), 1.0, "smooth"),
        (waves(0.6, 0.1), 1.0, "agrees"),
        (waves(0.05, 0.1), 1.0, "noise"),
        (waves(-0.05, 0.1), 1.0, "noise"),
        (np.where(np.arange(200)[:, None] % 3, 0.99, -0.9) * np.ones(2), 1.0, "mixed"),
        (np.where(np.arange(200)[:, None] % 2, -0.7, 0.1) * np.ones(2), 1.0, "mixed"),
        (waves(0.95), np.where(np.arange(200) < 150, 1.0, np.nan)[:, None], "diverges"),
        (waves(-0.98)[:20], 1.0, "unknown"),
        (np.full((200, 2), np.nan), 1.0, "unknown"),
    ],
)
def test_states_of_synthetic_records(mu, sq_norm, state):
    summary = record(mu, sq_norm).summary()
    assert {row.state for row in (summary.overall, *summary.layers)} == {state}


def test_noise_is_in_all_layers():
    """One layer that hardly agrees, while all together oscillate, is no noise."""
    mu = np.concatenate([waves(-0.9), waves(0.0)], axis=1)
    summary = record(mu, np.array([9.0, 9.0, 1.0, 1.0])).summary()
    assert [row.state for row in summary.layers] == ["edge", "edge", "mixed", "mixed"]
    assert "4 layers: 2 oscillating, 2 mixed (oscillating: layer0, layer1)" in str(summary)


def test_phases_are_no_noise():
    """A median near 0 of a run that turns from oscillating to smooth."""
    mu = np.concatenate([waves(-0.7, 0.1), waves(0.7, 0.1)])
    forwards, backwards = record(mu).summary(last=400).overall, record(mu[::-1]).summary(last=400).overall
    assert forwards.state == backwards.state == "mixed"
    assert (
        forwards.hint
        == "in phases: gradients reverse in 50 % of the last 399 steps, but no longer at the end"
    )
    assert backwards.hint.endswith("and still at the end")


def test_momentum_alone_makes_updates_agree():
    """An average b_t = beta b_{t-1} + g_t of independent g has the correlation beta."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Linear(200, 100, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    monitor = OscMonitor(optimizer, net.named_parameters(), what="update", backend="torch")
    for _ in range(150):
        net.weight.grad = torch.randn(net.weight.shape, generator=generator)
        optimizer.step()
    row = monitor.update_history.summary(last=100).overall
    assert row.correlation == pytest.approx(0.9, abs=0.01) and row.state == "agrees"
    assert row.hint.startswith("adjacent updates agree, as a momentum of 0.9")


@pytest.mark.parametrize(
    ("plain", "advice"), [(True, "a larger batch shows more"), (False, "look at update correlations")]
)
def test_advice_against_noise(plain, advice):
    """Once, of all layers together; updates of plain descent are its gradients' multiples."""
    history = record(waves(0.05, 0.1))
    history.about |= {} if plain else {"plain": False}
    summary = history.summary()
    assert [advice in row.hint for row in (summary.overall, *summary.layers)] == [True, False, False]


@pytest.mark.parametrize(
    ("about", "advice"),
    [
        ({}, "a smaller rate here, or momentum, or adapt='auto'"),
        ({"optimizer": "SGD"}, "a smaller rate here, or momentum, or adapt='auto'"),
        ({"optimizer": "AdamW", "plain": False}, "a smaller rate here"),
    ],
)
def test_advice_fits_the_optimizer(about, advice):
    history = record(waves(-0.98))
    history.about |= about
    assert history.summary().overall.hint.endswith(f": {advice}")


def test_headroom():
    """The largest curvature that was met limits the rate, at the rate of now."""
    mu = waves(0.9999, 1e-5)
    far = record(mu).summary().overall.hint
    assert far.endswith("the edge is not in sight")
    mu[3] = 0.875  # ||g_t - g_{t-1}|| / ||g_{t-1}|| is 1/2
    assert record(mu).summary().overall.hint.endswith("the rate can grow about 4x before the edge")


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
        optimizer = OscGD(net.named_parameters(), lr=1e-3, backend="torch", **{kind: 0.1})
        history = optimizer.history
    else:
        optimizer = (torch.optim.AdamW if kind == "adamw" else torch.optim.SGD)(net.parameters(), lr=1e-3)
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
    assert (
        len(lines) == 5 and lines[0].startswith("Gradients, steps 100 to 199; ") and "all layers" in lines[2]
    )
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


def descent_of_known_state(kind: str, seed: int, factor: float) -> tuple[str, tuple[str, ...]]:
    """What the summary says of full-batch descent at `factor` times 2 / sharpness, and what is true.

    True is what follows from the sharpness before and after the steps looked at; nothing where it does not.
    The net is smooth: the Hessian does not see the kinks of a ReLU, which gradients jump at.
    """
    torch.manual_seed(seed)
    squares = kind == "squares"
    last = nn.Linear(16, 1 if squares else 3)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), last).double()
    x = torch.randn(40, 8).double()
    waved = torch.sin(x.sum(1, keepdim=True)) + 0.3 * torch.randn(40, 1).double()
    y = waved if squares else torch.randint(0, 3, (40,))
    loss_fn = nn.functional.mse_loss if squares else nn.functional.cross_entropy

    def descend(optimizer: OscGD, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss_fn(net(x), y).backward()
            optimizer.step()

    def sharpness() -> float:
        return top_eigenvalue(lambda: [loss_fn(net(x), y)], list(net.parameters()))

    descend(OscGD(net.named_parameters(), lr=0.02, backend="torch"), 50)
    lr = factor * 2 / sharpness()
    optimizer = OscGD(net.named_parameters(), lr=lr, backend="torch")
    descend(optimizer, 200)
    ratios = [lr * sharpness() / 2]
    descend(optimizer, 50)
    ratios.append(lr * sharpness() / 2)
    said = optimizer.history.summary(last=50).overall.state
    if not np.isfinite(ratios[-1]):
        return said, ("diverges",)
    if min(ratios) > 0.9:
        return said, ("edge",)
    return said, ("smooth", "agrees") if max(ratios) < 0.7 else ()


@pytest.mark.slow
def test_runs_of_known_state():
    """20 runs, of which the state is known of 16 at least; 9 of 10 of these are told right."""
    pytest.importorskip("scipy")
    cases = [("squares", seed) for seed in (0, 1, 2)] + [("classes", seed) for seed in (3, 4)]
    runs = {
        (*case, factor): descent_of_known_state(*case, factor)
        for case in cases
        for factor in (0.1, 1.0, 1.9, 2.1)
    }
    known = {key: run for key, run in runs.items() if run[1]}
    wrong = {key: (said, true) for key, (said, true) in known.items() if said not in true}
    assert len(known) >= 16 and {true[0] for _, true in known.values()} == {"smooth", "edge", "diverges"}
    assert len(wrong) <= len(known) / 10, wrong
