"""Reading changes nothing and sends nothing."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE, small_net, train
from torch import nn

from oscopt import OscGD, parameters, tracker

READ = {
    "correlation": lambda o: o.correlation,
    "global_correlation": lambda o: o.global_correlation,
    "layer_names": lambda o: o.layer_names,
    "step_scale": lambda o: o.step_scale,
    "rejected_scales": lambda o: o.rejected_scales,
    "backend": lambda o: o.backend,
    "repr": repr,
    "len(history)": lambda o: len(o.history),
    "steps": lambda o: o.history.steps,
}


@pytest.mark.parametrize("what", READ)
@pytest.mark.parametrize("adapt", [None, "cosine"])
def test_nothing_is_built_by_reading(what, adapt, monkeypatch):
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.01, adapt=adapt)
    train(net, optimizer, 2)
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(3, device=DEVICE)))

    def built(*args, **kwargs):
        raise AssertionError("reading has built a table")

    with monkeypatch.context() as patch:
        patch.setattr(parameters.ParameterTable, "__init__", built)
        patch.setattr(tracker.Ranks, "__init__", built)
        READ[what](optimizer)
    train(net, optimizer, 2)
    assert len(optimizer.history) == 4


@pytest.mark.parametrize("what", READ)
def test_what_is_read_before_the_first_step(what):
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.01)
    value = READ[what](optimizer)
    if isinstance(value, torch.Tensor):
        assert value.device.type == DEVICE
    if what == "correlation":
        assert value.shape == (len(optimizer.layer_names),) and value.isnan().all()


def test_before_the_first_step_values_lie_where_the_parameters_lie():
    p = nn.Parameter(torch.ones(3, device="meta"))
    optimizer = OscGD([p], lr=0.1)
    for name in ("correlation", "global_correlation", "step_scale", "rejected_scales"):
        assert getattr(optimizer, name).device.type == "meta", name


def test_made_while_the_default_device_is_meta():
    net = nn.Linear(3, 2).to(DEVICE)
    with torch.device("meta"):
        optimizer = OscGD(net.named_parameters(), lr=0.1, adapt="cosine")
    for p in net.parameters():
        p.data.fill_(1.0)
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.allclose(p, torch.full_like(p, 0.9)) for p in net.parameters())
    OscGD([nn.Parameter(torch.ones(2, device="meta"))], lr=0.1, fused=True)
