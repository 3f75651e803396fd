"""How much memory there is, asked before it is taken."""

from __future__ import annotations

import torch

from .errors import UserError


def free(device: torch.device) -> int:
    """Bytes that may be taken on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def check(needed: int, what: str, options: str, device: torch.device | str = "cpu") -> None:
    """Raise if `what` takes more bytes than there are.

    Args:
        options: those that would make it smaller.

    Raises:
        UserError: it does.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        return
    try:
        there = free(device)
    except OSError:  # not Linux: the allocator will tell
        return
    if needed > there:
        raise UserError(
            f"{what} would take {needed / 2**30:,.1f} GiB of memory, and {there / 2**30:,.1f} GiB are free; "
            f"use a smaller {options}"
        )
