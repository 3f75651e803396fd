"""The sketch: its accuracy on structured gradients, and every backend against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import sketch as measure_sketch
import torch
from helpers import BACKENDS, DEVICE

from oscopt import kernels
from oscopt.kernels import numba_backend, sketch, torch_backend

SEEDS = 200
PLAIN = (0.1, 0.0, 1.0, 0.0, 0.0, 1.0)
FULL = (0.1, 0.9, 0.7, 0.01, 0.9, -1.0)


def scales(name: str, z) -> np.ndarray:
    """The scale of every element of a gradient whose structure is `name`."""
    flat = np.full((256, 512), 1e-3)
    if name == "flat":
        return np.ones_like(flat)
    if name == "one row":
        flat[7] = 1
    elif name == "one column":
        flat[:, 9] = 1
    elif name == "every 16th column":
        flat[:, ::16] = 1
    elif name == "eight columns":
        flat[:, :8] = 1
    elif name == "single element":
        flat[3, 5] = 100
    elif name == "lognormal rows":
        return np.exp(2 * z(256, 1)) * np.ones_like(flat)
    elif name == "lognormal columns":
        return np.exp(2 * z(1, 512)) * np.ones_like(flat)
    elif name == "lognormal elements":
        return np.exp(2 * z(256, 512))
    elif name == "embedding":
        flat[:] = 0
        flat[[3, 50, 51, 130, 255]] = 1
    elif name == "a bucket's period":
        flat = np.zeros((128, 1024))
        flat[:, 100:132] = 1
    elif name == "period 4096":
        flat = np.zeros((32, 4096))
        flat[:, 77] = 1
    elif name == "period 256":
        flat = np.zeros((200, 256))
        flat[:, 0] = 1
    return flat


STRUCTURES = (
    "flat, one row, one column, every 16th column, eight columns, single element, lognormal rows, "
    "lognormal columns, lognormal elements, embedding, a bucket's period, period 4096, period 256"
).split(", ")


def estimates(g: torch.Tensor, h: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Correlation and standard error of two gradients of one tensor, for many seeds: shape (SEEDS,) each."""
    grads, kept = [h] * SEEDS, [sketch.kept_like(h, h.dtype) for _ in range(SEEDS)]
    index, out = list(range(SEEDS)), torch.zeros((len(sketch.SUMS), SEEDS), dtype=torch.float64)
    plan = kernels.Plan(
        grads, grads, index, SEEDS, numba_backend, seeds=[sketch.seed_of(str(i)) for i in index]
    )
    for now in (h, g):
        plan.step([now] * SEEDS, kept, None, [True] * SEEDS, [0] * SEEDS, None, out)
    dot, sq_norm, _, prev_sq_norm, *_, variance = out.numpy()
    norms = np.sqrt(sq_norm * prev_sq_norm)
    return dot / norms, np.sqrt(variance) / norms


@pytest.mark.parametrize("mu", [0.0, 0.6, 0.95, -0.9])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_interval_covers_whatever_the_structure(structure, mu):
    generator = np.random.default_rng(0)

    def z(*shape):
        return generator.standard_normal(shape)

    scale = scales(structure, z)
    a, b = z(*scale.shape), z(*scale.shape)
    g = torch.from_numpy((scale * a).ravel()).float()
    h = torch.from_numpy((scale * (mu * a + np.sqrt(1 - mu * mu) * b)).ravel()).float()
    found, stderr = estimates(g, h)
    true = (g.double() @ h.double() / (g.double().norm() * h.double().norm())).item()
    assert np.mean(np.abs(found - true) <= 1.96 * stderr + 1e-6) >= 0.9


