"""Every quantity of a run on a quadratic against its closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import BACKENDS, DEVICE, Quadratic
from hypothesis import given
from hypothesis import strategies as st

from oscopt import OscGD, measures


def descend(hessian, start, lr, steps, **options):
    """A run, and the gradients that gradient descent on the quadratic has: (I - lr H)^t H x_0."""
    net = Quadratic(hessian, start).to(DEVICE)
    optimizer = OscGD(net.named_parameters(), lr=lr, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        net().backward()
        optimizer.step()
    h = hessian.double().numpy()
    shrink = np.eye(len(h)) - lr * h
    exact = [np.linalg.matrix_power(shrink, t) @ h @ start.double().numpy() for t in range(steps)]
    return optimizer, np.array(exact)


@st.composite
def quadratics(draw):
    """A Hessian with given eigenvalues, a start, a learning rate on either side of the edge of stability."""
    n = draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    eigenvalues = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    hessian = basis @ torch.diag(eigenvalues) @ basis.T
    start = torch.randn(n, generator=generator, dtype=torch.float64) * 10.0 ** draw(st.integers(-6, 6))
    return hessian, start, draw(st.sampled_from([0.1, 0.9, 1.7, 1.95]))


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=quadratics())
def test_sums_and_measures(backend, problem):
    hessian, start, lr = problem
    optimizer, g = descend(hessian, start, lr, steps=6, backend=backend)
    history = optimizer.history
    assert history.steps.tolist() == list(range(6))
    close = {"rtol": 1e-9, "atol": 1e-11 * float((g**2).sum())}
    np.testing.assert_allclose(history.sq_norm[:, 0], (g * g).sum(1), **close)
    np.testing.assert_allclose(history.prev_sq_norm[1:, 0], (g * g).sum(1)[:-1], **close)
    dot, difference = (g[1:] * g[:-1]).sum(1), g[1:] - g[:-1]
    np.testing.assert_allclose(history.dot[1:, 0], dot, **close)
    np.testing.assert_allclose(history.diff_sq_norm[1:, 0], (difference**2).sum(1), **close)
    norms = np.linalg.norm(g, axis=1)
    np.testing.assert_allclose(history.correlation()[1:, 0], dot / (norms[1:] * norms[:-1]), atol=1e-9)
    np.testing.assert_allclose(history.global_correlation(), history.correlation()[:, 0], atol=1e-12)
    # kappa is the Rayleigh quotient of H along the step, and g_t - g_{t-1} = H (x_t - x_{t-1}).
    h, step = hessian.numpy(), -lr * g[:-1]
    along = np.einsum("ti,ij,tj->t", step, h, step) / (step**2).sum(1)
    np.testing.assert_allclose(history.curvature()[1:, 0], along, rtol=1e-6)
    smooth = np.linalg.norm(step @ h, axis=1) / np.linalg.norm(step, axis=1)
    np.testing.assert_allclose(history.smoothness()[1:, 0], smooth, rtol=1e-6)
    long, short = measures.barzilai_borwein(
        history.dot, history.prev_sq_norm, history.diff_sq_norm, history.prev_lr
    )
    change = step @ h
    np.testing.assert_allclose(long[1:, 0], (step**2).sum(1) / (step * change).sum(1), rtol=1e-6)
    np.testing.assert_allclose(short[1:, 0], (step * change).sum(1) / (change**2).sum(1), rtol=1e-6)
    assert np.isnan(history.dot[0]).all() and np.isnan(history.correlation()[0]).all()


@pytest.mark.parametrize("lr, sign", [(0.5, 1.0), (1.5, -1.0)])
def test_one_dimension(lr, sign):
    """f = x^2 / 2: gradients keep their sign below lr = 1 and alternate above; kappa = 1."""
    optimizer, _ = descend(torch.eye(1), torch.ones(1), lr, steps=8)
    assert (optimizer.history.correlation()[1:] == sign).all()
    np.testing.assert_allclose(optimizer.history.curvature()[1:], 1.0, rtol=1e-12)
    assert optimizer.correlation.tolist() == [sign] and optimizer.global_correlation.item() == sign


def test_edge_of_stability():
    """At lr = 2 / lambda the gradient flips and keeps its length: eta kappa = 2."""
    optimizer, _ = descend(2 * torch.eye(3), torch.ones(3), 1.0, steps=5)
    np.testing.assert_allclose(optimizer.history.curvature()[1:] * optimizer.history.lr[1:], 2.0)


def test_two_layers_join_their_parameters():
    """A layer's sums are those of its parameters' gradients joined; the global ones those of all."""
    a, b, c = (torch.nn.Parameter(torch.tensor(v)) for v in ([3.0], [4.0], [12.0]))
    optimizer = OscGD([("fc.weight", a), ("fc.bias", b), ("head.weight", c)], lr=0.0)
    for sign in (1.0, -1.0):
        for p in (a, b, c):
            p.grad = sign * p.detach().clone() if p is not b else p.detach().clone()
        optimizer.step()
    assert optimizer.layer_names == ("fc", "head")
    history = optimizer.history
    assert history.sq_norm[1].tolist() == [25.0, 144.0]
    assert history.dot[1].tolist() == [-9.0 + 16.0, -144.0]
    assert history.correlation()[1].tolist() == [7 / 25, -1.0]
    assert history.global_correlation()[1] == pytest.approx((7 - 144) / 169)


def test_cancellation():
    """Nearly equal gradients: the difference is summed, not derived from the other sums."""
    p = torch.nn.Parameter(torch.zeros(1000))
    optimizer = OscGD([p], lr=0.0)
    for value in (1.0, 1.0 + 2**-20):
        p.grad = torch.full((1000,), value)
        optimizer.step()
    assert optimizer.history.diff_sq_norm[1, 0] == 1000 * 2.0**-40


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1.0, 1e22, 1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_whose_squares_leave_float32(backend, scale):
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(10_000, device=DEVICE))
    optimizer = OscGD([p], lr=0.0, backend=backend)
    gradients = [(torch.randn(10_000, generator=generator) * scale).to(DEVICE) for _ in range(2)]
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    x, y = (g.double() for g in gradients)
    exact = (x @ y / (x.norm() * y.norm())).item()
    assert abs(optimizer.correlation.item() - exact) <= 2e-6
