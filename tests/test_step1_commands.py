"""The VAE, and stage 1 from demonstrations to imagined videos by its commands, on made-up demonstrations."""

import contextlib
import importlib
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchmetrics
from diffusers import AutoencoderKLTemporalDecoder
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import alexnet

from defi.config import CONFIG_DIR
from defi.data.calvin import Span, encode_frame, frame_name, index_files
from defi.engine.checkpoint import find_checkpoint, find_weights
from defi.engine.log import read_metrics
from defi.errors import UserError
from defi.text import TextConfig
from defi.video import frame_count, read_frames
from Step1_GFDM.config import GFDMConfig, UNetSizes, VAESizes
from Step1_GFDM.data import LATENTS, MANIFEST, open_sets, read_episodes, read_latents
from Step1_GFDM.eval import stacked
from Step1_GFDM.evaluation.metrics import BACKBONE, load_lpips, one_step_error, one_step_figures
from Step1_GFDM.model import GFDM
from Step1_GFDM.pca_init import start_from_principal_components
from Step1_GFDM.pipeline import build_vae
from Step1_GFDM.vae import VAEConfig, VideoVAE, load_vae

SMALL = [
    "gfdm.frames=3",
    "gfdm.frame_step=2",
    "gfdm.image_size=32",
    "gfdm.unet.block_out_channels=[32,32,32]",
    "gfdm.unet.num_attention_heads=[1,1,1]",
    "gfdm.unet.attention=[false,true,false]",
    "text.clip.width=16",
]
SHORT = ["trainer.global_batch=2", "trainer.max_steps=2", "trainer.preview_every=2", "trainer.log_every=1"]
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


