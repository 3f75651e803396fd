"""What a run leaves in its folder besides checkpoints, written and read back. See docs/run-folder.md."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from oscopt import History

from .config import Config
from .errors import UserError
from .experiments import TABLE
from .folder import EPOCHS, HISTORY, MATRICES, RECURRENCE, UPDATES, VERDICT, Folder, read_config
from .rules import Record, Verdict, judge
from .summary import summarise

FINISHED, INTERRUPTED, DIVERGED = "finished", "interrupted", "diverged"
"""How a run ended."""
_COLUMNS = ("epoch", "loss", "accuracy", "global_correlation", "windowed_mean", "sharpness", "seconds")


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it."""

    path: Path
    config: Config
    machine: dict[str, object]
    state: str
    record: Record
    matrices: dict[int, dict[str, np.ndarray]]


def write(
    folder: Folder,
    record: Record,
    matrices: dict[int, dict[str, np.ndarray]],
    config: Config,
    state: str,
    claims: Sequence[str],
    beside: Run | None = None,
) -> list[str]:
    """Write everything that is drawn from the record; the summary's lines.

    Raises:
        UserError: a file could not be written.
    """
    if not len(record.history):
        return ["nothing was recorded"]
    from . import figure, report

    with folder.writing(EPOCHS) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(_COLUMNS)
        columns = (
            record.loss, record.accuracy, record.history.global_correlation(), record.windowed,
            record.sharpness, record.seconds,
        )  # fmt: skip
        for epoch, values in enumerate(zip(*columns, strict=True)):
            rows.writerow([epoch, *(repr(float(value)) for value in values)])
    recorded = {HISTORY: record.history, UPDATES: record.updates, RECURRENCE: record.recurrence}
    for name, history in recorded.items():
        try:
            if history is not None:
                history.save(folder / name)
        except OSError as error:
            raise UserError(f"{folder / name} could not be written ({error.strerror}); make room") from None
    with folder.writing(MATRICES, "wb") as file:
        np.savez_compressed(
            file, **{f"{epoch}/{key}": m for epoch, of in matrices.items() for key, m in of.items()}
        )
    verdicts = judge(claims, record)
    folder.write_json(VERDICT, {"state": state, "epochs": len(record.loss), "claims": as_json(verdicts)})
    lines = summarise(record, verdicts)
    figures = {"figure": figure.draw(record, matrices, config, TABLE[config.experiment].shows)}
    figures["layers"] = figure.draw_beyond(record, config)
    if record.recurrence is not None:
        figures["recurrence"] = figure.draw_recurrence(record, matrices, config)
    if beside is not None:
        figures["beside"] = figure.draw_beside(record, config, beside.record, beside.config)
    for name, drawn in figures.items():
        with folder.writing(f"{name}.png", "wb") as file:
            drawn.savefig(file, format="png", dpi=130)
        drawn.set_layout_engine("none")  # it stays as it is laid out now
        figures[name] = figure.svg(drawn)
        with folder.writing(f"{name}.svg") as file:
            file.write(figures[name])
    machine, beside_figure = read_config(folder.path)[1], figures.get("beside")
    page = report.run_page(config, machine, record, matrices, state, lines, verdicts, beside_figure)
    with folder.writing("report.html") as file:
        file.write(page)
    return lines


def as_json(verdicts: Sequence[Verdict]) -> list[dict[str, object]]:
    """Plain values; a measured value that is not finite is None."""
    return [asdict(v) | {"measured": v.measured if math.isfinite(v.measured) else None} for v in verdicts]


def read(path: str | Path) -> Run:
    """The run in the folder `path`, which nobody need be writing; executes nothing that is in its files.

    Raises:
        UserError: there is none, or a file is missing, damaged, of another version or not ours.
    """
    path = Path(path)
    config, machine = read_config(path)
    try:
        state = json.loads((path / VERDICT).read_text())["state"]
        with (path / EPOCHS).open(newline="") as file:
            rows = list(csv.DictReader(file))
        columns = {key: np.array([float(row[key]) for row in rows]) for key in _COLUMNS}
        history = History.load(path / HISTORY)
        updates, recurrence = (
            History.load(path / name) if (path / name).exists() else None for name in (UPDATES, RECURRENCE)
        )
        with np.load(path / MATRICES, allow_pickle=False) as file:
            stored = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise UserError(
            f"{path} lacks {Path(error.filename).name}; go on with --resume --out {path}"
        ) from None
    except Exception as error:  # readers raise whatever they stumble on
        raise UserError(f"{path} cannot be read ({_line(error)}); start it anew with --overwrite") from None
    if len(rows) != len(history):
        raise UserError(f"{path} is damaged: {len(rows)} epochs but {len(history)} steps; start it anew")
    matrices: dict[int, dict[str, np.ndarray]] = {}
    for name, matrix in stored.items():
        epoch, _, key = name.partition("/")
        matrices.setdefault(int(epoch), {})[key] = matrix
    given = {key: columns[key] for key in ("loss", "accuracy", "seconds", "sharpness")}
    record = Record(history, updates=updates, recurrence=recurrence, **given)
    return Run(path, config, machine, state, record, matrices)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
