"""Hugging Face's server, which may be out of reach."""

import functools
import os
from pathlib import Path

from huggingface_hub import constants, get_session

from defi.errors import UserError
from defi.files import check_sizes, read_json

PATIENCE = 3.0  # seconds; the library itself would try for most of a minute, file by file


def local_only(source: Path | str) -> bool:
    """Whether to load `source` from the disk alone: it is a folder, or the server does not answer.

    A folder's files may name other places, and code there; a model that was once downloaded is found without
    a server.

    Raises:
        UserError: it is a path, and nothing is there: a stranger's repository may have that name; or the
            folder's config.json describes a network that would not fit any memory.
    """
    path = Path(source)
    if os.path.isdir(path):  # unlike Path.is_dir for any name, too long ones as well
        if (file := path / "config.json").is_file():
            check_sizes(read_json(file, "copy the folder again"), file)
        return True
    beside = len(path.parts) > 1 and os.path.isdir(path.parent)
    if path.is_absolute() or path.parts[:1] in (("ckpts",), ("..",)) or beside:
        raise UserError(
            f"{source}: no such folder; python -m defi.download preset=paper fetches what the presets start "
            "from, weights=random does without"
        )
    return not _answers()


@functools.cache
def _answers() -> bool:
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # whatever its client raises
        return False
    return True
