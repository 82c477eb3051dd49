"""The world on the built-in table: states, actions, lights, cameras, and what a user may get wrong."""

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pybullet")
from defi.errors import UserError
from defi.sim import scenes
from defi.sim.scene import SceneConfig
from defi.sim.sequences import initial_states, start_state
from defi.sim.world import BUTTON, SWITCH, World

STAY = np.array([0, 0, 0, 0, 0, 0, 1.0])
START = start_state(initial_states()[-1])


@pytest.fixture(scope="module")
def shared_world() -> World:
    with World(scenes.builtin("D"), static_size=32, gripper_size=24) as world:
        yield world


@pytest.fixture
def world(shared_world: World) -> World:
    shared_world.reload()
    shared_world.reset(*START)
    return shared_world


def random_actions(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.column_stack([rng.uniform(-1, 1, (count, 6)), rng.choice([-1, 1], count)])


def test_reset_puts_everything_in_place(world: World) -> None:
    assert world.robot_obs()[7:14] == pytest.approx(START[0][7:14], abs=1e-4)
    assert world.robot_obs()[6] == pytest.approx(START[0][6], abs=1e-4)
    assert world.scene_obs() == pytest.approx(START[1], abs=2e-2)
    assert world.state().lights == {"lightbulb": START[1][4], "led": START[1][5]}


def test_reset_without_states_draws_free_places(world: World) -> None:
    world.reset()
    first = world.scene_obs()
    bodies = {block.body for block in world.state().blocks.values()}
    assert not any(block.touching & bodies for block in world.state().blocks.values())
    assert first[:6] == pytest.approx(0, abs=1e-3)
    world.reset()
    assert not np.allclose(first[6:], world.scene_obs()[6:]), "drawn anew"


def test_reload_forgets_the_past(world: World) -> None:
    def episode() -> list[np.ndarray]:
        world.reset(*START)
        for action in random_actions(40):
            world.step(action)
        return [world.robot_obs(), world.scene_obs()]

    world.reload()
    first = episode()
    world.reload()
    assert np.array_equal(np.concatenate(first), np.concatenate(episode()))


def test_actions_move_the_tool(world: World) -> None:
    before = world.robot_obs()
    for _ in range(5):
        world.step([0.5, 0, 1, 0, 0, 0, -1])
    for _ in range(20):
        world.step([0, 0, 0, 0, 0, 0, -1])
    after = world.robot_obs()
    assert after[:3] - before[:3] == pytest.approx([0.05, 0, 0.1], abs=5e-3)
    assert after[3:6] == pytest.approx(before[3:6], abs=0.05)
    assert after[6] < 0.01 < before[6], "the gripper has closed"
    assert after[14] == -1
    world.reset(*START)
    assert world.robot_obs()[14] == -1, "the last gripper action survives a reset"


@pytest.mark.parametrize("action", [np.zeros(7), np.full(7, np.nan), np.ones(6), np.ones((1, 7))])
def test_bad_actions(world: World, action: np.ndarray) -> None:
    with pytest.raises(UserError, match="7 finite numbers"):
        world.step(action)


def press(world: World, joint: int, far: bool) -> None:
    """Hold a joint of the table at one end of its range during one control step."""
    index = world.table._joints[joint]
    end = world._bullet.getJointInfo(world.table.body, index)[9 if far else 8]
    world._bullet.resetJointState(world.table.body, index, end)
    world.step(STAY)


def test_button_toggles_the_led(world: World) -> None:
    before = world.table.lights["led"]
    press(world, BUTTON, far=True)
    assert world.table.lights["led"] == 1 - before
    press(world, BUTTON, far=True)
    assert world.table.lights["led"] == 1 - before, "held, not pressed again"
    press(world, BUTTON, far=False)
    press(world, BUTTON, far=True)
    assert world.table.lights["led"] == before


def test_switch_lights_the_bulb(world: World) -> None:
    for far in (True, False, False, True):
        press(world, SWITCH, far)
        assert world.table.lights["lightbulb"] == far


def test_lights_are_seen(world: World) -> None:
    dark = START[1].copy()
    dark[3:6] = 0
    world.reset(START[0], dark)
    before = world.render()["rgb_static"].astype(int)
    bright = dark.copy()
    bright[4:6] = 1
    world.reset(START[0], bright)
    changed = np.abs(world.render()["rgb_static"].astype(int) - before).max(axis=-1) > 60
    assert 0 < changed.sum() < changed.size / 4


def test_cameras(world: World) -> None:
    pictures = world.render()
    assert {name: picture.shape for name, picture in pictures.items()} == {
        "rgb_static": (32, 32, 3),
        "rgb_gripper": (24, 24, 3),
    }
    assert all(picture.dtype == np.uint8 and picture.std() > 5 for picture in pictures.values())
    assert np.array_equal(world.render()["rgb_static"], pictures["rgb_static"])
    for _ in range(8):
        world.step([0, 0, -1, 0, 0, 0, 1])
    assert not np.array_equal(world.render()["rgb_gripper"], pictures["rgb_gripper"]), "it moves with the arm"


def test_a_closed_world_says_so() -> None:
    world = World(scenes.builtin("D"), cameras=())
    assert world.render() == {}
    world.close()
    world.close()
    for use in (world.state, world.robot_obs, world.scene_obs, world.reset, lambda: world.step(STAY)):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_a_forgotten_world_is_freed() -> None:
    world = World(scenes.builtin("D"), cameras=())
    finalizer = world._bullet._disconnect
    del world
    gc.collect()
    assert not finalizer.alive


def test_missing_assets(tmp_path: Path) -> None:
    scene = scenes.builtin("D")
    gone = replace(scene, plane=tmp_path / "plane.urdf")
    with pytest.raises(UserError, match=r"plane\.urdf: missing"):
        World(gone)
    broken = tmp_path / "broken.urdf"
    broken.write_text("<robot")
    with pytest.raises(UserError, match=r"broken\.urdf: cannot be read"):
        World(replace(scene, plane=broken))
    with pytest.raises(UserError, match="not a play table"):
        World(replace(scene, table=replace(scene.table, urdf=scene.plane)))
    with pytest.raises(UserError, match="on its link nose"):
        World(
            replace(scene, cameras={"gripper": replace(scene.cameras["gripper"], link="nose")}),
            cameras=["gripper"],
        )
    with pytest.raises(UserError, match="1 pixel or more"):
        World(scene, static_size=0)


def test_calvin_clone_that_is_not_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        SceneConfig.from_calvin(tmp_path / "nowhere", "D")
    with pytest.raises(UserError, match="not a clone of CALVIN"):
        SceneConfig.from_calvin(tmp_path, "D")
    env = tmp_path / "calvin_env"
    env.mkdir()
    with pytest.raises(UserError, match="submodule"):
        SceneConfig.from_calvin(tmp_path, "D")
    (env / "conf" / "scene").mkdir(parents=True)
    with pytest.raises(UserError, match="the parent"):
        SceneConfig.from_calvin(env, "D")
    for name in "AB":
        (env / "conf" / "scene" / f"calvin_scene_{name}.yaml").touch()
    with pytest.raises(UserError, match="Q.*no such scene.*A, B"):
        SceneConfig.from_calvin(tmp_path, "Q")
    with pytest.raises(UserError, match="panda.yaml: missing"):
        SceneConfig.from_calvin(tmp_path, "A")
