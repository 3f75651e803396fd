"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

if sys.platform != "win32":  # there, processes that write one file at a time do not wait for each other
    import fcntl

SUFFIX = ".part"
"""How the name of a file that is being written ends; it begins with a dot."""


@contextmanager
def writing(path: str | os.PathLike, mode: str = "wb", *, keep: Path | None = None) -> Iterator[IO[Any]]:
    """A file that appears under `path` when it is complete and on the disk.

    Until then it is called `.NAME.part`. A process that is killed leaves it there, and the next one that
    writes to `path` takes it over; if another process is still writing it, this one waits.

    Args:
        mode: "wb", or "w" for text, in UTF-8.
        keep: new name of the file that is there already; None: it is replaced.

    Raises:
        OSError: it cannot be written, with `path` as its `filename`; what was there stays.
    """
    path = Path(path)
    _check(path)
    temporary = path.with_name(f".{path.name}{SUFFIX}")
    try:
        file = _taken(temporary, mode)
    except OSError as error:  # whoever gave `path` does not know the other name
        raise type(error)(error.errno, error.strerror, str(path)) from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _check(path: Path) -> None:
    """Raise if `path` cannot be a file, in words that say what to give instead."""
    if not path.name or path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder; give the name of a file", str(path))
    if path.parent.is_dir():
        return
    if path.parent.exists():
        raise NotADirectoryError(errno.ENOTDIR, f"{path.parent} is no folder; give another one", str(path))
    raise FileNotFoundError(
        errno.ENOENT, "its folder is not there; create it, or give another one", str(path)
    )


def _taken(path: Path, mode: str) -> IO[Any]:
    """The file `path`, empty and locked against other writers; it is emptied only after it is locked."""
    encoding = None if "b" in mode else "utf-8"
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), mode, encoding=encoding)
        if sys.platform == "win32":
            break
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):  # another process has finished it meanwhile
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    file.truncate(0)
    return file


def _sync(folder: Path) -> None:
    """Write the names in `folder` to the disk as well."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
