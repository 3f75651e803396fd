"""What ends a run with one line and an exit code instead of a traceback."""


class UserError(Exception):
    """Something that the user can mend; the message says what and how. Exit code 2."""


def reason(error: OSError) -> str:
    """Why a folder cannot be made or a file cannot be written, for people."""
    if isinstance(error, FileExistsError):
        return "it is a file"
    if isinstance(error, NotADirectoryError):
        return "a file is where a folder of this path should be"
    return error.strerror or str(error)


class Diverged(Exception):
    """The loss is no longer finite. Exit code 3."""


class Interrupted(Exception):
    """A signal asked to stop. Exit code 128 + its number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number
