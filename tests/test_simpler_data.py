"""From Bridge and fractal to SIMPLER: what is trained on, and what of it reaches the simulator."""

import importlib
import importlib.util
import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simpler_fakes
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from policy_fakes import policy_config
from scipy.spatial.transform import Rotation

from defi.benchmarks.adapters import adapt, adapters_between
from defi.benchmarks.simpler.benchmark import Google, WidowX
from defi.config import CONFIG_DIR, compose_preset
from defi.data import Dataset, convert, open_dataset
from defi.data.calvin import calvin_robot
from defi.data.motions import Statistics
from defi.data.rlds.standardise import accumulated, binarised, movements
from defi.engine.data import seed_of
from defi.errors import UserError
from defi.robot.spec import Gripper, Robot, Vector
from Step1_GFDM import adapter as gfdm_adapter
from Step2_GIDM import adapter as gidm_adapter
from Step2_GIDM.data.build import build_pairs
from Step3_DeFI.acting import Policy
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.policy import DeFI
from Step3_DeFI.rollout.config import check_robot
from Step3_DeFI.rollout.remote import _robot
from Step3_DeFI.rollout.results import read_results
from Step3_DeFI.samples import fit_robot
from Step3_DeFI.stages import language_of

WRITERS = {"bridge": simpler_fakes.write_bridge, "fractal": simpler_fakes.write_fractal}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rlds")
    return {name: write(folder) for name, write in WRITERS.items()}


def opened(name: str, root: Path, part: str = "training", **changes: object) -> Dataset:
    """As `data=<name> data.root=<root>` opens it."""
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = compose("look", [f"data={name}", f"data.root={root}", "output=x"])
    values = OmegaConf.to_container(cfg.data)
    return open_dataset(values | changes, part)


def motions(data: Dataset, number: int) -> np.ndarray:
    episode = data.episode(number)
    return data.read_motions(range(episode.start, episode.start + episode.length))


# ------------------------------------------------------------ the rules, beside the loops that they stand for


def binarised_in_a_loop(openness: np.ndarray) -> list[float]:
    found, after = [], float(openness[-1])
    for value in openness[::-1].tolist():
        if value > 0.95 or value < 0.05:
            after = float(value > 0.95)
        found.append(after)
    return found[::-1]


def accumulated_in_a_loop(closing: np.ndarray) -> list[float]:
    opened = [1 if value < -0.1 else -1 if value > 0.1 else 0 for value in closing.tolist()]
    now = next((-change for change in opened if change), 1)
    found = []
    for change in opened:
        now = change or now
        found.append(now / 2 + 0.5)
    return found


def test_gripper_rules_are_octo_s() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 30):
        for _ in range(40):
            openness = rng.choice(np.float32([0, 0.02, 0.3, 0.7, 0.97, 1]), size)
            assert binarised(openness).tolist() == pytest.approx(binarised_in_a_loop(openness))
            closing = rng.choice(np.float32([-1, -0.05, 0, 0, 0, 0.08, 1]), size)
            assert accumulated(closing).tolist() == accumulated_in_a_loop(closing)
    assert binarised(np.float32([1, 0.5, 0.1, 0, 0.6, 1, 0.5])).tolist() == [1, 0, 0, 0, 1, 1, 0.5]
    assert accumulated(np.float32([0, 0, 1, 0, -1, 0])).tolist() == [1, 1, 0, 0, 1, 1]
    assert accumulated(np.float32([0, -1, 0])).tolist() == [0, 1, 1], "what is opened was closed"


def test_movements_are_what_the_state_changes_by_the_short_way_round() -> None:
    state = np.float32([[0, 0, 0, 0, 0, 3.1, 1], [0.1, 0, 0, 0, 0, -3.1, 1], [0.1, 0, -0.2, 0.3, 0, -3.0, 0]])
    expected = [[0.1, 0, 0, 0, 0, 2 * np.pi - 6.2], [0, 0, -0.2, 0.3, 0, 0.1], [0] * 6]
    np.testing.assert_allclose(movements(state), expected, atol=1e-6)


