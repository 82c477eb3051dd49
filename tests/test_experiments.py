"""Suites of experiments: what is shared, what every arm changes, kills, two at work, what the numbers say."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import defi
from defi import config
from defi.benchmarks.benchmark import About
from defi.benchmarks.calvin.benchmark import Calvin
from defi.config import CONFIG_DIR
from defi.engine.checkpoint import find_checkpoint
from defi.errors import UserError
from experiments import plan, probe, report, run, statistics
from experiments.plan import arguments, build_runs, distinct_steps, read_arms
from experiments.statistics import crossed_interval, difference, summarise
from experiments.work import STOPPED, Workshop, again
from Step3_DeFI.rollout.results import Results
from Step3_DeFI.rollout.simulator import EpisodeResult

ROOT = Path(__file__).resolve().parents[1]
SUITES = sorted(file.stem for file in (CONFIG_DIR / "suite").glob("*.yaml"))


def suite(name: str, *settings: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = compose("experiments", overrides=[f"suite={name}", *settings])
    return OmegaConf.to_container(cfg, resolve=True)


# ---------------------------------------------------------------- suites


def test_a_command_takes_the_settings_of_every_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """`--cfg job` composes and prints them; a setting that there is not would end it."""
    suites = [(name, size) for name in SUITES for size in ("size=cpu", "size=gpu")]
    steps = [step for each in suites for step in distinct_steps(run.plan(suite(*each))[1]).values()]
    kinds = {(step.run, step.settings.get("preset"), frozenset(step.settings)): step for step in steps}
    for step in kinds.values():
        places = {each.key: "some/place" for each in step.inputs}
        settings = arguments(step.settings, places) + arguments(step.how, {}) + ["output=out"]
        monkeypatch.setattr(sys, "argv", [step.run, *settings, "--cfg", "job"])
        module = import_module(step.run)
        GlobalHydra.instance().clear()
        (getattr(module, "main", None) or import_module(f"{step.run}.__main__").main)()
        assert "output: out" in capsys.readouterr().out


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_takes_as_long_as_it_says(name: str) -> None:
    settings = suite(name)
    hours = sum(step.seconds for step in distinct_steps(run.plan(settings)[1]).values()) / 3600
    assert hours == pytest.approx(settings["hours"], rel=0.1)


def test_what_two_arms_share_is_one_step() -> None:
    _, runs = run.plan(suite("ablation", "seeds=[0,1]"))
    ends = {(each.arm, each.seed): each.last for each in runs}
    steps = {key: {each.name: each.key for each in last.all()} for key, last in ends.items()}
    full, other = steps["full", 0], steps["full", 1]
    assert [name for name in full if full[name] == other[name]] == ["data", "vae", "latents"]
    for arm, own in (
        ("gidm_random", {"gidm", "policy", "rollout"}),
        ("no_latent_actions", {"policy", "rollout"}),
        ("gfdm_random", {"gfdm", "features", "held_out", "policy", "rollout"}),
    ):
        assert {name for name in full if full[name] != steps[arm, 0][name]} == own
    counts = [step.name for step in distinct_steps(runs).values()]
    assert (counts.count("vae"), counts.count("gfdm"), counts.count("policy")) == (1, 4, 20)
    few = {step.key for step in distinct_steps(run.plan(suite("few"))[1]).values()}
    assert {full["data"], full["gfdm"], full["policy"]} <= few  # suites share, too


def test_a_step_is_known_by_all_that_decides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the suite says and what configs/ say, however it is written; neither places nor how it is done."""
    steps: dict[str, Any] = {
        "data": {"run": "defi.sim.collect", "seconds": [1, 2], "how": {"workers": 2}, "static_size": 64},
        "rollout": {
            "run": "Step3_DeFI.rollout",
            "seconds": [1],
            "checkpoint": "@data",
            "seed": "@seed",
            "sim": {"static_size": None},
        },
    }

    def key(changes: dict[str, Any], seed: int = 0) -> str:
        arms = read_arms({"one": {"title": "", "steps": changes}})
        return build_runs(steps, arms, [seed])[0].last.key

    others = [
        {"data": {"static_size": 4}},
        {"data": {"run": "Step1_GFDM.train_vae", "seconds": [1], "data": {"root": "some/data"}}},
        {"rollout": {"sim": {"static_size": 1}}},
    ]
    keys = [key({}), key({}, 1), *map(key, others)]
    assert len(set(keys)) == 5
    same = [
        {"data": {"how": {"workers": 5}}},
        {"data": {"seconds": [9]}},
        {"rollout": {"checkpoint": "@data"}},
    ]
    same += [{"data": {"scenes": ["A", "B", "C"]}}]  # the default
    assert {*map(key, same)} == {keys[0]}
    for wrong, message in (("@nothing", "no such step"), ("@rollout", "needs itself")):
        with pytest.raises(UserError, match=message):
            key({"rollout": {"checkpoint": wrong}})

    def changed(file: str, old: str, new: str) -> str:
        text = (tmp_path / file).read_text()
        assert old in text
        (tmp_path / file).write_text(text.replace(old, new))
        plan.defaults.cache_clear()
        return key({})

    shutil.copytree(CONFIG_DIR, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(config, "CONFIG_DIR", tmp_path)
    try:
        found = [changed("collect.yaml", "# ", "#  ")]
        assert found == keys[:1]
        found.append(changed("collect.yaml", "demos_per_task: ", "demos_per_task: 9"))
        monkeypatch.setattr(defi, "__version__", "0.0")
        found.append(changed("collect.yaml", "# ", "#  "))
        assert len(set(found)) == 3
    finally:
        plan.defaults.cache_clear()


def test_suites_share_what_is_equal() -> None:
    """An arm that says a default is the arm that leaves it out."""
    ends = {
        name: {each.arm: each.last.key for each in run.plan(suite(name, "seeds=[0]"))[1]}
        for name in ("ablation", "few", "floor")
    }
    assert ends["ablation"]["full"] == ends["few"]["all_100"] == ends["floor"]["all"]
    assert ends["few"]["all_10"] == ends["floor"]["base"] != ends["floor"]["every_frame"]


def test_an_arm_differs_in_what_it_says() -> None:
    """Few demonstrations: in the share alone. Finetuned: in that alone. Play: as much as its label says."""

    def stores(name: str) -> dict[str, dict[str, Any]]:
        found = {each.arm: each.last.inputs[0].inputs for each in run.plan(suite(name, "seeds=[0]"))[1]}
        return {
            arm: dict(next(each.settings for each in needs if each.name == "features"))
            for arm, needs in found.items()
        }

    for settings in (few := stores("few")).values():
        settings.pop("data.share", None), settings.pop("data.root"), settings.pop("gfdm_checkpoint")
    assert all(settings == few["all_100"] for settings in few.values())
    assert stores("ablation")["latents_frozen"] == stores("ablation")["end_to_end"]
    assert read_arms(suite("ablation")["arms"])["end_to_end"].against == "latents_frozen"
    for video in (suite("video", "seeds=[0]"), suite("video", "seeds=[0]", "size=gpu")):
        numbers = video["numbers"]
        for each in run.plan(video)[1]:
            for step in (step for step in each.last.all() if step.name == "play_latents"):
                per_task = math.ceil(step.settings["data.share"] * numbers["play"])
                times = per_task * numbers["play_kinds"] / (numbers["demos"] * numbers["kinds"])
                assert times == video["arms"][each.arm]["at"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [("only=[half]", "no arm half"), ("task=3/3", "task=3/3"), ("task=one", "task=one")],
)
def test_mistakes_are_named(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run.plan(suite("ablation", setting))


def test_parts_are_all_of_it() -> None:
    whole = run.plan(suite("few"))[1]
    parts = [run.plan(suite("few", f"task={k}/4"))[1] for k in range(4)]
    assert sorted(map(str, whole)) == sorted(str(each) for part in parts for each in part)


# ---------------------------------------------------------------- numbers


def rollout(lengths: np.ndarray) -> Results:
    """A rollout whose chains have these lengths of 5; the tasks of the last one solved took 200 steps."""
    benchmark, tasks = Calvin(chains=len(lengths), max_steps=[120, 240]), list("abcde")
    episodes = []
    for index, length in enumerate(lengths.tolist()):
        steps: list[int | None] = [50] * length + [None] * (length < 5)
        if length:
            steps[length - 1] = 200
        episodes.append(EpisodeResult(index, {"tasks": tasks, "steps": steps}, 100, 10, 1.0))
    outcomes = [each.outcome for each in episodes]
    scores = {score: benchmark.summarise(outcomes, score) for score in benchmark.scores}
    protocol, how = (
        {"max_steps": [120, 240], "length": 5, "chains": len(episodes)},
        {"versions": {"torch": "2"}},
    )
    return Results(About("", ""), {"kind": "policy"}, protocol, how, tuple(episodes), scores)


def test_intervals_hold_the_chance_of_seeds_and_of_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as they should, on made-up numbers; with one seed, that of the chains alone."""
    monkeypatch.setattr(statistics, "DRAWS", 1000)
    draw = np.random.default_rng(0)
    for seeds, spread, least in ((3, 0.2, 0.93), (5, 0.5, 0.9), (1, 0.0, 0.9)):
        held = 0
        for _ in range(100):
            values = spread * draw.normal(size=(seeds, 1)) + draw.normal(size=(1, 40))
            (low, high), _ = crossed_interval(values + draw.normal(size=(seeds, 40)))
            held += low <= 0 <= high
        assert held / 100 >= least
    of_seeds = np.repeat([[0.0], [1.0], [2.0]], 40, axis=1)  # chains say nothing new
    (low, high), _ = crossed_interval(of_seeds)
    assert low < 0.3 and high > 1.7
    assert crossed_interval(of_seeds[:1])[0] == (0.0, 0.0)
    assert crossed_interval(np.ones((3, 40)))[1] == pytest.approx(2e-3)  # never below two draws' share


def test_differences_are_of_the_seeds_and_chains_that_both_have() -> None:
    draw = np.random.default_rng(1)
    base = {seed: draw.integers(1, 5, 60) for seed in (0, 1, 2)}
    first = {seed: rollout(lengths) for seed, lengths in base.items()}
    worse = {seed: rollout(np.maximum(lengths - 1, 0)) for seed, lengths in base.items() if seed != 1}
    found = difference(first, worse, 240)
    assert found["difference"] == -1 and found["interval"] == pytest.approx((-1, -1))
    assert found["seeds"].keys() == {0, 2}
    assert difference(first, {7: worse[0]}, 240) is None
    expected = np.mean(list(base.values()))
    assert summarise(first, 240)["mean"] == pytest.approx(expected)
    assert summarise(first, 120)["mean"] == pytest.approx(expected - 1)  # the last tasks took 200 steps


def test_the_page_says_which_part_carries_the_result(tmp_path: Path) -> None:
    settings = suite("ablation", "only=[full,gidm_random,frames_near]")
    arms, _ = run.plan(settings)
    draw = np.random.default_rng(1)
    base = {seed: draw.integers(1, 6, 60) for seed in (0, 1, 2)}
    same = {seed: rollout(np.roll(lengths, 7)) for seed, lengths in base.items()}
    found = {"full": {seed: rollout(lengths) for seed, lengths in base.items()}, "frames_near": same}
    found["gidm_random"] = {0: rollout(base[0] - 1), 1: rollout(base[1] - 1)}  # its third is not there yet
    errors = {"loss": {1000: 0.17}, "held_out_action_error": {100: 0.3, 200: 0.2}}
    record = {
        "done": "8 of 9",
        "protocol": found["full"][0].protocol,
        "versions": {},
        "steps": {"data-1": {}},
    }
    made = {name: {"policy": ["commit a", "torch 2"]} for name in found}
    made["frames_near"] = {"policy": ["commit a", "commit b", "torch 2"]}
    record |= {"arms": report.summary(arms, found, made), "training": {"full": {0: errors}}}
    said = report.verdict(record["arms"], "240")
    assert said[0] == "Beyond chance: “GIDM from random weights” against “DeFI”: -1.00 [-1.00, -1.00]."
    assert said[1].startswith("Within chance: “latent actions of frames 0 and 1” against “DeFI”: ")
    assert said[2].startswith("Seeds alone move an arm by up to ")
    mixed = "“latent actions of frames 0 and 1” and “DeFI” (policy: commit b)"
    assert said[3:] == [f"Not made by the same code: {mixed}."]
    page = report.write_page(tmp_path / "report.html", settings, arms, record).read_text()
    assert page.count("data:image/svg+xml") == 2 and "3.28" in page and "0.170" in page and said[0] in page
    curves = suite("few")
    arms = run.plan(curves)[0]
    record["arms"] = report.summary(arms, dict.fromkeys(arms, found["full"]), {})
    record["training"] = {}
    page = report.write_page(tmp_path / "few.html", curves, arms, record).read_text()
    assert page.count("data:image/svg+xml") == 1 and "Error on held-out" not in page


# ---------------------------------------------------------------- at work


SMOKE = ("size=smoke", "only=[full,gidm_random]", "suite=ablation")


def start(output: Path, *settings: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "experiments.run", f"output={output}", *settings]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment, text=True, cwd=ROOT, **pipes)


def here(output: Path, *settings: str) -> str:
    """The same in this process, whose server of processes all tests share; returns what it printed."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(sys, "argv", ["run", f"output={output}", *settings])
        GlobalHydra.instance().clear()
        run.main()
    return said.getvalue()


def records(output: Path) -> dict[str, dict[str, Any]]:
    return {file.parent.name: json.loads(file.read_text()) for file in output.glob("steps/*/step.json")}


def results(output: Path, name: str) -> dict[str, Any]:
    return json.loads((output / f"{name}-smoke" / "results.json").read_text())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms of the ablation, killed in the middle and continued by two processes at once."""
    pytest.importorskip("pybullet")
    output = tmp_path_factory.mktemp("experiments")
    killed = start(output, *SMOKE)
    while not any(each["name"] == "gfdm" for each in records(output).values()):
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = {key: each for key, each in records(output).items() if each["done"]}
    assert {each["name"] for each in before.values()} >= {"data", "vae", "latents"}
    (output / "before.json").write_text(json.dumps(before))
    other = start(output, *SMOKE, "task=1/2")
    said = [here(output, *SMOKE), other.communicate(timeout=900)[0]]
    assert other.returncode == 0, said[1]
    (output / "said.json").write_text(json.dumps(said))
    return output


def test_a_killed_suite_continues_and_shares_its_work(work: Path) -> None:
    found, before = records(work), json.loads((work / "before.json").read_text())
    assert all(found[key] == each for key, each in before.items())  # not done again
    assert all(each["done"] for each in found.values())
    names = [each["name"] for each in found.values()]
    assert {name: names.count(name) for name in names} == {
        **dict.fromkeys(("data", "vae", "latents", "gfdm", "features", "held_out"), 1),
        **dict.fromkeys(("gidm", "policy", "rollout"), 2),
    }
    begun = [line for said in json.loads((work / "said.json").read_text()) for line in said.splitlines()]
    begun = [line.partition(";")[0] for line in begun if line.endswith("of work left")]
    assert len(begun) == len(set(begun)) == len(found) - len(before)  # nobody did what another had
    assert results(work, "ablation")["done"] == "2 of 10"
    page = (work / "ablation-smoke" / "report.html").read_text()
    assert "learns nothing" in page and "GIDM from random weights" in page


def test_what_is_done_is_not_done_again(work: Path) -> None:
    """Nor what only steps that are done would need: stored features may be deleted."""
    features = next(work.glob("steps/features-*"))
    away = features.rename(work / "away")
    before = {path: path.stat().st_mtime_ns for path in (work / "steps").rglob("*") if path.name != ".lock"}
    assert "Report: " in here(work, *SMOKE)
    assert before == {path: path.stat().st_mtime_ns for path in before} and not features.exists()
    away.rename(features)


ARMS = [("few", "all_10", ["all_100", "all_10"]), ("video", "play_4", ["play_4"]), ("full", "full", ["full"])]


@pytest.mark.parametrize(("name", "arm", "shown"), ARMS)
def test_other_suites_take_over_what_is_there(work: Path, name: str, arm: str, shown: list[str]) -> None:
    """In `few`, all demonstrations give the whole policy of the ablation, which has been rolled out."""
    before = set(records(work))
    here(work, "size=smoke", f"suite={name}", f"only=[{arm}]")
    found = results(work, name)
    assert list(found["arms"]) == shown
    assert found["done"] == f"{len(shown)} of {len(suite(name)['arms'])}"
    made = [records(work)[key]["name"] for key in set(records(work)) - before]
    if name != "video":  # its data are its own
        assert not {"data", "vae", "gfdm", "gidm"} & set(made)


def test_a_probe_reads_what_the_policy_sees(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    stores = {
        n: next(k for k, each in records(work).items() if each["name"] == n) for n in ("features", "held_out")
    }
    pair = ",".join(str(work / "steps" / key / "out") for key in stores.values())
    monkeypatch.setattr(sys, "argv", ["probe", f"output={tmp_path / 'probe'}", f"+stores.trained=[{pair}]"])
    GlobalHydra.instance().clear()
    probe.main()
    found = json.loads((tmp_path / "probe" / "probe.json").read_text())["trained"]
    assert list(found) == ["instruction", "features, first frame", "features, all frames"]
    assert all(scores.keys() == {"actions", "doors, lights", "blocks"} for scores in found.values())
    assert "features, all frames" in capsys.readouterr().out


def test_a_probe_finds_what_is_there_and_nothing_else() -> None:
    """Made-up inputs: one that holds the target, one of noise; where nothing moves there is no score."""
    draw = np.random.default_rng(0)

    def made(count: int) -> probe.Probed:
        inputs = {"right": draw.normal(size=(count, 5)), "noise": draw.normal(size=(count, 5))}
        targets = {"actions": inputs["right"] @ np.arange(10).reshape(5, 2), "blocks": np.zeros((count, 9))}
        return probe.Probed(inputs, targets, np.arange(count) // 10)

    found = probe.probe(made(200), made(100))
    assert found["right"]["actions"] > 0.99 and found["noise"]["actions"] < 0.1
    assert found["right"]["blocks"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_every_arm_runs(work: Path, name: str) -> None:
    here(work, "size=smoke", f"suite={name}")
    arms = suite(name)["arms"]
    assert results(work, name)["done"] == f"{len(arms)} of {len(arms)}"


def test_what_fails_is_named_and_the_rest_is_done(tmp_path: Path) -> None:
    """A command without its data; what needs it is left out."""
    steps = {
        "data": {"run": "Step2_GIDM.train", "seconds": [1], "data": {"root": str(tmp_path / "nowhere")}},
        "rollout": {"run": "Step3_DeFI.rollout", "seconds": [1], "checkpoint": "@data"},
    }
    runs = build_runs(steps, read_arms({"one": {"title": ""}}), [0])
    workshop = Workshop(tmp_path, distinct_steps(runs))
    workshop.work(lambda step: pytest.fail(f"{step.key} is not done"))
    data, end = (step.key for step in runs[0].last.all())
    assert workshop.failed[data].startswith(f"exit code 2: error: {tmp_path / 'nowhere'}")
    assert workshop.failed[end] == f"left out: {data} failed"
    assert not workshop.record(data)["done"] and not workshop.record(end)


def test_a_signal_lets_the_command_save(work: Path, tmp_path: Path) -> None:
    """SIGTERM to this process while a training runs: exit code 75, and the same again would continue."""
    data = next(work.glob("steps/data-*/out"))
    trainer = {"max_steps": 10**6, "log_every": 1, "preview_every": 0}
    section = {"run": "Step2_GIDM.train", "seconds": [1], "data": {"root": str(data)}, "trainer": trainer}
    step = build_runs({"rollout": section}, read_arms({"one": {"title": ""}}), [0])[0].last
    workshop = Workshop(tmp_path, {step.key: step})

    def stop() -> None:
        while not (workshop.place(step.key) / "metrics.jsonl").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit) as left:
        workshop.work(lambda step: pytest.fail(f"{step.key} is not done"))
    assert left.value.code == STOPPED and not workshop.failed
    assert find_checkpoint(workshop.place(step.key), "gidm")
    record = workshop.record(step.key)
    assert not record["done"] and record["seconds"] > 0
    assert again(workshop.place(step.key), step) == ["resume=true"]
