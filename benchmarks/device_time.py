"""Device time of the Triton kernels alone: no optimizer around them, no host in the way.

    python benchmarks/device_time.py --sets resnet34 gpt2

Launches are queued behind a kernel that spins, so that the host is ahead when they run. Ratios are to
torch.optim.SGD(fused=True), of kinds with momentum to that with momentum.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

from study.cli import Parser, exit_code, script

KINDS = ("update", "exact", "sketch", "momentum", "alignment", "sketch momentum")
"""What a step does: the update, and measuring against the last gradient, its sketch or the momentum."""
WITH_MOMENTUM = ("momentum", "alignment", "sketch momentum")

STEPS, TURNS = 10, 5
SPIN = 12_000_000  # cycles: some 7 ms, in which the host queues STEPS steps


def parser() -> Parser:
    from micro.sets import MODELS

    p = Parser(
        prog="device_time.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--sets", nargs="+", choices=list(MODELS), default=["resnet34", "gpt2"])
    return p


def kernel_step(kind: str, shapes: Sequence[tuple[int, ...]], device) -> Callable[[], None]:
    """A function that launches one step of `kind` on random float32 tensors, gradients taking turns.

    Sketching leaves out tensors that are too small to be sketched: the exact kernel steps those.
    """
    import torch

    from oscopt.kernels import SUMS, Hyper, sketch, triton_backend, triton_sketch

    def draw() -> list[torch.Tensor]:
        return [torch.randn(shape, device=device) for shape in shapes]

    sketching = kind.startswith("sketch")
    if sketching:
        shapes = [shape for shape in shapes if torch.Size(shape).numel() > sketch.WHOLE]
    params, grads, layers = draw(), [draw(), draw()], range(len(shapes))
    buffers = draw() if kind in WITH_MOMENTUM else None
    hyper = [Hyper(1e-6, 0.9 if buffers else 0.0, 1.0, weight_decay=0.0, nesterov_momentum=0.0, sign=1.0)]
    rows = [0] * len(shapes)
    sums = len(sketch.SUMS if sketching else SUMS)
    out = None if kind == "update" else torch.empty((sums, len(shapes)), dtype=torch.float64, device=device)
    if sketching:
        batch = triton_sketch.Batch(params, layers, len(shapes), None, layers)
        kept = [sketch.kept_like(p, p.dtype) for p in params]
    else:
        batch = triton_backend.Batch(params, layers, len(shapes))

    def step() -> None:
        grads.reverse()
        now, before = grads
        against = kept if sketching else before if kind in ("exact", "momentum") else None
        copies = [True] * len(now) if sketching else None
        batch.step(now, against, buffers, copies, rows, hyper, out)

    return step


def torch_step(momentum: float, shapes: Sequence[tuple[int, ...]], device) -> Callable[[], object]:
    """A step of SGD(fused=True)."""
    import torch

    params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return torch.optim.SGD(params, lr=1e-6, momentum=momentum, fused=True).step


def microseconds(step: Callable[[], object]) -> float:
    """Median time of a step on the device."""
    import torch

    for _ in range(3):
        step()
    if not torch.cuda.is_available():  # the interpreter, in tests
        started = time.perf_counter()
        step()
        return 1e6 * (time.perf_counter() - started)
    taken = []
    for _ in range(TURNS):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(SPIN)
        before.record()
        for _ in range(STEPS):
            step()
        after.record()
        after.synchronize()
        taken.append(1e3 * before.elapsed_time(after) / STEPS)
    return statistics.median(taken)


def print_table(name: str, shapes: Sequence[tuple[int, ...]], device) -> None:
    """One row a kind."""
    base = {momentum: microseconds(torch_step(momentum, shapes, device)) for momentum in (0.0, 0.9)}
    print(f"\n{name}\n{'kind':<20} {'us':>9} {'ratio':>7}")
    for momentum, time_ in base.items():
        print(f"{'sgd fused' + ' momentum' * bool(momentum):<20} {time_:>9.1f} {1:>7.3f}")
    for kind in KINDS:
        taken = microseconds(kernel_step(kind, shapes, device))
        ratio = taken / base[0.9 if kind in WITH_MOMENTUM else 0.0]
        print(f"{kind:<20} {taken:>9.1f} {ratio:>7.3f}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    return exit_code(lambda: _run(parser().parse_args(arguments)))


def _run(options: argparse.Namespace) -> int:
    import torch

    from micro.sets import model_set
    from study.errors import UserError

    if not torch.cuda.is_available():
        raise UserError(
            "this times kernels on a GPU, and torch finds none; on a CPU use benchmarks/kernels.py"
        )
    for name in options.sets:
        print_table(name, model_set(name).shapes, torch.device("cuda"))
    return 0


if __name__ == "__main__":
    sys.exit(script(main, "interrupted"))
