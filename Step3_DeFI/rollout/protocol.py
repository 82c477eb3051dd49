"""Which chains are run, from which states, with which limits: what makes two numbers comparable."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from defi.errors import UserError
from defi.files import read_yaml
from defi.npy import load_npy
from defi.sim import sequences
from defi.sim.scene import BLOCKS, SceneConfig
from defi.sim.tasks import INSTRUCTIONS, TASKS, Situation
from Step3_DeFI.rollout.config import RolloutConfig, SimConfig
from Step3_DeFI.rollout.messages import Trial


@dataclass(frozen=True)
class Protocol:
    """What two evaluations must share for their numbers to be compared.

    Args:
        assets: `builtin`, or `calvin` for the scenes of a clone.
        backend: `native`, or `calvin_env` for the official package.
        sequences: `official`, or `subset` where tasks were named.
        sequence_hash, instruction_hash: of start states and tasks, and of the words, of all chains in order.
    """

    scene: str
    assets: str
    backend: str
    sequences: str
    sequence_hash: str
    chains: int
    length: int
    max_steps: tuple[int, ...]
    instruction_source: str
    instruction_hash: str
    world: str

    def differences(self, other: "Protocol") -> dict[str, tuple[Any, Any]]:
        """Fields that keep results from being compared: all, but of the limits one shared one is enough."""
        mine, theirs = asdict(self), asdict(other)
        found = {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}
        if set(self.max_steps) & set(other.max_steps):
            found.pop("max_steps", None)
        return found


def fingerprint(value: Any) -> str:
    """Short hash of plain data."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def build_scene(sim: SimConfig, scene: str) -> SceneConfig:
    """The scene to roll out in."""
    if sim.calvin_root is not None:
        return SceneConfig.from_calvin(sim.calvin_root, scene)
    from defi.sim import scenes

    return scenes.builtin(scene)


def world_maker(sim: SimConfig, scene: SceneConfig, renderer: str) -> Callable[[], Any]:
    """Makes a world in a simulator process; `renderer` is cpu or egl."""
    if sim.backend == "calvin_env":
        from defi.sim.official import OfficialWorld, check_installed

        check_installed()
        return partial(OfficialWorld, sim.calvin_root, scene.name, renderer=renderer)
    from defi.sim.world import World

    return partial(
        World, scene, renderer=renderer, static_size=sim.static_size, gripper_size=sim.gripper_size
    )


def build_chains(config: RolloutConfig) -> list[sequences.Chain]:
    """The official sequences, or chains of the named tasks."""
    if config.tasks is None:
        if config.length != sequences.CHAIN_LENGTH:
            raise UserError(
                f"length={config.length}: the official sequences have {sequences.CHAIN_LENGTH} tasks; "
                "name tasks=[…] for chains of another length"
            )
        return sequences.sequences(config.chains)
    return sequences.chains(config.tasks, config.chains, config.length, config.seed)


def read_instructions(sim: SimConfig) -> tuple[str, Mapping[str, Sequence[str]]]:
    """Where the words come from, and the phrasings per task.

    They come from the file `sim.instructions` (YAML as in a clone, or a data set's embeddings.npy), else from
    the annotations of the clone, else they are this project's own.

    Raises:
        UserError: no such file, or one that lacks a task.
    """
    relative = Path("calvin_models/conf/annotations/new_playtable_validation.yaml")
    if sim.instructions is not None:
        source, file = Path(sim.instructions).name, Path(sim.instructions)
    elif sim.calvin_root is not None:
        source, file = str(relative), Path(sim.calvin_root) / relative
    else:
        return "builtin", INSTRUCTIONS
    if not file.is_file():
        hint = "check sim.instructions" if sim.instructions else "check that the clone of CALVIN is complete"
        raise UserError(f"{file}: missing; {hint}")
    return source, read_phrasings(file)


def read_phrasings(file: Path) -> dict[str, list[str]]:
    """Task -> phrasings, from YAML (task: [phrasing, …]) or embeddings.npy (task: {ann: [phrasing, …]})."""
    if file.suffix == ".npy":
        entries = load_npy(file)
        entries = entries if isinstance(entries, dict) else {}
        found = {task: entry.get("ann") for task, entry in entries.items() if isinstance(entry, dict)}
    else:
        found = read_yaml(file, "it is not a file of instructions (task: [phrasing, …]); give another")
    phrasings = {
        task: [str(text) for text in texts]
        for task, texts in found.items()
        if isinstance(texts, (list, tuple, np.ndarray))
    }
    for task in TASKS:
        if not phrasings.get(task):
            raise UserError(f"{file}: no instruction for {task}; needs one or more for each of the tasks")
    return phrasings


def start_state(situation: Situation, scene: SceneConfig) -> tuple[np.ndarray, np.ndarray]:
    """robot_obs [15] and scene_obs [24] of a situation, the blocks in the scene's order."""
    robot_obs, scene_obs = sequences.start_state(situation)
    poses = dict(zip(BLOCKS, np.split(scene_obs[6:], len(BLOCKS))))
    return robot_obs, np.concatenate([scene_obs[:6], *(poses[block.name] for block in scene.blocks)])


def build_trials(config: RolloutConfig, scene: SceneConfig) -> tuple[Protocol, list[Trial]]:
    """All chains with the first phrasing of each task, and the protocol that they make up."""
    chains = build_chains(config)
    source, phrasings = read_instructions(config.sim)
    trials = [
        Trial(
            index,
            chain.tasks,
            tuple(phrasings[task][0] for task in chain.tasks),
            *start_state(chain.initial_state, scene),
        )
        for index, chain in enumerate(chains)
    ]
    protocol = Protocol(
        scene=config.scene,
        assets="builtin" if config.sim.calvin_root is None else "calvin",
        backend=config.sim.backend,
        sequences="official" if config.tasks is None else "subset",
        sequence_hash=fingerprint([[chain.initial_state, chain.tasks] for chain in chains]),
        chains=len(chains),
        length=len(chains[0].tasks),
        max_steps=tuple(config.max_steps),
        instruction_source=source,
        instruction_hash=fingerprint([trial.instructions for trial in trials]),
        world=config.sim.world,
    )
    return protocol, trials
