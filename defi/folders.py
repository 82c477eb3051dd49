"""Files below a folder, wherever they lie."""

import os
from collections.abc import Collection
from pathlib import Path


def find_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Files with one of the suffixes (in lower case; theirs may be in any), sorted by path.

    Folders that are links are entered too, for large data sets lie on several disks; but last, and none a
    second time, so that a folder keeps its own name and a link to where it stands has an end.
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
            waiting += sorted(link for name in folders if os.path.islink(link := os.path.join(place, name)))
            found += [Path(place, name) for name in files if Path(name).suffix.lower() in suffixes]
    return sorted(found)
