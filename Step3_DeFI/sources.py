"""The stage-1 and stage-2 checkpoints a policy stands on: where they lie, what sizes they have."""

import json
import os
from pathlib import Path

from defi.engine.checkpoint import find_weights
from defi.engine.weights import COPY_AGAIN, fingerprint
from defi.errors import UserError, reading
from defi.files import read_json
from Step1_GFDM.model import GFDM
from Step2_GIDM.model import GIDM
from Step3_DeFI.config import StageSizes

SOURCES = "sources.json"
Sources = dict[str, Path]  # "gfdm", "gidm" → folder of its weights


def stage_sizes(gfdm: GFDM, gidm: GIDM) -> StageSizes:
    """Raises UserError if the stage-2 model has no language."""
    if gidm.config.variant != "language":
        raise UserError(
            f"gidm.variant={gidm.config.variant}: a policy needs a stage-2 checkpoint of variant language"
        )
    return StageSizes(
        frames=gfdm.config.frames,
        feature_tokens=gfdm.feature_tokens,
        feature_channels=gfdm.feature_channels,
        sentence_width=gfdm.clip.projection,
        latent_action=gidm.tokenizer.sizes,
    )


def load_sources(sources: Sources) -> dict[str, GFDM | GIDM]:
    """Both models, by stage."""
    gidm = GIDM.from_pretrained(sources["gidm"])
    return {"gfdm": GFDM.from_pretrained(sources["gfdm"]), "gidm": gidm}


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
