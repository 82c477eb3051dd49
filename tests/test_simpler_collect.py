"""Demonstrations of SIMPLER's scripted policies: records are true, whatever the workers, killed or not."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from defi.benchmarks.simpler import check, demonstrations
from defi.benchmarks.simpler.collect import Records, collect, split, write_data, write_manifest
from defi.benchmarks.simpler.demonstrations import (
    FOLDER,
    UNITS,
    CollectConfig,
    Demonstration,
    demonstrate,
    plan,
    play,
    shrunk,
)
from defi.benchmarks.simpler.environment import Simpler
from defi.collecting import check_same, start_folder
from defi.config import CONFIG_DIR, typed
from defi.data import Dataset, open_dataset
from defi.errors import UserError
from defi.picture import encode_picture

QUIET = Console(quiet=True)
CARROT = "widowx_carrot_on_plate"
SMALL = (f"tasks=[{CARROT}]", "demos_per_task=2", "held_out=0.5", "noise_probability=0", "hold=3")
SMALL += ("image_size=[64,48]",)


def read_config(output: Path, root: Path, *overrides: str) -> CollectConfig:
    given = [f"output={output}", f"simpler_root={root}", *SMALL, *overrides]
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = compose("collect_simpler", given)
    return typed(CollectConfig, cfg, "collect_simpler")


@pytest.fixture(scope="module")
def root() -> Path:
    """The assets, for physics without pictures."""
    pytest.importorskip("sapien", reason="SAPIEN 3 is not installed: pip install .[simpler]")
    reference = os.environ.get("DEFI_REFERENCE_DIR", Path(__file__).parents[2] / "shared" / "reference")
    folder = Path(reference, "simpler_root")
    if not folder.is_dir():
        pytest.skip(f"no assets at {folder}")
    return folder


@pytest.fixture(scope="module")
def drawn(root: Path) -> Path:
    try:
        check.drawing()
    except UserError as error:
        pytest.skip(str(error))
    return root


@pytest.fixture(scope="module")
def collected(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CollectConfig, Records]:
    """By one process, into LeRobot's format."""
    config = read_config(tmp_path_factory.mktemp("collect") / "data", drawn, "workers=1")
    records = collect(config, start_folder(config), QUIET)
    write_manifest(Path(config.output), config, records)
    return config, records


def opened(folder: str, form: str, split: str) -> Dataset:
    return open_dataset({"format": form, "root": folder, "split": split})


# ------------------------------------------------------------ without a simulator


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks=[carrot]", "tasks=carrot: must be one of widowx_carrot_on_plate"),
        ("tasks=[]", r"tasks=\[\]: name one or more"),
        (f"tasks=[{CARROT},google_robot_pick_coke_can]", "of two robots"),
        ("starts=official", "starts=official: .* record=false"),
        ("format=hdf5", "format=hdf5: must be one of lerobot, rlds"),
        ("pictures=jpeg", "pictures=jpeg: must be one of images, av1, h264"),
        ("image_size=[64]", r"image_size=\[64\]: must be \[width, height\]"),
        ("held_out=1", "held_out=1.0: must be a share"),
        ("attempts=0", "attempts=0: must be 1 or more"),
        ("workers=0", "workers=0: must be 1 or more"),
        ("seed=-1", "seed=-1: must be 0 or more"),
        ("noise_correlation=1.5", "noise_correlation=1.5: must lie in 0 … 1"),
        ("noise_position=-1", "noise_position=-1.0: must be 0 or more"),
        ("noise_probability=2", "noise_probability=2.0: must lie in 0 … 1"),
        ("held_out=0.6", "held_out=0.6: of demos_per_task=2 none are left to train on"),
    ],
)
def test_simpler_wrong_values_are_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_config(tmp_path / "data", tmp_path, override)


def test_simpler_what_cannot_be_written_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"image_size=\[65, 48\]: videos need even sizes"):
        read_config(tmp_path, tmp_path, "pictures=h264", "image_size=[65,48]")
    monkeypatch.setitem(sys.modules, "defi.data.lerobot.write", None)  # as without pyarrow
    with pytest.raises(UserError, match="^LeRobot's format needs the package pyarrow; pip install pyarrow$"):
        read_config(tmp_path, tmp_path)
    read_config(tmp_path, tmp_path, "format=rlds")
    read_config(tmp_path, tmp_path, "record=false")


