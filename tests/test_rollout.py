"""Chains on many processes: the same result however they are run, nothing lost when something breaks."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from fake_world import FakeWorld, Mishaps, broken_world, judge, start_of
from rollout_fakes import FakePolicy, fake_evaluation

from defi.errors import UserError
from Step3_DeFI.rollout.chain import PolicyAgent, RandomAgent, attempt, run_chain
from Step3_DeFI.rollout.config import SimConfig
from Step3_DeFI.rollout.evaluate import Shard, evaluate, run_chains
from Step3_DeFI.rollout.fleet import MOST_DEATHS, Fleet
from Step3_DeFI.rollout.results import ChainLog
from Step3_DeFI.rollout.server import PolicyServer
from Step3_DeFI.rollout.statistics import lengths


def outcome(chains) -> list[tuple]:
    """What must not depend on how the chains were run."""
    return [(chain.index, chain.tasks, chain.steps, chain.control_steps, chain.looks) for chain in chains]


def one_by_one(evaluation, batch: int) -> list[tuple]:
    """The result by definition: chain after chain, each in a new world, its look in its row of a batch."""
    policy = FakePolicy()
    chains = []
    for trial in evaluation.trials:
        row = trial.index % batch
        agent = PolicyAgent(lambda look, row=row: policy.act([look] * batch)[row], evaluation.config.seed)
        limit = max(evaluation.config.max_steps)
        chains.append(run_chain(FakeWorld(), judge, agent, trial, limit=limit))
    return outcome(chains)


@pytest.mark.parametrize("batch, numbers", [(1, (2,)), (3, (1, 2, 5))])
def test_result_is_the_same_for_any_number_of_processes(batch, numbers):
    expected = one_by_one(fake_evaluation(), batch)
    assert len({steps for _, _, steps, _, _ in expected}) > 6  # chains differ, so a mix-up would show
    for processes in numbers:
        evaluation = fake_evaluation(processes=processes, batch=batch)
        assert outcome(run_chains(evaluation, "policy", FakePolicy(), show=False)) == expected


def test_seed_and_persistent_world_change_the_result():
    fresh = one_by_one(fake_evaluation(), 1)
    other = one_by_one(fake_evaluation(seed=1), 1)
    persistent = fake_evaluation(processes=1, sim=SimConfig(world="persistent"))
    remembered = outcome(run_chains(persistent, "policy", FakePolicy(), show=False))
    assert other != fresh
    assert remembered[0] == fresh[0] and remembered != fresh


def test_shards_share_the_chains_and_all_are_counted(tmp_path):
    evaluation = fake_evaluation(processes=1, chains=11)
    whole = one_by_one(evaluation, 1)
    shares = [Shard(rank, 3).of(evaluation.trials) for rank in range(3)]
    assert sorted(t.index for share in shares for t in share) == list(range(11))
    for rank in (1, 2):
        log = ChainLog(tmp_path, "chains", rank)
        with Fleet(evaluation.setup("policy", filmed=False), 1, PolicyServer(FakePolicy(), 1)) as fleet:
            for result in fleet.run(shares[rank]):
                log.append(result)
    assert len(list(tmp_path.glob("chains.*.jsonl"))) == 2
    joined = run_chains(evaluation, "policy", FakePolicy(), output=tmp_path, show=False)
    assert outcome(joined) == whole


# ---------------------------------------------------------------- one chain


class Counter:
    """A world that counts its steps, solved at the 13th of each task, and keeps the actions."""

    def __init__(self) -> None:
        self.steps, self.actions = 0, []

    def step(self, action: np.ndarray) -> None:
        self.steps += 1
        self.actions.append(action)

    def state(self) -> int:
        return self.steps

    def render(self) -> dict[str, np.ndarray]:
        return {"rgb_static": np.full((2, 2, 3), self.steps, np.uint8)}


class Chunks:
    looks = 0

    def act(self, world, task, instruction) -> np.ndarray:
        self.looks += 1
        return np.tile([0.1, 0, 0, 0, 0, 0, 0.3], (10, 1)) * [1, 1, 1, 1, 1, 1, (-1) ** self.looks]


def test_attempt_stops_within_a_chunk_and_binarises_the_gripper():
    world, agent = Counter(), Chunks()
    taken = attempt(world, lambda task, a, b: b - a == 13, agent, "t", "words", limit=60)
    assert (taken, world.steps, agent.looks) == (13, 13, 2)
    assert [action[6] for action in world.actions] == [-1.0] * 10 + [1.0] * 3
    assert world.actions[0][0] == 0.1


def test_attempt_ends_at_the_limit_inside_a_chunk():
    world, agent = Counter(), Chunks()
    assert attempt(world, lambda task, a, b: False, agent, "t", "words", limit=25) is None
    assert (world.steps, agent.looks) == (25, 3)


def test_smaller_limits_are_read_from_the_same_run():
    both = run_chains(fake_evaluation(processes=1), "policy", FakePolicy(), show=False)
    short = run_chains(fake_evaluation(processes=1, max_steps=[30]), "policy", FakePolicy(), show=False)
    np.testing.assert_array_equal(lengths(both, 30), lengths(short, 30))
    assert (lengths(both, 60) >= lengths(both, 30)).all() and lengths(both, 60).sum() > lengths(
        both, 30
    ).sum()


def test_chunk_setting_looks_more_often():
    looks = {}
    for chunk in (None, 5):
        chains = run_chains(
            fake_evaluation(chunk=chunk, chains=3, processes=1), "policy", FakePolicy(), show=False
        )
        for chain in chains:
            steps = [60 if taken is None else taken for taken in chain.steps]
            assert chain.looks == sum(-(-taken // (chunk or 10)) for taken in steps)
        looks[chunk] = chains[0].looks
    assert looks[5] != looks[None]


def test_random_agent_is_seeded_by_chain_and_look():
    evaluation = fake_evaluation(chains=2)
    first, second = RandomAgent(7), RandomAgent(7)
    first.begin(evaluation.trials[0])
    a = [first.act(None, "", "") for _ in range(2)]
    second.begin(evaluation.trials[0])
    np.testing.assert_array_equal(a[0], second.act(None, "", ""))
    second.begin(evaluation.trials[1])
    assert not np.array_equal(a[0], second.act(None, "", "")) and not np.array_equal(*a)
    assert np.abs(a).max() <= 1


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("kind", ["kill", "hang"])
def test_dead_simulator_is_replaced_and_its_chain_run_again(tmp_path, kind):
    expected = one_by_one(fake_evaluation(chains=5), 2)
    mishaps = Mishaps(tmp_path / "struck", start_of(1), kind)
    evaluation = fake_evaluation(partial(FakeWorld, mishaps), chains=5, batch=2)
    server = PolicyServer(FakePolicy(), 2)
    with Fleet(evaluation.setup("policy", filmed=False), 2, server, silence=3) as fleet:
        results = sorted(fleet.run(evaluation.trials), key=lambda chain: chain.index)
    assert (tmp_path / "struck").exists() and fleet.replaced == 1
    assert outcome(results) == expected


def test_chain_that_kills_every_simulator_ends_the_run_and_keeps_the_others(tmp_path):
    mishaps = Mishaps(tmp_path / "struck", start_of(2), always=True)
    evaluation = fake_evaluation(partial(FakeWorld, mishaps), chains=4, processes=1)
    with pytest.raises(UserError, match=f"chain 2: .* died {MOST_DEATHS} times .the last words."):
        run_chains(evaluation, "policy", FakePolicy(), output=tmp_path / "out", show=False)
    assert sorted(ChainLog(tmp_path / "out", "chains").read()) == [0, 1]


def test_fault_in_the_world_is_raised_with_its_traceback(tmp_path):
    mishaps = Mishaps(tmp_path / "struck", start_of(0), "raise")
    evaluation = fake_evaluation(partial(FakeWorld, mishaps), chains=1)
    with pytest.raises(RuntimeError, match=r"(?s)chain 0: .*ZeroDivisionError: in the world"):
        run_chains(evaluation, "policy", FakePolicy(), show=False)


def test_users_mistake_in_a_simulator_is_one_line():
    evaluation = fake_evaluation(broken_world, chains=1, processes=1)
    with pytest.raises(UserError, match="^renderer=egl: no such device; choose cpu$"):
        run_chains(evaluation, "policy", FakePolicy(), show=False)


def test_nan_ends_the_run_but_keeps_finished_chains(tmp_path):
    evaluation = fake_evaluation(processes=1)
    with pytest.raises(UserError, match="chain 3, .*, look 0: the policy returned NaN"):
        run_chains(evaluation, "policy", FakePolicy(broken_at=(3, 0)), output=tmp_path, show=False)
    assert sorted(ChainLog(tmp_path, "chains").read()) == [0, 1, 2]
    before = (tmp_path / "chains.jsonl").read_text()
    chains = run_chains(evaluation, "policy", FakePolicy(), output=tmp_path, show=False)
    assert outcome(chains) == one_by_one(evaluation, 1)
    assert (tmp_path / "chains.jsonl").read_text().startswith(before)


@pytest.mark.parametrize("shape", [(1, 7), (1, 10, 8), (2, 10, 7), (1, 0, 7)])
def test_actions_of_another_space_are_refused(shape):
    class Wrong:
        def act(self, looks):
            return np.zeros(shape)

    with pytest.raises(UserError, match="the simulator takes"):
        run_chains(fake_evaluation(chains=1), "policy", Wrong(), show=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_to_all_processes_are_left_to_the_evaluation(number):
    evaluation = fake_evaluation(chains=3)
    server = PolicyServer(FakePolicy(), 1)
    with Fleet(evaluation.setup("policy", filmed=False), 1, server) as fleet:
        running = fleet.run(evaluation.trials)
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
from Step3_DeFI.rollout.evaluate import run_chains

class Slow(FakePolicy):
    def act(self, looks):
        time.sleep(0.02)
        return super().act(looks)

run_chains(fake_evaluation(processes=2), "policy", Slow(), output=Path({output!r}), show=False)
"""


