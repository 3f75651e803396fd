"""What the commands share: one line for bad input, and numbers that are checked."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """One line for bad input, instead of the usage as well."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (--help shows all options)", file=sys.stderr)
        sys.exit(2)


def positive(kind: type) -> Callable[[str], float]:
    """A finite number greater than 0."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not (value > 0 and math.isfinite(value)):
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} greater than 0")
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
