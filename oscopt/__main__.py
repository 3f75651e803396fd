"""``python -m oscopt report PATH [OUT]`` writes a record's page, ``summary`` prints its table."""

from __future__ import annotations

import argparse
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
            from .report import write

            write(given.out, histories, given.title)
            print(given.out)
        else:
            for history in histories:
                print(history.summary(given.last))
    except (OSError, ValueError, ImportError) as error:
        print(f"oscopt: {error}", file=sys.stderr)
        return 2
    return 0


def load(path: Path) -> list[History]:
    """The records at `path`.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is damaged, or something else.
    """
    found = [path / name for name in _FILES if (path / name).is_file()]
    return [History.load(part) for part in found or [path]]


if __name__ == "__main__":
    sys.exit(main())
