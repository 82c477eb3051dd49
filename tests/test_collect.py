"""Collecting demonstrations: records are true, whatever the number of workers, killed or not."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console

pytest.importorskip("pybullet")

from defi.calvin import CalvinFolder
from defi.config import CONFIG_DIR
from defi.errors import UserError
from defi.sim import units
from defi.sim.collect import collect, read_settings, start_folder
from defi.sim.experts import EXPERT_TASKS
from defi.sim.play import REST, PlaySettings, path_to, smooth_noise, unit_frame
from defi.sim.scenes import FAMILIES, builtin
from defi.sim.sequences import initial_states, start_state
from defi.sim.situation import observe_situation
from defi.sim.tasks import INSTRUCTIONS, TASK_TABLE
from defi.sim.units import UNITS
from defi.sim.world import World

QUIET = Console(quiet=True)
SMALL = (
    "tasks=[open_drawer,close_drawer,turn_on_led,turn_off_led]",
    "scenes=[A,B]",
    "variations=1",
    "demos_per_task=2",
    "demos_per_unit=3",
    "validation.demos_per_task=1",
    "static_size=24",
    "gripper_size=16",
)


def config(output: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        return compose("collect", [f"output={output}", *SMALL, *overrides])


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and UNITS not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("collect") / "data"
    cfg = config(output)
    collect(read_settings(cfg), start_folder(cfg, read_settings(cfg)), 1, QUIET)
    return output


# planning


def test_a_path_makes_a_task_possible() -> None:
    state = dict.fromkeys(("led", "lightbulb", "grasped"), 0) | {"slider": "left", "drawer": "closed"}
    state |= {"red_block": "table", "blue_block": "slider_left", "pink_block": "slider_right"}
    assert path_to(state, ["open_drawer"], []) == ["open_drawer"]
    assert path_to(state, ["close_drawer"], ["open_drawer", "turn_on_led"]) == ["open_drawer", "close_drawer"]
    path = path_to(state, ["place_in_drawer"], list(TASK_TABLE))
    assert len(path) == 3
    assert path[-1] == "place_in_drawer"
    assert "open_drawer" in path
    assert path_to(state, ["close_drawer"], ["turn_on_led"]) is None


def test_tasks_are_dealt_evenly(tmp_path: Path) -> None:
    planned = units.plan(
        read_settings(config(tmp_path / "x", "demos_per_task=8", "validation.demos_per_task=2"))
    )
    training = [unit for unit in planned if unit.split == "training"]
    dealt = [task for unit in training for task in unit.tasks]
    assert {task: dealt.count(task) for task in dealt} == dict.fromkeys(
        ("open_drawer", "close_drawer", "turn_on_led", "turn_off_led"), 8
    )
    scenes = [unit.scene for unit in training]
    assert scenes == sorted(scenes)
    assert abs(scenes.count("A") - scenes.count("B")) <= 1
    assert {unit.variation for unit in training} == {None, 1}
    assert {unit.scene for unit in planned if unit.split == "validation"} == {"D"}


def test_noise_is_smooth_and_of_the_given_size() -> None:
    settings = PlaySettings(1, 0.3, 0.1, 0.9, 0, 0, 0, 0, 1, 1)
    scale = np.random.default_rng(0).uniform()
    draws = smooth_noise(settings, np.random.default_rng(0))
    noise = np.array([next(draws) for _ in range(20_000)])
    np.testing.assert_allclose(noise.std(0), np.array([0.3] * 3 + [0.1] * 3 + [0]) * scale, rtol=0.1)
    steps = [np.corrcoef(noise[:-1, i], noise[1:, i])[0, 1] for i in range(6)]
    np.testing.assert_allclose(steps, 0.9, atol=0.02)


def test_situations_are_read_off_the_world() -> None:
    """In every scene, what the protocol put there is what is seen, once the blocks have settled."""
    for i, name in enumerate(FAMILIES):
        with World(builtin(name), cameras=()) as world:
            for state in initial_states()[i::29]:
                world.reset(*start_state(state))
                for _ in range(REST):
                    world.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
                assert observe_situation(world.state()) == state


# what is recorded


def test_every_task_is_demonstrated(collected: Path) -> None:
    data = CalvinFolder(collected / "training")
    counts = {task: [span.task for span in data.spans].count(task) for task in EXPERT_TASKS}
    for task in ("open_drawer", "close_drawer", "turn_on_led", "turn_off_led"):
        assert counts[task] >= 2
    assert all(span.instruction in INSTRUCTIONS[span.task] for span in data.spans)
    validation = CalvinFolder(collected / "validation")
    assert all(span.instruction == INSTRUCTIONS[span.task][0] for span in validation.spans)
    assert list(data.scenes) == ["A", "B"]
    assert list(validation.scenes) == ["D"]


def test_spans_show_their_task(collected: Path) -> None:
    """Drawer and LED, as recorded, change from a span's first frame to its last."""
    data = CalvinFolder(collected / "training")
    for span in data.spans:
        before, after = (data.frame(i, ("scene_obs",))["scene_obs"] for i in (span.start, span.end))
        moved = {
            "open_drawer": after[1] - before[1] > 0.12,
            "close_drawer": before[1] - after[1] > 0.12,
            "turn_on_led": after[5] - before[5] == 1,
            "turn_off_led": before[5] - after[5] == 1,
        }
        assert moved[span.task], span


