"""The stage-1 and stage-2 checkpoints a policy stands on: where they lie, and whether they fit."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from defi.engine.checkpoint import find_weights
from defi.engine.weights import COPY_AGAIN, fingerprint
from defi.errors import UserError
from defi.files import read_json
from defi.text import T5Text
from Step1_GFDM.model import GFDM
from Step2_GIDM.model import GIDM

if TYPE_CHECKING:
    from Step3_DeFI.config import PolicyConfig

SOURCES = "sources.json"
STAGES = ("gfdm", "gidm")


@dataclass(frozen=True)
class Sources:
    """Folders of weights that a policy was built on."""

    gfdm: Path
    gidm: Path

    @classmethod
    def at(cls, *, gfdm: Path, gidm: Path) -> "Sources":
        return cls(gfdm.resolve(), gidm.resolve())

    def load_gfdm(self, config: "PolicyConfig") -> GFDM:
        """The frozen video model, checked against what the policy expects."""
        gfdm = GFDM.from_pretrained(self.gfdm)
        check_gfdm(config, gfdm, self.gfdm)
        return gfdm

    def load_t5(self) -> T5Text:
        """Stage 2's text tower."""
        return GIDM.from_pretrained(self.gidm).text

    def write(self, folder: Path) -> None:
        """Record both beside a policy: paths relative to it, so that both can be moved together."""
        record = {
            name: {"path": os.path.relpath(path, folder.resolve()), "fingerprint": fingerprint(path)}
            for name, path in (("gfdm", self.gfdm), ("gidm", self.gidm))
        }
        (folder / SOURCES).write_text(json.dumps(record, indent=1))

    @classmethod
    def read(cls, folder: Path, *, gfdm: Path | str | None, gidm: Path | str | None) -> "Sources":
        """What `write` recorded, or the given places instead; the weights there must be the recorded ones."""
        file = folder / SOURCES
        record = read_json(file, COPY_AGAIN)
        try:
            recorded = {
                name: (str(record[name]["path"]), record[name]["fingerprint"]) for name in ("gfdm", "gidm")
            }
        except (KeyError, TypeError) as error:
            raise UserError(f"{file}: names no weights of stages 1 and 2 ({error!r}); {COPY_AGAIN}") from None
        found = {}
        for name, given in (("gfdm", gfdm), ("gidm", gidm)):
            path, expected = recorded[name]
            found[name] = _locate(folder / path, given, name)
            actual = fingerprint(found[name])
            if actual != expected:
                raise UserError(
                    f"{found[name]}: not the {name} checkpoint that {folder} was trained on "
                    f"(fingerprint {actual}, expected {expected}); give that one with {name}="
                )
        return cls.at(**found)


def _locate(recorded: Path, given: Path | str | None, stage: str) -> Path:
    if given is not None:
        return find_weights(given, stage)
    try:
        there = recorded.is_dir()
    except (OSError, ValueError):  # a path that cannot be
        there = False
    if not there:
        raise UserError(
            f"{os.path.abspath(recorded)}: the {stage} checkpoint of this policy is gone; "
            f"give its place with {stage}="
        )
    return recorded


def check_gfdm(config: "PolicyConfig", gfdm: GFDM, place: Path | str = "the stage-1 model") -> None:
    """Refuse a stage-1 model whose features have other sizes than the policy expects."""
    sizes = {
        "frames": (gfdm.config.frames, config.frames),
        "feature_tokens": (gfdm.feature_tokens, config.feature_tokens),
        "feature_channels": (gfdm.feature_channels, config.feature_channels),
        "sentence_width": (gfdm.clip.projection, config.sentence_width),
    }
    _check(sizes, place, prefix="policy.")


def check_gidm(config: "PolicyConfig", gidm: GIDM, place: Path | str = "the stage-2 model") -> None:
    """Refuse a stage-2 model whose tokenizer has other sizes than the policy expects."""
    found, wanted = vars(gidm.tokenizer.sizes), vars(config.latent_action)
    _check({name: (found[name], wanted[name]) for name in wanted}, place, prefix="policy.latent_action.")


def _check(sizes: dict[str, tuple[object, object]], place: Path | str, *, prefix: str) -> None:
    for name, (found, wanted) in sizes.items():
        if found != wanted:
            raise UserError(
                f"{place}: has {name} {found}, the policy expects {prefix}{name}={wanted}; "
                f"choose the preset it was trained with, or another checkpoint"
            )
