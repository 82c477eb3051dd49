"""Clips of latents for GFDM, from folders in VPP's layout (`defi.data.vpp`), as `prepare` writes it.

Some of VPP's own sets keep latents in latent_videos_svd, which the annotations do not name.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from defi.checkpoints.files import is_archive
from defi.config import typed
from defi.data.vpp import (
    AGAIN,
    MANIFEST,
    Annotation,
    NotJSON,
    read_annotations,
    read_manifest,
    stored_step,
)
from defi.engine.weights import fingerprint
from defi.errors import UserError, reading
from defi.processes import print_once
from Step1_GFDM.config import GFDMConfig

SPLITS = ("train", "val")
LATENTS = "latents"  # the tensor's name in a .safetensors file


def read_episodes(root: str | Path, split: str) -> list[Annotation]:
    """All annotations of a split, by name; a printed line counts those that are not JSON."""
    found = read_annotations(Path(root), split)
    faults = [each for each in found.values() if isinstance(each, UserError)]
    serious = [fault for fault in faults if not isinstance(fault, NotJSON)]
    if serious or len(faults) == len(found):
        raise (serious or faults)[0]
    if faults:
        print_once(f"{root}: {split}: left out {len(faults)} of {len(found)} annotations: {faults[0]}")
    return [each for each in found.values() if isinstance(each, Annotation)]


def read_latents(path: Path, indices: np.ndarray) -> Float[Tensor, "F 4 h w"]:
    """Some frames of an episode's latents, as float32; only what lies between them is read, but of a `.pt` in
    PyTorch's old format, which cannot be mapped into memory."""
    with reading(path, f"copy it again, or {AGAIN}"):
        first, last = int(indices.min()), int(indices.max())
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                part = file.get_slice(LATENTS)[first : last + 1]
        else:
            stored = torch.load(path, weights_only=True, map_location="cpu", mmap=is_archive(path))
            part = stored[first : last + 1]
        if part.dim() != 4:
            raise ValueError(f"holds {list(part.shape)}, not latents [frames, 4, h, w]")
        return part[torch.from_numpy(indices - first)].float()


@dataclass
class LatentSetConfig:
    """How clips are taken from one data set; numbers of frames count those of the recording, stored or not.

    weight: share of this set in a mixture. clips: `window`, F frames `stride` apart (None: the model's
    `frame_step`), a window every `every` frames (None: as `stride`), the last frame repeated past the end; or
    `spread`, one clip per video, F frames over all of it. cameras: shares of the cameras, in the annotation's
    order; an episode that has fewer takes the shares of those. longest: frames; longer videos are left out.
    """

    root: str
    weight: float = 1.0
    clips: str = "window"
    stride: int | None = None
    every: int | None = None
    cameras: list[float] = field(default_factory=lambda: [0.75, 0.25])
    longest: int | None = None

    def __post_init__(self) -> None:
        if self.clips not in ("window", "spread"):
            raise UserError(f"data.sets.clips={self.clips}: must be window or spread")
        given = [n for n in (self.weight, self.stride, self.every) if n is not None]
        if not all(0 < n < math.inf for n in given) or not all(0 <= n < math.inf for n in self.cameras):
            raise UserError(
                f"{self.root}: stride={self.stride}, every={self.every}, weight={self.weight}, "
                f"cameras={self.cameras}: must be positive numbers, a camera's share may be 0"
            )


