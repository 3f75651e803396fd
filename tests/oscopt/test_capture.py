"""capturable=True: steps that a CUDA graph replays, or what behaves like one where there is no GPU."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from graph import FakeGraph
from helpers import BACKENDS, DEVICE, batch, small_net, train
from torch import nn

from oscopt import History, OscGD, OscMonitor, device_log
from oscopt.adapt import CosineStep, SecantStep

pytestmark = pytest.mark.slow

WARM, STEPS = 3, 6
CASES = {
    "plain": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "dampening": {"momentum": 0.9, "dampening": 0.5, "maximize": True},
    "auto": {"adapt": "auto", "weight_decay": 0.1},
    "auto, alignment": {"adapt": "auto", "measure": "alignment"},
    "alignment": {"momentum": 0.9, "measure": "alignment"},
    "cosine": {"adapt": CosineStep(beta=0.2), "momentum": 0.5},
    "secant": {"adapt": SecantStep()},
    "parameters": {"layers": "parameter"},
    "some layers": {"layers": lambda name: "first" if name.startswith("a") else None},
}
EVERYTHING = (
    "steps",
    "dot",
    "sq_norm",
    "diff_sq_norm",
    "prev_sq_norm",
    "alignment",
    "momentum_sq_norm",
    "correlation_stderr",
    "lr",
    "prev_lr",
)
EVERYTHING += ("step_scale", "prev_step_scale")


def parameters(dtype=torch.float32) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (30, 300), "a.bias": (30,), "b.weight": (300, 7), "c.weight": (), "c.bias": (0,)}
    return [
        (name, nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)))
        for name, shape in shapes.items()
    ]


def gradients(dtype=torch.float32) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(p.shape, generator=generator).to(DEVICE, dtype) for _, p in parameters()]
        for _ in range(STEPS)
    ]


def rate(step: int) -> float:
    return 0.125 * (1 + step % 4)


def make(named, options, **more) -> OscGD:
    return OscGD(named, **copy.deepcopy(options) | more)


def eager(named, optimizer, grads, steps=range(STEPS)) -> None:
    for i in steps:
        for (_, p), g in zip(named, grads[i], strict=True):
            p.grad = g.clone()
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate(i))
            else:
                group["lr"] = rate(i)
        optimizer.step()


def replayed(named, optimizer, grads, monkeypatch) -> None:
    """Some steps, a capture, which is a step, and replays for the others."""
    eager(named, optimizer, grads, range(WARM))
    graph = FakeGraph(monkeypatch)
    static = [torch.empty_like(g) for g in grads[0]]
    for i in range(WARM, STEPS):
        torch._foreach_copy_(static, grads[i])
        optimizer.param_groups[0]["lr"].fill_(rate(i))
        if i == WARM:
            for (_, p), g in zip(named, static, strict=True):
                p.grad = g
            with graph.capture():
                optimizer.step()
        else:
            graph.replay()


def same_history(a, b) -> None:
    for name in EVERYTHING:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_as_without(case, backend):
    grads = gradients()
    usual, capturable = parameters(), parameters()
    a = make(usual, CASES[case], lr=1.0, backend=backend)
    b = make(capturable, CASES[case], lr=torch.tensor(1.0, device=DEVICE), backend=backend, capturable=True)
    eager(usual, a, grads)
    eager(capturable, b, grads)
    for (_, p), (_, q) in zip(usual, capturable, strict=True):
        # The torch backend rounds lr * d before it subtracts it, where lr is a tensor.
        assert torch.equal(p, q) if backend != "torch" else torch.allclose(p, q, rtol=1e-5, atol=1e-6)
    if backend != "torch":
        same_history(a.history, b.history)
        assert torch.equal(a.step_scale, b.step_scale)
        torch.testing.assert_close(a.correlation, b.correlation, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(a.global_correlation, b.global_correlation, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in CASES),
        ("momentum", torch.bfloat16),
    ],
    ids=str,
)
def test_replays_are_steps(case, dtype, monkeypatch):
    grads = gradients(dtype)
    usual, captured = parameters(dtype), parameters(dtype)
    a = make(usual, CASES[case], lr=1.0, backend="triton")
    b = make(captured, CASES[case], lr=torch.tensor(1.0, device=DEVICE), backend="triton", capturable=True)
    eager(usual, a, grads)
    replayed(captured, b, grads, monkeypatch)
    for (name, p), (_, q) in zip(usual, captured, strict=True):
        assert torch.equal(p, q), name
    same_history(a.history, b.history)
    assert torch.equal(a.step_scale, b.step_scale)
    assert b.state_dict()["param_groups"][0]["step"] == STEPS
    assert b.state_dict()["param_groups"][0]["prev_lr"] == rate(STEPS - 1)


def test_groups_of_layers_and_rates_of_groups(monkeypatch):
    """Two groups with rates of their own, one of them a number; a layer lies in both."""
    grads = gradients()

    def groups(named, lr):
        return [
            {"params": named[:2], "lr": lr},
            {"params": named[2:], "lr": 0.75, "weight_decay": 0.1},
        ]

    layers = {"a.weight": "a", "a.bias": None, "b.weight": "both", "c.weight": "c", "c.bias": "c"}
    layers["a.weight"] = "both"
    usual, captured = parameters(), parameters()
    a = OscGD(groups(usual, 1.0), layers=layers, adapt="cosine", backend="triton")
    lr = torch.tensor(1.0, device=DEVICE)
    b = OscGD(groups(captured, lr), layers=layers, adapt="cosine", backend="triton", capturable=True)
    for i in range(WARM):
        for named, optimizer in ((usual, a), (captured, b)):
            for (_, p), g in zip(named, grads[i], strict=True):
                p.grad = g.clone()
            optimizer.step()
    graph = FakeGraph(monkeypatch)
    for i in range(WARM, STEPS):
        a.param_groups[0]["lr"] = rate(i)
        lr.fill_(rate(i))
        for (_, p), (_, q), g in zip(usual, captured, grads[i], strict=True):
            p.grad = g.clone()
            q.grad.copy_(g)
        a.step()
        if i > WARM:
            graph.replay()
            continue
        with graph.capture():
            b.step()
    for (name, p), (_, q) in zip(usual, captured, strict=True):
        assert torch.equal(p, q), name
    same_history(a.history, b.history)
    assert np.isnan(b.history.lr[:, 0]).all() and (b.history.lr[:, 1] == 0.75).all()


def warm(**options) -> tuple[list, OscGD]:
    named = parameters()
    optimizer = OscGD(named, lr=options.pop("lr", 0.1), backend="triton", **{"capturable": True} | options)
    eager(named, optimizer, gradients(), range(WARM))
    return named, optimizer


def test_live_reading_between_replays(monkeypatch):
    named, optimizer = warm()
    graph = FakeGraph(monkeypatch)
    with graph.capture():
        optimizer.step()
    assert list(optimizer.history.drain().steps) == [0, 1, 2, 3]
    for _ in range(2):
        graph.replay()
    assert list(optimizer.history.drain().steps) == [4, 5]
    assert len(optimizer.history.drain()) == 0
    graph.replay()
    assert len(optimizer.history) == 7 and optimizer.history.next_step == 7
    # The same gradient again and again.
    np.testing.assert_allclose(optimizer.history.correlation()[4:, :2], 1.0)
    torch.testing.assert_close(optimizer.correlation[:2].cpu(), torch.ones(2, dtype=torch.float64))
    eager(named, optimizer, gradients(), [3])
    assert optimizer.history.next_step == 8 and abs(optimizer.history.correlation()[-1, 0]) < 0.1


def test_what_was_overwritten_is_missing_and_said(monkeypatch):
    monkeypatch.setattr(device_log, "LEAST", 4)
    monkeypatch.setattr(device_log, "MOST", 4)
    _, optimizer = warm()
    graph = FakeGraph(monkeypatch)
    with graph.capture():
        optimizer.step()
    for _ in range(6):
        graph.replay()
    with pytest.warns(UserWarning, match="4 steps are not in the history.*at least every 4 steps"):
        steps = optimizer.history.steps
    assert list(steps) == [0, 1, 6, 7, 8, 9]


def test_without_a_graph_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(device_log, "LEAST", 4)
    monkeypatch.setattr(device_log, "MOST", 4)
    net, twin = small_net(), small_net()
    a = OscGD(net.named_parameters(), lr=0.1)
    b = OscGD(twin.named_parameters(), lr=0.1, capturable=True)
    train(net, a, 11)
    train(twin, b, 11)
    same_history(a.history, b.history)


@pytest.mark.parametrize("kept", ["state", "pickle", "deepcopy", "from SGD's kind", "to SGD's kind"])
def test_goes_on_from_a_state(kept):
    def new(net, **options):
        return OscGD(net.named_parameters(), lr=0.1, momentum=0.9, adapt="cosine", **options)

    whole, first = small_net(), small_net()
    usual = new(whole)
    train(whole, usual, 8)
    begun = new(first, capturable=kept != "from SGD's kind")
    train(first, begun, 4)
    if kept in ("pickle", "deepcopy"):
        pair = (first, begun)
        if kept == "deepcopy":
            second, resumed = copy.deepcopy(pair)
        else:
            buffer = io.BytesIO()
            torch.save(pair, buffer)
            buffer.seek(0)
            second, resumed = torch.load(buffer, weights_only=False)
    else:
        second = small_net()
        second.load_state_dict(first.state_dict())
        resumed = new(second, capturable=kept != "to SGD's kind", history=copy.deepcopy(begun.history))
        resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    train(first, begun, 1)  # must not show in the other
    train(second, resumed, 4)
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    same_history(usual.history, resumed.history)


def test_a_group_that_comes_later():
    grads = gradients()
    optimizers = []
    for capturable in (False, True):
        named = parameters()
        optimizer = OscGD(named[:3], lr=1.0, capturable=capturable)
        eager(named[:3], optimizer, [g[:3] for g in grads], range(3))
        optimizer.add_param_group({"params": named[3:]})
        eager(named, optimizer, grads, range(3, 6))
        optimizers.append((named, optimizer))
    (usual, a), (other, b) = optimizers
    for (_, p), (_, q) in zip(usual, other, strict=True):
        assert torch.equal(p, q)
    same_history(a.history, b.history)


def test_an_lr_of_zero_and_zero_gradients_is_a_step_but_the_first(monkeypatch):
    """The first is torch.distributed.checkpoint's way to make a state."""
    named = parameters()
    optimizer = OscGD(named, lr=0.0, capturable=True)
    for _, p in named:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert len(optimizer.history) == 0
    for _, p in named:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        optimizer.step()
    for _, p in named:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert list(optimizer.history.steps) == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 10}, ValueError, "every: 10 with capturable=True"),
        ({"differentiable": True}, RuntimeError, "`capturable` does not support `differentiable`"),
    ],
)
def test_what_it_excludes(options, error, message):
    with pytest.raises(error, match=message):
        OscGD(parameters(), capturable=True, **options)


