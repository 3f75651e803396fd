"""Groups that are edited by hand, as much public code does: what SGD then trains, OscGD trains."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oscopt import OscGD, OscMonitor

SHAPES = ((3,), (4, 2), (), (5, 1, 2))


class Twins:
    """OscGD, with a monitor, and SGD on equal parameters, to which the same is done."""

    def __init__(self, momentum: float, layers: str, named: bool) -> None:
        self.draw = torch.Generator().manual_seed(0)
        self.ours: list[nn.Parameter] = []
        self.theirs: list[nn.Parameter] = []
        self.named = named
        index = [self.new(shape) for shape in SHAPES]
        options = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.01}
        groups = [
            [{"params": self.given(side, index[:2])}, {"params": self.given(side, index[2:]), "lr": 0.05}]
            for side in (self.ours, self.theirs)
        ]
        self.a = OscGD(groups[0], layers=layers, backend="numba", **options)
        self.b = torch.optim.SGD(groups[1], foreach=True, **options)

    def given(self, side: list[nn.Parameter], index: list[int]) -> list:
        """As the constructor and add_param_group take them."""
        return [(f"m{i}.w", side[i]) if self.named else side[i] for i in index]

    def new(self, shape: tuple[int, ...]) -> int:
        value = torch.randn(shape, generator=self.draw)
        self.ours.append(nn.Parameter(value.clone()))
        self.theirs.append(nn.Parameter(value.clone()))
        return len(self.ours) - 1

    def sides(self):
        return (self.a, self.ours), (self.b, self.theirs)

    def number(self, p: torch.Tensor) -> int:
        return next(i for i, q in enumerate(self.theirs) if q is p)

    def step(self, without: int | None = None) -> None:
        for i, (p, q) in enumerate(zip(self.ours, self.theirs, strict=True)):
            g = torch.randn(q.shape, generator=self.draw)
            p.grad, q.grad = (None, None) if i == without else (g, g.clone())
        self.a.step()
        self.b.step()
        for i, (p, q) in enumerate(zip(self.ours, self.theirs, strict=True)):
            assert torch.equal(p, q), i


def place(twins: Twins, pick: int) -> tuple[int, int] | None:
    """A group and a place in it; None: there is no parameter left."""
    places = [(g, i) for g, group in enumerate(twins.b.param_groups) for i in range(len(group["params"]))]
    return places[pick % len(places)] if places else None


def edit(twins: Twins, what: str, pick: int) -> None:
    groups = len(twins.b.param_groups)
    at = place(twins, pick)
    if what == "append" and groups:
        new = twins.new(SHAPES[pick % len(SHAPES)])
        for optimizer, params in twins.sides():
            optimizer.param_groups[pick % groups]["params"].append(params[new])
    elif what == "new group" and pick % 2:
        new = twins.new((2, 3))
        for optimizer, params in twins.sides():
            optimizer.add_param_group({"params": twins.given(params, [new]), "lr": 0.2})
    elif what == "new group" and groups:
        new = twins.new((2, 3))
        for optimizer, params in twins.sides():
            group = dict(optimizer.param_groups[0])
            optimizer.param_groups.append(group | {"params": [params[new]]})
    elif what == "pop group" and groups:
        for optimizer, _ in twins.sides():
            optimizer.param_groups.pop(pick % groups)
    elif what == "rate" and groups:
        for optimizer, _ in twins.sides():
            optimizer.param_groups[pick % groups]["lr"] *= 0.5
    elif what == "momentum" and groups:
        for optimizer, _ in twins.sides():
            optimizer.param_groups[pick % groups]["momentum"] = 0.5 if pick % 3 else 0.0
    elif what == "new list" and groups:
        for optimizer, _ in twins.sides():
            group = optimizer.param_groups[pick % groups]
            group["params"] = list(reversed(group["params"]))
    elif what == "copy":
        held = {p for group in twins.b.param_groups for p in group["params"]}
        if twins.b.state.keys() <= held:  # else SGD's state_dict raises KeyError
            for optimizer, _ in twins.sides():
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif at is None:
        return
    elif what == "remove":
        for optimizer, _ in twins.sides():
            del optimizer.param_groups[at[0]]["params"][at[1]]
    elif what == "replace":
        new = twins.new(SHAPES[pick % len(SHAPES)])
        for optimizer, params in twins.sides():
            optimizer.param_groups[at[0]]["params"][at[1]] = params[new]
    elif what == "replace with its state":
        # Pruning, as gaussian splatting does it: fewer rows, and the state is cut likewise.
        old = twins.number(twins.b.param_groups[at[0]]["params"][at[1]])
        if not twins.theirs[old].ndim or len(twins.theirs[old]) < 2:
            return
        for optimizer, params in twins.sides():
            state = optimizer.state.pop(params[old], None)
            params[old] = nn.Parameter(params[old].detach()[1:].clone())
            optimizer.param_groups[at[0]]["params"][at[1]] = params[old]
            buffer = (state or {}).get("momentum_buffer")
            if buffer is not None:
                optimizer.state[params[old]]["momentum_buffer"] = buffer[1:].clone()
    elif what == "move":
        for optimizer, _ in twins.sides():
            p = optimizer.param_groups[at[0]]["params"].pop(at[1])
            optimizer.param_groups[(at[0] + 1) % groups]["params"].append(p)
    elif what == "state":
        for optimizer, _ in twins.sides():
            optimizer.state.pop(optimizer.param_groups[at[0]]["params"][at[1]], None)


EDITS = ("append", "new group", "pop group", "rate", "momentum", "new list", "copy", "remove", "replace")
EDITS += ("replace with its state", "move", "state", "step", "without a gradient")


@given(
    momentum=st.sampled_from([0.0, 0.9]),
    layers=st.sampled_from(["module", "parameter"]),
    named=st.booleans(),
    edits=st.lists(st.tuples(st.sampled_from(EDITS), st.integers(0, 30)), min_size=1, max_size=8),
)
@settings(max_examples=60, deadline=None)
def test_random_edits(momentum, layers, named, edits):
    """Bit for bit what SGD does, and every pair that is recorded is one of this parameter's own gradients."""
    twins = Twins(momentum, layers, named)
    for what, pick in edits:
        if what == "without a gradient":
            twins.step(without=pick % len(twins.ours))
        elif what == "step":
            twins.step()
        else:
            edit(twins, what, pick)
            twins.step()
    twins.step()
    twins.step()
    history = twins.a.history
    now = history.correlation()[-1, [history.layer_names.index(n) for n in twins.a.layer_names]]
    assert np.isfinite(now).all() and (np.abs(now) <= 1).all()
    if not twins.a.param_groups:
        return
    restored = pickle.loads(pickle.dumps(twins.a))
    assert restored.layer_names == twins.a.layer_names