# ------------------------------------------------------------ what is trained on


def test_bridge_s_numbers(roots: dict[str, Path]) -> None:
    with pytest.warns(UserWarning, match="of 5 episodes of train 1 are left out: they have no instruction"):
        data = opened("bridge", roots["bridge"])
    assert (data.cameras, data.fps, data.pair_distance) == (("image_0",), 5, [9, 9])
    assert data.lengths.tolist() == [14, 15, 17, 18], "the first and the last step are left out"
    for number, seed in enumerate((0, 1, 3, 4)):
        commanded, state = simpler_fakes.bridge_motions(np.random.default_rng(seed), 16 + seed)
        moved = np.diff(state[1:, :6].astype(np.float64), axis=0)
        moved[:, 5] = np.where(np.abs(moved[:, 5]) > np.pi, moved[:, 5] + 2 * np.pi, moved[:, 5])
        found = motions(data, number)
        np.testing.assert_allclose(found[:, :6], moved, atol=1e-6)
        assert abs(found[:, 5]).max() < 0.04, "yaw passes π"
        assert found[:, 6].tolist() == pytest.approx(binarised_in_a_loop(commanded[:, 6])[1:-1])
        assert found[-2:, 6].tolist() == pytest.approx([0.7, 0.7]), (
            "as Octo leaves an end that is never reached"
        )
        np.testing.assert_array_equal(found[:, 7:], state[1:-1])
        seen = data.read(data.episode(number), [0], ["image_0"])["image_0"][0]
        first = data.data.frames(int(data.numbers[number]), [1], "observation/image_0")[0]
        np.testing.assert_array_equal(seen, first)
    assert opened("bridge", roots["bridge"], "held_out").lengths.tolist() == [13, 12]
    raw = opened("bridge", roots["bridge"], drop_unlabelled=False, movement=None, gripper=None, trim=[0, 0])
    commanded, _ = simpler_fakes.bridge_motions(np.random.default_rng(2), 18)
    np.testing.assert_array_equal(motions(raw, 2)[:, :7], commanded)
    assert raw.fingerprint != data.fingerprint


def test_fractal_s_numbers(roots: dict[str, Path]) -> None:
    data = opened("fractal", roots["fractal"])
    assert (data.cameras, data.fps, data.pair_distance) == (("image",), 3, [2, 4])
    assert data.lengths.tolist() == [14, 15, 16, 17, 18, 19]
    for number in range(6):
        given, state = simpler_fakes.fractal_motions(np.random.default_rng(number), 14 + number, number % 3)
        found = motions(data, number)
        np.testing.assert_array_equal(found[:, :6], given[:, :6])
        assert found[:, 6].tolist() == accumulated_in_a_loop(given[:, 6])
        np.testing.assert_array_equal(found[:, 7:], state)
    third = 14 // 3
    assert motions(data, 0)[third - 1 : third + 1, 6].tolist() == [1, 0]
    assert motions(data, 1)[[0, 5, 14], 6].tolist() == [0, 1, 0] and motions(data, 2)[:, 6].min() == 1
    assert data.episode(1).texts == ("open top drawer",)


def test_statistics_are_of_what_is_trained_on(roots: dict[str, Path]) -> None:
    for name, root in roots.items():
        data = opened(name, root, index=str(root.parent / "index"))
        robot, rows = fit_robot({"data": data}), np.concatenate([motions(data, i) for i in range(len(data))])
        found = Statistics.of(rows[:, :7])
        assert robot.actions.normalisation == ["bounds"] * 6 + ["none"], "a gripper has two values"
        np.testing.assert_allclose(robot.actions.offset[:6], ((found.low + found.high) / 2)[:6])
        np.testing.assert_allclose(robot.actions.scale[:6], ((found.high - found.low) / 2)[:6])
        assert (robot.actions.low[6], robot.actions.high[6]) == (0, 1)
        assert robot.state.names == {"bridge": WidowX, "fractal": Google}[name]().robot.state.names


