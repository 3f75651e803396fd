"""The alignment of gradients with the momentum: closed forms, oracles, what is left out where it is alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import BACKENDS, DEVICE, Quadratic, batch, small_net, train
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from oscopt import History, OscGD

MOMENTA = {
    "plain": {"momentum": 0.9},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "maximize": {"momentum": 0.9, "maximize": True},
    "weight decay": {"momentum": 0.9, "weight_decay": 0.1},
}


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    curvature=st.floats(0.1, 10.0),
    step=st.floats(0.05, 1.5),
    momentum=st.floats(0.1, 0.95),
)
def test_closed_form_of_heavy_ball(backend, curvature, step, momentum):
    """f = h x^2 / 2: a step multiplies (x, b) by a matrix; alignment and norms follow from its powers."""
    lr = step / curvature
    model = Quadratic(curvature * torch.eye(3).double(), torch.tensor([1.0, -2.0, 0.5])).to(DEVICE)
    optimizer = OscGD(model.named_parameters(), lr=lr, momentum=momentum, backend=backend)
    start = model.x.detach().cpu().numpy().copy()
    matrix = np.array([[1 - lr * curvature, -lr * momentum], [curvature, momentum]])
    for _ in range(8):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    states = np.array([np.linalg.matrix_power(matrix, t) @ [1.0, 0.0] for t in range(8)])
    x, b = states.T  # of a start at 1; b as a step finds it
    total = (start**2).sum()
    h = optimizer.history
    np.testing.assert_allclose(h.alignment[:, 0], curvature * x * b * total, rtol=1e-9, atol=1e-12 * total)
    np.testing.assert_allclose(h.momentum_sq_norm[:, 0], b**2 * total, rtol=1e-9, atol=1e-12 * total)
    cos = h.alignment_correlation()[:, 0]
    assert np.isnan(cos[0])
    clear = abs(x * b)[1:] > 1e-6
    np.testing.assert_allclose(cos[1:][clear], np.sign(x * b)[1:][clear], rtol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", MOMENTA)
@pytest.mark.parametrize("measure", ["exact", "alignment"])
def test_against_an_oracle(backend, kind, measure):
    """b is the buffer itself, whatever the options made of it; g is negated to maximize, as it is in b."""
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.01, backend=backend, measure=measure, **MOMENTA[kind])
    layers = [[net[0].weight, net[0].bias], [net[1].weight, net[1].bias], [net[4].weight, net[4].bias]]
    sign = -1.0 if kind == "maximize" else 1.0
    x, y = batch()
    expected = []
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        sums = np.zeros((2, 3))
        for i, layer in enumerate(layers):
            for p in layer:
                b = optimizer.state[p].get("momentum_buffer", torch.zeros_like(p)).double()
                sums[:, i] += [(sign * p.grad.double() * b).sum().item(), (b * b).sum().item()]
        expected.append(sums)
        optimizer.step()
    alignment, norms = np.moveaxis(np.array(expected), 1, 0)
    h = optimizer.history
    np.testing.assert_allclose(h.momentum_sq_norm, norms, rtol=1e-10)
    np.testing.assert_allclose(h.alignment, alignment, rtol=1e-9, atol=1e-12)
    scale = np.sqrt(h.sq_norm * norms)[1:]
    np.testing.assert_allclose(h.alignment_correlation()[1:], alignment[1:] / scale, atol=1e-9)
    whole = alignment.sum(1)[1:] / np.sqrt(h.sq_norm.sum(1) * norms.sum(1))[1:]
    np.testing.assert_allclose(h.global_alignment_correlation()[1:], whole, atol=1e-9)
    windowed = h.global_alignment_correlation(window=3)
    np.testing.assert_allclose(windowed[3:], (whole[1:-1] + whole[2:])[: len(windowed) - 3] / 2, atol=1e-9)


def test_none_without_momentum():
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.01)
    train(net, optimizer, 3)
    assert np.isnan(optimizer.history.alignment).all() and np.isnan(optimizer.history.momentum_sq_norm).all()


@pytest.mark.parametrize("kind", MOMENTA)
def test_alone_it_trains_the_same_and_keeps_no_gradient(kind):
    ends = []
    for measure in ("exact", "alignment"):
        net = small_net()
        optimizer = OscGD(net.named_parameters(), lr=0.01, measure=measure, **MOMENTA[kind])
        train(net, optimizer, 5)
        ends.append((net, optimizer.history))
        keys = {key for state in optimizer.state.values() for key in state}
        assert keys == ({"momentum_buffer"} if measure == "alignment" else {"momentum_buffer", "prev_grad"})
    (net, exact), (other, alone) = ends
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    for name in ("sq_norm", "alignment", "momentum_sq_norm", "lr", "step_scale"):
        np.testing.assert_array_equal(getattr(exact, name), getattr(alone, name))
    for name in ("dot", "diff_sq_norm", "prev_sq_norm"):
        assert np.isnan(getattr(alone, name)).all()


def test_alone_gradients_may_be_reused():
    """Nothing refers to the last one: it may be accumulated into, or written to."""
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.01, momentum=0.9, measure="alignment")
    x, y = batch()
    for _ in range(5):
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert np.isfinite(optimizer.history.alignment).all()


@pytest.mark.parametrize("measure", ["exact", "alignment"])
def test_every(measure):
    """The steps that are measured are measured as if all were."""
    histories = []
    for every in (1, 3):
        net = small_net()
        optimizer = OscGD(net.named_parameters(), lr=0.01, momentum=0.9, measure=measure, every=every)
        train(net, optimizer, 9)
        histories.append(optimizer.history)
    assert histories[1].steps.tolist() == [2, 5, 8]
    for name in ("alignment", "momentum_sq_norm", "sq_norm"):
        np.testing.assert_array_equal(getattr(histories[0], name)[2::3], getattr(histories[1], name))


@pytest.mark.parametrize("way", ["file", "state_dict"])
def test_it_is_saved(way, tmp_path):
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.01, momentum=0.9)
    train(net, optimizer, 4)
    if way == "file":
        optimizer.history.save(tmp_path / "h.npz")
        again = History.load(tmp_path / "h.npz")
    else:
        again = History.from_state_dict(optimizer.history.state_dict())
    np.testing.assert_array_equal(again.alignment, optimizer.history.alignment)
    np.testing.assert_array_equal(again.momentum_sq_norm, optimizer.history.momentum_sq_norm)


def test_resumed_alone():
    ends = []
    for stop in (None, 3):
        net = small_net()
        optimizer = OscGD(net.named_parameters(), lr=0.01, momentum=0.9, measure="alignment")
        train(net, optimizer, stop or 6)
        if stop:
            state = optimizer.state_dict()
            optimizer = OscGD(net.named_parameters(), lr=0.5, momentum=0.9, measure="alignment")
            optimizer.load_state_dict(state)
            train(net, optimizer, 3)
        ends.append((list(net.parameters()), optimizer.history.alignment[-3:]))
    assert all(torch.equal(p, q) for p, q in zip(ends[0][0], ends[1][0], strict=True))
    np.testing.assert_array_equal(ends[0][1], ends[1][1])