class LatentSet:
    """The clips of one data set: windows of every episode, or one clip of each."""

    def __init__(self, config: LatentSetConfig, model: GFDMConfig, split: str) -> None:
        self.config, self.frames, self.root = config, model.frames, Path(config.root)
        windows, stored = config.clips == "window", stored_step(self.root)
        stride = config.stride or model.frame_step
        every = config.every or stride
        if windows and (stride % stored or every % stored):
            raise UserError(
                f"{self.root}: stores one frame in {stored} of its recordings, too few for stride={stride}, "
                f"every={every} (frames of the recording; null: gfdm.frame_step); prepare it again with "
                f"data.every={math.gcd(stride, every)}, or give multiples of {stored}"
            )
        self.stride, self.every = stride // stored, every // stored
        found, longest, shares = read_episodes(config.root, split), config.longest or math.inf, config.cameras
        for episode in found:
            where, cameras = f"{self.root}: episode {episode.id}", len(episode.latents)
            if not cameras or not episode.frames:
                fix = "encode it with Step1_GFDM.prepare data=vpp"
                raise UserError(f"{where} has no latents or no length; {fix}")
            if not any(shares[:cameras]):
                raise UserError(f"{where}: cameras={shares} gives none of its {cameras} cameras a share")
        if (unseen := max(len(each.latents) for each in found) - len(shares)) > 0:
            print_once(f"note: {self.root}: cameras={shares} leaves out the last {unseen} of its cameras")
        self.episodes = [e for e in found if (e.frames - 1) * stored < longest]
        if not self.episodes:
            raise UserError(f"{config.root}: no video has at most {longest} frames; raise longest")
        if longer := len(found) - len(self.episodes):
            print_once(f"{self.root}: left out {longer} of {len(found)} videos, longer than {longest} frames")
        self._ends = np.cumsum([-(-e.frames // self.every) if windows else 1 for e in self.episodes])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, index: int) -> tuple[Annotation, int]:
        """Episode and first stored frame of clip `index`."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[which - 1]) if which else 0
        return self.episodes[which], (index - before) * self.every

    def indices(self, episode: Annotation, start: int) -> np.ndarray:
        """Stored frames of the clip [F]."""
        if self.config.clips == "spread":  # truncated, as published
            return np.linspace(0, episode.frames - 1, self.frames).astype(np.int64)
        return np.minimum(start + self.stride * np.arange(self.frames), episode.frames - 1)

    def latents(self, episode: Annotation, start: int, camera: int) -> Float[Tensor, "F 4 h w"]:
        """Of one camera's clip; from `latent_videos_svd` where the file that is named cannot be read."""
        path, indices = episode.latents[camera], self.indices(episode, start)
        try:
            return read_latents(self.root / path, indices)
        except UserError:
            other = self.root / path.replace("latent_videos", "latent_videos_svd")
            if not other.is_file():
                raise
            return read_latents(other, indices)

    def clip(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Latents [F, 4, h, w] of a randomly chosen camera, and the first of the texts."""
        episode, start = self.locate(index)
        shares = np.array(self.config.cameras[: len(episode.latents)])
        camera = int(rng.choice(len(shares), p=shares / shares.sum()))
        return {"latents": self.latents(episode, start, camera), "text": episode.texts[0]}


def open_sets(cfg: Mapping[str, Any], model: GFDMConfig, split: str) -> dict[str, LatentSet]:
    """The data sets of the `data` section of a configuration, by name."""
    sets = {n: typed(LatentSetConfig, section, f"data.sets.{n}") for n, section in cfg["sets"].items()}
    return {name: LatentSet(config, model, split) for name, config in sets.items()}


def check_latents(sets: Collection[LatentSet], vae: Path, model: GFDMConfig) -> None:
    """Raises UserError if another autoencoder than the model's made the latents, or they have another size.

    A pretrained model has a file of its own: another fingerprint is only noted then.
    """
    used, size = fingerprint(vae), model.clip_shape[1:]
    for root in dict.fromkeys(latents.root for latents in sets):
        made = read_manifest(root).get("vae", used)
        wrong = f"{root / MANIFEST}: these latents were made by autoencoder {made}, {vae} is {used}"
        if made != used and model.pretrained is None:
            raise UserError(f"{wrong}; give the data and the autoencoder that belong together, or {AGAIN}")
        if made != used:
            print_once(f"note: {wrong}; these must be the same weights in another file")
    for latents in sets:
        found = latents.clip(0, np.random.default_rng(0))["latents"].shape[1:]
        if found != size:
            wrong = f"its latents are {list(found)}, the model's {list(size)}"
            raise UserError(f"{latents.root}: {wrong}; prepare them with the model's image_size=")


class LatentMixture(Dataset):
    """Data sets mixed by weight: sample i first draws its data set, then is its clip i, counted round.

    So a pass over the data is as long as the largest set, and small ones repeat.
    """

    def __init__(self, sets: Iterable[LatentSet]) -> None:
        self.sets = list(sets)
        weights = np.array([latents.config.weight for latents in self.sets])
        self.weights = weights / weights.sum()

    def __len__(self) -> int:
        return max(map(len, self.sets))

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """A clip, determined by index and rng: {"latents": [F, 4, h, w], "text"}."""
        chosen = self.sets[rng.choice(len(self.sets), p=self.weights)]
        return chosen.clip(index % len(chosen), rng)

    def texts(self) -> Iterator[str]:
        """The text of every episode."""
        return (episode.texts[0] for latents in self.sets for episode in latents.episodes)
