"""OscMonitor: measures the gradients and updates of any optimizer, and changes nothing."""

from __future__ import annotations

import gc
import weakref
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import DEVICE, batch, exact_correlations, gradients, small_net, train, train_scaled
from torch import nn

from oscopt import History, OscGD, OscMonitor

OPTIMIZERS = {
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01),
    "fused sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.01, fused=True),
    "adam": lambda net: torch.optim.Adam(net.parameters(), lr=0.01),
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=0.01, foreach=True),
    "rmsprop": lambda net: torch.optim.RMSprop(net.parameters(), lr=0.001),
    "oscgd": lambda net: OscGD(net.named_parameters(), lr=0.01),
}


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def updates(positions: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """What each step has added, in float64."""
    return [
        [(b - a).double() for a, b in zip(before, after, strict=True)]
        for before, after in zip(positions, positions[1:], strict=False)
    ]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_measures_both_and_changes_nothing(kind, set_to_none):
    results = []
    for monitored in (True, False):
        net = small_net()
        optimizer = OPTIMIZERS[kind](net)
        seen, positions = [], [weights(net)]
        if monitored:
            monitor = OscMonitor(optimizer, net.named_parameters(), what=("grad", "update"))
        optimizer.register_step_pre_hook(lambda *_, n=net, s=seen: s.append(gradients(n)))
        optimizer.register_step_post_hook(lambda *_, n=net, s=positions: s.append(weights(n)))
        train(net, optimizer, 5, set_to_none=set_to_none)
        results.append(positions)
    assert all(torch.equal(a, b) for x, y in zip(*results, strict=True) for a, b in zip(x, y, strict=True))
    first = 1 if set_to_none else 2
    for layer, members in enumerate(([0, 1], [2, 3], [4, 5])):
        wanted = exact_correlations(seen, members)
        np.testing.assert_allclose(
            monitor.history.correlation()[first:, layer], wanted[first - 1 :], atol=2e-6
        )
        wanted = exact_correlations(updates(positions), members)
        got = monitor.update_history.correlation()
        np.testing.assert_allclose(got[1:, layer], wanted, atol=2e-6)
        sizes = [sum((s[i] ** 2).sum().item() for i in members) for s in updates(positions)]
        np.testing.assert_allclose(monitor.update_history.sq_norm[:, layer], sizes, rtol=1e-6)
    np.testing.assert_allclose(monitor.update_correlation.cpu(), got[-1], rtol=1e-14)
    np.testing.assert_allclose(monitor.correlation.cpu(), monitor.history.correlation()[-1], rtol=1e-14)
    assert monitor.history.steps.tolist() == monitor.update_history.steps.tolist() == list(range(5))
    assert monitor.history.lr[0, 0] == optimizer.param_groups[0]["lr"] and monitor.layer_names == (
        "0",
        "1",
        "4",
    )


def test_every():
    net = small_net()
    optimizer = torch.optim.Adam(net.parameters())
    monitor = OscMonitor(optimizer, net.named_parameters(), ("grad", "update"), every=3)
    positions = [weights(net)]
    optimizer.register_step_post_hook(lambda *_: positions.append(weights(net)))
    train(net, optimizer, 10)
    wanted = exact_correlations(updates(positions), [4, 5])
    history = monitor.update_history
    assert history.steps.tolist() == [2, 5, 8] == monitor.history.steps.tolist()
    np.testing.assert_allclose(history.correlation()[:, 2], [wanted[t - 1] for t in (2, 5, 8)], atol=2e-6)


def test_plain_descent_moves_along_the_gradient():
    """For x_{t+1} = x_t - eta g_t the two correlations agree up to the rounding of x."""
    net = small_net().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    monitor = OscMonitor(optimizer, net.named_parameters(), ("grad", "update"))
    train(net, optimizer, 6, data=batch(dtype=torch.float64))
    np.testing.assert_allclose(
        monitor.update_history.correlation(), monitor.history.correlation(), rtol=1e-9, atol=1e-9
    )


def test_detach_leaves_no_trace():
    net = small_net()
    optimizer = torch.optim.Adam(net.parameters())
    train(net, optimizer, 1)
    before = {key: str(value) for key, value in vars(optimizer).items() if "hook" in key}
    state_keys = {k for s in optimizer.state.values() for k in s}
    with OscMonitor(optimizer, net.named_parameters(), ("grad", "update")) as monitor:
        train(net, optimizer, 3)
        kept = weakref.ref(monitor._buffers[0][0])
    assert {key: str(value) for key, value in vars(optimizer).items() if "hook" in key} == before
    assert {k for s in optimizer.state.values() for k in s} == state_keys
    history = monitor.history
    train(net, optimizer, 2)
    assert history.steps.tolist() == [0, 1, 2] and len(monitor.update_history) == 3
    held = weakref.ref(net[4].weight.grad)
    optimizer.zero_grad()
    gc.collect()
    assert kept() is None and held() is None
    monitor.detach()
    OscMonitor(optimizer, net.named_parameters(), history=history)
    train(net, optimizer, 1)
    assert history.steps.tolist() == [0, 1, 2, 3]


def test_restored():
    net = small_net()
    optimizer = torch.optim.Adam(net.parameters())
    monitor = OscMonitor(optimizer, net.named_parameters(), ("grad", "update"))
    train(net, optimizer, 3)
    state = monitor.state_dict()
    histories = [History.from_state_dict(h.state_dict()) for h in (monitor.history, monitor.update_history)]
    train(net, optimizer, 2)
    wanted = monitor.history.prev_lr
    monitor.detach()
    second = OscMonitor(
        optimizer,
        net.named_parameters(),
        ("grad", "update"),
        history=histories[0],
        update_history=histories[1],
    )
    second.load_state_dict(state)
    train(net, optimizer, 2)
    for history in (second.history, second.update_history):
        assert history.steps.tolist() == [0, 1, 2, 3, 4]
        assert not np.isnan(history.correlation()[1:]).any()
        np.testing.assert_array_equal(history.prev_lr, wanted)
    with pytest.raises(ValueError, match="state is of other parameters, such as '0.bias'"):
        OscMonitor(torch.optim.SGD([net[4].weight], lr=0.1), [("w", net[4].weight)]).load_state_dict(state)


def test_closures_are_measured_with_the_gradient_that_they_compute():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    monitor = OscMonitor(optimizer, net.named_parameters())
    x, y = batch()
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        seen.append(gradients(net))
        return loss

    for _ in range(4):
        optimizer.step(closure)
    np.testing.assert_allclose(
        monitor.history.correlation()[1:, 2], exact_correlations(seen, [4, 5]), atol=2e-6
    )


@pytest.mark.parametrize("kind", ["sgd", "fused sgd"])
def test_grad_scaler(kind):
    """Scaled or not, by the scaler or by the optimizer: the same numbers, and a skipped step is none."""
    results = []
    for scaled in (True, False):
        net = small_net()
        optimizer = OPTIMIZERS[kind](net)
        monitor = OscMonitor(optimizer, net.named_parameters(), ("grad", "update"))
        train_scaled(net, optimizer, enabled=scaled)
        results.append(monitor)
    for name in ("history", "update_history"):
        ours, wanted = (getattr(monitor, name) for monitor in results)
        assert ours.steps.tolist() == [0, 1, 2, 3]
        np.testing.assert_allclose(ours.correlation(), wanted.correlation(), atol=1e-5)
        np.testing.assert_allclose(ours.sq_norm, wanted.sq_norm, rtol=1e-4)


def test_step_that_fails_is_none():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    monitor = OscMonitor(optimizer, net.named_parameters())
    train(net, optimizer, 2)
    optimizer.param_groups[0]["lr"] = "a lot"
    with pytest.raises((TypeError, RuntimeError, ValueError)):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.01
    train(net, optimizer, 2)
    assert monitor.history.steps.tolist() == [0, 1, 2, 3]


def test_missing_gradients_and_windows():
    net = small_net()
    optimizer = torch.optim.Adam(net.parameters())
    monitor = OscMonitor(optimizer, net.named_parameters(), ("grad", "update"))
    with monitor.window(3, "update") as window:
        for t in range(6):
            optimizer.zero_grad()
            x, y = batch()
            nn.functional.cross_entropy(net(x), y).backward()
            if t == 4:
                net[4].bias.grad = None
            optimizer.step()
    lost = np.isnan(monitor.update_history.correlation())
    assert lost[:, 2].tolist() == [True, False, False, False, True, True] and lost[1:, :2].sum() == 0
    adjacent = [window.matrix()[i, i + 1] for i in range(2)]
    np.testing.assert_allclose(adjacent, monitor.update_history.global_correlation()[1:3], atol=1e-12)


def test_frozen_parameters_are_left_out():
    net = small_net()
    net[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    assert OscMonitor(optimizer, net.named_parameters()).layer_names == ("1", "4")


def test_bad_input():
    net = small_net()
    named = dict(net.named_parameters())
    optimizer = torch.optim.SGD([named["4.weight"], named["4.bias"]], lr=0.1)
    with pytest.raises(ValueError, match="holds none of the named parameters"):
        OscMonitor(optimizer, small_net().named_parameters())
    with pytest.raises(ValueError, match="does not hold parameter '0.weight' and 3 more"):
        OscMonitor(optimizer, net.named_parameters())
    with pytest.raises(TypeError, match="pass model.named_parameters"):
        OscMonitor(optimizer, net.parameters())
    with pytest.raises(ValueError, match="Invalid what: 'loss'; use 'grad'"):
        OscMonitor(optimizer, net[4].named_parameters(), "loss")
    with pytest.raises(ValueError, match="Invalid every: 0"):
        OscMonitor(optimizer, net[4].named_parameters(), every=0)
    monitor = OscMonitor(optimizer, net[4].named_parameters())
    with pytest.raises(ValueError, match="has a monitor of parameter 'weight' already"):
        OscMonitor(optimizer, net[4].named_parameters(), ("grad", "update"))
    with pytest.raises(AttributeError, match=r"measures \('grad',\) only"):
        monitor.update_history  # noqa: B018
    OscMonitor(optimizer, net[4].named_parameters(), "update")
    monitor.detach()
    OscMonitor(optimizer, net[4].named_parameters(), "grad")


@pytest.mark.parametrize("kind", ["oscgd", "monitor", "updates"])
@pytest.mark.parametrize("change", ["shape", "same memory", pytest.param("device", marks=pytest.mark.gpu)])
def test_parameter_that_changes_between_steps(kind, change):
    """It is followed, as SGD does; only its own pair is lost."""
    a, b = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(2))
    named = [("a.w", a), ("b.w", b)]
    if kind == "oscgd":
        optimizer = reader = OscGD(named, lr=0.1)
    else:
        optimizer = torch.optim.SGD([a, b], lr=0.1)
        reader = OscMonitor(optimizer, named, "grad" if kind == "monitor" else "update")
    for _ in range(2):
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        optimizer.step()
    a.grad = None
    a.data = {"shape": torch.ones(5, 3), "same memory": a.data[:2]}.get(change, a.data.to(DEVICE))
    before = a.detach().clone()
    for _ in range(2):
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        optimizer.step()
    torch.testing.assert_close(a.detach(), before - 0.2)
    history = reader.update_history if kind == "updates" else reader.history
    lost = [[True, True], [False, False], [True, False], [False, False]]
    np.testing.assert_array_equal(np.isnan(history.dot), lost)


# ---- what becomes of the optimizer -----------------------------------------------------------------------


def steps(optimizer, params, count=1):
    for _ in range(count):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()


def pieces():
    params = [nn.Parameter(torch.ones(2, device=DEVICE)) for _ in range(3)]
    return params, [(f"l{i}.w", p) for i, p in enumerate(params)]


@pytest.mark.parametrize("what", ["grad", "update"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_groups_that_are_edited(kind, what):
    """The record is of what the optimizer holds; the trajectory is the one without a monitor."""
    results = []
    for monitored in (False, True):
        params, named = pieces()
        optimizer = kind([{"params": params[:1]}, {"params": params[1:], "lr": 0.2}], lr=0.1)
        monitor = OscMonitor(optimizer, named, what) if monitored else None
        steps(optimizer, params, 2)
        group = optimizer.param_groups.pop(0)
        steps(optimizer, params, 2)
        params.append(nn.Parameter(torch.ones(3, device=DEVICE)))
        optimizer.param_groups[0]["params"][1] = params[-1]
        steps(optimizer, params, 2)
        optimizer.param_groups.append(group)
        steps(optimizer, params, 2)
        optimizer.param_groups.clear()
        optimizer.param_groups.append(group | {"params": params[:2]})
        steps(optimizer, params, 2)
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    history = monitor.history if what == "grad" else monitor.update_history
    assert history.layer_names == ("l0", "l1", "l2") and history.steps.tolist() == list(range(10))
    known = ~np.isnan(history.dot)
    assert known[:, 0].tolist() == [False, True] + [False] * 5 + [True] * 3
    assert known[:, 1].tolist() == [False] + [True] * 9
    assert known[:, 2].tolist() == [False, True, True, True] + [False] * 6
    assert history.lr[2, 1] == 0.2 and np.isnan(history.lr[2, 0])


def test_all_parameters_leave():
    params, named = pieces()
    optimizer = torch.optim.SGD(params, lr=0.1)
    monitor = OscMonitor(optimizer, named)
    steps(optimizer, params, 2)
    other = [nn.Parameter(torch.ones(2, device=DEVICE))]
    optimizer.param_groups[0]["params"] = other
    steps(optimizer, other, 2)
    assert (other[0] < 1).all() and monitor.history.steps.tolist() == [0, 1, 2, 3]
    optimizer.param_groups[0]["params"] = params
    steps(optimizer, params, 2)
    assert monitor.history.steps.tolist() == list(range(6))
    assert np.isfinite(monitor.history.correlation()[-1]).all()


class Unconvertible:
    def __sub__(self, other):
        raise RuntimeError("no number")

    __float__ = __sub__


class Own(torch.optim.SGD):
    """Finds its own rate."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p -= 0.5 * p.grad


def type_of(value):
    return type(value).__name__


NUMBERS = [0.5, 1, np.float32(0.5), np.array(0.5), Fraction(1, 2), Decimal("0.5"), torch.tensor([0.5])]
NO_NUMBERS = [None, "adaptive", "0.1", b"0.1", object(), 10**400, 1j, torch.tensor(1j), Unconvertible()]


@pytest.mark.parametrize(
    "lr, recorded",
    [*((lr, float(lr)) for lr in NUMBERS), *((lr, np.nan) for lr in NO_NUMBERS)],
    ids=type_of,
)
def test_rates_of_any_type(lr, recorded):
    """What is no number is NaN, and ends nothing."""
    params, named = pieces()
    optimizer = Own(params, lr=0.1)
    optimizer.param_groups[0]["lr"] = lr
    monitor = OscMonitor(optimizer, named)
    steps(optimizer, params, 3)
    np.testing.assert_array_equal(monitor.history.lr, np.full((3, 3), recorded))
    assert np.isnan(monitor.history.curvature()).all() == np.isnan(recorded)
    assert monitor.correlation.tolist() == pytest.approx([1, 1, 1])


def test_a_wrapper_that_only_forwards():
    class Wrapper:
        def __init__(self, inner):
            self.optimizer = inner

        def step(self):
            self.optimizer.step()

        @property
        def param_groups(self):
            return self.optimizer.param_groups

    params, named = pieces()
    with pytest.raises(TypeError, match="Wrapper, which is no torch.optim.Optimizer and holds none"):
        OscMonitor(Wrapper(None), named)
    one, other = Wrapper(None), Wrapper(None)
    one.optimizer, other.optimizer = other, one
    with pytest.raises(TypeError, match="Wrapper, which is no torch.optim.Optimizer and holds none"):
        OscMonitor(one, named)
    optimizer = Wrapper(Wrapper(torch.optim.SGD(params, lr=0.1)))
    monitor = OscMonitor(optimizer, named)
    steps(optimizer, params, 2)
    assert monitor.correlation.tolist() == pytest.approx([1, 1, 1])


def test_accelerate():
    """Its wrapper is one of torch's optimizers by its class only, and steps once in two backward passes."""
    accelerate = pytest.importorskip("accelerate")
    results = []
    for monitored in (False, True):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        net, seen = small_net(device="cpu"), []
        net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.01))
        monitor = OscMonitor(optimizer, net.named_parameters()) if monitored else None
        optimizer.optimizer.register_step_pre_hook(lambda *_, n=net, s=seen: s.append(gradients(n)))
        for seed in range(8):
            x, y = batch(seed, device="cpu")
            with accelerator.accumulate(net):
                accelerator.backward(nn.functional.cross_entropy(net(x), y))
                optimizer.step()
                optimizer.zero_grad()
        results.append(weights(net))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert monitor.history.steps.tolist() == [0, 1, 2, 3] and len(seen) == 4
    wanted = exact_correlations(seen, [4, 5])
    np.testing.assert_allclose(monitor.history.correlation()[1:, 2], wanted, atol=2e-6)


# ---- what fails ------------------------------------------------------------------------------------------


def fail_in(monkeypatch, holder, name, calls):
    """Let those calls of a method fail, counted from 0."""
    original, count = getattr(holder, name), iter(range(1000))

    def method(*args, **kwargs):
        if next(count) in calls:
            raise OSError("no space left")
        return original(*args, **kwargs)

    monkeypatch.setattr(holder, name, method)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("fails", ["grad", "update"])
def test_failure_before_or_after_the_step(monkeypatch, fails, capturable):
    """What could be measured of the step stays; the other has a row of NaN, and no pair in the next."""
    params, named = pieces()
    optimizer = torch.optim.AdamW(params, lr=0.1)
    monitor = OscMonitor(optimizer, named, ("grad", "update"), capturable=capturable)
    fail_in(monkeypatch, monitor._trackers[fails], "step", {2})
    steps(optimizer, params, 2)
    with pytest.warns(UserWarning, match="could not measure step 2 .*: no space left"):
        steps(optimizer, params, 1)
    steps(optimizer, params, 2)
    alone = pieces()[0]
    steps(torch.optim.AdamW(alone, lr=0.1), alone, 5)
    assert all(torch.equal(a, b) for a, b in zip(params, alone, strict=True))
    # What fails before the step has kept the monitor from copying the parameters.
    lost = {"grad": [0, 2, 3] if fails == "grad" else [0], "update": [0, 2, 3]}
    for what, history in (("grad", monitor.history), ("update", monitor.update_history)):
        assert history.steps.tolist() == list(range(5))
        for column in history.dot.T:
            assert np.isnan(column).nonzero()[0].tolist() == lost[what]
        assert np.isnan(history.sq_norm).all(1).nonzero()[0].tolist() == ([2] if 2 in lost[what] else [])


def test_record_that_cannot_be_written(monkeypatch):
    """Not even the row of NaN: the training and the count of steps go on."""
    params, named = pieces()
    optimizer = torch.optim.SGD(params, lr=0.1)
    monitor = OscMonitor(optimizer, named)
    fail_in(monkeypatch, monitor._trackers["grad"].log, "open", {2, 3})  # for what is measured, then for NaN
    steps(optimizer, params, 2)
    with pytest.warns(UserWarning, match="could not measure step 2 .*: no space left"):
        steps(optimizer, params, 1)
    steps(optimizer, params, 2)
    torch.testing.assert_close(params[0].detach(), torch.full((2,), 0.5, device=DEVICE))
    assert monitor.history.steps.tolist() == [0, 1, 3, 4]
    assert np.isnan(monitor.history.dot[:, 0]).tolist() == [True, False, True, False]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("what", ["grad", "update", ("grad", "update")], ids=str)
def test_edit_that_cannot_be_followed_at_once(monkeypatch, what, capturable):
    params, named = pieces()
    optimizer = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    monitor = OscMonitor(optimizer, named, what, capturable=capturable)
    steps(optimizer, params, 2)
    del optimizer.param_groups[0]
    tries = 1 if isinstance(what, str) else 2  # the last quantity's
    fail_in(monkeypatch, monitor, "_rebuild", {tries - 1})
    with pytest.warns(UserWarning, match="could not measure step 2 .*: no space left"):
        steps(optimizer, params, 1)
    steps(optimizer, params, 2)
    for key in monitor.what:
        history = monitor.history if key == "grad" else monitor.update_history
        assert history.steps.tolist() == list(range(5))
        known = np.isfinite(history.dot)
        assert known[:, 0].tolist() == [False, True, False, False, False]
        assert known[:, 1].tolist() == [False, True, False, False, True]
        assert np.isnan(history.sq_norm[2:, 0]).all() and np.isfinite(history.sq_norm[3:, 1]).all()


def test_sparse_gradients_are_nan_with_one_warning():
    torch.manual_seed(0)
    results = []
    for monitored in (False, True):
        torch.manual_seed(0)
        net = nn.ModuleDict({"table": nn.Embedding(10, 4, sparse=True), "head": nn.Linear(4, 1)}).to(DEVICE)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        monitor = OscMonitor(optimizer, net.named_parameters()) if monitored else None
        for step in range(5):
            optimizer.zero_grad()
            net["head"](net["table"](torch.arange(step, step + 3, device=DEVICE))).sum().backward()
            if monitored and step == 0:
                with pytest.warns(UserWarning, match="could not measure step 0 .* is sparse"):
                    optimizer.step()
            else:
                optimizer.step()
        results.append(list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert monitor.history.steps.tolist() == list(range(5)) and np.isnan(monitor.history.sq_norm).all()


def test_tied_weights_count_once():
    embed, head = nn.Embedding(6, 3), nn.Linear(3, 6)
    head.weight = embed.weight
    net = nn.Sequential(embed, head).to(DEVICE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = OscMonitor(optimizer, net.named_parameters(remove_duplicate=False))
    seen = []
    for seed in range(2):
        optimizer.zero_grad()
        x = torch.randint(0, 6, (5,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        nn.functional.cross_entropy(net(x), x).backward()
        seen.append(torch.cat([p.grad.double().flatten() for p in net.parameters()]))
        optimizer.step()
    assert monitor.layer_names == ("0", "1")
    expected = torch.cosine_similarity(*seen, 0).item()
    assert monitor.global_correlation.item() == pytest.approx(expected, abs=1e-6)
