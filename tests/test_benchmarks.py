"""Benchmarks of others: the one in docs/benchmark-of-your-own.md from the command line to the comparison."""

import contextlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from policy_fakes import policy_config, write_stages

from defi.benchmarks import find
from defi.benchmarks.benchmark import Benchmark
from defi.benchmarks.find import find_benchmark
from defi.config import CONFIG_DIR
from defi.engine import checkpoint
from defi.errors import UserError
from Step3_DeFI.acting import Policy
from Step3_DeFI.compare import compare
from Step3_DeFI.policy import DeFI
from Step3_DeFI.preview import rollouts
from Step3_DeFI.rollout.config import CommandConfig, RolloutConfig, read_settings
from Step3_DeFI.rollout.evaluate import Evaluation, evaluate, main, run_episodes
from Step3_DeFI.rollout.results import read_results

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmark-of-your-own.md"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's module, under a name that no other test has."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code.count("\n") < 80
    folder = tmp_path_factory.mktemp("package")
    (folder / "reach.py").write_text(code)
    return folder


@pytest.fixture
def reach(package: Path, monkeypatch: pytest.MonkeyPatch) -> type[Benchmark]:
    monkeypatch.syspath_prepend(str(package))
    return find_benchmark("reach:Reach")


def command(module: str, *settings: str, path: tuple[Path, ...] = ()) -> subprocess.CompletedProcess:
    """In a process of its own, with `path` beside this project."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "COLUMNS": "100"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path)))}
    line = [sys.executable, "-m", module, *settings]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.fixture
def roll_out(
    reach: type[Benchmark], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., str]:
    """The command in this process: what it printed, also where it ended with an error."""

    def run(*settings: str) -> str:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["rollout", *settings])
        with contextlib.suppress(SystemExit):
            main()
        return "".join(capsys.readouterr())

    return run


def test_the_page_s_benchmark_from_the_command_to_the_comparison(
    package: Path, roll_out: Callable[..., str], tmp_path: Path
) -> None:
    output, chance = tmp_path / "scripted", tmp_path / "random"
    given = ["benchmark=reach:Reach", "trials=24", "processes=2", "videos.chains=2"]
    own = [*given, "agent=scripted", "baseline=random", f"output={output}"]
    done = command("Step3_DeFI.rollout", *own, path=(package,))
    assert done.returncode == 0, done.stderr
    assert "24 episodes of Reach, seed 0" in done.stdout
    assert re.search(r"straight ahead +success +100\.0 %", done.stdout)
    assert re.search(r"reach_red +12 +12", done.stdout)
    results = read_results(output)
    assert (results.scores["success"]["average"], results.about.benchmark) == (1.0, "reach:Reach")
    assert results.baseline["scores"]["success"]["average"] < 0.5
    assert results.protocol["limit"] == 40 and results.run["settings"]["trials"] == 24
    page = (output / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 2 and "published" not in page

    # As if it had been killed: what is there is not run again, what is missing is.
    log = output / "episodes.jsonl"
    kept = [json.loads(line) | {"seconds": 0.125} for line in log.read_text().splitlines()[:9]]
    log.write_text("".join(json.dumps(line) + "\n" for line in kept))
    (output / "results.json").unlink()
    roll_out(*own, "resume=true")
    resumed = read_results(output)
    assert [each.outcome for each in resumed.episodes] == [each.outcome for each in results.episodes]
    assert sum(each.seconds == 0.125 for each in resumed.episodes) == 9
    assert resumed.run["earlier_episodes"] == 9
    assert "was begun with limit=40, now it is 30" in roll_out(*own, "resume=true", "limit=30")
    log.write_text(log.read_text().replace('"success"', '"succes"'))
    assert "line 1: cannot be read (no 'success' in it)" in roll_out(*own, "resume=true")

    roll_out(*given, "agent=random", f"output={chance}")
    done = command("Step3_DeFI.compare", str(chance), str(output))  # reach.py is not on its path
    assert re.search(r"success +\d+\.\d % +100\.0 % +\+\d\.\d\d .* yes", done.stdout), done.stderr
    roll_out(*given, "agent=random", "limit=30", f"output={tmp_path / 'other'}")
    with pytest.raises(UserError, match="limit: 40 in the first result, 30 in the second"):
        compare(read_results(chance), read_results(tmp_path / "other"))


def test_the_page_compares_what_can_be_compared(reach: type[Benchmark]) -> None:
    runs = re.findall(r"step3_rollout.sh benchmark=reach:Reach (.*)", PAGE.read_text())
    own = [{each for each in run.split() if each.partition("=")[0] in vars(reach())} for run in runs]
    assert len(own) == 2 and own[0] == own[1]


def test_a_policy_of_its_robot_runs_and_one_of_another_is_refused(
    reach: type[Benchmark], roll_out: Callable[..., str], tmp_path: Path
) -> None:
    gfdm, gidm = write_stages(tmp_path)
    for name, changes in (("fits", {"robot": asdict(reach().robot), "state": True}), ("calvin", {})):
        policy = DeFI.from_stages(policy_config(**changes), gfdm=gfdm, gidm=gidm)
        checkpoint.save(policy, tmp_path / name, step=1, config={"preset_name": "test"})
    given = ["benchmark=reach:Reach", "trials=3", "limit=12", "processes=2", "batch=2", "videos.chains=0"]
    told = roll_out(*given, f"checkpoint={tmp_path / 'fits'}", f"output={tmp_path / 'out'}")
    assert "DeFI" in told
    results = read_results(tmp_path / "out")
    fault = roll_out(*given, f"checkpoint={tmp_path / 'calvin'}", f"output={tmp_path / 'x'}")
    assert "no camera static; no camera gripper; actions of 3 numbers, not 7" in fault

    evaluation = Evaluation.prepare(reach(trials=3, limit=12), RolloutConfig(processes=1, batch=2))
    alone = evaluate(evaluation, "policy", Policy.load(tmp_path / "fits"), show=False)
    assert [each.outcome for each in alone.episodes] == [each.outcome for each in results.episodes]
    find.offer(["benchmark@rollout=reach:Reach"])
    given = ["benchmark@rollout=reach:Reach", "rollout.trials=3", "rollout.limit=12", "output=x"]
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = compose("step3_train", given)
    model = Policy.load(tmp_path / "fits").model
    numbers = rollouts(cfg, model.config)(model, 1, tmp_path / "while_training")
    assert set(numbers) == {"success_rate"} and 0 <= numbers["success_rate"] <= 1
    assert (tmp_path / "while_training" / "episodes.jsonl").read_text().count("\n") == 3
    with pytest.raises(UserError, match="actions of 3 numbers, not 7"):
        rollouts(cfg, policy_config())


def variant(package: Path, name: str, before: str, after: str) -> str:
    """The page's module, one thing in it otherwise, under a name of its own."""
    code = (package / "reach.py").read_text()
    assert code.count(before) == 1
    (package / f"{name}.py").write_text(code.replace(before, after))
    return f"{name}:Reach"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('{"above": pic', '{"abov": pic', ":World: observation: no picture of the camera above; the robot"),
        (
            ", np.uint8)",
            ")",
            r":World: observation: the picture of above is float64 \[32, 32, 3\]; give uint8",
        ),
        (
            "(32, 32, 3)",
            "(32, 32)",
            r":World: observation: the picture of above is uint8 \[32, 32\]; give uint8",
        ),
        (
            "self.place}",
            "self.place[:2]}",
            r":World: observation: state is float64 \[2\]; give 3 .*: x, y, z",
        ),
        ('f"go to {self.color}"', "None", ":World: observation: no instruction"),
        ("))[None]", "))", r"agent=scripted: gave actions \[3\]; .* robot takes \[K, 3\] \(dx, dy, dz\)$"),
        ("return Step(", "Step(", ":World: step returned NoneType; give a Step"),
        (
            '"success": self.near, ',
            "",
            ":Reach: the outcome .* cannot be read .no 'success' in it.; give all",
        ),
    ],
)
def test_what_a_module_gives_is_checked_in_one_line(
    package: Path, roll_out: Callable[..., str], tmp_path: Path, before: str, after: str, message: str
) -> None:
    name = tmp_path.name
    given = [f"benchmark={variant(package, name, before, after)}", "trials=1", "processes=1"]
    told = roll_out(*given, "agent=scripted", f"output={tmp_path / 'out'}")
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, errors[0]), told
    assert message[0] != ":" or errors[0].startswith(f"error: {name}:")
    assert "Traceback" not in told


