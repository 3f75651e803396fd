"""A run's folder: files that are whole or not there, and one writer at a time. See docs/run-folder.md."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from .config import Config
from .errors import UserError

CONFIG, HISTORY, EPOCHS, VERDICT = "config.json", "history.npz", "epochs.csv", "verdict.json"
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
                f"--out {self.path}: {error.strerror}; give a folder that can be written"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(
                f"--out {self.path}: another process is running there; wait or use another"
            ) from None

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
        for pattern in ("*.json", "*.npz", "*.csv", "*.pt", "figure.*", "report.html"):
            for file in self.path.glob(pattern):
                file.unlink()

    @contextmanager
    def writing(self, name: str, mode: str = "w") -> Iterator[IO[Any]]:
        """A file that appears under `name` when it is complete and on the disk.

        Raises:
            UserError: there is no room, or another error of the disk; what was there stays.
        """
        temporary = None
        try:
            handle, temporary = tempfile.mkstemp(dir=self.path, prefix=f".{name}.")
            with os.fdopen(handle, mode) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, self / name)
        except OSError as error:
            raise UserError(
                f"{self / name} could not be written ({error}); earlier files are whole"
            ) from error
        finally:
            if temporary is not None and os.path.exists(temporary):
                os.unlink(temporary)

    # ---- settings ----------------------------------------------------------------------------------------

    def read_config(self) -> Config:
        """The settings of the run that is here.

        Raises:
            UserError: there are none, or they cannot be read.
        """
        try:
            return Config.from_dict(json.loads((self / CONFIG).read_text())["settings"])
        except FileNotFoundError:
            raise UserError(f"{self.path} holds no run to resume; leave out --resume to start one") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self / CONFIG} is damaged ({error}); start anew with --overwrite") from None

    def write_json(self, name: str, value: Any) -> None:
        """Write `value`, readable for people too."""
        with self.writing(name) as file:
            json.dump(value, file, indent=1)
            file.write("\n")

    # ---- checkpoints -------------------------------------------------------------------------------------

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write `state` (tensors and plain values), keeping the one before as well."""
        if (self / CHECKPOINT).exists():
            os.replace(self / CHECKPOINT, self / OLDER)
        with self.writing(CHECKPOINT, "wb") as file:
            torch.save(state, file)

    def load_checkpoint(self) -> tuple[dict[str, Any] | None, str]:
        """The newest checkpoint that can be read (None: there is none yet), and what was wrong, if anything.

        Raises:
            UserError: there are some, and all are damaged.
        """
        damaged = []
        for name in (CHECKPOINT, OLDER):
            if (self / name).exists():
                try:
                    state = torch.load(self / name, weights_only=True)
                    return (
                        state,
                        f"{' and '.join(damaged)} is damaged: going on from {name}" if damaged else "",
                    )
                except Exception:  # torch.load raises whatever it stumbles on
                    damaged.append(name)
        if damaged:
            raise UserError(
                f"{' and '.join(damaged)} in {self.path} are damaged; start anew with --overwrite"
            )
        return None, ""
