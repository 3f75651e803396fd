"""Measure a fixed, pseudo-random part of each layer: unbiased estimates of the four sums, with their error.

A gradient is cut into aligned blocks of :data:`BLOCK` elements, in the order of memory; S neighbouring blocks
are a *stratum*, of which one block is drawn, once for the whole run; :data:`GROUP` neighbouring strata are a
*group*. (Blocks that would lie behind the gradient's end count as zeros.) Then

* S times a sum over the drawn blocks is unbiased for that over all (Horvitz and Thompson 1952);
* its covariance with another such sum is estimated by collapsed strata, half the strata of a group against
  the other half: products of the two sums' *contrasts* (the drawn blocks' values, added up with
  :data:`SIGNS`), summed over groups, times S^2 (1 - 1/S) (Cochran, Sampling Techniques, 3rd ed., section
  5A.12; Wolter, Introduction to Variance Estimation, 2nd ed., section 2.5). It errs to the large side, by
  how much the strata of a group differ; the order of the signs keeps linear and quadratic trends out of that;
* the correlation D / sqrt(N P), a ratio estimator, inherits its variance by linearisation (Cochran, 6.3).

Gradients are made of rows and channels of very different size. One block of every stratum touches them all,
and small blocks touch more of them; numbers are in docs/performance.md.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
from torch import Tensor

BLOCK = 8  # elements: with float32 32 bytes, a sector of a GPU's cache line
SIGNS = (1, -1, -1, 1, -1, 1, 1, -1)  # of the strata of a group (Thue and Morse's sequence)
GROUP = len(SIGNS)  # strata; fewer cost more time, more leave the error too uncertain
LEAST = 16384  # elements of a tensor that are measured at least, if it has them

MOMENTS = ("dot dot", "sq_norm sq_norm", "prev_sq_norm prev_sq_norm") + (
    "dot sq_norm",
    "dot prev_sq_norm",
    "sq_norm prev_sq_norm",
)
"""The rows of a sampling plan's output behind the four of :data:`oscopt.kernels.SUMS`: their covariances."""


@dataclass(frozen=True)
class Drawn:
    """The drawn blocks of one tensor.

    Attributes:
        number: of each block, int32, shape (m,), ascending; m is a multiple of :data:`GROUP`. A block beyond
            the end of the tensor is empty, and the last one in it may be shorter.
        stratum: S, the number of blocks of which one is drawn.
    """

    number: np.ndarray
    stratum: int

    @property
    def kept_size(self) -> int:
        """Elements to be kept of a gradient: block i of the drawn ones lies at BLOCK * i."""
        return BLOCK * len(self.number)

    @property
    def moment_scale(self) -> float:
        """What turns sums of products of contrasts into covariances."""
        return float(self.stratum * (self.stratum - 1))


NOTHING = Drawn(np.zeros(0, np.int32), 1)
"""What is drawn of a tensor that is not measured."""


def draw(size: int, fraction: float, name: str) -> Drawn:
    """Draw blocks of a tensor of `size` elements.

    Args:
        fraction: in (0, 1]; 1/S with S rounded down is drawn.
        name: the tensor's, which decides the choice: the same in every run.
    """
    blocks = math.ceil(size / BLOCK)
    stratum = max(1, math.floor(min(1 / fraction, size / LEAST)))
    strata = math.ceil(blocks / (stratum * GROUP)) * GROUP
    chosen = np.random.default_rng(zlib.crc32(name.encode())).integers(0, stratum, strata)
    return Drawn((np.arange(strata) * stratum + chosen).astype(np.int32), stratum)


def estimate(sums: Tensor, row: Tensor) -> None:
    """The four sums and the standard error of the correlation.

    Args:
        sums: float64 (10, L), a sampling plan's output; all zeros in rows 4 to 9: measured in full.
        row: float64 (5, L), overwritten.
    """
    if row.device.type == "cpu":
        sums, row = sums.numpy(), row.numpy()  # the same arithmetic with a tenth of the time per operation
    row[:4] = sums[:4]
    dot, sq_norm, _, prev_sq_norm, dd, nn, pp, dn, dp, np_ = sums
    with np.errstate(all="ignore"):
        # The linear part of D / sqrt(N P) at the estimates: its derivatives by D, N and P.
        by_dot = sq_norm**-0.5 * prev_sq_norm**-0.5
        mu = dot * by_dot
        by_sq, by_prev = mu / sq_norm / -2, mu / prev_sq_norm / -2
        variance = by_dot * (by_dot * dd + 2 * (by_sq * dn + by_prev * dp))
        variance += by_sq * (by_sq * nn + 2 * by_prev * np_) + by_prev * by_prev * pp
        # Rounding may leave a zero a little negative; max() would take the NaNs out.
        row[4] = ((variance + abs(variance)) / 2) ** 0.5