def one(*options, **more):
    a = nn.Parameter(torch.ones(2))
    return a, OscGD([("a.w", a)], *options, lr=0.1, **more)


def take(optimizer, *params):
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_a_parameter_that_comes_in_is_a_layer_without_a_pair():
    a, optimizer = one()
    take(optimizer, a)
    take(optimizer, a)
    b = nn.Parameter(torch.ones(2))
    optimizer.param_groups[0]["params"].append(b)
    take(optimizer, a, b)
    assert torch.equal(b, torch.full((2,), 0.9))
    assert optimizer.layer_names == ("a", "param0")
    assert optimizer.history.layer_names == ("a", "param0")
    assert optimizer.correlation[0] == pytest.approx(1) and optimizer.correlation[1].isnan()
    take(optimizer, a, b)
    assert optimizer.correlation.tolist() == pytest.approx([1, 1])
    assert np.isnan(optimizer.history.dot[:3, 1]).all() and optimizer.history.dot[3, 1] == 2


def test_a_layer_that_gains_or_loses_a_member_has_no_pair():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = OscGD([("m.a", a), ("m.b", b)], lr=0.1)
    take(optimizer, a, b)
    take(optimizer, a, b)
    assert optimizer.correlation == pytest.approx(1)
    optimizer.param_groups[0]["params"].pop()
    before = b.clone()
    take(optimizer, a, b)
    assert optimizer.correlation.isnan().all() and torch.equal(b, before)
    take(optimizer, a)
    assert optimizer.history.dot[-1].tolist() == [2.0]


