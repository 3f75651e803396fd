"""measure="sketch": what OscGD and OscMonitor make of it, and the correlation of any two steps."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from graph import FakeGraph
from helpers import BACKENDS, DEVICE
from torch import nn

from oscopt import History, OscGD, OscMonitor
from oscopt.kernels.sketch import kept_size
from oscopt.previous import SEED, SKETCH

FAST = "torch"  # what follows does not depend on the backend, and nothing has to be compiled
STEPS = 5


def net(dtype=torch.float32, seed: int = 0) -> nn.Module:
    """Three layers, the first two of which are sketched."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(60, 300), nn.ReLU(), nn.Linear(300, 70), nn.ReLU(), nn.Linear(70, 10))
    return model.to(DEVICE, dtype)


def train(model, optimizer, steps: int = STEPS, *, first: int = 0, set_to_none: bool = True) -> list:
    """Another batch each step; the gradients, joined, float64, one a layer and step."""
    seen = []
    for t in range(first, first + steps):
        generator = torch.Generator().manual_seed(t // 2)
        dtype = next(model.parameters()).dtype
        x = torch.randn(32, 60, generator=generator).to(DEVICE, dtype)
        y = torch.randint(0, 10, (32,), generator=generator).to(DEVICE)
        optimizer.zero_grad(set_to_none=set_to_none)
        nn.functional.cross_entropy(model(x).float(), y).backward()
        layers = [
            torch.cat([p.grad.flatten() for p in m.parameters()]) for m in model if isinstance(m, nn.Linear)
        ]
        seen.append([g.double().cpu() for g in layers])
        optimizer.step()
    return seen


def exact(seen, later: int = 1) -> np.ndarray:
    """Correlations of gradients `later` steps apart, (steps - later, layers)."""
    return np.array(
        [
            [(a @ b / (a.norm() * b.norm())).item() for a, b in zip(one, two, strict=True)]
            for one, two in zip(seen, seen[later:], strict=False)
        ]
    )


def close(history, seen) -> None:
    """The record is right within five of its standard errors, and exact where it says so."""
    found, stderr = history.correlation()[1:], history.correlation_stderr[1:]
    assert np.isfinite(stderr).all() and (stderr[:, :2] > 0).all() and (stderr[:, 2] == 0).all()
    assert (np.abs(found - exact(seen)) <= 5 * stderr + 1e-5).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_trajectory_of_exact_and_its_correlations(backend, momentum):
    usual, sketched = net(), net()
    options = {"lr": 0.3, "momentum": momentum, "backend": backend}
    a = OscGD(usual.named_parameters(), **options)
    b = OscGD(sketched.named_parameters(), measure="sketch", **options)
    steps = 3 if backend == "triton" else STEPS
    train(usual, a, steps)
    seen = train(sketched, b, steps)
    for p, q in zip(usual.parameters(), sketched.parameters(), strict=True):
        assert torch.equal(p, q)
    close(b.history, seen)
    np.testing.assert_allclose(b.history.sq_norm, a.history.sq_norm, rtol=1e-12)
    assert np.isnan(b.history.alignment).all()
    assert np.isnan(b.history.correlation()[0]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype):
    model = net(dtype)
    optimizer = OscGD(model.named_parameters(), lr=0.1, measure="sketch", backend=FAST)
    close(optimizer.history, train(model, optimizer))


def test_complex_parameters_are_their_real_and_imaginary_parts():
    p = nn.Parameter(torch.randn(100, 120, dtype=torch.complex64, device=DEVICE))
    optimizer = OscGD([("p", p)], lr=0.1, measure="sketch", backend=FAST)
    grads = [torch.randn_like(p) for _ in range(2)]
    for g in grads:
        p.grad = g
        optimizer.step()
    a, b = (torch.view_as_real(g).flatten().double() for g in grads)
    mu, stderr = optimizer.history.correlation()[1, 0], optimizer.history.correlation_stderr[1, 0]
    assert abs(mu - (a @ b / (a.norm() * b.norm())).item()) <= 4 * stderr


def test_no_gradient_is_kept_and_little_memory():
    model = net()
    optimizer = OscGD(model.named_parameters(), lr=0.1, measure="sketch", backend=FAST)
    train(model, optimizer, 2)
    for name, p in model.named_parameters():
        assert set(optimizer.state[p]) == {SKETCH, SEED}, name
        wanted = kept_size(p.numel()) if p.numel() > 16_384 else p.numel()
        assert optimizer.state[p][SKETCH].numel() == wanted


@pytest.mark.parametrize("set_to_none", [True, False])
def test_reused_gradients_lose_nothing(set_to_none):
    model = net()
    optimizer = OscGD(model.named_parameters(), lr=0.1, measure="sketch", backend=FAST)
    close(optimizer.history, train(model, optimizer, set_to_none=set_to_none))


def test_every_third_step():
    model = net()
    optimizer = OscGD(model.named_parameters(), lr=0.1, measure="sketch", every=3, backend=FAST)
    seen = train(model, optimizer, 9)
    assert optimizer.history.steps.tolist() == [2, 5, 8]
    wanted, stderr = exact(seen)[[1, 4, 7]], optimizer.history.correlation_stderr
    assert (np.abs(optimizer.history.correlation() - wanted) <= 5 * stderr + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpoints_go_on_to_the_same_record(dtype):
    def make(model):
        options = {"lr": 0.1, "momentum": 0.9, "measure": "sketch", "backend": FAST}
        return OscGD(model.named_parameters(), **options)

    whole, begun, resumed = net(dtype), net(dtype), net(dtype)
    a, b, c = make(whole), make(begun), make(resumed)
    train(whole, a, 5)
    train(begun, b, 3)
    file = io.BytesIO()
    torch.save({"model": begun.state_dict(), "optimizer": b.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed.load_state_dict(state["model"])
    c.load_state_dict(state["optimizer"])
    train(resumed, c, 2, first=3)
    np.testing.assert_array_equal(c.history.correlation(), a.history.correlation()[3:])
    copied = copy.deepcopy(b)
    assert copied.history.correlation().shape == (3, 3)


@pytest.mark.parametrize(("first", "then"), [("exact", "sketch"), ("sketch", "exact")])
def test_states_of_the_other_mode_lose_a_pair(first, then):
    model, later = net(), net()
    a = OscGD(model.named_parameters(), lr=0.1, measure=first, backend=FAST)
    train(model, a, 2)
    b = OscGD(later.named_parameters(), lr=0.1, measure=then, backend=FAST)
    b.load_state_dict(a.state_dict())
    train(later, b, 2)
    assert np.isnan(b.history.correlation()[0, :2]).all() and np.isfinite(b.history.correlation()[1]).all()
    assert not {SKETCH, "prev_grad"} <= set(b.state[next(later.parameters())])


def test_sketches_of_other_names_are_not_compared():
    model = net()
    a = OscGD(model.named_parameters(), lr=0.1, measure="sketch", backend=FAST)
    train(model, a, 2)
    b = OscGD(
        [("other." + n, p) for n, p in model.named_parameters()], lr=0.1, measure="sketch", backend=FAST
    )
    b.load_state_dict({**a.state_dict(), "param_groups": b.state_dict()["param_groups"]})
    train(model, b, 2)
    assert np.isnan(b.history.correlation()[0]).all() and np.isfinite(b.history.correlation()[1]).all()


def test_what_is_not_finite_or_missing_is_not_a_number():
    model = net()
    optimizer = OscGD(model.named_parameters(), lr=0.0, measure="sketch", backend=FAST)
    params = list(model.parameters())
    for t in range(6):
        for p in params:
            p.grad = torch.ones_like(p)
        if t == 1:
            params[0].grad[0, 0] = torch.inf
        if t == 4:
            params[2].grad = None
        optimizer.step()
    known = np.isfinite(optimizer.history.correlation())
    assert known[:, 0].tolist() == [False, False, False, True, True, True]
    assert known[:, 1].tolist() == [False, True, True, True, False, False]
    assert known[1:, 2].all()


def test_monitor_measures_what_oscgd_does():
    model, watched = net(), net()
    optimizer = OscGD(model.named_parameters(), lr=0.1, momentum=0.9, measure="sketch", backend=FAST)
    sgd = torch.optim.SGD(watched.parameters(), lr=0.1, momentum=0.9)
    monitor = OscMonitor(sgd, watched.named_parameters(), ("grad", "update"), measure="sketch", backend=FAST)
    train(model, optimizer)
    train(watched, sgd)
    np.testing.assert_allclose(
        monitor.history.correlation(), optimizer.history.correlation(), atol=1e-4, equal_nan=True
    )
    assert (monitor.update_history.correlation()[2:] > 0.3).all()


def test_window_needs_no_copies_of_gradients():
    model = net()
    optimizer = OscGD(model.named_parameters(), lr=0.1, measure="sketch", every=2, backend=FAST)
    with optimizer.window(4) as window:
        seen = train(model, optimizer, 4)
    for layer, name in enumerate(window.layer_names):
        for lag in (1, 2, 3):
            found = np.diag(window.matrix(name), lag)
            assert np.abs(found - exact(seen, lag)[:, layer]).max() <= (0.06 if layer < 2 else 1e-5)


def test_adaptation_takes_estimates():
    model = net()
    optimizer = OscGD(model.named_parameters(), adapt="auto", measure="sketch", backend=FAST)
    close(optimizer.history, train(model, optimizer))
    assert np.isfinite(optimizer.history.alignment).all()


@pytest.mark.slow
@pytest.mark.parametrize("sketches", [None, 64])
def test_replays_are_steps(sketches, monkeypatch):
    def parameters():
        generator = torch.Generator().manual_seed(0)
        shapes = {"a.weight": (130, 130), "a.bias": (30,)}
        return [(n, nn.Parameter(torch.randn(s, generator=generator).to(DEVICE))) for n, s in shapes.items()]

    generator = torch.Generator().manual_seed(1)
    grads = [
        [torch.randn(p.shape, generator=generator).to(DEVICE) for _, p in parameters()] for _ in range(6)
    ]
    usual, captured = parameters(), parameters()
    options = {"lr": 0.1, "momentum": 0.9, "measure": "sketch", "backend": "triton"}
    a = OscGD(usual, history=History(sketches=sketches), **options)
    b = OscGD(captured, history=History(sketches=sketches), capturable=True, **options)
    graph = FakeGraph(monkeypatch)
    static = [torch.empty_like(g) for g in grads[0]]
    for i in range(6):
        for (_, p), g in zip(usual, grads[i], strict=True):
            p.grad = g.clone()
        a.step()
        torch._foreach_copy_(static, grads[i])
        for (_, p), g in zip(captured, static, strict=True):
            p.grad = g
        if i < 3:
            b.step()
        elif i == 3:
            with graph.capture():
                b.step()
        else:
            graph.replay()
    for (_, p), (_, q) in zip(usual, captured, strict=True):
        assert torch.equal(p, q)
    np.testing.assert_array_equal(a.history.correlation(), b.history.correlation())
    np.testing.assert_array_equal(a.history.correlation_stderr, b.history.correlation_stderr)
    if sketches:
        np.testing.assert_array_equal(a.history.pairwise()[0], b.history.pairwise()[0])


# ---- any two steps ---------------------------------------------------------------------------------------


def recorded(history: History, steps: int = 8, name: str = "", backend: str = FAST, **options):
    """A run into `history`, and its gradients; `name` chooses the seeds."""
    model = net()
    named = [(name + n, p) for n, p in model.named_parameters()]
    layers = {name + n: n.split(".")[0] for n, _ in model.named_parameters()}
    optimizer = OscGD(
        named, lr=0.3, measure="sketch", history=history, layers=layers, backend=backend, **options
    )
    return optimizer, train(model, optimizer, steps)


@pytest.mark.slow
@pytest.mark.parametrize("sketches", [16, 256])
def test_any_pair_within_its_error(sketches):
    """Over 40 seeds, of a layer that is sketched, one that is not, and all together."""
    inside = {None: [], "0": [], "4": []}
    for seed in range(40):
        history = History(sketches=sketches)
        _, seen = recorded(history, name=f"{seed}.")
        for layer, found in inside.items():
            joined = torch.stack([torch.cat(s) if layer is None else s[int(layer) // 2] for s in seen])
            joined /= joined.norm(dim=1, keepdim=True)
            mu, stderr = history.pairwise(layer)
            assert (mu.diagonal() == 1).all() and (stderr.diagonal() == 0).all()
            np.testing.assert_array_equal(mu, mu.T)
            found.append((np.abs(mu - (joined @ joined.T).numpy()) <= 1.96 * stderr)[np.triu_indices(8, 1)])
    for layer, found in inside.items():
        assert (0.85 if sketches == 16 else 0.9) <= np.mean(found) <= 1.0, layer


def test_lagged_is_a_diagonal_of_pairwise():
    history = History(sketches=256)
    recorded(history)
    mu, stderr = history.pairwise("2")
    for lag in (1, 3):
        found, error = history.lagged_correlation(lag, "2")
        assert np.isnan(found[:lag]).all()
        np.testing.assert_allclose(found[lag:], np.diag(mu, lag), atol=1e-12)
        np.testing.assert_allclose(error[lag:], np.diag(stderr, lag), atol=1e-12)
    some, _ = history.pairwise("2", steps=[6, 1])
    np.testing.assert_allclose(some, mu[np.ix_([6, 1], [6, 1])], atol=1e-12)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != FAST])
def test_the_same_sketches_on_every_backend(backend):
    a, b = History(sketches=256), History(sketches=256)
    recorded(a, 3)
    recorded(b, 3, backend=backend)
    np.testing.assert_allclose(a.pairwise()[0], b.pairwise()[0], atol=1e-4)


def test_saved_streamed_and_thinned_like_the_rest(tmp_path):
    history = History(limit=512, sketches=16)
    optimizer, _ = recorded(history, 20)
    history.stream_to(tmp_path / "steps")
    wanted = history.pairwise()[0]
    history.save(tmp_path / "h.npz")
    state = history.state_dict()
    for again in (History.load(tmp_path / "h.npz"), History.from_state_dict(state), copy.deepcopy(history)):
        np.testing.assert_array_equal(again.pairwise()[0], wanted)
        assert again.sketches == 16
    optimizer.zero_grad()
    p = optimizer.param_groups[0]["params"][-1]
    for _ in range(1000):
        p.grad = torch.ones_like(p)
        optimizer.step()
    history.flush()
    assert len(history) <= 512
    kept = history.steps[history.steps < 20]
    np.testing.assert_array_equal(history.pairwise(steps=kept)[0], wanted[np.ix_(kept, kept)])
    np.testing.assert_array_equal(History.load(tmp_path / "steps").pairwise(steps=range(20))[0], wanted)
    gone = next(i for i in range(20) if i not in kept)
    with pytest.raises(ValueError, match=f"step {gone} is not in the history"):
        history.pairwise(steps=[gone])


def test_bad_input():
    model = net()
    named = list(model.named_parameters())
    with pytest.raises(ValueError, match="Invalid measure: 'guess'"):
        OscGD(named, lr=0.1, measure="guess")
    with pytest.raises(ValueError, match="Invalid measure: 'alignment'"):
        OscMonitor(torch.optim.SGD(model.parameters()), named, measure="alignment")
    for sketches in (8, 100, 2048, 0):
        with pytest.raises(ValueError, match=f"Invalid sketches: {sketches}"):
            History(sketches=sketches)
    with pytest.raises(ValueError, match="sketches=256, but measure='exact' takes none"):
        OscGD(named, lr=0.1, history=History(sketches=256))
    history = History(sketches=16)
    recorded(history, 3)
    with pytest.raises(ValueError, match=r"step 7 is not in the history"):
        history.pairwise(steps=[0, 7])
    with pytest.raises(KeyError, match="no layer 'x'"):
        history.pairwise("x")
    with pytest.raises(ValueError, match="Invalid lag: 0"):
        history.lagged_correlation(0)
    with pytest.raises(ValueError, match="holds no sketches"):
        History().pairwise()
    with pytest.raises(ValueError, match="made in another way"):
        recorded(history, 1, name="other.")
