"""Lists of parameter shapes to step: real models by name, flat lists by size."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ParameterSet:
    """Shapes of parameters under a name."""

    name: str
    shapes: tuple[Shape, ...]

    @property
    def elements(self) -> int:
        """Of all tensors together."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def _torchvision(name: str) -> list[Shape]:
    from torchvision import models

    with torch.device("meta"):
        model = getattr(models, name)(num_classes=10)
    return [tuple(p.shape) for p in model.parameters()]


def _gpt2() -> list[Shape]:
    """GPT-2 small (Radford et al. 2019), output tied to the embedding: 124,439,808 parameters."""
    d, shapes = 768, [(50257, 768), (1024, 768)]
    norm = [(d,), (d,)]
    block = [*norm, (d, 3 * d), (3 * d,), (d, d), (d,), *norm, (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [*shapes, *block * 12, *norm]


def _llama_1b() -> list[Shape]:
    """Llama 3.2 1B, output tied to the embedding: 1,235,814,400 parameters."""
    d, kv, hidden = 2048, 512, 8192
    block = [(d, d), (kv, d), (kv, d), (d, d), (hidden, d), (hidden, d), (d, hidden), (d,), (d,)]
    return [(128256, d), *block * 16, (d,)]


MODELS = {
    "resnet18": lambda: _torchvision("resnet18"),
    "resnet34": lambda: _torchvision("resnet34"),
    "vgg16": lambda: _torchvision("vgg16"),
    "gpt2": _gpt2,
    "llama-1b": _llama_1b,
}
"""By name: the shapes of its parameters."""

SWEEP = ("1e3", "1e4", "1e5", "64000x1000", "1e6", "1e6x1000", "1e7", "1e8")
"""The flat sizes that `--sizes` alone stands for; on a GPU 1e9 as well."""


def model_set(name: str) -> ParameterSet:
    """The parameters of a model of :data:`MODELS`; ResNets and VGG-16 for 10 classes."""
    return ParameterSet(name, tuple(MODELS[name]()))


def flat_set(text: str) -> ParameterSet:
    """The set "1e6x10": 10^6 elements, spread evenly over 10 tensors; "1e6": in one.

    Raises:
        ValueError: `text` has another form, or fewer elements than tensors.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)(?:x(\d+))?", text)
    elements = float(match[1]) if match else 0
    tensors = int(match[2] or 1) if match else 0
    if not (match and elements.is_integer() and 1 <= tensors <= elements <= 1e11):
        raise ValueError(
            f"unknown size {text!r}; use ELEMENTS or ELEMENTSxTENSORS, such as 1e6 or 64000x1000"
        )
    each, rest = divmod(int(elements), tensors)
    return ParameterSet(text, tuple((each + (i < rest),) for i in range(tensors)))
