"""Any data set as one in LeRobot's format v3.0, in RLDS, or in CALVIN's.

Actions and state are written as `Dataset.motions` has them, in float32 (CALVIN keeps float64). Each episode
with frames is written by itself: annotated spans of CALVIN that share frames become episodes that share none;
LeRobot's format keeps the name of the task (`lerobot.meta.TASK`). Back in CALVIN's format each episode is a
recording and a span, its frames numbered anew; scene state and absolute actions, which this project does not
read, are zeros there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from defi.config import entry
from defi.data import Dataset, Episode, open_dataset
from defi.data.calvin import FRAME, RELATIVE, Span, check_gripper, encode_frame, frame_name, index_files
from defi.data.rlds.write import RLDSWriter
from defi.engine.output import check_output, new_folder
from defi.errors import UserError, choose

if TYPE_CHECKING:
    from defi.data.lerobot.write import LeRobotWriter


def writer_class(to: str) -> "type[LeRobotWriter] | type[RLDSWriter]":
    """What writes lerobot or rlds; its `forms` are those that pictures can have.

    Raises:
        UserError: a package is missing.
    """
    if to == "rlds":
        return RLDSWriter
    try:
        from defi.data.lerobot.write import LeRobotWriter
    except ImportError:
        raise UserError("LeRobot's format needs the package pyarrow; pip install pyarrow") from None
    return LeRobotWriter


def writer_of(
    to: str, dataset: Dataset, folder: Path, pictures: str, *, name: str, data_mb: float = 100, **options
) -> "LeRobotWriter | RLDSWriter":
    """What writes the episodes of a data set to a folder, as lerobot or rlds: `add` each, then `close`.

    name: of the data set, which RLDS keeps. options: of `LeRobotWriter` alone.

    Raises:
        UserError: a package is missing, or what the writer refuses.
    """
    kind, most = writer_class(to), int(data_mb * 2**20)
    if kind is RLDSWriter:
        return RLDSWriter(dataset, folder, name, pictures, most)
    return kind(dataset, folder, pictures, most, **options)


def filled(dataset: Dataset) -> Iterator[Episode]:
    """All episodes that have frames, behind a progress bar: trimming leaves some none."""
    numbers = np.flatnonzero(dataset.lengths).tolist()
    if not numbers:
        raise UserError(f"{dataset.root}: no episode has a frame; give other data")
    yield from (dataset.episode(number) for number in track(numbers, "episodes", transient=True))


def write_episodes(dataset: Dataset, folder: Path, name: str, cfg: DictConfig) -> None:
    """All of a data set, as one split."""
    options = {"video_most": int(cfg.video_mb * 2**20), "robot_type": cfg.robot_type}
    own = options if cfg.to == "lerobot" else {}
    writer = writer_of(cfg.to, dataset, folder, cfg.pictures, name=name, data_mb=cfg.data_mb, **own)
    for episode in filled(dataset):
        writer.add(episode)
    writer.close()


def write_calvin(dataset: Dataset, folder: Path) -> None:
    """All episodes of a data set as one split. UserError: they are no robot's like CALVIN's, or damaged."""
    needed = {f"the camera {name}": name in dataset.cameras for name in ("static", "gripper")}
    needed |= {
        "7 actions": len(dataset.action_names) == 7,
        "15 numbers of state": len(dataset.state_names) == 15,
    }
    if missing := [name for name, there in needed.items() if not there]:
        fix = "name what holds them (data.cameras=[static:…,gripper:…], data.actions, data.state)"
        raise UserError(f"{dataset.root}: CALVIN's format wants {', '.join(missing)}; {fix}")
    recordings, spans, first = [], [], 0
    zeros = {key: np.zeros(shape) for key, (kind, shape) in FRAME.items() if kind is not np.uint8}
    limit, unit = RELATIVE
    for episode in filled(dataset):
        where = f"{dataset.root}: episode {episode.name}"
        rows = dataset.motions.rows(np.arange(episode.start, episode.start + episode.length))
        actions, state = dataset.motions.actions[rows], dataset.motions.state[rows]
        if (wrong := np.abs(actions) > limit).any():
            raise UserError(f"{where}: holds the action {actions[wrong][0]:g}; CALVIN's are {unit}")
        for positions, pictures in dataset.blocks(episode):
            for place, position in enumerate(positions):
                check_gripper(Path(f"{where}, frame {position}"), actions[position])
                frame = {f"rgb_{camera}": pictures[camera][place] for camera in ("static", "gripper")}
                own = {"rel_actions": actions[position], "robot_obs": state[position]}
                (folder / frame_name(first + position)).write_bytes(encode_frame({**zeros, **own, **frame}))
        recordings.append((first, first + episode.length - 1))
        for positions, text in episode.sentences():
            span = Span(first + positions.start, first + positions.stop - 1, text, episode.task or text)
            spans += [span] if text else []
        first += episode.length
    for name, content in index_files(recordings, spans, {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@entry("convert_data")
def main(cfg: DictConfig) -> None:
    choose("to", cfg.to, ("lerobot", "rlds", "calvin"))
    output = check_output(cfg.output, overwrite=cfg.overwrite)
    dataset = open_dataset(OmegaConf.to_container(cfg.data), cfg.part)
    with new_folder(output) as folder:
        if cfg.to == "calvin":
            write_calvin(dataset, folder)
        else:
            write_episodes(dataset, folder, output.name, cfg)
    written, left = int((dataset.lengths > 0).sum()), list(dataset.left_out)
    if written < len(dataset):
        left.append(f"{len(dataset) - written} episodes without a frame")
    print(f"{output}: {written} episodes, {int(dataset.lengths.sum())} frames of {dataset.scope}")
    print("actions and state as float32", *(f"left out: {each}" for each in left), sep="\n")


if __name__ == "__main__":
    main()
