"""What is measured when: kept and reused gradients, every, layers, windows, histories, the monitor."""

from __future__ import annotations

import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers import BACKENDS, DEVICE, append, batch, exact_correlations, gradients, small_net, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from oscopt import History, OscGD, device_log, tracker
from oscopt.rows import RECORDED


def recorded_run(backend: str, steps: int, set_to_none=True, **options):
    """A training run, the optimizer and copies of all its gradients."""
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.05, momentum=0.9, backend=backend, **options)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradients(net)))
    train(net, optimizer, steps, set_to_none=set_to_none)
    return net, optimizer, seen


@pytest.mark.parametrize("backend", BACKENDS)
def test_real_training(backend):
    _, optimizer, seen = recorded_run(backend, steps=6)
    for layer, members in enumerate(([0, 1], [2, 3], [4, 5])):
        got = optimizer.history.correlation()[1:, layer]
        np.testing.assert_allclose(got, exact_correlations(seen, members), atol=2e-6)
    np.testing.assert_allclose(
        optimizer.history.global_correlation()[1:], exact_correlations(seen, list(range(6))), atol=2e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_zeroed_in_place(backend):
    """set_to_none=False: one measurement is lost, then the gradient is copied and all are exact."""
    _, optimizer, seen = recorded_run(backend, steps=6, set_to_none=False)
    correlation = optimizer.history.correlation()
    assert np.isnan(correlation[:2]).all()
    for layer, members in enumerate(([0, 1], [2, 3], [4, 5])):
        np.testing.assert_allclose(correlation[2:, layer], exact_correlations(seen, members)[1:], atol=2e-6)
    assert not np.isnan(optimizer.history.sq_norm).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulation_without_zero_grad(backend):
    """p.grad is one and the same tensor, growing."""
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.01, backend=backend)
    seen = []
    x, y = batch()
    for _ in range(5):
        nn.functional.cross_entropy(net(x), y).backward()
        seen.append(gradients(net))
        optimizer.step()
    correlation = optimizer.history.correlation()
    assert np.isnan(correlation[:2]).all()
    np.testing.assert_allclose(correlation[2:, 0], exact_correlations(seen, [0, 1])[1:], atol=2e-6)


def test_gradient_overwritten_after_the_step():
    """Only the parameter concerned is lost, and only once."""
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.01)
    for t in range(5):
        train(net, optimizer, 1)
        if t == 1:
            net[4].weight.grad.mul_(2)
    lost = np.isnan(optimizer.history.correlation())
    assert lost[:, 2].tolist() == [True, False, True, False, False]
    assert lost[1:, :2].sum() == 0


def test_gradients_as_views_of_one_buffer():
    """What DDP does with gradient_as_bucket_view=True: new views, the same memory."""
    net = small_net()
    size = sum(p.numel() for p in net.parameters())
    flat = torch.zeros(size, device=DEVICE)
    optimizer = OscGD(net.named_parameters(), lr=0.01)
    seen = []
    x, y = batch()
    for _ in range(5):
        for p in net.parameters():
            p.grad = None
        nn.functional.cross_entropy(net(x), y).backward()
        offset = 0
        for p in net.parameters():
            view = flat[offset : offset + p.numel()].view_as(p)
            view.copy_(p.grad)
            p.grad, offset = view, offset + p.numel()
        seen.append(gradients(net))
        optimizer.step()
    correlation = optimizer.history.correlation()
    assert np.isnan(correlation[:2]).all()
    np.testing.assert_allclose(correlation[2:, 2], exact_correlations(seen, [4, 5])[1:], atol=2e-6)


