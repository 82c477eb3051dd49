"""Chains on many processes: the same result however they are run, nothing lost when something breaks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from fake_world import FakeWorld, Mishaps, broken_world, start_of
from rollout_fakes import FakePolicy, ask, fake_environment, fake_evaluation, policy_agent

from defi.benchmarks.calvin.benchmark import SimConfig
from defi.benchmarks.calvin.environment import Chain, ChainEnvironment, act_at_random
from defi.engine.data import seed_of
from defi.errors import UserError
from Step3_DeFI.batching import Question
from Step3_DeFI.rollout.evaluate import evaluate, run_episodes
from Step3_DeFI.rollout.fleet import MOST_DEATHS, Fleet, PatientBatcher
from Step3_DeFI.rollout.results import EpisodeLog
from Step3_DeFI.rollout.simulator import Look, attempt, run_episode


def outcome(chains) -> list[tuple]:
    """What must not depend on how the chains were run."""
    return [
        (
            chain.index,
            chain.outcome["tasks"],
            chain.outcome["steps"],
            chain.control_steps,
            chain.observations,
        )
        for chain in chains
    ]


def one_by_one(evaluation, batch: int) -> list[tuple]:
    """The result by definition: chain after chain, each in a new world, in its row of a batch."""
    policy = FakePolicy()
    chains = []
    setup = evaluation.setup("policy")
    for chain in evaluation.episodes:
        row = chain.index % batch
        agent = policy_agent(lambda seen, row=row: ask(policy, [seen] * batch)[row])
        chains += run_episode(fake_environment(), agent, chain, setup)
    return outcome(chains)


@pytest.mark.parametrize("batch, numbers", [(1, (2,)), (3, (1, 2, 5))])
def test_result_is_the_same_for_any_number_of_processes(batch, numbers):
    expected = one_by_one(fake_evaluation(), batch)
    assert len({tuple(steps) for _, _, steps, _, _ in expected}) > 6  # chains differ, so a mix-up would show
    for processes in numbers:
        evaluation = fake_evaluation(processes=processes, batch=batch)
        assert outcome(run_episodes(evaluation, "policy", FakePolicy(), show=False)) == expected


def test_seed_and_persistent_world_change_the_result():
    fresh = one_by_one(fake_evaluation(), 1)
    other = one_by_one(fake_evaluation(seed=1), 1)
    persistent = fake_evaluation(processes=1, sim=SimConfig(world="persistent"))
    remembered = outcome(run_episodes(persistent, "policy", FakePolicy(), show=False))
    assert other != fresh
    assert remembered[0] == fresh[0] and remembered != fresh


def test_processes_share_the_chains_and_all_are_counted(tmp_path):
    """Three ranks at the same time: threads that wait for each other as processes do."""
    evaluation = fake_evaluation(processes=1, chains=11)
    barrier = threading.Barrier(3)
    states = [
        SimpleNamespace(process_index=rank, num_processes=3, wait_for_everyone=barrier.wait)
        for rank in range(3)
    ]

    def run(state: SimpleNamespace) -> list[tuple]:
        where = {"output": tmp_path, "state": state, "show": False}
        return outcome(run_episodes(evaluation, "policy", FakePolicy(), **where))

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, states))
    assert found == [one_by_one(evaluation, 1)] * 3
    logs = [tmp_path / f"chains{part}.jsonl" for part in ("", ".1", ".2")]
    assert [log.read_text().count("\n") for log in logs] == [3, 4, 4]


# ---------------------------------------------------------------- one chain


class Counter:
    """A world that counts its steps, solved at the 13th of each task, and keeps the actions."""

    def __init__(self) -> None:
        self.steps, self.actions = 0, []

    def reset(self, robot_obs: np.ndarray, scene_obs: np.ndarray) -> None:
        self.__init__()

    def step(self, action: np.ndarray) -> None:
        self.steps += 1
        self.actions.append(action)

    def state(self) -> int:
        return self.steps

    def render(self) -> dict[str, np.ndarray]:
        return {"rgb_static": np.full((2, 2, 3), self.steps, np.uint8)}


class Chunks:
    """Chunks of ten actions; those of every other chunk open the gripper."""

    calls = 0

    def __call__(self, *_: object) -> np.ndarray:
        self.calls += 1
        return np.tile([0.1, 0, 0, 0, 0, 0, 0.3], (10, 1)) * [1, 1, 1, 1, 1, 1, (-1) ** self.calls]


def counting(limit: int, solved_at: int) -> ChainEnvironment:
    """At the start of a chain of one task."""
    environment = ChainEnvironment(Counter, limit, judge=lambda task, a, b: b - a == solved_at)
    environment.reset(Chain(0, ("task",), ("words",), np.zeros(15), np.zeros(24)))
    return environment


def test_attempt_stops_within_a_chunk_and_binarises_the_gripper():
    environment, act = counting(60, solved_at=13), Chunks()
    step, taken, _ = attempt(environment, act, iter(range(9)))
    assert step.solved and environment.outcome()["steps"] == [13]
    assert (taken, environment.world.steps, act.calls) == (13, 13, 2)
    assert [action[6] for action in environment.world.actions] == [-1.0] * 10 + [1.0] * 3
    assert environment.world.actions[0][0] == 0.1


def test_attempt_ends_at_the_limit_inside_a_chunk():
    environment, act = counting(25, solved_at=99), Chunks()
    step, _, frames = attempt(environment, act, iter(range(9)))
    assert (step.over, step.solved, frames) == (True, False, [])
    assert environment.outcome()["steps"] == [None]
    assert (environment.world.steps, act.calls) == (25, 3)


def test_smaller_limits_are_read_from_the_same_run():
    def lengths(limit: int, **settings: object) -> np.ndarray:
        evaluation = fake_evaluation(processes=1, **settings)
        chains = run_episodes(evaluation, "policy", FakePolicy(), show=False)
        return np.array([evaluation.benchmark.value(chain.outcome, str(limit)) for chain in chains])

    np.testing.assert_array_equal(lengths(30), lengths(30, max_steps=[30]))
    assert (lengths(60) >= lengths(30)).all() and lengths(60).sum() > lengths(30).sum()


def test_a_smaller_chunk_observes_more_often():
    observations = {}
    for chunk in (None, 5):
        chains = run_episodes(
            fake_evaluation(chunk=chunk, chains=3, processes=1), "policy", FakePolicy(), show=False
        )
        for chain in chains:
            steps = [60 if taken is None else taken for taken in chain.outcome["steps"]]
            assert chain.observations == sum(-(-taken // (chunk or 10)) for taken in steps)
        observations[chunk] = chains[0].observations
    assert observations[5] != observations[None]


def test_random_agent_is_seeded_by_chain_and_observation():
    seeds = ((7, 0, 0), (7, 0, 1), (7, 1, 0), (8, 0, 0))
    acted = [act_at_random(None, seed) for seed in seeds]
    np.testing.assert_array_equal(acted[0], act_at_random(None, seeds[0]))
    assert len({actions.tobytes() for actions in acted}) == len(seeds) and np.abs(acted).max() <= 1


def test_seeds_of_a_chain_are_of_run_chain_and_observation():
    seeds = []
    agent = policy_agent(lambda seen: seeds.append(seen.seed) or ask(FakePolicy(), [seen])[0])
    evaluation = fake_evaluation(chains=2, seed=7)
    setup = evaluation.setup("policy")
    (result,) = run_episode(fake_environment(), agent, evaluation.episodes[1], setup)
    assert seeds == [(7, 1, number) for number in range(result.observations)] and len(seeds) > 2


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("kind", ["kill", "hang"])
def test_dead_simulator_is_replaced_and_its_chain_run_again(tmp_path, kind):
    expected = one_by_one(fake_evaluation(chains=5), 2)
    mishaps = Mishaps(tmp_path / "struck", start_of(1), kind)
    evaluation = fake_evaluation(partial(FakeWorld, mishaps), chains=5, batch=2)
    batcher = PatientBatcher(FakePolicy(), 2)
    with Fleet(evaluation.setup("policy"), 2, batcher, actions=7, silence=3) as fleet:
        results = sorted(fleet.run(evaluation.episodes), key=lambda chain: chain.index)
    assert (tmp_path / "struck").exists() and fleet.replaced == 1
    assert outcome(results) == expected


def test_chain_that_kills_every_simulator_ends_the_run_and_keeps_the_others(tmp_path):
    mishaps = Mishaps(tmp_path / "struck", start_of(2), always=True)
    evaluation = fake_evaluation(partial(FakeWorld, mishaps), chains=4, processes=1)
    with pytest.raises(UserError, match=f"chain 2: .* died {MOST_DEATHS} times .the last words."):
        run_episodes(evaluation, "policy", FakePolicy(), output=tmp_path / "out", show=False)
    assert sorted(EpisodeLog(tmp_path / "out", "chains").read()) == [0, 1]


def test_fault_in_the_world_is_raised_with_its_traceback(tmp_path):
    mishaps = Mishaps(tmp_path / "struck", start_of(0), "raise")
    evaluation = fake_evaluation(partial(FakeWorld, mishaps), chains=1)
    with pytest.raises(RuntimeError, match=r"^chain 0, step: ZeroDivisionError: in the world\nTraceback"):
        run_episodes(evaluation, "policy", FakePolicy(), show=False)


def test_users_mistake_in_a_simulator_is_one_line():
    evaluation = fake_evaluation(broken_world, chains=1, processes=1)
    with pytest.raises(UserError, match="^renderer=egl: no such device; choose cpu$"):
        run_episodes(evaluation, "policy", FakePolicy(), show=False)


def test_nan_ends_the_run_but_keeps_finished_chains(tmp_path):
    evaluation = fake_evaluation(processes=1)
    with pytest.raises(UserError, match="chain 3, .*, observation 0: the policy returned NaN"):
        run_episodes(evaluation, "policy", FakePolicy(broken_at=(3, 0)), output=tmp_path, show=False)
    assert sorted(EpisodeLog(tmp_path, "chains").read()) == [0, 1, 2]
    before = (tmp_path / "chains.jsonl").read_text()
    chains = run_episodes(evaluation, "policy", FakePolicy(), output=tmp_path, show=False)
    assert outcome(chains) == one_by_one(evaluation, 1)
    assert (tmp_path / "chains.jsonl").read_text().startswith(before)


@pytest.mark.parametrize("shape", [(1, 7), (1, 10, 8), (2, 10, 7), (1, 0, 7)])
def test_actions_of_another_space_are_refused(shape):
    class Wrong(FakePolicy):
        def infer_batch(self, observations, seeds):
            return np.zeros(shape)

    with pytest.raises(UserError, match="the simulator takes"):
        run_episodes(fake_evaluation(chains=1), "policy", Wrong(), show=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_to_all_processes_are_left_to_the_evaluation(number):
    evaluation = fake_evaluation(chains=3)
    batcher = PatientBatcher(FakePolicy(), 1)
    with Fleet(evaluation.setup("policy"), 1, batcher, actions=7) as fleet:
        running = fleet.run(evaluation.episodes)
        results = [next(running)]
        (simulator,) = fleet.simulators
        simulator.process.send_signal(number)
        results += running
        assert fleet.replaced == 0
    assert outcome(results) == one_by_one(evaluation, 1)
    assert simulator.process.poll() is not None


SLOW_RUN = """
import sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from rollout_fakes import FakePolicy, fake_evaluation
from Step3_DeFI.rollout.evaluate import run_episodes

