"""A process that forks after a step: OpenMP has no threads in the child."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from oscopt import OscGD

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("new", [False, True], ids=["the same optimizer", "a new one"])
def test_a_step_in_a_forked_child(new):
    p, q = (nn.Parameter(torch.ones(200_000)) for _ in range(2))
    optimizer = OscGD([p], lr=0.1)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    child = os.fork()
    if not child:
        status = 1
        try:
            torch.set_num_threads(1)  # torch's own threads are gone, too
            trained, start = (q, 1.0) if new else (p, 0.8)
            optimizer = OscGD([q], lr=0.1) if new else optimizer
            for _ in range(2):
                trained.grad = torch.ones_like(trained)
                optimizer.step()
            good = torch.allclose(trained, torch.full_like(trained, start - 0.2))
            status = 0 if good and abs(optimizer.correlation.item() - 1) < 1e-6 else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.allclose(p, torch.full_like(p, 0.7)) and optimizer.backend == "numba"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_before_the_first_step_has_the_kernel():
    """Or runs that are started by forks would differ from others by some bits."""
    code = """
import os, sys, torch
from oscopt import OscGD
from oscopt.kernels import numba_backend
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
p = torch.nn.Parameter(torch.ones(8))
optimizer = OscGD([p], lr=0.1)
p.grad = torch.ones(8)
optimizer.step()
os._exit(0 if optimizer.backend == "numba" else 1)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
