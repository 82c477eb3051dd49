"""Train the temporal VAE on demonstrations in CALVIN's format.

    python -m Step1_GFDM.train_vae data.root=<data> output=ckpts/vae

Runs under `accelerate launch` unchanged. Settings: configs/step1_vae.yaml.
"""

from pathlib import Path

import torch
from omegaconf import DictConfig
from torchvision.utils import save_image

from defi.config import entry
from defi.engine.checkpoint import continues
from defi.engine.config import TrainerConfig, run_settings
from defi.engine.loop import train
from defi.engine.output import check_output
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.evaluation.metrics import psnr
from Step1_GFDM.frames import FrameClips
from Step1_GFDM.pca_init import start_from_principal_components
from Step1_GFDM.vae import VAEConfig, VideoVAE

START_CLIPS = 100  # for the principal components
SHOWN = 8


@entry("step1_vae")
def main(cfg: DictConfig) -> None:
    check_output(cfg.output, resume=cfg.resume, overwrite=cfg.overwrite)
    trainer = TrainerConfig.from_config(cfg.trainer)
    preset = GFDMConfig.from_preset(cfg)
    clips = FrameClips(cfg.data, preset.image_size)
    held_out = FrameClips(cfg.data, preset.image_size, held_out=True).spread(cfg.held_out)
    torch.manual_seed(cfg.seed)
    model = VideoVAE.from_config(VAEConfig(preset.image_size, preset.vae, cfg.kl))
    if not continues(cfg.output, cfg.resume):
        start_from_principal_components(model.vae, clips.spread(START_CLIPS).flatten(0, 1))

    def preview(model: VideoVAE, step: int, folder: Path) -> dict[str, float]:
        back = model.reconstruct(held_out.to(model.deviation.device)).cpu()
        rows = torch.cat([held_out[:SHOWN, 0], back[:SHOWN, 0]]) / 2 + 0.5
        save_image(rows, folder / "reconstructed.png", nrow=len(rows) // 2, padding=0)
        return {"held_out_psnr": psnr(back.flatten(0, 1), held_out.flatten(0, 1)).mean().item()}

    train(
        model,
        clips,
        trainer,
        **run_settings(cfg),
        preview=preview,
    )


if __name__ == "__main__":
    main()
