"""Files below a folder, wherever they lie."""

import os
from collections.abc import Collection
from pathlib import Path

from defi.errors import UserError
from defi.instructions import is_utf8


def find_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Files with one of the suffixes (in lower case; theirs may be in any), sorted by path.

    Folders that are links are entered too, for large data sets lie on several disks; but last, and none a
    second time, so that a folder keeps its own name and a link to where it stands has an end. What is hidden,
    files (macOS puts `._a.mp4` beside `a.mp4`) and folders, is none of the data.

    Raises:
        UserError: a file's path is not UTF-8.
    """
    found: list[Path] = []
    entered: set[str] = set()
    waiting = [str(folder)]
    for start in waiting:
        for place, folders, files in os.walk(start):
            if (real := os.path.realpath(place)) in entered:
                folders.clear()
                continue
            entered.add(real)
            folders[:] = [name for name in folders if name[0] != "."]
            waiting += sorted(link for name in folders if os.path.islink(link := os.path.join(place, name)))
            seen = (Path(place, name) for name in files if name[0] != ".")
            found += [file for file in seen if file.suffix.lower() in suffixes]
    if foreign := [path for path in found if not is_utf8(str(path))]:
        raise UserError(f"{foreign[0]}: its name is not UTF-8, so that not every library opens it; rename it")
    return sorted(found)
