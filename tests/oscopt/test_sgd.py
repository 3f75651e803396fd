"""OscGD is torch.optim.SGD, on every backend: trajectories, protocol, and what else it refuses."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from helpers import BACKENDS, DEVICE, batch, small_net, train
from torch import nn

from oscopt import OscGD

COMBINATIONS = [
    {"momentum": m, "dampening": d, "weight_decay": w, "nesterov": n, "maximize": x}
    for m, d, w, n, x in itertools.product((0, 0.9), (0, 0.3), (0, 0.01), (False, True), (False, True))
    if not (n and (m == 0 or d))
]


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def assert_same(ours, theirs, exactly=True):
    for a, b in zip(ours, theirs, strict=True):
        if exactly:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda o: "-".join(f"{k[:2]}{v}" for k, v in o.items()))
def test_trajectory(backend, options):
    """50 steps with every combination of options; on a CPU bit for bit.

    Triton's interpreter rounds a fused multiply-add twice, and takes its time.
    """
    steps = 50 if backend != "triton" else 8
    lr = 0.001 if options["maximize"] else 0.05
    ours, theirs = small_net(), small_net()
    losses = train(ours, OscGD(ours.named_parameters(), lr=lr, backend=backend, **options), steps)
    wanted = train(theirs, torch.optim.SGD(theirs.parameters(), lr=lr, foreach=True, **options), steps)
    exactly = DEVICE == "cpu" and backend != "triton"
    assert_same(weights(ours), weights(theirs), exactly)
    assert losses == wanted or not exactly


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(backend, dtype):
    """The same gradients, as rounding leads trainings apart. (Fused, torch 2.11 errs in bfloat16.)"""
    x, y = batch(dtype=dtype)
    ours, theirs = small_net(dtype=dtype), small_net(dtype=dtype)
    optimizers = [
        OscGD(ours.named_parameters(), lr=0.05, momentum=0.9, backend=backend),
        torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9, foreach=True),
    ]
    for _ in range(3):
        theirs.zero_grad()
        nn.functional.cross_entropy(theirs(x), y).backward()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = q.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.02}[dtype]
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance / 10)


def test_parameter_groups_and_schedulers():
    results = []
    for kind in (OscGD, torch.optim.SGD):
        net = small_net()
        groups = [
            {"params": [("0.weight", net[0].weight), ("0.bias", net[0].bias)], "lr": 0.01, "momentum": 0.9},
            {"params": list(net[4].named_parameters()), "weight_decay": 0.1},
        ]
        optimizer = kind(groups, lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        for _ in range(10):
            train(net, optimizer, 1)
            schedule.step()
        results.append((weights(net), optimizer))
    assert_same(results[0][0], results[1][0], DEVICE == "cpu")
    lr = results[0][1].history.lr
    assert lr[0].tolist() == [0.01, 0.05] and (lr[1:] < lr[:-1]).all()


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)])
def test_changing_hyperparameters(lr):
    """Momentum switched on and off in the middle of a run; a tensor lr."""
    results = []
    for kind in (OscGD, torch.optim.SGD):
        net = small_net()
        optimizer = kind(net.parameters(), lr=lr)
        for momentum in (0.0, 0.9, 0.0, 0.5):
            optimizer.param_groups[0]["momentum"] = momentum
            train(net, optimizer, 3)
        results.append(weights(net))
    assert_same(*results, exactly=DEVICE == "cpu")


def test_momentum_buffers_of_others():
    """One taken away begins anew, as in SGD; one of another dtype or layout goes on with its values."""
    changes = [
        lambda buf: buf,
        lambda buf: None,
        lambda buf: buf.double(),
        lambda buf: buf.t().contiguous().t(),
        lambda buf: buf.clone().requires_grad_(),
    ]
    ours, theirs = ([nn.Parameter(torch.ones(4, 3)) for _ in range(2)] for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.9}
    pairs = (OscGD(ours, **options), ours), (torch.optim.SGD(theirs, **options), theirs)
    for step, change in enumerate(changes):
        for optimizer, params in pairs:
            if step:
                state = optimizer.state[params[1]]
                buf = state["momentum_buffer"]
                state["momentum_buffer"] = change(buf) if optimizer is pairs[0][0] or step == 1 else buf
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, step - 1.5 + i)
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_missing_gradients():
    """Parameters without a gradient in some steps: left alone, as SGD leaves them."""
    results = []
    for kind in (OscGD, torch.optim.SGD):
        net = small_net()
        optimizer = kind(net.named_parameters(), lr=0.1, momentum=0.9)
        for t in range(8):
            optimizer.zero_grad()
            x, y = batch()
            nn.functional.cross_entropy(net(x), y).backward()
            if t % 3 == 1:
                net[4].bias.grad = None
            optimizer.step()
        results.append((weights(net), optimizer))
    assert_same(results[0][0], results[1][0], DEVICE == "cpu")
    # The layer's pairs with other parameters are lost; the other layers' are not.
    lost = torch.from_numpy(results[0][1].history.correlation()).isnan()
    assert lost[:, 2].tolist() == [True, True, True, False, True, True, False, True]
    assert lost[:, :2].sum() == 2


def test_closure():
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.1)
    x, y = batch()

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and optimizer.step() is None


def test_hooks_run():
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(net, optimizer, 2)
    assert seen == ["before", "after"] * 2


def test_autograd_learns_of_the_update():
    """A backward pass through a parameter that was updated since must fail, as with SGD."""
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer, 1)
    x, y = batch()
    loss = nn.functional.cross_entropy(net(x), y)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("through", ["state_dict", "file", "deepcopy", "pickle"])
def test_restored_run_goes_on_as_if_never_stopped(tmp_path, through, set_to_none):
    options = {"lr": 0.05, "momentum": 0.9}
    net = small_net()
    optimizer = OscGD(net.named_parameters(), **options)
    train(net, optimizer, 6, set_to_none=set_to_none)

    half = small_net()
    first = OscGD(half.named_parameters(), **options)
    train(half, first, 3, set_to_none=set_to_none)
    if through == "deepcopy":
        other, second = copy.deepcopy((half, first))
    elif through == "pickle":
        other, second = pickle.loads(pickle.dumps((half, first)))
    else:
        state = {
            "net": half.state_dict(),
            "optimizer": first.state_dict(),
            "history": first.history.state_dict(),
        }
        if through == "file":
            torch.save(state, tmp_path / "checkpoint.pt")
            state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        other = small_net(seed=1)
        other.load_state_dict(state["net"])
        history = type(first.history).from_state_dict(state["history"])
        second = OscGD(other.named_parameters(), history=history, **options)
        second.load_state_dict(copy.deepcopy(state["optimizer"]))
    for p, q in zip(half.parameters(), other.parameters(), strict=True):
        if not set_to_none and q.grad is None:
            q.grad = torch.zeros_like(p)
    train(other, second, 3, set_to_none=set_to_none)
    assert_same(weights(other), weights(net))
    assert second.history.steps.tolist() == list(range(6))
    for name in ("dot", "sq_norm", "diff_sq_norm", "prev_sq_norm", "lr"):
        ours, wanted = getattr(second.history, name), getattr(optimizer.history, name)
        assert torch.equal(torch.from_numpy(ours).nan_to_num(-7), torch.from_numpy(wanted).nan_to_num(-7))


def test_state_from_another_memory_format():
    """Buffers saved from a channels_last model fit a contiguous one."""
    net = small_net().to(memory_format=torch.channels_last)
    optimizer = OscGD(net.named_parameters(), lr=0.05, momentum=0.9)
    train(net, optimizer, 2)
    other = small_net()
    other.load_state_dict(net.state_dict())
    second = OscGD(other.named_parameters(), lr=0.05, momentum=0.9)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    grads = [p.grad.clone() for p in net.parameters()]
    for target, opt in ((net, optimizer), (other, second)):
        for p, g in zip(target.parameters(), grads, strict=True):
            p.grad = g.clone()
        opt.step()
    assert_same(weights(other), weights(net))
    assert second.correlation.tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_model_moved_in_the_middle_of_a_run():
    """channels_last, then float64: the parameters are new memory, the run goes on."""
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.05)
    train(net, optimizer, 2)
    net.to(memory_format=torch.channels_last)
    train(net, optimizer, 2)
    assert optimizer.history.correlation()[3].tolist() == pytest.approx(optimizer.correlation.tolist())
    net.double()
    train(net, optimizer, 2, data=batch(dtype=torch.float64))
    reference = small_net()
    train(reference, torch.optim.SGD(reference.parameters(), lr=0.05), 4)
    reference.double()
    train(reference, torch.optim.SGD(reference.parameters(), lr=0.05), 2, data=batch(dtype=torch.float64))
    for a, b in zip(weights(net), weights(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["transposed", "expanded", "sliced"])
def test_parameters_and_gradients_in_other_layouts(form):
    results = []
    for kind in (OscGD, torch.optim.SGD):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(6, 8) if form != "sliced" else torch.randn(6, 16)[:, ::2])
        optimizer = kind([p], lr=0.1, momentum=0.9)
        for t in range(4):
            g = torch.randn(8, 6).t() if form != "expanded" else torch.full((1,), float(t + 1)).expand(6, 8)
            p.grad = g
            optimizer.step()
        results.append((p.detach(), optimizer))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.from_numpy(results[0][1].history.dot[1:]).isnan().any()


def test_gradient_with_a_graph():
    """create_graph=True: the kept gradient must not keep the graph."""
    p = nn.Parameter(torch.ones(3))
    optimizer = OscGD([p], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (p**3).sum().backward(create_graph=True)
        optimizer.step()
    assert optimizer.state[p]["prev_grad"].grad_fn is None
    assert optimizer.history.correlation()[1:].ravel() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"momentum": float("nan")},
        {"weight_decay": -0.1},
        {"weight_decay": float("inf")},
        {"dampening": float("nan")},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        {"every": 0},
        {"every": -3},
        {"every": 1.5},
        {"every": True},
        {"backend": "fast"},
    ],
    ids=str,
)
def test_bad_arguments(options):
    with pytest.raises(ValueError) as raised:
        OscGD(small_net().named_parameters(), **options)
    name = next(iter(options))
    wanted = {"lr": "lr|learning rate"}.get(name, name)
    assert any(word in str(raised.value).lower() for word in wanted.split("|"))


def test_bad_arguments_of_other_kinds():
    net = small_net()
    with pytest.raises(TypeError, match=r"history must be an oscopt\.History"):
        OscGD(net.parameters(), history=[])
    with pytest.raises(ValueError, match="empty parameter list"):
        OscGD([])
    with pytest.raises(TypeError, match="floating-point or complex parameters, not torch.int64"):
        OscGD([nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)])
    with pytest.raises(ValueError, match="history holds layers"):
        other = OscGD(small_net().named_parameters())
        OscGD(net.parameters(), history=other.history)
    with pytest.raises(RuntimeError, match="backend='numba' cannot run on device 'meta'"):
        OscGD([nn.Parameter(torch.zeros(3, device="meta"))], backend="numba")


def test_sparse_gradient_changes_nothing():
    embedding = nn.Embedding(5, 3, sparse=True)
    linear = nn.Linear(3, 1)
    parameters = [*linear.named_parameters("linear"), *embedding.named_parameters("embedding")]
    optimizer = OscGD(parameters, lr=0.1)
    before = weights(linear) + weights(embedding)
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradient of 'embedding.weight' is sparse.*sparse=False"):
        optimizer.step()
    assert_same(weights(linear) + weights(embedding), before)
    assert len(optimizer.history) == 0


def test_add_param_group():
    net = small_net()
    named = dict(net.named_parameters())
    optimizer = OscGD([("0.weight", named["0.weight"])], lr=0.1)
    train(net, optimizer, 3)
    optimizer.add_param_group({"params": [("4.weight", named["4.weight"])], "lr": 0.2})
    assert optimizer.layer_names == ("0", "4")
    train(net, optimizer, 3)
    correlation = torch.from_numpy(optimizer.history.correlation())
    assert correlation.shape == (6, 2)
    assert correlation.isnan()[:, 0].tolist() == [True] + 5 * [False]
    assert correlation.isnan()[:, 1].tolist() == 4 * [True] + 2 * [False]
    assert optimizer.history.lr[5].tolist() == [0.1, 0.2]


def test_add_bad_param_group_changes_nothing():
    net = small_net()
    optimizer = OscGD([("a.weight", net[0].weight)], lr=0.1)
    for bad in (
        {"params": [("b.weight", net[4].weight)], "lr": -1.0},
        {"params": [("a.weight", net[4].weight)]},
        {"params": [("c", nn.Parameter(torch.zeros(1, dtype=torch.int32), requires_grad=False))]},
    ):
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(bad)
    assert len(optimizer.param_groups) == 1 and optimizer.layer_names == ("a",)
    train(net, optimizer, 2)


def test_says_what_it_is():
    optimizer = OscGD(small_net().named_parameters(), lr=0.1)
    assert optimizer.backend == ("triton" if DEVICE == "cuda" else "numba")
    assert "3 layers" in repr(optimizer) and optimizer.step_scale.tolist() == [1.0] * 3
