"""What the commands share: input that is checked, one line for what goes wrong, an end at any moment.

Nothing heavy is imported here, so that a command answers to signals before it imports anything heavy.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

from .errors import UserError, reason

MOST = 10**9
"""The largest number that an option takes, if it says nothing else."""


class Parser(argparse.ArgumentParser):
    """One line for bad input, instead of the usage as well."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (--help shows all options)", file=sys.stderr)
        sys.exit(2)


# ---- values of options -------------------------------------------------------------------------------------


def positive(kind: type, most: float = MOST) -> Callable[[str], float]:
    """A number greater than 0 and at most `most`."""
    noun = "a whole number" if kind is int else "a number"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} greater than 0")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} up to {most:,}")
        return value

    return parse


def integer(text: str) -> int:
    """A whole number from 0 on, as seeds are."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return value


def integers(text: str) -> list[int]:
    """Whole numbers by commas, each once."""
    return list(dict.fromkeys(integer(part) for part in text.split(",")))


def threads(text: str) -> int:
    """A number of threads: far more than there are cores end in a crash, not in an error."""
    count = positive(int)(text)
    try:
        check_threads(count)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return count


def filled(text: str) -> str:
    """A text that is not empty: "" is a variable that a shell script has not set, never a wish."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give a value or leave the option out")
    return text


def name_list(text: str) -> list[str]:
    """Names by commas, each once; none is empty."""
    found = list(dict.fromkeys(text.split(",")))
    if "" in found:
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; give names, by commas")
    return found


# ---- what a machine has ------------------------------------------------------------------------------------


def check_device(device: str) -> None:
    """Raise unless torch can compute there.

    Raises:
        UserError: it cannot.
    """
    import torch

    try:
        torch.zeros(1, device=device).item()  # "meta" has tensors, but no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device} cannot be used here ({reason}); use --device cpu") from None


def check_threads(count: int) -> None:
    """Raise if no machine like this one can have so many threads.

    Raises:
        UserError: it cannot.
    """
    cores = os.cpu_count() or 1
    if count > max(256, cores):  # some more than cores are slow but work, and a run may come from elsewhere
        raise UserError(f"{count:,} threads are more than this machine can run; it has {cores} cores")


def check_folder(option: str, path: str | None) -> None:
    """Raise if a folder that is to be read is not there.

    Raises:
        UserError: it is not.
    """
    if path is not None and not Path(path).is_dir():
        raise UserError(f"{option} {path}: there is no such folder; create it, or give another one")


def writable_folder(option: str, path: str | os.PathLike) -> Path:
    """The folder `path`, created if it is not there.

    Raises:
        UserError: it cannot be created or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: {reason(error)}; give a folder that can be written") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{option} {path}: it cannot be written; give another folder")
    return folder


# ---- the ends of a command ---------------------------------------------------------------------------------


def exit_code(run: Callable[[], int]) -> int:
    """What `run` returns; 2 and one line on stderr for what the user can mend."""
    try:
        return run()
    except UserError as error:
        return _failed(str(error))
    except OSError as error:
        what = error.filename or "the output or a file"  # errors in writing tell no name
        return _failed(f"{what} cannot be read or written ({error.strerror or error})")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _out_of_memory(error):
            raise
        return _failed(
            "there is not enough memory; use a smaller net, fewer pictures or a smaller part at a time"
        )


def script(main: Callable[[], int], interrupted: str = "interrupted") -> int:
    """The exit code of `main`, the whole of this process; to be called before anything heavy is imported.

    SIGINT and SIGTERM end it at once with the line `interrupted` and 130 or 143, unless something else asks
    for them: files are written so that a kill does no harm, and an exception in the midst of an import or a
    library's code may be swallowed. Every line of the output is written at once, so that an output that
    cannot be written (a closed pipe, a full disk) is noticed at the first one.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, partial(_leave, interrupted))
    sys.stdout.reconfigure(line_buffering=True)
    try:
        code = exit_code(main)
    except SystemExit as stop:  # argparse's
        code = stop.code
    if _stdout_fails():
        # The interpreter's own attempt at the end would tell of it a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 2
    return code


def _leave(line: str, number: int, frame: object) -> NoReturn:
    _stdout_fails()  # what was printed goes out first
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())
    if "multiprocessing" in sys.modules:
        for child in sys.modules["multiprocessing"].active_children():
            child.kill()
    os._exit(128 + number)


def _failed(message: str) -> int:
    with suppress(OSError):
        print(f"error: {message}", file=sys.stderr)
    return 2


def _stdout_fails() -> bool:
    """Whether what has been printed cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        return True
    except (RuntimeError, ValueError):  # in the midst of a write that a signal has interrupted; closed
        return False
    return False


def _out_of_memory(error: Exception) -> bool:
    text = str(error)
    return (
        "can't allocate memory" in text
        or "out of memory" in text
        or "Storage size calculation overflowed" in text
    )
