"""Bridge and fractal as they are published, but small; and SIMPLER without physics, which keeps actions."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rlds_writer import write_set
from defi.benchmarks.benchmark import Environment, Observation, Outcome, Simulation, Step
from defi.benchmarks.simpler.benchmark import Google, Trial, WidowX
from defi.data.rlds.write import features_dict, image, tensor, text
from defi.picture import encode_picture

# ------------------------------------------------------------ the data, with all of their features


def _pictures(rng: np.random.Generator, steps: int, height: int, width: int) -> list[bytes]:
    """A square that moves over a plain ground."""
    ground, side = rng.integers(60, 200, 3), height // 5
    found = []
    for step in range(steps):
        picture = np.broadcast_to(ground, (height, width, 3)).astype(np.uint8)
        left = (step * 9) % (width - side)
        picture[side : 2 * side, left : left + side] = 255 - ground
        found.append(encode_picture(picture, "JPEG"))
    return found


def _flags(steps: int) -> dict[str, Any]:
    last = [int(step == steps - 1) for step in range(steps)]
    return {
        "steps/is_first": [int(step == 0) for step in range(steps)],
        "steps/is_last": last,
        "steps/is_terminal": last,
        "steps/reward": np.array(last, np.float32),
    }


def bridge_motions(rng: np.random.Generator, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Commanded actions [N, 7] and state [N, 7]: the first is zero, the gripper takes time, yaw passes π."""
    actions = rng.normal(0, 0.02, (steps, 7))
    actions[:, 6] = 1.0
    close = steps // 3
    actions[close : close + 3, 6] = 0.8, 0.5, 0.2  # closes
    actions[close + 3 :, 6] = 0.0
    actions[steps - 4 :, 6] = 0.04, 0.4, 0.6, 0.7  # opens, and does not get there
    actions[0] = 0, 0, 0, 0, 0, 0, 1
    state = np.cumsum(rng.normal(0, 0.02, (steps, 7)), axis=0)
    state[:, 5] = (3.05 + 0.03 * np.arange(steps) + np.pi) % (2 * np.pi) - np.pi
    state[:, 6] = actions[:, 6]
    return actions.astype(np.float32), state.astype(np.float32)


