"""The official package behind our interface: it does what was recorded, as the native simulator does."""

import importlib.util
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from replay import replay

pytest.importorskip("pybullet")
from defi.errors import UserError
from defi.sim.official import OfficialWorld, check_installed
from defi.sim.scene import compose


def replay_scene(reference: Path, path: Path) -> None:
    scene = path.stem.removeprefix("rollouts_scene_")
    with np.load(path) as file, OfficialWorld(reference / "calvin_root", scene) as world:
        replay(world, dict(file))
        world.reload()
        world.reset(file["init_robot_obs"][0], file["init_scene_obs"][0])


def test_the_official_package_does_what_was_recorded(reference: Path) -> None:
    pytest.importorskip("calvin_env")
    paths = sorted((reference / "calvin").glob("rollouts_scene_*.npz"))
    assert paths
    context = multiprocessing.get_context("spawn")  # the package shares PyBullet's first connection
    with context.Pool(2, maxtasksperchild=1) as pool:
        pool.starmap(replay_scene, [(reference, path) for path in paths], chunksize=1)


def test_the_package_s_own_configuration(reference: Path) -> None:
    cfg = compose(reference / "calvin_root", "D")
    assert cfg.env.use_vr is False
    assert Path(cfg.env.scene_cfg.data_path).is_dir()
    assert list(cfg.env.cameras) == ["static", "gripper"]
    assert cfg.env.robot_cfg.base_position == cfg.scene.robot_base_position
    with pytest.raises(UserError, match="Q: no such scene"):
        compose(reference / "calvin_root", "Q")


def test_a_missing_package_is_told_before_anything_is_written(reference: Path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="the package is not installed; pip install .*calvin_env"):
        check_installed()
