"""Files from others: small texts and pickles, read as plain data, and what lies below a folder."""

import json
import os
import pickle
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from defi.errors import UserError, reading
from defi.instructions import is_utf8

LARGEST = 64 * 2**20  # bytes; the text files of a checkpoint or a data set are far smaller
DEEPEST = 50  # levels of YAML
MOST_LAYERS, LARGEST_SIZE = 200, 10**6  # in a network's configuration
LAYERS = re.compile(r"(layers|blocks|depth)($|_per)")


def read_text(file: Path, fix: str) -> str:
    """The text of a UTF-8 file.

    Raises:
        UserError: the file is missing, damaged or too large; the message ends with `fix`.
    """
    with reading(file, fix):
        if (size := file.stat().st_size) > LARGEST:
            raise ValueError(f"{size:,} bytes, more than any file of its kind")
        return file.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark


def read_json(file: Path, fix: str, kind: type = dict) -> Any:
    """What a JSON file holds: an object, or a list where that is the `kind`. Errors as `read_text`."""
    with reading(file, fix):
        return _checked(json.loads(read_text(file, fix)), kind)


def read_yaml(file: Path, fix: str) -> dict[str, Any]:
    """The mapping in a YAML file, its interpolations not resolved. Errors as `read_text`.

    Refused: tags that name code, and aliases, with which a short file can fill the memory.
    """
    with reading(file, fix):
        text, depth = read_text(file, fix), 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("has an alias (*name)")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} deep")
        return _checked(OmegaConf.to_container(OmegaConf.create(text)), dict)


def as_list(value: Any) -> list[Any]:
    """A list of a JSON file, where a single item may stand as it is."""
    return value if isinstance(value, list) else [value]


def inside(root: Path, path: str) -> str:
    """A path named in a data set's file. Raises UserError if it leaves the data set's folder.

    Links within the folder may lead where they like: they are its owner's.
    """
    normal = os.path.normpath(path)
    if os.path.isabs(normal) or normal.split(os.sep)[0] == os.pardir or "\0" in normal:
        raise UserError(f"{root}: its files name {path}, outside the folder; this data set is not safe")
    return normal


def _checked(values: Any, kind: type) -> Any:
    if not isinstance(values, kind):
        raise ValueError(f"holds a {type(values).__name__}, not a {kind.__name__}")
    return values


class PlainUnpickler(pickle._Unpickler):
    """Refuses what a pickle names, unless `find_class` of a subclass knows it: no code runs.

    The one in Python: the one in C takes as much memory as the largest number of a memo entry asks for. Byte
    arrays, which no file here needs, take what their length asks for.
    """

    dispatch = {
        code: read for code, read in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"refers to {module}.{name}, which could run code")


def check_sizes(values: Any, file: Path, name: str = "") -> None:
    """Refuse a network's configuration with sizes that no network has, before one is built from it."""
    if isinstance(values, dict):
        for key, value in values.items():
            check_sizes(value, file, str(key))
    elif isinstance(values, list):
        for value in (len(values), *values):
            check_sizes(value, file, name)
    elif isinstance(values, int) and values > (MOST_LAYERS if LAYERS.search(name) else LARGEST_SIZE):
        raise UserError(f"{file}: {name}={values} is beyond all reason; copy the checkpoint again")


def find_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Files below a folder with one of the suffixes (given in lower case, matched in any), sorted by path.

    Linked folders are followed, since large data sets are spread over disks, but none is entered twice.
    Hidden files and folders are skipped (macOS puts `._a.mp4` beside `a.mp4`).
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
            # Links come last, so that a folder keeps its own name.
            waiting += sorted(link for name in folders if os.path.islink(link := os.path.join(place, name)))
            visible = (Path(place, name) for name in files if name[0] != ".")
            found += [file for file in visible if file.suffix.lower() in suffixes]
    for file in found:
        if not is_utf8(str(file)):
            raise UserError(f"{file}: its name is not UTF-8, which not every library can open; rename it")
    return sorted(found)