def test_a_fault_in_a_module_is_shown_from_there(
    package: Path, roll_out: Callable[..., str], tmp_path: Path
) -> None:
    name = variant(package, "reach_fault", "episode.goal)", "episode.gaol)")
    told = roll_out(f"benchmark={name}", "agent=scripted", "processes=1", f"output={tmp_path / 'out'}")
    assert told.count("Traceback") == 1 and re.findall(r'File ".*/(\w+).py"', told) == ["reach_fault"]
    assert told.endswith("error: episode 0, reset: AttributeError: 'Trial' object has no attribute 'gaol'\n")


def test_who_looks_is_checked_and_who_does_not_draws_nothing(reach: type[Benchmark], package: Path) -> None:
    class Still:
        robot = reach().robot

        def infer_batch(self, observations, seeds):
            return np.zeros((len(observations), 1, 3))

    kind = find_benchmark(variant(package, "reach_blind", '{"above": picture}', "{}"))
    evaluation = Evaluation.prepare(kind(trials=1, limit=3), RolloutConfig(processes=1))
    with pytest.raises(UserError, match="^reach_blind:World: observation: no picture of the camera above"):
        run_episodes(evaluation, "policy", Still(), show=False)
    (episode,) = run_episodes(evaluation, "random", show=False)
    assert episode.control_steps == 3


