"""The VAE, and stage 1 from demonstrations to imagined videos by its commands, on made-up demonstrations."""

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder

from defi.calvin import Span, encode_frame, frame_name, index_files
from defi.engine.checkpoint import find_checkpoint, find_weights
from defi.engine.tracking import read_metrics
from defi.errors import UserError
from defi.video import frame_count
from Step1_GFDM.config import VAESizes
from Step1_GFDM.data import read_episodes, read_latents
from Step1_GFDM.model import GFDM
from Step1_GFDM.principal import start_from_principal_components
from Step1_GFDM.vae import VAEConfig, VideoVAE, load_vae

SMALL = [
    "gfdm.frames=3",
    "gfdm.image_size=32",
    "gfdm.unet.block_out_channels=[32,32,32]",
    "gfdm.unet.num_attention_heads=[1,1,1]",
    "gfdm.unet.attention=[false,true,false]",
    "text.clip.width=16",
]
SHORT = ["trainer.global_batch=2", "trainer.max_steps=2", "trainer.sample_every=2", "trainer.log_every=1"]
VAE = VAEConfig(image_size=32, sizes=VAESizes([32, 32, 64], 1))


def moving_square(start: int, frames: int, size: int) -> np.ndarray:
    """A red square that moves right over a striped ground, uint8 [F, H, W, 3]."""
    video = np.full((frames, size, size, 3), 90, np.uint8)
    video[:, :, ::4] = 140
    for i in range(frames):
        left = (start + i) % (size - 10)
        video[i, size // 3 : size // 3 + 10, left : left + 10] = (220, 40, 40)
    return video


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in CALVIN's format: three demonstrations for training, one held out."""
    root = tmp_path_factory.mktemp("demonstrations")
    for split, count in (("training", 3), ("validation", 1)):
        folder = root / split
        (folder / "lang_annotations").mkdir(parents=True)
        for number in range(count * 12):
            frame = {
                "rgb_static": moving_square(number, 1, 40)[0],
                "rgb_gripper": moving_square(2 * number, 1, 28)[0],
                "rel_actions": np.zeros(7),
                "actions": np.zeros(7),
                "robot_obs": np.zeros(15),
                "scene_obs": np.zeros(24),
            }
            (folder / frame_name(number)).write_bytes(encode_frame(frame))
        bounds = [(12 * i, 12 * i + 11) for i in range(count)]
        spans = [Span(*bound, "push the red block to the right", "push_red_block_right") for bound in bounds]
        for name, content in index_files(bounds, spans, {"A": (0, count * 12 - 1)}).items():
            (folder / name).write_bytes(content)
    return root


def command(module: str, *settings: str) -> tuple[int, str]:
    """Run a command as `python -m` does, but in this process, which has torch: exit code and stderr."""
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", [module, *settings])
        try:
            importlib.import_module(f"Step1_GFDM.{module}").main()
        except SystemExit as end:
            return int(end.code or 0), errors.getvalue()
    return 0, errors.getvalue()


def succeed(module: str, *settings: str) -> None:
    code, errors = command(module, *settings)
    assert code == 0, errors


@pytest.fixture(scope="module")
def outputs(demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the four commands leave, each reading what the one before it wrote."""
    out = tmp_path_factory.mktemp("outputs")
    succeed("train_vae", *SMALL, *SHORT, f"data.root={demonstrations}", f"output={out}/vae", "held_out=4")
    succeed(
        "prepare", f"data.root={demonstrations}", f"vae={out}/vae", f"output={out}/latents", "data.every=2"
    )
    latents = [f"data.root={out}/latents", f"vae={out}/vae"]
    succeed("train", *SMALL, *SHORT, *latents, f"output={out}/gfdm", "gfdm.sampling.steps=2")
    succeed("eval", f"checkpoint={out}/gfdm", f"data.root={out}/latents", f"output={out}/imagined", "steps=2")
    return out


def test_start_is_a_linear_code() -> None:
    """Before training, latents have unit deviation and the picture comes back blurred, not grey."""
    torch.manual_seed(0)
    images = torch.from_numpy(moving_square(0, 12, 32)).movedim(-1, 1) / 127.5 - 1
    model = VideoVAE.from_config(VAE).eval()
    start_from_principal_components(model.vae, images)
    codes = model.vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(codes.std((0, 2, 3)), torch.ones(4), rtol=0.05, atol=0)
    error = (model.reconstruct(images[:, None])[:, 0] - images).square().mean()
    assert error < 0.6 * (images - images.mean()).square().mean()
    together = model.reconstruct(images[None])[0]
    torch.testing.assert_close(together, model.reconstruct(images[:, None])[:, 0], atol=1e-4, rtol=0)


def test_vae_overfits_one_batch_and_measures_its_scaling(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = VAE.fake_batch(2)
    model = VideoVAE.from_config(VAE).train()
    start_from_principal_components(model.vae, batch["frames"].flatten(0, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        loss = model(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    assert all(p.grad is not None for _, p in model.trainable())
    model.save_pretrained(tmp_path)
    saved = AutoencoderKLTemporalDecoder.from_pretrained(tmp_path)
    deviation = saved.encode(batch["frames"].flatten(0, 1)).latent_dist.mode().std().item()
    assert saved.config.scaling_factor * deviation == pytest.approx(1, rel=0.2)
    again = VideoVAE.from_config(VAE)
    again.load_weights(tmp_path)
    assert again.deviation == pytest.approx(model.deviation.item())


@pytest.mark.slow
def test_a_minute_of_training_keeps_small_objects() -> None:
    """250 steps on moving squares: the square comes back with its colour at its place."""
    torch.manual_seed(0)
    images = torch.from_numpy(moving_square(0, 22, 32)).movedim(-1, 1) / 127.5 - 1
    model = VideoVAE.from_config(VAE).train()
    start_from_principal_components(model.vae, images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3)
    for step in range(250):
        pick = torch.randint(20, (2,))
        frames = torch.stack([images[i : i + 2] for i in pick])
        loss = model({"frames": frames, "seed": torch.tensor([2 * step, 2 * step + 1])})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    back = model.eval().reconstruct(images[:, None])[:, 0]
    assert 10 * torch.log10(4 / (back - images).square().mean()) > 24


def test_vae_run_is_what_the_next_stage_loads(outputs: Path) -> None:
    vae = load_vae(outputs / "vae")
    assert vae.config.scaling_factor != 0.18215 and not any(p.requires_grad for p in vae.parameters())
    assert list((outputs / "vae" / "samples").rglob("reconstructed.png"))
    scores = [r for r in read_metrics(outputs / "vae" / "metrics.jsonl") if r["kind"] == "sample"]
    assert scores and "held_out_psnr" in str(scores[-1])


def test_latents_are_scaled_codes_of_the_frames(outputs: Path) -> None:
    episodes = read_episodes(outputs / "latents", "train")
    assert [e.frames for e in episodes] == [6, 6, 6]  # every second frame of twelve
    assert [frame_count(outputs / "latents" / video) for video in episodes[0].videos] == [6, 6]
    latents = read_latents(outputs / "latents" / episodes[0].latents[0], np.arange(6))
    assert latents.shape == (6, 4, 8, 8)
    assert 0.3 < latents.std() < 3


def test_gfdm_carries_its_vae_and_settings(outputs: Path) -> None:
    model = GFDM.from_pretrained(find_weights(outputs / "gfdm", "gfdm"))
    assert (model.config.frames, model.config.image_size) == (3, 32)
    expected = load_vae(outputs / "vae").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.vae.state_dict().items())
    assert list((outputs / "gfdm" / "samples").rglob("*.mp4"))


def test_held_out_episodes_are_imagined_and_scored(outputs: Path) -> None:
    scores = json.loads((outputs / "imagined" / "metrics.json").read_text())
    assert len(scores["psnr"]) == len(scores["ssim"]) == 3 and scores["episodes"] == 1
    assert [frame_count(clip) for clip in (outputs / "imagined" / "clips").glob("*.mp4")] == [3]


def test_preparation_goes_on_and_redoes_nothing(demonstrations: Path, outputs: Path) -> None:
    """With one annotation gone only that episode is made again."""
    folder = outputs / "latents"
    files = sorted(folder.rglob("*.safetensors"))
    before = {file: file.stat().st_mtime_ns for file in files}
    (folder / "annotation" / "train" / "000001.json").unlink()
    settings = [f"data.root={demonstrations}", f"vae={outputs}/vae", f"output={folder}", "data.every=2"]
    succeed("prepare", *settings, "resume=true")
    redone = {file.parent.name for file in files if file.stat().st_mtime_ns != before[file]}
    assert redone == {"000001"} and len(read_episodes(folder, "train")) == 3


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        ("train_vae", ["data.root=nowhere", "output={out}/new"], "nowhere/training: no such folder"),
        ("prepare", ["data.root={demos}", "vae=nowhere", "output={out}/new"], "nowhere: no checkpoint"),
        ("train", ["data.root=nowhere", "vae={out}/vae", "output={out}/new"], "nowhere/annotation/train"),
        ("train", ["data.root={out}/latents", "vae={out}/gfdm", "output={out}/new"], "gfdm checkpoint"),
        (
            "train",
            ["data.root={out}/latents", "vae={out}/vae", "output={out}/vae"],
            "exists and is not empty",
        ),
        ("eval", ["checkpoint={out}/vae", "data.root={out}/latents", "output={out}/new"], "vae checkpoint"),
    ],
)
def test_mistakes_end_in_one_line(
    demonstrations: Path, outputs: Path, module: str, settings: list[str], message: str
) -> None:
    code, errors = command(module, *(s.format(out=outputs, demos=demonstrations) for s in settings))
    assert code == 2, errors
    assert message in errors.splitlines()[-1] and "Traceback" not in errors
    assert not (outputs / "new").exists()


def test_vae_folder_of_another_kind_is_refused(outputs: Path) -> None:
    with pytest.raises(UserError, match=r"vae\.json: missing"):
        VideoVAE.from_pretrained(find_checkpoint(outputs / "gfdm"))
