"""What the commands share: one line for bad input, numbers and devices that are checked."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import NoReturn

from .errors import UserError


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


def exit_code(run: Callable[[], int], interrupted: str) -> int:
    """What `run` returns; 2 for a `UserError` and 130 for an interrupt, which says `interrupted`."""
    try:
        return run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130


def check_device(device: str) -> None:
    """Raise if torch cannot use it.

    Raises:
        UserError: it cannot.
    """
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device} cannot be used here ({reason}); use --device cpu") from None
