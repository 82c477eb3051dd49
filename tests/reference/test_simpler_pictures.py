"""SIMPLER's pictures against those recorded from the official environment, which SAPIEN 2 drew."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from simpler_recordings import recordings, simpler_root

pytest.importorskip("sapien", reason="SAPIEN 3 is not installed: pip install .[simpler]")
from defi.benchmarks.simpler import picture
from defi.benchmarks.simpler.check import drawing
from defi.benchmarks.simpler.environment import Simpler
from defi.benchmarks.simpler.episodes import episodes
from defi.benchmarks.simpler.picture import resized
from defi.errors import UserError


@pytest.fixture(scope="module")
def world(reference: Path) -> Simpler:
    try:
        drawing()
    except UserError as error:
        pytest.skip(str(error))
    return Simpler(simpler_root(reference))


def seen(world: Simpler) -> np.ndarray:
    (picture,) = world.observe().images.values()
    return picture.astype(int)


def grown(drawn: np.ndarray, by: int = 4) -> np.ndarray:
    """A mask and all within so many pixels of it."""
    for axis in (0, 1):
        drawn = np.any([np.roll(drawn, shift, axis) for shift in range(-by, by + 1)], 0)
    return drawn


def test_first_pictures(reference: Path, world: Simpler) -> None:
    for recording in recordings(reference):
        file = recording.file.with_name(f"{recording.name}_step000.png")
        if not file.is_file():
            continue
        world.reset(recording.episode)
        mine, its = seen(world), np.asarray(Image.open(file).convert("RGB")).astype(int)
        assert mine.shape == its.shape
        eye = world.eye
        drawn = np.isin(eye.camera.get_picture("Segmentation")[..., 1], eye.shown)
        pasted = ~grown(drawn)
        assert (mine == its)[pasted].all(), f"{recording.name}: pixels of the photo"
        difference = np.abs(mine - its)
        # An object that lies 1 mm beside its recorded place differs along its edges.
        assert difference.mean() < 0.2 and difference[drawn].mean() < 5, recording.name
        parts = recording.meta["segmentation_pixels"]
        behind = {"arena"} | ({"sink", "dummy_sink_target_plane"} if world.scene.sink is not None else set())
        assert drawn.sum() == pytest.approx(sum(parts[name] for name in set(parts) - behind), rel=0.01)
        assert np.allclose(eye.camera.get_intrinsic_matrix(), recording.intrinsic_cv, atol=1e-3)
        assert np.allclose(eye.camera.get_extrinsic_matrix(), recording.extrinsic_cv[:3], atol=2e-5)


def test_later_pictures(reference: Path, world: Simpler) -> None:
    """Of one free motion per robot: the arm has moved, and the picture with it."""
    free = [each for each in recordings(reference) if not each.scripted]
    later = [each for each in free if each.file.with_name(f"{each.name}_step010.png").is_file()]
    if not later:
        pytest.skip("no later pictures of free motions")
    for recording in {each.task.robot: each for each in later}.values():
        file = recording.file.with_name(f"{recording.name}_step010.png")
        world.reset(recording.episode)
        for action in recording.actions[:10]:
            world.step(action)
        its = np.asarray(Image.open(file).convert("RGB")).astype(int)
        assert np.abs(seen(world) - its).mean() < 0.2, recording.name


def test_drawers_can_be_ray_traced(reference: Path, world: Simpler, monkeypatch: pytest.MonkeyPatch) -> None:
    """With little of the official quality, which takes minutes on a CPU and a denoiser that is NVIDIA's."""
    for name, value in (("SAMPLES", 1), ("DEPTH", 1), ("DENOISER", "none")):
        monkeypatch.setattr(picture, name, value)
    traced, drawer, can = (
        Simpler(world.root, traced=True),
        episodes("google_robot_open_top_drawer")[0],
        episodes("google_robot_pick_coke_can")[0],
    )
    pictures = {}
    for each, simpler in product((drawer, can), (world, traced)):
        simpler.reset(each)
        pictures[each, simpler] = seen(simpler)
        if each is drawer:
            shown = np.isin(simpler.eye.camera.get_picture("Segmentation")[..., 1], simpler.eye.shown)
    differs = np.abs(pictures[drawer, world] - pictures[drawer, traced])
    assert (differs[~grown(shown)] == 0).all() and differs[shown].mean() > 5
    assert np.abs(pictures[can, world] - pictures[can, traced]).max() <= 1


def test_photos_are_made_larger_as_opencv_does(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    photo = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    exact = cv2.resize(photo.astype(np.float64), (20, 16))  # quarters of whole numbers: no rounding
    assert (resized(photo, 20, 16) == np.floor(exact)).all()
    assert (resized(photo, 10, 8) == photo).all()
