"""Output folders and atomic writes: no earlier run is lost by accident, no half-written file is seen."""

import os
import shutil
from pathlib import Path

from defi.errors import UserError

LEFTOVER = ".writing"
PROBE = f".probe{LEFTOVER}"


def check_output(output: Path | str, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Refuse an output folder that a run may not write to; change nothing on disk.

    Raises:
        UserError: `resume` and `overwrite` are both set, the path is a file, or the folder is not empty and
            neither is set.
    """
    output = Path(output)
    if resume and overwrite:
        raise UserError("resume=true and overwrite=true: they exclude each other; set one of them")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file, not a folder; choose another output=")
    if overwrite and Path.cwd().resolve().is_relative_to(output.resolve()):
        raise UserError(
            f"{output}: overwrite=true would delete the folder you are in; choose another output="
        )
    kept = output.is_dir() and any(not is_leftover(path) for path in output.iterdir())
    if kept and not (resume or overwrite):
        raise UserError(
            f"{output}: exists and is not empty; overwrite=true replaces it, resume=true continues it, "
            "or choose another output="
        )
    return output


def prepare_output(output: Path | str, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Check an output folder as `check_output` does, empty it if `overwrite`, and create it."""
    output = check_output(output, resume=resume, overwrite=overwrite)
    try:
        if overwrite and output.is_dir():
            shutil.rmtree(output)
        output.mkdir(parents=True, exist_ok=True)
        (output / PROBE).write_text("can this folder be written to?")
        (output / PROBE).unlink()
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written to ({error.strerror}); make room there or choose another output="
        ) from None
    return output


def is_leftover(path: Path) -> bool:
    """Whether this is what `write_file` leaves when it is killed."""
    return path.name.startswith(".") and path.name.endswith(LEFTOVER)


def write_file(path: Path, content: str | bytes) -> None:
    """Write `content` so that `path` holds its old bytes or all of the new ones, even after a crash."""
    temporary = path.with_name(f".{path.name}{LEFTOVER}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
