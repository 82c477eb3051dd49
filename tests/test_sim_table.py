"""The built-in play table: its assets, its mechanics and what the cameras see of it."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

pytest.importorskip("pybullet")

import pybullet

from defi.errors import UserError
from defi.sim.mesh import FACES, Material, ball, box, prism
from defi.sim.scene import BLOCKS
from defi.sim.scenes import SCENES, SWITCH_AXIS, builtin, variation
from defi.sim.sequences import ROBOT_START, initial_states, start_state
from defi.sim.world import World

AXES = {
    "base__button": (0, 0, -1),
    "base__switch": SWITCH_AXIS,
    "base__slide": (-1, 0, 0),
    "base__drawer": (0, -1, 0),
}
RANGES = {"base__button": 0.02, "base__switch": 0.088, "base__slide": 0.28, "base__drawer": 0.22}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Assets of these tests are written anew, once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def client():
    client = pybullet.connect(pybullet.DIRECT)
    yield client
    pybullet.disconnect(client)


def start(**values: int | str) -> tuple[np.ndarray, np.ndarray]:
    """The protocol's start state of the first situation with the given values."""
    situation = next(s for s in initial_states() if all(s[key] == value for key, value in values.items()))
    return start_state(situation)


@pytest.mark.parametrize("scene", SCENES)
def test_joints_have_calvins_types_directions_and_ranges(client, scene):
    table = pybullet.loadURDF(str(builtin(scene).table.urdf), physicsClientId=client)
    infos = [pybullet.getJointInfo(table, j) for j in range(pybullet.getNumJoints(table))]
    joints = {info[1].decode(): info for info in infos}
    for name, axis in AXES.items():
        info = joints[name]
        assert info[2] == pybullet.JOINT_PRISMATIC
        assert info[8:10] == pytest.approx((0, RANGES[name]))
        before = np.array(pybullet.getLinkState(table, info[0])[4])
        pybullet.resetJointState(table, info[0], 0.01)
        after = np.array(pybullet.getLinkState(table, info[0], computeForwardKinematics=True)[4])
        np.testing.assert_allclose(after - before, 0.01 * np.array(axis), atol=1e-6)
    links = {info[12].decode() for info in infos}
    assert {"button_link", "switch_link", "slide_link", "drawer_link"} < links
    assert {"led_link", "light_link", "plank_link"} < links


def test_masses_and_frictions(client):
    """What the recorded results of the built-in table depend on, besides the shapes."""
    scene = builtin("D")
    found = {}
    for urdf in (scene.table.urdf, scene.plane, scene.blocks[0].urdf):
        body = pybullet.loadURDF(str(urdf), physicsClientId=client)
        names = [pybullet.getBodyInfo(body, client)[0].decode()]
        joints = range(pybullet.getNumJoints(body, client))
        names += [pybullet.getJointInfo(body, joint, client)[12].decode() for joint in joints]
        for link, name in enumerate(names, start=-1):
            found[name] = pytest.approx(pybullet.getDynamicsInfo(body, link, client)[:2])
    assert found == {
        "base_link": (0, 0.7),
        "button_link": (0.15, 0.5),
        "switch_link": (0.24, 0.1),
        "slide_link": (1.5, 0.3),
        "drawer_link": (4.2, 0.5),
        "plank_link": (2.8, 0.5),
        "led_link": (0.2, 0.5),
        "light_link": (0.2, 0.5),
        "plane": (0, 1),
        "block_red": (0.5, 0.7),
    }


def test_rest_pose_of_the_arm_is_the_protocols_start():
    with World(builtin("D"), cameras=()) as world:
        world.reset(np.array(ROBOT_START))
        np.testing.assert_allclose(world.robot_obs()[:6], ROBOT_START[:6], atol=2e-3)


@pytest.mark.parametrize("scene", SCENES)
def test_blocks_rest_where_the_protocol_puts_them(scene):
    for state in ({"slider": "left", "drawer": "open"}, {"slider": "right", "drawer": "closed"}):
        robot, table = start(blue_block="table", pink_block="slider_left", red_block="slider_right", **state)
        with World(builtin(scene), cameras=()) as world:
            world.reset(robot, table)
            for _ in range(15):
                world.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
            judged = world.state()
            np.testing.assert_allclose(world.scene_obs()[6:9], table[6:9], atol=2e-3)
            np.testing.assert_allclose(world.scene_obs()[:2], table[:2], atol=2e-3)
            for name, link in zip(BLOCKS, ("plank_link", "base_link", "plank_link")):
                assert judged.blocks[name].contacts == {(judged.table, judged.links[link])}


