"""The one exception that is meant for the person at the keyboard."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something the user can mend. The message is one line: what was wrong (file or value), and what to do.

    Entry points print it without a traceback and leave with exit code 2 (`defi.config.entry`).
    """


@contextmanager
def going_on(output: Path, what: str) -> Iterator[None]:
    """Writes of a command that goes on with `resume=true`: a disk that is full, say, is one line.

    Raises:
        UserError: names the output folder and what could not be written.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(
            f"{output}: cannot write {what} ({reason}); what is finished stays: make room, then go on with "
            "resume=true"
        ) from None