def test_pairs_of_stage_2_are_as_far_apart_as_published(roots: dict[str, Path]) -> None:
    for name, apart in (("bridge", [9, 9]), ("fractal", [2, 4])):
        with initialize_config_dir(str(CONFIG_DIR), version_base=None):
            cfg = compose("step2_train", [f"data={name}", f"data.root={roots[name]}", "output=x"])
        assert list(build_pairs(cfg.data, 28).distance) == apart
        cfg.data.distance = [3, 5]
        assert list(build_pairs(cfg.data, 28).distance) == [3, 5]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gripper": "sticky"}, "data.gripper=sticky: must be one of null, binarised, accumulated"),
        ({"movement": "wanted"}, "data.movement=wanted: must be one of null, reached"),
        ({"pair_distance": [9, 2]}, r"data.pair_distance=\[9, 2\]: must be \[low, high\]"),
        ({"trim": [1, 0]}, r"data.movement=reached: an episode's last step reaches nothing; .*trim=\[0,1\]"),
        ({"state": []}, "data.movement=reached: takes 6 or more of both; here .* the state 0"),
        ({"robot": {"hands": 2}}, "data.robot.hands=2: Key 'hands' not in 'Robot'"),
        ({"robot": {"cameras": ["front"]}}, "data.robot.cameras: name them with data.cameras"),
        ({"robot": {"gripper": {"dimension": 7}}}, "robot.gripper.dimension=7: must lie in 0 … 6"),
        ({"robot": {"actions": {"names": ["x"]}}}, "robot: 1 names, but lists of"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(roots: dict[str, Path], changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        opened("bridge", roots["bridge"], **changes)
    assert "\n" not in str(caught.value)


def test_data_without_the_state_that_is_named_are_a_robot_without(
    roots: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    data = opened("fractal", roots["fractal"], state=["observation/pose"])
    assert data.state_names == () and data.robot().state is None and motions(data, 0).shape == (14, 7)
    assert "has no observation/pose (data.state): a robot without state" in capsys.readouterr().out


@pytest.mark.parametrize("preset", ["tiny", "released"])
def test_a_policy_of_one_camera_has_the_weights_of_one_of_two(preset: str) -> None:
    cfg = compose_preset(preset, "weights=random")
    with torch.device("meta"):
        gfdm, gidm = gfdm_adapter.build(cfg), gidm_adapter.build(cfg)
        one, two = (
            DeFI(PolicyConfig.from_preset(cfg, calvin_robot(cameras)), gfdm=gfdm, **language_of(gidm))
            for cameras in (["image_0"], ["static", "gripper"])
        )
    assert (one.config.views, two.config.views) == (1, 2)
    shapes, others = ({n: p.shape for n, p in policy.named_parameters()} for policy in (one, two))
    assert shapes == others


# ------------------------------------------------------------ what lies between


def gripped(robot: Robot, above: float, below: float, opens: bool, relative: bool = False) -> Robot:
    actions = replace(robot.actions, relative=[True] * 6 + [relative])
    return replace(robot, actions=actions, gripper=Gripper(6, (above + below) / 2, above, below, opens))


def test_adapters_follow_from_the_two_robots(roots: dict[str, Path]) -> None:
    robots = {name: opened(name, root).robot() for name, root in roots.items()}
    widowx, google = WidowX().robot, Google().robot
    assert adapters_between(robots["bridge"], widowx) == ["euler_to_rotation_vector", "gripper_binary"]
    assert adapters_between(robots["fractal"], google) == ["euler_to_rotation_vector", "sticky_gripper"]
    assert adapters_between(calvin_robot(), calvin_robot()) == []
    assert adapters_between(widowx, widowx) == [] == adapters_between(google, google)
    assert adapters_between(calvin_robot(), widowx) == [], "its turns have other names and units"


@pytest.mark.parametrize("to", ["lerobot", "rlds"])
def test_converted_data_are_of_the_same_robot(to: str, roots: dict[str, Path], tmp_path: Path) -> None:
    """Whatever is kept beside the data is a stranger's: checked, and settings come before it."""
    if to == "lerobot":
        pytest.importorskip("pyarrow")
    bridge, widowx, google = opened("bridge", roots["bridge"]), WidowX().robot, Google().robot
    writer = convert.writer_of(to, bridge, tmp_path, "images", name="converted")
    for number in range(len(bridge)):
        writer.add(bridge.episode(number))
    writer.close()
    section = {"format": to, "root": str(tmp_path)}
    robot = open_dataset(section, "all").robot()
    assert robot == bridge.robot() and robot.gripper and robot.executed == 5
    for simulated in (widowx, google):
        assert adapters_between(robot, simulated) == adapters_between(bridge.robot(), simulated) != []
    file = tmp_path / {"lerobot": "meta/robot.json", "rlds": "1.0.0/metadata.json"}[to]
    kept = json.loads(file.read_text())
    said = kept if to == "lerobot" else kept["robot"]
    if to == "rlds":
        own = open_dataset(section | {"robot": {"gripper": {"opens": False}, "executed": 2}}, "all").robot()
        assert (own.gripper.opens, own.gripper.threshold, own.executed) == (False, 0.5, 2)
        assert own.actions.units == robot.actions.units
    for key, value, fault in (
        ("executed", 0, "robot.executed=0: must be 1 or more"),
        ("hands", 2, "robot.hands=2: Key 'hands' not in 'Robot'"),
        ("gripper", {"dimension": 7}, "robot.gripper.dimension=7: must lie in 0 … 6"),
        (
            "actions",
            said["state"] | {"names": [*"abcdefg"]},
            r"robot.actions: names \['a', .*the data have \['x'",
        ),
        ("cameras", "${oc.env:HOME}", "refers to something outside"),
    ):
        changed = said | {key: value}
        file.write_text(json.dumps(changed if to == "lerobot" else kept | {"robot": changed}))
        with pytest.raises(UserError, match=fault) as caught:
            open_dataset(section, "all")
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    file.write_text(json.dumps(kept))
    # Of other numbers it says nothing, nor where it is missing.
    chosen = {"lerobot": {"actions": "observation.state"}, "rlds": {"actions": ["observation/state"]}}[to]
    assert (
        open_dataset(section | chosen | {"state": None if to == "lerobot" else []}, "all").robot().gripper
        is None
    )
    if to == "rlds":
        file.write_text(json.dumps({key: kept[key] for key in ("fps", "cameras", "names")}))
    else:
        file.unlink()
    assert open_dataset(section, "all").robot().actions == Vector.plain(robot.actions.names)


def test_any_gripper_s_numbers_become_any_other_s() -> None:
    kinds = [(1, 0, True), (1, -1, True), (1, 0, False), (1, -1, False)]
    for own in kinds:
        for its in kinds:
            mine, other = gripped(WidowX().robot, *own), gripped(WidowX().robot, *its)
            act = adapt(adapters_between(mine, other))
            for opening in (True, False):
                sent, wanted = (above if opens == opening else below for above, below, opens in (own, its))
                (action,) = act(np.array([[0, 0, 0, 0, 0, 0, sent]]))
                assert action[6] == wanted, (own, its)
        act = adapt(adapters_between(gripped(Google().robot, *own), Google().robot))
        open_, closed = (own[0], own[1]) if own[2] else (own[1], own[0])
        chunk = np.zeros((4, 7))
        chunk[:, 6] = open_, open_, closed, closed
        assert [action[6] for action in act(chunk)] == [0, 0, 1, 1], own


def test_adapters_that_do_not_fit_are_named(roots: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    robot, widowx = opened("bridge", roots["bridge"]).robot(), WidowX().robot
    policy = replace(policy_config(), robot=robot)
    right = ["euler_to_rotation_vector", "gripper_binary"]
    assert check_robot(policy, widowx, "run", right) == [] and not capsys.readouterr().out
    missing = check_robot(policy, widowx, "run", ["gripper_binary"])
    assert len(missing) == 1 and "'roll', 'pitch', 'yaw'" in missing[0]
    assert "adapters=[euler_to_rotation_vector,gripper_binary] lie between them" in capsys.readouterr().out
    (wrong,) = check_robot(policy, widowx, "run", [*right, "gripper_flipped"])
    assert wrong == "gripper (action 6: 1 closes, -1 opens), not (action 6: 1 opens, -1 closes)"
    assert len(check_robot(policy, widowx, "run", ["rotation_vector_to_euler", "gripper_binary"])) == 1
    differ = check_robot(policy, replace(Google().robot, cameras=["image_0"]), "run", right)
    assert [each.split()[0] for each in differ] == ["state:", "5", "gripper"]


def test_a_server_of_ours_says_what_its_policy_needs() -> None:
    bridge = {"actions": ["x", "y", "z", "roll", "pitch", "yaw", "gripper"], "fps": 5.0}
    bridge |= {"units": ["m"] * 3 + ["rad"] * 3 + [""], "relative": [True] * 6 + [False]}
    bridge |= {"gripper": vars(Gripper(6, 0.5, 1.0, 0.0))}
    widowx = WidowX().robot
    assert adapters_between(_robot(bridge, widowx), widowx) == ["euler_to_rotation_vector", "gripper_binary"]
    assert _robot({"actions": bridge["actions"]}, widowx) == widowx, "others' servers"
    with pytest.raises(UserError, match="actions have 2 numbers, the simulators' 7"):
        _robot(
            bridge | {"actions": ["a", "b"], "units": ["", ""], "relative": [False] * 2, "gripper": None},
            widowx,
        )


# ------------------------------------------------------------ the user's commands

SHORT = ("preset=tiny", "trainer.global_batch=2", "trainer.max_steps=2", "trainer.log_every=1")
SHORT = (*SHORT, "trainer.save_every=0", "trainer.preview_every=0")
TIMES = {"bridge": 3, "fractal": 1}  # gfdm.frame_step for preset=tiny, as docs/data.md has it


def run(module: str, *settings: str) -> None:
    """A command as `python -m` runs it, in this process."""
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(errors):
        patch.setattr(sys, "argv", [module, *settings])
        try:
            importlib.import_module(module).main()
        except SystemExit as end:
            assert not end.code, errors.getvalue()


@pytest.fixture(scope="module")
def trained(roots: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """All stages of a data set, two steps each, trained once; the folder."""
    made: dict[str, Path] = {}

    def train(name: str) -> Path:
        if name in made:
            return made[name]
        folder = made[name] = tmp_path_factory.mktemp(name)
        data, vae = (f"data={name}", f"data.root={roots[name]}"), f"vae={folder / 'vae'}"
        run("Step1_GFDM.train_vae", *SHORT, *data, f"output={folder / 'vae'}")
        run("Step1_GFDM.prepare", *data, vae, f"output={folder / 'latents'}")
        step = f"gfdm.frame_step={TIMES[name]}"
        latents = f"data.root={folder / 'latents'}"
        run("Step1_GFDM.train", *SHORT, step, latents, vae, f"output={folder / 'gfdm'}")
        run("Step2_GIDM.train", *SHORT, *data, f"output={folder / 'gidm'}")
        stages = (f"gfdm_checkpoint={folder / 'gfdm'}", f"gidm_checkpoint={folder / 'gidm'}")
        run("Step3_DeFI.train", *SHORT, *data, *stages, f"output={folder / 'policy'}")
        return folder

    return train


ROLLOUT = "Step3_DeFI.rollout.evaluate"
WIDOWX = ["benchmark=simpler_fakes:FakeWidowX", "tasks=[widowx_stack_cube]"]
GOOGLE = ["benchmark=simpler_fakes:FakeGoogle", "tasks=[google_robot_pick_coke_can]"]
FEW = ("starts=1", "repeats=1", "processes=1", "videos.chains=0")


def turned(euler: np.ndarray) -> np.ndarray:
    return Rotation.from_euler("xyz", euler).as_rotvec()


@pytest.mark.parametrize(
    ("name", "camera", "executed", "ahead", "evaluated", "gripper"),
    [
        ("bridge", "image_0", 5, "+9 steps of the recording (0, 1.8 s)", WIDOWX, "gripper_binary"),
        ("fractal", "image", 3, "+3 steps of the recording (0, 1 s)", GOOGLE, "sticky_gripper"),
    ],
)
def test_simpler_gets_the_actions_of_a_policy_of_these_data(
    trained: Callable[[str], Path], name: str, camera: str, executed: int, ahead: str, evaluated: list[str],
    gripper: str, tmp_path: Path, capfd: pytest.CaptureFixture,
) -> None:  # fmt: skip
    checkpoint, output = trained(name) / "policy", tmp_path / "out"
    policy, told = Policy.load(checkpoint), capfd.readouterr().out
    assert (policy.robot.cameras, policy.robot.executed) == ([camera], executed)
    assert ahead in told and "stage 2 learned from" not in told
    run(ROLLOUT, *evaluated, *FEW, "max_steps=7", f"checkpoint={checkpoint}", f"output={output}")
    results = read_results(output)
    assert results.run["settings"]["adapters"] == ["euler_to_rotation_vector", gripper]
    told = capfd.readouterr().out
    assert f"adapters=[euler_to_rotation_vector,{gripper}]: from the policy's" in told
    assert "not quite" not in told and "robot_differs" not in results.policy
    (episode,) = results.episodes
    sent = np.array(episode.outcome["actions"])
    looks = [simpler_fakes.seen(camera, 0, step) for step in range(0, 7, executed)]
    seeds = [seed_of("rollout", 0, 0, look) for look in range(len(looks))]
    own = np.concatenate([policy.infer(look, seed)[:executed] for look, seed in zip(looks, seeds)])[:7]
    np.testing.assert_allclose(sent[:, :3], own[:, :3], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(sent[:, 3:6], turned(own[:, 3:6]), rtol=1e-4, atol=1e-6)
    if name == "bridge":
        assert sent[:, 6].tolist() == (2 * own[:, 6] - 1).tolist() and set(own[:, 6]) <= {0, 1}
    else:
        change = next((step for step in range(1, 7) if own[step, 6] != own[step - 1, 6]), 7)
        held = own[change - 1, 6] - own[change, 6] if change < 7 else 0
        assert sent[:, 6].tolist() == [0] * change + [held] * (7 - change)


@pytest.mark.skipif(not importlib.util.find_spec("sapien"), reason="SAPIEN 3 is not installed")
def test_simpler_itself_runs_a_policy_of_bridge(
    trained: Callable[[str], Path], reference: Path, tmp_path: Path
) -> None:
    root = reference / "simpler_root"
    if not root.is_dir():
        pytest.skip(f"no assets at {root}")
    from defi.benchmarks.simpler import check

    try:
        check.drawing()
    except UserError as error:
        pytest.skip(str(error))
    evaluated = ["benchmark=simpler_widowx", f"simpler_root={root}", "tasks=[widowx_stack_cube]", *FEW]
    checkpoint, output = trained("bridge") / "policy", tmp_path / "out"
    run(ROLLOUT, *evaluated, "max_steps=6", f"checkpoint={checkpoint}", f"output={output}")
    (episode,) = read_results(output).episodes
    assert (episode.control_steps, episode.observations) == (6, 2)
