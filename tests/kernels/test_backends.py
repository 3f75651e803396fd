"""Every backend against float64 oracles, over lists of tensors of all kinds."""

from __future__ import annotations

import importlib
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BACKENDS, DEVICE
from hypothesis import given
from hypothesis import settings as options
from hypothesis import strategies as st

from oscopt import kernels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (0, 1, 3, 4, 7, 1023, 1024, 4095, 4096, 4097, 8191, 8192, 8193, 33000)
FORMS = ("plain", "transposed", "channels_last", "misaligned", "gaps")
PLAIN = (0.1, 0.0, 1.0, 0.0, 0.0, 1.0)
FULL = (0.1, 0.9, 0.7, 0.01, 0.9, -1.0)


def make(size: int, form: str, dtype: torch.dtype, scale: float, generator) -> torch.Tensor:
    """A tensor of about `size` elements with the strides of `form`."""

    def draw(*shape):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(DEVICE)

    if form == "transposed":
        return draw(3, math.ceil(size / 3)).t()
    if form == "channels_last":
        side = max(1, math.isqrt(size // 8 or 1))
        return draw(2, 4, side, side).contiguous(memory_format=torch.channels_last)
    if form == "misaligned":
        return draw(size + 1)[1:]
    if form == "gaps":
        return draw(size, 2)[:, 0]
    return draw(size)


def oracle(layer_of, num_layers, grads, prevs, bufs=None, sign=1.0) -> torch.Tensor:
    """The sums in float64, by numpy; NaN what is not taken."""
    sums = np.zeros((6, num_layers))
    prevs, kept = prevs or grads, bufs or [None] * len(grads)
    for layer, *tensors in zip(layer_of, grads, prevs, kept, strict=True):
        if layer >= 0:
            g, q, b = (np.zeros(1) if x is None else x.cpu().double().numpy().ravel() for x in tensors)
            pairs = (g, q), (g, g), (g - q, g - q), (q, q), (sign * g, b), (b, b)
            sums[:, layer] += [(x * y).sum() for x, y in pairs]
    if prevs is grads:
        sums[[0, 2, 3]] = np.nan
    if bufs is None:
        sums[4:] = np.nan
    return torch.from_numpy(sums)


def expected_update(p, g, b, row, bound=math.inf):
    """:class:`oscopt.kernels.Hyper`'s formulas in float64: parameter, buffer."""
    row = kernels.Hyper(*row)
    p, g = p.cpu().double(), g.cpu().double()
    if b is not None and bound < math.inf:
        b = row.momentum * b.cpu().double() + row.one_minus_dampening * row.sign * g
        d = torch.where(b.isfinite(), b.clamp(-bound, bound), torch.nan)
        return p - row.lr * (d + (row.weight_decay * bound * p if row.weight_decay else 0)), b
    d = row.sign * g + (row.weight_decay * p if row.weight_decay else 0)
    if b is not None:
        b = row.momentum * b.cpu().double() + row.one_minus_dampening * d
        d = d + row.nesterov_momentum * b if row.nesterov_momentum else b
    return p - row.lr * d, b


def plan_for(name, params, grads, layer_of, num_layers):
    return kernels.Plan(params, grads, layer_of, num_layers, kernels.backend(name, params[0].device))


@st.composite
def problems(draw, most: int):
    """A list of parameters with their gradients and what is to be done with them."""
    count = draw(st.integers(1, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    mixed = draw(st.booleans())
    scale = 10.0 ** draw(st.integers(-30, 30) if dtype in DTYPES[:2] else st.integers(-2, 2))
    params, grads, prevs = [], [], []
    for _ in range(count):
        kind = draw(st.sampled_from(DTYPES)) if mixed else dtype
        if kind == torch.float16:
            scale = min(max(scale, 1e-2), 1e2)
        size, form = draw(st.sampled_from(SIZES)), draw(st.sampled_from(FORMS))
        p = make(size, form, kind, 1.0, generator)
        like = torch.empty_like(p) if kernels.dense(p) else p
        params.append(p)
        for tensors in (grads, prevs):
            values = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
            tensors.append(like.clone().copy_(values.to(kind)))
    layer_of = [draw(st.integers(-1, 3)) for _ in range(count)]
    return params, grads, prevs, layer_of


BOUNDS = st.none() | st.lists(st.sampled_from((0.0, 1e-3, 0.5, 1e4, math.inf)), min_size=4, max_size=4)


def check(name, problem, momentum, copy, row, paired, bounds):
    params, grads, prevs, layer_of = problem
    bufs = [torch.ones_like(p) if momentum and i % 3 < 2 else None for i, p in enumerate(params)]
    copies = [i % 2 == 0 for i in range(len(params))] if copy and paired else None
    before = [p.clone() for p in params], [g.clone() for g in grads], [q.clone() for q in prevs]
    old_bufs = [None if b is None else b.clone() for b in bufs]
    out = torch.empty((6, 4), dtype=torch.float64, device=DEVICE)
    plan = plan_for(name, params, grads, layer_of, 4)
    vector = None if bounds is None else torch.tensor(bounds, dtype=torch.float64, device=DEVICE)
    plan.step(grads, prevs if paired else None, bufs, copies, [0] * len(params), [row], out, None, vector)
    # Sums: float64 accumulation of exact products.
    expected = oracle(layer_of, 4, before[1], before[2] if paired else None, old_bufs, row[5])
    others = expected[3 if paired else 1]
    scale = expected[1] + torch.stack([others, others, others, others, expected[5], expected[5]])
    assert torch.equal(out.cpu().isnan(), expected.isnan())
    assert ((out.cpu() - expected).abs() <= 1e-12 * scale + 1e-300)[~expected.isnan()].all()
    # The update: within two units in the last place of what its terms allow.
    for p, q, g, x, c, y, b, b0, layer in zip(
        params, prevs, grads, before[0], before[1], before[2], bufs, old_bufs, layer_of, strict=True
    ):
        bound = bounds[layer] if bounds is not None and layer >= 0 else math.inf
        exact, exact_b = expected_update(x, c, b0, row, bound)
        eps = torch.finfo(p.dtype).eps
        decayed = row[3] * bound if bound < math.inf else 0
        size = (1 + row[0] * decayed) * x.cpu().double().abs() + row[0] * 3 * (c.cpu().double().abs() + 2)
        limit = torch.finfo(p.dtype).max
        fine = (exact.abs() < limit) & (size * eps < limit)
        difference = (p.cpu().double() - exact).abs()
        assert (difference <= 4 * eps * size + torch.finfo(p.dtype).tiny)[fine].all()
        if b is not None:
            assert ((b.cpu().double() - exact_b).abs() <= 4 * eps * (c.cpu().double().abs() + 2))[fine].all()
        assert torch.equal(g, c)
        index = next(i for i, t in enumerate(prevs) if t is q)
        assert torch.equal(q, c if copies is not None and copies[index] else y)


@pytest.mark.parametrize("name", [b for b in BACKENDS if b != "triton"])
@given(
    problem=problems(most=30),
    momentum=st.booleans(),
    copy=st.booleans(),
    full=st.booleans(),
    paired=st.booleans(),
    bounds=BOUNDS,
)
@options(max_examples=40)
def test_random_lists(name, problem, momentum, copy, full, paired, bounds):
    check(name, problem, momentum, copy, FULL if full else PLAIN, paired, bounds)


@pytest.mark.slow
@given(
    problem=problems(most=4),
    momentum=st.booleans(),
    copy=st.booleans(),
    full=st.booleans(),
    paired=st.booleans(),
    bounds=BOUNDS,
)
@options(max_examples=25)
def test_random_lists_triton(problem, momentum, copy, full, paired, bounds):
    check("triton", problem, momentum, copy, FULL if full else PLAIN, paired, bounds)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("form", ["plain", "gaps"])
def test_bounds_without_scales(name, form):
    """The rate is float64's 0.1, not float32's."""
    generator = torch.Generator().manual_seed(0)
    tensors = ([make(3, form, torch.float64, 1.0, generator) for _ in range(2)] for _ in range(3))
    check(name, (*tensors, [-1, 0]), True, False, PLAIN, False, [0.5] * 4)


@pytest.mark.parametrize("name", BACKENDS)
def test_many_and_large(name):
    """300 tensors, and one of 10^6 elements, in few layers."""
    generator = torch.Generator().manual_seed(0)
    sizes = [1 + i % 7 for i in range(300)] + [10**6]
    tensors = [[make(n, "plain", torch.float32, 1.0, generator) for n in sizes] for _ in range(3)]
    layer_of = [i % 5 for i in range(300)] + [2]
    out = torch.empty((6, 5), dtype=torch.float64, device=DEVICE)
    expected = oracle(layer_of, 5, tensors[1], tensors[2], [None] * 301)
    plan = plan_for(name, tensors[0], tensors[1], layer_of, 5)
    plan.step(tensors[1], tensors[2], [None] * 301, None, [0] * 301, [PLAIN], out)
    assert torch.allclose(out.cpu(), expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_stays_in_its_layer(name, bad):
    params = [torch.zeros(5000, device=DEVICE) for _ in range(2)]
    grads = [torch.ones(5000, device=DEVICE) for _ in range(2)]
    prevs = [torch.ones(5000, device=DEVICE) for _ in range(2)]
    grads[0][4321] = bad
    out = torch.empty((6, 2), dtype=torch.float64, device=DEVICE)
    plan = plan_for(name, params, grads, [0, 1], 2)
    plan.step(grads, prevs, [None, None], None, [0, 0], [PLAIN], out)
    assert out[:3, 0].isnan().all() and out[3, 0] == 5000
    assert out[:, 1].tolist() == [5000, 5000, 0, 5000, 0, 0]
    expected = torch.zeros(5000, device=DEVICE).add(grads[0], alpha=-0.1)
    assert torch.equal(params[0].isnan(), expected.isnan()) and torch.equal(
        params[0].isinf(), expected.isinf()
    )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("bound", [None, 0.5])
def test_infinite_parameter_without_weight_decay(name, momentum, bound):
    """0 * inf must not get in."""
    p = torch.full((5000,), torch.inf, device=DEVICE)
    bufs = [torch.ones_like(p) if momentum else None]
    bounds = None if bound is None else torch.full((1,), bound, dtype=torch.float64, device=DEVICE)
    plan = plan_for(name, [p], [p], [0], 1)
    plan.step([torch.ones_like(p)], None, bufs, None, [0], [PLAIN], None, None, bounds)
    assert p.isinf().all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_goes_through_the_bound(name, dtype):
    """As NaN where there is a bound; as in torch.optim.SGD where there is none or it is infinite."""
    bad = {17: math.nan, 4321: math.inf, 4999: -math.inf}
    params, grads, bufs = ([torch.ones(5000, dtype=dtype, device=DEVICE) for _ in range(4)] for _ in range(3))
    for g, b in zip(grads, bufs, strict=True):
        for at, value in bad.items():
            b[at] = value
        g[123] = math.inf
    bounds = torch.tensor([0.5, math.inf], dtype=torch.float64, device=DEVICE)
    out = torch.empty((6, 2), dtype=torch.float64, device=DEVICE)
    row = (0.5, 0.5, 1.0, 0.25, 0.0, 1.0)
    plan = kernels.Plan(
        params, grads, [-1, -1, 0, 1], 2, kernels.backend(name, params[0].device), [-1, 0, 0, 1]
    )
    plan.step(grads, None, bufs, None, [0] * 4, [row], out, None, bounds)
    assert out.isnan().all()  # the gradient has an infinity, the momentum a NaN
    fine = torch.ones(5000, dtype=torch.bool, device=DEVICE)
    fine[[17, 123, 4321, 4999]] = False
    for i, p in enumerate(params):
        bounded = i in (1, 2)
        assert (p[fine] == (1 - 0.5 * (0.5 + 0.25 * 0.5) if bounded else 1 - 0.5 * 1.75)).all()
        assert p[17].isnan()
        rest = p[[123, 4321, 4999]].tolist()
        assert all(map(math.isnan, rest)) if bounded else rest == [-math.inf, -math.inf, math.inf]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("measured", [False, True])
def test_bounded_steps(name, dtype, scaled, measured):
    """Clipped momentum, decoupled weight decay, Nesterov's form or not; plain steps where nothing bounds."""
    sizes, layer_of, bounds = [9000, 70, 5000, 33, 40], [1, 0, -1, 1, 2], [0.25, 2.0, math.inf]
    params, grads, bufs = (
        [torch.full((n,), v, dtype=dtype, device=DEVICE) for n in sizes] for v in (8, 2, -4)
    )
    bufs[3] = None
    for g in grads:
        g[1::2] = -0.5
    scale = [0.5, 4.0, 2.0] if scaled else [1.0] * 3
    vectors = [torch.tensor(v, dtype=torch.float64, device=DEVICE) for v in (scale, bounds)]
    row = (0.25, 0.5, 1.0, 0.125, 0.5, -1.0)
    out = torch.empty((6, 3), dtype=torch.float64, device=DEVICE) if measured else None
    plan = plan_for(name, params, grads, layer_of, 3)
    plan.step(grads, None, bufs, None, [0] * 5, [row], out, vectors[0] if scaled else None, vectors[1])
    for i, layer in enumerate(layer_of):
        lr = 0.25 * (scale[layer] if layer >= 0 else 1)
        for start, g in ((0, 2.0), (1, -0.5)):
            d = -g + 0.125 * 8
            if bufs[i] is None:
                pass
            elif layer in (0, 1):
                b = 0.5 * -4 - g
                assert (bufs[i][start::2] == b).all()
                d = min(max(b, -bounds[layer]), bounds[layer]) + 0.125 * bounds[layer] * 8
            else:
                b = 0.5 * -4 + d
                assert (bufs[i][start::2] == b).all()
                d += 0.5 * b
            assert (params[i][start::2] == 8 - lr * d).all()
    if measured:
        n = torch.tensor([70, 9000, 40], dtype=torch.float64) / 2
        assert torch.equal(out[4].cpu(), n * -(2 * -4 + -0.5 * -4)) and torch.equal(out[5].cpu(), n * 32)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_bound_beyond_the_dtype_is_none(name):
    """Of float32, in which the update is computed: weight decay then is the plain step's."""
    p, g, b = (torch.full((5000,), v, device=DEVICE) for v in (8.0, 2.0, 4.0))
    bound = torch.full((1,), 1e300, dtype=torch.float64, device=DEVICE)
    row = (0.5, 0.5, 1.0, 0.25, 0.0, 1.0)
    plan_for(name, [p], [g], [0], 1).step([g], None, [b], None, [0], [row], None, None, bound)
    assert (b == 6).all() and (p == 5).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_reruns_agree_bit_for_bit(name):
    generator = torch.Generator().manual_seed(1)
    sizes = [100_000, 5, 70_000, 33]
    first = [[make(n, "plain", torch.float32, 1.0, generator) for n in sizes] for _ in range(3)]
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        params, grads, prevs = ([t.clone() for t in tensors] for tensors in first)
        out = torch.empty((6, 2), dtype=torch.float64, device=DEVICE)
        plan_for(name, params, grads, [0, 0, 1, 1], 2).step(
            grads, prevs, [None] * 4, None, [0] * 4, [FULL], out
        )
        results.append((params, out))
    if name == "torch":  # its sums are torch's own, which depend on the number of threads
        results.pop(1)
    for params, out in results[1:]:
        assert torch.equal(out, results[0][1])
        assert all(torch.equal(a, b) for a, b in zip(params, results[0][0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("bounds", [None, [0.5, math.inf]])
def test_every_form_of_the_cpu_kernel_gives_the_same_bits(monkeypatch, dtype, momentum, paired, bounds):
    """Parts and prefetching change the speed only, with one thread and with two."""
    numba_backend = pytest.importorskip("oscopt.kernels.numba_backend")
    generator = torch.Generator().manual_seed(3)
    sizes = [100_003, 5, 33_000, 31]
    first = [[make(n, "plain", dtype, 1.0, generator).cpu() for n in sizes] for _ in range(3)]
    bound = None if bounds is None else torch.tensor(bounds, dtype=torch.float64)
    results = []
    for form in (*numba_backend._FORMS.values(), numba_backend._UNKNOWN, numba_backend.Form(64, 64)):
        monkeypatch.setattr(numba_backend, "FORM", form)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            params, grads, prevs = ([t.clone() for t in tensors] for tensors in first)
            bufs = [torch.ones_like(p) if momentum else None for p in params]
            out = torch.empty((6, 2), dtype=torch.float64)
            plan = plan_for("numba", params, grads, [0, 0, 1, 1], 2)
            pair = (prevs, [True, False] * 2) if paired else (None, None)
            plan.step(grads, pair[0], bufs, pair[1], [0] * 4, [FULL], out, None, bound)
            results.append([out, *params, *prevs, *(b for b in bufs if b is not None)])
    for tensors in results[1:]:
        for a, b in zip(tensors, results[0], strict=True):
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def test_form_is_chosen_by_the_processor():
    numba_backend = pytest.importorskip("oscopt.kernels.numba_backend")
    chosen = numba_backend.chosen_form
    assert chosen("znver4", None) == (2048, 0) and chosen("sapphirerapids", "") == (512, 2048)
    assert chosen("a processor of tomorrow", None) == numba_backend._UNKNOWN
    assert chosen("znver4", "128,1024") == (128, 1024)
    for bad in ("128", "100,0", "128,32", "0,0", "-64,0", "128,1024,1", "a,b"):
        with pytest.raises(ValueError, match="OSCOPT_CPU_FORM=.*multiples of 64"):
            chosen("znver4", bad)


@pytest.mark.parametrize("name", BACKENDS)
def test_groups_with_and_without_momentum(name):
    """Rows of hyperparameters differ by tensor, a buffer is only where it is given."""
    params = [torch.ones(5000, device=DEVICE) for _ in range(2)]
    grads = [torch.full((5000,), 2.0, device=DEVICE) for _ in range(2)]
    bufs = [torch.full((5000,), 4.0, device=DEVICE), None]
    rows = [(0.5, 0.5, 1.0, 0.0, 0.0, 1.0), (0.25, 0.0, 1.0, 0.0, 0.0, 1.0)]
    plan = plan_for(name, params, grads, [0, 1], 2)
    plan.step(grads, None, bufs, None, [0, 1], rows, None)
    assert (params[0] == 1 - 0.5 * 4).all() and (params[1] == 1 - 0.25 * 2).all()
    assert (bufs[0] == 4).all() and (grads[1] == 2).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_measuring_alone_changes_nothing(name):
    p, g, q = (torch.randn(9000, device=DEVICE) for _ in range(3))
    before = p.clone(), g.clone(), q.clone()
    out = torch.empty((6, 1), dtype=torch.float64, device=DEVICE)
    plan_for(name, [p], [g], [0], 1).step([g], [q], [None], None, [0], None, out)
    assert all(torch.equal(a, b) for a, b in zip((p, g, q), before, strict=True))
    assert torch.allclose(out.cpu(), oracle([0], 1, [g], [q], [None]))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [False, True])
def test_scale_multiplies_each_layers_rate(name, dtype, momentum):
    """A layer's own factor; what is not measured keeps its rate; measured and plain steps alike."""
    generator = torch.Generator().manual_seed(2)
    sizes, layer_of, scale = [9000, 70, 5000, 33], [1, 0, -1, 1], [4.0, 0.125]
    params = [make(n, "plain", dtype, 1.0, generator) for n in sizes]
    grads = [make(n, "plain", dtype, 1.0, generator) for n in sizes]
    vector = torch.tensor(scale, dtype=torch.float64, device=DEVICE)
    row = (0.1, 0.9, 1.0, 0.01, 0.0, 1.0) if momentum else PLAIN
    for prevs in (None, [torch.ones_like(p) for p in params]):
        bufs = [torch.ones_like(p) if momentum else None for p in params]
        before, before_bufs = [p.clone() for p in params], [None if b is None else b.clone() for b in bufs]
        out = None if prevs is None else torch.empty((6, 2), dtype=torch.float64, device=DEVICE)
        plan = plan_for(name, params, grads, layer_of, 2)
        plan.step(grads, prevs, bufs, None, [0] * 4, [row], out, vector)
        for p, x, g, b, layer in zip(params, before, grads, before_bufs, layer_of, strict=True):
            own = (row[0] * (scale[layer] if layer >= 0 else 1.0), *row[1:])
            exact, _ = expected_update(x, g, b, own)
            size = x.cpu().double().abs() + own[0] * (g.cpu().double().abs() + 2)
            assert ((p.cpu().double() - exact).abs() <= 4 * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("buffers", ["none", "some", "all"])
@pytest.mark.parametrize("updated", [False, True])
def test_what_is_not_taken_is_nan(name, paired, buffers, updated):
    """Without pairs, without momentum, in measuring alone as well."""
    generator = torch.Generator().manual_seed(4)
    params, grads, prevs, bufs = (
        [make(n, "plain", torch.float32, 1.0, generator) for n in (9000, 70, 33)] for _ in range(4)
    )
    given = {"none": None, "some": [bufs[0], None, bufs[2]], "all": bufs}[buffers]
    sign = FULL[5] if updated else 1.0
    expected = oracle([0, 0, 1], 2, grads, prevs if paired else None, given, sign)
    out = torch.empty((6, 2), dtype=torch.float64, device=DEVICE)
    hyper = [FULL] if updated else None
    plan = plan_for(name, params, grads, [0, 0, 1], 2)
    plan.step(grads, prevs if paired else None, given, None, [0] * 3, hyper, out)
    assert torch.equal(out.cpu().isnan(), expected.isnan())
    assert torch.allclose(out.cpu(), expected, rtol=1e-12, atol=1e-9, equal_nan=True)
    assert out.isnan().any(1).tolist() == [not paired, False, *[not paired] * 2, *[given is None] * 2]


def test_dense():
    x = torch.empty(4, 6, 5)
    assert kernels.dense(x) and kernels.dense(x.permute(2, 0, 1)) and kernels.dense(x[:, :, None])
    assert kernels.dense(torch.empty(())) and kernels.dense(torch.empty(0, 3)[:, :2])
    assert not kernels.dense(x[:, ::2]) and not kernels.dense(torch.empty(1).expand(4))


def test_unknown_backend():
    with pytest.raises(ValueError, match="Invalid backend: 'cublas'; use one of 'auto'"):
        kernels.backend("cublas", torch.device("cpu"))


def test_backend_on_the_wrong_device():
    with pytest.raises(RuntimeError, match="backend='numba' cannot run on device 'meta'.*backend='auto'"):
        kernels.backend("numba", torch.device("meta"))


def test_hint_without_numba(monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(kernels, "_hinted", set())
    with pytest.warns(UserWarning, match=r"numba is not installed.*pip install 'oscopt\[cpu\]'") as caught:
        names = [kernels.backend("auto", torch.device("cpu")).NAME for _ in range(3)]
    assert names == ["torch"] * 3 and len(caught) == 1


@pytest.mark.parametrize(
    "edited", [None, "__init__", "sketch", "numba_vectors", "numba_backend", "numba_sketch"]
)
def test_edited_kernels_are_compiled_anew(tmp_path, monkeypatch, edited):
    """numba's cache on disk knows the entry points by their qualified names."""
    numba_sketch = pytest.importorskip("oscopt.kernels.numba_sketch")
    copied = tmp_path / f"kernels_{edited}"
    shutil.copytree(Path(numba_sketch.__file__).parent, copied, ignore=shutil.ignore_patterns("__pycache__"))
    if edited:
        with (copied / f"{edited}.py").open("a") as file:
            file.write("# edited\n")
    monkeypatch.syspath_prepend(tmp_path)
    copy = importlib.import_module(f"{copied.name}.numba_sketch")
    for module, other in (
        (numba_sketch, copy),
        (numba_sketch.numba_backend, copy.numba_backend),
    ):
        names = [each._step.py_func.__qualname__ for each in (module, other)]
        assert (names[0] == names[1]) == (edited is None)


def test_compiling_is_told_where_it_happens(tmp_path, monkeypatch, caplog):
    """Not where a kernel is loaded from disk."""
    numba_backend = pytest.importorskip("oscopt.kernels.numba_backend")
    source = "from numba import njit\n\n\n@njit(cache=True)\ndef kernel(x):\n    return x + 1\n"
    (tmp_path / "fresh_kernel.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    told = []
    for _ in range(2):
        sys.modules.pop("fresh_kernel", None)
        numba_backend.call(importlib.import_module("fresh_kernel").kernel, (1.0,), torch.float32, 1)
        told.append([record.getMessage() for record in caplog.records])
        caplog.clear()
    assert len(told[0]) == 1 and "compiling oscopt's CPU kernel for torch.float32" in told[0][0]
    assert told[1] == []
