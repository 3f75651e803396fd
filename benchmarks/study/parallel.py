"""Several processes, started by torchrun, that share the micro-batches of a run.

The first one decides, records and writes; the others follow it, epoch by epoch. All have the same weights
and, as gradients are added up over them, take the same steps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Ranks:
    """This process and those beside it.

    Attributes:
        rank: this one's number; 0 decides.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._told_to_stop = False

    def device(self, name: str) -> torch.device:
        """The device called `name`; where that is any GPU, each process's own."""
        if self.size > 1 and name == "cuda":
            return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        return torch.device(name)

    def mine(self, batches: Sequence[T]) -> Sequence[T]:
        """The micro-batches that this process takes: every `size`-th."""
        return batches[self.rank :: self.size]

    def add_up(self, model: nn.Module, loss: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the gradients, the loss and the number of right answers over the processes."""
        if self.size == 1:
            return loss, correct
        import torch.distributed as dist

        params = list(model.parameters())
        for p in params:
            if p.grad is None:  # more processes than micro-batches
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in params]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        parts = flat.split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [part.view(g.shape) for part, g in zip(parts, grads, strict=True)])
        numbers = torch.stack([loss.double(), correct.double()])
        dist.all_reduce(numbers)
        return numbers[0].to(loss.dtype), numbers[1].to(correct.dtype)

    def say(self, what: Any) -> None:
        """What the first process tells the others: how to begin, to go on, or None: to stop, once."""
        if self.size > 1 and not self._told_to_stop:
            import torch.distributed as dist

            self._told_to_stop = what is None
            dist.broadcast_object_list([what], src=0)

    def hear(self) -> Any:
        """What the first process says."""
        import torch.distributed as dist

        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, src=0)
        return heard[0]

    def close(self) -> None:
        """Part."""
        if self.size > 1:
            import torch.distributed as dist

            if self.rank == 0:
                self.say(None)
            dist.barrier()  # none leaves while another still reads from it


def leave(code: int) -> NoReturn:
    """End this process, started by torchrun or not."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Taken down by the interpreter, gloo's threads now and then abort the process (seen with torch 2.14).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def start() -> Ranks:
    """Meet the processes that torchrun has started with this one; alone without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size())
