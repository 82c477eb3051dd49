"""Clips of latents for GFDM, from folders in VPP's layout (see `Step1_GFDM.prepare`).

<root>/annotation/{train,val}/<id>.json          texts, videos, latent_videos, video_length, episode_id
<root>/videos/{train,val}/<id>/<camera>.mp4
<root>/latent_videos/{train,val}/<id>/<camera>.safetensors (or .pt): scaled latents [frames, 4, h, w]
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from defi.config import typed
from defi.errors import UserError

SPLITS = ("train", "val")
LATENTS = "latents"  # the tensor's name in a .safetensors file


@dataclass
class ClipsConfig:
    """How one data set is cut into clips.

    weight: share of this set in a mixture. clips: `window`, F frames `stride` apart, a window every `every`
    frames, the end repeated where it runs out; or `spread`, one clip per video, F frames over all of it.
    cameras: shares of the cameras, in the annotation's order. longest: frames; longer videos are left out.
    """

    root: str
    weight: float = 1.0
    clips: str = "window"
    stride: int = 2
    every: int = 2
    cameras: list[float] = field(default_factory=lambda: [0.75, 0.25])
    longest: int | None = None

    def __post_init__(self) -> None:
        if self.clips not in ("window", "spread"):
            raise UserError(f"data.sets.clips={self.clips}: must be window or spread")
        if min(self.stride, self.every) < 1 or self.weight <= 0 or min(self.cameras) < 0:
            raise UserError(f"{self.root}: stride, every and weight must be positive, cameras not negative")


@dataclass(frozen=True)
class Episode:
    """One annotated video with its latents, a file per camera."""

    id: str
    texts: list[str]
    frames: int
    latents: list[Path]
    videos: list[Path]


def inside(root: Path, path: str) -> Path:
    """A path named in an annotation. Raises UserError if it leaves the data set's folder."""
    whole = (root / path).resolve()
    if not whole.is_relative_to(root.resolve()):
        raise UserError(f"{root}: an annotation names {path}, outside the folder; this data set is not safe")
    return whole


def read_episode(root: Path, file: Path) -> Episode:
    """One annotation. Raises UserError naming the file."""
    try:
        values = json.loads(file.read_text())
        return Episode(
            str(values["episode_id"]),
            [str(text) for text in values["texts"]],
            int(values["video_length"]),
            [inside(root, latent["latent_video_path"]) for latent in values["latent_videos"]],
            [inside(root, video["video_path"]) for video in values["videos"]],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not an annotation ({error!r}); run Step1_GFDM.prepare again") from error


def read_episodes(root: str | Path, split: str) -> list[Episode]:
    """All annotations of a split, by name.

    Raises:
        UserError: no such folder, or nothing in it.
    """
    root = Path(root)
    files = sorted((root / "annotation" / split).glob("*.json"))
    if not files:
        raise UserError(f"{root}/annotation/{split}: no annotations; make them with Step1_GFDM.prepare")
    return [read_episode(root, file) for file in files]


def read_latents(path: Path, indices: np.ndarray) -> Float[Tensor, "F 4 h w"]:
    """Some frames of an episode's latents, as float32; only what lies between them is read.

    Raises:
        UserError: the file is missing, damaged, or shorter than an index.
    """
    try:
        first, last = int(indices.min()), int(indices.max())
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                part = file.get_slice(LATENTS)[first : last + 1]
        else:
            part = torch.load(path, weights_only=True, map_location="cpu", mmap=True)[first : last + 1]
        return part[torch.from_numpy(indices - first)].float()
    except (OSError, SafetensorError, RuntimeError, IndexError, AttributeError) as error:
        raise UserError(f"{path}: cannot read latents ({error}); run Step1_GFDM.prepare again") from error


class Clips:
    """The clips of one data set: a list of (episode, first frame)."""

    def __init__(self, config: ClipsConfig, *, frames: int, split: str) -> None:
        self.config, self.frames = config, frames
        longest = config.longest or float("inf")
        self.episodes = [e for e in read_episodes(config.root, split) if e.frames <= longest]
        for episode in self.episodes:
            if len(config.cameras) > len(episode.latents):
                raise UserError(
                    f"{config.root}: episode {episode.id} has {len(episode.latents)} cameras, "
                    f"data.sets.….cameras={config.cameras} asks for {len(config.cameras)}"
                )
        self.starts = [
            (episode, start)
            for episode in self.episodes
            for start in (range(0, episode.frames, config.every) if config.clips == "window" else (0,))
        ]
        if not self.starts:
            raise UserError(f"{config.root}: no video has at most {config.longest} frames; raise longest")

    def __len__(self) -> int:
        return len(self.starts)

    def indices(self, episode: Episode, start: int) -> np.ndarray:
        """Frames of the clip [F]."""
        if self.config.clips == "spread":
            return np.linspace(0, episode.frames - 1, self.frames).round().astype(np.int64)
        return np.minimum(start + self.config.stride * np.arange(self.frames), episode.frames - 1)

    def clip(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Latents [F, 4, h, w] of a randomly chosen camera, and one of the texts."""
        episode, start = self.starts[index]
        shares = np.array(self.config.cameras) / sum(self.config.cameras)
        camera = int(rng.choice(len(shares), p=shares))
        return {
            "latents": read_latents(episode.latents[camera], self.indices(episode, start)),
            "text": str(rng.choice(episode.texts)),
        }


class LatentClips(Dataset):
    """A mixture of data sets by weight: each sample first draws its data set, then a clip of it."""

    def __init__(self, sets: Mapping[str, Clips]) -> None:
        self.sets = list(sets.values())
        weights = np.array([clips.config.weight for clips in self.sets])
        self.weights = weights / weights.sum()

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any], *, frames: int, split: str) -> "LatentClips":
        """From the `data` section of a configuration: `sets`, by name."""
        return cls(
            {
                name: Clips(typed(ClipsConfig, section, f"data.sets.{name}"), frames=frames, split=split)
                for name, section in cfg["sets"].items()
            }
        )

    def __len__(self) -> int:
        return sum(map(len, self.sets))

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """A clip, determined by index and rng: {"latents": [F, 4, h, w], "text"}."""
        if len(self.sets) == 1:
            return self.sets[0].clip(index, rng)
        chosen = self.sets[rng.choice(len(self.sets), p=self.weights)]
        return chosen.clip(int(rng.integers(len(chosen))), rng)
