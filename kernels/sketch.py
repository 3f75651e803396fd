"""A short random projection of each gradient, the same at every step: the definition, in tensor operations.

A *sketch* is a linear map S from n elements to k *buckets*: every run of k consecutive elements is rotated
by a random offset, its elements get random signs, and the runs are added up. E <Sx, Sy> = <x, y>, as signs
and offsets do not depend on x and y: a CountSketch (Charikar, Chen, Farach-Colton 2002) that hashes runs in
place of single elements, which makes it a loop over consecutive memory. docs/sketch.md has the mathematics.

A tensor is cut into chunks of consecutive elements, in the order of memory, each with :data:`BUCKETS`
buckets of its own. What is kept of a step is, chunk by chunk, the sketch stretched to the chunk's exact norm;
a tensor of at most :data:`WHOLE` elements is kept itself. Of two kept chunks a and b, with cosine c,

* <g, g'> is estimated by <a, b> (1 + (1 - c^2) / 2k): the cosine of sketches is biased towards 0 by that
  factor, at first order;
* its variance is ||a||^2 ||b||^2 (1 - c^2)^2 / k, and 0 for a tensor that is kept itself;
* ||g - g'||^2 is estimated by ||a - b||^2, which keeps its relative accuracy however close they are.

A layer's sums are those of its chunks. What is kept of a layer can be sketched again, to one vector of k'
floats (:func:`fold`), and those of any two steps be compared.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from . import dense, torch_backend

VERSION = 1
"""Of the map: sketches of different versions cannot be compared."""

SUMS = ("dot", "sq_norm", "diff_sq_norm", "prev_sq_norm", "dot_variance")
"""Names of the rows of a sketching plan's output."""

BUCKETS = 1024  # k: the standard error of a chunk's cosine is at most 1/32
WHOLE = 1 << 14  # elements of a tensor up to which it is kept itself

GOLDEN, ODD, ODDER = 0x9E3779B1, 0x7FEB352D, 0x846CA68B  # Wellons' "lowbias32", after a Weyl sequence
OFFSETS = 0x68E31DA4  # what tells the seed of a map's offsets from that of its signs
FOLD = 0x5BD1E995  # what tells the seed of a tensor's second sketch from its first


def chunk_size(size: int) -> int:
    """Elements of a chunk of a tensor of `size` elements: a 16th of it from 2^11 to 2^16, a 64th beyond."""
    if size <= WHOLE:
        return max(size, 1)
    wanted = max(min(max(size // 16, 1 << 11), 1 << 16), size // 64)
    return -(-wanted // BUCKETS) * BUCKETS


def kept_size(size: int) -> int:
    """Elements that are kept of a tensor of `size` elements."""
    return size if size <= WHOLE else -(-size // chunk_size(size)) * BUCKETS


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of what is kept of gradients of `dtype`."""
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
    minus = hashed(index // 32, seed) >> (31 - index % 32) & 1  # 32 elements share a hash
    signed = torch.where(minus == 1, -signed, signed)
    offset = hashed(index[:, :1] // buckets, seed ^ OFFSETS) % buckets
    return signed.gather(1, (index - offset) % buckets).sum(0)


def fold(kept: Tensor, seed: int, buckets: int) -> Tensor:
    """What is kept of a tensor, sketched again to `buckets`; the seed is the tensor's."""
    return sketch(kept, 0, seed ^ FOLD, buckets)


def keep(chunk: Tensor, first: int, seed: int, whole: bool) -> Tensor:
    """What is kept of a chunk of a gradient that begins at element `first`: float64."""
    chunk = chunk.double()
    if whole:
        return chunk
    buckets = sketch(chunk, first, seed, BUCKETS)
    sq_norm = chunk.dot(chunk)
    # All zeros stay that; what has fallen into each other's buckets entirely becomes NaN.
    return torch.where(sq_norm == 0, 0.0, buckets * (sq_norm / buckets.dot(buckets)).sqrt())


def compare(kept: Tensor, prev: Tensor, whole: bool) -> Tensor:
    """:data:`SUMS` of one chunk, of what is kept of two gradients: float64, shape (5,)."""
    kept, prev = kept.double(), prev.double()
    diff = kept - prev
    dot, sq_norm, prev_sq_norm = kept.dot(prev), kept.dot(kept), prev.dot(prev)
    product = sq_norm * prev_sq_norm
    rest = torch.where(product == 0, 0.0, 1 - dot * dot / product) * (not whole)
    corrected, variance = dot * (1 + rest / (2 * BUCKETS)), product * rest * rest / BUCKETS
    return torch.stack([corrected, sq_norm, diff.dot(diff), prev_sq_norm, variance])


class Batch(torch_backend.Batch):
    """See :class:`oscopt.kernels.BatchProtocol`."""

    def __init__(self, params: Sequence[Tensor], layer_of, num_layers, scale_of, seeds) -> None:
        super().__init__(params, layer_of, num_layers, scale_of)
        self._seeds = seeds

    def step(self, grads, prevs, bufs, copies, rows, hyper, out, scale=None) -> None:
        if prevs is not None:
            out.zero_()
            for i, layer in enumerate(self._layer_of):
                if layer >= 0:
                    out[:, layer] += self._sketch(i, grads[i], prevs[i])
            out.masked_fill_(~out.isfinite(), torch.nan)
        super().step(grads, None, bufs, None, rows, hyper, None, scale)

    def _sketch(self, i: int, grad: Tensor, kept: Tensor) -> Tensor:
        """:data:`SUMS` of one gradient; it is kept."""
        size = grad.numel()
        flat = grad.as_strided((size,), (1,)) if dense(self._params[i]) else grad.reshape(-1)
        step, whole = chunk_size(size), size <= WHOLE
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=grad.device)
        chunks = zip(flat.split(step), kept.split(step if whole else BUCKETS), strict=True)
        for n, (chunk, place) in enumerate(chunks):
            new = keep(chunk, n * step, self._seeds[i], whole)
            sums += compare(new, place, whole)
            place.copy_(new)
        return sums

    def fold(self, kept: Sequence[Tensor], out: Tensor) -> None:
        """See :meth:`oscopt.kernels.Plan.fold`."""
        out.zero_()
        for i, layer in enumerate(self._layer_of):
            if layer >= 0:
                out[layer] += fold(kept[i], self._seeds[i], out.shape[1])
