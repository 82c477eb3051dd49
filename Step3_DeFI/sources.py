"""The stage-1 and stage-2 checkpoints a policy stands on: where they lie, what sizes they have."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from defi.engine.checkpoint import find_weights
from defi.engine.weights import COPY_AGAIN, fingerprint
from defi.errors import UserError, reading
from defi.files import read_json
from Step1_GFDM.model import GFDM
from Step2_GIDM.model import GIDM
from Step3_DeFI.config import StageSizes

SOURCES = "sources.json"
STAGES = ("gfdm", "gidm")


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


@dataclass(frozen=True)
class Sources:
    """Folders of weights that a policy was built on."""

    gfdm: Path
    gidm: Path

    @classmethod
    def at(cls, *, gfdm: Path, gidm: Path) -> "Sources":
        return cls(gfdm.resolve(), gidm.resolve())

    def load(self) -> dict[str, GFDM | GIDM]:
        """Both models, by stage."""
        gidm = GIDM.from_pretrained(self.gidm)
        return {"gfdm": GFDM.from_pretrained(self.gfdm), "gidm": gidm}

    def write(self, folder: Path) -> None:
        """Record both beside a policy: paths relative to it, so that both can be moved together."""
        record = {
            stage: {"path": os.path.relpath(path, folder.resolve()), "fingerprint": fingerprint(path)}
            for stage, path in vars(self).items()
        }
        (folder / SOURCES).write_text(json.dumps(record, indent=1))

    @classmethod
    def read(cls, folder: Path, **given: Path | str | None) -> "Sources":
        """What `write` recorded, or the places `given` by stage; the weights there must be the recorded ones.

        Raises:
            UserError: the record is damaged, or a checkpoint is missing or another one.
        """
        record, found = read_json(folder / SOURCES, COPY_AGAIN), {}
        for stage in STAGES:
            with reading(folder / SOURCES, COPY_AGAIN):
                place, expected = folder / str(record[stage]["path"]), record[stage]["fingerprint"]
                there = place.is_dir()
            if given.get(stage) is not None:
                place = find_weights(given[stage], stage)
            elif not there:
                raise UserError(
                    f"{os.path.abspath(place)}: the {stage} checkpoint of this policy is gone; "
                    f"give its place with {stage}="
                )
            if (actual := fingerprint(place)) != expected:
                raise UserError(
                    f"{place}: not the {stage} checkpoint that {folder} was trained on "
                    f"(fingerprint {actual}, expected {expected}); give that one with {stage}="
                )
            found[stage] = place
        return cls.at(**found)
