"""Parameters that are spread over processes: who measures what, and how the sums come together.

Each rank holds a piece of a DTensor; where a mesh dimension replicates, several hold the same piece. The
lowest of them measures it, so that each element counts once, and one all-reduce of the sums of all layers,
a few numbers each, gives every rank the whole. Plain tensors are whole on every rank: under
``DistributedDataParallel`` every rank has the same gradient of them, and nothing needs to be reduced.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a ``torch.distributed.tensor.DTensor``; does not import that, as it takes its time."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def bare(tensor: Tensor) -> Tensor:
    """The real tensor in this process's memory behind a DTensor or a complex tensor; else itself."""
    if is_dtensor(tensor):
        tensor = tensor._local_tensor  # to_local() makes a new object each time
        if hasattr(tensor, "wait"):  # an AsyncCollectiveTensor
            tensor = tensor.wait()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def copyable(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of a DTensor that ``copy.deepcopy`` cannot copy: torch's fails where the local part
    does not begin where its memory begins, as gradients of FSDP."""
    return tensor.clone() if is_dtensor(tensor) and tensor.storage_offset() else tensor


_under_way: set[Any] = set()  # sums over gloo that nobody has waited for yet
_PATIENCE = timedelta(seconds=10)  # with a rank that is stuck, as this one ends


class Ranks:
    """The processes that hold parts of some parameters, and which part this one measures.

    Making one is a collective operation of all of them.

    Args:
        names, params, layers: the parameters' names, tensors and layers.
        settings: what else all ranks must have alike, by name.

    Attributes:
        counted: for every parameter, whether this rank measures its piece of it.

    Raises:
        ValueError: on every rank, if the ranks differ in names, layers or settings.
    """

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        layers: Sequence[str | None],
        settings: dict[str, Any],
    ) -> None:
        import torch.distributed as dist

        self.description = describe(names, params, layers, settings)
        self._group: Any  # torch's functions give a number where this process is no member
        mesh = max((p.device_mesh for p in params if is_dtensor(p)), key=lambda mesh: mesh.size())
        if mesh.size() == dist.get_world_size():
            self._group = dist.group.WORLD
        elif mesh.ndim == 1:
            self._group = mesh.get_group()
        else:
            self._group = dist.new_group(mesh.mesh.flatten().tolist(), use_local_synchronization=True)
        self.rank = dist.get_rank(self._group)
        self.size = dist.get_world_size(self._group)
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, self.description, self._group)
        for rank, other in enumerate(everyone):
            _compare(everyone[0], other, rank)
        atexit.unregister(_leave)  # once is enough
        atexit.register(_leave)
        self.counted = [
            min(rank for rank, other in enumerate(everyone) if other["pieces"][i] == piece) == self.rank
            for i, piece in enumerate(self.description["pieces"])
        ]

    def check(self) -> None:
        """Raise if the process group is gone.

        Raises:
            RuntimeError: it is.
        """
        import torch.distributed as dist

        if not dist.is_initialized():
            raise RuntimeError(
                f"rank {self.rank} of {self.size}: the process group of the sharded parameters is gone "
                "(destroy_process_group() was called); step before that, or build model and optimizer anew"
            )

    def reduce(self, sums: Tensor) -> Any:
        """Start summing `sums` over the ranks, in place; what is returned waits for it, in ``wait``."""
        import torch.distributed as dist

        work = dist.all_reduce(sums, group=self._group, async_op=True)
        if sums.device.type == "cpu":
            _under_way.add(work)
        return work

    def wait(self, work: Any) -> None:
        """Wait for what :meth:`reduce` started; on a GPU only the stream does.

        Raises:
            RuntimeError: another rank is gone.
        """
        _under_way.discard(work)
        try:
            work.wait()
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size}: the sums of the layers could not be added up, as another "
                f"rank has stopped or is stuck ({error})"
            ) from error


def _leave() -> None:
    """Before the interpreter goes: send the others what they lack of this rank's last sums.

    Then leave gloo's threads a moment. They need the interpreter's lock to let go of finished work that a
    backward pass has started (FSDP's), and abort the process if they get it no more.
    """
    while _under_way:
        with contextlib.suppress(RuntimeError):  # another rank is gone or stuck: so be it
            _under_way.pop().wait(_PATIENCE)
    time.sleep(0.02)


def describe(
    names: Sequence[str], params: Sequence[Tensor], layers: Sequence[str | None], settings: dict[str, Any]
) -> dict[str, Any]:
    """What the ranks tell each other."""
    return {
        "names": list(names),
        "layers": list(layers),
        "settings": settings,
        "pieces": [piece(p) for p in params],
    }


def piece(param: Tensor) -> tuple[int | None, ...]:
    """Which piece of a parameter this rank holds: its place along the mesh dimensions that shard it."""
    if not is_dtensor(param):
        return ()
    places = param.device_mesh.get_coordinate() or ()
    pairs = zip(places, param.placements, strict=True)
    return tuple(None if placement.is_replicate() else place for place, placement in pairs)


def _compare(first: dict[str, Any], other: dict[str, Any], rank: int) -> None:
    for name, value in first["settings"].items():
        if other["settings"][name] != value:
            raise ValueError(
                f"the ranks disagree: {name} is {value!r} on rank 0 and {other['settings'][name]!r} on rank "
                f"{rank}; give all the same"
            )
    if len(first["names"]) != len(other["names"]):
        raise ValueError(
            f"the ranks disagree: rank 0 has {len(first['names'])} parameters and rank {rank} has "
            f"{len(other['names'])}; give all the same"
        )
    for i, name in enumerate(first["names"]):
        if other["names"][i] != name:
            raise ValueError(
                f"the ranks disagree: parameter {i} is {name!r} on rank 0 and {other['names'][i]!r} on rank "
                f"{rank}; give all the same, in the same order"
            )
        if other["layers"][i] != first["layers"][i]:
            raise ValueError(
                f"the ranks disagree on the layers: {name!r} is in {first['layers'][i]!r} on rank 0 and in "
                f"{other['layers'][i]!r} on rank {rank}; pass the same layers on every rank"
            )
