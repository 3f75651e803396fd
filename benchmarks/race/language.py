"""A character-level language model on a text that every Python brings: the sources of its library."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .contenders import OURS
from .longer import Make, Runs, grid, method, summary, where
from .results import Row

TASK = "language"


class Block(nn.Module):
    """Attention and a perceptron, each after a norm and added to what it reads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3 * self.heads, -1).transpose(1, 2).chunk(3, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """GPT-2's form; torch's own start, which learns sooner at this size."""

    def __init__(self, tokens: int, length: int, width: int, depth: int, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


@functools.cache
def corpus() -> tuple[Tensor, Tensor, int]:
    """Training and validation text as tokens, and how many differ; every tenth file is held out."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    texts = [path.read_text(errors="ignore").encode("ascii", "replace") for path in paths]
    letters = sorted(set(b"".join(texts)))
    token = torch.zeros(128, dtype=torch.int64)
    token[letters] = torch.arange(len(letters))

    def joined(part: list[bytes]) -> Tensor:
        return token[torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8).long()]

    rest = [text for i, text in enumerate(texts) if i % 10 != 9]
    return joined(rest), joined(texts[9::10])[:40_000], len(letters)


@dataclass(frozen=True)
class Scale:
    """How large a run is; by default a model of just above a million parameters."""

    width: int = 144
    depth: int = 4
    batch: int = 16
    length: int = 64
    steps: int = 400


FULL, QUICK = Scale(), Scale(32, 1, 8, 32, 20)

# What is run: the grids are for the first seed.
RATES = {OURS: (1.0, 0.3, 3.0), "adamw": (3e-3, 1e-3, 1e-2, 3e-4, 1e-4), "heavy ball": (0.1, 0.3, 0.03)}


def warmup_cosine(steps: int, warmup: float = 0.05) -> Callable[[int], float]:
    """The multiplier of the rate at a step."""
    first = max(1, round(warmup * steps))
    return lambda t: (
        min(1.0, (t + 1) / first) * 0.5 * (1 + math.cos(math.pi * max(0, t - first) / (steps - first)))
    )


def train(make: Make, scale: Scale, seed: int) -> Row:
    """Train from a seed, without clipping; a loss of three times the first ends it.

    Returns:
        The columns of its line: training losses are of batches, the final one the mean of the last 20; held
        out: the loss on held-out text at the end.
    """
    text, held, tokens = corpus()
    torch.manual_seed(seed)
    model = GPT(tokens, scale.length, scale.width, scale.depth)
    optimizer = make(model.named_parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(scale.steps))
    order = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(scale.steps):
        at = torch.randint(0, len(text) - scale.length - 1, (scale.batch,), generator=order)
        window = text[at[:, None] + torch.arange(scale.length + 1)]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        losses.append(loss.item())
        if not losses[-1] <= 3 * losses[0]:
            return summary(losses, 1, math.inf)
        optimizer.step()
        scheduler.step()
    return summary(losses, 20, evaluate(model, held, scale.length))


@torch.no_grad()
def evaluate(model: nn.Module, held: Tensor, length: int) -> float:
    """The mean loss on the held-out text, cut into windows."""
    windows = held[: (len(held) - 1) // length * length + 1].unfold(0, length + 1, length)
    parts = [
        F.cross_entropy(model(w[:, :-1]).flatten(0, 1), w[:, 1:].flatten(), reduction="sum")
        for w in windows.split(64)
    ]
    return torch.stack(parts).sum().item() / (windows.shape[0] * length)


def fill(runs: Runs, seeds: list[int], quick: bool) -> None:
    """All rates on the first seed; on the others "auto", and AdamW at its best rate there."""
    scale = QUICK if quick else FULL

    def once(name: str, rate: float, seed: int) -> float:
        row = runs.once(TASK, seed, scale.batch, name, rate, lambda: train(method(name, rate), scale, seed))
        return row["held_out"]

    first = {(name, rate): once(name, rate, seeds[0]) for name, rates in RATES.items() for rate in rates}
    best = min(RATES["adamw"], key=lambda rate: first["adamw", rate])
    for seed in seeds[1:]:
        once(OURS, 1.0, seed)
        once("adamw", best, seed)


def markdown(rows: list[Row]) -> str:
    """The table, with what its numbers are."""
    seeds = sorted({row["seed"] for row in rows}, key=[row["seed"] for row in rows].index)
    lines, by = [], {}
    for row in rows:
        by.setdefault((row["contender"], row["rate"]), {})[row["seed"]] = row
    order = list(RATES)
    for name, rate in sorted(by, key=lambda key: (order.index(key[0]), key[1])):
        found = by[name, rate]
        some = next(iter(found.values()))
        cells = [_loss(found[seed]["held_out"]) if seed in found else "" for seed in seeds]
        lines.append([name, f"{rate:g}", *cells, "" if some["diverged"] else f"{some['final']:.3f}"])
    ours = by[OURS, 1.0]
    best = min((found for (name, _), found in by.items() if name == "adamw"), key=_first(seeds[0]))
    ratios = [f"{ours[s]['held_out'] / best[s]['held_out']:.3f}" for s in seeds if s in ours and s in best]
    most = max(row["steps"] for row in rows) + 1
    return "\n".join(
        [
            where(rows[0], seeds),
            "",
            f"A transformer on characters (the sources of Python's library), {most} steps of "
            f"{rows[0]['batch']} sequences, warm-up over a twentieth of them and cosine decay for all, no "
            "clipping. Loss on held-out text, in nats a character; for `auto` the rate is what multiplies "
            "its own steps.",
            "",
            grid(["method", "rate", *(f"seed {s}" for s in seeds), "training loss"], lines),
            "",
            f"`auto` (rate 1) over AdamW at its best rate, {next(iter(best.values()))['rate']:g}: "
            f"{', '.join(ratios)}.",
            "",
        ]
    )


def _first(seed: int) -> Callable[[dict[int, Row]], float]:
    return lambda found: found[seed]["held_out"]


def _loss(value: float) -> str:
    return "diverged" if math.isinf(value) else f"{value:.3f}"