def test_simpler_official_starts_are_not_disturbed_unless_asked_for(tmp_path: Path) -> None:
    official = "record=false", "starts=official"
    for given, probability in (("null", 0), ("0.5", 0.5)):
        config = read_config(tmp_path, tmp_path, *official, f"noise_probability={given}")
        assert config.noise_probability == probability
    config = read_config(tmp_path, tmp_path, "noise_probability=null")
    assert config.noise_probability == demonstrations.DISTURBED > 0


def made_demonstration(config: CollectConfig, output: Path, number: int, steps: int = 3) -> Demonstration:
    """A file of one that is made up, each picture of another colour."""
    demo = Demonstration(CARROT, number)
    told = [{"task": CARROT, "solved_after": 1, "disturbed": False, "steps": steps}]
    coded = [encode_picture(np.full((48, 64, 3), 9 * number + k, np.uint8), "PNG") for k in range(steps)]
    demo.file(output).parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        demo.file(output),
        attempts=json.dumps(told),
        instruction="put carrot on plate",
        actions=np.full((steps, 7), number, np.float32),
        state=np.zeros((steps, 7), np.float32),
        pictures=np.frombuffer(b"".join(coded), np.uint8),
        ends=np.cumsum([len(each) for each in coded]),
    )
    return demo


def test_simpler_finished_demonstrations_are_written_in_another_format(tmp_path: Path) -> None:
    """What they do not depend on can change until the data set is complete; strangers' folders stay."""
    output, given = tmp_path / "data", ["noise_probability=null", "workers=1", "resume=true"]
    config = read_config(output, tmp_path, *given)
    start_folder(config)
    for number in range(3):
        made_demonstration(config, output, number)
    (output / "notes").mkdir()
    (output / "notes/mine.txt").write_text("mine")
    (output / FOLDER / "written/data").mkdir(parents=True)  # of a run that was killed
    given += ["demos_per_task=3", "held_out=0.3"]
    for form in ("lerobot", "rlds"):
        config = read_config(output, tmp_path, *given, f"format={form}")
        records = collect(config, start_folder(config), QUIET)
        data = opened(str(output), form, "train")
        assert data.lengths.tolist() == [3, 3] and data.robot().gripper == config.robot.gripper
        for number in range(2):
            episode = data.episode(number)
            pictures = data.read(episode, [2, 0], data.cameras)["image_0"]
            step = int(data.motions.actions[3 * number, 0])
            assert pictures[:, 0, 0, 0].tolist() == [9 * step + 2, 9 * step]
        assert (output / "notes/mine.txt").read_text() == "mine" and not list(
            output.glob(f"{FOLDER}/written/*")
        )
    with pytest.raises(UserError, match=r"started with other settings \(hold\)"):
        start_folder(read_config(output, tmp_path, *given, "hold=4"))
    # Nothing to train on ends before anything is deleted.
    failed = dict.fromkeys(records, [{"solved_after": None}])
    with pytest.raises(UserError, match="none of them to train on"):
        write_data(config, output, failed, QUIET)
    assert (output / "data").is_dir() and (output / "1.0.0").is_dir()
    # What is complete has no demonstrations left to write otherwise.
    write_manifest(output, config, records)
    settings = json.loads((output / "manifest.json").read_text())["settings"]
    with pytest.raises(UserError, match=r"started with other settings \(format\)"):
        check_same(output, settings, read_config(output, tmp_path, *given, "format=lerobot").settings())


