"""Gradients that somebody writes to after the step, in ways that no version counter sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import BACKENDS, DEVICE
from torch import nn

from oscopt import History, OscGD


def make(backend="auto", **options):
    p, q = (nn.Parameter(torch.ones(50, device=DEVICE)) for _ in range(2))
    return OscGD([("a.w", p), ("b.w", q)], lr=0.01, backend=backend, **options), p, q


def take(optimizer, *params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(DEVICE)
    optimizer.step()


WRITES = {
    "zeros through data": lambda g: g.data.zero_(),
    "one element through data": lambda g: g.data[7:8].mul_(1.001),
    "numpy": lambda g: g.numpy().fill(3.0),
    "detached": lambda g: g.detach().zero_(),
    "not finite": lambda g: g.data.fill_(torch.inf),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_noticed(backend, write):
    if write == "numpy" and DEVICE != "cpu":
        pytest.skip("numpy does not see the memory of a GPU")
    optimizer, p, q = make(backend)
    for seed in range(2):
        take(optimizer, p, q, seed=seed)
    WRITES[write](p.grad)
    take(optimizer, p, q, seed=2)
    history = optimizer.history
    assert np.isnan([history.dot[-1, 0], history.diff_sq_norm[-1, 0], history.prev_sq_norm[-1, 0]]).all()
    assert np.isnan(history.global_correlation()[-1])
    assert history.sq_norm[-1, 0] == pytest.approx(p.grad.double().square().sum().item())
    assert np.isfinite(history.correlation()[-1, 1])
    take(optimizer, p, q, seed=3)
    assert np.isfinite(history.correlation()[-1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_do_not_care(backend):
    """The sign of a gradient changed: its norm does not tell."""
    results = []
    for write in (False, True):
        optimizer, p, q = make(backend, copy_gradients=True)
        for seed in range(4):
            take(optimizer, p, q, seed=seed)
            if write:
                p.grad.data.neg_()
                q.grad.data.zero_()
        results.append(optimizer.history.dot)
    np.testing.assert_array_equal(*results)
    assert np.isfinite(results[0][1:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_good_gradients_are_never_taken_for_written_ones(dtype):
    """Many sizes and scales, layers of several parameters, gradients missing now and then."""
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 3, 1000, 4097, 70_000]
    params = [nn.Parameter(torch.zeros(n, dtype=dtype, device=DEVICE)) for n in sizes]
    optimizer = OscGD([(f"l{i % 2}.p{i}", p) for i, p in enumerate(params)], lr=0.01)
    for step in range(12):
        for p in params:
            scale = 10.0 ** (step % 5 - 2)
            p.grad = (torch.randn(p.shape, generator=generator) * scale).to(DEVICE, dtype)
        if step == 6:
            params[2].grad = None
        optimizer.step()
    lost = np.isnan(optimizer.history.dot)
    assert lost[0].all() and lost[6:8, 0].all() and lost.sum() == 4


def test_a_write_is_noticed_whenever_it_is_read():
    """At once by `correlation`, later by the history, and from one block of rows to the next."""
    written, histories = (5, 128, 130, 255, 256), []  # steps: rows come to the host by 128 here
    for read in ((), (5, 130), range(300)):
        optimizer, p, q = make(history=History(limit=512))
        for step in range(300):
            if step in written:
                p.grad.data.mul_(2.0)
            take(optimizer, p, q, seed=step)
            if step in read:
                assert optimizer.correlation.isnan().tolist() == [step in (0, *written), step == 0]
                assert optimizer.global_correlation.isnan().item() == (step in (0, *written))
            if step in read and step % 7 == 0:
                assert len(optimizer.history) == step + 1
        histories.append(optimizer.history)
    for history in histories:
        assert np.flatnonzero(np.isnan(history.dot[:, 0])).tolist() == [0, *written]
        assert np.flatnonzero(np.isnan(history.dot[:, 1])).tolist() == [0]
        np.testing.assert_array_equal(history.dot, histories[0].dot)
        np.testing.assert_array_equal(history.sq_norm, histories[0].sq_norm)
