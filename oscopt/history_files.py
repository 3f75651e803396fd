"""The record on disk: one .npz file, or a folder of them to which a run appends."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import atomic
from .layers import some
from .rows import RATES, RECORDED, Block, joined, packed, unpacked

FORMAT = 2
LIMIT = 32_768
"""Steps that a record holds, unless it is told otherwise."""


@dataclass
class Contents:
    """All that a history holds, see :class:`oscopt.History`; what a file has of it.

    Attributes:
        layers: L names.
        block: the steps.
        count: how many steps were recorded, dropped ones included.
        drained: the last step that was given out, -1: none.
        seeds: of the layers' sketches.
    """

    limit: int | None
    sketches: int | None
    layers: tuple[str, ...]
    block: Block
    count: int
    drained: int
    about: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """The numbers in it, by the names that a file has."""
        block, values = self.block, self.block.values
        arrays = {
            "format": np.array(FORMAT),
            "limit": np.array(-1 if self.limit is None else self.limit),
            "count": np.array(self.count),
            "drained": np.array(self.drained),
            "steps": block.steps,
            "ordinals": block.ordinals,
            **{name: np.ascontiguousarray(values[:, i]) for i, name in enumerate(RECORDED)},
            **{name: block.rates[:, i] for i, name in enumerate(RATES)},
        }
        if self.sketches is not None:
            vectors = unpacked(values[:, len(RECORDED) :])
            arrays["sketches"] = vectors.reshape(len(block), len(self.layers), self.sketches)
            arrays["sketch_seeds"] = np.array([self.seeds.get(name, -1) for name in self.layers], np.int64)
        return arrays

    def texts(self) -> dict[str, np.ndarray]:
        """Likewise the texts."""
        return {"layer_names": np.array(self.layers, str), "about": np.array(json.dumps(self.about))}


def parsed(data: Mapping[str, np.ndarray], source: str) -> Contents:
    """What the arrays and texts `data` say; `source` is what errors call them.

    Raises:
        ValueError: they are of another version, damaged, or something else.
    """
    if missing := [name for name in ("format", "steps", "layer_names") if name not in data]:
        raise ValueError(f"{source} is no history: it lacks {missing[0]!r}")
    if int(data["format"]) != FORMAT:
        raise ValueError(f"{source} is a history of format {int(data['format'])}, this oscopt reads {FORMAT}")
    if missing := [name for name in (*RECORDED, *RATES) if name not in data]:
        raise ValueError(f"{source} is damaged: it lacks {missing[0]!r}")
    count, layers = len(data["steps"]), tuple(str(name) for name in data["layer_names"])
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys((*RECORDED, *RATES), (count, len(layers)))
    sketches = data["sketches"].shape[-1] if "sketches" in data else None
    if sketches is not None:
        shapes |= {"sketches": (count, len(layers), sketches), "sketch_seeds": (len(layers),)}
    for name, shape in shapes.items():
        found = data[name].shape if name in data else None
        if found != shape:
            raise ValueError(f"{source} is damaged: {name!r} has shape {found}, not {shape}")
    values = np.stack([data[name] for name in RECORDED], axis=1)
    seeds = {}
    if sketches is not None:
        vectors = torch.from_numpy(np.asarray(data["sketches"], np.float32))
        values = np.concatenate([values, packed(vectors).numpy()], axis=1)
        pairs = zip(layers, data["sketch_seeds"].tolist(), strict=True)
        seeds = {name: seed for name, seed in pairs if seed >= 0}
    block = Block(
        np.asarray(data["steps"], np.int64),
        np.asarray(data.get("ordinals", np.arange(count)), np.int64),
        values,
        np.stack([data[name] for name in RATES], axis=1),
    )
    limit = int(data.get("limit", LIMIT))
    return Contents(
        limit=None if limit < 0 else limit,
        sketches=sketches,
        layers=layers,
        block=block,
        count=int(data.get("count", count)),
        drained=int(data.get("drained", -1)),
        about=json.loads(str(data.get("about", "{}"))),
        seeds=seeds,
    )


def write(path: str | os.PathLike, contents: Contents, compress: bool = True) -> None:
    """Write an .npz file, whole or not at all.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    save: Callable[..., None] = np.savez_compressed if compress else np.savez
    with atomic.writing(path) as file:
        save(file, **contents.arrays(), **contents.texts())


def read(path: Path) -> Contents:
    """What a file or a folder holds; nothing in it is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another version, or something else.
    """
    if path.is_dir():
        return _read_folder(path)
    name = repr(os.fspath(path))
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):  # .npy
            raise ValueError("it holds a single array")
        with file:
            data = {key: file[key] for key in file.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # of a damaged file: zlib's and zipfile's own, NotImplementedError, ...
        raise ValueError(f"{name} is no history, or a damaged one: {error}") from None
    return parsed(data, name)


def _read_folder(path: Path) -> Contents:
    name = repr(os.fspath(path))
    parts = [read(file) for file in _files(path)]
    if not parts:
        raise ValueError(f"{name} is no history: it holds no files of steps")
    last = parts[-1]
    blocks: list[Block] = []
    for part in parts:  # a later file replaces what earlier ones have of its steps and those after
        if part.layers != last.layers[: len(part.layers)]:
            layers = f"{some(part.layers)} and {some(last.layers)}"
            raise ValueError(f"{name} mixes records of the layers {layers}")
        blocks = [block.where(block.steps < part.block.steps[0]) for block in blocks]
        blocks.append(part.block)
    last.block = joined(blocks, last.block.values.shape[1], len(last.layers))
    last.count = int(last.block.ordinals[-1]) + 1
    return last


class Folder:
    """A folder of files of consecutive steps, each whole or not there.

    Attributes:
        last: the number of the last step that is to stay, -1: none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(parents=True, exist_ok=True)
        files = _files(path)
        self.last = int(read(files[-1]).block.steps[-1]) if files else -1
        self._next = int(files[-1].stem.split("-")[1]) + 1 if files else 0

    def append(self, contents: Contents) -> None:
        """Write what comes after the last step.

        Raises:
            OSError: it cannot be written; nothing is.
        """
        new = contents.block = contents.block.where(contents.block.steps > self.last)
        if len(new):
            write(self._path / f"steps-{self._next:08d}.npz", contents, compress=False)
            self._next, self.last = self._next + 1, int(new.steps[-1])


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("steps-????????.npz"))