def write_lpips_weights(folder: Path) -> None:
    """A file as published, with other numbers in it and a small classifier, which is not read."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    layers = {f"features.{name}": tensor for name, tensor in alexnet().features.state_dict().items()}
    torch.save({**layers, "classifier.1.bias": torch.zeros(4096)}, folder / BACKBONE)


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
    write_lpips_weights(out / "lpips")
    given = [f"checkpoint={out}/gfdm", f"data.root={out}/latents", f"lpips={out}/lpips"]
    succeed("eval", *given, f"output={out}/imagined", "split=train", "steps=2", "instruction='lift <it>'")
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
    assert list((outputs / "vae" / "previews").rglob("reconstructed.png"))
    scores = [r for r in read_metrics(outputs / "vae" / "metrics.jsonl") if r["kind"] == "preview"]
    assert scores and "held_out_psnr" in str(scores[-1])


def test_latents_are_scaled_codes_of_the_frames(outputs: Path) -> None:
    episodes = read_episodes(outputs / "latents", "train")
    assert [e.frames for e in episodes] == [6, 6, 6]  # every second frame of twelve
    assert [frame_count(outputs / "latents" / video) for video in episodes[0].videos] == [6, 6]
    latents = read_latents(outputs / "latents" / episodes[0].latents[0], np.arange(6))
    assert latents.shape == (6, 4, 8, 8)
    assert 0.3 < latents.std() < 3


def test_calvin_as_it_is_prepared_gives_the_published_windows(
    demonstrations: Path, outputs: Path, tmp_path: Path
) -> None:
    """Of every annotated span (12 frames here): 16 frames, 2 apart, a window every 2, the last repeated."""
    given = [f"data.root={demonstrations}", f"vae={outputs}/vae", f"output={tmp_path}/calvin"]
    succeed("prepare", *given)
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        given = ["preset=paper", "data=latents_paper", f"data.root={tmp_path}", "output=none"]
        cfg = compose("step1_train", given)
    OmegaConf.resolve(cfg)
    sets, model = {"sets": {"calvin": cfg.data.sets.calvin}}, GFDMConfig.from_preset(cfg)
    (clips,) = open_sets(sets, model, "train").values()
    assert len(clips) == 3 * 6
    for index in range(6):
        found = clips.indices(*clips.locate(index)).tolist()
        assert found == [min(2 * index + 2 * k, 11) for k in range(16)]
    look, episode = clips.clip(0, np.random.default_rng(0))["latents"], clips.episodes[0]
    views = [read_latents(clips.root / path, np.array([0, 10])) for path in episode.latents]
    assert any(torch.equal(look[[0, 5]], view) for view in views)  # frame 5 is ten steps ahead


def test_gfdm_carries_its_vae_and_settings(outputs: Path) -> None:
    model = GFDM.from_pretrained(find_weights(outputs / "gfdm", "gfdm"))
    assert (model.config.frames, model.config.frame_step, model.config.image_size) == (3, 2, 32)
    expected = load_vae(outputs / "vae").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.vae.state_dict().items())
    assert list((outputs / "gfdm" / "previews").rglob("*.mp4"))


def test_episodes_are_imagined_and_scored(outputs: Path) -> None:
    """Three episodes of one look: standing still has no error at frame 0, and some after it."""
    scores = json.loads((outputs / "imagined" / "metrics.json").read_text())
    assert scores["episodes"] == 3
    for name in ("psnr", "ssim", "lpips"):
        assert len(scores[name]) == len(scores[f"{name}_still"]) == 3 and np.isfinite(scores[name]).all()
    assert scores["lpips_still"][0] == 0 < scores["lpips_still"][1]
    one_step = scores["one_step"]
    assert one_step["latents_still"][0] == 0 < min(one_step["latents_still"][1:] + one_step["latents"])
    assert one_step["features"] > 0


def test_gallery_shows_each_instruction_beside_the_real_future(outputs: Path) -> None:
    clips = sorted((outputs / "imagined" / "clips").rglob("*.mp4"))
    frames = [read_frames(clip) for clip in clips]
    assert [clip.shape[0] for clip in frames] == [3, 3, 3]
    assert {clip.shape[2] for clip in frames} == {
        3 * 32 * 5
    }  # real, its own instruction's, the user's; enlarged
    page = (outputs / "imagined" / "gallery.html").read_text()
    assert page.count("<video") == 3
    assert "push the red block to the right | lift &lt;it&gt;" in page and "LPIPS" in page


TINY = GFDMConfig(
    frames=3,
    image_size=16,
    unet=UNetSizes([32, 32, 32], [1, 1, 1], [False, True, False], 1, 16),
    vae=VAESizes([32, 32, 32], 1),
    clip=TextConfig(width=16, projection=8, layers=1, heads=1),
)


def test_one_step_prediction_of_a_perfect_network_is_the_future() -> None:
    """Where the network's output is the velocity that v-prediction asks for, nothing is left of the noise."""
    model = GFDM.from_config(TINY)
    future, noise = torch.randn(1, 3, 4, 4, 4), torch.randn(1, 3, 4, 4, 4)
    sigma = 700  # of the first step
    velocity = (noise - sigma * future) / (sigma**2 + 1) ** 0.5
    model.unet.forward = lambda *_, **__: SimpleNamespace(sample=velocity)
    predicted = model.predict_once(future[:, 0], ["push"], noise=noise)
    torch.testing.assert_close(predicted, future, atol=0.01, rtol=0)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (1.0, 1.0), (0.5**0.5, 0.5)])