def test_captures_that_cannot_be(monkeypatch):
    def captured(optimizer):
        with FakeGraph(monkeypatch).capture():
            optimizer.step()

    def unchanged(named, optimizer, error, message):
        before = [p.detach().clone() for _, p in named]
        with pytest.raises(error, match=message):
            captured(optimizer)
        assert all(torch.equal(p, q) for (_, p), q in zip(named, before, strict=True))

    named, optimizer = warm(capturable=False)
    unchanged(named, optimizer, RuntimeError, "make it with capturable=True")
    named = parameters()
    optimizer = OscGD(named, lr=0.1, backend="triton", capturable=True)
    for _, p in named:
        p.grad = torch.ones_like(p)
    unchanged(named, optimizer, RuntimeError, "take 3 such steps")
    named, optimizer = warm()
    named[0][1].grad, named[1][1].grad = None, None
    eager(named[2:], optimizer, [g[2:] for g in gradients()], [0])
    named[0][1].grad = torch.ones_like(named[0][1])
    unchanged(named, optimizer, RuntimeError, "take 3 such steps")
    named, optimizer = warm()
    named[0][1].grad = None
    unchanged(named, optimizer, RuntimeError, "take 3 such steps")
    named, optimizer = warm()
    optimizer.param_groups[0]["weight_decay"] = 0.1
    unchanged(named, optimizer, RuntimeError, "something has changed since the last step")
    named, optimizer = warm()
    with optimizer.window(3):
        unchanged(named, optimizer, RuntimeError, "a window is open")
    named, optimizer = warm(adapt=CosineStep(warmup=10))
    unchanged(named, optimizer, RuntimeError, "warming up")
    named, optimizer = warm(adapt=Alternating())
    unchanged(named, optimizer, RuntimeError, "does not do the same in every step")
    named, optimizer = warm(lr=torch.tensor(0.1, device="cpu"))
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
    unchanged(named, optimizer, RuntimeError, "lr is a tensor on meta")
    named, optimizer = warm()
    kept = []  # so that every capture finds its gradients at another place
    for n in range(9):
        kept.append([torch.ones_like(p) for _, p in named])
        for (_, p), g in zip(named, kept[-1], strict=True):
            p.grad = g
        if n < 8:
            captured(optimizer)
    unchanged(named, optimizer, RuntimeError, "tables made ahead for captures are used up")
    eager(named, optimizer, gradients(), [3])
    captured(optimizer)  # as the message says


