"""Measure a fixed, pseudo-random part of each layer: unbiased estimates of the four sums, with their error.

A layer's gradients are cut into aligned blocks of :data:`BLOCK` elements, in the order of memory. m of its M
blocks are drawn once, without replacement. With the sums D, N, P (`dot`, `sq_norm`, `prev_sq_norm`) over the
drawn blocks,

* M / m times a sum over the drawn blocks is unbiased for that over all (Horvitz and Thompson 1952);
* the correlation D / sqrt(N P) is a ratio estimator; its variance is estimated by the jackknife: (1 - m / M)
  (m - 1) / m times the sum of (mu_i - mean)^2, mu_i being the correlation without block i (Wolter,
  Introduction to Variance Estimation, ch. 4).

Gradients are made of rows and channels of very different size. Small blocks touch more of them; blocks of 64
elements made the standard error up to a quarter too small on such layers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from . import dense, pick

BLOCK = 64  # elements: 32 bytes, a sector of a GPU's cache line
LEAST = 4096  # elements of a layer that are measured at least, if it has them


class SampleBatchProtocol(Protocol):
    """What every backend's ``SampleBatch`` does."""

    def __init__(
        self, like: Sequence[Tensor], tensor_of: Tensor, start: Tensor, stop: Tensor, position: Tensor
    ) -> None:
        """Prepare for tensors like `like`: block b is elements start[b] to stop[b] of tensor tensor_of[b].

        Its previous values lie from position[b] on in that tensor's kept ones. All int64, shape (blocks,).
        """

    def step(self, grads: Sequence[Tensor], kept: Sequence[Tensor], out: Tensor) -> None:
        """Write the blocks' four sums to `out` (float64, (blocks, 4)), and the blocks over the kept ones."""


def draw(sizes: Sequence[int], fraction: float, name: str) -> tuple[list[int], list[int], int]:
    """The drawn blocks of a layer, sorted: their tensors, their numbers in these; the number of all blocks.

    Args:
        sizes: number of elements of the layer's tensors.
        fraction: in (0, 1].
        name: the layer's, which decides the choice: the same in every run.
    """
    counts = torch.tensor([math.ceil(size / BLOCK) for size in sizes], dtype=torch.int64)
    total = int(counts.sum())
    drawn = min(total, max(math.ceil(fraction * total), math.ceil(LEAST / BLOCK)))
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    chosen = torch.randperm(total, generator=generator)[:drawn].sort().values
    ends = counts.cumsum(0)
    tensor = torch.searchsorted(ends, chosen, right=True)
    return tensor.tolist(), (chosen - (ends - counts)[tensor]).tolist(), total


class SamplePlan:
    """Measures the drawn blocks of a fixed list of parameters on one device.

    Args:
        params, grads, layer_of, backend: as in :class:`oscopt.kernels.Plan`; all of them measured.
        layer_names: L names.
        fraction: in (0, 1].

    Attributes:
        kept_sizes: number of elements to be kept of each parameter's gradient.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        layer_of: Sequence[int],
        layer_names: Sequence[str],
        backend: ModuleType,
        fraction: float,
    ) -> None:
        from . import torch_backend

        device = params[0].device
        self.kept_sizes = [0] * len(params)
        groups: dict[tuple, list[tuple[int, int, int, int]]] = {}  # blocks: tensor, start, stop, position
        order: dict[tuple, list[int]] = {}
        population, layer_of_block = [], []
        for layer, name in enumerate(layer_names):
            members = [i for i, of in enumerate(layer_of) if of == layer]
            sizes = [params[i].numel() for i in members]
            tensor, number, total = draw(sizes, fraction, name)
            population.append(total)
            for k, b in zip(tensor, number, strict=True):
                i, start, stop = members[k], b * BLOCK, min((b + 1) * BLOCK, sizes[k])
                p, g = params[i], grads[i]
                suits = p.dtype in backend.DTYPES and g.dtype == p.dtype and dense(p)
                key = (backend if suits else torch_backend, g.dtype)
                groups.setdefault(key, []).append((i, start, stop, self.kept_sizes[i]))
                order.setdefault(key, []).append(len(layer_of_block))
                self.kept_sizes[i] += stop - start
                layer_of_block.append(layer)
        self._batches: list[tuple[list[int], SampleBatchProtocol, slice]] = []
        first = 0
        for key, blocks in groups.items():
            index = sorted({i for i, *_ in blocks})
            local = {i: n for n, i in enumerate(index)}
            columns = zip(*((local[i], *rest) for i, *rest in blocks), strict=True)
            table = [torch.tensor(column, dtype=torch.int64) for column in columns]
            batch = key[0].SampleBatch([grads[i] for i in index], *table)
            self._batches.append((index, batch, slice(first, first + len(blocks))))
            first += len(blocks)
        # Batches write their blocks one after another; this brings them into the order of layers.
        places = [place for key in groups for place in order[key]]
        self._order = None if places == sorted(places) else torch.tensor(places, device=device).argsort()
        self._layer_of_block = torch.tensor(layer_of_block, dtype=torch.int64, device=device)
        drawn = torch.bincount(self._layer_of_block.cpu(), minlength=len(layer_names)).double()
        everything = torch.tensor(population, dtype=torch.float64)
        self._lengths = drawn.long().to(device)
        self._scale = (everything / drawn.clamp_min(1)).to(device)
        # One block tells nothing about its error, unless it is all there is.
        correction = (1 - drawn / everything.clamp_min(1)) * (drawn - 1) / drawn
        self._correction = torch.where(drawn >= everything, 0.0, correction).to(device)
        self._estimate = getattr(backend, "estimate", None)
        self._out = torch.empty((len(layer_of_block), 4), dtype=torch.float64, device=device)

    def step(self, grads: Sequence[Tensor], kept: Sequence[Tensor], row: Tensor | None) -> None:
        """Measure `grads` against `kept`, and keep them.

        Args:
            grads: gradients of the parameters.
            kept: for each parameter a tensor of `kept_sizes` elements.
            row: float64 (5, L), overwritten with the four sums and the correlation's standard error; a sum
                that is not finite is NaN. None: keep only.
        """
        for index, batch, where in self._batches:
            batch.step(pick(grads, index), pick(kept, index), self._out[where])
        if row is None:
            return
        out = self._out if self._order is None else self._out[self._order]
        if self._estimate is not None:
            self._estimate(*(t.numpy() for t in (out, self._lengths, self._scale, self._correction, row)))
            return
        sums = self._per_layer(out)
        torch.mul(sums.T, self._scale, out=row[:4])
        row[:4].masked_fill_(~row[:4].isfinite(), torch.nan)
        without = sums[self._layer_of_block] - out
        mu = without[:, 0] / (without[:, 1] * without[:, 3]).sqrt()
        deviation = mu - (self._per_layer(mu) / self._lengths)[self._layer_of_block]
        variance = self._correction * self._per_layer(deviation * deviation)
        # Where all is measured there is no error, whatever becomes of 0 * NaN.
        row[4] = variance.sqrt().masked_fill_(self._correction == 0, 0.0)

    def _per_layer(self, values: Tensor) -> Tensor:
        return torch.segment_reduce(values, "sum", lengths=self._lengths, axis=0, initial=0.0)
