"""A short random projection of each gradient, the same at every step: the definition, in tensor operations.

A *sketch* is a linear map S from n elements to k *buckets*: every run of k consecutive elements is rotated
by a random offset, its elements get random signs, and the runs are added up. E <Sx, Sy> = <x, y>, as signs
and offsets do not depend on x and y: a CountSketch (Charikar, Chen, Farach-Colton 2002) that hashes runs in
place of single elements, which makes it a loop over consecutive memory. docs/sketch.md has the mathematics.

A tensor is cut into chunks of consecutive elements, in the order of memory, each with :data:`BUCKETS`
buckets of its own. What is kept of a step is, chunk by chunk, the sketch stretched to the chunk's exact norm.
Of two kept chunks a and b, with cosine c,

* <g, g'> is estimated by <a, b> (1 + (1 - c^2) / 2k): the cosine of sketches is biased towards 0 by that
  factor, at first order;
* its variance is ||a||^2 ||b||^2 (1 - c^2)^2 (1 - 1/R) / k, for R runs: elements of one run never meet;
* ||g - g'||^2 is estimated by ||a - b||^2, which keeps its relative accuracy however close they are.

Of a tensor of at most :data:`WHOLE` elements the gradient itself is kept, by the backend's own kernel.
A layer's sums are those of its chunks. What is kept of a layer can be sketched again, to one vector of k'
floats (:func:`fold`), and those of any two steps be compared.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from . import SUMS as EXACT_SUMS
from . import dense, torch_backend

VERSION = 1
"""Of the map: sketches of different versions cannot be compared."""

SUMS = (*EXACT_SUMS, "dot_variance")
"""Names of the rows of a sketching plan's output."""

ESTIMATED = [SUMS.index(name) for name in ("dot", "diff_sq_norm", "prev_sq_norm", "dot_variance")]
"""Those that are taken from what is kept."""

BUCKETS = 1024  # k: the standard error of a chunk's cosine is at most 1/32
WHOLE = 1 << 14  # elements of a tensor up to which its gradient is kept itself

GOLDEN, ODD, ODDER = 0x9E3779B1, 0x7FEB352D, 0x846CA68B  # Wellons' "lowbias32", after a Weyl sequence
OFFSETS = 0x68E31DA4  # what tells the seed of a map's offsets from that of its signs
FOLD = 0x5BD1E995  # what tells the seed of a tensor's second sketch from its first


def sketched(tensor: Tensor) -> bool:
    """Whether gradients of a parameter like `tensor` are sketched; else they are kept."""
    return tensor.numel() > WHOLE


