"""Small text files that strangers may have written: read as plain data, whatever is in them."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from defi.errors import UserError, one_line

DEEPEST = 50  # levels of YAML
MOST_LAYERS, LARGEST_SIZE = 200, 10**6  # in a network's configuration
LAYERS = re.compile(r"(layers|blocks|depth)($|_per)")
LARGEST = 64 * 2**20  # bytes; the text files of a checkpoint or a data set are far smaller


def read_json(file: Path, fix: str, kind: type = dict) -> Any:
    """What a JSON file holds: an object, or a list where that is the `kind`.

    Raises:
        UserError: the file is missing, damaged, too large or holds something else; it ends with `fix`.
    """
    text = read_text(file, fix)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({one_line(error)}); {fix}") from None
    if not isinstance(values, kind):
        raise UserError(f"{file}: holds a {type(values).__name__}, not a {kind.__name__}; {fix}")
    return values


def read_yaml(file: Path, fix: str) -> dict[str, Any]:
    """The mapping in a YAML file, interpolations left as they are.

    Tags that name code are refused, and aliases, with which a short file can fill the memory.

    Raises:
        UserError: as `read_json`.
    """
    text = read_text(file, fix)
    try:
        _refuse_tricks(text)
        values = OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, TypeError) as error:
        raise UserError(f"{file}: not YAML that is read here ({one_line(error)}); {fix}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: holds a {type(values).__name__}, not a dict; {fix}")
    return values


def _refuse_tricks(text: str) -> None:
    """Raise ValueError for YAML with aliases, or nested so deep that its parser takes long."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has an alias (*name)")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")


def read_text(file: Path, fix: str) -> str:
    """The text of a file. Raises UserError as `read_json` does."""
    try:
        if file.stat().st_size > LARGEST:
            raise UserError(f"{file}: {file.stat().st_size:,} bytes, more than any file of its kind; {fix}")
        return file.read_text(encoding="utf-8-sig")  # some programs begin their files with a mark
    except FileNotFoundError:
        raise UserError(f"{file}: missing; {fix}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not text in UTF-8 ({error.reason}); {fix}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); {fix}") from None


def check_sizes(values: Any, file: Path, name: str = "") -> None:
    """Refuse sizes that no network has, before one is built from them.

    Raises:
        UserError: so many layers, or a number so large, that building would not end.
    """
    if isinstance(values, dict):
        for key, value in values.items():
            check_sizes(value, file, str(key))
    elif isinstance(values, list):
        for value in (len(values), *values):
            check_sizes(value, file, name)
    elif isinstance(values, int) and values > (MOST_LAYERS if LAYERS.search(name) else LARGEST_SIZE):
        raise UserError(f"{file}: {name}={values} is beyond all reason; copy the checkpoint again")
