"""Clips of latents: windows, mixtures, safe paths, clear errors; the scores of imagined frames."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from defi.errors import UserError
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.data import LATENTS, MANIFEST, LatentMixture, open_sets, read_episodes, read_latents
from Step1_GFDM.evaluation.metrics import psnr, ssim


def write(
    root: Path,
    name: str,
    frames: int,
    *,
    suffix: str = ".safetensors",
    path: str | None = None,
    cameras: int = 2,
    **said: Any,
) -> None:
    """An episode whose latents hold their frame number, negative for the second camera."""
    files = []
    for camera, sign in (("static", 1), ("gripper", -1))[:cameras]:
        latent = root / "latent_videos/train" / name / f"{camera}{suffix}"
        latent.parent.mkdir(parents=True, exist_ok=True)
        values = (sign * torch.arange(frames)).half().view(-1, 1, 1, 1).expand(frames, 4, 2, 2).contiguous()
        save_file({LATENTS: values}, latent) if suffix == ".safetensors" else torch.save(values, latent)
        files.append({"latent_video_path": path or str(latent.relative_to(root))})
    annotation = {"episode_id": name, "texts": ["go"], "videos": [], "latent_videos": files}
    file = root / "annotation/train" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**annotation, "video_length": frames, **said}))


def clips(frames: int = 3, frame_step: int = 2, **sets: dict) -> LatentMixture:
    model = GFDMConfig(frames=frames, frame_step=frame_step)
    return LatentMixture(open_sets({"sets": sets}, model, "train").values())


def numbers(data: LatentMixture, index: int, seed: int = 0) -> list[float]:
    """Frames of a clip."""
    return data.sample(index, np.random.default_rng(seed))["latents"][:, 0, 0, 0].tolist()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_windows_are_strided_and_clamped(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, "0", 7, suffix=suffix)
    data = clips(demos={"root": str(tmp_path), "stride": 2, "every": 3, "cameras": [1.0]})
    assert [numbers(data, i) for i in range(len(data))] == [[0, 2, 4], [3, 5, 6], [6, 6, 6]]


def prepared(root: Path, every: object) -> None:
    """Says that this folder holds one frame in so many."""
    (root / MANIFEST).write_text(json.dumps({"data": {"every": every}}))


@pytest.mark.parametrize(("every", "last"), [(1, [60, 64, 64]), (2, [60, 64, 64]), (5, None)])
def test_strides_count_frames_of_the_recording(tmp_path: Path, every: int, last: list[int] | None) -> None:
    """The same clips, whether all frames are stored or only those of a multiple; others are refused."""
    write(tmp_path, "0", len(range(0, 65, every)))
    prepared(tmp_path, every)
    demos = {"root": str(tmp_path), "cameras": [1.0]}
    if last is None:
        refused = r"one frame in 5 .* stride=4, every=4 .*; prepare it again with data.every=4, or"
        with pytest.raises(UserError, match=refused):
            clips(demos=demos, frame_step=4)
        assert len(clips(demos=demos, frame_step=10)) == 7
        return
    data = clips(demos=demos, frame_step=4)  # what the data set leaves open, the model says
    assert len(data) == 17 and [every * n for n in numbers(data, 15)] == last
    assert [every * n for n in numbers(clips(demos={**demos, "stride": 6, "every": 2}), 1)] == [2, 8, 14]


@pytest.mark.parametrize("every", [0, "5", None])
def test_a_manifest_that_does_not_say_the_step_is_refused(tmp_path: Path, every: object) -> None:
    write(tmp_path, "0", 9)
    prepared(tmp_path, every)
    with pytest.raises(UserError, match=f"manifest.json: data.every={every}: .*prepare again"):
        clips(demos={"root": str(tmp_path)})


def test_spread_takes_the_whole_video_and_skips_long_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write(tmp_path, "0", 8)
    write(tmp_path, "1", 101)
    human = {"root": str(tmp_path), "clips": "spread", "longest": 100, "cameras": [1.0]}
    data = clips(human=human)
    assert len(data) == 1 and numbers(data, 0) == [0, 3, 7]  # 3.5 is truncated
    assert "left out 1 of 2 videos, longer than 100 frames" in capsys.readouterr().out
    prepared(tmp_path, 2)  # the recordings of 15 and 201 frames
    assert len(clips(human=human | {"longest": 201})) == 2 and len(clips(human=human | {"longest": 200})) == 1


def test_the_states_say_how_long_an_episode_is(tmp_path: Path) -> None:
    write(tmp_path, "0", 5, video_length=12, state=[[0]] * 5, texts=["first", "second"])
    data = clips(demos={"root": str(tmp_path), "cameras": [1.0]})
    assert [numbers(data, i) for i in range(len(data))] == [[0, 2, 4], [2, 4, 4], [4, 4, 4]]
    assert {data.sample(0, np.random.default_rng(seed))["text"] for seed in range(9)} == {"first"}


def test_published_folders_of_calvin_and_of_other_latents(tmp_path: Path) -> None:
    """annotation_abc_13 with its own names of the splits; latent_videos_svd, which no annotation names."""
    write(tmp_path, "0", 5)
    (tmp_path / "annotation").rename(tmp_path / "annotation_abc_13")
    shutil.copytree(tmp_path / "annotation_abc_13/train", tmp_path / "annotation_abc_13/val_d")
    assert [[e.id for e in read_episodes(tmp_path, split)] for split in ("train", "val")] == [["0"], ["0"]]
    (tmp_path / "latent_videos").rename(tmp_path / "latent_videos_svd")
    demos = {"root": str(tmp_path), "cameras": [0, 1]}
    assert numbers(clips(demos=demos), 0) == [0, -2, -4]
    shutil.rmtree(tmp_path / "latent_videos_svd")
    with pytest.raises(UserError, match="latent_videos/train/0/gripper.safetensors: missing"):
        numbers(clips(demos=demos), 0)


def test_a_pass_is_as_long_as_the_largest_set_and_small_ones_repeat(tmp_path: Path) -> None:
    write(tmp_path / "small", "0", 3)
    write(tmp_path / "large", "0", 5)
    sets = {name: {"root": str(tmp_path / name), "cameras": [1.0]} for name in ("small", "large")}
    data = clips(frames=1, frame_step=1, **sets)
    assert len(data) == 5
    found = [{numbers(data, i, seed)[0] for seed in range(20)} for i in range(5)]
    assert found == [{0}, {1}, {2}, {0, 3}, {1, 4}]


def test_cameras_and_sets_follow_their_shares(tmp_path: Path) -> None:
    write(tmp_path / "a", "0", 4)
    write(tmp_path / "b", "0", 8)
    shares = {"cameras": [0.75, 0.25], "stride": 1, "every": 1}
    data = clips(
        frames=8,
        a={"root": str(tmp_path / "a"), "weight": 3.0, **shares},
        b={"root": str(tmp_path / "b"), "weight": 1.0, **shares},
    )
    rng = np.random.default_rng(0)
    ends = [data.sample(0, rng)["latents"][-1, 0, 0, 0].item() for _ in range(2000)]
    assert np.mean(np.abs(ends) == 3) == pytest.approx(0.75, abs=0.04)
    assert np.mean(np.array(ends) < 0) == pytest.approx(0.25, abs=0.04)


def test_episodes_take_the_shares_of_the_cameras_they_have(tmp_path: Path) -> None:
    write(tmp_path, "0", 4, cameras=1)
    write(tmp_path, "1", 4)
    demos = {"root": str(tmp_path), "clips": "spread"}
    data = clips(demos={**demos, "cameras": [0.75, 0.25]})
    rng = np.random.default_rng(0)
    ends = np.array([[data.sample(i, rng)["latents"][-1, 0, 0, 0] for i in (0, 1)] for _ in range(400)])
    assert (ends[:, 0] == 3).all()
    assert np.mean(ends[:, 1] < 0) == pytest.approx(0.25, abs=0.07)
    with pytest.raises(UserError, match=r"episode 0: cameras=\[0.0, 1.0\] gives none of its 1 cam"):
        clips(demos={**demos, "cameras": [0, 1]})


def test_a_sample_depends_on_its_random_numbers_alone(tmp_path: Path) -> None:
    write(tmp_path, "0", 9)
    data = clips(demos={"root": str(tmp_path)})
    first, again = (data.sample(1, np.random.default_rng(5)) for _ in range(2))
    assert first["text"] == again["text"] and torch.equal(first["latents"], again["latents"])


def test_paths_may_not_leave_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "set", "0", 4, path="../../outside.safetensors")
    with pytest.raises(UserError, match="outside the folder"):
        read_episodes(tmp_path / "set", "train")


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="annotation/train: no annotations"):
        read_episodes(tmp_path, "train")
    write(tmp_path, "0", 4)
    latents = tmp_path / "latent_videos/train/0/static.safetensors"
    latents.write_bytes(latents.read_bytes()[:-20])
    with pytest.raises(UserError, match="static.safetensors: cannot be read"):
        read_latents(latents, np.array([0]))
    (tmp_path / "annotation/train/0.json").write_text("[]")
    with pytest.raises(UserError, match="0.json: cannot be read"):
        read_episodes(tmp_path, "train")


def test_annotations_that_are_not_json_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, "0", 4)
    (tmp_path / "annotation/train/1.json").write_bytes(b"\xff{")
    (tmp_path / "annotation/train/._0.json").write_bytes(b"a Mac's")
    assert [e.id for e in read_episodes(tmp_path, "train")] == ["0"]
    assert "left out 1 of 2 annotations: " in (told := capsys.readouterr().out) and "1.json: not JSON" in told
    (tmp_path / "annotation/train/0.json").write_text("{")
    with pytest.raises(UserError, match="0.json: not JSON"):
        read_episodes(tmp_path, "train")


def test_a_caption_that_stands_alone_is_one_text(tmp_path: Path) -> None:
    write(tmp_path, "0", 4)
    file = tmp_path / "annotation/train/0.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"texts": "open the drawer"}))
    assert read_episodes(tmp_path, "train")[0].texts == ["open the drawer"]


@pytest.mark.parametrize(
    "changes",
    [{"cameras": [float("nan")]}, {"cameras": [1, float("inf")]}, {"weight": float("nan")}],
    ids=str,
)
def test_shares_are_numbers(changes: dict, tmp_path: Path) -> None:
    write(tmp_path, "0", 4)
    with pytest.raises(UserError, match="must be positive numbers"):
        clips(demos={"root": str(tmp_path), **changes})


def test_scores() -> None:
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.allclose(ssim(image, image), torch.ones(2), atol=1e-5)
    assert torch.allclose(psnr(image, image + 0.2), torch.full((2,), 20.0), atol=1e-3)  # 10 log10(4 / 0.04)
    assert (ssim(image, image.flip(-1)) < 0.2).all()
