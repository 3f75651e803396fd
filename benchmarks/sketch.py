"""How much of a gradient measure="sketch" keeps, and how large its error is on real gradients.

    python benchmarks/sketch.py
    python benchmarks/sketch.py --models cnn resnet18 --width 64 --seeds 50 --device cuda

Memory: floats that are kept, over parameters. Error: a model is trained for some steps, full batch and in
mini-batches, and every pair of adjacent gradients is measured with many seeds: root mean square of the error
of a layer's correlation (of layers with a sketched tensor), the same of all layers together, and how often
the error is within 1.96 of its stated standard errors.
"""

from __future__ import annotations

import argparse
import math
import sys

import numpy as np

from study.cli import Parser, check_device, exit_code, filled, positive, script

MODELS = {"cnn": 32, "resnet18": 16, "transformer": 96}
"""What gradients are of, and its width unless another is asked for."""


def parser() -> Parser:
    p = Parser(prog="sketch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), metavar="NAME")
    p.add_argument("--width", type=positive(int), help="of the models (default: small ones)")
    p.add_argument("--seeds", type=positive(int), default=20, help="of sketches (default: %(default)s)")
    p.add_argument("--steps", type=positive(int), default=6, help="of training (default: %(default)s)")
    p.add_argument("--device", type=filled, default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    return p


def llama_7b() -> list[tuple[int, ...]]:
    """LLaMA 7B (Touvron et al. 2023): 6,738,415,616 parameters."""
    d, h = 4096, 11008
    return [(32000, d), *[*[(d, d)] * 4, *[(h, d)] * 2, (d, h), (d,), (d,)] * 32, (d,), (32000, d)]


def print_memory() -> None:
    from micro.sets import model_set
    from oscopt.kernels import sketch

    print(f"{'model':<12} {'parameters':>14} {'floats kept':>12} {'ratio':>8}")
    for name in ("resnet18", "resnet34", "gpt2", "llama-1b", "llama-7b"):
        shapes = llama_7b() if name == "llama-7b" else model_set(name).shapes
        sizes = [math.prod(shape) for shape in shapes]
        kept = sum(sketch.kept_size(n) if n > sketch.WHOLE else n for n in sizes)
        print(f"{name:<12} {sum(sizes):>14,} {kept:>12,} {kept / sum(sizes):>8.4f}")


def transformer(width: int):
    """Two blocks over the rows of a picture."""
    from torch import nn

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(16, width)
            block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
            self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
            self.head = nn.Linear(width, 10)

        def forward(self, x):
            return self.head(self.blocks(self.embed(x.squeeze(1))).mean(1))

    return Rows()


def recorded(name: str, width: int, steps: int, batch: int, device: str) -> dict[str, list]:
    """Gradients of `steps` steps, by parameter."""
    import torch
    from torch.nn import functional as F

    from study import data, models

    x, y = (t.to(device) for t in data.load("mnist5k", 256, 16, None, 0))
    torch.manual_seed(0)
    model = transformer(width) if name == "transformer" else models.build(name, x.shape[1], 16, width, 0)
    optimizer = torch.optim.SGD(model.to(device).parameters(), lr=0.1)
    found: dict[str, list] = {n: [] for n, _ in model.named_parameters()}
    for _ in range(steps):
        part = slice(None) if batch >= len(x) else torch.randperm(len(x))[:batch]
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        for n, p in model.named_parameters():
            found[n].append(p.grad.clone())
        optimizer.step()
    return found


def errors(grads: dict[str, list], seeds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors of the layers' correlations, of the global one, and the former over their standard errors."""
    import torch

    from oscopt import kernels
    from oscopt.kernels import sketch
    from oscopt.layers import assign

    names = list(grads)
    layers = assign(names, "module")
    order = list(dict.fromkeys(layers))
    index = [order.index(layer) for layer in layers]
    first = [grads[n][0] for n in names]
    estimated = [
        any(sketch.sketched(g) for g, i in zip(first, index, strict=True) if i == j)
        for j in range(len(order))
    ]
    backend = kernels.backend("auto", first[0].device)
    exact = np.zeros((3, len(grads[names[0]]) - 1, len(order)))
    for n, i in zip(names, index, strict=True):
        flat = [g.double().flatten() for g in grads[n]]
        for t, (a, b) in enumerate(zip(flat, flat[1:], strict=False)):
            exact[:, t, i] += (a @ b).item(), (b @ b).item(), (a @ a).item()
    one, everything, scaled = [], [], []
    for seed in range(seeds):
        kinds = [sketch.seed_of(f"{seed} {n}") for n in names]
        plan = kernels.Plan(first, first, index, len(order), backend, seeds=kinds)
        kept = [sketch.kept_like(g, g.dtype) for g in first]
        out = torch.zeros((len(sketch.SUMS), len(order)), dtype=torch.float64, device=first[0].device)
        for t in range(len(grads[names[0]])):
            now = [grads[n][t] for n in names]
            plan.step(now, kept, None, [True] * len(names), [0] * len(names), None, out)
            if t:
                dot, sq_norm, _, prev_sq_norm, *_, variance = out.cpu().numpy()
                norms = np.sqrt(sq_norm * prev_sq_norm)
                wanted = exact[0, t - 1] / np.sqrt(exact[1, t - 1] * exact[2, t - 1])
                error = (dot / norms - wanted)[estimated]
                one.append(error)
                scaled.append(error / (np.sqrt(variance) / norms)[estimated])
                all_norms = np.sqrt(sq_norm.sum() * prev_sq_norm.sum())
                true = exact[:, t - 1].sum(1)
                everything.append(dot.sum() / all_norms - true[0] / np.sqrt(true[1] * true[2]))
    return np.concatenate(one), np.array(everything), np.concatenate(scaled)


def main(arguments: list[str] | None = None) -> int:
    return exit_code(lambda: _run(parser().parse_args(arguments)))


def _run(options: argparse.Namespace) -> int:
    check_device(options.device)
    print_memory()
    print(f"\n{'model':<12} {'batch':<6} {'layer rms':>10} {'global rms':>11} {'within 1.96':>12}")
    for name in options.models:
        for batch in (256, 64):
            grads = recorded(name, options.width or MODELS[name], options.steps, batch, options.device)
            one, everything, scaled = errors(grads, options.seeds)
            row = np.sqrt(np.mean(one**2)), np.sqrt(np.mean(everything**2)), np.mean(np.abs(scaled) <= 1.96)
            kind = "full" if batch == 256 else str(batch)
            print(f"{name:<12} {kind:<6} {row[0]:>10.5f} {row[1]:>11.5f} {row[2]:>12.3f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(script(main, "interrupted"))