def test_simpler_pictures_are_read_when_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, item = [], np.lib.npyio.NpzFile.__getitem__
    config = read_config(tmp_path, tmp_path)
    demos = [made_demonstration(config, tmp_path, number) for number in range(6)]
    monkeypatch.setattr(
        np.lib.npyio.NpzFile, "__getitem__", lambda self, name: read.append(name) or item(self, name)
    )
    data = demonstrations.Demonstrations(tmp_path, demos, config.robot)
    assert data.motions.actions[::3, 0].tolist() == [*range(6)] and "pictures" not in read
    for number in range(6):
        episode = data.episode(number)
        for _, seen in data.blocks(episode, 2):
            assert (seen["image_0"] // 9 == number).all()
    assert read.count("pictures") == 6


def test_simpler_what_is_kept_and_held_out(tmp_path: Path) -> None:
    """Of each task the same share of what succeeded, rounded up; of official starts no more than exist."""
    tasks = (CARROT, "widowx_stack_cube")
    config = read_config(tmp_path, tmp_path, f"tasks=[{','.join(tasks)}]", "demos_per_task=8", "held_out=0.2")
    solved, failed = [{"solved_after": None}, {"solved_after": 9}], [{"solved_after": None}]
    records = {demo: failed if demo.number == 5 else solved for demo in plan(config)}
    training, held_out = split(config, records)
    assert {demo.task for demo in held_out} == set(tasks) and len(held_out) == 4
    assert len(training) == 10 and not set(training) & set(held_out)
    assert 5 not in {demo.number for demo in training + held_out}
    with pytest.raises(UserError, match="0 demonstrations, none of them to train on"):
        split(config, dict.fromkeys(records, failed))
    few = replace(config, record=False, starts="official", demos_per_task=100)
    random = np.random.default_rng(0)
    starts = [demo.start(few, random).index for demo in plan(few)]
    assert starts == [*range(24), *range(24)]
    four = replace(few, demos_per_task=4)
    assert [demo.start(four, random).index for demo in plan(four)] == [0, 6, 12, 18] * 2


def test_simpler_pictures_shrink_as_policies_shrink_them() -> None:
    from Step3_DeFI.observation import observe

    picture = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    assert shrunk(picture, [128, 96]).shape == (96, 128, 3)
    seen = observe({"image_0": picture}, ["image_0"], 64)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(shrunk(picture, [64, 64]), seen)


# ------------------------------------------------------------ physics alone


def test_simpler_noise_is_executed_and_not_recorded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executed, step = [], Simpler.step
    monkeypatch.setattr(Simpler, "step", lambda self, action: executed.append(action) or step(self, action))
    disturbance = np.random.default_rng(0).normal(size=(200, 7)) * [0.2] * 7
    disturbance[:, 6] = 0
    monkeypatch.setattr(demonstrations, "smooth_noise", lambda *_: iter(disturbance))
    config = read_config(Path("none"), root, "record=false", "noise_probability=1", "max_steps=12")
    random = np.random.default_rng(1)
    played = play(Simpler(root, drawn=False), Demonstration(CARROT, 0).start(config, random), config, random)
    assert played.disturbed and len(played.actions) == len(executed) == 12 and played.solved_after is None
    assert np.allclose(np.subtract(executed, played.actions), disturbance[:12] * UNITS)


def test_simpler_failures_are_counted_and_drawn_anew(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to a limit, each from another start; what is there is not tried again."""
    starts = []
    monkeypatch.setattr(demonstrations, "play", lambda simpler, start, *rest: starts.append(start) or played)
    played = demonstrations.Played([], [], [np.zeros(7)] * 4, None, False)
    config = read_config(tmp_path, root, "record=false", "attempts=3")
    attempts = demonstrate(Demonstration(CARROT, 0), config, tmp_path)
    assert len(attempts) == 3 and {attempt["solved_after"] for attempt in attempts} == {None}
    assert len({start.objects for start in starts}) == 3
    assert demonstrate(Demonstration(CARROT, 0), config, tmp_path) == attempts and len(starts) == 3
    demonstrate(Demonstration(CARROT, 1), config, tmp_path)
    (tmp_path / "other").mkdir()
    demonstrate(Demonstration(CARROT, 0), replace(config, seed=1), tmp_path / "other")
    assert len({start.objects for start in starts}) == 9


def test_simpler_rates_on_official_starts(root: Path, tmp_path: Path) -> None:
    """The command, in two processes: only a table and the manifest."""
    command = [sys.executable, "-m", "defi.benchmarks.simpler.collect", f"output={tmp_path / 'rates'}"]
    command += [f"simpler_root={root}", *SMALL, "record=false", "starts=official", "workers=2"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert CARROT in run.stdout and "nothing recorded" in run.stdout
    assert sorted(each.name for each in (tmp_path / "rates").iterdir()) == ["manifest.json", "settings.json"]
    told = json.loads((tmp_path / "rates/manifest.json").read_text())["success"][CARROT]
    assert told["attempts"] == 2 and told["solved"] >= 1
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "resume=true" in again.stderr and again.stderr.count("\n") == 1


# ------------------------------------------------------------ with pictures


def test_simpler_moments_look_as_they_looked(drawn: Path) -> None:
    """Where the camera stands still to the last bit; else but for a few pixels at edges."""
    for task, most in ((CARROT, 0), ("google_robot_open_middle_drawer", 30)):
        simpler, seen, moments = Simpler(drawn), [], []
        simpler.reset(demonstrations.episodes(task)[3])
        for step in range(3):
            moments.append(simpler.moment())
            seen += simpler.observe().images.values()
            simpler.step(np.array([0.01, 0.01 * step, -0.02, 0, 0, 0.1, -1]))
        assert not np.array_equal(seen[0], seen[2])
        for number in (2, 0, 1):
            different = (simpler.picture(moments[number]) != seen[number]).any(-1)
            assert different.sum() <= most


def test_simpler_demonstrations_are_as_recorded(collected: tuple[CollectConfig, Records]) -> None:
    """Executed from the same start the recorded actions lead through the recorded states to success, and
    pictures show the moments before them."""
    config, records = collected
    simpler = Simpler(Path(config.simpler_root))
    for name, (demo,) in zip(("train", "val"), split(config, records)):
        data, attempt = opened(config.output, "lerobot", name), records[demo][-1]
        assert len(data) == 1 and data.fps == 5 and data.lengths[0] == attempt["solved_after"] + config.hold
        episode = data.episode(0)
        assert (episode.text(0), episode.task) == ("put carrot on plate", CARROT)
        random = np.random.default_rng([config.seed, *CARROT.encode(), demo.number, len(records[demo]) - 1])
        simpler.reset(demo.start(config, random))
        assert np.array_equal(picture_of(simpler, config), data.read(episode, [0], ["image_0"])["image_0"][0])
        for action, state in zip(data.motions.actions, data.motions.state):
            seen = demonstrations.STATES["widowx"](simpler.observe(pictures=False), simpler.scene)
            assert np.abs(seen - state)[:6].max() < 3e-3
            last = picture_of(simpler, config) if simpler.steps == data.lengths[0] - 1 else None
            solved = simpler.step(action)["success"]
            assert solved == (simpler.steps >= attempt["solved_after"])
        recorded = data.read(episode, [simpler.steps - 1], ["image_0"])["image_0"][0]
        assert np.abs(np.subtract(last, recorded, dtype=float)).mean() < 0.5


def picture_of(simpler: Simpler, config: CollectConfig) -> np.ndarray:
    (picture,) = simpler.observe().images.values()
    return shrunk(picture, config.image_size)


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and not {FOLDER, ".defi"} & {*file.parts}]
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(files)}


def test_simpler_neither_a_kill_nor_the_number_of_workers_matters(
    collected: tuple[CollectConfig, Records], tmp_path: Path
) -> None:
    """Killed after its first demonstration, a run keeps that and ends as one worker alone would have."""
    output, alone = tmp_path / "data", Path(collected[0].output)
    command = [sys.executable, "-m", "defi.benchmarks.simpler.collect", f"output={output}", *SMALL]
    command += [f"simpler_root={collected[0].simpler_root}", "workers=2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(output.glob(f"{FOLDER}/*.npz")):
        time.sleep(0.1)
    process.kill()
    process.wait()
    kept = {file: file.stat().st_mtime_ns for file in output.glob(f"{FOLDER}/*.npz")}
    assert kept
    # By the files: a run that resumes does not make these anew, and removes them when it is through.
    config = read_config(output, Path(collected[0].simpler_root), "resume=true", "workers=2")
    write_manifest(output, config, collect(config, start_folder(config), QUIET))
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert contents(output) == contents(alone)


def test_simpler_as_rlds(collected: tuple[CollectConfig, Records], tmp_path: Path) -> None:
    """The same demonstrations, with the splits that `data=rlds` takes by itself."""
    first, output = collected[0], tmp_path / "data"
    config = read_config(output, Path(first.simpler_root), "format=rlds", "workers=1")
    start_folder(config)
    shutil.copytree(Path(first.output, FOLDER), output / FOLDER)
    collect(config, output, QUIET)
    section = {"format": "rlds", "root": str(output)}
    for part, name in (("training", "train"), ("held_out", "val")):
        data, before = open_dataset(section, part), opened(first.output, "lerobot", name)
        assert data.fps == before.fps and data.robot() == before.robot()
        assert np.array_equal(data.motions.actions, before.motions.actions)
        assert np.array_equal(data.motions.state, before.motions.state)
        episode, other = data.episode(0), before.episode(0)
        assert episode.texts == other.texts and episode.length == other.length
        for found, known in zip(data.blocks(episode), before.blocks(other)):
            assert np.array_equal(found[1]["image_0"], known[1]["image_0"])