class Alternating:
    """A policy that a replay would not follow."""

    capturable = False

    def __call__(self, measured):
        return torch.full_like(measured.scale, 1.0 + measured.steps % 2)


class Descent(torch.optim.Optimizer):
    """That never asks for a value: torch's SGD does so on CPUs."""

    def __init__(self, params, lr) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


def test_a_monitor_of_a_captured_optimizer(monkeypatch):
    options = {"what": ("grad", "update"), "backend": "triton"}
    grads = gradients()
    usual, captured = parameters(), parameters()
    rates = torch.tensor(1.0), torch.tensor(1.0, device=DEVICE)  # a rate on a GPU is read by graphs only
    a, b = map(Descent, (usual, captured), rates)
    expected = OscMonitor(a, usual, **options)
    monitor = OscMonitor(b, captured, capturable=True, **options)
    eager(usual, a, grads)
    replayed(captured, b, grads, monkeypatch)
    for (name, p), (_, q) in zip(usual, captured, strict=True):
        assert torch.equal(p, q), name
    assert len(expected.history) == len(expected.update_history) == STEPS
    same_history(expected.history, monitor.history)
    same_history(expected.update_history, monitor.update_history)
    torch.testing.assert_close(expected.correlation, monitor.correlation, rtol=0, atol=0, equal_nan=True)
    state = monitor.state_dict()
    assert state["step"] == STEPS and state["prev_lr"] == [rate(STEPS - 1)]
    monitor.load_state_dict(state)
    eager(captured, b, grads, [0])
    assert monitor.history.next_step == monitor.update_history.next_step == STEPS + 1
    assert np.isfinite(monitor.history.correlation()[-1, 0])


