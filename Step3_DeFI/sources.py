"""Where the stage-1 and stage-2 checkpoints lie that a policy stands on."""

import json
import os
from pathlib import Path

from defi.engine.checkpoint import find_weights
from defi.engine.weights import COPY_AGAIN, fingerprint
from defi.errors import UserError, reading
from defi.files import read_json

SOURCES = "sources.json"
Sources = dict[str, Path]  # "gfdm", "gidm" → folder of its weights


def write_sources(folder: Path, sources: Sources) -> None:
    """Record both beside a policy: paths relative to it, so that both can be moved together."""
    record = {
        stage: {"path": os.path.relpath(path.resolve(), folder.resolve()), "fingerprint": fingerprint(path)}
        for stage, path in sources.items()
    }
    (folder / SOURCES).write_text(json.dumps(record, indent=1))


def read_sources(folder: Path, **given: Path | str | None) -> Sources:
    """What `write_sources` recorded, or the places `given`; the weights there must be the recorded ones.

    Raises:
        UserError: the record is damaged, or a checkpoint is missing or another one.
    """
    record, found = read_json(folder / SOURCES, COPY_AGAIN), {}
    for stage, place in given.items():
        with reading(folder / SOURCES, COPY_AGAIN):
            recorded, expected = folder / str(record[stage]["path"]), record[stage]["fingerprint"]
            gone = place is None and not recorded.is_dir()
        if gone:
            raise UserError(
                f"{os.path.abspath(recorded)}: the {stage} checkpoint of this policy is gone; "
                f"give its place with {stage}="
            )
        found[stage] = recorded if place is None else find_weights(place, stage)
        if (actual := fingerprint(found[stage])) != expected:
            raise UserError(
                f"{found[stage]}: not the {stage} checkpoint that {folder} was trained on "
                f"(fingerprint {actual}, expected {expected}); give that one with {stage}="
            )
    return found
