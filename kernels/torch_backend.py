"""The reference: plain tensor operations, any device. The other backends are tested against it.

The update repeats the arithmetic of ``torch.optim.SGD(foreach=True)``, bit for bit; the sums are float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import Hyper

NAME = "torch"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_CHUNK = 1 << 18  # elements that are turned to float64 at a time: they stay in the cache


def unavailable(device: torch.device) -> str:
    """Runs everywhere."""
    return ""


def sums(grad: Tensor, prev: Tensor | None, momentum: Tensor | None, sign: float) -> Tensor:
    """The sums of tensors of one shape: float64, shape (6,); zeros for what is None."""
    total = torch.zeros(6, dtype=torch.float64, device=grad.device)
    none = torch.zeros((), dtype=torch.float64, device=grad.device)
    others = [None if x is None else x.reshape(-1).split(_CHUNK) for x in (prev, momentum)]
    for i, g in enumerate(grad.reshape(-1).split(_CHUNK)):
        g = g.double()
        q, b = (None if parts is None else parts[i].double() for parts in others)
        pair = [none] * 3 if q is None else [g.dot(q), (g - q).dot(g - q), q.dot(q)]
        total += torch.stack(
            [pair[0], g.dot(g), *pair[1:], *([none] * 2 if b is None else [sign * g.dot(b), b.dot(b)])]
        )
    return total


class Batch:
    """See :class:`oscopt.kernels.BatchProtocol`."""

    def __init__(self, params: Sequence[Tensor], layer_of, num_layers, scale_of=None) -> None:
        self._params = params
        self._layer_of = layer_of
        self._scale_of = layer_of if scale_of is None else scale_of

    def prepare_capture(self) -> None:
        """Nothing is needed."""

    def step(self, grads, prevs, bufs, copies, rows, hyper, out, scale=None, bound=None) -> None:
        if out is not None:
            signs = [1.0 if hyper is None else Hyper(*hyper[row]).sign for row in rows]
            self._measure(grads, prevs, bufs, signs, out)
        if hyper is not None:
            self._update(grads, bufs or [None] * len(grads), rows, hyper, scale, bound)
        for i in (i for i, copy in enumerate(copies or ()) if copy):
            prevs[i].copy_(grads[i])

    def _measure(self, grads, prevs, bufs, signs: Sequence[float], out: Tensor) -> None:
        out.zero_()
        for i, layer in enumerate(self._layer_of):
            if layer >= 0:
                prev, buf = (None if tensors is None else tensors[i] for tensors in (prevs, bufs))
                out[:, layer] += sums(grads[i], prev, buf, signs[i])
        out.masked_fill_(~out.isfinite(), torch.nan)
        if prevs is None:
            out[[0, 2, 3]] = torch.nan
        if bufs is None:
            out[4:] = torch.nan

    def _update(self, grads, bufs, rows, hyper, scale: Tensor | None, bound: Tensor | None) -> None:
        """All that have the same row, with or without a buffer, at once."""
        groups: dict[tuple[int, bool], list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault((row, bufs[i] is not None), []).append(i)
        for (row, buffered), index in groups.items():
            _update(
                [self._params[i] for i in index],
                [grads[i] for i in index],
                [bufs[i] for i in index] if buffered else None,
                None if scale is None else [self._entry(scale, i, 1.0) for i in index],
                None if bound is None else [self._entry(bound, i, torch.inf) for i in index],
                Hyper(*hyper[row]),
            )

    def _entry(self, values: Tensor, i: int, none: float) -> Tensor:
        """What `values` has for the layer of parameter i, or `none`: float64, 0-dim."""
        layer = self._scale_of[i]
        return values[layer] if layer >= 0 else torch.full((), none, dtype=values.dtype, device=values.device)


def _update(params, grads, bufs, scales, bounds, row: Hyper) -> None:
    if bufs is not None and bounds is not None:
        scales = scales or [1.0] * len(params)
        for p, g, b, scale, bound in zip(params, grads, bufs, scales, bounds, strict=True):
            _update_bounded(p, g, b, row.lr * scale, bound, row)
        return
    d = torch._foreach_neg(grads) if row.sign < 0 else grads
    if row.weight_decay != 0:
        d = torch._foreach_add(d, params, alpha=row.weight_decay)
    if bufs is not None:
        torch._foreach_mul_(bufs, row.momentum)
        torch._foreach_add_(bufs, d, alpha=row.one_minus_dampening)
        d = torch._foreach_add(d, bufs, alpha=row.nesterov_momentum) if row.nesterov_momentum else bufs
    if scales is None:
        torch._foreach_add_(params, d, alpha=-row.lr)
    else:
        for p, direction, scale in zip(params, d, scales, strict=True):
            p.sub_(direction * (row.lr * scale).to(p.dtype))


def _update_bounded(p, g, b, lr, bound, row: Hyper) -> None:
    """Of one parameter; by selection instead of a branch, as `bound` is on the device."""
    wide = torch.promote_types(p.dtype, torch.float32)  # half types lack the range of bound and scale
    lr, bound = torch.as_tensor(lr, dtype=torch.float64).to(wide), bound.to(wide)
    bounded = bound < torch.inf
    x, d = p.to(wide), row.sign * g.to(wide)
    coupled = d + row.weight_decay * x if row.weight_decay else d  # an infinite x times 0 is NaN
    b.copy_(row.momentum * b.to(wide) + row.one_minus_dampening * torch.where(bounded, d, coupled))
    used = b.to(wide)
    ahead = coupled + row.nesterov_momentum * used if row.nesterov_momentum else used
    clipped = used.clamp(-bound, bound) + 0.0 * used  # 0 times what is not finite is NaN
    if row.weight_decay:
        clipped = clipped + torch.where(bounded, row.weight_decay * bound, 0.0) * x
    p.copy_(x - lr * torch.where(bounded, clipped, ahead))
