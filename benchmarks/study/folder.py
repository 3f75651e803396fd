"""A run's folder: files that are whole or not there, and one writer at a time. See docs/run-folder.md."""

from __future__ import annotations

import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from oscopt import atomic

from .config import Config
from .errors import UserError, reason
from .experiments import check_experiments

CONFIG, EPOCHS, VERDICT = "config.json", "epochs.csv", "verdict.json"
HISTORY, UPDATES, MATRICES = "history.npz", "updates.npz", "matrices.npz"
RECURRENCE = "recurrence.npz"
CHECKPOINT, OLDER = "checkpoint.pt", "checkpoint-older.pt"
_LOCK = ".lock"


class Folder:
    """The folder of one run.

    Args:
        path: created if it is not there.

    Raises:
        UserError: it cannot be written, or another process is writing it.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / _LOCK, "a+")
        except OSError as error:
            raise UserError(
                f"--out {self.path}: {reason(error)}; give a folder that can be written"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(
                f"--out {self.path}: another process is running there; wait or use another"
            ) from None
        for name in os.listdir(self.path):  # what a killed process was writing
            if name.startswith(".") and name.endswith(atomic.SUFFIX):
                os.unlink(self.path / name)

    def close(self) -> None:
        """Let another process in."""
        self._lock.close()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def holds_run(self) -> bool:
        """Whether a run has been started here."""
        return (self / CONFIG).exists()

    def clear(self) -> None:
        """Remove the files of the run that is here."""
        for pattern in ("*.json", "*.npz", "*.csv", "*.pt", "*.svg", "*.png", "report.html"):
            for file in self.path.glob(pattern):
                file.unlink()

    @contextmanager
    def writing(self, name: str, mode: str = "w", *, keep: str | None = None) -> Iterator[IO[Any]]:
        """A file that appears under `name` when it is complete and on the disk.

        Args:
            keep: name that the file which is there gets; None: it is replaced.

        Raises:
            UserError: there is no room, or another error of the disk; what was there stays.
        """
        try:
            with atomic.writing(self / name, mode, keep=None if keep is None else self / keep) as file:
                yield file
        except OSError as error:
            raise UserError(
                f"{self / name} could not be written ({error.strerror or error}); earlier files are whole: "
                "make room and --resume"
            ) from error

    # ---- settings ----------------------------------------------------------------------------------------

    def read_config(self) -> Config:
        """The settings of the run that is here; see :func:`read_config`."""
        return read_config(self.path)[0]

    def write_json(self, name: str, value: Any) -> None:
        """Write `value`, readable for people too."""
        with self.writing(name) as file:
            json.dump(value, file, indent=1)
            file.write("\n")

    # ---- checkpoints -------------------------------------------------------------------------------------

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write `state` (tensors and plain values), keeping the one before as well."""
        whole = io.BytesIO()  # torch.save does not say when a file's disk is full
        torch.save(state, whole)
        with self.writing(CHECKPOINT, "wb", keep=OLDER) as file:
            file.write(whole.getbuffer())

    def load_checkpoint(self, load: Callable[[dict[str, Any]], None]) -> tuple[dict[str, Any] | None, str]:
        """The newest checkpoint that `load` takes (None: there is none yet), and what was wrong, if anything.

        Args:
            load: takes a checkpoint over, or raises anything at all if it does not fit; then the one before
                is tried.

        Raises:
            UserError: there are some, and none can be taken.
        """
        wrong = []
        for name in (CHECKPOINT, OLDER):
            if (self / name).exists():
                try:
                    state = torch.load(self / name, weights_only=True)
                except Exception:  # torch.load raises whatever it stumbles on
                    wrong.append(f"{name} is damaged")
                    continue
                try:
                    load(state)
                except Exception as error:  # as do those that take over what was never checked
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    wrong.append(f"{name} does not fit ({reason})")
                    continue
                return state, f"{' and '.join(wrong)}: going on from {name}" if wrong else ""
        if wrong:
            raise UserError(f"{self.path}: {' and '.join(wrong)}; start anew with --overwrite")
        return None, ""


def read_config(path: Path) -> tuple[Config, dict[str, Any]]:
    """The settings of the run in the folder `path`, and the machine that it ran on.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    try:
        content = json.loads((path / CONFIG).read_text())
        config, machine = Config.from_dict(content["settings"]), dict(content["machine"])
        check_experiments([config.experiment])
        for key in ("date", "oscopt", "torch", "processor", "cores", "gpu"):
            machine[key]
        return config, machine
    except FileNotFoundError:
        raise UserError(f"{path} holds no run: it lacks {CONFIG}") from None
    except OSError as error:
        raise UserError(f"{path / CONFIG} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{path / CONFIG} is damaged ({error}); start anew with --overwrite") from None
