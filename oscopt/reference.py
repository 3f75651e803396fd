"""What OscGD does, in plain torch: to be read first, and the oracle that the tests hold the fast one to."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from .adapt import AlignedStep
from .layers import assign


class OscGDReference(Optimizer):
    """Gradient descent that measures how adjacent gradients correlate: :class:`oscopt.OscGD`, slowly.

    Every parameter needs a gradient in every step. All is computed in float64 and from copies, by layers.

    Args:
        named_parameters: `model.named_parameters()`.
        lr, momentum, weight_decay: as in ``torch.optim.SGD``.
        auto: the rule of ``adapt="auto"``, which `lr` multiplies (1 is right) and which has its own momentum.

    Attributes:
        correlation: for every layer the correlations of its gradient with that of the step before, one a
            step; NaN in the first. Morchdi et al. 2023, eq. (2).
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        auto: bool = False,
    ) -> None:
        named = dict(named_parameters)
        self.rule = AlignedStep() if auto else None
        momentum = momentum if self.rule is None else self.rule.momentum
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(list(named.values()), defaults)
        self.layers: dict[str, list[Tensor]] = {}
        for (_, p), layer in zip(named.items(), assign(list(named), "module"), strict=True):
            self.layers.setdefault(str(layer), []).append(p)
        self.correlation: dict[str, list[float]] = {layer: [] for layer in self.layers}
        self._kept: dict[str, dict] = {layer: {} for layer in self.layers}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Measure and update."""
        lr, momentum, decay = (self.param_groups[0][key] for key in ("lr", "momentum", "weight_decay"))
        for layer, params in self.layers.items():
            kept = self._kept[layer]
            x, g = _flat(params), _flat([p.grad for p in params if p.grad is not None])
            self.correlation[layer].append(_cosine(g, kept.get("g", torch.zeros_like(g))))
            before = kept.get("b", torch.zeros_like(g))
            b = momentum * before + g + (0.0 if self.rule is not None else decay * x)
            change = b if self.rule is None else self._bounded(kept, x, g, before, b)
            kept |= {"g": g, "b": b}
            start = 0
            for p in params:
                p -= (lr * change[start : start + p.numel()]).view_as(p).to(p.dtype)
                start += p.numel()

    def _bounded(self, kept: dict, x: Tensor, g: Tensor, before: Tensor, b: Tensor) -> Tensor:
        """Momentum, each element bounded, times a length that follows how gradients align with it.

        See :class:`oscopt.adapt.AlignedStep`. What a step applies is known before it.
        """
        rule, decay = self.rule, self.param_groups[0]["weight_decay"]
        assert rule is not None
        first = rule.length / math.sqrt(len(self.layers))
        rho, sigma = kept.get("rho", first), kept.get("sigma", 0.0)
        change = rho * ((b / (rule.bound * sigma)).clamp(-1.0, 1.0) + decay * x) if sigma > 0 else 0.0 * b
        away, cosine = math.log(rho / first), _cosine(g, before)
        forgotten = (rule.pull if away > 0 else rule.lift) * away
        sq_norms = [*kept.get("sq_norms", []), float(g @ g)]
        size = max(sum(sq_norms) / len(sq_norms), sq_norms[-1])
        kept |= {
            "rho": rho * math.exp(rule.kappa * (0.0 if math.isnan(cosine) else cosine) - forgotten),
            "sigma": math.sqrt(size / (len(g) * (1.0 - rule.momentum**2))),
            "sq_norms": sq_norms,
        }
        return change


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def _cosine(x: Tensor, y: Tensor) -> float:
    """NaN where a norm is 0."""
    return float(x @ y / (x.norm() * y.norm()))
