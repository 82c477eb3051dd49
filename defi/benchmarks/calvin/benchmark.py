"""CALVIN's protocol on its own scenes or on the built-in table: settings, chains, scores, published figures.

configs/benchmark/table.yaml and configs/sim/builtin.yaml say what each setting is for.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from defi.benchmarks.benchmark import About, Agent, Benchmark, Outcome, Published, Simulation, name_of
from defi.benchmarks.calvin.environment import Chain, ChainEnvironment, ScriptedAgent, act_at_random
from defi.data.calvin import calvin_robot
from defi.errors import UserError, choose
from defi.files import read_yaml
from defi.npy import load_npy
from defi.robot.spec import Robot
from defi.sim import scenes, sequences
from defi.sim.renderers import default_kind, find_renderer
from defi.sim.scene import BLOCKS, SceneConfig
from defi.sim.tasks import INSTRUCTIONS, TASKS, Situation

CLONE_INSTRUCTIONS = "calvin_models/conf/annotations/new_playtable_validation.yaml"
SEQUENCES = {"official": "official sequences", "subset": "chains"}
WORLDS = {"fresh": "a newly loaded world per chain", "persistent": "one world per process"}
OTHER_PICTURES = (
    "This number does not compare with published ones: it was drawn on the CPU, CALVIN's data and the "
    "published evaluations with EGL. The pictures differ: in scene D the static view by 21 of 255 in the "
    "mean (45 % of its pixels by more than 20), the gripper view by 18."
)
NOT_CALVIN = "This is not CALVIN's protocol (its scene D, its sequences): published numbers do not compare."
NOTE = (
    "A chain ends at its first unsolved task; its length is the number solved before. The intervals are 95 %:"
    " bootstrap over chains for the average (no width where all chains are equal), Wilson's for rates."
)
PUBLISHED_NOTE = (
    "CALVIN, trained on scenes A, B, C, tested on D, 1000 sequences. By chance alone such a figure varies by "
    "about ±0.07 to ±0.09: smaller differences say nothing."
)
LEADERBOARD = "MINT-SJTU/Evo-SOTA.io, 14 July 2026, self-reported"
PUBLISHED = {  # average length on CALVIN, ABC→D, 1000 sequences
    "MMaDA-VLA": 4.78, "Xiaomi-Robotics-0": 4.75, "π-RL (with reinforcement learning)": 4.71,
    "AVA-VLA": 4.65, "FLOWER": 4.53, "DeFI": 4.51, "VLA-Adapter-Pro": 4.50, "HARP-VLA": 4.48,
    "DreamVLA": 4.44, "X-VLA": 4.43, "UnifiedVLA": 4.41, "VPP": 4.33, "Seer": 4.28, "UP-VLA": 4.08,
    "MoDE": 4.01, "Moto": 3.10, "GR-1": 3.06,
}  # fmt: skip
STEPS = {"X-VLA": "720", "VPP": "360"}  # per task, where stated
SOURCES = {"DeFI": "arXiv 2604.16391; the released settings have 720 steps"}


@dataclass
class SimConfig:
    """Which world."""

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
class Calvin(Benchmark):
    """Chains of tasks; a chain's value is the number of its leading tasks solved within a limit each.

    One run at the largest limit holds the scores at all smaller ones: a task solved too late ends the chain
    there.
    """

    agents = Benchmark.agents | {"scripted": "scripted policy"}

    scene: str = "D"
    chains: int = 1000
    length: int = 5
    tasks: list[str] | None = None
    max_steps: list[int] = field(default_factory=lambda: [360, 720])
    sim: SimConfig = field(default_factory=SimConfig)

    def __post_init__(self) -> None:
        for key in ("chains", "length"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: must be 1 or more")
        if not self.max_steps or min(self.max_steps) < 1:
            raise UserError(f"max_steps={self.max_steps}: name one or more limits of control steps per task")
        self.max_steps = sorted(set(self.max_steps))

    @property
    def robot(self) -> Robot:
        return calvin_robot()

    def load_scene(self) -> SceneConfig:
        """The scene to roll out in; raises UserError for an unknown one or a wrong clone."""
        root = self.sim.calvin_root
        return SceneConfig.from_calvin(root, self.scene) if root else scenes.builtin(self.scene)

    def draw(self, seed: int) -> list[sequences.Chain]:
        """The tasks of all chains, and the situations they start from."""
        if self.tasks is not None:
            return sequences.chains(self.tasks, self.chains, self.length, seed)
        if self.length != sequences.CHAIN_LENGTH:
            raise UserError(
                f"length={self.length}: the official sequences have {sequences.CHAIN_LENGTH} tasks; "
                "name tasks=[…] for chains of another length"
            )
        return sequences.sequences(self.chains)

    def episodes(self, seed: int) -> list[Chain]:
        """All chains, with the first phrasing of each task."""
        scene, (_, phrasings) = self.load_scene(), read_instructions(self.sim)
        return [
            Chain(
                index,
                drawn.tasks,
                tuple(phrasings[task][0] for task in drawn.tasks),
                *start_state(drawn.initial_state, scene),
                drawn.initial_state,
            )
            for index, drawn in enumerate(self.draw(seed))
        ]

    def environment(self) -> ChainEnvironment:
        return self.prepare().make()

    def prepare(self, share: int = 0) -> Simulation:
        scene, sim = self.load_scene(), self.sim
        kind = sim.renderer or default_kind(sim.calvin_root)
        renderer = find_renderer(kind, fallback=sim.renderer_fallback, share=share)
        if sim.backend == "calvin_env":
            from defi.sim.official import OfficialWorld, check_installed

            check_installed()
            make_world = partial(OfficialWorld, sim.calvin_root, scene.name, renderer=renderer.backend)
        else:
            from defi.sim.world import World

            sizes = {"static_size": sim.static_size, "gripper_size": sim.gripper_size}
            make_world = partial(World, scene, renderer=renderer.backend, **sizes)
        return Simulation(
            partial(ChainEnvironment, make_world, max(self.max_steps), fresh=sim.world == "fresh"),
            renderer=str(renderer),
            kind=renderer.kind,
            caveat=OTHER_PICTURES if sim.calvin_root and renderer.kind == "cpu" else None,
            variables=renderer.environment,
        )

    def agent(self, name: str) -> Agent:
        choose("agent", name, self.agents)
        if name == "random":
            return act_at_random
        if self.sim.calvin_root is not None:
            raise UserError("scripted: knows the built-in tables only; use sim=builtin, or another agent")
        return ScriptedAgent()

    @property
    def scores(self) -> list[str]:
        return [str(limit) for limit in self.max_steps]

    def value(self, outcome: Outcome, score: str) -> int:
        return next(
            (place for place, taken in enumerate(outcome["steps"]) if taken is None or taken > int(score)),
            len(outcome["steps"]),
        )

    def reached(self, outcome: Outcome, score: str) -> list[bool]:
        return [self.value(outcome, score) > place for place in range(len(outcome["tasks"]))]

    def attempts(self, outcome: Outcome, score: str) -> Iterable[tuple[str, bool]]:
        """A task is tried where all before it were solved."""
        solved = self.value(outcome, score)
        return [(task, place < solved) for place, task in enumerate(outcome["tasks"][: solved + 1])]

    def protocol(self, episodes: Sequence[Chain], seed: int) -> dict[str, Any]:
        return {
            "scene": self.scene,
            "assets": "calvin" if self.sim.calvin_root else "builtin",
            "backend": self.sim.backend,
            "sequences": "official" if self.tasks is None else "subset",
            "sequence_hash": short_hash([[chain.initial_state, chain.tasks] for chain in episodes]),
            "chains": len(episodes),
            "length": len(episodes[0].tasks),
            "max_steps": list(self.max_steps),
            "instruction_source": read_instructions(self.sim)[0],
            "instruction_hash": short_hash([chain.instructions for chain in episodes]),
            "world": self.sim.world,
        }

    def about(self, protocol: Mapping[str, Any], seed: int) -> About:
        count, length, limit = protocol["chains"], protocol["length"], max(protocol["max_steps"])
        official = (protocol["assets"], protocol["sequences"], protocol["scene"]) == (
            "calvin",
            "official",
            "D",
        )
        return About(
            name_of(type(self)),
            f"{count} {SEQUENCES[protocol['sequences']]} of {length} tasks, scene {protocol['scene']}, "
            f"{protocol['assets']} assets, {WORLDS[protocol['world']]}, seed {seed}",
            episode="chain",
            episodes="chains",
            scores="limits",
            score="steps",
            score_in_full="steps per task",
            figure="average length",
            headline=f"average length of {length}",
            percent=[],
            columns={f"{place}": f"{place} in a row" for place in range(1, length + 1)},
            first="solved the first task",
            several="max_steps",
            note=NOTE,
            tasks_title=f"Per task, within {limit} steps",
            tasks_note=f"Solved of tried within {limit} steps. "
            "A task is tried where all before it were solved.",
            incomparable="" if official else NOT_CALVIN,
            published=[
                Published(name, average, STEPS.get(name, "not stated"), SOURCES.get(name, LEADERBOARD))
                for name, average in PUBLISHED.items()
                if official
            ],
            published_note=PUBLISHED_NOTE,
            agents=dict(self.agents),
            fps=self.robot.fps,
        )

    def complete(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """results.json of before there were other benchmarks: with all that is in it now."""
        about = self.about(results["protocol"], results["run"]["settings"]["seed"])

        def limits(run: Mapping[str, Any]) -> dict[str, Any]:
            found = {str(limit): self.summarise(run["chains"], str(limit)) for limit in max_steps}
            return {**run, "limits": found}

        max_steps, baseline = results["protocol"]["max_steps"], results["baseline"]
        beside = limits(baseline) if baseline else None
        return limits(results) | {"benchmark": asdict(about), "baseline": beside}


def short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


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