def test_normal_case_keeps_the_tensor_itself():
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.01)
    train(net, optimizer, 3)
    assert all(optimizer.state[p]["prev_grad"] is p.grad for p in net.parameters())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_usual_gradients_are_told_at_once(memory_format):
    """Those of real convolutions, of size 1 too, need no look at each; an unusual one among them does."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(144, 2)
    )
    net.to(DEVICE, memory_format=memory_format)
    optimizer = OscGD(net.named_parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(5, 3, 8, 8, device=DEVICE).to(memory_format=memory_format)).square().sum().backward()
        optimizer.step()
        assert optimizer._tracker.gradients().usual
    assert optimizer._tracker.table.states_of("momentum_buffer") is not None
    p = net[0].weight
    whole = p.grad
    for unusual in (None, whole.clone().requires_grad_(), torch._neg_view(-whole), nn.Parameter(whole)):
        p.grad = unusual
        found = optimizer._tracker.gradients()
        assert not found.usual
        grad = found.local[0]
        assert grad is None or (torch.equal(grad, whole) and not grad.requires_grad)


def test_a_torch_without_guards(monkeypatch):
    """Then each gradient is looked at: the same run."""
    net, optimizer, _ = recorded_run("auto", 4)
    monkeypatch.setattr("oscopt.parameters._guards", lambda params: None)
    other, slower, _ = recorded_run("auto", 4)
    assert slower._tracker.table.states_of("momentum_buffer") is None
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    np.testing.assert_array_equal(slower.history.correlation(), optimizer.history.correlation())


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("every", [2, 3, 5])
def test_every(every, set_to_none):
    _, optimizer, seen = recorded_run("auto", steps=15, every=every, set_to_none=set_to_none)
    history = optimizer.history
    assert history.steps.tolist() == list(range(every - 1, 15, every))
    wanted = np.array(exact_correlations(seen, [0, 1]))[history.steps - 1]
    start = 0 if set_to_none else 1
    np.testing.assert_allclose(history.correlation()[start:, 0], wanted[start:], atol=2e-6)


def test_every_holds_no_gradient_in_between():
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.01, every=10)
    train(net, optimizer, 3)
    assert not any("prev_grad" in optimizer.state[p] for p in net.parameters())


NAMES = [f"{module}.{kind}" for module in (0, 1, 4) for kind in ("weight", "bias")]


@pytest.mark.parametrize(
    "layers, expected",
    [
        ("module", {"0": [0, 1], "1": [2, 3], "4": [4, 5]}),
        ("parameter", {name: [i] for i, name in enumerate(NAMES)}),
        ({name: name[-4:] for name in NAMES}, {"ight": [0, 2, 4], "bias": [1, 3, 5]}),
        ({name: None if "1." in name else "rest" for name in NAMES}, {"rest": [0, 1, 4, 5]}),
        (
            {"convolution": NAMES[:2], None: NAMES[2:4], "linear": NAMES[4:]},
            {"convolution": [0, 1], "linear": [4, 5]},
        ),
        (lambda name: "head" if name[0] == "4" else None, {"head": [4, 5]}),
        (lambda name: None, {}),
    ],
)
def test_layers(layers, expected):
    _, optimizer, seen = recorded_run("auto", steps=4, layers=layers)
    assert optimizer.layer_names == tuple(expected)
    correlation = optimizer.history.correlation()
    assert correlation.shape == (4, len(expected))
    for layer, members in enumerate(expected.values()):
        np.testing.assert_allclose(correlation[1:, layer], exact_correlations(seen, members), atol=2e-6)


def test_unnamed_parameters():
    optimizer = OscGD(small_net().parameters(), lr=0.1)
    assert optimizer.layer_names == tuple(f"param{i}" for i in range(6))


def test_parameters_of_the_root_module():
    optimizer = OscGD(nn.Linear(2, 2).named_parameters(), lr=0.1)
    assert optimizer.layer_names == ("(root)",)


@pytest.mark.parametrize(
    "layers, error, text",
    [
        ("blocks", ValueError, "Invalid layers: 'blocks'; use 'module'"),
        (3, TypeError, "layers must be 'module'.*not int"),
        ({}, ValueError, "no layer for '0.weight', '0.bias', '1.weight' and 3 more"),
        ({"a": NAMES[:5]}, ValueError, "no layer for '4.bias'"),
        ({"a": NAMES, "b": []}, ValueError, "layer 'b' no parameter"),
        ({"a": NAMES, "b": NAMES[:1]}, ValueError, "'0.weight' into both 'a' and 'b'"),
        ({"a": [*NAMES, "5.weight"]}, ValueError, "do not exist: '5.weight'"),
        (lambda name: 7, TypeError, "maps '0.weight' to 7"),
    ],
)
def test_bad_layers(layers, error, text):
    with pytest.raises(error, match=text):
        OscGD(small_net().named_parameters(), lr=0.1, layers=layers)


def test_two_parameters_of_one_name():
    with pytest.raises(ValueError, match="two parameters are called 'w'|same parameter"):
        OscGD([("w", nn.Parameter(torch.zeros(1))), ("w", nn.Parameter(torch.zeros(1)))], lr=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_window(backend):
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.05, backend=backend)
    train(net, optimizer, 2)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradients(net)))
    with optimizer.window(h=4) as window:
        train(net, optimizer, 3)
        with pytest.raises(RuntimeError, match="3 of 4 gradients"):
            window.matrix()
        train(net, optimizer, 2)
    assert window.complete
    for layer, members in ((None, range(6)), ("0", [0, 1]), ("4", [4, 5])):
        rows = torch.stack([torch.cat([step[i].flatten() for i in members]) for step in seen[:4]]).cpu()
        wanted = torch.corrcoef(rows) * 0 + rows @ rows.T / torch.outer(rows.norm(dim=1), rows.norm(dim=1))
        matrix = window.matrix(layer=layer)
        np.testing.assert_allclose(matrix, wanted, atol=2e-6)
        assert (np.diag(matrix) == 1).all() and (matrix == matrix.T).all()
    adjacent = [window.matrix()[i, i + 1] for i in range(3)]
    np.testing.assert_allclose(adjacent, optimizer.history.global_correlation()[3:6], atol=1e-12)
    with pytest.raises(KeyError, match="no layer 'head'; there are 0, 1, 4"):
        window.matrix(layer="head")
    with pytest.raises(ValueError, match="Invalid h: 1"):
        optimizer.window(1)


def test_window_that_is_left_early_lets_go():
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.05)
    with optimizer.window(h=4) as window:
        train(net, optimizer, 1)
    train(net, optimizer, 5)
    assert not window.complete


def filled_history(steps: int, layers: int = 2) -> History:
    history = History()
    history.add_layers([f"layer{i}" for i in range(layers)])
    generator = torch.Generator().manual_seed(0)
    for t in range(steps):
        row = torch.rand((len(RECORDED), layers), generator=generator, dtype=torch.float64).numpy()
        if t == 0:
            row[0] = np.nan
        append(history, t, row)
    return history


@pytest.mark.parametrize("steps", [0, 1, 2, 255, 256, 257, 700])
def test_history_blocks_and_files(tmp_path, steps):
    history = filled_history(steps)
    assert history.dot.shape == (steps, 2) == history.step_scale.shape and len(history) == steps
    history.save(tmp_path / "history.npz")
    loaded = History.load(tmp_path / "history.npz")
    torch.save(history.state_dict(), tmp_path / "history.pt")
    again = History.from_state_dict(torch.load(tmp_path / "history.pt", weights_only=True))
    for other in (loaded, again):
        assert other.layer_names == history.layer_names
        for name in ("steps", "dot", "sq_norm", "diff_sq_norm", "prev_sq_norm", "lr", "prev_lr"):
            np.testing.assert_array_equal(getattr(other, name), getattr(history, name))
    assert [p.name for p in tmp_path.glob("*history.npz*")] == ["history.npz"]


def test_windowed_mean_is_the_papers():
    """Mean of the h - 1 adjacent pairs within the last h iterations; fewer at the start."""
    history = filled_history(20)
    mu = history.correlation()
    windowed = history.correlation(window=5)
    assert np.isnan(windowed[0]).all()
    for t in range(1, 20):
        np.testing.assert_allclose(windowed[t], np.nanmean(mu[max(1, t - 3) : t + 1], axis=0))
    with pytest.raises(ValueError, match="Invalid window: 1"):
        history.correlation(window=1)


def test_windowed_mean_with_gaps_between_steps():
    """With every=3 a window of 5 iterations holds the pairs of its own iterations only."""
    _, optimizer, _ = recorded_run("auto", steps=15, every=3)
    mu, windowed = optimizer.history.global_correlation(), optimizer.history.global_correlation(window=5)
    np.testing.assert_allclose(windowed[1:], (mu[1:] + mu[:-1]) / 2)


def test_to_pandas():
    frame = filled_history(3).to_pandas()
    assert frame.index.names == ["step", "layer"] and len(frame) == 6
    assert frame.loc[(1, "layer1"), "lr"] == 0.1 and {"dot", "correlation", "curvature"} <= set(frame.columns)


@pytest.mark.parametrize("damage", ["truncated", "text", "pickle", "other", "format"])
def test_damaged_history_files(tmp_path, damage):
    path = tmp_path / "history.npz"
    history = filled_history(300)
    history.save(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    elif damage == "text":
        path.write_text("no history")
    elif damage == "pickle":
        np.savez(path, steps=np.array([print], object), allow_pickle=True)
    elif damage == "other":
        np.savez(path, x=np.zeros(3))
    else:
        with np.load(path) as file:
            arrays = dict(file)
        np.savez(path, **arrays | {"format": 99})
    with pytest.raises(ValueError, match="history"):
        History.load(path)
    with pytest.raises(FileNotFoundError):
        History.load(tmp_path / "absent.npz")


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "history.npz"
    filled_history(3).save(path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        filled_history(5).save(path)
    assert len(History.load(path)) == 3 and len(list(tmp_path.iterdir())) == 1


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_import_loads_no_backend():
    code = (
        "import sys, torch; before = set(sys.modules); import oscopt\n"
        "print({'numba', 'triton', 'matplotlib', 'pandas'} & (set(sys.modules) - before))"
    )
    assert run_python(code) == "set()"


@pytest.mark.slow
def test_first_step_says_that_it_compiles(tmp_path):
    """A cold cache: one line on stderr, no silence for seconds."""
    code = (
        "import torch; from oscopt import OscGD\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3); OscGD([p], backend='numba').step()"
    )
    environment = {"NUMBA_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        line = process.stderr.readline()
        process.kill()
    assert "compiling oscopt's CPU kernel" in line and process.returncode == -signal.SIGKILL


class Dispatched(TorchDispatchMode):
    """What torch is asked to do, but for looking at parts of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if not name.startswith(("aten.select.", "aten.slice.", "aten.detach.", "profiler.")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def dispatched_in_a_step(monkeypatch, **options) -> tuple[list[str], int]:
    """What a steady step asks torch to do, and how often it compares norms (on CPUs numpy does)."""
    compared = []
    for module in (tracker, device_log):
        drop = module.drop_written
        monkeypatch.setattr(module, "drop_written", lambda *a, drop=drop: (compared.append(1), drop(*a)))
    net = small_net()
    backend = "triton" if DEVICE == "cuda" else "numba"
    optimizer = OscGD(net.named_parameters(), backend=backend, **options)
    generator = torch.Generator().manual_seed(0)
    sets = [[torch.randn(p.shape, generator=generator).to(DEVICE) for p in net.parameters()] for _ in "ab"]
    for step in range(6):
        for p, g in zip(net.parameters(), sets[step % 2], strict=True):
            p.grad = g
        compared.clear()
        with Dispatched() as dispatched:
            optimizer.step()
    count = len(compared)
    assert np.isfinite(optimizer.history.sq_norm).all()
    return dispatched.names, count


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "measure": "alignment"}], ids=str
)
def test_a_step_is_its_kernels_and_nothing_else(monkeypatch, options):
    """On a GPU every operation beside takes the host as long as a kernel takes the device."""
    assert dispatched_in_a_step(monkeypatch, lr=0.1, **options) == ([], 0)


