"""The settings of a run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

PRESETS = ("small", "paper")
MODELS = ("linear", "cnn", "cnn_bn", "vgg16", "resnet18", "resnet34")
DATASETS = ("mnist5k", "digits", "mnist", "fashion-mnist", "cifar10", "svhn")
"""Those that need no network first."""
OPTIMIZERS = ("oscgd", "sgd", "adam", "adamw", "rmsprop")
LAYERS = ("module", "parameter", "block")
PRECISIONS = ("fp32", "tf32", "bf16")

_CHOICES = {
    "preset": PRESETS,
    "model": MODELS,
    "dataset": DATASETS,
    "optimizer": OPTIMIZERS,
    "layers": LAYERS,
    "precision": PRECISIONS,
    "compile": (False, True),
}
LARGEST = {
    "epochs": 10**6,
    "n_train": 10**9,
    "width": 2**16,
    "image_size": 2**16,
    "micro_batch": 10**9,
    "threads": 2**16,
    "sharpness_every": 10**9,
    "seed": 2**63 - 1,
}
"""Whole numbers among the settings, and the largest of each."""


@dataclass(frozen=True)
class Config:
    """Everything that a run's numbers depend on, apart from the machine and the versions.

    Attributes:
        experiment: id of the row of :data:`study.experiments.TABLE` that gave the defaults.
        preset: "paper" or "small".
        model, dataset, optimizer: names; see :mod:`study.models`, :mod:`study.data`, :mod:`study.train`.
        lr: learning rate.
        epochs: full-batch steps.
        n_train: pictures to train on; None: all.
        width: channels of the first block (the models' own width is 64); unused by `linear`.
        image_size: side of the pictures, in pixels; None: as they are.
        micro_batch: pictures that are run through the model at a time.
        matrices: epochs at which a window of `WINDOW` gradients starts.
        seed: of the initial weights and of the choice of pictures.
        layers: what is measured together: "module", "parameter" or "block" (:func:`study.models.block_of`).
        device, threads: of torch.
        precision: "fp32"; on a GPU also "tf32" or "bf16" (autocast).
        compile: whether the model goes through torch.compile.
        sharpness_every: epochs between two measurements of the Hessian's top eigenvalue; 0: none.
    """

    experiment: str
    preset: str
    model: str
    dataset: str
    optimizer: str
    lr: float
    epochs: int
    n_train: int | None
    width: int
    image_size: int | None
    micro_batch: int
    matrices: tuple[int, ...]
    seed: int
    layers: str
    device: str
    threads: int
    precision: str = "fp32"
    compile: bool = False
    sharpness_every: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"matrices": list(self.matrices)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a setting is missing, or has a value that none can have.
        """
        missing = [f.name for f in fields(cls) if f.name not in values]
        if missing:
            raise ValueError(f"it lacks {missing[0]!r}")
        known = {f.name: values[f.name] for f in fields(cls)}
        config = cls(**known | {"matrices": tuple(known["matrices"])})
        config._check()
        return config

    def _check(self) -> None:
        values = vars(self)
        wrong = [name for name, choices in _CHOICES.items() if values[name] not in choices]
        for name, most in LARGEST.items():
            least = 0 if name in ("seed", "sharpness_every") else 1
            may_be_none = name in ("n_train", "image_size") and values[name] is None
            if not may_be_none and not _whole(values[name], least, most):
                wrong.append(name)
        wrong += ["matrices"] * (not all(_whole(epoch, 0, LARGEST["epochs"]) for epoch in self.matrices))
        rate = values["lr"]
        wrong += ["lr"] * (type(rate) not in (int, float) or not (rate > 0 and math.isfinite(rate)))
        wrong += ["device"] * (not (isinstance(self.device, str) and self.device))
        if wrong:
            raise ValueError(f"{wrong[0]} cannot be {values[wrong[0]]!r}")

    def with_epochs(self, epochs: int) -> Config:
        """The same run shorter or longer; its matrices keep their places in it."""
        scaled = sorted({epoch * epochs // self.epochs for epoch in self.matrices})
        return replace(self, epochs=epochs, matrices=tuple(scaled))

    @property
    def name(self) -> str:
        """What is run, for titles."""
        return f"{self.model} on {self.dataset}, {self.optimizer}, lr {self.lr:g}"


WINDOW = 5
"""Iterations in a window, the paper's h (Sec. II-A)."""


def _whole(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most
