"""``python -m oscopt report PATH [OUT]`` writes a record's page, ``summary`` prints its table."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence
from pathlib import Path

from .history import History

_FILES = ("history.npz", "updates.npz")  # of a run of benchmarks/study


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m oscopt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    help_path = "an .npz of History.save, a folder of History.stream_to, or the folder of a run of the study"
    report = commands.add_parser("report", help="write one page that opens without a network")
    report.add_argument("path", type=Path, help=help_path)
    report.add_argument("out", type=Path, nargs="?", default=Path("report.html"), help="default: %(default)s")
    report.add_argument("--title", help="default: what was measured")
    summary = commands.add_parser("summary", help="print a table of the layers with hints")
    summary.add_argument("path", type=Path, help=help_path)
    summary.add_argument("--last", type=int, default=500, help="steps to look at, default: %(default)s")
    given = parser.parse_args(arguments)
    try:
        histories = load(given.path)
        if given.command == "report":
            _report(given.out, histories, given)
        else:
            print(*(history.summary(given.last) for history in histories), sep="\n")
    except OSError as error:
        about = f"{error.filename}: {error.strerror}" if error.filename else f"the output: {error.strerror}"
        return _failed(about)
    except (ValueError, ImportError) as error:
        return _failed(str(error))
    return 0


def load(path: Path) -> list[History]:
    """The records at `path`.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is damaged, or something else.
    """
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no such record; give a file or folder", str(path))
    parts = [path / name for name in _FILES if (path / name).is_file()] or [path]
    try:
        return [History.load(part) for part in parts]
    except (KeyError, TypeError, IndexError) as error:  # arrays of these names, but of another make
        raise ValueError(f"{str(path)!r} is no history, or a damaged one: {error}") from None


def _report(out: Path, histories: Sequence[History], given: argparse.Namespace) -> None:
    from .report import write

    if out.is_file() and given.path.is_file() and out.samefile(given.path):
        raise ValueError(f"{str(out)!r} is the record itself; give another file for the page")
    write(out, histories, given.title)
    print(out)


def _failed(message: str) -> int:
    print(f"oscopt: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