def test_a_layer_that_is_gone_stays_in_the_record():
    a, optimizer = one()
    b = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [("b.w", b)]})
    for _ in range(2):
        take(optimizer, a, b)
    optimizer.param_groups.pop(0)
    for _ in range(2):
        take(optimizer, b)
    assert optimizer.layer_names == ("b",) and optimizer.history.layer_names == ("a", "b")
    np.testing.assert_array_equal(np.isnan(optimizer.history.dot[:, 0]), [True, False, True, True])
    assert optimizer.history.dot[-1, 1] == 3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_checkpoint_after_an_edit(momentum):
    a, optimizer = one(momentum=momentum)
    take(optimizer, a)
    b = nn.Parameter(torch.ones(2))
    optimizer.param_groups[0]["params"] = [b]
    if momentum:  # SGD's state_dict asks for it, too
        del optimizer.state[a]
    take(optimizer, b)
    state = copy.deepcopy(optimizer.state_dict())
    c = nn.Parameter(b.detach().clone())
    restored = OscGD([c], lr=0.1, momentum=momentum)
    restored.load_state_dict(state)
    take(optimizer, b)
    take(restored, c)
    assert torch.equal(b, c)


def test_adaptation_goes_on_across_edits():
    a, optimizer = one(adapt="cosine")
    for _ in range(3):
        take(optimizer, a)
    scale = optimizer.step_scale.clone()
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2)))
    assert optimizer.step_scale[0] == scale[0]
    take(optimizer, *optimizer.param_groups[0]["params"])
    assert len(optimizer.step_scale) == 2


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_parameter_that_is_listed_twice(momentum):
    """SGD updates it twice; it is measured once."""
    results = []
    for kind in (OscGD, torch.optim.SGD):
        p = nn.Parameter(torch.ones(4))
        optimizer = kind([p], lr=0.1, momentum=momentum)
        optimizer.param_groups[0]["params"].append(p)
        for _ in range(3):
            take(optimizer, p)
        results.append(p.detach())
        if kind is OscGD:
            assert optimizer.history.sq_norm[-1].tolist() == [4.0]
    torch.testing.assert_close(*results)


def test_a_wrong_momentum_buffer_is_an_error_before_anything_changes():
    a, optimizer = one(momentum=0.9)
    b = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [("b.w", b)]})
    take(optimizer, a, b)
    before = a.clone(), b.clone()
    optimizer.state[b]["momentum_buffer"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"'b.w' has shape \(3,\).*momentum buffer \(2,\).*change both"):
        take(optimizer, a, b)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_a_monitor_beside_sgd_through_surgery():
    """The trajectory is SGD's, whatever becomes of the groups."""
    results = []
    for monitored in (True, False):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(3, generator=generator)) for _ in range(3)]
        optimizer = torch.optim.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, momentum=0.9)
        if monitored:
            monitor = OscMonitor(optimizer, [(f"l{i}.w", p) for i, p in enumerate(params)])
        for step in range(8):
            if step == 2:
                params.append(nn.Parameter(torch.randn(5, generator=generator)))
                optimizer.param_groups[0]["params"].append(params[-1])
            if step == 4:
                optimizer.param_groups[0]["params"].pop(0)
            if step == 6:
                optimizer.param_groups.pop(1)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        results.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(monitor.history) == 8


def test_an_empty_first_group():
    a = nn.Parameter(torch.ones(2))
    optimizer = OscGD([{"params": []}], lr=0.1)
    optimizer.add_param_group({"params": [a]})
    take(optimizer, a)
    take(optimizer, a)
    assert torch.allclose(a, torch.full((2,), 0.8))
    assert optimizer.correlation.tolist() == pytest.approx([1])


def test_lazy_modules():
    """Their parameters have memory from the first forward pass on."""
    results = []
    for kind in (OscGD, torch.optim.SGD):
        torch.manual_seed(0)
        net = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2))
        options = {"foreach": True} if kind is torch.optim.SGD else {}
        optimizer = kind(net.named_parameters(), lr=0.1, **options)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.ones(5, 3)).square().sum().backward()
            optimizer.step()
        results.append([p.detach() for p in net.parameters()])
        if kind is OscGD:
            assert optimizer.layer_names == ("0", "2") and optimizer.correlation.isfinite().all()
    assert all(torch.allclose(a, b) for a, b in zip(*results, strict=True))


def test_gradients_of_another_dtype_pair_after_a_load():
    p = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = OscGD([p], lr=0.01)
    generator = torch.Generator().manual_seed(0)
    seen = []

    def step(optimizer):
        seen.append(torch.randn(64, generator=generator))
        p.grad = None
        p.grad_dtype = torch.float32
        p.grad = seen[-1].clone()
        optimizer.step()

    step(optimizer)
    restored = OscGD([p], lr=0.01)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(restored)
    expected = torch.cosine_similarity(*seen, 0).item()
    assert restored.correlation.item() == pytest.approx(expected, abs=0.02)