def fractal_motions(rng: np.random.Generator, steps: int, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """Actions [N, 7], the gripper's change last; state [N, 8]. kind: 0 closes, 1 opens and closes."""
    actions = rng.normal(0, 0.05, (steps, 7))
    actions[:, 6] = 0
    first, second = steps // 3, steps // 3 + 3
    actions[first, 6], actions[second, 6] = ((1, 0.9), (-1, 1), (0.05, -0.09))[kind]
    quaternion = rng.normal(size=(steps, 4))
    quaternion /= np.linalg.norm(quaternion, axis=1, keepdims=True)
    state = np.concatenate([rng.uniform(0, 1, (steps, 3)), quaternion, rng.uniform(0, 1, (steps, 1))], axis=1)
    return actions.astype(np.float32), state.astype(np.float32)


def write_bridge(root: Path) -> Path:
    """`bridge_orig`: four cameras, of which an episode may lack three; one episode of five says nothing."""
    names = [f"image_{i}" for i in range(4)]
    seed = iter(range(100))

    def episode(steps: int, said: str) -> dict[str, Any]:
        rng = np.random.default_rng(number := next(seed))
        actions, state = bridge_motions(rng, steps)
        black = [encode_picture(np.zeros((256, 256, 3), np.uint8), "JPEG")] * steps
        pictures = {f"steps/observation/{name}": black for name in names}
        pictures["steps/observation/image_0"] = _pictures(rng, steps, 256, 256)
        return {
            "episode_metadata/file_path": [f"/raw/{number}/out.npy".encode()],
            "episode_metadata/episode_id": [number],
            "episode_metadata/has_language": [int(bool(said))],
            **{f"episode_metadata/has_{name}": [int(name == "image_0")] for name in names},
            **pictures,
            "steps/observation/state": state.ravel(),
            "steps/action": actions.ravel(),
            "steps/language_instruction": [said.encode()] * steps,
            "steps/language_embedding": np.zeros(512 * steps, np.float32),
            "steps/discount": np.ones(steps, np.float32),
            **_flags(steps),
        }

    said = (
        "put the carrot on the plate",
        "stack the green block on the yellow block",
        "",
        "put spoon on towel",
    )
    train = [episode(16 + i, said[i % 4]) for i in range(5)]
    flags = {key: tensor("bool") for key in ("is_first", "is_last", "is_terminal")}
    flags |= {key: tensor("float32") for key in ("reward", "discount")}
    has = {f"has_{name}": tensor("bool") for name in (*names, "language")}
    return write_set(
        root,
        {
            "observation": features_dict(
                **{name: image(256, 256, "jpeg") for name in names}, state=tensor("float32", 7)
            ),
            "action": tensor("float32", 7),
            "language_instruction": text(),
            "language_embedding": tensor("float32", 512),
            **flags,
        },
        {"train": [train[:2], train[2:]], "val": [[episode(15, said[0]), episode(14, said[1])]]},
        name="bridge_orig",
        beside={"episode_metadata": features_dict(file_path=text(), episode_id=tensor("int32"), **has)},
    )


FRACTAL_OBSERVATION = {  # beside pictures, state and words
    "gripper_closedness_commanded": (1,),
    "height_to_bottom": (1,),
    "natural_language_embedding": (512,),
    "orientation_box": (2, 3),
    "orientation_start": (4,),
    "robot_orientation_positions_box": (3, 3),
    "rotation_delta_to_go": (3,),
    "src_rotation": (4,),
    "vector_to_go": (3,),
    "workspace_bounds": (3, 3),
}
FRACTAL_ASPECTS = ("already_success", "feasible", "has_aspects", "success", "undesirable")
FRACTAL_ATTRIBUTES = ("collection_mode", "data_type", "env", "location", "objects_family", "task_family")


def write_fractal(root: Path) -> Path:
    """`fractal20220817_data`."""

    def episode(number: int, steps: int) -> dict[str, Any]:
        rng = np.random.default_rng(number)
        actions, state = fractal_motions(rng, steps, number % 3)
        zeros = {
            key: np.zeros(int(np.prod(shape)) * steps, np.float32)
            for key, shape in FRACTAL_OBSERVATION.items()
        }
        said = ("pick coke can", "open top drawer", "move apple near orange")[number % 3].encode()
        return {
            **{f"aspects/{key}": [1] for key in FRACTAL_ASPECTS},
            **{f"attributes/{key}": [number] for key in FRACTAL_ATTRIBUTES},
            **{f"attributes/{key}_name": [b"x"] for key in FRACTAL_ATTRIBUTES},
            "steps/observation/image": _pictures(rng, steps, 256, 320),
            "steps/observation/natural_language_instruction": [said] * steps,
            "steps/observation/base_pose_tool_reached": state[:, :7].ravel(),
            "steps/observation/gripper_closed": state[:, 7].ravel(),
            **{f"steps/observation/{key}": values for key, values in zeros.items()},
            "steps/action/world_vector": actions[:, :3].ravel(),
            "steps/action/rotation_delta": actions[:, 3:6].ravel(),
            "steps/action/gripper_closedness_action": actions[:, 6].ravel(),
            "steps/action/base_displacement_vector": np.zeros(2 * steps, np.float32),
            "steps/action/base_displacement_vertical_rotation": np.zeros(steps, np.float32),
            "steps/action/terminate_episode": [0, 0, 1] * steps,
            **_flags(steps),
        }

    def vectors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return {key: tensor("float32", *shape) for key, shape in shapes.items()}

    own = {"base_pose_tool_reached": (7,), "gripper_closed": (1,)}
    moves = {"world_vector": (3,), "rotation_delta": (3,), "gripper_closedness_action": (1,)}
    moves |= {"base_displacement_vector": (2,), "base_displacement_vertical_rotation": (1,)}
    attributes = {key: tensor("int64") for key in FRACTAL_ATTRIBUTES}
    attributes |= {f"{key}_name": text() for key in FRACTAL_ATTRIBUTES}
    return write_set(
        root,
        {
            "observation": features_dict(
                image=image(256, 320, "jpeg"),
                natural_language_instruction=text(),
                **vectors(own | FRACTAL_OBSERVATION),
            ),
            "action": features_dict(**vectors(moves), terminate_episode=tensor("int32", 3)),
            **{key: tensor("bool") for key in ("is_first", "is_last", "is_terminal")},
            "reward": tensor("float32"),
        },
        {"train": [[episode(i, 14 + i) for i in range(3)], [episode(i, 14 + i) for i in range(3, 6)]]},
        name="fractal20220817_data",
        beside={
            "aspects": features_dict(**{key: tensor("bool") for key in FRACTAL_ASPECTS}),
            "attributes": features_dict(**attributes),
        },
    )


# ------------------------------------------------------------ the benchmark


class Kept(Environment):
    """No physics: shows noise that belongs to the step, and keeps the actions that arrive."""

    def __init__(self, camera: str, state: int, limit: int) -> None:
        self.camera, self.state, self.limit = camera, state, limit

    def reset(self, episode: Trial) -> None:
        self.trial, self.task, self.actions = episode, episode.start.task.name, []

    def observe(self) -> Observation:
        return seen(self.camera, self.state, len(self.actions))

    def step(self, action: np.ndarray) -> Step:
        self.actions.append(np.asarray(action, np.float64).tolist())
        return Step(over=len(self.actions) >= self.limit)

    def outcome(self) -> Outcome:
        start = self.trial.start
        whole = {
            "task": self.task,
            "setting": start.setting,
            "start": start.index,
            "repeat": self.trial.repeat,
        }
        return whole | {"success": False, "first_success": None, "stats": {}, "actions": self.actions}


def seen(camera: str, state: int, step: int) -> Observation:
    """What is shown after so many steps."""
    picture = np.random.default_rng(step).integers(0, 256, (48, 64, 3), np.uint8)
    return {"images": {camera: picture}, "instruction": "put it there", "state": np.zeros(state)}


@dataclass
class FakeWidowX(WidowX):
    def prepare(self, share: int = 0) -> Simulation:
        return Simulation(self.environment)

    def environment(self) -> Kept:
        return Kept(self.camera, 7, self.max_steps)


@dataclass
class FakeGoogle(Google):
    def prepare(self, share: int = 0) -> Simulation:
        return Simulation(self.environment)

    def environment(self) -> Kept:
        return Kept(self.camera, 8, self.max_steps)