@pytest.mark.parametrize(
    "end",
    [lambda run: run.kill(), lambda run: os.killpg(run.pid, signal.SIGTERM)],
    ids=["run killed", "group told to end"],
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
    chains = run_chains(evaluation, "policy", FakePolicy(), output=tmp_path, show=False)
    assert outcome(chains) == one_by_one(evaluation, 1)
    assert [json.loads(line)["index"] for line in log.read_text().splitlines()[:done]] != []


# ---------------------------------------------------------------- batches


def test_server_waits_for_others_but_not_in_vain():
    evaluation = fake_evaluation(chains=4)
    server = PolicyServer(FakePolicy(), 2)
    looks = {}
    for trial in evaluation.trials:
        agent = PolicyAgent(lambda look: look, 0)
        agent.begin(trial)
        world = FakeWorld()
        world.reset(trial.robot_obs, trial.scene_obs)
        looks[trial.index] = agent.act(world, trial.tasks[0], trial.instructions[0])
    assert server.patience(coming=2) is None
    server._call_seconds = 100.0
    server.add("a", looks[0])
    assert 0 < server.patience(coming=1) <= 50 and server.patience(coming=0) == 0
    server.add("b", looks[2])  # the same row: not in this batch
    assert server.patience(coming=1) > 0
    server.add("c", looks[1])
    assert server.patience(coming=1) == 0
    answers = dict(server.answer())
    assert set(answers) == {"a", "c"} and len(server) == 1
    expected = FakePolicy().act([looks[0], looks[1]])
    np.testing.assert_array_equal(answers["a"], expected[0])
    np.testing.assert_array_equal(answers["c"], expected[1])
    np.testing.assert_array_equal(dict(server.answer())["b"], FakePolicy().act([looks[2]] * 2)[0])


def test_batches_are_filled():
    server = PolicyServer(FakePolicy(), 4)
    evaluation = fake_evaluation(chains=16)
    with Fleet(evaluation.setup("policy", filmed=False), 4, server) as fleet:
        looks = sum(chain.looks for chain in fleet.run(evaluation.trials))
    assert server.calls < looks


def test_simulator_processes_do_without_torch():
    code = "import sys, Step3_DeFI.rollout.simulator; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_baseline_runs_beside_on_the_same_chains(tmp_path: Path):
    evaluation = fake_evaluation(processes=1, baseline="random", chains=5)
    results = evaluate(evaluation, "policy", FakePolicy(), output=tmp_path, show=False)
    alone = run_chains(fake_evaluation(processes=1, chains=5), "random", show=False)
    assert [chain["steps"] for chain in results.baseline["chains"]] == [chain.steps for chain in alone]
    assert results.run["looks"] == sum(chain.looks for chain in results.chains)
