"""Videos of attempts: both cameras side by side, the instruction written below."""

from collections import Counter
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from defi.video import draw_text, write_mp4
from Step3_DeFI.rollout.simulator import Clip

HEIGHT = 200  # pixels of both pictures
STEPS_PER_SECOND = 30


def write_clip(folder: Path, clip: Clip, every: int) -> None:
    """Write a clip that plays at the robot's speed as `<chain>_<position>_<solved|failed>_<task>.mp4`."""
    outcome = "solved" if clip.solved else "failed"
    path = folder / f"{clip.chain:04d}_{clip.position + 1}_{outcome}_{clip.task}.mp4"
    beside = np.concatenate([_scaled(frames) for frames in clip.images.values()], axis=2)
    captioned = np.stack([draw_text(frame, clip.instruction) for frame in beside])
    write_mp4(path, captioned, STEPS_PER_SECOND / every)


def _scaled(frames: UInt8[np.ndarray, "F H W 3"]) -> UInt8[np.ndarray, "F 200 w 3"]:
    size = (round(frames.shape[2] * HEIGHT / frames.shape[1]), HEIGHT)
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BILINEAR)) for f in frames])


def choose_videos(folder: Path, outcome: str, most: int) -> dict[Path, str]:
    """Up to `most` videos of an outcome, with captions: one of each task, then second ones, and so on."""
    seen: Counter[str] = Counter()
    ranked = []
    for path in sorted(folder.glob(f"*_?_{outcome}_*.mp4")):
        chain, position, _, task = path.stem.split("_", 3)
        seen[task] += 1
        ranked.append((seen[task], task, path, f"{task}: chain {int(chain)}, task {position}"))
    return {path: caption for _, _, path, caption in sorted(ranked)[:most]}
