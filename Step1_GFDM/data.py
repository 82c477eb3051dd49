"""Clips of latents for GFDM, from folders in VPP's layout (see `Step1_GFDM.prepare`).

<root>/annotation/{train,val}/<id>.json    texts, videos, latent_videos, video_length or state, episode_id
<root>/videos/{train,val}/<id>/<camera>.mp4
<root>/latent_videos/{train,val}/<id>/<camera>.safetensors (or .pt): scaled latents [frames, 4, h, w]
<root>/manifest.json                       of prepared folders: `data.every`, steps between stored frames

VPP's own CALVIN has annotation_abc_13/{train,val_d} instead, and some of its sets keep latents in
latent_videos_svd, which the annotations do not name.
"""

import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
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
from defi.engine.weights import fingerprint
from defi.errors import UserError, one_line, reading
from defi.files import read_json
from defi.instructions import read_instructions
from defi.processes import print_once
from Step1_GFDM.config import GFDMConfig

SPLITS = ("train", "val")
MANIFEST = "manifest.json"  # of a folder that Step1_GFDM.prepare made
LATENTS = "latents"  # the tensor's name in a .safetensors file
MOST_FRAMES = 10**8  # of a video: more than a month
AGAIN = "run Step1_GFDM.prepare again"


@dataclass(frozen=True, slots=True)
class Episode:
    """One annotated video, a file per camera, and its latents if there are any; paths within the data set."""

    id: str
    texts: list[str]
    frames: int | None  # None: the annotation does not say
    latents: list[str]
    videos: list[str]


class NotJSON(UserError):
    """An annotation that is none: left out, as the published code does."""


def inside(root: Path, path: str) -> str:
    """A path named in a data set's file. Raises UserError if it leaves the data set's folder.

    Links within the folder may lead where they like: they are its owner's.
    """
    normal = os.path.normpath(path)
    if os.path.isabs(normal) or normal.split(os.sep)[0] == os.pardir or "\0" in normal:
        raise UserError(f"{root}: its files name {path}, outside the folder; this data set is not safe")
    return normal


def as_list(value: Any) -> list[Any]:
    """A list of a JSON file, where a single item may stand as it is."""
    return value if isinstance(value, list) else [value]


def read_episode(root: Path, file: Path) -> Episode:
    """One annotation, with or without latents. Its length: one `state` per frame, else `video_length`."""
    fix = "copy it again, or remove it"
    with reading(file, fix):
        try:
            values = json.loads(file.read_bytes())
        except ValueError as error:
            raise NotJSON(f"{file}: not JSON ({one_line(error)}); {fix}") from None
        texts = read_instructions(as_list(values["texts"]), f"{file}: a text")
        if not texts:
            raise UserError(f"{file}: has no caption; stage 1 needs texts")
        frames = len(values["state"]) if "state" in values else values.get("video_length", 0)
        if not 0 <= frames <= MOST_FRAMES:
            raise UserError(f"{file}: video_length={frames}: no video is that long; give its frames")
        latents = [
            inside(root, each["latent_video_path"]) for each in as_list(values.get("latent_videos", []))
        ]
        videos = [inside(root, each["video_path"]) for each in as_list(values["videos"])]
        return Episode(str(values.get("episode_id", file.stem)), texts, int(frames) or None, latents, videos)


def annotation_files(root: Path, split: str) -> list[Path]:
    """Of a split, by name. Raises UserError if there are none."""
    of_calvin = root / "annotation_abc_13" / {"val": "val_d"}.get(split, split)
    folder = of_calvin if of_calvin.is_dir() else root / "annotation" / split
    files = sorted(folder.glob("[!.]*.json"))
    if not files:
        raise UserError(f"{folder}: no annotations; make them with Step1_GFDM.prepare")
    return files


def read_episodes(root: str | Path, split: str) -> list[Episode]:
    """All annotations of a split, by name; a printed line counts those that are not JSON."""

    def read(file: Path) -> Episode | NotJSON:
        try:
            return read_episode(Path(root), file)
        except NotJSON as error:
            return error

    files = annotation_files(Path(root), split)
    with ThreadPoolExecutor(8) as pool:  # a hundred thousand small files, perhaps over a network
        found = list(pool.map(read, files))
    faults = [each for each in found if isinstance(each, NotJSON)]
    if len(faults) == len(files):
        raise faults[0]
    if faults:
        print_once(f"{files[0].parent}: left out {len(faults)} of {len(files)} annotations: {faults[0]}")
    return [each for each in found if isinstance(each, Episode)]


def read_manifest(root: Path) -> dict[str, Any]:
    """Of a prepared folder; of VPP's own sets, which have none, what may be taken for granted."""
    file = root / MANIFEST
    return read_json(file, AGAIN) if file.is_file() else {"data": {"every": 1}}


def stored_step(root: Path) -> int:
    """Steps of the recording from one stored frame to the next."""
    source = read_manifest(root).get("data")
    step = source.get("every") if isinstance(source, dict) else None
    if not isinstance(step, int) or step < 1:
        raise UserError(f"{root / MANIFEST}: data.every={step}: must be the step between frames; {AGAIN}")
    return step


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
                fix = "encode it with Step1_GFDM.prepare, source vpp"
                raise UserError(f"{where} has no latents or no length; {fix}")
            if not any(shares[:cameras]):
                raise UserError(f"{where}: cameras={shares} gives none of its {cameras} cameras a share")
        self.episodes = [e for e in found if (e.frames - 1) * stored < longest]
        if not self.episodes:
            raise UserError(f"{config.root}: no video has at most {longest} frames; raise longest")
        if longer := len(found) - len(self.episodes):
            print_once(f"{self.root}: left out {longer} of {len(found)} videos, longer than {longest} frames")
        self._ends = np.cumsum([-(-e.frames // self.every) if windows else 1 for e in self.episodes])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, index: int) -> tuple[Episode, int]:
        """Episode and first stored frame of clip `index`."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[which - 1]) if which else 0
        return self.episodes[which], (index - before) * self.every

    def indices(self, episode: Episode, start: int) -> np.ndarray:
        """Stored frames of the clip [F]."""
        if self.config.clips == "spread":  # truncated, as published
            return np.linspace(0, episode.frames - 1, self.frames).astype(np.int64)
        return np.minimum(start + self.stride * np.arange(self.frames), episode.frames - 1)

    def latents(self, episode: Episode, start: int, camera: int) -> Float[Tensor, "F 4 h w"]:
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
