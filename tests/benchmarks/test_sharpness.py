"""The Hessian's top eigenvalue against what is known in closed form and against dense Hessians."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from study_config import CONFIG
from torch.nn import functional as F

from study.sharpness import top_eigenvalue
from study.train import Trainer


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    "spectrum", [[7.0, 3.0, 0.1, -2.0], [1.0, 0.5, -9.0]], ids=["top", "not the largest in size"]
)
def test_quadratic(spectrum, dtype, tolerance):
    """1/2 x'Hx over several parameters and two micro-batches."""
    generator = torch.Generator().manual_seed(0)
    eigenvalues = torch.cat([torch.tensor(spectrum), torch.linspace(-0.5, 0.5, 26)]).double()
    q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator).double())
    hessian = (q * eigenvalues @ q.T).to(dtype)
    a, b = torch.zeros(2, 5, dtype=dtype), torch.ones(len(eigenvalues) - 10, dtype=dtype)
    for p in (a, b):
        p.requires_grad_()

    def losses():
        for share in (0.3, 0.7):
            x = torch.cat([a.reshape(-1), b])
            yield share * (x @ hessian @ x) / 2

    found = top_eigenvalue(losses, [a, b], tolerance=1e-6)
    assert found == pytest.approx(max(spectrum), rel=tolerance * 100)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_parameters(count):
    x = torch.ones(count, dtype=torch.float64, requires_grad=True)
    scale = torch.arange(1.0, count + 1, dtype=torch.float64)
    assert top_eigenvalue(lambda: [(scale * x**2).sum() / 2], [x]) == pytest.approx(count, rel=1e-3)


@pytest.mark.parametrize("model, steps", [("linear", 0), ("cnn", 3)])
def test_small_net_against_its_dense_hessian(model, steps):
    """The same full-batch loss over micro-batches of 13, 13, 12 and 12, in float64 and in one piece."""
    trainer = Trainer(replace(CONFIG, model=model, width=1, image_size=8))
    for _ in range(steps):
        trainer.epoch()
    found = trainer.sharpness()
    net = trainer.model.double()
    x, y = (torch.cat([batch[i] for batch in trainer.batches]) for i in range(2))
    names = [name for name, _ in net.named_parameters()]
    shapes = [p.shape for p in net.parameters()]

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        state = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, state, x.double()), y)

    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()])  # (channels_last does not view)
    hessian = torch.autograd.functional.hessian(loss, flat)
    assert found == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=2e-3)


def test_not_finite():
    x = torch.ones(5, requires_grad=True)
    assert np.isnan(top_eigenvalue(lambda: [(x**2).sum() * float("inf")], [x]))


@pytest.mark.slow
def test_measuring_changes_nothing():
    """Weights, batch norm's running means and the record are those of a run without."""
    with_, without = (Trainer(replace(CONFIG, model="resnet18", sharpness_every=every)) for every in (2, 0))
    for trainer in (with_, without):
        for _ in range(3):
            trainer.epoch()
    a, b = with_.model.state_dict(), without.model.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert with_.progress.loss == without.progress.loss
    sharpness = with_.record.sharpness
    assert np.isfinite(sharpness).tolist() == [True, False, True] and (sharpness[[0, 2]] > 0).all()
    assert np.isnan(without.record.sharpness).all()
