"""The fast paths against OscGDReference, for 100 steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import BACKENDS, DEVICE, batch, small_net
from torch import nn

from oscopt import History, OscGD, OscGDReference

STEPS = 100

CASES = {
    "plain": ({}, {}),
    "momentum": ({"momentum": 0.9, "lr": 0.01}, {}),
    "weight decay": ({"momentum": 0.5, "lr": 0.05, "weight_decay": 0.01}, {}),
    "adaptation": ({"auto": True, "lr": 1.0}, {}),
    "adaptation, weight decay": ({"auto": True, "lr": 0.5, "weight_decay": 0.1}, {}),
    "sketch": ({"momentum": 0.9, "lr": 0.01}, {"measure": "sketch", "history": 64}),
    "sketch, adaptation": ({"auto": True, "lr": 1.0}, {"measure": "sketch"}),
    "copies": ({}, {"copy_gradients": True}),
    "capturable": ({"momentum": 0.9, "lr": 0.01}, {"capturable": True}),
    "capturable, adaptation": ({"auto": True, "lr": 1.0}, {"capturable": True}),
}


def wide_net() -> nn.Module:
    """The small one with a layer that is large enough to be sketched."""
    net = small_net(dtype=torch.float64)
    return nn.Sequential(*net[:-1], nn.Linear(288, 80), nn.Tanh(), nn.Linear(80, 10)).to(
        DEVICE, torch.float64
    )


FEW = ("momentum", "adaptation")  # and few steps, in Triton's interpreter, which is slow
INTERPRETED = ("triton",) if DEVICE == "cpu" else ()


@pytest.mark.parametrize(
    ("backend", "case"),
    [(b, case) for b in BACKENDS for case in CASES if b not in INTERPRETED or case in FEW],
)
def test_a_hundred_steps(backend, case):
    """The same parameters and correlations; those of sketches within five standard errors."""
    settings, options = CASES[case]
    steps = 10 if backend in INTERPRETED else STEPS
    torch.manual_seed(0)
    nets = [wide_net(), wide_net()]
    nets[1].load_state_dict(nets[0].state_dict())
    reference = OscGDReference(nets[0].named_parameters(), **settings)
    own = {"adapt": "auto"} if settings.get("auto") else {}
    if "history" in options:
        options = options | {"history": History(sketches=options["history"])}
    given = {key: value for key, value in settings.items() if key != "auto"}
    optimizer = OscGD(nets[1].named_parameters(), backend=backend, **({"lr": 0.1} | given | own | options))
    x, y = batch(dtype=torch.float64)
    for _ in range(steps):
        for net, stepped in zip(nets, (reference, optimizer), strict=True):
            stepped.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            stepped.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-11)
    measured = optimizer.history.correlation()
    expected = np.array([reference.correlation[name] for name in optimizer.layer_names]).T
    if options.get("measure") == "sketch":
        error = np.abs(measured - expected) <= 5 * optimizer.history.correlation_stderr + 1e-9
        assert error[1:].all() and np.isnan(measured[0]).all()
        assert (optimizer.history.correlation_stderr[1:].max(0) > 0).sum() == 1  # one layer is sketched
    else:
        np.testing.assert_allclose(measured, expected, atol=1e-9)