def test_a_monitor_that_cannot_be_captured(monkeypatch):
    named = parameters()
    optimizer = Descent(named, lr=0.1)
    with pytest.raises(ValueError, match="every: 2 with capturable=True"):
        OscMonitor(optimizer, named, capturable=True, every=2)
    with OscMonitor(optimizer, named, backend="triton"):
        eager(named, optimizer, gradients(), range(WARM))
        with (
            pytest.raises(RuntimeError, match="make it with capturable=True"),
            FakeGraph(monkeypatch).capture(),
        ):
            optimizer.step()
    with OscMonitor(optimizer, named, backend="triton", capturable=True):
        with pytest.raises(RuntimeError, match="take 3 such steps"), FakeGraph(monkeypatch).capture():
            optimizer.step()
        optimizer.found_inf = torch.zeros(())
        with pytest.raises(RuntimeError, match="GradScaler"), FakeGraph(monkeypatch).capture():
            optimizer.step()


def test_graphs_of_different_parameters_in_turn(monkeypatch):
    """Two heads: a layer of which another part had a gradient in the step before has no pair."""
    layers = {"a.weight": "a", "a.bias": "a", "b.weight": "b", "c.weight": "c", "c.bias": "c"}
    parts = {"first": [0, 1, 3], "second": [0, 2, 3, 4], "all": [0, 1, 2, 3, 4]}
    order = ["first"] * 3 + ["second"] * 3 + ["all"] * 3
    order += ["first", "second", "second", "first", "all", "first"]
    for options in ({}, {"momentum": 0.9}):
        usual, captured = parameters(), parameters()
        a = OscGD(usual, lr=0.1, layers=layers, backend="triton", **options)
        b = OscGD(captured, lr=0.1, layers=layers, backend="triton", capturable=True, **options)
        static = [torch.zeros_like(p) for _, p in captured]
        graphs: dict[str, FakeGraph] = {}
        for step, name in enumerate(order):
            generator = torch.Generator().manual_seed(step)
            for i, ((_, p), (_, q)) in enumerate(zip(usual, captured, strict=True)):
                g = torch.randn(p.shape, generator=generator).to(DEVICE)
                static[i].copy_(g)
                p.grad, q.grad = (g, static[i]) if i in parts[name] else (None, None)
            a.step()
            if name in graphs:
                graphs[name].replay()
            elif step >= 2 and order[step - 2 : step] == [name] * 2:
                graphs[name] = FakeGraph(monkeypatch)
                with graphs[name].capture():
                    b.step()
            else:
                b.step()
        assert len(graphs) == 3
        for (name, p), (_, q) in zip(usual, captured, strict=True):
            assert torch.equal(p, q), name
        same_history(a.history, b.history)
        missing = np.isnan(b.history.dot)
        assert missing[9:].any() and not missing[9:].all()


