"""What is timed: optimizers, and the ways in which people measure correlations today."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from oscopt import OscGD, OscMonitor

LR = 1e-6
BASE, BASE_MOMENTUM = "sgd fused", "sgd fused momentum"
CEILING, READING = "copy", "read two arrays"


@dataclass(frozen=True)
class Contender:
    """One thing to time.

    Attributes:
        name: what the tables call it.
        build: (parameters, gradients) -> the step, and what holds its extra memory (a list of tensors, when
            called after some steps).
        arrays: arrays of the parameters' size that it must read or write by its own formulation, at least.
        own: arrays of the parameters' size that it holds besides parameters and gradients, at most.
        base: the contender that its ratio is taken to.
        repeat: steps that make one timing; their mean counts.
    """

    name: str
    build: Callable[[list[Parameter], list[Tensor]], tuple[Callable[[], Any], Callable[[], list[Tensor]]]]
    arrays: float
    own: int = 0
    base: str = BASE
    repeat: int = 1


def _optimizer(kind, **options):
    def build(params, grads):
        optimizer = kind(params, lr=LR, **options)
        return optimizer.step, lambda: _state(optimizer)

    return build


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    tensors = [v for state in optimizer.state.values() for v in state.values()]
    return [t for t in tensors if isinstance(t, Tensor) and t.numel() > 1]


def _copy(params, grads):
    source = torch.empty(sum(p.numel() for p in params), dtype=params[0].dtype, device=params[0].device)
    target = torch.zeros_like(source.fill_(1.0))
    return lambda: target.copy_(source), lambda: []


def _read(params, grads):
    a, b = (
        torch.ones(sum(p.numel() for p in params), dtype=p.dtype, device=p.device) for p in params[:1] * 2
    )
    return lambda: torch.dot(a, b), lambda: []


def _monitor(params, grads):
    optimizer = torch.optim.SGD(params, lr=LR, fused=True)
    names = [(f"layer{i}.weight", p) for i, p in enumerate(params)]
    monitor = OscMonitor(optimizer, names)
    return optimizer.step, lambda: [
        t for state in monitor.state_dict()["state"].values() for t in _tensors(state)
    ]


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    return [t for t in state.values() if isinstance(t, Tensor)]


def _with_loop(loop: Callable[[Sequence[Tensor], Sequence[Tensor]], Any]):
    """SGD, and `loop(gradients, copies of the last ones)`, which refreshes the copies."""

    def build(params, grads):
        optimizer = torch.optim.SGD(params, lr=LR, fused=True)
        last = [torch.zeros_like(p, requires_grad=False) for p in params]

        def step():
            loop([p.grad for p in params], last)
            optimizer.step()

        return step, lambda: last

    return build


def _cosine_loop(grads, last):
    correlations = []
    for g, q in zip(grads, last, strict=True):
        correlations.append(F.cosine_similarity(g.flatten(), q.flatten(), dim=0))
        q.copy_(g)
    return correlations


def _dot_loop(grads, last):
    correlations = []
    for g, q in zip(grads, last, strict=True):
        x, y = g.flatten(), q.flatten()
        correlations.append(torch.dot(x, y) / (x.norm() * y.norm()))
        q.copy_(g)
    return correlations


def _foreach_loop(grads, last):
    dots = [product.sum() for product in torch._foreach_mul(grads, last)]
    norms, last_norms = torch._foreach_norm(grads), torch._foreach_norm(last)
    torch._foreach_copy_(last, grads)
    return torch.stack(dots) / (torch.stack(norms) * torch.stack(last_norms))


def _compiled(params, grads):
    @torch.compile(dynamic=True)
    def one(p, g, q):
        sums = torch.stack([(g * q).sum(), (g * g).sum(), (q * q).sum()])
        q.copy_(g)
        p.sub_(g, alpha=LR)
        return sums

    last = [torch.zeros_like(p, requires_grad=False) for p in params]

    @torch.no_grad()
    def step():
        return [one(p.view(-1), p.grad.view(-1), q.view(-1)) for p, q in zip(params, last, strict=True)]

    return step, lambda: last


def contenders(backends: Sequence[str], *, compiled: bool = True) -> list[Contender]:
    """All of them; OscGD with each of `backends`, the first of which does the variants too."""
    sgd, momentum = torch.optim.SGD, {"momentum": 0.9}
    fastest, with_momentum = {"backend": backends[0]}, "oscgd momentum"
    return [
        Contender(CEILING, _copy, 2, own=2),
        Contender(READING, _read, 2, own=2),
        Contender(BASE, _optimizer(sgd, fused=True), 3),
        Contender("sgd foreach", _optimizer(sgd, foreach=True), 3),
        Contender(BASE_MOMENTUM, _optimizer(sgd, fused=True, **momentum), 5, own=1),
        *(Contender(f"oscgd {name}", _optimizer(OscGD, backend=name), 4) for name in backends),
        Contender("oscgd every=10", _optimizer(OscGD, every=10, **fastest), 3.1, repeat=10),
        Contender(with_momentum, _optimizer(OscGD, **momentum, **fastest), 6, own=1, base=BASE_MOMENTUM),
        Contender(
            "oscgd alignment",
            _optimizer(OscGD, measure="alignment", **momentum, **fastest),
            5,
            own=1,
            base=BASE_MOMENTUM,
        ),
        Contender("oscgd adapt", _optimizer(OscGD, adapt="auto", **fastest), 6, own=1, base=with_momentum),
        Contender("sgd fused + monitor", _monitor, 5),
        Contender("sgd + cosine_similarity loop", _with_loop(_cosine_loop), 7, own=1),
        Contender("sgd + dot, norm loop", _with_loop(_dot_loop), 9, own=1),
        Contender("sgd + foreach", _with_loop(_foreach_loop), 11, own=3),
        *([Contender("torch.compile", _compiled, 5, own=1)] if compiled else []),
        Contender("adamw fused", _optimizer(torch.optim.AdamW, fused=True), 7, own=2),
    ]
