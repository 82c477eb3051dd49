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
from rich.console import Console

pytest.importorskip("pybullet")

from defi.collecting import smooth_noise, start_folder
from defi.config import CONFIG_DIR, typed
from defi.data.calvin import CalvinFolder, frame_name
from defi.errors import UserError
from defi.sim import sessions
from defi.sim.collect import collect
from defi.sim.play import REST, PlayConfig, observe_situation
from defi.sim.scenes import FAMILIES, builtin
from defi.sim.sequences import initial_states, shortest_path, start_state
from defi.sim.sessions import SESSIONS, CollectConfig
from defi.sim.tasks import INSTRUCTIONS, TASKS
from defi.sim.world import World

QUIET = Console(quiet=True)
SMALL = (
    "tasks=[open_drawer,close_drawer,turn_on_led,turn_off_led]",
    "scenes=[A,B]",
    "variations=1",
    "demos_per_task=2",
    "demos_per_session=3",
    "validation.demos_per_task=1",
    "static_size=24",
    "gripper_size=16",
)


def read_config(output: Path, *overrides: str) -> CollectConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = compose("collect", [f"output={output}", *SMALL, *overrides])
    return typed(CollectConfig, cfg, "collect")


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and SESSIONS not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("collect") / "data"
    config = read_config(output, "workers=1")
    collect(config, start_folder(config), QUIET)
    return output


# planning


def test_a_path_makes_a_task_possible() -> None:
    state = dict.fromkeys(("led", "lightbulb", "grasped"), 0) | {"slider": "left", "drawer": "closed"}
    state |= {"red_block": "table", "blue_block": "slider_left", "pink_block": "slider_right"}
    assert shortest_path(state, "open_drawer", []) == ("open_drawer",)
    assert shortest_path(state, "close_drawer", ["open_drawer", "turn_on_led"]) == (
        "open_drawer",
        "close_drawer",
    )
    path = shortest_path(state, "place_in_drawer")
    assert len(path) == 3
    assert path[-1] == "place_in_drawer"
    assert "open_drawer" in path
    assert shortest_path(state, "close_drawer", ["turn_on_led"]) is None


def test_tasks_are_dealt_evenly(tmp_path: Path) -> None:
    planned = sessions.plan(read_config(tmp_path / "x", "demos_per_task=8", "validation.demos_per_task=2"))
    training = [session for session in planned if session.split == "training"]
    dealt = [task for session in training for task in session.tasks]
    assert {task: dealt.count(task) for task in dealt} == dict.fromkeys(
        ("open_drawer", "close_drawer", "turn_on_led", "turn_off_led"), 8
    )
    scenes = [session.scene for session in training]
    assert scenes == sorted(scenes)
    assert abs(scenes.count("A") - scenes.count("B")) <= 1
    assert {session.variation for session in training} == {None, 1}
    assert {session.scene for session in planned if session.split == "validation"} == {"D"}


def test_noise_is_smooth_and_of_the_given_size() -> None:
    config = PlayConfig(1, 0.3, 0.1, 0.9, 0, 0, 0, 0, 1, 1)
    scale = np.random.default_rng(0).uniform()
    draws = smooth_noise(config, np.random.default_rng(0))
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
    counts = {task: [span.task for span in data.spans].count(task) for task in TASKS}
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
    config = read_config(tmp_path / "data", "seed=1")
    first = sessions.plan(config)[0]
    sessions.collect_session(first, config, tmp_path / "data")
    frame = (first.folder(tmp_path / "data") / frame_name(0)).read_bytes()
    assert frame != (collected / "training" / "episode_0000000.npz").read_bytes()


def finished_sessions(output: Path) -> list[Path]:
    return sorted((output / SESSIONS).glob("*[0-9]/record.json"))


