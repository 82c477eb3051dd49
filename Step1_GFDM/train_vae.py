"""Train the temporal VAE on demonstrations in CALVIN's format.

    python -m Step1_GFDM.train_vae data.root=<data> output=ckpts/vae

Runs under `accelerate launch` unchanged. Settings: configs/step1_vae.yaml.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.utils import save_image

from defi.data.calvin import CalvinFolder
from defi.config import entry, typed
from defi.engine.checkpoint import continues
from defi.engine.config import TrainerConfig, run_settings
from defi.engine.data import readable
from defi.engine.loop import train
from defi.engine.output import check_output
from defi.errors import UserError
from defi.video import prepare_frames
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.evaluation.metrics import psnr
from Step1_GFDM.pca_init import start_from_principal_components
from Step1_GFDM.vae import VAEConfig, VideoVAE

START_CLIPS = 100  # for the principal components
SHOWN = 8


@dataclass
class FramesConfig:
    """root: data set in CALVIN's format. split: of it, for training; held_out: for pictures and figures.

    frames: F of a clip. stride: frames between them. cameras: camera -> its share of the clips.
    """

    root: str
    split: str = "training"
    held_out: str = "validation"
    frames: int = 2
    stride: int = 3
    cameras: dict[str, float] = field(default_factory=lambda: {"static": 0.5, "gripper": 0.5})

    def __post_init__(self) -> None:
        if min(self.frames, self.stride) < 1 or min(self.cameras.values(), default=0) <= 0:
            given = f"data.frames={self.frames}, data.stride={self.stride}, data.cameras={self.cameras}"
            raise UserError(f"{given}: numbers must be at least 1, a camera's share above 0")


class FrameClips(Dataset):
    """One clip per frame of the recordings; its camera is drawn, its end clamped to the recording's."""

    def __init__(self, cfg: Mapping[str, Any], image_size: int, *, held_out: bool = False) -> None:
        """cfg: the `data` section of a configuration."""
        self.config, self.image_size = typed(FramesConfig, cfg, "data"), image_size
        self.data = CalvinFolder(
            Path(self.config.root, self.config.held_out if held_out else self.config.split)
        )
        self.starts = [(frame, end) for start, end in self.data.episodes for frame in range(start, end + 1)]
        self.fingerprint = self.data.fingerprint

    def __len__(self) -> int:
        return len(self.starts)

    def clip(self, index: int, camera: str) -> Float[Tensor, "F 3 H W"]:
        """Frames in [-1, 1] of one camera, from the `index`-th frame on."""
        first, last = self.starts[index]
        wanted = [min(first + i * self.config.stride, last) for i in range(self.config.frames)]
        return prepare_frames(self.data.stack(f"rgb_{camera}", wanted), self.image_size)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """{"frames": [F, 3, H, W]}, determined by index and rng."""
        shares = np.array(list(self.config.cameras.values()))
        camera = str(rng.choice(list(self.config.cameras), p=shares / shares.sum()))
        return {"frames": self.clip(index, camera)}

    def spread(self, count: int) -> Float[Tensor, "N F 3 H W"]:
        """`count` clips spread evenly over the data, cameras in turn; what cannot be read is left out."""
        indices = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        wanted = zip(indices.tolist(), itertools.cycle(self.config.cameras))
        return torch.stack([clip for _, clip in readable(lambda each: self.clip(*each), wanted)])


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

    train(model, clips, trainer, **run_settings(cfg), preview=preview)


if __name__ == "__main__":
    main()
