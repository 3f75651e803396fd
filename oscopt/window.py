"""All pairs of gradients within a few steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .distributed import Ranks
from .kernels import sketch


class Window:
    """Keeps the gradients of the next h steps; its matrices are those of the paper's Figs. 2-5, right.

    Holds h copies of the measured gradients, or of their sketches, until the last has come, then (h, h) sums
    of every layer only.
    """

    def __init__(
        self,
        h: int,
        layer_names: Sequence[str],
        on_exit: Callable[[Window], None],
        device: torch.device,
        ranks: Ranks | None,
    ) -> None:
        if h < 2:
            raise ValueError(f"Invalid h: {h}; a window needs at least 2 gradients")
        self.h = h
        self.layer_names = tuple(layer_names)
        self._on_exit = on_exit
        self._device = device
        self._ranks = ranks
        self._steps: list[int | Tensor] = []
        self._gradients: list[
            list[tuple[int, Tensor, bool]]
        ] = []  # per step: (layer, copy, whether it is a sketch)
        self._present: list[list[int]] = []  # per step: the parameters that had gradients
        self._sums: np.ndarray | None = None

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *error: object) -> None:
        self._on_exit(self)

    @property
    def complete(self) -> bool:
        """Whether h gradients have come."""
        return self._sums is not None

    def add(
        self,
        step: int | Tensor,
        present: Sequence[int],
        layer_of: Sequence[int],
        grads: Sequence[Tensor],
        sketched: Sequence[bool],
    ) -> None:
        """Keep the gradients of step number `step` (the optimizer's side), of the parameters `present`.

        `layer_of`: -1: not measured. `sketched`: whether `grads` has the sketch instead.
        """
        if self.complete:
            return
        self._steps.append(step)
        self._present.append(list(present))
        given = zip(layer_of, grads, sketched, strict=True)
        self._gradients.append([(layer, g.detach().clone(), kind) for layer, g, kind in given if layer >= 0])
        if len(self._gradients) == self.h:
            sums = self._inner_products()
            if self._ranks is not None:
                self._ranks.wait(self._ranks.reduce(sums))
            self._sums = sums.cpu().numpy()
            self._gradients.clear()
            self._on_exit(self)

    def _inner_products(self) -> Tensor:
        shape = (len(self.layer_names), self.h, self.h)
        sums = torch.zeros(shape, dtype=torch.float64, device=self._device)
        numbers = [int(step) for step in self._steps]
        # Replays of a graph may have come between them.
        adjacent = numbers == list(range(numbers[0], numbers[0] + self.h))
        if not adjacent or any(present != self._present[0] for present in self._present):
            return sums.fill_(torch.nan)
        for same_parameter in zip(*self._gradients, strict=True):
            layer, _, sketched = same_parameter[0]
            parts = [grad.reshape(-1).split(1 << 20) for _, grad, _ in same_parameter]
            for part in zip(*parts, strict=True):
                rows = torch.stack([p.double() for p in part])
                sums[layer] += (sketch.inner_products(rows) if sketched else rows @ rows.T).to(self._device)
        return sums

    def matrix(self, layer: str | None = None) -> np.ndarray:
        """Correlations mu(j, k) of the window's gradients: float64, shape (h, h), symmetric, diagonal 1.

        Args:
            layer: the layer's name; None: all layers together.

        Raises:
            KeyError: there is no such layer.
            RuntimeError: fewer than h steps have been taken.
        """
        if self._sums is None:
            raise RuntimeError(
                f"the window has {len(self._gradients)} of {self.h} gradients; take the remaining steps first"
            )
        if layer is None:
            sums = self._sums.sum(0)
        elif layer in self.layer_names:
            sums = self._sums[self.layer_names.index(layer)]
        else:
            raise KeyError(f"no layer {layer!r}; there are {', '.join(self.layer_names)}")
        norms = np.sqrt(np.diag(sums))
        with np.errstate(divide="ignore", invalid="ignore"):
            matrix = np.clip(sums / np.outer(norms, norms), -1.0, 1.0)
        matrix[np.diag_indices(self.h)] = np.where((norms > 0) & np.isfinite(norms), 1.0, np.nan)
        return matrix
