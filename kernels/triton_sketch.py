"""GPUs: the update and the sketch of :mod:`oscopt.kernels.sketch` in one launch, then two small ones.

A program updates a tile of :data:`ROWS` runs, as the step kernel does it, and gathers the tile's buckets:
bucket b reads element (b - o) mod k of a run that is rotated by o, which the cache still holds. Nothing is
scattered, there are no atomics. The second kernel adds the tiles of each chunk in a fixed order, compares the
sketch with what is kept and overwrites that; the third sums up layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import addresses, triton_backend
from .sketch import BUCKETS, FOLD, SUMS, chunk_size, kept_dtype
from .triton_backend import ELEMENT, cut, sketched_run

ROWS = 16  # runs of a tile
TILE = ROWS * BUCKETS  # elements of a program
SMALL_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
VARIANT: dict[str, Any] = {"measure": True, "pair": False, "copy": False, "sketch": True, "tile": TILE}
"""Of the arguments of :func:`oscopt.kernels.triton_backend.constants`, what sketching fixes."""


@triton.jit
def chunk_kernel(
    pointers_ptr,  # int64 (4, N)
    tensor_ptr,  # int32 (chunks,): each chunk's tensor
    number_ptr,  # int32 (chunks,): its number there
    runs_ptr,  # int32 (chunks,): how many runs it has
    bounds_ptr,  # int32 (chunks + 1,): its first tile
    tile_ptr,  # float64 (tiles, 6): the tiles' sums
    bucket_ptr,  # (tiles, BUCKETS)
    partial_ptr,  # float64 (chunks, 7)
    N,
    KEPT: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """Add up the tiles of one chunk, compare it with what is kept, and keep it."""
    chunk = tl.program_id(0)
    k = tl.load(tensor_ptr + chunk)
    lanes = tl.arange(0, BUCKETS)
    buckets = tl.zeros((BUCKETS,), tl.float64)
    sq_norm = tl.zeros((1,), tl.float64)
    alignment = tl.zeros((1,), tl.float64)
    momentum_sq_norm = tl.zeros((1,), tl.float64)
    one = tl.arange(0, 1)
    first = tl.load(bounds_ptr + chunk)
    bucket_ptr += first.to(tl.int64) * BUCKETS + lanes
    tile_ptr += 6 * first.to(tl.int64) + one
    for _ in range(tl.load(bounds_ptr + chunk + 1) - first):
        buckets += tl.load(bucket_ptr).to(tl.float64)
        sq_norm += tl.load(tile_ptr + 1)
        alignment += tl.load(tile_ptr + 4)
        momentum_sq_norm += tl.load(tile_ptr + 5)
        bucket_ptr += BUCKETS
        tile_ptr += 6
    sq_norm = tl.sum(sq_norm)
    # All zeros stay that; what has fallen into each other's buckets entirely becomes NaN.
    stretch = tl.where(sq_norm == 0, 0.0, tl.sqrt(sq_norm / tl.sum(buckets * buckets)))
    new = buckets * stretch
    kept_ptr = tl.load(pointers_ptr + 2 * N + k).to(tl.pointer_type(KEPT))
    kept_ptr += tl.load(number_ptr + chunk).to(tl.int64) * BUCKETS + lanes
    old = tl.load(kept_ptr).to(tl.float64)
    tl.store(kept_ptr, new.to(KEPT))
    diff = new - old
    dot = tl.sum(new * old)
    prev_sq_norm = tl.sum(old * old)
    product = sq_norm * prev_sq_norm
    rest = tl.where(product == 0, 0.0, 1 - dot * dot / product)
    partial_ptr += 7 * chunk.to(tl.int64)
    tl.store(partial_ptr, dot * (1 + rest / (2 * BUCKETS)))
    tl.store(partial_ptr + 1, sq_norm)
    tl.store(partial_ptr + 2, tl.sum(diff * diff))
    tl.store(partial_ptr + 3, prev_sq_norm)
    tl.store(partial_ptr + 4, tl.sum(alignment))
    tl.store(partial_ptr + 5, tl.sum(momentum_sq_norm))
    different = 1 - 1 / tl.load(runs_ptr + chunk).to(tl.float64)
    tl.store(partial_ptr + 6, product * rest * rest * different / BUCKETS)


@triton.jit
def gather_kernel(
    pointers_ptr,  # int64 (N,): addresses of what is kept
    tensor_ptr,  # int32 (tiles,): each tile's tensor
    start_ptr,  # int64 (tiles,): its first element
    stop_ptr,  # int64 (tiles,): behind its last one
    seed_ptr,  # int64 (N,)
    bucket_ptr,  # COMPUTE (tiles, BUCKETS)
    ELEMENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """The buckets of one tile of what is kept."""
    tile = tl.program_id(0)
    k = tl.load(tensor_ptr + tile)
    start = tl.load(start_ptr + tile)
    count = (tl.load(stop_ptr + tile) - start).to(tl.int32)
    x_ptr = tl.load(pointers_ptr + k).to(tl.pointer_type(ELEMENT)) + start
    seed = tl.load(seed_ptr + k).to(tl.uint32)
    buckets = tl.zeros((BUCKETS,), COMPUTE)
    for offset in range(0, count, BUCKETS):
        run = (start + offset) // BUCKETS
        buckets += sketched_run(x_ptr + offset, run, count - offset, seed, COMPUTE, True, BUCKETS)
    tl.store(bucket_ptr + tile.to(tl.int64) * BUCKETS + tl.arange(0, BUCKETS), buckets)


@triton.jit
def fold_kernel(
    bucket_ptr,  # (tiles, BUCKETS)
    bounds_ptr,  # int32 (L + 1,): each layer's first tile
    out_ptr,  # float32 (L, BUCKETS), rows `stride` apart: added to
    stride,
    BUCKETS: tl.constexpr,
):
    """Add the buckets of one layer, in a fixed order."""
    layer = tl.program_id(0)
    lanes = tl.arange(0, BUCKETS)
    total = tl.zeros((BUCKETS,), tl.float64)
    first = tl.load(bounds_ptr + layer)
    bucket_ptr += first.to(tl.int64) * BUCKETS + lanes
    for _ in range(tl.load(bounds_ptr + layer + 1) - first):
        total += tl.load(bucket_ptr).to(tl.float64)
        bucket_ptr += BUCKETS
    out_ptr += layer * stride + lanes
    tl.store(out_ptr, (tl.load(out_ptr).to(tl.float64) + total).to(tl.float32))


class Batch(triton_backend.Batch):
    """See :class:`oscopt.kernels.sketch.Batch`."""

    def __init__(
        self, params: Sequence[Tensor], layer_of, num_layers, scale_of, seeds, align: bool = True
    ) -> None:
        super().__init__(params, layer_of, num_layers, scale_of)
        sizes = np.array([p.numel() for p in params], np.int64)
        of_chunk, first, last = cut(sizes, [chunk_size(size) for size in sizes.tolist()])
        chunk_of, start, stop = cut(last - first, TILE)
        start, stop = start + first[chunk_of], stop + first[chunk_of]
        runs = -(-(last - first) // BUCKETS)
        number = np.arange(len(of_chunk)) - np.searchsorted(of_chunk, of_chunk)
        tile_bounds = np.searchsorted(chunk_of, np.arange(len(of_chunk) + 1))
        chunk_bounds = np.searchsorted(np.asarray(layer_of)[of_chunk], np.arange(num_layers + 1))
        self._seeds = self._upload(np.array(seeds, np.int64))
        self._sketch_tiles = self._tables_of(of_chunk[chunk_of], start, stop)
        self._chunks = [self._upload(x.astype(np.int32)) for x in (of_chunk, number, runs, tile_bounds)]
        self._chunk_bounds = self._upload(chunk_bounds.astype(np.int32))

    def step(self, grads, prevs, bufs, copies, rows, hyper, out, scale=None, bound=None) -> None:
        if prevs is None:
            super().step(grads, None, bufs, None, rows, hyper, out, scale, bound)
            return
        tiles, chunks = len(self._sketch_tiles["start_ptr"]), len(self._chunks[0])
        # Needed for the moment only: not to be held.
        sums, partials = (
            torch.empty((n, width), dtype=torch.float64, device=self._device)
            for n, width in ((tiles, 6), (chunks, len(SUMS)))
        )
        buckets = torch.empty((tiles, BUCKETS), dtype=kept_dtype(self._dtype), device=self._device)
        arguments = self._arguments(grads, prevs, bufs, None, rows, hyper)
        arguments |= {"partial_ptr": sums, "bucket_ptr": buckets, "seed_ptr": self._seeds}
        self._launch(self._sketch_tiles, arguments, VARIANT, bufs, hyper, scale, bound)
        kept = {"KEPT": ELEMENT[kept_dtype(self._dtype)], "BUCKETS": BUCKETS}
        chunk_kernel[(chunks,)](
            arguments["pointers_ptr"],
            *self._chunks,
            sums,
            buckets,
            partials,
            len(grads),
            **kept,
            **SMALL_OPTIONS,
        )
        self._reduce(partials, self._chunk_bounds, True, bufs is not None, out)


def fold(
    kept: Sequence[Tensor], layer_of: Sequence[int], seeds: Sequence[int], out: Tensor, cache: dict
) -> None:
    """See :func:`oscopt.kernels.sketch.fold`."""
    dtype, buckets = kept[0].dtype, out.shape[1]
    where = addresses(kept)
    key = dtype, buckets, where.tobytes()
    if key not in cache:
        sizes = np.array([x.numel() for x in kept], np.int64)
        tensor, start, stop = cut(sizes, ROWS * buckets)
        bounds = np.searchsorted(np.asarray(layer_of)[tensor], np.arange(len(out) + 1)).astype(np.int32)
        tables = where, tensor, start, stop, np.array(seeds, np.int64) ^ FOLD, bounds
        cache[key] = [torch.from_numpy(x).to(out.device) for x in tables]
    *tables, bounds = cache[key]
    tiles = len(tables[1])
    partial = torch.empty((tiles, buckets), dtype=kept_dtype(dtype), device=out.device)
    kinds = {"ELEMENT": ELEMENT[dtype], "COMPUTE": ELEMENT[kept_dtype(dtype)]}
    if tiles:
        gather_kernel[(tiles,)](*tables, partial, **kinds, BUCKETS=buckets, **SMALL_OPTIONS)
        fold_kernel[(len(out),)](partial, bounds, out, out.stride(0), BUCKETS=buckets, **SMALL_OPTIONS)