def test_assets_are_written_once_by_many_processes():
    with ProcessPoolExecutor(3, get_context("spawn")) as pool:
        made = list(pool.map(variation, "AAA", (5, 5, 5)))
    assert made[0] == made[1] == made[2] == variation("A", 5)
    folder = made[0].table.urdf.parent
    assert not list(folder.parent.glob(".draft*"))
    assert {path.suffix for path in folder.iterdir()} == {".urdf", ".obj", ".mtl", ".png"}


def test_variations_are_reproducible_differ_and_never_are_d():
    made = [variation(name, seed) for name in "ABC" for seed in range(4)]
    assert len({scene.table.urdf for scene in made}) == 12
    assert builtin("D").table.urdf not in {scene.table.urdf for scene in made}
    assert variation("B", 2) == made[6]


def test_d_lies_within_the_spread_of_the_variations():
    made = [variation(name, seed).table.grips for name in "ABC" for seed in range(30)]
    for joint, place in builtin("D").table.grips.items():
        places = np.array([grips[joint] for grips in made])
        assert (np.abs(places - place).max(-1) < 0.035).sum() > 5, joint


@pytest.mark.parametrize(
    ("make", "word"), [(lambda: builtin("E"), "'E'"), (lambda: variation("D", 1), "'D'")]
)
def test_unknown_scene_is_told(make, word):
    with pytest.raises(UserError, match=word):
        make()


def test_unwritable_cache_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        builtin("A")


@pytest.mark.parametrize(
    ("change", "least"),
    [({"led": 1}, 40), ({"lightbulb": 1}, 40), ({"slider": "left"}, 300), ({"drawer": "open"}, 800)],
)
@pytest.mark.parametrize("scene", SCENES)
def test_the_static_camera_sees_the_state(scene, change, least):
    """At least so many of 128 × 128 pixels tell whether a light is on, the door left, the drawer open."""
    base = {"led": 0, "lightbulb": 0, "slider": "right", "drawer": "closed", "red_block": "table"}
    with World(builtin(scene), cameras=("static",), static_size=128) as world:
        pictures = []
        for values in (base, base | change):
            robot, table = start(**values)
            world.reset(robot, np.concatenate([table[:6], start(**base)[1][6:]]))
            pictures.append(world.render()["rgb_static"].astype(int))
    assert (np.abs(pictures[0] - pictures[1]).max(-1) > 40).sum() > least


def test_box_draws_the_named_faces_outwards():
    polygons = box((0.1, 0.2, 0.3), (0.2, 0.4, 0.6), "-x +z")
    assert len(polygons) == 2
    for (corners, normal), face in zip(polygons, ("-x", "+z")):
        axis, sign = FACES[face]
        assert normal[axis] == sign
        np.testing.assert_allclose(corners[:, axis], [(0, 0.2, 0), (0, 0, 0.6)][face == "+z"][axis])
        turned = np.cross(corners[1] - corners[0], corners[2] - corners[1])
        assert turned @ normal > 0  # counterclockwise, seen from outside


@pytest.mark.parametrize(
    ("polygons", "volume"),
    [
        (prism((0, 0, 0), 0.1, 0.3, "y"), 5 * np.sin(0.2 * np.pi) * 0.01 * 0.3),
        (ball((0, 0, 0), 0.1, sides=40), 4 / 3 * np.pi * 0.001),
    ],
)
def test_round_parts_are_closed_and_drawn_outwards(polygons, volume):
    enclosed = 0.0
    for corners, normal in polygons:
        assert corners.mean(0) @ normal > 0
        for a, b in zip(corners[1:], corners[2:]):
            enclosed += np.dot(corners[0], np.cross(a, b)) / 6
    assert enclosed == pytest.approx(volume, rel=0.02)


def test_textures_repeat_and_keep_their_colour():
    for pattern in ("plain", "wood", "planks", "speckle"):
        texture = Material((0.5, 0.4, 0.3), pattern).texture()
        assert texture.shape == (64, 64, 3)
        np.testing.assert_allclose(texture.mean((0, 1)) / 255, (0.5, 0.4, 0.3), atol=0.05)