def test_influence_of_the_noise_on_features(
    share: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 where only the picture matters, 1 where only the noise does."""
    torch.manual_seed(0)
    model = GFDM.from_config(TINY)

    def features(first: Tensor, texts: list[str], *, noise: Tensor) -> Tensor:
        return (1 - share**2) ** 0.5 * first[:, None] + share * noise

    monkeypatch.setattr(model, "features", features)
    looks = torch.randn(20, 3, 4, 4, 4)
    rows = [
        one_step_error(model, looks[i], "push", other=(looks[i - 1, :1], "push"), seed=i) for i in range(20)
    ]
    assert one_step_figures(stacked(rows[:1]))["features"] is None
    assert one_step_figures(stacked(rows))["features"] == pytest.approx(expected, abs=0.08)


def test_lpips_weighs_unit_activations(tmp_path: Path) -> None:
    """The formula, written out; the linear weights are the published ones, the backbone's are the file's."""
    write_lpips_weights(tmp_path)
    lpips = load_lpips(tmp_path)
    a, b = torch.rand(2, 3, 3, 64, 64) * 2 - 1
    assert lpips(a, a).tolist() == [0, 0, 0] and (lpips(a, b) > 0).all()
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    layers = alexnet().features
    published = torch.load(tmp_path / BACKBONE, weights_only=True)
    layers.load_state_dict(
        {n.removeprefix("features."): t for n, t in published.items() if n.startswith("features.")}
    )
    place = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "alex.pth"
    linear = torch.load(place, weights_only=True, map_location="cpu")

    @torch.no_grad()
    def activations(images: Tensor) -> list[Tensor]:
        x, found = ((images + 1) / 2 - mean[:, None, None]) / deviation[:, None, None], []
        for layer in layers[:-1]:
            x = layer(x)
            if isinstance(layer, torch.nn.ReLU):
                found.append(x / x.norm(dim=1, keepdim=True))
        return found

    differences = [(x - y).square() for x, y in zip(activations(a), activations(b))]
    weights = [linear[f"lin{level}.model.1.weight"] for level in range(5)]
    expected = sum((w * d).sum(1).mean((1, 2)) for w, d in zip(weights, differences))
    torch.testing.assert_close(lpips(a, b), expected, rtol=3e-3, atol=0)  # its mean has three digits


def test_lpips_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{BACKBONE}: no such file"):
        load_lpips(tmp_path)
    write_lpips_weights(tmp_path)
    published = torch.load(tmp_path / BACKBONE, weights_only=True)
    del published["features.6.bias"]
    torch.save(published, tmp_path / BACKBONE)
    with pytest.raises(UserError, match=r"lacks features\.6\.bias"):
        load_lpips(tmp_path)


def test_preparation_goes_on_and_redoes_nothing(demonstrations: Path, outputs: Path, tmp_path: Path) -> None:
    """With one annotation gone only that episode is made again, also from demonstrations that were moved."""
    moved = shutil.copytree(demonstrations, tmp_path / "moved")
    folder = outputs / "latents"
    files = sorted(folder.rglob("*.safetensors"))
    before = {file: file.stat().st_mtime_ns for file in files}
    (folder / "annotation" / "train" / "000001.json").unlink()
    settings = [f"data.root={moved}", f"vae={outputs}/vae", f"output={folder}", "data.every=2"]
    succeed("prepare", *settings, "resume=true")
    redone = {file.parent.name for file in files if file.stat().st_mtime_ns != before[file]}
    assert redone == {"000001"} and len(read_episodes(folder, "train")) == 3


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        ("train_vae", ["data.root=nowhere", "output={out}/new"], "nowhere/training: no such folder"),
        *(
            ("train_vae", ["data.root={demos}", "output={out}/new", wrong], wrong)
            for wrong in ("data.frames=0", "data.stride=0")
        ),
        (
            "train_vae",
            ["data.root={demos}", "output={out}/new", "data.shares=[0, 1]"],
            "data.shares=[0.0, 1.0]",
        ),
        (
            "prepare",
            ["data.root={demos}", "data.cameras={{top: dark}}", "output={out}/new"],
            "data.cameras={'top': 'dark'}: must be a list, ",
        ),
        ("prepare", ["data.root={demos}", "vae=nowhere", "output={out}/new"], "nowhere: no checkpoint"),
        ("train", ["data.root=nowhere", "vae={out}/vae", "output={out}/new"], "nowhere/annotation/train"),
        (
            "train",
            [*SMALL, "data.root={out}/latents", "vae={out}/gfdm", "output={out}/new"],
            "gfdm checkpoint",
        ),
        (
            "train",
            [*SMALL, "gfdm.image_size=64", "data.root={out}/latents", "vae={out}/vae", "output={out}/new"],
            "its latents are [4, 8, 8], the model's [4, 16, 16]",
        ),
        (
            "train",
            [*SMALL, "gfdm.frame_step=3", "data.root={out}/latents", "vae={out}/vae", "output={out}/new"],
            "stores one frame in 2 of its recordings, too few for stride=3, every=3",
        ),
        (
            "train",
            ["gfdm.frame_step=0", "data.root={out}/latents", "output={out}/new"],
            "gfdm.frame_step=0: ",
        ),
        (
            "train",
            ["data.root={out}/latents", "vae={out}/vae", "output={out}/vae"],
            "exists and is not empty",
        ),
        ("eval", ["checkpoint={out}/vae", "data.root={out}/latents", "output={out}/new"], "vae checkpoint"),
        *(
            ("eval", ["checkpoint={out}/gfdm", "data.root={out}/latents", "output={out}/new", wrong], wrong)
            for wrong in ("episodes=0", "steps=0", "steps=1.5", "camera=-1", "fps=0")
        ),
    ],
)
def test_mistakes_end_in_one_line(
    demonstrations: Path, outputs: Path, module: str, settings: list[str], message: str
) -> None:
    code, errors = command(module, *(s.format(out=outputs, demos=demonstrations) for s in settings))
    assert code == 2, errors
    assert message in errors.splitlines()[-1] and "Traceback" not in errors
    assert not (outputs / "new").exists()


def test_latents_at_the_size_of_a_large_autoencoder_must_be_asked_for(
    demonstrations: Path, tmp_path: Path
) -> None:
    """Stable Video Diffusion's says 768: nine times the pixels that preset=paper trains on."""
    build_vae(VAESizes([32, 32], 1), 768).save_pretrained(tmp_path / "vae")
    given = [f"data.root={demonstrations}", f"vae={tmp_path}/vae", f"output={tmp_path}/latents"]
    code, errors = command("prepare", *given)
    assert code == 2 and "image_size=256" in errors.splitlines()[-1]
    assert not (tmp_path / "latents").exists()


def test_vae_folder_of_another_kind_is_refused(outputs: Path) -> None:
    with pytest.raises(UserError, match="holds a gfdm checkpoint, not vae"):
        load_vae(outputs / "gfdm")


def test_latents_of_another_autoencoder(outputs: Path, tmp_path: Path) -> None:
    """Refused where this one becomes the model's; told where a pretrained model brings its own."""
    other = Path(shutil.copytree(outputs / "vae", tmp_path / "vae"))
    file = next(find_weights(other, "vae").rglob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    given = [*SMALL, *SHORT, f"data.root={outputs}/latents", f"output={tmp_path}/gfdm"]
    code, errors = command("train", *given, f"vae={other}")
    assert code == 2 and "these latents were made by autoencoder" in errors.splitlines()[-1]
    assert not (tmp_path / "gfdm").exists()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        succeed("train", *given, f"gfdm.pretrained={find_checkpoint(outputs / 'gfdm')}")
    assert "these latents" not in printed.getvalue()


def test_latents_that_a_checkpoint_cannot_go_on_from(outputs: Path, tmp_path: Path) -> None:
    """Those of another autoencoder; and, where the folder does not say, of another size."""
    data = Path(shutil.copytree(outputs / "latents", tmp_path / "latents"))
    manifest = json.loads((data / MANIFEST).read_text())
    (data / MANIFEST).write_text(json.dumps(manifest | {"vae": "another"}))
    given = [f"checkpoint={outputs}/gfdm", f"data.root={data}", f"output={tmp_path}/imagined"]
    code, errors = command("eval", *given)
    assert code == 2 and "were made by autoencoder another" in errors.splitlines()[-1]
    (data / MANIFEST).unlink()
    for file in (data / "latent_videos").rglob("*.safetensors"):
        save_file({LATENTS: torch.zeros(6, 4, 4, 4)}, file)
    code, errors = command("eval", *given)
    assert code == 2 and "its latents are [4, 4, 4], the model's [4, 8, 8]" in errors.splitlines()[-1]
    assert not (tmp_path / "imagined").exists()