def run(module, dtype, momentum, threads=1, measure_only=False):
    """Parameters, sums, what is kept and its folds after two steps of tensors of all kinds."""
    sizes, layer_of = [100, 16_385, 16_384, 20_001, 0], [-1, 0, 0, 1, 1]
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    params, *steps = ([torch.randn(n, generator=generator).to(dtype) for n in sizes] for _ in range(3))
    kept = [sketch.kept_like(p, dtype) for p in params]
    bufs = [torch.zeros_like(p) for p in params] if momentum else None
    out, scale = torch.zeros((7, 2), dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)
    bound = torch.tensor([torch.inf, 0.3], dtype=torch.float64)
    plan = kernels.Plan(params, steps[0], layer_of, 2, module, seeds=[3_000_000_000 + i for i in range(5)])
    hyper = None if measure_only else [FULL if momentum else PLAIN]
    for grads in steps:
        plan.step(grads, kept, bufs, [True] * 5, [0] * 5, hyper, out, scale, bound)
    folded = [torch.zeros((2, k)) for k in (64, 256)]
    for vectors in folded:
        plan.fold(kept, vectors)
    torch.set_num_threads(1)
    return params, out, kept, folded


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_what_to_compare_with_there_is_no_variance(backend):
    """In a list of which one tensor is sketched and one is kept whole."""
    params = [torch.ones(n, device=DEVICE) for n in (sketch.WHOLE + 1, 4)]
    module = kernels.backend(backend, params[0].device)
    plan = kernels.Plan(params, params, [0, 1], 2, module, seeds=[1, 2])
    out = torch.zeros((len(sketch.SUMS), 2), dtype=torch.float64, device=DEVICE)
    plan.step(params, None, None, None, [0, 0], [PLAIN], out)
    assert out[1].tolist() == [sketch.WHOLE + 1, 4]
    assert out[[0, 2, 3, 6]].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "momentum"),
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.float64, True),
        (torch.bfloat16, True),
        (torch.float16, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "torch"])
def test_backends_are_the_definition(name, dtype, momentum):
    """Sums, what is kept, its fold and the update, with unmeasured tensors, scales and bounds."""
    module = kernels.backend(name, torch.device("cpu"))
    params, out, kept, folded = run(torch_backend, dtype, momentum)
    found, sums, vectors, folds = run(module, dtype, momentum)
    rounding = 2 * torch.finfo(dtype).eps if momentum else 0.0  # of the buffers
    assert torch.allclose(out, sums, rtol=2e-5 + rounding, atol=1e-3 + 1e4 * rounding, equal_nan=True)
    for a, b in zip([*kept, *folded], [*vectors, *folds], strict=True):
        assert a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-5, atol=2e-3)
    for a, b in zip(params, found, strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=4 * torch.finfo(dtype).eps, atol=0.05)


@pytest.mark.parametrize("name", BACKENDS)
def test_measuring_alone_measures_the_same(name):
    module = kernels.backend(name, torch.device("cpu"))
    _, out, kept, _ = run(module, torch.float32, False)
    params, sums, vectors, _ = run(module, torch.float32, False, measure_only=True)
    assert torch.equal(out.nan_to_num(-1.0), sums.nan_to_num(-1.0))
    assert all(map(torch.equal, kept, vectors))
    assert all(map(torch.equal, params, run(torch_backend, torch.float32, False, measure_only=True)[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    (params, out, kept, folded), two = (
        run(numba_backend, dtype, True),
        run(numba_backend, dtype, True, threads=2),
    )
    for a, b in zip([*params, out, *kept, *folded], [*two[0], two[1], *two[2], *two[3]], strict=True):
        assert torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))


@pytest.mark.parametrize("module", [torch_backend, numba_backend])
@pytest.mark.parametrize("size", [1000, 50_000])
def test_not_finite_is_not_a_number(module, size):
    grads = [torch.ones(size), torch.ones(size)]
    grads[0][size - 1] = torch.inf
    kept = [sketch.kept_like(g, g.dtype) for g in grads]
    out = torch.zeros((7, 2), dtype=torch.float64)
    plan = kernels.Plan(grads, grads, [0, 1], 2, module, seeds=[1, 2])
    plan.step(grads, kept, None, [True] * 2, [0, 0], None, out)
    assert out[:3, 0].isnan().all() and out[1, 1].item() == pytest.approx(size)
    grads[0][size - 1] = 1.0
    plan.step(grads, kept, None, [True] * 2, [0, 0], None, out)
    assert out[0, 0].isnan() and out[3, 0].isnan() and out[0, 1].item() == pytest.approx(size)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["cnn", "resnet18", "transformer"])
@pytest.mark.parametrize("batch", [256, 64])
def test_real_gradients(model, batch):
    """Of every layer in five adjacent pairs: the error is small, and is what the standard error says."""
    found = measure_sketch.recorded(model, measure_sketch.MODELS[model], 6, batch, "cpu")
    one, everything, scaled = measure_sketch.errors(found, SEEDS)
    assert 0.92 <= np.mean(np.abs(scaled) <= 1.96) <= 0.99
    assert np.sqrt(np.mean(one**2)) <= 0.008 and np.sqrt(np.mean(everything**2)) <= 0.003
