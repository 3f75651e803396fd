"""The settings of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any


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
        layers: "module" or "parameter".
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
            ValueError: a setting is missing.
        """
        missing = [f.name for f in fields(cls) if f.name not in values]
        if missing:
            raise ValueError(f"it lacks {missing[0]!r}")
        known = {f.name: values[f.name] for f in fields(cls)}
        return cls(**known | {"matrices": tuple(known["matrices"])})

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