def test_a_policy_sees_norms_that_have_been_compared_once(monkeypatch):
    assert dispatched_in_a_step(monkeypatch, lr=0.1, adapt="cosine")[1] == 1


def test_a_step_that_failed_after_its_row_was_closed(monkeypatch):
    """Taken again, it is compared with the gradient of the step before, not with its own."""
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.1)
    train(net, optimizer, 3)

    def fail(*_, **__):
        raise RuntimeError("keep")

    with monkeypatch.context() as patch:
        patch.setattr(optimizer._tracker.previous, "keep", fail)
        with pytest.raises(RuntimeError, match="keep"):
            train(net, optimizer, 1)
    train(net, optimizer, 2)
    history = optimizer.history
    assert history.steps.tolist() == list(range(5))
    assert np.isfinite(history.correlation()[1:]).all()


@pytest.mark.gpu
def test_two_devices():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = nn.Parameter(torch.ones(5000, device="cuda")), nn.Parameter(torch.ones(5000))
    optimizer = OscGD([("layer.a", a), ("layer.b", b)], lr=0.0)
    for sign in (1.0, -1.0):
        a.grad, b.grad = torch.full_like(a, sign), torch.ones_like(b)
        optimizer.step()
    assert optimizer.correlation.item() == 0.0 and optimizer.backend == "triton+numba"


@pytest.mark.gpu
def test_no_synchronisation():
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.01)
    train(net, optimizer, 3)
    x, y = batch()
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