def chunk_size(size: int) -> int:
    """Elements of a chunk of a tensor of `size` elements: a 16th of it from 2^11 to 2^16, a 64th beyond."""
    wanted = max(min(max(size // 16, 1 << 11), 1 << 16), size // 64)
    return -(-wanted // BUCKETS) * BUCKETS


def kept_size(size: int) -> int:
    """Floats that are kept of a tensor of `size` elements."""
    return -(-size // chunk_size(size)) * BUCKETS


def kept_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Room, zeros, for what is kept of gradients of `dtype` of a parameter like `tensor`."""
    if not sketched(tensor):
        return torch.zeros_like(tensor, dtype=dtype)
    return torch.zeros(kept_size(tensor.numel()), dtype=kept_dtype(dtype), device=tensor.device)


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the sketches of gradients of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def seed_of(name: str, piece: Sequence[int | None] = ()) -> int:
    """The seed of a parameter, or of one piece of it where it is spread over processes."""
    return zlib.crc32(f"{VERSION} {name} {list(piece)}".encode())


def hashed(index: Tensor, seed: int) -> Tensor:
    """32 random bits for each index (int64)."""
    x = (index * GOLDEN + seed) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * ODD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * ODDER) & 0xFFFFFFFF
    return x ^ (x >> 16)


def sketch(x: Tensor, first: int, seed: int, buckets: int) -> Tensor:
    """S x.

    Args:
        x: shape (n,).
        first: number of its first element, a multiple of `buckets`.
        seed: of the map.
        buckets: k, a power of two, at most 1024.

    Returns:
        Shape (k,), of `x`'s dtype.
    """
    rows = -(-len(x) // buckets)
    index = torch.arange(first, first + rows * buckets, device=x.device).view(rows, buckets)
    signed = torch.nn.functional.pad(x, (0, rows * buckets - len(x))).view(rows, buckets)
    # 32 elements share a hash, 8 apart: so vectors of 8 have a vector of hashes.
    minus = hashed(index // 256 * 8 + index % 8, seed) >> (31 - index // 8 % 32) & 1
    signed = torch.where(minus == 1, -signed, signed)
    offset = hashed(index[:, :1] // buckets, seed ^ OFFSETS) % buckets
    return signed.gather(1, (index - offset) % buckets).sum(0)


def fold(
    kept: Sequence[Tensor], layer_of: Sequence[int], seeds: Sequence[int], out: Tensor, cache: dict
) -> None:
    """Sketch what is kept of parameters of one dtype again, and add it to `out`, see :meth:`Plan.fold`.

    Args:
        kept: each dense, in any order of dimensions.
        layer_of, seeds: of each; sorted by layer.
        out: float32, shape (L, k').
        cache: where a backend keeps tables from one call to the next.
    """
    for x, layer, seed in zip(kept, layer_of, seeds, strict=True):
        flat = x.as_strided((x.numel(),), (1,)).float()
        out[layer] += sketch(flat, 0, seed ^ FOLD, out.shape[1])


def stretched(chunk: Tensor, first: int, seed: int) -> Tensor:
    """What is kept of a chunk of a gradient that begins at element `first`: float64, shape (k,)."""
    chunk = chunk.double()
    buckets, sq_norm = sketch(chunk, first, seed, BUCKETS), chunk.dot(chunk)
    # All zeros stay that; what has fallen into each other's buckets entirely becomes NaN.
    return torch.where(sq_norm == 0, 0.0, buckets * (sq_norm / buckets.dot(buckets)).sqrt())


def compare(kept: Tensor, prev: Tensor, runs: int) -> Tensor:
    """What :data:`ESTIMATED` names, of a chunk of so many runs, from what is kept of it: float64, (4,)."""
    kept, prev = kept.double(), prev.double()
    diff = kept - prev
    dot, prev_sq_norm = kept.dot(prev), prev.dot(prev)
    product = kept.dot(kept) * prev_sq_norm
    rest = torch.where(product == 0, 0.0, 1 - dot * dot / product)
    corrected, variance = dot * (1 + rest / (2 * BUCKETS)), product * rest * rest * (1 - 1 / runs) / BUCKETS
    return torch.stack([corrected, diff.dot(diff), prev_sq_norm, variance])


def inner_products(kept: Tensor) -> Tensor:
    """Estimates of <g, g'> for all pairs of T gradients of a tensor.

    Args:
        kept: what is kept of them, float64, shape (T, kept_size).

    Returns:
        Shape (T, T).
    """
    rows = kept.view(len(kept), -1, BUCKETS).transpose(0, 1)
    dots = rows @ rows.mT
    sq_norms = dots.diagonal(dim1=1, dim2=2)
    product = sq_norms[:, :, None] * sq_norms[:, None]
    rest = torch.where(product == 0, 0.0, 1 - dots * dots / product)
    return (dots * (1 + rest / (2 * BUCKETS))).sum(0)


class Batch(torch_backend.Batch):
    """As :class:`oscopt.kernels.BatchProtocol`, of parameters that are sketched: `prevs[i]` is what is kept
    of the last gradient, and is always overwritten with what is kept of this one. `align`: False: `alignment`
    and `momentum_sq_norm` are not needed."""

    def __init__(
        self, params: Sequence[Tensor], layer_of, num_layers, scale_of, seeds, align: bool = True
    ) -> None:
        super().__init__(params, layer_of, num_layers, scale_of)
        self._seeds = seeds

    def step(self, grads, prevs, bufs, copies, rows, hyper, out, scale=None, bound=None) -> None:
        exact = None if out is None else out[: len(EXACT_SUMS)]
        super().step(grads, None, bufs, None, rows, hyper, exact, scale, bound)
        if prevs is not None:
            sums = torch.zeros((len(ESTIMATED), out.shape[1]), dtype=torch.float64, device=out.device)
            for i, layer in enumerate(self._layer_of):
                sums[:, layer] += self._sketch(i, grads[i], prevs[i])
            out[ESTIMATED] = sums.masked_fill_(~sums.isfinite(), torch.nan)

    def _sketch(self, i: int, grad: Tensor, kept: Tensor) -> Tensor:
        """What :data:`ESTIMATED` names, of one gradient; it is kept."""
        size = grad.numel()
        flat = grad.as_strided((size,), (1,)) if dense(self._params[i]) else grad.reshape(-1)
        sums = torch.zeros(len(ESTIMATED), dtype=torch.float64, device=grad.device)
        step = chunk_size(size)
        for n, (chunk, place) in enumerate(zip(flat.split(step), kept.split(BUCKETS), strict=True)):
            new = stretched(chunk, n * step, self._seeds[i])
            sums += compare(new, place, -(-len(chunk) // BUCKETS))
            place.copy_(new)
        return sums
