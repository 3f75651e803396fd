"""The reference: plain tensor operations, any device. The other backends are tested against it.

The update repeats the arithmetic of ``torch.optim.SGD(foreach=True)``, bit for bit; the sums are float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dense

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


class Batch:
    """See :class:`oscopt.kernels.BatchProtocol`."""

    def __init__(self, params: Sequence[Tensor], layer_of: Sequence[int], num_layers: int) -> None:
        self._params = params
        self._layer_of = layer_of

    def step(self, grads, prevs, bufs, copies, rows, hyper, out) -> None:
        if prevs is not None:
            out.zero_()
            for layer, grad, prev in zip(self._layer_of, grads, prevs, strict=True):
                if layer >= 0:
                    out[:, layer] += sums(grad, prev)
            out.masked_fill_(~out.isfinite(), torch.nan)
        if hyper is not None:
            for row in sorted(set(rows)):
                for momentum in (False, True):
                    index = [i for i, r in enumerate(rows) if r == row and (bufs[i] is not None) == momentum]
                    if index:
                        _update(
                            [self._params[i] for i in index],
                            [grads[i] for i in index],
                            [bufs[i] for i in index] if momentum else None,
                            *hyper[row],
                        )
        for i in (i for i, copy in enumerate(copies or ()) if copy):
            prevs[i].copy_(grads[i])


class SampleBatch:
    """See :class:`oscopt.kernels.sampling.SampleBatchProtocol`."""

    def __init__(self, like: Sequence[Tensor], tensor_of, start, stop, position) -> None:
        columns = (t.tolist() for t in (tensor_of, start, stop, position))
        self._blocks = list(zip(*columns, strict=True))

    def step(self, grads, kept, out) -> None:
        flat = [g.as_strided((g.numel(),), (1,)) if dense(g) else g.reshape(-1) for g in grads]
        for n, (k, start, stop, position) in enumerate(self._blocks):
            g, q = flat[k][start:stop], kept[k][position : position + stop - start]
            out[n] = sums(g, q)
            q.copy_(g)


def _update(params, grads, bufs, lr, decay, gain, weight_decay, lookahead, sign) -> None:
    d = torch._foreach_neg(grads) if sign < 0 else grads
    if weight_decay != 0:
        d = torch._foreach_add(d, params, alpha=weight_decay)
    if bufs is not None:
        torch._foreach_mul_(bufs, decay)
        torch._foreach_add_(bufs, d, alpha=gain)
        d = torch._foreach_add(d, bufs, alpha=lookahead) if lookahead else bufs
    torch._foreach_add_(params, d, alpha=-lr)
