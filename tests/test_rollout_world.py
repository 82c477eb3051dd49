"""The rollout in the real simulation: chains are reproducible, also filmed; scripted policies succeed."""

from argparse import Namespace
from dataclasses import fields, replace
from itertools import count

import numpy as np
import pytest
from omegaconf import OmegaConf

pytest.importorskip("pybullet", reason="the simulation needs pybullet")

from benchmarks import rollout
from defi.benchmarks.calvin.benchmark import Calvin, SimConfig, read_instructions, start_state
from defi.benchmarks.calvin.environment import ScriptedAgent, act_at_random
from defi.errors import UserError
from defi.sim.renderers import find_renderer
from defi.sim.scene import SceneConfig
from defi.sim.tasks import TASKS as TASK_NAMES
from Step3_DeFI.rollout.config import RolloutConfig, VideoConfig
from Step3_DeFI.rollout.evaluate import Evaluation, evaluate, run_episodes
from Step3_DeFI.rollout.report import choose_videos, write_report
from Step3_DeFI.rollout.simulator import attempt, run_episode

TASKS = [
    *("open_drawer", "close_drawer", "move_slider_left", "move_slider_right"),
    *("turn_on_led", "turn_off_led", "turn_on_lightbulb", "turn_off_lightbulb"),
]


def prepare(**settings: object) -> Evaluation:
    own = {field.name for field in fields(Calvin)}
    benchmark = Calvin(**{key: value for key, value in settings.items() if key in own})
    config = RolloutConfig(**{key: value for key, value in settings.items() if key not in own})
    config.check_agents(benchmark)
    return Evaluation.prepare(benchmark, config)


def small(**settings: object) -> Evaluation:
    sim = SimConfig(static_size=48, gripper_size=32)
    return prepare(**{"chains": 3, "tasks": TASKS, "sim": sim, **settings})


def end_of(world) -> np.ndarray:
    return np.concatenate([world.robot_obs(), world.scene_obs()])


def test_chains_do_not_depend_on_what_ran_before_or_on_filming():
    evaluation = small()
    ends = []
    environment = evaluation.simulation.make()
    environment.judge, environment.limit = lambda task, a, b: False, 25
    with environment.world as world:
        for order, film in (((0, 1), None), ((1,), 2), ((2, 0, 1), 1)):
            for index in order:
                setup = replace(evaluation.setup("random", 3 if film else 0), film_every=film)
                list(run_episode(environment, act_at_random, evaluation.episodes[index], setup))
            ends.append(end_of(world))
    np.testing.assert_array_equal(ends[0], ends[1])
    np.testing.assert_array_equal(ends[0], ends[2])


def test_scripted_policies_solve_chains_and_are_filmed(tmp_path):
    evaluation = small(
        max_steps=[150], processes=2, videos=VideoConfig(chains=1, every=10), baseline="random"
    )
    results = evaluate(evaluation, "scripted", output=tmp_path, show=False)
    assert results.scores["150"]["average"] > 2
    assert results.baseline["scores"]["150"]["average"] < 2
    first = results.episodes[0]
    clips = [path.stem.split("_", 3) for path in sorted((tmp_path / "videos").iterdir())]
    outcomes = ["failed" if taken is None else "solved" for taken in first.outcome["steps"]]
    assert [(outcome, task) for _, _, outcome, task in clips] == list(zip(outcomes, first.outcome["tasks"]))
    assert len(choose_videos(tmp_path / "videos", "solved", 12, "chain")) == outcomes.count("solved")
    text = write_report(tmp_path / "report.html", results, tmp_path / "videos").read_text()
    assert text.count("data:video/mp4;base64,") == len(clips)


def test_result_is_the_same_on_more_processes():
    runs = [run_episodes(small(max_steps=[60], processes=n), "scripted", show=False) for n in (1, 3)]
    one, three = ([(c.index, c.outcome, c.control_steps) for c in chains] for chains in runs)
    assert one == three


def test_films_have_every_nth_state_and_the_last():
    evaluation = small(max_steps=[150])
    environment, agent, seeds = evaluation.simulation.make(), ScriptedAgent(), ((0, 0, n) for n in count())
    with environment.world:
        environment.reset(evaluation.episodes[0])
        step, taken, frames = attempt(environment, lambda seed: agent(environment, seed), seeds, 8)
    assert step.solved and len(frames) == taken // 8 + (taken % 8 > 0)
    assert all(frame["static"].shape == (48, 48, 3) for frame in frames)


