"""Train GIDM: `python -m Step2_GIDM.train data.root=<data> output=ckpts/gidm` (configs/step2_train.yaml)."""

from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig

from defi.config import entry
from defi.engine.checkpoint import find_weights
from defi.engine.config import TrainerConfig, run_settings
from defi.engine.loop import train
from defi.engine.output import check_output
from defi.errors import UserError
from Step2_GIDM.code_evaluation import evaluate_codes
from Step2_GIDM.data.build import build_pairs
from Step2_GIDM.gallery import draw_gallery
from Step2_GIDM.model import GIDM, GIDMConfig


def build_model(config: GIDMConfig, first_stage: str | None) -> GIDM:
    """A new model; the controllable variant takes over queries and codebook of the run `first_stage`."""
    if config.variant == "language":
        if first_stage is not None:
            raise UserError(f"first_stage={first_stage}: only gidm.variant=controllable has a first stage")
        return GIDM(config)
    if first_stage is None:
        raise UserError("gidm.variant=controllable: needs first_stage=<run of a language model>")
    first = GIDM.from_pretrained(find_weights(Path(first_stage), stage="gidm"))
    if first.config.variant != "language":
        raise UserError(
            f"first_stage={first_stage}: is a controllable model; give the run of a language model"
        )
    model = GIDM(replace(config, frozen_codes=first.config.codes))
    model.adopt_first_stage(first)
    return model


@entry("step2_train")
def main(cfg: DictConfig) -> None:
    check_output(cfg.output, resume=cfg.resume, overwrite=cfg.overwrite)
    trainer = TrainerConfig.from_config(cfg.trainer)
    config = GIDMConfig.from_preset(cfg)
    pairs = build_pairs(cfg.data, config.dino.image_size)
    held_out = build_pairs(cfg.data, config.dino.image_size, "held_out")
    torch.manual_seed(cfg.seed)
    model = build_model(config, cfg.first_stage)

    def preview(model: GIDM, step: int, folder: Path) -> dict[str, float]:
        seen = evaluate_codes(model, held_out, cfg.shown)
        draw_gallery(seen, config.codes, folder / "gallery.png")
        return seen.numbers(config.codes)

    train(model, pairs, trainer, **run_settings(cfg), preview=preview)


if __name__ == "__main__":
    main()
