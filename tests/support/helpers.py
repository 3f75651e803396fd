"""What several tests need."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from oscopt import History
from oscopt.rows import RECORDED, Rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton") if DEVICE == "cuda" else ("torch", "numba", "triton")


class Quadratic(nn.Module):
    """f(x) = 1/2 x'Hx for one parameter x, in float64: gradient Hx."""

    def __init__(self, hessian: torch.Tensor, start: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("hessian", hessian.double())
        self.x = nn.Parameter(start.double().clone())

    def forward(self) -> torch.Tensor:
        return 0.5 * self.x @ self.hessian @ self.x


def small_net(seed: int = 0, device: str = DEVICE, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Convolution, batch norm, linear: six parameters in three layers."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    return net.to(device, dtype)


def batch(seed: int = 0, device: str = DEVICE, dtype: torch.dtype = torch.float32):
    """Pictures and labels for :func:`small_net`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 3, 8, 8, generator=generator)
    return x.to(device, dtype), torch.randint(0, 10, (16,), generator=generator).to(device)


def train(net: nn.Module, optimizer, steps: int, *, set_to_none: bool = True, data=None) -> list[float]:
    """Full-batch steps; the losses before each."""
    x, y = batch(device=next(net.parameters()).device.type) if data is None else data
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_scaled(net: nn.Module, optimizer, *, enabled: bool = True) -> None:
    """Five steps with a GradScaler, which skips the third for an infinity; not `enabled`: the other four."""
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, enabled=enabled)
    x, y = batch()
    for t in range(5):
        if t == 2 and not enabled:
            continue
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(net(x), y)).backward()
        if t == 2:
            net[0].weight.grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()


def gradients(net: nn.Module) -> list[torch.Tensor]:
    """Copies of the parameters' gradients, in float64."""
    return [p.grad.detach().double().clone() for p in net.parameters()]


def exact_correlations(seen: list[list[torch.Tensor]], members: list[int]) -> list[float]:
    """mu of a layer at each step but the first, in float64."""
    joined = [torch.cat([step[i].flatten() for i in members]) for step in seen]
    return [(b @ a / (a.norm() * b.norm())).item() for a, b in zip(joined, joined[1:], strict=False)]


def append(
    history: History, step: int, values: np.ndarray | float, lr: float = 0.1, prev_lr: float | None = None
) -> None:
    """One step more in a record, as a device log would bring it: `values` are broadcast to (9, L)."""
    layers = len(history.layer_names)
    rates = np.full((1, 2, layers), [[lr], [lr if prev_lr is None else prev_lr]])
    history.extend(Rows(np.array([step]), np.broadcast_to(values, (1, len(RECORDED), layers)), rates))
