"""A CUDA graph without a GPU: what runs while it captures is repeated by replay(), and nothing else."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oscopt import device_log, kernels, monitor, optimizer, tracker
from oscopt.kernels import triton_backend, triton_sketch


class FakeGraph:
    """Captures tensor operations and launches of Triton kernels (by its interpreter) with their memory.

    As in a real graph, numbers are those of the capture, tensors are read and written where they lay then,
    and a value that the host asks for is an error.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self._work: list[Callable[[], Any]] = []
        self._addressed: list[weakref.ref] = []

    @contextlib.contextmanager
    def capture(self):
        """Everything in here is captured. Unlike in a real graph it also runs: a capture is a step."""
        with self._patch.context() as patch:
            for module in (device_log, kernels, monitor, optimizer, tracker, triton_backend):
                patch.setattr(module, "capturing", lambda device: True)
            for module in (triton_backend, triton_sketch):
                for name in [name for name in vars(module) if name.endswith("_kernel")]:
                    patch.setattr(module, name, _Launches(getattr(module, name), self._work))
            patch.setattr(kernels.Plan, "step", self._noting(kernels.Plan.step))
            with _Operations(self._work):
                yield self

    def _noting(self, step: Callable) -> Callable:
        """That kernels get addresses, which keep nothing alive."""

        def noting(plan, grads, prevs, bufs, *rest):
            for tensors in (prevs, bufs):
                self._addressed += [weakref.ref(t) for t in tensors or () if t is not None]
            return step(plan, grads, prevs, bufs, *rest)

        return noting

    def dangling(self) -> int:
        """How many of the tensors whose addresses it has captured are gone; it cannot be replayed then."""
        self._work.clear()
        gc.collect()
        return sum(ref() is None for ref in self._addressed)

    @torch.no_grad()
    def replay(self) -> None:
        for work in self._work:
            work()


class _Calls:
    def __init__(self, function: Callable, work: list) -> None:
        self._function, self._work = function, work

    def __call__(self, *args, **kwargs):
        def run():
            with torch.utils._python_dispatch._disable_current_modes():
                self._function(*args, **kwargs)

        self._work.append(run)
        run()


class _Launches:
    def __init__(self, kernel, work: list) -> None:
        self._kernel, self._work = kernel, work

    def __getitem__(self, grid):
        return _Calls(self._kernel[grid], self._work)


class _Operations(TorchDispatchMode):
    def __init__(self, work: list) -> None:
        super().__init__()
        self._work = work

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host has asked for a value while capturing")
        results = function(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        given = set(map(id, inputs))
        memory = {x.untyped_storage().data_ptr() for x in inputs}
        new = [x for x in _tensors(results) if id(x) not in given]
        if new and all(x.untyped_storage().data_ptr() in memory for x in new):
            return results  # views are no work: where they lie stays as it is
        without_values = str(function).startswith("aten.empty")

        def again():
            for value, kept in zip(_tensors(function(*args, **kwargs)), _tensors(results), strict=True):
                if id(kept) not in given and not without_values:
                    kept.copy_(value)

        self._work.append(again)
        return results


def _tensors(values: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
