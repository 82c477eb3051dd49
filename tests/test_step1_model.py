"""GFDM at small width: features, loss, generation, and its folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image
from torch import Tensor

from defi.errors import UserError
from defi.text import TextConfig
from Step1_GFDM.config import GFDMConfig, UNetSizes, VAESizes
from Step1_GFDM.model import GFDM

CONFIG = GFDMConfig(
    frames=3,
    image_size=64,
    unet=UNetSizes([32, 32, 32, 32], [1, 1, 1, 1], [False, True, True, False], 1, 16),
    vae=VAESizes([32, 32, 32], 1),
    clip=TextConfig(width=16, projection=8, layers=1, heads=1),
)


@pytest.fixture(scope="module")
def model() -> GFDM:
    torch.manual_seed(0)
    return GFDM.from_config(CONFIG).eval()


def test_features_have_the_announced_sizes(model: GFDM) -> None:
    latents = CONFIG.fake_batch(2)["latents"][:, 0]
    texts, noise = ["open the drawer", "push the red block"], torch.randn(2, *CONFIG.clip_shape)
    features = model.features(latents, texts, noise=noise)
    assert (
        features.shape == (2, CONFIG.frames, model.feature_tokens, model.feature_channels) == (2, 3, 64, 64)
    )
    assert features.requires_grad  # a policy may finetune the UNet through them
    frozen = GFDM.from_config(CONFIG).requires_grad_(False)
    assert not frozen.features(latents, texts, noise=noise).requires_grad


def test_features_are_those_of_the_whole_unet(model: GFDM) -> None:
    """The partial pass sees what hooks on up blocks 0 and 1 see in a full pass of diffusers' own forward."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in model.unet.up_blocks[:2]
    ]
    latents, noise = CONFIG.fake_batch(2)["latents"][:, 0], torch.randn(2, *CONFIG.clip_shape)
    text = model.encode_text(["open the drawer", ""])
    with torch.no_grad():
        model.scheduler.set_timesteps(CONFIG.features.steps)
        start = model.scheduler.timesteps[0]
        image = (latents / model.scaling).unsqueeze(1).expand_as(noise)
        scaled = model.scheduler.scale_model_input(noise * model.scheduler.init_noise_sigma, start)
        ids = model.time_ids(2, CONFIG.features.fps, CONFIG.features.motion_bucket, 0.0)
        model.unet(torch.cat([scaled, image], dim=2), start, encoder_hidden_states=text, added_time_ids=ids)
    for hook in hooks:
        hook.remove()
    maps = model.feature_maps(latents, text, noise=noise).flatten(0, 1)
    torch.testing.assert_close(maps[:, 32:], seen[1])
    torch.testing.assert_close(maps[:, :32, ::2, ::2], seen[0])
    torch.testing.assert_close(maps[:, :32, 1::2, 1::2], seen[0])