class Slow(FakePolicy):
    def infer_batch(self, observations, seeds):
        time.sleep(0.02)
        return super().infer_batch(observations, seeds)

run_episodes(fake_evaluation(processes=2), "policy", Slow(), output=Path({output!r}), show=False)
"""


@pytest.mark.parametrize(
    "end",
    [lambda run: run.kill(), lambda run: os.killpg(run.pid, signal.SIGTERM)],
    ids=["run killed", "group terminated"],
)
def test_killed_run_continues_and_leaves_no_process(tmp_path, end):
    log = tmp_path / "chains.jsonl"
    code = SLOW_RUN.format(path=[entry for entry in sys.path if entry], output=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    deadline = time.monotonic() + 120
    while (not log.exists() or log.read_text().count("\n") < 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = psutil.Process(process.pid).children()
    end(process)
    process.wait()
    assert len(children) == 2
    assert not psutil.wait_procs(children, timeout=60)[1]
    done = log.read_text().count("\n")
    assert 2 <= done < 12
    with log.open("a") as file:
        file.write('{"index": 11, "tasks": ["cut')
    evaluation = fake_evaluation(processes=2)
    chains = run_episodes(evaluation, "policy", FakePolicy(), output=tmp_path, show=False)
    assert outcome(chains) == one_by_one(evaluation, 1)
    assert [json.loads(line)["index"] for line in log.read_text().splitlines()[:done]] != []


# ---------------------------------------------------------------- batches


def test_the_batcher_waits_for_others_but_not_in_vain():
    evaluation = fake_evaluation(chains=4)
    batcher = PatientBatcher(FakePolicy(), 2)
    seen = {}
    for chain in evaluation.episodes:
        environment = fake_environment()
        environment.reset(chain)
        seen[chain.index] = Look((0, chain.index, 0), environment.task, environment.observe())

    def add(asker: str, look: Look) -> None:
        seed = seed_of("rollout", *look.seed)
        batcher.waiting.append(Question(asker, look.observation, seed, look.seed[1] % 2))

    def answer() -> dict[str, np.ndarray]:
        picked = batcher.take()
        answers = batcher.ask(picked)
        return {question.asker: answers[row] for row, question in picked.items()}

    assert batcher.patience(coming=2) is None
    batcher._call_seconds = 100.0
    add("a", seen[0])
    assert 0 < batcher.patience(coming=1) <= 50 and batcher.patience(coming=0) == 0
    add("b", seen[2])  # the same row: not in this batch
    assert batcher.patience(coming=1) > 0
    add("c", seen[1])
    assert batcher.patience(coming=1) == 0
    answers = answer()
    assert set(answers) == {"a", "c"} and batcher.patience(coming=1) is not None
    expected = ask(FakePolicy(), [seen[0], seen[1]])
    np.testing.assert_array_equal(answers["a"], expected[0])
    np.testing.assert_array_equal(answers["c"], expected[1])
    np.testing.assert_array_equal(answer()["b"], ask(FakePolicy(), [seen[2]] * 2)[0])


def test_batches_are_filled():
    batcher = PatientBatcher(FakePolicy(), 4)
    evaluation = fake_evaluation(chains=16)
    with Fleet(evaluation.setup("policy"), 4, batcher, actions=7) as fleet:
        observations = sum(chain.observations for chain in fleet.run(evaluation.episodes))
    assert batcher.calls < observations


def test_a_process_stays_in_its_world_where_that_costs_nothing():
    class Place(Chain):
        world = property(lambda self: "ab"[self.index % 2])

    for rows, expected in ((1, "aaabbb"), (2, "bbbaaa")):  # a free row of the batch comes first
        fleet = Fleet(None, 0, PatientBatcher(FakePolicy(), rows))
        fleet._pending = [Place(index, (), (), np.zeros(15), np.zeros(24)) for index in range(6)]
        simulator = SimpleNamespace(episode=None, world="a", send=lambda message: None)
        fleet.simulators, begun = [simulator, SimpleNamespace(episode=SimpleNamespace(index=0))], ""
        while fleet._pending:
            simulator.episode = None
            fleet._begin(simulator)
            begun += simulator.world
        assert begun == expected


def test_simulator_processes_do_without_torch():
    code = "import sys, Step3_DeFI.rollout.simulator, defi.benchmarks.calvin.environment; "
    code += "print({'torch', 'scipy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_baseline_runs_beside_on_the_same_chains(tmp_path: Path):
    evaluation = fake_evaluation(processes=1, baseline="random", chains=5)
    results = evaluate(evaluation, "policy", FakePolicy(), output=tmp_path, show=False)
    alone = run_episodes(fake_evaluation(processes=1, chains=5), "random", show=False)
    assert [chain["steps"] for chain in results.baseline["episodes"]] == [
        chain.outcome["steps"] for chain in alone
    ]
    assert results.run["observations"] == sum(chain.observations for chain in results.episodes)
    # Each in a file of its own: a resumed run with another baseline must not take this one's chains for its.
    logs = {"chains.jsonl", "baseline_random.jsonl"}
    assert {file.name for file in tmp_path.glob("*.jsonl")} == logs