def test_neither_a_kill_nor_the_number_of_workers_matters(collected: Path, tmp_path: Path) -> None:
    """Killed after its first session, a run keeps that and ends as one worker alone would have ended."""
    output = tmp_path / "data"
    command = [sys.executable, "-m", "defi.sim.collect", f"output={output}", *SMALL, "workers=2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and not finished_sessions(output):
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(workers, timeout=60)[1]
    kept = {path: path.stat().st_mtime_ns for path in finished_sessions(output)}
    assert kept
    config = read_config(output, "resume=true", "workers=2")
    collect(config, start_folder(config), QUIET)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(output) == contents(collected)


def test_numbering_the_frames_can_be_repeated(collected: Path) -> None:
    """As after a kill between the first frame that got its number and the last."""
    before = contents(collected)
    training = [each for each in sessions.plan(read_config(collected)) if each.split == "training"]
    first = training[0].folder(collected)
    last = sessions.Record.read(first).frames - 1
    os.replace(collected / "training" / f"episode_{last:07d}.npz", first / frame_name(last))
    (collected / "training" / "ep_lens.npy").unlink()
    sessions.assemble(training, collected)
    assert contents(collected) == before


# mistakes


def test_an_existing_output_is_left_alone(collected: Path) -> None:
    before = contents(collected)
    with pytest.raises(UserError, match="exists and is not empty"):
        start_folder(read_config(collected))
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        start_folder(read_config(collected, "resume=true", "seed=5"))
    assert contents(collected) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks=[open_drawr]", "open_drawr: no such task; did you mean open_drawer"),
        ("tasks=[]", "name at least one"),
        ("scenes=[A,D]", "scenes: D has no variations to train on; set variations=0"),
        ("scenes=null", "scenes: there is no scene None"),
        ("scenes=[E]", "scenes: there is no scene E; choose from A, B, C, D"),
        ("validation.scenes=[Z]", "validation.scenes: there is no scene Z"),
        ("demos_per_task=0", "demos_per_task=0: must be 1 or more"),
        ("workers=two", "workers=two: .* could not be converted to Integer"),
        ("play.hold=0", "play.hold=0: must be 1 or more"),
        ("play.attempts=0", "play.attempts=0: must be 1 or more"),
        ("seed=-1", "seed=-1: must be 0 or more"),
        ("play.noise_correlation=1.5", "play.noise_correlation=1.5: must lie in 0 … 1"),
        ("play.noise_rotation=-0.1", "play.noise_rotation=-0.1: must be 0 or more"),
        ("play.noise_position=inf", "play.noise_position=inf: must be 0 or more"),
        ("play.reset=2", "play.reset=2.0: must lie in 0 … 1"),
        ("play.reset=often", "play.reset=often: .* could not be converted to Float"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_config(tmp_path / "data", override)


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "defi.sim.collect", f"output={tmp_path / 'data'}", *SMALL, "workers=1"]
    small = ["demos_per_task=1", "demos_per_session=4", "scenes=[A]", "validation.demos_per_task=0"]
    run = subprocess.run([*command, *small], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "open_drawer" in run.stdout
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    data = CalvinFolder(tmp_path / "data" / "training")
    assert manifest["splits"]["training"]["frames"] == len(data.frame_ids)
    assert manifest["splits"]["training"]["fingerprint"] == data.fingerprint
    assert not (tmp_path / "data" / SESSIONS).exists()
    again = subprocess.run([*command, *small], capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "overwrite=true" in again.stderr


def test_success_is_measured_without_recording(tmp_path: Path) -> None:
    """Play without pictures: no frames, and the same numbers whatever the number of workers."""
    manifests = []
    for workers in (1, 2):
        output = tmp_path / f"{workers}"
        command = [sys.executable, "-m", "defi.sim.collect", f"output={output}", *SMALL]
        subprocess.run([*command, f"workers={workers}", "record=false"], check=True, capture_output=True)
        assert sorted(path.name for path in output.iterdir()) == ["manifest.json", "settings.json"]
        manifests.append(json.loads((output / "manifest.json").read_text()))
    assert manifests[0] == manifests[1]
    assert manifests[0]["success"]["open_drawer"]["solved"] >= 3
    attempts = [attempt for session in manifests[0]["sessions"] for attempt in session["attempts"]]
    assert sum(numbers["attempts"] for numbers in manifests[0]["success"].values()) == len(attempts)


def test_initial_states_reach_every_task() -> None:
    assert all(any(shortest_path(state, task) for state in initial_states()) for task in TASKS)