# ---------------------------------------------------------------- protocol


def test_protocol_tells_sequences_words_and_limits_apart():
    one = small().protocol
    assert one == small().protocol
    seeded, limited = small(seed=1).protocol, small(max_steps=[100]).protocol
    assert seeded["sequence_hash"] != one["sequence_hash"]
    assert limited == one | {"max_steps": [100]}
    official = prepare(chains=3).protocol
    assert (official["sequences"], official["length"]) == ("official", 5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tasks": ["open_drawr"]}, "open_drawr: no such task; did you mean open_drawer"),
        ({"scene": "E"}, "E"),
        ({"chains": 0}, "chains=0: must be 1 or more"),
        ({"max_steps": []}, "max_steps=.*: name one or more"),
        ({"tasks": None, "length": 3}, "length=3: the official sequences have 5"),
        ({"tasks": ["open_drawer"]}, "no chain of 5"),
        ({"baseline": "luck"}, "baseline=luck: must be one of null, random, scripted"),
        ({"sim": {"calvin_root": "nowhere"}}, "nowhere: "),
    ],
)
def test_wrong_settings_are_one_line(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        sim = SimConfig(**settings.pop("sim", {}))
        prepare(**{"chains": 3, "tasks": TASKS, "sim": sim, **settings})
    assert "\n" not in str(caught.value)


def test_blocks_start_where_they_belong_in_any_scene(reference):
    root = reference / "calvin_root"
    situation = build_situation()
    poses = {}
    for name in "ABCD":
        scene = SceneConfig.from_calvin(root, name)
        _, scene_obs = start_state(situation, scene)
        blocks = zip((block.name for block in scene.blocks), np.split(scene_obs[6:], 3))
        poses[name] = {block: tuple(pose) for block, pose in blocks}
    assert poses["A"] == poses["B"] == poses["C"] == poses["D"]


def build_situation() -> dict[str, int | str]:
    places = {"red_block": "table", "blue_block": "slider_left", "pink_block": "table"}
    return {"led": 0, "lightbulb": 0, "slider": "right", "drawer": "closed", **places, "grasped": 0}


def test_words_come_from_the_file_that_is_named(tmp_path):
    texts = {task: [f"please {task}", "second"] for task in TASK_NAMES}
    entries = {task: {"task": task, "ann": words, "emb": np.zeros((2, 3))} for task, words in texts.items()}
    np.save(tmp_path / "embeddings.npy", np.array(entries, dtype=object), allow_pickle=True)
    OmegaConf.save(OmegaConf.create(texts), tmp_path / "words.yaml")
    for name in ("embeddings.npy", "words.yaml"):
        benchmark = Calvin(chains=2, sim=SimConfig(instructions=str(tmp_path / name)))
        chains = benchmark.episodes(0)
        assert benchmark.protocol(chains, 0)["instruction_source"] == name
        assert chains[0].instructions == tuple(f"please {task}" for task in chains[0].tasks)
    del texts["open_drawer"]
    OmegaConf.save(OmegaConf.create(texts), tmp_path / "words.yaml")
    (tmp_path / "broken.yaml").write_text("{open_drawer: [")
    for name, message in (
        ("words.yaml", "no instruction for open_drawer"),
        ("broken.yaml", "cannot be read .*; check sim.instructions"),
        ("none.yaml", "missing; check sim.instructions"),
    ):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            read_instructions(SimConfig(instructions=str(tmp_path / name)))


def test_words_of_a_clone_are_used(reference):
    root = str(reference / "calvin_root")
    sim = SimConfig(calvin_root=root)
    source, phrasings = read_instructions(sim)
    benchmark = Calvin(chains=2, sim=sim)
    chains = benchmark.episodes(0)
    assert benchmark.protocol(chains, 0)["instruction_source"] == source and source.endswith(".yaml")
    assert chains[0].instructions == tuple(phrasings[task][0] for task in chains[0].tasks)


def test_the_benchmark_measures_both_loops_with_one_renderer(capsys):
    given = Namespace(calvin_root=None, scene="D", chains=2, limit=20, plain_steps=2)
    rollout.compare(given, find_renderer("cpu"))
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{find_renderer('cpu')}, scene D"
    assert [line.split()[0] for line in told[1:]] == ["plain", "rollout", "ratio", "share", "memory"]
    plain, fast, ratio = (float(line.split(";")[1].split()[0]) for line in told[1:4])
    assert ratio == pytest.approx(fast / plain, abs=0.1)
