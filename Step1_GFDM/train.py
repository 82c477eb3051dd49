"""Train GFDM on clips of latents.

    python -m Step1_GFDM.train data.root=<latents> vae=<run> output=<run>

Runs under `accelerate launch` unchanged. Settings: configs/step1_train.yaml.
"""

from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from defi.config import entry
from defi.engine.checkpoint import find_weights
from defi.engine.config import TrainerConfig, run_settings
from defi.engine.data import sample_seeds
from defi.engine.loop import train
from defi.engine.output import check_output
from defi.processes import print_once
from defi.video import draw_text, to_uint8, write_mp4
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.data import SPLITS, LatentMixture, check_latents, open_sets
from Step1_GFDM.model import GFDM
from Step1_GFDM.vae import load_vae

SHOWN = 4


@entry("step1_train")
def main(cfg: DictConfig) -> None:
    check_output(cfg.output, resume=cfg.resume, overwrite=cfg.overwrite)
    trainer = TrainerConfig.from_config(cfg.trainer)
    config = GFDMConfig.from_preset(cfg)
    data, held_out = (LatentMixture(open_sets(cfg.data, config, split).values()) for split in SPLITS)
    pretrained = config.pretrained is not None
    encoder = Path(config.pretrained, "vae") if pretrained else find_weights(cfg.vae, "vae")
    vae = None if pretrained else load_vae(cfg.vae)
    torch.manual_seed(cfg.seed)
    model = GFDM.from_config(config, vae=vae)
    check_latents([*data.sets, *held_out.sets], encoder, model.config)
    print_once(model.clip.truncation_note(text for part in (data, held_out) for text in part.texts()))
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    picks = np.linspace(0, len(held_out) - 1, SHOWN).astype(int)
    shown = [held_out.sample(int(i), np.random.default_rng(0)) for i in picks]

    def preview(model: GFDM, step: int, folder: Path) -> dict[str, float]:
        """Real clips beside imagined ones, and the held-out loss."""
        latents = torch.stack([clip["latents"] for clip in shown]).to(model.unet.device)
        texts = [clip["text"] for clip in shown]
        imagined = model.imagine(latents[:, 0], texts, seed=cfg.seed)
        real = model.decode_latents(latents).cpu()
        for number, (clip, beside, text) in enumerate(zip(imagined, real, texts)):
            frames = np.concatenate([to_uint8(beside), to_uint8(clip)], axis=2)
            captioned = np.stack([draw_text(frame, f"real | imagined: {text}") for frame in frames])
            write_mp4(folder / f"clip_{number}.mp4", captioned, fps=5)
        seeds = sample_seeds("held out", cfg.seed, len(shown))
        return {"held_out_loss": model({"latents": latents, "text": texts, "seed": seeds})["loss"].item()}

    train(model, data, trainer, **run_settings(cfg), preview=preview)


if __name__ == "__main__":
    main()
