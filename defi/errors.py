"""The one exception that is meant for the person at the keyboard."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


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


def readable(read: Callable[[Item], Value], items: Iterable[Item]) -> dict[Item, Value]:
    """What `read` makes of each item that it can read; a printed line tells of the others.

    Raises:
        UserError: it can read none of them.
    """
    found: dict[Item, Value] = {}
    faults: list[UserError] = []
    for item in items:
        try:
            found[item] = read(item)
        except UserError as error:
            faults.append(error)
    if faults and not found:
        raise faults[0]
    if faults:
        count = f"{len(faults)} of {len(faults) + len(found)} samples to look at"
        print(f"left out: {count}; the first: {faults[0]}")
    return found
