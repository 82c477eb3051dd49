"""GFDM against the recorded outputs of the published modules: 1e-5 relative, float32, CPU."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from safetensors import safe_open
from torch import Tensor

from defi.text import CLIPText, TextConfig
from Step1_GFDM.config import DiffusionConfig, FeatureConfig, GFDMConfig, SamplingConfig
from Step1_GFDM.model import GFDM


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Largest error below 1e-5 of the largest value."""
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"relative error {error:.2e}"


@pytest.fixture(scope="module")
def recorded(reference: Path) -> tuple[dict, dict[str, Tensor]]:
    with safe_open(reference / "models" / "gfdm.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["config"]), tensors


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@pytest.fixture(scope="module")
def model(recorded) -> GFDM:
    sizes, tensors = recorded
    feature, loss, generate = sizes["feature"], sizes["loss"], sizes["generate"]
    config = GFDMConfig(
        frames=tensors["in.latents"].shape[1],
        image_size=tensors["in.image"].shape[-1],
        diffusion=DiffusionConfig(loss["P_mean"], loss["P_std"], 0.0, loss["fps"], loss["motion_bucket_id"]),
        sampling=SamplingConfig(
            generate["num_inference_steps"],
            generate["min_guidance"],
            generate["max_guidance"],
            generate["noise_aug_strength"],
        ),
        features=FeatureConfig(feature["num_inference_steps"], feature["fps"], feature["motion_bucket_id"]),
    )
    unet = UNetSpatioTemporalConditionModel(**sizes["unet"])
    unet.load_state_dict(part(tensors, "weights.unet."))
    vae = AutoencoderKLTemporalDecoder(**sizes["vae"])
    vae.load_state_dict(part(tensors, "weights.vae."))
    scheduler = EulerDiscreteScheduler(**sizes["scheduler"])
    clip = CLIPText.from_config(TextConfig(width=16, projection=16, layers=1, heads=1))
    return GFDM(config, unet=unet, vae=vae, scheduler=scheduler, clip=clip).eval()


def test_schedule(model: GFDM, recorded) -> None:
    _, tensors = recorded
    model.scheduler.set_timesteps(model.config.features.steps)
    assert_close(model.scheduler.sigmas, tensors["out.sigmas_20"])
    assert_close(model.scheduler.timesteps, tensors["out.timesteps_20"])


def test_features(model: GFDM, recorded) -> None:
    _, tensors = recorded
    latents = model.encode_images(tensors["in.image"])
    names = [key for key in tensors if key.startswith("out.features_step")]
    assert names
    for name in names:
        step = int(name.removeprefix("out.features_step"))
        maps = model.feature_maps(latents, tensors["in.text_embedding"], noise=tensors["in.noise"], step=step)
        assert_close(maps, tensors[name])


def test_loss_and_gradient(model: GFDM, recorded) -> None:
    _, tensors = recorded
    latents = tensors["in.latents"]
    loss = model.denoising_loss(
        latents,
        tensors["in.text_embedding"],
        condition=latents[:, 0],
        noise=tensors["in.loss_noise"],
        normal=tensors["in.loss_sigma_normal"],
    )
    assert_close(loss.detach(), tensors["out.training_loss"])
    gradient = torch.autograd.grad(loss, model.unet.conv_in.weight)[0]
    assert_close(gradient, tensors["out.grad.unet.conv_in.weight"])


def test_guided_generation(model: GFDM, recorded) -> None:
    _, tensors = recorded
    latents = model.encode_images(tensors["in.image"])
    text = tensors["in.text_embedding"]
    (name,) = [key for key in tensors if key.startswith("out.generated_latents")]
    assert_close(model.generate(latents, text, noise=tensors["in.noise"]), tensors[name])
