"""Every experiment of the paper, as data: one row each, with the paper's settings and scaled-down ones.

The scaled-down settings are chosen so that a run takes at most three minutes on two CPU cores and shows the
regime that the row's claims are about. `matrices` are the epochs of the pairwise matrices, `claims` the names
of rules in :mod:`study.rules`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What a preset fixes; see :class:`study.config.Config`."""

    dataset: str
    lr: float
    epochs: int
    matrices: tuple[int, ...] = ()
    n_train: int | None = None
    width: int = 64
    image_size: int | None = None
    micro_batch: int = 1000


@dataclass(frozen=True)
class Row:
    """One experiment: a figure of the paper, or one that its text mentions."""

    id: str
    model: str
    paper: Settings
    small: Settings
    claims: tuple[str, ...]
    optimizer: str = "oscgd"

    def settings(self, preset: str) -> Settings:
        """The settings of `preset`: "paper" or "small"."""
        return self.paper if preset == "paper" else self.small


OSCILLATES_LATER = ("smooth_first", "oscillates_later", "decrease_while_negative")
OSCILLATES_FIRST = ("oscillates_first", "stable_later", "decrease_while_negative")

_LINEAR = Settings("mnist5k", lr=0.01, epochs=500, matrices=(5, 490), n_train=1000)
_CNN = Settings(
    "mnist5k", 0.1, epochs=150, matrices=(5, 140), n_train=2000, width=16, image_size=16, micro_batch=1000
)
_VGG = Settings(
    "mnist5k", 0.02, epochs=400, matrices=(5, 90), n_train=256, width=16, image_size=32, micro_batch=256
)
_RESNET18 = Settings(
    "mnist5k", 0.1, epochs=300, matrices=(15, 290), n_train=512, width=16, image_size=16, micro_batch=512
)
_RESNET34 = replace(_RESNET18, epochs=200, matrices=(15, 190), n_train=1000, micro_batch=1000)

_PAPER: dict[str, Settings] = {
    "linear": Settings("mnist", 0.01, epochs=2500, matrices=(5, 2490)),
    "cnn": Settings("cifar10", 0.1, epochs=1500, matrices=(5, 675)),
    "vgg16": Settings("cifar10", 0.1, epochs=1500, matrices=(5, 915)),
    "resnet18": Settings("cifar10", 0.1, epochs=500, matrices=(60, 490)),
    "resnet34": Settings("cifar10", 0.1, epochs=500, matrices=(60, 490)),
}
_SMALL = {"linear": _LINEAR, "cnn": _CNN, "vgg16": _VGG, "resnet18": _RESNET18, "resnet34": _RESNET34}
_CLAIMS = {
    "linear": ("correlated_throughout",),
    "cnn": (*OSCILLATES_LATER, "layers_agree"),
    "vgg16": ("smooth_first", "oscillates_later"),
    "resnet18": OSCILLATES_FIRST,
    "resnet34": OSCILLATES_FIRST,
}


def _row(
    id: str,
    model: str,
    paper: dict[str, Any] | None = None,
    small: dict[str, Any] | None = None,
    **other: Any,
) -> Row:
    return Row(
        id,
        model,
        replace(_PAPER[model], **(paper or {})),
        replace(_SMALL[model], **(small or {})),
        **{"claims": _CLAIMS[model]} | other,
    )


def _rows() -> list[Row]:
    first_negative = ("first_layer_negative", "last_layer_positive")
    slow = {"lr": 0.01, "epochs": 100, "matrices": (5, 90)}
    rows = [
        _row("fig1", "linear"),
        _row("fig2", "cnn"),
        _row("fig3", "vgg16"),
        _row("fig4", "resnet18"),
        _row("fig5", "resnet34"),
        _row("fig10", "cnn", {"lr": 0.001, "epochs": 30000, "matrices": (5, 8000)}, {"lr": 0.02, "epochs": 900},  # noqa: E501
             claims=("smooth_first", "oscillates_later", "first_layer_dominates")),
        _row("fig11", "resnet18", {"lr": 0.001}, slow, claims=first_negative),
    ]  # fmt: skip
    for dataset in ("mnist", "svhn"):
        for model in ("cnn", "vgg16", "resnet18", "resnet34"):
            rows.append(_row(f"text-{dataset}-{model}", model, {"dataset": dataset}))
    for model in ("resnet18", "resnet34"):
        for dataset, lr in (("cifar10", 0.01), ("svhn", 0.01), ("svhn", 0.001)):
            id = f"text-{dataset}-{model}-lr{lr:g}"
            rows.append(_row(id, model, {"dataset": dataset, "lr": lr}, slow, claims=first_negative))
    for model in ("cnn", "vgg16", "resnet18", "resnet34"):
        rows.append(
            _row(
                f"text-adam-{model}",
                model,
                {"lr": 0.001},
                {"lr": 0.001},
                optimizer="adam",
                claims=("suppressed",),
            )
        )
    return rows


TABLE: dict[str, Row] = {row.id: row for row in _rows()}
"""All rows by id. Figures 6 to 9 show the layers of the runs of figures 2 to 5."""

DEFAULT_ROW = {"linear": "fig1", "cnn": "fig2", "vgg16": "fig3", "resnet18": "fig4", "resnet34": "fig5"}
"""The row that `--model` alone stands for."""