def test_a_clip_does_not_depend_on_its_batch(model: GFDM) -> None:
    latents, noise = CONFIG.fake_batch(3)["latents"][:, 0], torch.randn(3, *CONFIG.clip_shape)
    texts = ["open the drawer", "push the red block", "open the drawer"]
    together = model.features(latents, texts, noise=noise)
    alone = model.features(latents[1:2], texts[1:2], noise=noise[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_text_reaches_the_features(model: GFDM) -> None:
    latents, noise = CONFIG.fake_batch(1)["latents"][:, 0], torch.randn(1, *CONFIG.clip_shape)
    opened = model.features(latents, ["open the drawer"], noise=noise)
    closed = model.features(latents, ["close the drawer"], noise=noise)
    assert (opened - closed).abs().max() > 1e-4


def test_only_the_unet_learns(model: GFDM) -> None:
    model.train()(CONFIG.fake_batch(2))["loss"].backward()
    with_gradient = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    idle = {name for name, p in model.unet.named_parameters() if p.grad is None}
    assert with_gradient == {"unet"} and not idle
    assert {name.split(".")[0] for name, _ in model.trainable()} == {"unet"}
    model.zero_grad()
    model.eval()


def test_loss_belongs_to_samples_not_to_batches(model: GFDM) -> None:
    batch = CONFIG.fake_batch(3)
    parts = [
        {
            "latents": batch["latents"][i : i + 1],
            "text": batch["text"][i : i + 1],
            "seed": batch["seed"][i : i + 1],
        }
        for i in range(3)
    ]
    with torch.no_grad():
        torch.testing.assert_close(
            model(batch)["loss"], torch.stack([model(part)["loss"] for part in parts]).mean()
        )


def test_pixels_and_their_latents_give_about_the_same_loss(model: GFDM) -> None:
    """The sigmas are the same draws; only the condition differs, by noise of strength about 0.05."""
    frames = torch.rand(2, CONFIG.frames, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = model.encode_images(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
    rest = {"text": ["open the drawer", "close it"], "seed": torch.tensor([5, 6])}
    with torch.no_grad():
        from_pixels = model({"frames": frames, **rest})["loss"]
        from_latents = model({"latents": latents, **rest})["loss"]
    torch.testing.assert_close(from_pixels, from_latents, rtol=0.2, atol=0)


def test_overfits_one_batch() -> None:
    """With fixed noise draws the loss of one batch falls far: gradients reach what they must."""
    torch.manual_seed(0)
    model = GFDM.from_config(CONFIG).train()
    batch = CONFIG.fake_batch(2)
    optimizer = torch.optim.AdamW(model.unet.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = model(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.4 * losses[0], losses


def test_generation_is_guided_more_in_later_frames(model: GFDM) -> None:
    """Guidance 1 at frame 0: the unconditional branch cancels there, and only there."""
    latents, noise = CONFIG.fake_batch(1)["latents"][:, 0], torch.randn(1, *CONFIG.clip_shape)
    text = model.encode_text(["open the drawer"])
    guided = model.generate(latents, text, noise=noise, steps=1)
    unguided_config = replace(CONFIG, sampling=replace(CONFIG.sampling, max_guidance=1.0))
    plain = GFDM(unguided_config, unet=model.unet, vae=model.vae, scheduler=model.scheduler, clip=model.clip)
    unguided = plain.eval().generate(latents, text, noise=noise, steps=1)
    torch.testing.assert_close(guided[:, 0], unguided[:, 0])
    assert (guided[:, 1:] - unguided[:, 1:]).abs().amax(dim=(0, 2, 3, 4)).min() > 1e-4
    assert model.decode_latents(guided).shape == (1, CONFIG.frames, 3, 64, 64)


def test_folder_reads_back_and_diffusers_opens_it(model: GFDM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "gfdm")
    again = GFDM.from_pretrained(tmp_path / "gfdm").eval()
    assert again.config == CONFIG
    latents, noise = CONFIG.fake_batch(1)["latents"][:, 0], torch.randn(1, *CONFIG.clip_shape)
    for one, two in [(model.state_dict(), again.state_dict())]:
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    torch.testing.assert_close(
        again.features(latents, ["open it"], noise=noise), model.features(latents, ["open it"], noise=noise)
    )
    pipeline = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "gfdm")
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(tensor, model.unet.state_dict()[name])
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline(
        Image.new("RGB", (64, 64)), height=64, width=64, num_frames=2, num_inference_steps=1, output_type="pt"
    ).frames
    assert video.shape == (1, 2, 3, 64, 64)


def test_wrong_folders_are_named(model: GFDM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing/gfdm\.json: missing; give a checkpoint"):
        GFDM.from_pretrained(tmp_path / "nothing")
    folder = tmp_path / "gfdm"
    model.save_pretrained(folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"vae/diffusion_pytorch_model\.safetensors: cannot be read"):
        GFDM.from_pretrained(folder)
    (folder / "unet" / "config.json").write_text((folder / "vae" / "config.json").read_text())
    with pytest.raises(UserError, match=r"unet: holds a AutoencoderKLTemporalDecoder, expected UNet"):
        GFDM.from_pretrained(folder)
    settings = json.loads((folder / "gfdm.json").read_text())
    (folder / "gfdm.json").write_text(json.dumps({**settings, "frams": 3}))
    with pytest.raises(UserError, match=r"gfdm\.json\.frams"):
        GFDM.from_pretrained(folder)


def test_a_folder_without_frame_step_says_what_is_assumed(
    model: GFDM, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "gfdm.json").read_text())
    del settings["frame_step"]
    (tmp_path / "gfdm.json").write_text(json.dumps(settings))
    assert GFDM.from_pretrained(tmp_path).config.frame_step == 2
    assert f"{tmp_path}/gfdm.json: no frame_step, taken as 2" in capsys.readouterr().out


def test_weights_of_other_sizes_are_refused(model: GFDM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "gfdm")
    wider = replace(CONFIG, unet=replace(CONFIG.unet, block_out_channels=[32, 32, 32, 64]))
    other = GFDM.from_config(wider)
    before = {name: tensor.clone() for name, tensor in other.unet.state_dict().items()}
    with pytest.raises(UserError, match=r"has shape .* the model wants"):
        other.load_weights(tmp_path / "gfdm")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.unet.state_dict().items())


def test_a_new_model_starts_from_a_pretrained_folder(model: GFDM, tmp_path: Path) -> None:
    """Weights and sizes come from the folder, whatever the preset's own sizes are."""
    model.save_pretrained(tmp_path / "svd")
    other = replace(CONFIG, pretrained=str(tmp_path / "svd"), unet=UNetSizes(), vae=VAESizes())
    started = GFDM.from_config(other)
    assert (started.config.unet, started.config.vae) == (CONFIG.unet, CONFIG.vae)
    assert torch.equal(started.unet.conv_in.weight, model.unet.conv_in.weight)
    with pytest.raises(UserError, match="choose the text tower"):
        GFDM.from_config(replace(other, clip=TextConfig(width=32, projection=8, layers=1, heads=1)))
    with pytest.raises(UserError, match="no such folder"):
        GFDM.from_config(replace(other, pretrained="nowhere"))
