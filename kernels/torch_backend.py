"""The reference: plain tensor operations, any device. The other backends are tested against it.

The update repeats the arithmetic of ``torch.optim.SGD(foreach=True)``, bit for bit; the sums are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from . import dense
from .sampling import BLOCK, GROUP, SIGNS, Drawn

NAME = "torch"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_CHUNK = 1 << 18  # elements that are turned to float64 at a time: they stay in the cache


def unavailable(device: torch.device) -> str:
    """Runs everywhere."""
    return ""


def sums(grad: Tensor, prev: Tensor) -> Tensor:
    """The four sums of two gradients of one shape: float64, shape (4,)."""
    total = torch.zeros(4, dtype=torch.float64, device=grad.device)
    for g, q in zip(grad.reshape(-1).split(_CHUNK), prev.reshape(-1).split(_CHUNK), strict=True):
        g, q = g.double(), q.double()
        d = g - q
        total += torch.stack([g.dot(q), g.dot(g), d.dot(d), q.dot(q)])
    return total


def _sample(
    drawn: Drawn, number: Tensor, signs: Tensor, in_memory: bool, grad: Tensor, kept: Tensor
) -> Tensor:
    """The four sums and six moments of the drawn blocks, float64, shape (10,); they are kept.

    `in_memory`: the blocks are of the gradient as it lies in memory, else of its elements in their order.
    """
    flat = grad.as_strided((grad.numel(),), (1,)) if in_memory else grad.reshape(-1)
    element = number[:, None] * BLOCK + torch.arange(BLOCK, device=grad.device)
    blocks = flat[element.clamp_max(len(flat) - 1)].masked_fill_(element >= len(flat), 0)
    g, q = blocks.double(), kept.view(blocks.shape).double()
    of_block = torch.stack([g * q, g * g, (g - q) ** 2, q * q]).sum(-1)
    kept.copy_(blocks.view(-1))
    dot, sq_norm, _, prev_sq_norm = of_block.view(4, -1, GROUP) @ signs
    x = torch.stack([dot, sq_norm, prev_sq_norm, dot, dot, sq_norm])
    y = torch.stack([dot, sq_norm, prev_sq_norm, sq_norm, prev_sq_norm, prev_sq_norm])
    moments = (x * y).sum(1)
    return torch.cat([of_block.sum(1) * drawn.stratum, moments * drawn.moment_scale])


class Batch:
    """See :class:`oscopt.kernels.BatchProtocol`."""

    def __init__(self, params: Sequence[Tensor], layer_of, num_layers, drawn=None, scale_of=None) -> None:
        self._params = params
        self._layer_of = layer_of
        self._scale_of = layer_of if scale_of is None else scale_of
        self._measures = [sums] * len(params)
        if drawn is not None:
            signs = torch.tensor(SIGNS, dtype=torch.float64, device=params[0].device)
            numbers = (torch.from_numpy(d.number).to(params[0].device).long() for d in drawn)
            self._measures = [
                partial(_sample, d, number, signs, dense(p))
                for d, number, p in zip(drawn, numbers, params, strict=True)
            ]
        self._drawn = drawn

    def prepare_capture(self) -> None:
        """Nothing is needed."""

    def step(self, grads, prevs, bufs, copies, rows, hyper, out, scale=None) -> None:
        if prevs is not None:
            out.zero_()
            for i, layer in enumerate(self._layer_of):
                if layer >= 0:
                    out[:, layer] += self._measures[i](grads[i], prevs[i])
            out.masked_fill_(~out.isfinite(), torch.nan)
        bufs = bufs or [None] * len(grads)
        if hyper is not None:
            for row in sorted(set(rows)):
                for momentum in (False, True):
                    index = [i for i, r in enumerate(rows) if r == row and (bufs[i] is not None) == momentum]
                    if index:
                        _update(
                            [self._params[i] for i in index],
                            [grads[i] for i in index],
                            [bufs[i] for i in index] if momentum else None,
                            None if scale is None else [self._scale(scale, i) for i in index],
                            *hyper[row],
                        )
        for i in (i for i, copy in enumerate(copies or ()) if copy and self._drawn is None):
            prevs[i].copy_(grads[i])

    def _scale(self, scale: Tensor, i: int) -> Tensor:
        """What multiplies the learning rate of parameter i: float64, 0-dim."""
        return scale[self._scale_of[i]] if self._scale_of[i] >= 0 else torch.ones_like(scale[0])


def _update(params, grads, bufs, scales, lr, decay, gain, weight_decay, lookahead, sign) -> None:
    d = torch._foreach_neg(grads) if sign < 0 else grads
    if weight_decay != 0:
        d = torch._foreach_add(d, params, alpha=weight_decay)
    if bufs is not None:
        torch._foreach_mul_(bufs, decay)
        torch._foreach_add_(bufs, d, alpha=gain)
        d = torch._foreach_add(d, bufs, alpha=lookahead) if lookahead else bufs
    if scales is None:
        torch._foreach_add_(params, d, alpha=-lr)
    else:
        for p, direction, scale in zip(params, d, scales, strict=True):
            p.sub_(direction * (lr * scale).to(p.dtype))
