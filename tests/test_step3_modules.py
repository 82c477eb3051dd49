"""Modules of the policy: samplers, noise density, action head, VideoFormer."""

import pytest
import torch

from Step3_DeFI.action_head import ActionDenoiser
from Step3_DeFI.config import ActionDiffusionConfig, ActionHeadConfig
from Step3_DeFI.diffusion import SAMPLERS, Denoiser, exponential_schedule, guide, precondition
from Step3_DeFI.features import Standardise, merge_tokens
from Step3_DeFI.video_former import VideoFormer

B, K, A, N, Q = 2, 10, 7, 12, 4


def build_head(**changes) -> ActionDenoiser:
    torch.manual_seed(0)
    config = ActionHeadConfig(dim=32, encoder_layers=1, decoder_layers=2, heads=4, **changes)
    return ActionDenoiser(
        config, sentence_dim=16, video_dim=24, latent_action_dim=20, action_dim=A, chunk=K
    ).eval()


def fake_context() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "sentence": torch.randn(B, 16),
        "video_tokens": torch.randn(B, N, 24),
        "latent_actions": torch.randn(B, Q, 20),
    }


def gaussian_denoiser(mean: float, std: float, sigmas: torch.Tensor) -> Denoiser:
    """The exact denoiser of data N(mean, std²)."""
    return lambda x, i: (std**2 * x + sigmas[i] ** 2 * mean) / (std**2 + sigmas[i] ** 2)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_samplers_reach_the_data_distribution(name):
    x = torch.randn(4000, 1, 1, generator=torch.Generator().manual_seed(0)) * 80
    sigmas = exponential_schedule(60, sigma_max=80.0, sigma_min=0.01)
    samples = SAMPLERS[name](gaussian_denoiser(0.3, 0.5, sigmas), x, sigmas)
    assert samples.mean().item() == pytest.approx(0.3, abs=0.03)
    assert samples.std().item() == pytest.approx(0.5, abs=0.03)


def sampling_error(name: str, steps: int, *, deviation: float = 0.5) -> float:
    """Distance to the exact solution: for data N(0, s²) the flow is x(0) = x(σ)·s/√(s² + σ²)."""
    start = torch.full((1, 1, 1), 80.0, dtype=torch.float64)
    exact = start * deviation / (deviation**2 + 80.0**2) ** 0.5
    sigmas = exponential_schedule(steps, sigma_max=80.0, sigma_min=1e-4).double()
    return (SAMPLERS[name](gaussian_denoiser(0.0, deviation, sigmas), start, sigmas) - exact).abs().item()


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_samplers_converge_to_the_exact_solution(name):
    assert sampling_error(name, 1000) < 2e-3 < 0.1 < sampling_error(name, 5)


@pytest.mark.parametrize("name, factor", [("ddim", 2), ("dpmpp_2m", 4), ("heun", 4)])
def test_order_of_the_samplers(name, factor):
    """Twice the steps: half the error at first order, a quarter at second."""
    assert sampling_error(name, 80) / sampling_error(name, 160) == pytest.approx(factor, rel=0.1)


def test_second_order_samplers_need_fewer_steps():
    """Heun calls the network twice per step, DPM-Solver++(2M) once."""
    assert sampling_error("dpmpp_2m", 10) < sampling_error("ddim", 80)
    assert sampling_error("heun", 40) < sampling_error("ddim", 160)


def test_guidance_of_gaussians():
    """Gaussian data of mean 0.3 with the condition and 0 without: guided by s, its mean is 0.3·s."""
    scale, sigmas = 3.0, exponential_schedule(60, sigma_max=80.0, sigma_min=0.01)

    def both(x, i):
        conditioned, without = (gaussian_denoiser(mean, 0.5, sigmas) for mean in (0.3, 0.0))
        rows = len(x) // 2
        return torch.cat([conditioned(x[:rows], i), without(x[rows:], i)])

    x = torch.randn(100, K, A, generator=torch.Generator().manual_seed(0)) * 80
    for sample in SAMPLERS.values():
        guided = sample(guide(both, scale), x, sigmas)
        moved = sample(gaussian_denoiser(scale * 0.3, 0.5, sigmas), x, sigmas)
        torch.testing.assert_close(guided, moved, rtol=1e-4, atol=1e-4)


