"""What is trained: small enough that a run takes seconds on one core, large enough to show the regimes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from study import data
from study.models import build

load = functools.cache(data.load)  # every run starts anew, and reading takes as long as some runs


@dataclass(frozen=True)
class Problem:
    """One seed of a task.

    Attributes:
        model: what is trained.
        loss: (indices of the samples, or None for all) -> the mean loss.
        samples: how many there are; 0: the objective is no sum over samples.
    """

    model: nn.Module
    loss: Callable[[Tensor | None], Tensor]
    samples: int


@dataclass(frozen=True)
class Task:
    """What is run.

    Attributes:
        name: for tables.
        epochs: the budget, in full-batch steps.
        lr: where the search for gradient descent's best rate starts.
        start: seed -> the problem.
        quick: whether `--quick` runs it.
        dataset: the pictures that it needs, if any: a name of :func:`study.data.load`.
    """

    name: str
    epochs: int
    lr: float
    start: Callable[[int], Problem]
    quick: bool = False
    dataset: str | None = None


def classify(model: nn.Module, x: Tensor, y: Tensor) -> Problem:
    """The mean cross-entropy of what a model says of `x`, where `y` is right."""

    def loss(index: Tensor | None) -> Tensor:
        inputs, labels = (x, y) if index is None else (x[index], y[index])
        return F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())

    return Problem(model, loss, len(x))


def pictures(model: str, dataset: str, n_train: int, image_size: int, width: int, data_root: str | None):
    """One of the study's models on pictures that the seed draws."""

    def start(seed: int) -> Problem:
        x, y = load(dataset, n_train, image_size, data_root, seed)
        return classify(build(model, 1, image_size, width, seed), x, y)

    return start


def _logistic(n_train: int):
    """Regularized, or the loss would have no minimum: 1,000 pictures can be separated."""

    def start(seed: int) -> Problem:
        x, y = load("mnist5k", n_train, 16, None, seed)
        problem = classify(build("linear", 1, 16, 1, seed), x, y)
        weight = problem.model.fc.weight
        return Problem(problem.model, lambda i: problem.loss(i) + 5e-3 * weight.square().sum(), len(x))

    return start


def _mlp(n_train: int):
    def start(seed: int) -> Problem:
        x, y = load("mnist5k", n_train, 16, None, seed)
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 10))
        return classify(model, x, y)

    return start


class Transformer(nn.Module):
    """Four pre-norm layers that predict each token of a sequence from those before it."""

    def __init__(self, tokens: int, length: int, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.position = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
        )
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens)
        for part in self.layers.layers[1:]:  # they start as copies of the first
            for p in part.parameters():
                if p.ndim == 2:
                    nn.init.xavier_uniform_(p)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))
        self.register_buffer("places", torch.arange(length))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(self.places)
        return self.head(self.norm(self.layers(x, mask=self.mask, is_causal=True)))


def _transformer(n_train: int):
    """Sequences that repeat their first half: the second half can be known, by attending to the first."""
    half, tokens = 8, 16

    def start(seed: int) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(0, tokens, (n_train, half), generator=generator)
        sequences = torch.cat([first, first], 1)
        torch.manual_seed(seed)
        return classify(Transformer(tokens, 2 * half - 1), sequences[:, :-1], sequences[:, 1:])

    return start


class Quadratic(nn.Module):
    """1/2 x'Hx, eigenvalues from 1/condition to 1 in a random basis, x in four layers."""

    def __init__(self, condition: float, seed: int, size: int = 100) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        values = torch.logspace(-math.log10(condition), 0, size, dtype=torch.float64)
        self.register_buffer("hessian", basis @ torch.diag(values) @ basis.T)
        start = torch.randn(4, size // 4, generator=generator, dtype=torch.float64)
        self.layers = nn.ModuleList()
        for part in start:
            layer = nn.Module()
            layer.x = nn.Parameter(part.clone())
            self.layers.append(layer)

    def forward(self) -> Tensor:
        x = torch.cat([layer.x for layer in self.layers])
        return 0.5 * x @ self.hessian @ x


def _quadratic(condition: float):
    def start(seed: int) -> Problem:
        model = Quadratic(condition, seed)
        return Problem(model, lambda index: model(), 0)

    return start


# Of each model: the rate to start from, whether it is quick; then pictures, their side and epochs, for full
# batches and for mini-batches, where a batch is to be a small part of the pictures. VGG-16 has no such form:
# to leave the plateau that it starts on takes more steps than a run of seconds has.
_MODELS = {
    "cnn": (0.1, True, (128, 16, 100), (1024, 16, 25)),
    "cnn_bn": (0.3, False, (128, 16, 80), (1024, 16, 20)),
    "vgg16": (0.04, False, (48, 32, 80), None),
    "resnet18": (0.5, True, (64, 12, 50), (1024, 8, 12)),
    "resnet34": (0.5, False, (64, 12, 50), (1024, 8, 12)),
}
_WIDTH = 8


def tasks(batches: bool = False, data_root: str | None = None) -> dict[str, Task]:
    """All tasks by name, in their form for mini-batches or for full batches.

    Args:
        data_root: where the pictures that no package carries lie; see :func:`study.data.load`.
    """

    def size(full: int, mini: int) -> int:
        return mini if batches else full

    found = []
    if not batches:  # there are no samples
        found.append(Task("quadratic-1e2", 300, 1.0, _quadratic(1e2), quick=True))
        found.append(Task("quadratic-1e4", 1000, 1.0, _quadratic(1e4)))
    found.append(Task("logistic", size(300, 30), 0.5, _logistic(size(1000, 1024)), True, "mnist5k"))
    found.append(Task("mlp", size(200, 30), 1.0, _mlp(size(500, 1024)), True, "mnist5k"))
    for dataset, suffix in (("mnist5k", ""), ("fashion-mnist", "-fashion")):
        for model, (lr, quick, *forms) in _MODELS.items():
            if forms[batches] is None:
                continue
            n_train, side, epochs = forms[batches]
            start = pictures(model, dataset, n_train, side, _WIDTH, data_root)
            found.append(Task(model + suffix, epochs, lr, start, quick and not suffix, dataset))
    found.append(Task("transformer", size(120, 10), 1.0, _transformer(size(32, 1024))))
    return {task.name: task for task in found}
