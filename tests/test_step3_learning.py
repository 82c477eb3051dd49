"""The action head of every preset learns chunks by heart: it can tell their actions apart."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from defi.config import compose_preset, presets
from defi.data.calvin import calvin_robot
from Step3_DeFI.action_head import ActionDenoiser
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.diffusion import SAMPLERS, denoising_loss, precondition

CHUNKS, WIDTH, DRAWS, STEPS = 16, 64, 4, 400
LEARNED = 0.02  # sampled mean square error. 0.08 is where a head ends that cannot tell actions apart


def build(config: PolicyConfig) -> ActionDenoiser:
    torch.manual_seed(0)
    return ActionDenoiser(
        replace(config.action_head, dim=WIDTH),
        sentence_dim=32,
        video_dim=16,
        latent_action_dim=16,
        action_dim=config.action_dim,
        chunk=config.chunk,
    )


def made_up(config: PolicyConfig) -> tuple[dict[str, Tensor], Tensor]:
    """Contexts, and the chunk that belongs to each."""
    random = torch.Generator().manual_seed(1)
    context = {
        "sentence": torch.randn(CHUNKS, 32, generator=random),
        "video_tokens": torch.randn(CHUNKS, 6, 16, generator=random),
        "latent_actions": torch.randn(CHUNKS, 4, 16, generator=random),
    }
    return context, torch.rand(CHUNKS, config.chunk, config.action_dim, generator=random) * 2 - 1


@torch.no_grad()
def error(head: ActionDenoiser, config: PolicyConfig, context: dict[str, Tensor], chunks: Tensor) -> float:
    """Mean square error of chunks sampled with the preset's sampler."""
    diffusion, head = config.diffusion, head.eval()
    sigmas, memory = diffusion.schedule(), head.encode(**context)
    levels = head.noise_levels(sigmas[:-1])
    denoise = precondition(
        lambda x, i: head.decode(memory, x, [level[i] for level in levels]),
        sigmas,
        sigma_data=diffusion.sigma_data,
    )
    noise = torch.randn(chunks.shape, generator=torch.Generator().manual_seed(2))
    sampled = SAMPLERS[diffusion.sampler](denoise, noise * sigmas[0], sigmas)
    return (sampled - chunks).square().mean().item()


@pytest.mark.parametrize("preset", presets())
def test_every_presets_head_learns_fixed_chunks(preset: str) -> None:
    config = PolicyConfig.from_preset(compose_preset(preset), calvin_robot())
    assert (config.diffusion.sampler, config.diffusion.steps) == ("ddim", 10)
    head, (context, chunks) = build(config), made_up(config)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, betas=(0.9, 0.99))
    for step in range(1, STEPS + 1):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 20) * max(0.03, 1 - step / STEPS)
        memory = head.train().encode(**context)
        loss = denoising_loss(
            lambda noisy, sigma, memory=memory: head.decode(memory, noisy, head.noise_levels(sigma)),
            chunks[:, None],
            noise=torch.randn(CHUNKS, DRAWS, *chunks.shape[1:]),
            sigma=config.diffusion.sigma(torch.rand(CHUNKS, DRAWS)),
            sigma_data=config.diffusion.sigma_data,
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 and error(head, config, context, chunks) < LEARNED:
            return
    assert error(head, config, context, chunks) < LEARNED


def test_full_cross_attention_comes_with_positions_and_no_other_does() -> None:
    for preset in presets():
        config = PolicyConfig.from_preset(compose_preset(preset), calvin_robot())
        for kind in ("full", "causal"):
            head = build(replace(config, action_head=replace(config.action_head, cross_attention=kind)))
            assert (head.action_positions is not None) == (kind == "full")
