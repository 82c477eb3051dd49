"""Full size: what is computed, counted on the meta device; and the benchmarks, which run in `tiny` here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from policy_fakes import build_gfdm
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_check, policy_full_size
from defi.config import compose_preset
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.pipeline import build_unet
from Step1_GFDM.unet import up_block_features

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def unet_input() -> dict:
    """A full-size UNet and one clip for it, without memory."""
    config = GFDMConfig.from_preset(compose_preset("paper"))
    size = config.latent_size
    with torch.device("meta"):
        return {
            "unet": build_unet(config, config.clip.width).eval().to("meta"),  # some parts ignore the context
            "sample": torch.empty(1, config.frames, 2 * config.vae.latent_channels, size, size),
            "timestep": torch.empty(1),
            "text": torch.empty(1, config.clip.tokens, 2 * config.clip.width),
            "time_ids": torch.empty(1, 3),
        }


@torch.no_grad()
def test_features_compute_only_what_they_need(unet_input: dict) -> None:
    """2.87 TFLOP per clip, of the 4.96 of the whole UNet."""
    with FlopCounterMode(display=False) as counter:
        maps = up_block_features(**unet_input)
    assert maps.shape == (1, 16, 2560, 16, 16)
    assert counter.get_total_flops() / 1e12 == pytest.approx(2.87, abs=0.01)
    unet, sample = unet_input["unet"], unet_input["sample"]
    with FlopCounterMode(display=False) as counter:
        unet(
            sample,
            unet_input["timestep"],
            encoder_hidden_states=unet_input["text"],
            added_time_ids=unet_input["time_ids"],
        )
    assert counter.get_total_flops() / 1e12 == pytest.approx(4.96, abs=0.01)


def test_gradient_checkpointing_leaves_gradients_as_they_are() -> None:
    """What `gfdm.gradient_checkpointing` of the large presets turns on."""
    gradients = []
    for checkpointed in (False, True):
        model = build_gfdm().train()
        if checkpointed:
            model.unet.enable_gradient_checkpointing()
        model(model.config.fake_batch(2))["loss"].backward()
        gradients.append(model.unet.conv_in.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_policy_with_its_unet_in_bf16_acts() -> None:
    policy = policy_full_size.build("tiny", unet_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in policy.gfdm.unet.parameters()} == {torch.bfloat16}
    assert policy.action_head.predict.weight.dtype == torch.float32
    chunk, seconds = policy_full_size.look(policy, seed=0)
    assert chunk.shape == (1, 10, 7) and chunk.isfinite().all() and seconds > 0
    assert policy_full_size.parameters(policy)["UNet"] > 1e6


def test_a_compiled_policy_acts_the_same() -> None:
    """Traced as for the GPU, without the slow step of generating code."""
    policy = policy_full_size.build("tiny", unet_dtype=torch.float32)
    images = torch.randint(0, 256, (1, 2, 3, 64, 64), dtype=torch.uint8)
    noise = policy.noise(torch.tensor([1]))
    plain = policy.act(images, ["open the drawer"], noise=noise)
    gpu_check.compile_policy(policy, backend="eager")
    compiled = policy.act(images, ["open the drawer"], noise=noise)
    torch.testing.assert_close(compiled, plain)


def test_gpu_check_runs_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "check.json"
    settings = ("--preset", "tiny", "--device", "cpu", "--batch", "2", "--repeats", "2", "--no-compile")
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_check.sh"), *settings, "--output", str(output)],
        env=os.environ | {"DEFI_VENV": sys.prefix, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(output.read_text())
    assert set(results["training"]) == {"gfdm", "gidm", "policy"}
    for found in results["training"].values():
        assert found["samples_per_s"] > 0 and found["tflop_per_sample"] > 0 and found["share_of_peak"] > 0
    errors = results["parity"]
    assert set(errors) >= {"VAE encoder", "GFDM features", "VideoFormer", "GIDM branch", "action denoiser"}
    assert all(0 < error < 0.1 for name, error in errors.items() if name not in ("policy", "GIDM branch")), (
        errors
    )
    assert 0 < results["latency"]["p50_ms"] <= results["latency"]["p99_ms"]
    for text in ("matrix peak", "training, policy", "p99", "written"):
        assert text in done.stdout
