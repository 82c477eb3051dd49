"""Data sets in LeRobot's formats v2.1 and v3.0 that are made up. Needs pyarrow."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from made_data import MadeData

from defi.data.lerobot.write import LeRobotWriter, Video

LENGTHS, FPS = (7, 12, 9, 5), 10.0
TEXTS = {0: ("open",), 1: ("push",), 2: (*["open"] * 4, *["lift"] * 5), 3: ("push",)}
SIZE = (48, 64)
INFO, TASKS, EPISODES = "meta/info.json", "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet"
ROWS = "data/chunk-000/file-000.parquet"
VIDEO = "videos/observation.images.wrist/chunk-000/file-000.mp4"


def flat(number: int, positions: Any) -> np.ndarray:
    """Pictures of one colour each, which no other frame has nearly."""
    colours = [(50 + 40 * number, 14 + 19 * position, 200 - 16 * position) for position in positions]
    return np.tile(np.array(colours, np.uint8)[:, None, None], (1, *SIZE, 1))


class Robot(MadeData):
    """Two cameras, four actions, a state; the instruction changes within an episode."""

    fps, action_names, state_names = FPS, tuple("abcd"), ("s", "t", "u")

    def __init__(self) -> None:
        super().__init__(LENGTHS, flat, texts=TEXTS.__getitem__, cameras=("top", "wrist"))

    def read_motions(self, frames: range) -> np.ndarray:
        return np.arange(frames.start, frames.stop)[:, None] + np.arange(7, dtype=np.float32) / 8


def write(root: Path, pictures: str = "images") -> Path:
    """Files of rows, and of each camera's videos, hold different episodes."""
    root.mkdir()
    most = (0, 10**9, 0) if pictures == "av1" else (10**9, 0, 10**9)
    writer = LeRobotWriter(data := Robot(), root, pictures, most[0], 0, "made_up")
    for files, each in zip(writer.videos.values(), most[1:]):
        files.most = each
    for number in range(len(data)):
        writer.add(data.episode(number))
    writer.close()
    return root


def as_v21(new: Path, old: Path) -> Path:
    """The data set of `write`, with a file per episode."""
    info = json.loads((new / INFO).read_text())
    name = "chunk-{episode_chunk:03d}/episode_{episode_index:06d}"
    info |= {"codebase_version": "v2.1", "chunks_size": 3, "data_path": f"data/{name}.parquet"}
    info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    rows = pa.concat_tables([pq.read_table(file) for file in sorted((new / "data").rglob("*.parquet"))])
    lines, data, first = [], Robot(), 0
    for number, length in enumerate(LENGTHS):
        place = {"episode_chunk": number // 3, "episode_index": number}
        (file := old / info["data_path"].format(**place)).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows.slice(first, length), file)
        for camera, stack in data.read(data.episode(number), range(length), data.cameras).items():
            key = f"observation.images.{camera}"
            file = old / info["video_path"].format(**place, video_key=key)
            file.parent.mkdir(parents=True, exist_ok=True)
            video = Video(file, "h264", FPS, stack.shape[1:])
            video.write(stack)
            video.close()
        lines.append({"episode_index": number, "length": length, "tasks": []})
        first += length
    (old / "meta").mkdir()
    (old / INFO).write_text(json.dumps(info))
    (old / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tasks = pq.read_table(new / TASKS).select(["task_index", "task"]).to_pylist()
    (old / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    return old
