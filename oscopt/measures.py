"""What follows from the sums that the kernels take, for numpy arrays and tensors alike.

With g_t a layer's gradient, eta the learning rate and s the layer's step scale, and as plain gradient
descent moves by x_t - x_{t-1} = -eta s g_{t-1}:

* correlation mu_t = <g_t, g_{t-1}> / (||g_t|| ||g_{t-1}||), Morchdi et al. 2023, eq. (2);
* directional curvature kappa_t = (||g_{t-1}||^2 - <g_t, g_{t-1}>) / (eta s ||g_{t-1}||^2), the Rayleigh
  quotient of the mean Hessian along the last step: eta s kappa > 1 flips the gradient's sign along the step,
  and eta s kappa = 2 is the edge of stability seen along the trajectory;
* directional smoothness ||g_t - g_{t-1}|| / (eta s ||g_{t-1}||), Mishkin et al. 2024, up to their factor 2;
* the Barzilai-Borwein step 1 / kappa_t and its dual <dx, dg> / ||dg||^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import torch

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def correlation(dot: Array, sq_norm: Array, prev_sq_norm: Array) -> Array:
    """mu, in [-1, 1]; NaN where a norm is 0 or not finite, or where `dot` is NaN."""
    if isinstance(dot, torch.Tensor):
        return (dot / (sq_norm.sqrt() * prev_sq_norm.sqrt())).clamp(-1.0, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(dot / (np.sqrt(sq_norm) * np.sqrt(prev_sq_norm)), -1.0, 1.0)


def curvature(dot: np.ndarray, prev_sq_norm: np.ndarray, step_size: np.ndarray) -> np.ndarray:
    """kappa; `step_size` is eta s, the one of the step from x_{t-1} to x_t."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (prev_sq_norm - dot) / (step_size * prev_sq_norm)


def smoothness(diff_sq_norm: np.ndarray, prev_sq_norm: np.ndarray, step_size: np.ndarray) -> np.ndarray:
    """||g_t - g_{t-1}|| / ||x_t - x_{t-1}||."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(diff_sq_norm) / (step_size * np.sqrt(prev_sq_norm))


def barzilai_borwein(
    dot: np.ndarray, prev_sq_norm: np.ndarray, diff_sq_norm: np.ndarray, step_size: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The long step ||dx||^2 / <dx, dg> and the short one <dx, dg> / ||dg||^2 (Barzilai and Borwein 1988)."""
    along = prev_sq_norm - dot
    with np.errstate(divide="ignore", invalid="ignore"):
        return step_size * prev_sq_norm / along, step_size * along / diff_sq_norm


def sketched_correlation(
    layers: Iterable[tuple[np.ndarray, np.ndarray]],
    products: Callable[[np.ndarray], np.ndarray],
    outer: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Correlations of pairs of gradients, and their standard errors, from sketches; see docs/sketch.md.

    Args:
        layers: for each layer the sketches of n gradients, (n, k'), and their squared norms, (n,).
        products: pairs up n vectors: their inner products, of any shape.
        outer: likewise n numbers: their products.

    Returns:
        Two float64 arrays of that shape, NaN where a norm is 0 or not finite.
    """
    dot: float | np.ndarray = 0.0
    variance: float | np.ndarray = 0.0
    total: float | np.ndarray = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        for sketches, sq_norm in layers:
            k = sketches.shape[1]
            vectors = sketches.astype(np.float64)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            weight = outer(np.sqrt(sq_norm))
            cosine = np.clip(products(vectors), -1.0, 1.0)
            rest = 1 - cosine * cosine
            # A layer without a gradient adds nothing.
            dot = dot + np.where(weight == 0, 0.0, weight * cosine * (1 + rest / (2 * k)))
            variance = variance + np.where(weight == 0, 0.0, (weight * rest) ** 2 / k)
            total = total + sq_norm
        norms = outer(np.sqrt(total))
        return np.clip(dot / norms, -1.0, 1.0), np.sqrt(variance) / norms
