"""What is evaluated: the settings, and the chains with their start states, words and limits.

configs/step3_rollout.yaml says what each setting is for.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from defi.data.calvin import calvin_robot
from defi.errors import UserError
from defi.files import read_yaml
from defi.npy import load_npy
from defi.processes import print_once
from defi.sim import scenes, sequences
from defi.sim.scene import BLOCKS, SceneConfig
from defi.sim.tasks import INSTRUCTIONS, TASKS, Situation
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.rollout.simulator import ChainSpec

CLONE_INSTRUCTIONS = "calvin_models/conf/annotations/new_playtable_validation.yaml"


def choose(key: str, value: str | None, choices: Iterable[str | None]) -> None:
    if value not in choices:
        names = ", ".join("null" if choice is None else choice for choice in choices)
        raise UserError(f"{key}={value}: must be one of {names}")


@dataclass
class SimConfig:
    """Which world; configs/sim/builtin.yaml says what each setting is for."""

    calvin_root: str | None = None
    backend: str = "native"
    world: str = "fresh"
    renderer: str | None = None
    renderer_fallback: bool = False
    instructions: str | None = None
    static_size: int | None = None
    gripper_size: int | None = None

    def __post_init__(self) -> None:
        choose("sim.world", self.world, ("fresh", "persistent"))
        choose("sim.backend", self.backend, ("native", "calvin_env"))
        if self.backend == "native":
            return
        if self.calvin_root is None:
            raise UserError("sim.backend=calvin_env: name the clone of CALVIN too (sim.calvin_root=…)")
        if self.static_size or self.gripper_size:
            raise UserError("sim.static_size, sim.gripper_size: calvin_env draws the scene's own sizes only")


@dataclass
class VideoConfig:
    """Clips of the first `chains` chains, a picture every `every` control steps."""

    chains: int = 8
    every: int = 3

    def __post_init__(self) -> None:
        if self.chains < 0 or self.every < 1:
            given = f"videos.chains={self.chains} videos.every={self.every}"
            raise UserError(f"{given}: must be at least 0 and 1")


@dataclass
class RolloutConfig:
    """One evaluation. Everything that changes a result is recorded in results.json."""

    scene: str = "D"
    chains: int = 1000
    length: int = 5
    tasks: list[str] | None = None
    max_steps: list[int] = field(default_factory=lambda: [360, 720])
    seed: int = 0
    chunk: int | None = None
    batch: int = 1
    processes: int | None = None
    baseline: str | None = None
    sim: SimConfig = field(default_factory=SimConfig)
    videos: VideoConfig = field(default_factory=VideoConfig)

    def __post_init__(self) -> None:
        for key in ("chains", "length", "batch", "processes", "chunk"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key}={value}: must be 1 or more")
        if not self.max_steps or min(self.max_steps) < 1:
            raise UserError(f"max_steps={self.max_steps}: name one or more limits of control steps per task")
        self.max_steps = sorted(set(self.max_steps))
        choose("baseline", self.baseline, (None, "random", "scripted"))


def short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def check_robot(policy: PolicyConfig, source: str) -> None:
    """Raises UserError if a policy's robot is not the simulators'; other names or units are only printed."""
    robot, simulated = policy.robot, calvin_robot()
    differ = [f"no camera {camera}" for camera in robot.cameras if camera not in simulated.cameras]
    sizes = {"actions": (policy.action_dim, len(simulated.actions))}
    sizes |= {"state": (policy.state_dim, len(simulated.state))} if policy.state else {}
    differ += [f"{what} of {its} numbers, not {own}" for what, (own, its) in sizes.items() if own != its]
    if differ:
        fix = "give a checkpoint of CALVIN's robot"
        have = f"is of another robot than the simulators', which have {'; '.join(differ)}"
        raise UserError(f"{source}: {have}; {fix}")
    other = robot.differences(replace(simulated, cameras=robot.cameras))
    print_once(f"{source}: its robot is not quite the simulators': {'; '.join(other)}" if other else "")


def build_scene(sim: SimConfig, scene: str) -> SceneConfig:
    """The scene to roll out in."""
    return SceneConfig.from_calvin(sim.calvin_root, scene) if sim.calvin_root else scenes.builtin(scene)


def world_maker(sim: SimConfig, scene: SceneConfig, renderer: str) -> Callable[[], Any]:
    """Makes a world in a simulator process; `renderer` is cpu or egl."""
    if sim.backend == "calvin_env":
        from defi.sim.official import OfficialWorld, check_installed

        check_installed()
        return partial(OfficialWorld, sim.calvin_root, scene.name, renderer=renderer)
    from defi.sim.world import World

    sizes = {"static_size": sim.static_size, "gripper_size": sim.gripper_size}
    return partial(World, scene, renderer=renderer, **sizes)


def build_chains(config: RolloutConfig, scene: SceneConfig) -> tuple[dict[str, Any], list[ChainSpec]]:
    """All chains with the first phrasing of each task, and the protocol that they make up.

    The protocol is what two evaluations must share for their numbers to be compared; of its limits
    (`max_steps`), one is enough.
    """
    official = config.tasks is None
    if official and config.length != sequences.CHAIN_LENGTH:
        raise UserError(
            f"length={config.length}: the official sequences have {sequences.CHAIN_LENGTH} tasks; "
            "name tasks=[…] for chains of another length"
        )
    if official:
        drawn = sequences.sequences(config.chains)
    else:
        drawn = sequences.chains(config.tasks, config.chains, config.length, config.seed)
    source, phrasings = read_instructions(config.sim)
    words = [tuple(phrasings[task][0] for task in chain.tasks) for chain in drawn]
    chains = [
        ChainSpec(index, chain.tasks, words[index], *start_state(chain.initial_state, scene))
        for index, chain in enumerate(drawn)
    ]
    protocol = {
        "scene": config.scene,
        "assets": "calvin" if config.sim.calvin_root else "builtin",
        "backend": config.sim.backend,
        "sequences": "official" if official else "subset",
        "sequence_hash": short_hash([[chain.initial_state, chain.tasks] for chain in drawn]),
        "chains": len(chains),
        "length": len(chains[0].tasks),
        "max_steps": list(config.max_steps),
        "instruction_source": source,
        "instruction_hash": short_hash(words),
        "world": config.sim.world,
    }
    return protocol, chains


def start_state(situation: Situation, scene: SceneConfig) -> tuple[np.ndarray, np.ndarray]:
    """robot_obs [15] and scene_obs [24], the blocks in the scene's order."""
    robot_obs, scene_obs = sequences.start_state(situation)
    poses = dict(zip(BLOCKS, np.split(scene_obs[6:], len(BLOCKS))))
    return robot_obs, np.concatenate([scene_obs[:6], *(poses[block.name] for block in scene.blocks)])


