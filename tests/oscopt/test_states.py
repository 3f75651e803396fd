"""States that do not fit any more: other dtypes, names; gradients that were written to."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import BACKENDS, DEVICE
from torch import nn

from oscopt import OscGD, OscMonitor
from oscopt.adapt import CosineStep, SecantStep


def parameter(size=50, **options) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(size, generator=generator).to(DEVICE, **options))


def gradient(size=50, seed=1, **options) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, **options)


def step(optimizer, *pairs):
    for p, g in pairs:
        p.grad = g
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=str)
def test_parameter_of_another_dtype(dtype, options):
    """As SGD goes on with it; the pair across the change is none or a good one."""
    results = []
    for kind in (OscGD, torch.optim.SGD):
        if kind is torch.optim.SGD:
            options = {k: v for k, v in options.items() if k == "momentum"}
        p = parameter(400_000)
        optimizer = kind([p], lr=0.1, **options)
        step(optimizer, (p, gradient(400_000)))
        p.data, p.grad = p.data.to(dtype), None
        for _ in range(2):
            step(optimizer, (p, gradient(400_000, dtype=dtype)))
        results.append((p.detach().double(), optimizer))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0.02, atol=0.02)
    assert results[0][1].correlation.cpu() == pytest.approx(1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazily_negated_gradient(backend):
    """Autograd marks imaginary parts as negated instead of writing them."""
    p = nn.Parameter(torch.ones(1, device=DEVICE))
    optimizer = OscGD([p], lr=0.1, backend=backend)
    torch.complex(torch.zeros_like(p), p).conj().mul(1 + 2j).imag.sum().backward()
    assert p.grad.item() == -1
    optimizer.step()
    assert p.item() == pytest.approx(1.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_without_memory(backend):
    """As autograd makes them: the kernels would read at address 0."""
    p = nn.Parameter(torch.ones(5, device=DEVICE))
    optimizer = OscGD([p], lr=0.5, backend=backend)
    for gradient in (torch.ones(5, device=DEVICE), torch._efficientzerotensor((5,), device=DEVICE)):
        p.grad = gradient
        optimizer.step()
        assert torch.equal(p, torch.full_like(p, 0.5))
    assert optimizer.history.dot[-1] == 0 and optimizer.history.prev_sq_norm[-1] == 5


def test_lazy_conjugate_is_refused():
    with pytest.raises(TypeError, match="lazy conjugate"):
        OscGD([nn.Parameter(torch.ones(3, dtype=torch.cfloat).conj())])


def test_a_gradient_that_was_written_to_is_not_saved():
    p = parameter()
    optimizer = OscGD([p], lr=0.01)
    step(optimizer, (p, gradient()))
    optimizer.zero_grad(set_to_none=False)
    p.grad.add_(gradient())  # the next backward pass
    restored = OscGD([p], lr=0.01)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    restored.step()
    assert restored.correlation.isnan().all()


def test_nor_is_it_kept_by_a_monitor_when_the_model_moves():
    p = parameter((8, 16))
    optimizer = torch.optim.SGD([p], lr=0.01)
    monitor = OscMonitor(optimizer, [("p", p)])
    step(optimizer, (p, gradient((8, 16))))
    p.grad.mul_(-1)
    p.data = p.data.t().contiguous().t()
    step(optimizer, (p, gradient((8, 16)).t().contiguous().t()))
    assert monitor.correlation.isnan().all()


def test_nor_is_it_kept_when_parameters_are_added():
    p, q = parameter(), parameter()
    optimizer = OscGD([("a.x", p)], lr=0.01)
    step(optimizer, (p, gradient()))
    p.grad.mul_(-1)
    optimizer.add_param_group({"params": [("b.x", q)]})
    step(optimizer, (p, gradient()), (q, gradient()))
    assert optimizer.correlation.isnan().all()


@pytest.mark.parametrize("change", ["layout", "written to", "state"])
def test_a_part_of_a_layer_is_never_paired_with_the_whole(change):
    """A parameter loses its previous gradient, and has no gradient in the next step either."""
    p, q = parameter((8, 16)), parameter((8, 16))
    optimizer = OscGD([("a.p", p), ("a.q", q)], lr=0.01)
    step(optimizer, (p, gradient((8, 16))), (q, gradient((8, 16))))
    if change == "layout":
        p.data = p.data.t().contiguous().t()
    elif change == "written to":
        p.grad.zero_()
        state = optimizer.state_dict()
        optimizer = OscGD([("a.p", p), ("a.q", q)], lr=0.01)
        optimizer.load_state_dict(state)
    else:
        del optimizer.state[p]
    step(optimizer, (p, None), (q, gradient((8, 16))))
    assert optimizer.correlation.isnan().all()
    step(optimizer, (p, None), (q, gradient((8, 16))))
    assert optimizer.correlation.cpu() == pytest.approx(1.0)


def test_one_parameters_state_taken_away():
    results = []
    for kind in (OscGD, torch.optim.SGD):
        p, q = parameter(), parameter()
        optimizer = kind([p, q], lr=0.1, momentum=0.9)
        step(optimizer, (p, gradient()), (q, gradient()))
        del optimizer.state[p]
        step(optimizer, (p, gradient()), (q, gradient()))
        results.append((p.detach(), sorted(optimizer.state_dict()["state"])))
    assert torch.allclose(results[0][0], results[1][0]) and results[0][1] == results[1][1]


@pytest.mark.parametrize("replace", [lambda state: {}, dict], ids=["nothing", "a copy"])
def test_one_parameters_state_replaced(replace):
    """As SGD goes on; the new state is the one that is written to."""
    results = []
    for kind in (OscGD, torch.optim.SGD):
        p, q = parameter(), parameter()
        optimizer = kind([p, q], lr=0.1, momentum=0.9)
        for _ in range(2):
            step(optimizer, (p, gradient()), (q, gradient()))
        optimizer.state[p] = replace(optimizer.state[p])
        step(optimizer, (p, gradient(seed=2)), (q, gradient(seed=2)))
        results.append((p.detach(), q.detach(), optimizer.state[p]["momentum_buffer"]))
        if kind is OscGD:
            assert optimizer.state[p]["prev_grad"] is p.grad
            assert optimizer.correlation.isnan().tolist() == [replace is not dict, False]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_windows_outlive_added_parameters_and_compare_the_same_ones():
    p, q = parameter(), parameter()
    optimizer = OscGD([("a.w", p), ("a.b", q)], lr=0.01)
    window = optimizer.window(2)
    step(optimizer, (p, gradient()))
    p.grad = None
    step(optimizer, (q, gradient()))
    assert window.complete and bool((window.matrix("a") != window.matrix("a")).all())
    window = optimizer.window(2)
    step(optimizer, (p, gradient()), (q, gradient()))
    optimizer.add_param_group({"params": [("c.w", parameter())]})
    step(optimizer, (p, gradient()), (q, gradient()))
    assert window.complete and window.matrix("a")[0, 1] == pytest.approx(1.0)


def initial(name: str) -> str:
    return name[0]


def through_pickle(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("layers", [initial, lambda name: name[0]], ids=["function", "lambda"])
@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle])
def test_copies_know_the_layers_of_what_is_added(way, layers):
    optimizer = OscGD([("a.w", parameter()), ("a.b", parameter())], lr=0.01, layers=layers)
    again = way(optimizer)
    assert again.layer_names == ("a",)
    if way is through_pickle and layers is not initial:  # a lambda cannot be pickled: what it said so far is
        with pytest.raises(ValueError, match="layers gives no layer for 'b.w'"):
            again.add_param_group({"params": [("b.w", parameter())]})
    else:
        again.add_param_group({"params": [("b.w", parameter())]})
        assert again.layer_names == ("a", "b")


@pytest.mark.parametrize("policy", [SecantStep(granularity="layer", lag=1), CosineStep(1.0)], ids=str)
def test_the_last_scale_is_saved_too(policy):
    runs = []
    for resumed in (False, True):
        p = parameter()
        optimizer = OscGD([p], lr=0.01, adapt=copy.deepcopy(policy))
        for t in range(8):
            if resumed and t == 4:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = OscGD([p], lr=0.01, adapt=copy.deepcopy(policy), history=optimizer.history)
                optimizer.load_state_dict(state)
            step(optimizer, (p, p.detach() * torch.linspace(1, 3, 50, device=DEVICE)))
        runs.append((p.detach(), optimizer.history.prev_step_scale))
    assert torch.equal(runs[0][0], runs[1][0]) and (runs[0][1] == runs[1][1]).all()


def test_loading_an_early_state_resets_the_policy():
    ends = []
    p = parameter()
    start = p.detach().clone()
    optimizer = OscGD([p], lr=0.01, adapt=SecantStep())
    state = copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        p.data.copy_(start)
        optimizer.load_state_dict(copy.deepcopy(state))
        for _ in range(6):
            step(optimizer, (p, p.detach() * torch.linspace(1, 3, 50, device=DEVICE)))
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


def test_adapt_excludes_differentiable():
    with pytest.raises(RuntimeError, match="`differentiable` does not support `adapt`"):
        OscGD([parameter()], adapt="cosine", differentiable=True)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@pytest.mark.parametrize("policy", ["cosine", "secant"])
def test_adapt_without_a_layer(backend, policy):
    p = parameter()
    optimizer = OscGD([("a", p)], lr=0.1, layers=lambda name: None, adapt=policy, backend=backend)
    step(optimizer, (p, gradient()))
    step(optimizer, (p, gradient()))
    assert optimizer.step_scale.shape == (0,)


def test_what_another_way_of_measuring_kept_is_dropped():
    """A previous gradient that nobody brings up to date any more would make a wrong pair later."""
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    first = OscGD([("p", p)], lr=0.1, momentum=0.9)
    p.grad = torch.full_like(p, 7.0)
    first.step()
    second = OscGD([("p", p)], lr=0.1, momentum=0.9, measure="alignment")
    second.load_state_dict(first.state_dict())
    p.grad = torch.ones_like(p)
    second.step()
    assert set(second.state[p]) == {"momentum_buffer"}
    third = OscGD([("p", p)], lr=0.1, momentum=0.9)
    third.load_state_dict(second.state_dict())
    p.grad = torch.ones_like(p)
    third.step()
    assert third.history.steps.tolist() == [2] and torch.isnan(third.correlation).all()


def test_a_history_is_of_one_optimizer():
    """One that goes on after its history was given to another raises, before anything is changed."""
    first, second = (nn.Parameter(torch.ones(3, device=DEVICE)) for _ in range(2))
    a = OscGD([("p", first)], lr=0.1)
    first.grad = torch.ones_like(first)
    a.step()
    b = OscGD([("p", second)], lr=0.1, history=a.history)
    before = first.detach().clone()
    first.grad = torch.ones_like(first)
    with pytest.raises(RuntimeError, match="handed on to another one"):
        a.step()
    assert torch.equal(first, before)
    second.grad = torch.ones_like(second)
    b.step()
    assert b.history.steps.tolist() == [0, 1]
