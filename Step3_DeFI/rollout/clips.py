"""Clips of attempts: both cameras side by side, the instruction written below."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from defi.video import draw_text, write_mp4
from Step3_DeFI.rollout.messages import Clip

HEIGHT = 200  # pixels of both pictures
STEPS_PER_SECOND = 30


def compose(clip: Clip) -> UInt8[np.ndarray, "F H W 3"]:
    """Frames of a clip: cameras beside each other at the same height, a caption below."""
    views = [_scaled(frames, HEIGHT) for frames in clip.images.values()]
    beside = np.concatenate(views, axis=2)
    return np.stack([draw_text(frame, clip.instruction) for frame in beside])


def _scaled(frames: UInt8[np.ndarray, "F H W 3"], height: int) -> UInt8[np.ndarray, "F h w 3"]:
    if frames.shape[1] == height:
        return frames
    size = (round(frames.shape[2] * height / frames.shape[1]), height)
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BILINEAR)) for f in frames])


def write_clip(folder: Path, clip: Clip, every: int) -> Path:
    """Write a clip that plays at the robot's speed; its name tells chain, position, outcome and task."""
    outcome = "solved" if clip.solved else "failed"
    path = folder / f"{clip.chain:04d}_{clip.position + 1}_{outcome}_{clip.task}.mp4"
    write_mp4(path, compose(clip), STEPS_PER_SECOND / every)
    return path


@dataclass(frozen=True)
class ClipFile:
    """A written clip, described by its name."""

    path: Path
    chain: int
    position: int
    solved: bool
    task: str


def find_clips(folder: Path) -> list[ClipFile]:
    """All clips of a folder, by chain and position."""
    clips = []
    for path in sorted(folder.glob("*.mp4")):
        chain, position, outcome, task = path.stem.split("_", 3)
        clips.append(ClipFile(path, int(chain), int(position), outcome == "solved", task))
    return clips


def choose_clips(clips: Sequence[ClipFile], *, solved: bool, most: int) -> list[ClipFile]:
    """Up to `most` clips with the given outcome: one of each task, then second ones, and so on."""
    rounds: dict[str, int] = {}
    ranked = []
    for clip in clips:
        if clip.solved == solved:
            rounds[clip.task] = rounds.get(clip.task, 0) + 1
            ranked.append((rounds[clip.task], clip.task, clip))
    return [clip for _, _, clip in sorted(ranked, key=lambda entry: entry[:2])[:most]]
