"""Interleaved timing: every contender once a round, in an order that turns, so that drift hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from .contenders import Contender
from .sets import ParameterSet


@dataclass
class Timing:
    """What was measured of one contender: milliseconds a step, one entry a round."""

    contender: Contender
    step_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    extra_bytes: int = 0


_COLD_BYTES = 128 << 20  # more than the caches hold


@dataclass
class Problem:
    """Parameters that all contenders share (they only nudge them), and two gradients in turn."""

    params: list[Parameter]
    grads: list[list[Tensor]]
    other: Tensor | None = None  # what is written before each timed step, so that it starts cold

    @classmethod
    def of(
        cls, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, cold: bool = False
    ) -> Problem:
        """Random values; the gradients of two steps."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(scale: float) -> list[Tensor]:
            options = {"dtype": dtype, "device": device, "generator": generator}
            return [torch.randn(shape, **options).mul_(scale) for shape in shapes]

        other = torch.empty(_COLD_BYTES, dtype=torch.uint8, device=device) if cold else None
        return cls([Parameter(t) for t in draw(0.1)], [draw(1e-3), draw(1e-3)], other)


def bytes_needed(elements: int, itemsize: int, chosen: Sequence[Contender]) -> int:
    """Memory of a problem with all contenders' own: parameters and two gradients are shared."""
    return elements * itemsize * (3 + sum(c.own for c in chosen))


class _Runner:
    """One contender on one problem."""

    def __init__(self, contender: Contender, problem: Problem) -> None:
        self._problem = problem
        self._turn = 0
        self._repeat = contender.repeat
        self._step, self.extra = contender.build(problem.params, problem.grads[0])
        self._cuda = problem.params[0].is_cuda

    def _next_gradient(self) -> None:
        for p, g in zip(self._problem.params, self._problem.grads[self._turn], strict=True):
            p.grad = g
        self._turn = 1 - self._turn

    def __call__(self) -> tuple[float, float]:
        """Milliseconds of a step, and of the host's part in it (on a CPU they are the same)."""
        total = host = 0.0
        for _ in range(self._repeat):
            self._next_gradient()
            if self._problem.other is not None:
                self._problem.other.zero_()
            if self._cuda:
                before, after = torch.cuda.Event(True), torch.cuda.Event(True)
                torch.cuda.synchronize()
                before.record()
                started = time.perf_counter()
                self._step()
                host += time.perf_counter() - started
                after.record()
                after.synchronize()
                total += before.elapsed_time(after) / 1e3
            else:
                started = time.perf_counter()
                self._step()
                total += time.perf_counter() - started
        scale = 1e3 / self._repeat
        return total * scale, (host if self._cuda else total) * scale


WARM_UP = 3  # steps: the first has nothing to compare with, the second may compile


def measure(
    chosen: Sequence[Contender],
    what: ParameterSet,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    on_skip: Callable[[str], None],
    cold: bool = False,
) -> list[Timing]:
    """Time all contenders on `what` for about `seconds`, at least 5 rounds.

    `cold`: other memory is written before each step, as a forward and a backward pass would.
    A contender that cannot run here (torch.compile without a compiler) is left out and told to `on_skip`.
    """
    problem = Problem.of(what.shapes, dtype, device, cold)
    timings = _interleaved(chosen, problem, seconds, on_skip)
    if device.type != "cuda":
        # The host's part: the same number of tensors, with nothing in them to compute.
        empty = Problem.of([(1,)] * len(what.shapes), dtype, device, cold)
        hosts = _interleaved([t.contender for t in timings], empty, min(seconds / 5, 2.0), on_skip)
        for timing, host in zip(timings, hosts, strict=True):
            timing.host_ms = host.step_ms
    return timings


def _interleaved(chosen, problem: Problem, seconds: float, on_skip) -> list[Timing]:
    runners: list[tuple[Timing, _Runner]] = []
    for contender in chosen:
        try:
            runner = _Runner(contender, problem)
            for _ in range(WARM_UP):
                runner()
        except Exception as error:  # a compiler raises whatever it stumbles on
            on_skip(f"{contender.name}: left out ({type(error).__name__}: {str(error).splitlines()[0][:80]})")
            continue
        held = {t.data_ptr(): t for t in runner.extra()}
        runners.append((Timing(contender, extra_bytes=sum(t.nbytes for t in held.values())), runner))
    end, rounds = time.monotonic() + seconds, 0
    while rounds < 5 or time.monotonic() < end:
        turn = rounds % len(runners)
        for timing, runner in runners[turn:] + runners[:turn]:
            step, host = runner()
            timing.step_ms.append(step)
            timing.host_ms.append(host)
        rounds += 1
    return [timing for timing, _ in runners]


def paired_ratio(timing: Timing, base: Timing) -> float:
    """Median over rounds of the ratio of two contenders' times in the same round."""
    return statistics.median(a / b for a, b in zip(timing.step_ms, base.step_ms, strict=True))
