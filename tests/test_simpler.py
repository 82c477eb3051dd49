"""SIMPLER's parts that need neither SAPIEN nor assets."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from defi.benchmarks.simpler import check
from defi.benchmarks.simpler.episodes import TASKS, episodes, spoken
from defi.benchmarks.simpler.mesh import convex_parts
from defi.benchmarks.simpler.poses import composed, inverse, matrix, multiplied, turn_of, vector_of
from defi.benchmarks.simpler.variants import variants
from defi.errors import UserError


def test_there_are_1092_episodes() -> None:
    counts = {name: len(episodes(name)) for name in TASKS}
    assert sum(counts.values()) == 1092
    assert [count for name, count in counts.items() if name.startswith("widowx")] == [24] * 4
    assert counts["google_robot_pick_coke_can"] == 300 and counts["google_robot_move_near_v0"] == 240
    assert sum(count for name, count in counts.items() if "drawer" in name) == 216
    settings = {each.setting for each in episodes("google_robot_pick_coke_can")}
    assert len(settings) == 12


def test_what_models_are_called() -> None:
    assert spoken("baked_opened_7up_can_v2") == "7up can"
    assert spoken("baked_green_cube_3cm") == "green cube"


def test_poses_are_scipys() -> None:
    random = np.random.default_rng(0)
    one, other = (np.concatenate([random.normal(size=3), turn_of(random.normal(size=3))]) for _ in range(2))
    turns = [Rotation.from_quat(pose[[4, 5, 6, 3]]) for pose in (one, other)]
    assert np.allclose(matrix(one[3:]), turns[0].as_matrix())
    assert np.allclose(multiplied(one[3:], other[3:])[[1, 2, 3, 0]], (turns[0] * turns[1]).as_quat())
    assert np.allclose(composed(one, inverse(one)), [0, 0, 0, 1, 0, 0, 0])
    assert np.allclose(composed(one, other)[:3], one[:3] + turns[0].apply(other[:3]))
    assert np.allclose(turn_of([0, 0, 0]), [1, 0, 0, 0]) and np.allclose(vector_of([-1, 0, 0, 0]), 0)
    assert np.allclose(vector_of(-one[3:]), turns[0].as_rotvec())


def test_pieces_are_connected_by_places_not_by_corners(tmp_path: Path) -> None:
    """Two triangles that share a place are one piece within an object of the file, and two in two objects."""
    file = tmp_path / "mesh.obj"
    rows = [
        "v 0 0 0",
        "v 1 0 0",
        "v 0 1 0",
        "v 0 0 0",
        "v -1 0 0",
        "v 0 -1 0",
        "v 5 5 5",
        "v 6 5 5",
        "v 5 6 5",
    ]
    faces = ["f 1/1/1 2 3", "f 4 5 6", "f 7 8 9"]
    file.write_text("\n".join(["o all", *rows, *faces]))
    assert [len(part) for part in convex_parts(file)] == [5, 3]
    file.write_text("\n".join(["o one", *rows, faces[0], "o two", *faces[1:]]))
    assert [len(part) for part in convex_parts(file)] == [3, 3, 3]
    file.write_text("v 0 0\nf 1 2 3")
    with pytest.raises(UserError, match=r"mesh\.obj"):
        convex_parts(file)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV.*vulkan_cpu"),
        ("raise RuntimeError('failed to find a rendering device')", "rendering device.*vulkan_cpu"),
        ("import no_such_simulator", "pip install"),
        ("import time; time.sleep(9)", "drew nothing"),
    ],
)
def test_a_driver_that_fails_is_a_message(code: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "DRAW", code)
    monkeypatch.setattr(check, "PATIENCE", 3)
    with pytest.raises(UserError, match=says):
        check.drawing()


def test_missing_assets_are_named(tmp_path: Path) -> None:
    task = TASKS["widowx_put_eggplant_in_basket"]
    with pytest.raises(UserError, match="git clone"):
        check.missing_assets(tmp_path, task)
    (tmp_path / "ManiSkill2_real2sim/data").mkdir(parents=True)
    missing = check.missing_assets(tmp_path, task)
    assert any(name.endswith("eggplant/collision.obj") for name in missing)
    assert any(name.endswith("bridge_sink.png") for name in missing)


def test_neither_torch_nor_sapien_is_needed_to_judge() -> None:
    modules = "defi.benchmarks.simpler.judge, defi.benchmarks.simpler.environment, sys"
    code = f"import {modules}; assert not {{'torch', 'sapien'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_variant_aggregation() -> None:
    counts = {name: len(variants(name)) for name in TASKS if name.startswith("google") and "_v1" not in name}
    assert counts.pop("google_robot_pick_coke_can") == 9 * 75
    assert counts.pop("google_robot_move_near_v0") == 8 * 60
    assert sum(counts.values()) == 7 * 54
    assert all(not each.photo for each in variants("google_robot_open_top_drawer"))
    beside = [each for each in variants("google_robot_pick_coke_can") if len(each.objects) > 1]
    assert len(beside) == 2 * 75
    for episode in beside:
        can, *others = (np.array(each.xy) for each in episode.objects)
        assert min(np.linalg.norm(other - can) for other in others) > 0.25
    assert beside == [each for each in variants("google_robot_pick_coke_can") if len(each.objects) > 1]
