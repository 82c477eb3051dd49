"""Clips of latents: windows, mixtures, safe paths, clear errors; the scores of imagined frames."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from defi.errors import UserError
from Step1_GFDM.data import LATENTS, LatentClips, read_episodes, read_latents
from Step1_GFDM.eval import psnr, ssim


def write(
    root: Path,
    name: str,
    frames: int,
    *,
    suffix: str = ".safetensors",
    path: str | None = None,
    cameras: int = 2,
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
    file.write_text(json.dumps({**annotation, "video_length": frames}))


def clips(frames: int = 3, **sets: dict) -> LatentClips:
    return LatentClips.from_config({"sets": sets}, frames=frames, split="train")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_windows_are_strided_and_clamped(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, "0", 7, suffix=suffix)
    data = clips(demos={"root": str(tmp_path), "stride": 2, "every": 3, "cameras": [1.0]})
    found = [
        data.sample(i, np.random.default_rng(0))["latents"][:, 0, 0, 0].tolist() for i in range(len(data))
    ]
    assert found == [[0, 2, 4], [3, 5, 6], [6, 6, 6]]


def test_spread_takes_the_whole_video_and_skips_long_ones(tmp_path: Path) -> None:
    write(tmp_path, "0", 9)
    write(tmp_path, "1", 101)
    data = clips(human={"root": str(tmp_path), "clips": "spread", "longest": 100, "cameras": [1.0]})
    assert len(data) == 1
    assert data.sample(0, np.random.default_rng(0))["latents"][:, 0, 0, 0].tolist() == [0, 4, 8]


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
    with pytest.raises(UserError, match="static.safetensors: cannot read"):
        read_latents(latents, np.array([0]))
    (tmp_path / "annotation/train/0.json").write_text("{")
    with pytest.raises(UserError, match="0.json: not an annotation"):
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
