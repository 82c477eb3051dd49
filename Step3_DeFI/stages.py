"""What a policy stands on: stage 1's video model, and stage 2's text tower and tokenizer.

While it is trained and evaluated they lie in checkpoints of their own; `sources.json` beside the policy's
weights says where. An exported folder holds all that acting needs:

config.json model.safetensors     the policy, as in a checkpoint
gfdm/                             stage 1, its text tower included; a diffusers folder
t5/                               stage 2's text tower and tokenizer, and text.json, its settings
"""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defi.config import typed
from defi.engine.checkpoint import find_weights
from defi.engine.model import CONFIG, StageModel
from defi.engine.weights import COPY_AGAIN, fingerprint
from defi.errors import UserError, reading
from defi.files import check_sizes, read_json
from defi.text import T5Text, TextConfig
from Step1_GFDM.model import GFDM
from Step2_GIDM.latent_action import LatentActionTokenizer
from Step2_GIDM.model import GIDM
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.features import set_up

if TYPE_CHECKING:
    from Step3_DeFI.policy import DeFI

SOURCES, VIDEO, TEXT, TEXT_CONFIG = "sources.json", "gfdm", "t5", "text.json"
Sources = dict[str, Path]  # "gfdm", "gidm" → folder of the weights that a policy stands on


def language_of(gidm: GIDM) -> dict[str, Any]:
    """What a policy takes of stage 2, as arguments for `DeFI`."""
    return {"t5": gidm.text, "latent_action": gidm.tokenizer.sizes}


def load_stages(sources: Sources) -> tuple[dict[str, Any], LatentActionTokenizer]:
    """Both checkpoints as arguments for `DeFI`, and the tokenizer that its branch begins with."""
    video, gidm = GFDM.from_pretrained(sources["gfdm"]), GIDM.from_pretrained(sources["gidm"])
    return {"gfdm": video, **language_of(gidm), "sources": sources}, gidm.tokenizer


def write_sources(folder: Path, sources: Sources) -> None:
    """Record both beside a policy: paths relative to it, so that both can be moved together."""
    record = {
        stage: {"path": os.path.relpath(path.resolve(), folder.resolve()), "fingerprint": fingerprint(path)}
        for stage, path in sources.items()
    }
    (folder / SOURCES).write_text(json.dumps(record, indent=1))


def read_sources(folder: Path, **given: Path | str | None) -> Sources:
    """What `write_sources` recorded, or the places `given`; the weights there must be the recorded ones."""
    record, found = read_json(folder / SOURCES, COPY_AGAIN), {}
    for stage, place in given.items():
        with reading(folder / SOURCES, COPY_AGAIN):
            recorded, expected = folder / str(record[stage]["path"]), record[stage]["fingerprint"]
            if place is None and not recorded.is_dir():
                fault = f"the {stage} checkpoint of this policy is gone; give its place with {stage}="
                raise UserError(f"{os.path.abspath(recorded)}: {fault}")
        found[stage] = recorded if place is None else find_weights(place, stage)
        if (actual := fingerprint(found[stage])) != expected:
            raise UserError(
                f"{found[stage]}: not the {stage} checkpoint that {folder} was trained on "
                f"(fingerprint {actual}, expected {expected}); give that one with {stage}="
            )
    return found


def write_whole(policy: "DeFI", folder: Path) -> None:
    """An exported folder. UserError if the policy comes from one."""
    if policy.sources is None:
        raise UserError("checkpoint: is whole already; copy its folder")
    video = GFDM.from_pretrained(policy.sources["gfdm"])  # without what the policy's training changed of it
    if policy.config.finetune.mode == "none":
        set_up(video, policy.config)  # in the precision that it is used in
    video.config = replace(video.config, pretrained=None, clip=replace(video.config.clip, pretrained=None))
    StageModel.save_pretrained(policy, folder)
    video.save_pretrained(folder / VIDEO)
    policy.t5.save(folder / TEXT)
    text = replace(policy.t5.config, pretrained=None)
    (folder / TEXT / TEXT_CONFIG).write_text(json.dumps(asdict(text), indent=1))


def read_parts(folder: Path, config: PolicyConfig, **moved: Path | str | None) -> dict[str, Any]:
    """What the policy in a folder stands on, as arguments for `DeFI`; `moved` as for `read_sources`."""
    if not (folder / VIDEO).is_dir():
        return load_stages(read_sources(folder, **moved))[0]
    if config.stages is None:
        raise UserError(f"{folder / CONFIG}: lacks stages; {COPY_AGAIN}")
    values = read_json(file := folder / TEXT / TEXT_CONFIG, COPY_AGAIN)
    check_sizes(values, file)
    t5 = T5Text.load(folder / TEXT, typed(TextConfig, values, str(file)))
    video = GFDM.from_pretrained(folder / VIDEO)
    return {"gfdm": video, "t5": t5, "latent_action": config.stages.latent_action}
