"""Every experiment of the paper, as data: one row each, with the paper's settings and scaled-down ones.

The scaled-down settings are chosen so that a run takes one to two minutes on one CPU core and shows the
regime that the row's claims are about: not so that a rule holds. Rows whose settings are equal are one run,
which reproduce.py makes once: figures 6 to 9 show the layers of the runs of figures 2 to 5, and the small
versions of the CIFAR-10 rows are on MNIST pictures, so those of the MNIST rows are the same runs.

`matrices` are the epochs of the pairwise matrices, `claims` the names of rules in :mod:`study.rules`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from .config import Config
from .errors import UserError


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
    """One experiment: a figure of the paper, or one that its text mentions.

    Attributes:
        shows: what the paper's figure shows, "run" (loss, correlation, matrices), "layers", or "all".
        beside: id of the row that this one is drawn and judged beside; it differs in the optimizer only.
    """

    id: str
    title: str
    model: str
    paper: Settings
    small: Settings
    claims: tuple[str, ...]
    shows: str = "all"
    optimizer: str = "oscgd"
    beside: str | None = None

    def settings(self, preset: str) -> Settings:
        """The settings of `preset`: "paper" or "small"."""
        return self.paper if preset == "paper" else self.small

    def config(self, preset: str, *, seed: int = 0, device: str = "cpu", threads: int = 1) -> Config:
        """The settings of a run of this row."""
        return Config(
            experiment=self.id,
            preset=preset,
            model=self.model,
            optimizer=self.optimizer,
            seed=seed,
            layers="module",
            device=device,
            threads=threads,
            **asdict(self.settings(preset)),
        )


# ---- what the paper claims ---------------------------------------------------------------------------------

CONVOLUTIONAL = ("smooth_first", "oscillates_later", "decrease_while_negative")  # Sec. III-A
RESIDUAL = ("oscillates_first", "stable_later", "decrease_while_negative")  # Sec. III-B
ALL_LAYERS = ("layers_agree",)  # Sec. III-C
SLOW_CONVOLUTIONAL = (
    "smooth_first",
    "oscillates_later",
    "first_layer_dominates",
    "first_layer_follows",
    "last_layer_higher",
)  # Sec. IV
SMALL_LR = (
    "first_layer_negative",
    "last_layer_positive",
    "first_layer_dominates",
    "first_layer_follows",
)  # Sec. IV
SUPPRESSED = ("suppressed", "suppressed_beside_gd")  # Sec. V

# ---- settings ----------------------------------------------------------------------------------------------

_MNIST = Settings("mnist", lr=0.01, epochs=2500, matrices=(5, 2490))
_CNN = Settings("cifar10", lr=0.1, epochs=1500, matrices=(5, 675))
_VGG16 = Settings("cifar10", lr=0.1, epochs=1500, matrices=(5, 915), image_size=32)
_RESNET = Settings("cifar10", lr=0.1, epochs=500, matrices=(60, 490))
_CNN_SLOW = replace(_CNN, lr=0.001, epochs=30000, matrices=(5, 20000))
_RESNET_SLOW = replace(_RESNET, lr=0.001)

# Narrower nets, fewer and smaller pictures. Learning rates are chosen for the regime: what is "large" depends
# on the curvature, so on width, depth and data. The runs end when the loss is nearly zero, as the paper's do.
# Batch norm sees micro-batches, so ResNets run the whole set at once; for the others, what is fastest.
_SMALL = Settings("mnist5k", lr=0.01, epochs=2500, matrices=(5, 2490), n_train=1000, width=16, image_size=16)
_SMALL_LINEAR = replace(_SMALL, image_size=None)
_SMALL_CNN = replace(_SMALL, lr=0.05, epochs=240, matrices=(5, 180), n_train=2000, micro_batch=250)
_SMALL_CNN_BN = replace(_SMALL, lr=0.1, epochs=300, matrices=(15, 280))
_SMALL_CNN_SLOW = replace(_SMALL_CNN, lr=0.01, epochs=900, matrices=(5, 700), n_train=500)
_SMALL_VGG16 = replace(_SMALL, epochs=280, matrices=(5, 230), n_train=128, image_size=32, micro_batch=64)
_SMALL_RESNET = replace(_SMALL, lr=0.3, epochs=90, matrices=(8, 80), n_train=256, image_size=28)
_SMALL_RESNET_SLOW = replace(_SMALL, lr=0.01, epochs=100, matrices=(15, 90), n_train=512)

# SVHN's small stand-in: another data set that is bundled too.
_DIGITS_CNN = replace(_SMALL_CNN, dataset="digits", lr=0.1, n_train=1000, image_size=8)
_DIGITS_VGG16 = replace(_SMALL_VGG16, dataset="digits")
_DIGITS_RESNET = replace(_SMALL_RESNET, dataset="digits")
_DIGITS_RESNET_SLOW = replace(
    _SMALL_RESNET_SLOW, dataset="digits", epochs=150, matrices=(15, 140), n_train=256
)
_DIGITS_RESNET_SLOWER = replace(_DIGITS_RESNET_SLOW, lr=0.003, epochs=200, matrices=(15, 190))


def _svhn(settings: Settings) -> Settings:
    return replace(settings, dataset="svhn")


def _mnist(settings: Settings) -> Settings:
    return replace(settings, dataset="mnist")


# ---- the table ---------------------------------------------------------------------------------------------

_ROWS = (
    Row("fig1", "Fig. 1", "linear", _MNIST, _SMALL_LINEAR, ("correlated_throughout",), shows="run"),
    Row("fig2", "Fig. 2", "cnn", _CNN, _SMALL_CNN, CONVOLUTIONAL, shows="run"),
    Row("fig3", "Fig. 3", "vgg16", _VGG16, _SMALL_VGG16, CONVOLUTIONAL, shows="run"),
    Row("fig4", "Fig. 4", "resnet18", _RESNET, _SMALL_RESNET, RESIDUAL, shows="run"),
    Row("fig5", "Fig. 5", "resnet34", _RESNET, _SMALL_RESNET, RESIDUAL, shows="run"),
    Row("fig6", "Fig. 6", "cnn", _CNN, _SMALL_CNN, (*ALL_LAYERS, "dots_of_one_order"), shows="layers"),
    Row("fig7", "Fig. 7", "vgg16", _VGG16, _SMALL_VGG16, ALL_LAYERS, shows="layers"),
    Row("fig8", "Fig. 8", "resnet18", _RESNET, _SMALL_RESNET, ALL_LAYERS, shows="layers"),
    Row("fig9", "Fig. 9", "resnet34", _RESNET, _SMALL_RESNET, ALL_LAYERS, shows="layers"),
    Row("fig10", "Fig. 10", "cnn", _CNN_SLOW, _SMALL_CNN_SLOW, SLOW_CONVOLUTIONAL),
    Row("fig11", "Fig. 11", "resnet18", _RESNET_SLOW, _SMALL_RESNET_SLOW, SMALL_LR),
    # "We obtain additional results on ... MNIST and SVHN. The observations are very similar" (Sec. III)
    Row("mnist-cnn", "Sec. III-A", "cnn", _mnist(_CNN), _SMALL_CNN, CONVOLUTIONAL + ALL_LAYERS),
    Row("mnist-vgg16", "Sec. III-A", "vgg16", _mnist(_VGG16), _SMALL_VGG16, CONVOLUTIONAL + ALL_LAYERS),
    Row("mnist-resnet18", "Sec. III-B", "resnet18", _mnist(_RESNET), _SMALL_RESNET, RESIDUAL + ALL_LAYERS),
    Row("mnist-resnet34", "Sec. III-B", "resnet34", _mnist(_RESNET), _SMALL_RESNET, RESIDUAL + ALL_LAYERS),
    Row("svhn-cnn", "Sec. III-A", "cnn", _svhn(_CNN), _DIGITS_CNN, CONVOLUTIONAL + ALL_LAYERS),
    Row("svhn-vgg16", "Sec. III-A", "vgg16", _svhn(_VGG16), _DIGITS_VGG16, CONVOLUTIONAL + ALL_LAYERS),
    Row("svhn-resnet18", "Sec. III-B", "resnet18", _svhn(_RESNET), _DIGITS_RESNET, RESIDUAL + ALL_LAYERS),
    Row("svhn-resnet34", "Sec. III-B", "resnet34", _svhn(_RESNET), _DIGITS_RESNET, RESIDUAL + ALL_LAYERS),
    # "ResNet-18 and ResNet-34 on CIFAR-10 (with small 0.01) and SVHN (with small 0.01, 0.001)" (Sec. IV)
    Row("cifar10-resnet18-lr0.01", "Sec. IV", "resnet18", replace(_RESNET, lr=0.01),
        _SMALL_RESNET_SLOW, SMALL_LR),
    Row("cifar10-resnet34-lr0.01", "Sec. IV", "resnet34", replace(_RESNET, lr=0.01),
        _SMALL_RESNET_SLOW, SMALL_LR),
    Row("svhn-resnet18-lr0.01", "Sec. IV", "resnet18", _svhn(replace(_RESNET, lr=0.01)),
        _DIGITS_RESNET_SLOW, SMALL_LR),
    Row("svhn-resnet18-lr0.001", "Sec. IV", "resnet18", _svhn(_RESNET_SLOW),
        _DIGITS_RESNET_SLOWER, SMALL_LR),
    Row("svhn-resnet34-lr0.01", "Sec. IV", "resnet34", _svhn(replace(_RESNET, lr=0.01)),
        _DIGITS_RESNET_SLOW, SMALL_LR),
    Row("svhn-resnet34-lr0.001", "Sec. IV", "resnet34", _svhn(_RESNET_SLOW),
        _DIGITS_RESNET_SLOWER, SMALL_LR),
    # "the Adam adaptive optimizer applies normalized gradient updates to suppress the oscillation" (Sec. V)
    Row("adam-cnn", "Sec. V", "cnn", replace(_CNN, lr=0.001), replace(_SMALL_CNN, lr=0.001), SUPPRESSED,
        optimizer="adam", beside="fig2"),
    Row("adam-vgg16", "Sec. V", "vgg16", replace(_VGG16, lr=0.001), replace(_SMALL_VGG16, lr=0.001),
        SUPPRESSED, optimizer="adam", beside="fig3"),
    Row("adam-resnet18", "Sec. V", "resnet18", replace(_RESNET, lr=0.001), replace(_SMALL_RESNET, lr=0.001),
        SUPPRESSED, optimizer="adam", beside="fig4"),
    Row("adam-resnet34", "Sec. V", "resnet34", replace(_RESNET, lr=0.001), replace(_SMALL_RESNET, lr=0.001),
        SUPPRESSED, optimizer="adam", beside="fig5"),
    # Not in the paper: is it skip connections or batch norm that makes the oscillation come first?
    Row("cnn-bn", "Beyond the paper", "cnn_bn", _CNN, _SMALL_CNN_BN, RESIDUAL + ALL_LAYERS),
)  # fmt: skip

TABLE: dict[str, Row] = {row.id: row for row in _ROWS}
"""All rows by id, in the paper's order; one beyond it comes last."""

DEFAULT_ROW = {
    "linear": "fig1",
    "cnn": "fig2",
    "cnn_bn": "cnn-bn",
    "vgg16": "fig3",
    "resnet18": "fig4",
    "resnet34": "fig5",
}
"""The row that `--model` alone stands for."""

LR_OF = {"oscgd": None, "sgd": None, "adam": 0.001, "adamw": 0.001, "rmsprop": 0.001}
"""The learning rate that an optimizer gets in place of a row's; None: the row's own."""


def check_experiments(ids: list[str]) -> list[Row]:
    """The rows called `ids`.

    Raises:
        UserError: one does not exist.
    """
    for id in ids:
        if id not in TABLE:
            raise UserError(f"unknown experiment {id!r}; there are {', '.join(TABLE)}")
    return [TABLE[id] for id in ids]


def run_of(row: Row, preset: str) -> Row:
    """The first row of the table that has the same run as `row`: itself, or one before it."""

    def same(other: Row) -> bool:
        return (other.model, other.optimizer, other.settings(preset)) == (
            row.model,
            row.optimizer,
            row.settings(preset),
        )

    return next(other for other in _ROWS if same(other))
