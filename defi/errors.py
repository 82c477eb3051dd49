"""Exceptions that are meant for the person at the keyboard, and where they are made of a library's."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something the user can fix. The message is one line: what was wrong (file or value), and what to do.

    Entry points print it without a traceback and exit with code 2 (`defi.config.entry`).
    """


class Fault(RuntimeError):
    """A fault in code of the user's own that ran in another process.

    Entry points print what went wrong below the traceback from there, not their own (exit code 1).
    """

    def __init__(self, trace: str, what: str) -> None:
        super().__init__(trace, what)  # both, so that it can be pickled
        self.trace, self.what = trace, what

    def __str__(self) -> str:
        return f"{self.what}\n{self.trace}"


def choose(key: str, value: str | None, choices: Iterable[str | None]) -> None:
    """Raises UserError where the value of a setting is none of the choices."""
    if value not in choices:
        names = ", ".join("null" if choice is None else choice for choice in choices)
        raise UserError(f"{key}={value}: must be one of {names}")


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks, at most 200 characters; its type where it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError) and " " not in str(error):  # of a dictionary; libraries say more
        return f"no {error} in it"
    return getattr(error, "strerror", None) or one_line(error)  # of the system, or of FFmpeg


@contextmanager
def reading(file: Path | str, fix: str) -> Iterator[None]:
    """Around a library call that opens or decodes a file from others: whatever it raises becomes one line.

    The one place where a library's complaint about damage becomes a message; see docs/security.md. The
    complaint stays as the error's cause: commands do not print it, tests and notebooks do.

    Raises:
        UserError: names the file, what the library said, and the `fix`.
    """
    try:
        yield
    except (UserError, ImportError):  # a package that is missing is no damage
        raise
    except FileNotFoundError:
        raise UserError(f"{file}: missing; {fix}") from None
    except Exception as error:  # each library, and each kind of damage, has errors of its own
        raise UserError(f"{file}: cannot be read ({_reason(error)}); {fix}") from error


@contextmanager
def writing(output: Path, what: str, *, fix: str = "continue with resume=true") -> Iterator[None]:
    """Around writes of a command that can be resumed, or as `fix` says: a full disk, say, becomes one line.

    Raises:
        UserError: names the output folder and what could not be written.
    """
    try:
        yield
    except Exception as error:
        # By its name: a robot's own computer, which runs `defi.robot.client`, has no safetensors.
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        fault = f"cannot write {what} ({_reason(error)})"
        raise UserError(f"{output}: {fault}; free some space, then {fix}") from None
