"""Models and tokenizers from Hugging Face's folders or its server, which may be out of reach."""

import functools
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session, snapshot_download

from defi.errors import UserError, reading
from defi.files import check_sizes, read_json

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
CHECKPOINT = ("*.json", "*.yaml", "*.safetensors", "*.txt", "*.model")  # files that hold no code
PATIENCE = 3.0  # seconds; the library itself would try for most of a minute, file by file


def local_folder(place: Path | str, revision: str | None = None) -> Path:
    """A folder of a checkpoint as it is; one that lies on the hub as `user/name` is downloaded first.

    revision: of the repository: a branch, tag or commit; None: its newest.

    Raises:
        UserError: there is no such repository, or it cannot be reached.
    """
    if os.path.exists(place) or not REPOSITORY.fullmatch(str(place)) or _is_path(Path(place)):
        return Path(place)
    fix = "check name and network, log in with `hf auth login`, or give a folder"
    with reading(f"{constants.ENDPOINT}/{place}", fix):
        return Path(snapshot_download(str(place), revision=revision, allow_patterns=list(CHECKPOINT)))


def _is_path(path: Path) -> bool:
    """Whether this can only be meant as a path, of which nothing is there."""
    beside = len(path.parts) > 1 and os.path.isdir(path.parent)
    return path.is_absolute() or path.parts[:1] in (("ckpts",), ("..",)) or beside


def from_pretrained(cls: Any, source: Path | str, **settings: Any) -> Any:
    """`cls.from_pretrained` of a folder or hub name, which runs no code from there."""
    where = source if "/" in str(source) else f"pretrained={str(source)[:200]}"
    with reading(where, f"give the folder or hub name of a {cls.__name__}"):
        safe = {"local_files_only": local_only(source), "trust_remote_code": False}
        return cls.from_pretrained(str(source), **safe, **settings)


def load_model(cls: Any, source: Path | str) -> Any:
    """A model of the class `cls` from a folder or hub name; every one of its tensors must be there."""
    model, report = from_pretrained(cls, source, output_loading_info=True)
    if missing := sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}):
        what = f"{len(missing)} tensors of {cls.__name__} are missing or of another shape, first {missing[0]}"
        raise UserError(f"{source}: {what}; give a complete folder")
    return model


def local_only(source: Path | str) -> bool:
    """Whether to load `source` from the disk alone: it is a folder, or the server does not answer.

    A model that was downloaded before is found without a server. A path where nothing is raises UserError: a
    repository of anybody's may have that name.
    """
    path = Path(source)
    if os.path.isdir(path):  # unlike Path.is_dir for any name, too long ones as well
        if (file := path / "config.json").is_file():
            check_sizes(read_json(file, "copy the folder again"), file)
        return True
    if _is_path(path):
        fix = "python -m defi.download preset=paper fetches what the presets need, weights=random needs none"
        raise UserError(f"{source}: no such folder; {fix}")
    return not _answers()


@functools.cache
def _answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # whatever its client raises, in offline mode too
        return False
    return True