def test_results_do_not_depend_on_processes(reach: type[Benchmark]) -> None:
    runs = [
        run_episodes(Evaluation.prepare(reach(), RolloutConfig(processes=n)), "random", show=False)
        for n in (1, 3)
    ]
    one, three = ([(each.index, each.outcome) for each in run] for run in runs)
    assert one == three and len({str(outcome) for _, outcome in one}) > 1


def test_adapters_lie_between_policy_and_environment(reach: type[Benchmark]) -> None:
    class Straight:
        """One action per look, of which each adapter makes something else."""

        robot = reach().robot

        def infer_batch(self, observations, seeds):
            return np.stack([[[0.0, 0.0, 1.0]] for _ in observations])

    steps = {}
    for adapters in ([], ["repeat:3"], ["gripper_flipped", "split:2"]):
        config = RolloutConfig(processes=1, adapters=adapters)
        evaluation = Evaluation.prepare(reach(trials=1, limit=12), config)
        (episode,) = run_episodes(evaluation, "policy", Straight(), show=False)
        steps[tuple(adapters)] = (episode.control_steps, episode.observations)
    assert list(steps.values()) == [(12, 12), (12, 4), (12, 6)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["benchmark=nowhere"],
            "nowhere: none of calvin, gym, simpler_google, simpler_widowx, table, or package.module:Class",
        ),
        (["benchmark=nowhere:Reach"], "benchmark=nowhere:Reach: cannot be imported .No module named"),
        (["benchmark=reach:Nothing"], "cannot be imported .module 'reach' has no attribute 'Nothing'"),
        (["benchmark=reach:World"], "benchmark=reach:World: is no subclass"),
        (["benchmark=reach:Reach", "trails=3"], "trails=: no such setting; did you mean trials="),
        (["benchmark=reach:Reach", "trials=some"], "trials=some"),
        (["benchmark=reach:Reach", "sim.world=fresh"], "sim=: no such setting; there are adapters="),
        (["benchmark=reach:Reach", "agent=expert"], "agent=expert: must be one of policy, random, scripted"),
        (["benchmark=reach:Reach", "adapters=[turn]"], "adapters=turn: choose from"),
    ],
)
def test_wrong_settings_are_one_line(roll_out: Callable[..., str], settings: list[str], message: str) -> None:
    told = roll_out("agent=random", *settings, "output=x")
    assert re.search(message, told) and told.count("\n") == 1 and told.startswith("error: ")


def test_an_installed_package_registers_its_benchmarks(
    reach: type[Benchmark], monkeypatch: pytest.MonkeyPatch
) -> None:
    point = importlib.metadata.EntryPoint("reach", "reach:Reach", find.GROUP)
    monkeypatch.setattr(find, "entry_points", lambda group: [point] if group == find.GROUP else [])
    assert find_benchmark("reach") is reach
    settings = {"benchmark": "reach", "trials": 5, "agent": "random"}
    benchmark, config = read_settings(CommandConfig, find.OmegaConf.create(settings), "x")
    assert (benchmark, config.benchmark) == (reach(trials=5), "reach")


@dataclass
class Taken(Benchmark):
    seed: int = 0


class Plain(Taken):
    """Not decorated."""


def test_settings_of_a_rollout_are_taken() -> None:
    settings = {"benchmark": f"{__name__}:Taken", "agent": "random"}
    with pytest.raises(UserError, match="its seed means something else here; rename it"):
        read_settings(CommandConfig, find.OmegaConf.create(settings), "x")
    with pytest.raises(UserError, match="Plain: is no dataclass"):
        find_benchmark(f"{__name__}:Plain")
