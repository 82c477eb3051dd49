"""The one exception that is meant for the person at the keyboard."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something the user can fix. The message is one line: what was wrong (file or value), and what to do.

    Entry points print it without a traceback and leave with exit code 2 (`defi.config.entry`).
    """


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks, at most 200 characters; its type where it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def reading(file: Path | str, fix: str) -> Iterator[None]:
    """Around the library call that opens or decodes somebody else's file: all that it raises is one line.

    The one place where a library's complaint about damage becomes a message; see docs/security.md.

    Raises:
        UserError: names the file, what the library said of it, and the `fix`.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{file}: missing; {fix}") from None
    except Exception as error:  # each library, and each kind of damage, has errors of its own
        reason = getattr(error, "strerror", None) or one_line(error)  # of the system, or of FFmpeg
        raise UserError(f"{file}: cannot be read ({reason}); {fix}") from None


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
