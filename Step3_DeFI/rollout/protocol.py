"""Which chains are run, from which states, with which limits: what makes two numbers comparable."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from Step3_DeFI.rollout.simulator import ChainSpec

CLONE_INSTRUCTIONS = "calvin_models/conf/annotations/new_playtable_validation.yaml"


@dataclass(frozen=True)
class Protocol:
    """What two evaluations must share for their numbers to be compared; of the limits, one is enough.

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


def short_hash(value: Any) -> str:
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

    sizes = {"static_size": sim.static_size, "gripper_size": sim.gripper_size}
    return partial(World, scene, renderer=renderer, **sizes)


def build_chains(config: RolloutConfig, scene: SceneConfig) -> tuple[Protocol, list[ChainSpec]]:
    """All chains with the first phrasing of each task, and the protocol that they make up."""
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
    protocol = Protocol(
        scene=config.scene,
        assets="builtin" if config.sim.calvin_root is None else "calvin",
        backend=config.sim.backend,
        sequences="official" if official else "subset",
        sequence_hash=short_hash([[chain.initial_state, chain.tasks] for chain in drawn]),
        chains=len(chains),
        length=len(chains[0].tasks),
        max_steps=tuple(config.max_steps),
        instruction_source=source,
        instruction_hash=short_hash(words),
        world=config.sim.world,
    )
    return protocol, chains


def start_state(situation: Situation, scene: SceneConfig) -> tuple[np.ndarray, np.ndarray]:
    """robot_obs [15] and scene_obs [24] of a situation, the blocks in the scene's order."""
    robot_obs, scene_obs = sequences.start_state(situation)
    poses = dict(zip(BLOCKS, np.split(scene_obs[6:], len(BLOCKS))))
    return robot_obs, np.concatenate([scene_obs[:6], *(poses[block.name] for block in scene.blocks)])


def read_instructions(sim: SimConfig) -> tuple[str, Mapping[str, Sequence[str]]]:
    """Where the words come from, and the phrasings per task.

    They come from the file `sim.instructions` (YAML as in a clone, or a data set's embeddings.npy), else from
    the annotations of the clone, else they are this project's own.

    Raises:
        UserError: no such file, or one that lacks a task.
    """
    if sim.instructions is not None:
        return Path(sim.instructions).name, read_phrasings(Path(sim.instructions), "check sim.instructions")
    if sim.calvin_root is not None:
        fix = "check that the clone of CALVIN is complete"
        return CLONE_INSTRUCTIONS, read_phrasings(Path(sim.calvin_root, CLONE_INSTRUCTIONS), fix)
    return "builtin", INSTRUCTIONS


def read_phrasings(file: Path, fix: str) -> dict[str, list[str]]:
    """Task -> phrasings, from YAML (task: [phrasing, …]) or embeddings.npy (task: {ann: [phrasing, …]})."""
    found = load_npy(file) if file.suffix == ".npy" else read_yaml(file, fix)
    phrasings = {}
    for task in TASKS:
        texts = found.get(task) if isinstance(found, dict) else None
        texts = texts.get("ann") if isinstance(texts, dict) else texts
        texts = texts.tolist() if isinstance(texts, np.ndarray) else texts
        if not isinstance(texts, (list, tuple)) or not texts:
            raise UserError(f"{file}: no instruction for {task} (a list of phrasings); {fix}")
        phrasings[task] = [str(text) for text in texts]
    return phrasings
