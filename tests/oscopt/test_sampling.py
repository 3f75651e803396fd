"""OscGD(sample=...): SGD's trajectory, estimates with their error, memory that shrinks with the fraction."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import BACKENDS, DEVICE
from torch import nn

from oscopt import History, OscGD, OscMonitor
from oscopt.engine import PREVIOUS, SAMPLE


def wide_net(seed: int = 0) -> nn.Module:
    """A layer of 131,584 elements and a small one."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 10)).to(DEVICE)


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 256, generator=generator).to(DEVICE)
    return x, torch.randint(0, 10, (64,), generator=generator).to(DEVICE)


def train(net, optimizer, steps):
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_estimates_next_to_the_exact(backend):
    steps = 12 if backend != "triton" else 4
    nets = [wide_net() for _ in range(3)]
    exact = OscGD(nets[0].named_parameters(), lr=0.5, backend=backend)
    sampled = OscGD(nets[1].named_parameters(), lr=0.5, backend=backend, sample=1 / 8)
    plain = torch.optim.SGD(nets[2].parameters(), lr=0.5)
    for net, optimizer in zip(nets, (exact, sampled, plain), strict=True):
        train(net, optimizer, steps)
    # How much is measured does not change the training.
    for p, q, r in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(p, r, rtol=1e-5, atol=1e-6)
    mu, wanted = sampled.history.correlation(), exact.history.correlation()
    error = sampled.history.correlation_stderr
    assert (error[1:, 0] > 0).all() and (error[1:, 1] == 0).all()  # the small layer is measured in full
    assert (abs(mu - wanted)[1:] <= 5 * error[1:] + 1e-12).all()
    assert (exact.history.correlation_stderr[1:] == 0).all()
    assert torch.equal(sampled.correlation_stderr.cpu(), torch.from_numpy(error[-1]))


def test_memory_shrinks_with_the_fraction():
    net = wide_net()
    optimizer = OscGD(net.named_parameters(), lr=0.1, sample=1 / 16)
    train(net, optimizer, 2)
    kept = sum(state[SAMPLE].numel() for state in optimizer.state.values())
    assert not any(PREVIOUS in state for state in optimizer.state.values())
    assert kept <= 16384 + 5130 + 512 + 200


def test_resnet34_keeps_at_most_8_percent():
    from torchvision.models import resnet34

    from oscopt.kernels.sampling import draw

    sizes = {name: p.numel() for name, p in resnet34(num_classes=10).named_parameters()}
    kept = sum(draw(size, 1 / 16, name).kept_size for name, size in sizes.items())
    assert kept <= 0.08 * sum(sizes.values())


def test_goes_on_after_loading():
    net = wide_net()
    optimizer = OscGD(net.named_parameters(), lr=0.5, sample=1 / 8)
    train(net, optimizer, 3)
    other = copy.deepcopy(net)
    history = History.from_state_dict(optimizer.history.state_dict())
    restored = OscGD(other.named_parameters(), lr=0.5, sample=1 / 8, history=history)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, 3)
    train(other, restored, 3)
    for name in ("dot", "sq_norm", "correlation_stderr"):
        a, b = getattr(optimizer.history, name), getattr(restored.history, name)
        assert (a[1:] == b[1:]).all()


def test_missing_gradient_loses_the_pair():
    net = wide_net()
    optimizer = OscGD(net.named_parameters(), lr=0.1, sample=1 / 8)
    train(net, optimizer, 2)
    x, y = data()
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    net[0].weight.grad = None
    optimizer.step()
    train(net, optimizer, 2)
    known = ~torch.from_numpy(optimizer.history.dot).isnan()
    assert known[:, 0].tolist() == [False, True, False, False, True]
    assert known[:, 1].tolist() == [False, True, True, True, True]


def test_every_and_sample_together():
    net = wide_net()
    optimizer = OscGD(net.named_parameters(), lr=0.1, sample=1 / 8, every=3)
    train(net, optimizer, 9)
    exact_net = wide_net()
    exact = OscGD(exact_net.named_parameters(), lr=0.1, every=3)
    train(exact_net, exact, 9)
    assert optimizer.history.steps.tolist() == exact.history.steps.tolist() == [2, 5, 8]
    difference = abs(optimizer.history.correlation() - exact.history.correlation())
    assert (difference <= 5 * optimizer.history.correlation_stderr + 1e-12).all()


def test_monitor_samples_too():
    net = wide_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    with OscMonitor(optimizer, net.named_parameters(), sample=1 / 8) as monitor:
        train(net, optimizer, 3)
        assert monitor.correlation_stderr[0] > 0 and monitor.correlation_stderr[1] == 0


@pytest.mark.parametrize("sample", [0, 0.0, -0.1, 1.5, float("nan"), "half", None])
def test_bad_fraction(sample):
    with pytest.raises(ValueError, match="Invalid sample: .*greater than 0 and at most 1"):
        OscGD(wide_net().named_parameters(), sample=sample)
