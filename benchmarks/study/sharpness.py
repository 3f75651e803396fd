"""The sharpness: the largest eigenvalue of the Hessian of the full-batch loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def top_eigenvalue(
    losses: Callable[[], object], parameters: Sequence[Tensor], *, tolerance: float = 1e-3, seed: int = 0
) -> float:
    """The largest eigenvalue (not the largest in size) of the Hessian of the sum of `losses`.

    Lanczos' method (ARPACK) on Hessian-vector products, one backward through a backward for each micro-batch.

    Args:
        losses: called for every product; yields the loss of each micro-batch, one at a time.
        parameters: in which the Hessian is taken; float32 or float64.
        tolerance: relative, of the eigenvalue.
        seed: of the vector that Lanczos starts from, so that the same weights give the same bits.

    Returns:
        The eigenvalue; NaN if a product is not finite.

    Raises:
        scipy.sparse.linalg.ArpackNoConvergence: the eigenvalue was not found to `tolerance`.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    parameters = list(parameters)
    count = sum(p.numel() for p in parameters)
    kind = np.float64 if parameters[0].dtype == torch.float64 else np.float32

    def product(vector: np.ndarray) -> np.ndarray:
        flat = torch.from_numpy(np.ascontiguousarray(vector.ravel(), kind)).to(parameters[0].device)
        direction = [part.view_as(p) for part, p in _parts(flat, parameters)]
        total = torch.zeros_like(flat)
        for loss in losses():
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
            along = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
            # A linear model's loss depends on every parameter to second order, a ReLU's bias may not.
            second = torch.autograd.grad(along, parameters, materialize_grads=True)
            total += torch.cat([s.reshape(-1) for s in second])
        result = total.cpu().numpy()
        if not np.isfinite(result).all():
            raise FloatingPointError
        return result

    start = np.random.default_rng(seed).standard_normal(count).astype(kind)
    try:
        if count < 3:  # ARPACK needs more than two dimensions
            matrix = np.stack([product(row) for row in np.eye(count, dtype=kind)])
            return float(np.linalg.eigvalsh((matrix + matrix.T) / 2)[-1])
        operator = LinearOperator((count, count), matvec=product, dtype=kind)
        (value,) = eigsh(operator, k=1, which="LA", v0=start, tol=tolerance, return_eigenvectors=False)
        return float(value)
    except FloatingPointError:
        return float("nan")


def _parts(flat: Tensor, parameters: Sequence[Tensor]):
    """Pieces of `flat`, each with the parameter of its size."""
    return zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)