def test_frames_follow_each_other(collected: Path) -> None:
    """Within a recording the arm moves by at most its speed per step; actions are within their limits."""
    data = CalvinFolder(collected / "training")
    assert data.frame_ids.tolist() == list(range(len(list(data.folder.glob("episode_*.npz")))))
    for start, end in data.episodes:
        tcp = data.stack("robot_obs", range(start, end + 1))[:, :3]
        assert np.abs(np.diff(tcp, axis=0)).max(initial=0) < 0.06
        actions = data.stack("rel_actions", range(start, end + 1))
        assert np.abs(actions).max() <= 1
        assert np.isin(actions[:, 6], (-1, 1)).all()
    frame = data.frame(0)
    assert frame["rgb_static"].shape == (24, 24, 3)
    assert frame["rgb_gripper"].shape == (16, 16, 3)
    assert frame["rgb_static"].std() > 5


def test_starts_are_those_that_the_previous_task_left(collected: Path) -> None:
    data = CalvinFolder(collected / "training")
    starts = {start for start, _ in data.episodes}
    assert sum(span.start not in starts for span in data.spans) >= len(data.spans) // 3


# the same data, whatever happens


def test_another_seed_gives_other_data(collected: Path, tmp_path: Path) -> None:
    settings = read_settings(config(tmp_path / "data", "seed=1"))
    units.collect_unit(units.plan(settings)[0], settings, tmp_path / "data")
    frame = (tmp_path / "data" / UNITS / units.plan(settings)[0].name / unit_frame(0)).read_bytes()
    assert frame != (collected / "training" / "episode_0000000.npz").read_bytes()


def finished_units(output: Path) -> list[Path]:
    return sorted((output / UNITS).glob("*[0-9]/record.json"))


def test_neither_a_kill_nor_the_number_of_workers_matters(collected: Path, tmp_path: Path) -> None:
    """Killed after its first unit, a run keeps that and ends as one worker alone would have ended."""
    output = tmp_path / "data"
    command = [sys.executable, "-m", "defi.sim.collect", f"output={output}", *SMALL, "workers=2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and not finished_units(output):
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(workers, timeout=60)[1]
    kept = {path: path.stat().st_mtime_ns for path in finished_units(output)}
    assert kept
    cfg = config(output, "resume=true")
    collect(read_settings(cfg), start_folder(cfg, read_settings(cfg)), 2, QUIET)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(output) == contents(collected)


def test_numbering_the_frames_can_be_repeated(collected: Path) -> None:
    """As after a kill between the first frame that got its number and the last."""
    before = contents(collected)
    settings = read_settings(config(collected))
    first = units.plan(settings)[0]
    last = units.read_record(collected / UNITS / first.name).frames - 1
    os.replace(
        collected / "training" / f"episode_{last:07d}.npz", collected / UNITS / first.name / unit_frame(last)
    )
    (collected / "training" / "ep_lens.npy").unlink()
    units.assemble(units.plan(settings), settings, collected)
    assert contents(collected) == before


# mistakes


def test_an_existing_output_is_left_alone(collected: Path) -> None:
    before = contents(collected)
    cfg = config(collected)
    with pytest.raises(UserError, match="exists and is not empty"):
        start_folder(cfg, read_settings(cfg))
    cfg = config(collected, "resume=true", "seed=5")
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        start_folder(cfg, read_settings(cfg))
    assert contents(collected) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks=[open_drawr]", "open_drawr: no such task; did you mean open_drawer"),
        ("tasks=[]", "name at least one"),
        ("scenes=[A,D]", "scenes: D has no variations to train on; set variations=0"),
        ("scenes=[E]", "scenes: there is no scene E; choose from A, B, C, D"),
        ("validation.scenes=[Z]", "validation.scenes: there is no scene Z"),
        ("demos_per_task=0", "demos_per_task=0: expected a whole number of 1 or more"),
        ("workers=two", "workers=two: expected a whole number"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_settings(config(tmp_path / "data", override))


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "defi.sim.collect", f"output={tmp_path / 'data'}", *SMALL, "workers=1"]
    small = ["demos_per_task=1", "demos_per_unit=4", "scenes=[A]", "validation.demos_per_task=0"]
    run = subprocess.run([*command, *small], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "open_drawer" in run.stdout
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    data = CalvinFolder(tmp_path / "data" / "training")
    assert manifest["splits"]["training"]["frames"] == len(data.frame_ids)
    assert manifest["splits"]["training"]["fingerprint"] == data.fingerprint
    assert not (tmp_path / "data" / UNITS).exists()
    again = subprocess.run([*command, *small], capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "overwrite=true" in again.stderr


def test_initial_states_reach_every_expert() -> None:
    states = initial_states()
    assert all(any(path_to(state, [task], EXPERT_TASKS) for state in states) for task in EXPERT_TASKS)