def read_instructions(sim: SimConfig) -> tuple[str, Mapping[str, Sequence[str]]]:
    """Where the words come from, and the phrasings per task.

    They come from the file `sim.instructions`, YAML as in a clone (task: [phrasing, …]) or a data set's
    embeddings.npy (task: {ann: [phrasing, …]}), else from the clone, else they are this project's own.
    """
    if sim.instructions:
        file, source, fix = Path(sim.instructions), Path(sim.instructions).name, "check sim.instructions"
    elif sim.calvin_root:
        file, source = Path(sim.calvin_root, CLONE_INSTRUCTIONS), CLONE_INSTRUCTIONS
        fix = "check that the clone of CALVIN is complete"
    else:
        return "builtin", INSTRUCTIONS
    found = load_npy(file) if file.suffix == ".npy" else read_yaml(file, fix)
    phrasings = {}
    for task in TASKS:
        texts = found.get(task) if isinstance(found, dict) else None
        texts = texts.get("ann") if isinstance(texts, dict) else texts
        texts = texts.tolist() if isinstance(texts, np.ndarray) else texts
        if not isinstance(texts, (list, tuple)) or not texts:
            raise UserError(f"{file}: no instruction for {task} (a list of phrasings); {fix}")
        phrasings[task] = list(map(str, texts))
    return source, phrasings
