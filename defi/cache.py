"""What can be made again at any time: where it is kept, and how processes take turns at making it."""

import fcntl
import os
from pathlib import Path
from typing import TextIO


def user_cache() -> Path:
    """This project's folder in the user's cache: `$XDG_CACHE_HOME/defi`, or `~/.cache/defi`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "defi"


def take_turn(folder: Path) -> TextIO:
    """Wait until no other process is at work in a folder, which is made; closing the result ends the turn.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file
