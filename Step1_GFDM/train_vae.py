"""Train the temporal VAE on the pictures of any data set.

    python -m Step1_GFDM.train_vae data.root=<data> output=ckpts/vae

Runs under `accelerate launch` unchanged. Settings: configs/step1_vae.yaml.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.utils import save_image

from defi.config import entry
from defi.data import Part, read_settings
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
class ClipSettings:
    """What the section `data` says beside its format. frames: F of a clip. stride: frames between them.

    shares: of the clips, for each camera in order; None: equal ones.
    """

    frames: int = 2
    stride: int = 3
    shares: list[float] | None = None

    def __post_init__(self) -> None:
        if min(self.frames, self.stride) < 1 or not all(0 < share < math.inf for share in self.shares or ()):
            given = f"data.frames={self.frames}, data.stride={self.stride}, data.shares={self.shares}"
            raise UserError(f"{given}: numbers must be at least 1, a camera's share above 0")


class FrameClips(Dataset):
    """One clip per frame of all recordings; its camera is drawn, its end clamped to the recording's."""

    def __init__(self, section: Mapping[str, Any], image_size: int, part: Part = "training") -> None:
        """section: `data` of a configuration."""
        settings, self.config = read_settings(section, ClipSettings)
        self.data, self.image_size = settings.wordless().open(part), image_size
        self.fingerprint, self._ends = self.data.fingerprint, np.cumsum(self.data.lengths)
        shares, cameras = self.config.shares or [1.0] * len(self.data.cameras), self.data.cameras
        if len(shares) != len(cameras):
            raise UserError(f"data.shares={shares}: must be one of each camera ({', '.join(cameras)})")
        self._shares = np.array(shares) / sum(shares)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def clip(self, index: int, camera: str) -> Float[Tensor, "F 3 H W"]:
        """Frames in [-1, 1] of one camera, from the `index`-th frame on."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        episode = self.data.episode(number)
        first, last = index - int(self._ends[number]) + episode.length, episode.length - 1
        wanted = [min(first + i * self.config.stride, last) for i in range(self.config.frames)]
        return prepare_frames(self.data.read(episode, wanted, [camera])[camera], self.image_size)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """{"frames": [F, 3, H, W]}, determined by index and rng."""
        camera = str(rng.choice(self.data.cameras, p=self._shares))
        return {"frames": self.clip(index, camera)}

    def spread(self, count: int) -> Float[Tensor, "N F 3 H W"]:
        """`count` clips spread evenly over the data, cameras in turn; what cannot be read is left out."""
        indices = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        wanted = zip(indices.tolist(), itertools.cycle(self.data.cameras))
        return torch.stack([clip for _, clip in readable(lambda each: self.clip(*each), wanted)])


@entry("step1_vae")
def main(cfg: DictConfig) -> None:
    check_output(cfg.output, resume=cfg.resume, overwrite=cfg.overwrite)
    trainer = TrainerConfig.from_config(cfg.trainer)
    preset = GFDMConfig.from_preset(cfg)
    clips = FrameClips(cfg.data, preset.image_size)
    held_out = FrameClips(cfg.data, preset.image_size, "held_out").spread(cfg.held_out)
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