def test_what_a_graph_uses_stays(monkeypatch):
    """Whatever the optimizer does later."""

    def without_gradients(named, optimizer):
        optimizer.zero_grad()
        optimizer.step()

    def other_momentum(named, optimizer):
        optimizer.param_groups[0]["momentum"] = 0.5
        eager(named, optimizer, gradients(), [0])

    def another_group(named, optimizer):
        optimizer.add_param_group({"params": [("d", nn.Parameter(torch.zeros(3, device=DEVICE)))]})

    def another_state(named, optimizer):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        eager(named, optimizer, gradients(), [0])

    def no_state(named, optimizer):
        optimizer.state.clear()
        eager(named, optimizer, gradients(), [0])

    changes = (without_gradients, other_momentum, another_group, another_state, no_state)
    for change in changes:
        named, optimizer = warm(momentum=0.9, adapt=SecantStep())
        graph = FakeGraph(monkeypatch)
        with graph.capture():
            optimizer.step()
        change(named, optimizer)
        assert len(optimizer.history) >= WARM + 1
        assert graph.dangling() == 0, change.__name__
        del optimizer
        for _, p in named:
            p.grad = None
        assert graph.dangling() > 0  # it can tell


def test_capturing_anew_holds_nothing_more(monkeypatch):
    """What graphs use is kept for them, once."""
    named, optimizer = warm(momentum=0.9)
    plans = [plan for plans in optimizer._tracker.table.all_plans() for _, plan in plans]
    batches = [batch for plan in plans for _, batch, _ in plan._batches]
    held = []
    for _ in range(12):  # more than there are spare tables
        graph = FakeGraph(monkeypatch)
        with graph.capture():
            optimizer.step()
        held.append((len(optimizer._tracker._captured[1]), *(len(batch._captured) for batch in batches)))
    assert held == held[:1] * 12
    for _, p in named:
        p.grad = p.grad.clone()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    eager(named, optimizer, gradients(), [0, 1, 2])
    old = optimizer._tracker._captured[0]
    with FakeGraph(monkeypatch).capture():
        optimizer.step()
    assert optimizer._tracker._captured[0] is not old  # what the table before used is let go


def test_a_policy_that_keeps_what_it_is_shown(monkeypatch):
    class Keeping:
        start = 0.5

        def __call__(self, measured):
            last, before = measured.state.get("last"), measured.state.get("before")
            factor = 1.5 if before is None else torch.where(last + before > measured.dot, 1.25, 0.75)
            before = measured.dot if last is None else last
            return measured.scale * factor, {"scale": measured.scale, "before": before, "last": measured.dot}

    grads = gradients()
    usual, captured = parameters(), parameters()
    a = OscGD(usual, lr=1.0, adapt=Keeping(), backend="triton")
    lr = torch.tensor(1.0, device=DEVICE)
    b = OscGD(captured, lr=lr, adapt=Keeping(), backend="triton", capturable=True)
    eager(usual, a, grads)
    replayed(captured, b, grads, monkeypatch)
    same_history(a.history, b.history)
    scale = b.step_scale
    eager(captured, b, grads, [0])
    assert torch.equal(a.step_scale, scale) and not torch.equal(b.step_scale, scale)