def test_training_noise_levels_follow_the_density():
    config = ActionDiffusionConfig()
    sigma = config.sigma(torch.linspace(0, 1, 1001))
    assert sigma[0].item() == pytest.approx(config.sigma_min, rel=1e-3)
    assert sigma[-1].item() == pytest.approx(config.sigma_max, rel=1e-2)
    assert sigma[500].item() == pytest.approx(config.sigma_data, rel=1e-3)
    assert (sigma.diff() > 0).all()


def test_preconditioned_denoiser_keeps_clean_actions():
    """At σ → 0 the skip connection passes actions through, whatever the network says."""
    actions = torch.randn(B, K, A)
    denoise = precondition(lambda x, i: torch.randn_like(x), torch.tensor([1e-5]), sigma_data=0.5)
    assert torch.allclose(denoise(actions, 0), actions, atol=1e-3)


@pytest.mark.parametrize("kind", ["causal", "full"])
def test_what_an_action_sees_of_the_context(kind):
    head = build_head(cross_attention=kind)
    memory = head.encode(**fake_context())
    noisy, levels = torch.randn(B, K, A), head.noise_levels(torch.ones(B))
    changed = 3  # only keys and values of the fourth context token change
    other = [(k.clone(), v.clone()) for k, v in memory]
    for k, v in other:
        k[:, :, changed] += 1
        v[:, :, changed] += 1
    moved = (head.decode(memory, noisy, levels) - head.decode(other, noisy, levels)).abs().amax((0, 2))
    unseen = moved[:changed]
    assert (unseen == 0).all() if kind == "causal" else (unseen > 0).all()
    assert (moved[changed:] > 0).all()


def test_actions_see_earlier_actions_only():
    head = build_head()
    memory, noisy = head.encode(**fake_context()), torch.randn(B, K, A)
    later = noisy.clone()
    later[:, 6:] += 1
    levels = head.noise_levels(torch.ones(B))
    moved = (head.decode(memory, noisy, levels) - head.decode(memory, later, levels)).abs()
    assert (moved[:, :6] == 0).all() and (moved[:, 6:] > 0).all()


def test_video_former_mixes_frames():
    torch.manual_seed(0)
    features = torch.randn(1, 3, N, 8)
    later = features.clone()
    later[:, 2] += 1
    model = VideoFormer(feature_channels=8, dim=16, depth=1, heads=2, head_dim=8, frames=3, queries=2).eval()
    tokens = model(features)
    assert tokens.shape == (1, 6, 16)
    assert not torch.allclose(tokens[:, :2], model(later)[:, :2], atol=1e-4)


def test_merged_tokens_are_squares_of_neighbours():
    grid = torch.arange(16.0).view(1, 1, 1, 16, 1)  # 4 × 4 places of one channel
    merged = merge_tokens(grid, 2)
    assert merged.shape == (1, 1, 1, 4, 4)
    assert merged[0, 0, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(merge_tokens(grid, 1), grid)


def test_standardised_features_have_no_mean_and_unit_deviation():
    features = torch.randn(50, 2, 3, 4, 5) * 3 + torch.randn(1, 2, 1, 4, 5) * 10
    layer = Standardise(2, 4, 5)
    assert torch.equal(layer(features), features)
    layer.fit(features)
    even = layer(features)
    assert torch.allclose(even.mean((0, 2)), torch.zeros(2, 4, 5), atol=1e-5)
    assert torch.allclose(even.std((0, 2)), torch.ones(2, 4, 5), atol=1e-5)
    assert {"mean", "deviation"} == set(layer.state_dict())
