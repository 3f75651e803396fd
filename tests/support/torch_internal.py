"""torch's own material for testing optimizers, which it does not promise to keep.

Nothing else in these tests uses what is internal to torch.
"""

try:
    from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db
except ImportError as error:
    raise ImportError(
        "torch has moved the material of its optimizers' tests, or it needs a package that is not installed: "
        "find `optim_db` and `OptimizerErrorEnum` in torch/testing/_internal and import them here; "
        f"only tests/oscopt/test_torch_optim.py depends on them ({error})"
    ) from error

__all__ = ["OptimizerErrorEnum", "optim_db"]
