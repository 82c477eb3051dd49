"""Folders and files written to: no earlier run is lost by accident, no half-written file is seen."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from defi.errors import UserError, writing

LOCK = ".lock"  # held by the process that writes to the folder
LEFTOVER = ".writing"


def check_output(output: Path | str, *, resume: bool | None = None, overwrite: bool = False) -> Path:
    """Refuse an output folder that a run may not write to; change nothing on disk. resume: None for commands
    that cannot.

    Raises:
        UserError: `resume` and `overwrite` are both set; the path is a file, a folder another process writes
            to, or not empty and neither is set; `overwrite` would delete another run or the current folder.
    """
    output, choose = Path(output), "choose another output="
    if resume and overwrite:
        raise UserError("resume=true and overwrite=true: they exclude each other; set one of them")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file, not a folder; {choose}")
    if overwrite:
        inside = Path.cwd().resolve().is_relative_to(output.resolve())
        other = next(output.glob("*/**/checkpoints/step_*"), None)
        if lost := "the folder you are in" if inside else other and f"{other}, a checkpoint of another run":
            raise UserError(f"{output}: overwrite=true would delete {lost}; {choose}")
    # Only the first process of a run writes, so only it can be in another run's way.
    if os.environ.get("RANK", "0") == "0" and (output / LOCK).is_file() and (lock := claim(output)):
        lock.close()
    occupied = output.is_dir() and not all(map(is_leftover, output.iterdir()))
    if occupied and not (resume or overwrite):
        how = "overwrite=true replaces it" + ("" if resume is None else ", resume=true continues it")
        raise UserError(f"{output}: exists and is not empty; {how}, or {choose}")
    return output


def prepare_output(output: Path | str, *, resume: bool | None = None, overwrite: bool = False) -> Path:
    """Check an output folder as `check_output` does, empty it if `overwrite`, and create it."""
    output = check_output(output, resume=resume, overwrite=overwrite)
    probe = output / f".probe{LEFTOVER}"
    try:
        if overwrite and output.is_dir():
            shutil.rmtree(output)
        output.mkdir(parents=True, exist_ok=True)
        probe.write_text("can this folder be written to?")
        probe.unlink()
    except OSError as error:
        fix = "free space there or choose another output="
        raise UserError(f"{output}: cannot be written to ({error.strerror}); {fix}") from None
    return output


def claim(output: Path) -> TextIO | None:
    """Lock a folder for writing until the result is closed or this process ends; None without locks there.

    Raises:
        UserError: another process is writing there.
    """
    try:
        file = (output / LOCK).open("a")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        fix = "wait for it, stop it, or choose another output="
        raise UserError(f"{output}: another process is writing there; {fix}") from None
    except OSError:  # the file system has no locks, or lets nobody write
        return None


def take_turn(folder: Path) -> TextIO:
    """Make a folder and wait until no other process is at work in it; closing the result ends the turn."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def user_cache() -> Path:
    """For what can be made again at any time: `$XDG_CACHE_HOME/defi`, or `~/.cache/defi`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "defi"


def index_place(root: Path, name: str, done: str) -> Path:
    """The folder of an index of data: `<root>/.defi/<name>`, or beside `root` if that is a file.

    In `$DEFI_INDEX` instead, if set, or in the user's cache where the data's folder cannot be written to. A
    folder that holds the file `done` comes first.
    """
    digest = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    beside, given = root if root.is_dir() else root.parent, os.environ.get("DEFI_INDEX")
    places = [beside / ".defi" / name, user_cache() / "index" / digest / name]
    places = [Path(given) / digest / name] if given else places
    for place in places:
        if (place / done).is_file():
            return place
    for place in places:
        with suppress(OSError):  # read-only, say
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
    raise UserError(f"{places[-1]}: cannot be written to; set DEFI_INDEX to a folder for indices of data")


def is_leftover(path: Path) -> bool:
    """Whether this is what `write_file` or `claim` leaves when its process is killed."""
    return path.name == LOCK or (path.name.startswith(".") and path.name.endswith(LEFTOVER))


def write_file(path: Path, content: str | bytes) -> None:
    """Write `content` so that `path` holds its old bytes or all of the new ones, even after a crash."""
    temporary = path.with_name(f".{path.name}{LEFTOVER}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A hidden folder to fill, which takes the place of `output` when all of it is on the disk, or never."""
    folder, old = (output.with_name(f".{output.name}{end}{LEFTOVER}") for end in ("", ".old"))
    with writing(output, "it", fix="repeat the command"):
        if old.is_dir() and not output.exists():  # killed between the two
            os.replace(old, output)
        for each in (folder, old):
            shutil.rmtree(each, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
            for path in (*sorted(folder.rglob("*"), reverse=True), folder):
                sync(path)
            if output.is_dir():
                os.replace(output, old)
            os.replace(folder, output)
        finally:
            for each in (folder, old):
                shutil.rmtree(each, ignore_errors=True)
        sync(output.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