def test_momentum_that_begins_in_a_capture(monkeypatch):
    for backend in ("triton", "torch"):
        named = parameters()
        optimizer = OscGD(named, lr=0.1, dampening=0.5, backend=backend, capturable=True)
        eager(named, optimizer, gradients(), range(WARM))
        optimizer.param_groups[0]["momentum"] = 0.9
        with pytest.raises(RuntimeError, match="no momentum buffer yet"), FakeGraph(monkeypatch).capture():
            optimizer.step()
        eager(named, optimizer, gradients(), [0])
        for (_, p), g in zip(named, gradients()[0], strict=True):
            assert torch.equal(optimizer.state[p]["momentum_buffer"], g)


def test_a_bounded_record_and_few_files(tmp_path):
    records = []
    for capturable in (False, True):
        folder = tmp_path / str(capturable)
        p = nn.Parameter(torch.ones(3, device=DEVICE))
        optimizer = OscGD([("p", p)], lr=1e-3, capturable=capturable, history=History(limit=512))
        optimizer.history.stream_to(folder)
        for i in range(1100):
            p.grad = torch.full_like(p, float(i % 7))
            optimizer.step()
            if i % 50 == 0:
                optimizer.history.drain()
        optimizer.history.flush()
        records.append((optimizer.history, len(list(folder.iterdir())), History.load(folder)))
    (usual, files, whole), (other, other_files, other_whole) = records
    same_history(usual, other)
    same_history(whole, other_whole)
    assert len(other) <= 512 and other_files == files and len(other_whole) == 1100


def test_a_history_belongs_to_one(monkeypatch):
    first, second = parameters(), parameters()
    a = OscGD(first, lr=0.1, capturable=True)
    eager(first, a, gradients(), range(2))
    with pytest.raises(ValueError, match="history holds layers"):
        OscGD(first, lr=0.1, capturable=True, layers="parameter", history=a.history)
    eager(first, a, gradients(), range(2))
    assert len(a.history) == 4
    for capturable in (True, False):
        b = OscGD(second, lr=0.1, capturable=capturable, history=a.history)
        assert len(b.history) == b.param_groups[0]["step"]
        before = [p.detach().clone() for _, p in first]
        with pytest.raises(RuntimeError, match="handed on"):
            eager(first, a, gradients(), [0])
        assert all(torch.equal(p, q) for (_, p), q in zip(first, before, strict=True))
        eager(second, b, gradients(), range(2))
    assert list(b.history.steps) == list(range(8))


def test_groups_without_measured_parameters():
    named = parameters()
    optimizer = OscGD(named, lr=0.1, capturable=True)
    eager(named, optimizer, gradients(), range(2))
    optimizer.add_param_group({"params": [], "param_names": []})
    eager(named, optimizer, gradients(), range(2))
    assert optimizer.state_dict()["param_groups"][0]["step"] == 4
    descent = Descent(named[:3], lr=0.1)
    monitor = OscMonitor(descent, named[:3], capturable=True)
    eager(named[:3], descent, [g[:3] for g in gradients()], range(2))
    descent.add_param_group({"params": named[3:], "lr": 0.5})
    eager(named, descent, gradients(), range(2))
    monitor.load_state_dict(monitor.state_dict())
    eager(named, descent, gradients(), [2])
    assert len(monitor.history) == 5 and monitor.history.layer_names == ("a", "b")


def test_a_window_does_not_bridge_replays(monkeypatch):
    named, optimizer = warm()
    graph = FakeGraph(monkeypatch)
    with graph.capture():
        optimizer.step()
    for replays, missing in ((0, False), (2, True)):
        with optimizer.window(2) as window:
            eager(named, optimizer, gradients(), [0])
            for _ in range(replays):
                graph.replay()
            eager(named, optimizer, gradients(), [1])
        assert np.isnan(window.matrix()).all() == missing


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"adapt": "cosine"}], ids=str)
def test_a_real_graph_of_a_whole_training_step(options):
    x, y = batch()
    usual, net = small_net(), small_net()
    a = OscGD(usual.named_parameters(), lr=0.01, **options)
    train(usual, a, 12)
    lr = torch.tensor(0.01, device="cuda")
    optimizer = OscGD(net.named_parameters(), lr=lr, capturable=True, **options)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        step()
    for _ in range(9):
        graph.replay()
    for p, q in zip(usual.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert list(optimizer.history.steps) == list(range(12))
    np.testing.assert_allclose(a.history.correlation(), optimizer.history.correlation(), atol=1e-3)
    lr.zero_()
    before = [p.detach().clone() for p in net.parameters()]
    graph.replay()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
