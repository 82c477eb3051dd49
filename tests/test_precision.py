"""Rounding of each network in bf16 and fp16, under autocast and with the weights cast, against float32."""

import copy
from collections.abc import Callable

import pytest
import torch
from policy_fakes import build_gfdm, build_policy
from torch import Tensor, nn

from Step1_GFDM.unet import up_block_features
from Step3_DeFI.policy import DeFI

# Largest relative error (norm of the difference / norm), 1.5 to 7 times what was measured. bf16 keeps 8
# bits of a number, fp16 11; features have gone through some forty layers, the others through about ten.
BOUNDS = {
    "features": {torch.bfloat16: 0.05, torch.float16: 0.007},
    "video_former": {torch.bfloat16: 0.03, torch.float16: 0.004},
    "gidm_encoder": {torch.bfloat16: 0.03, torch.float16: 0.004},
    "action_head": {torch.bfloat16: 0.03, torch.float16: 0.004},
}
PRECISIONS = [torch.bfloat16, torch.float16]
Case = tuple[nn.Module, Callable[..., Tensor], tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def supported(dtype: torch.dtype) -> None:
    """Skip what this processor cannot compute in."""
    try:
        nn.functional.conv2d(torch.ones(1, 1, 3, 3, dtype=dtype), torch.ones(1, 1, 3, 3, dtype=dtype))
    except RuntimeError as error:
        pytest.skip(f"{dtype}: {error}")


@pytest.fixture(scope="module")
def policy() -> DeFI:
    return build_policy().eval()


def build_case(name: str, policy: DeFI) -> Case:
    """A network, how to run it (the first argument is the network), and inputs."""
    torch.manual_seed(1)
    if name == "features":
        sample, text = torch.randn(2, 3, 8, 32, 32), torch.randn(2, 12, 32)
        timestep, ids = torch.full((2,), 1.6), torch.tensor([[4.0, 127.0, 0.0]] * 2)
        return build_gfdm().unet.eval(), up_block_features, (sample, timestep, text, ids)
    if name == "video_former":
        return policy.video_former, lambda net, x: net(x), (torch.randn(2, 3, 8, 256),)
    if name == "gidm_encoder":
        inputs = torch.randn(2, 2, 4, 16), torch.randn(2, 5, 16)
        return policy.gidm_branch.tokenizer.encoder, lambda net, x, text: net(x, text)[0], inputs

    def denoise(head, sentence, video_tokens, latent_actions, noisy, sigma):
        memory = head.encode(sentence=sentence, video_tokens=video_tokens, latent_actions=latent_actions)
        return head.decode(memory, noisy, head.noise_levels(sigma))

    context = torch.randn(2, 16), torch.randn(2, 6, 24), torch.randn(2, 4, 16)
    return policy.action_head, denoise, (*context, torch.randn(2, 10, 7), torch.tensor([0.1, 5.0]))


@pytest.mark.parametrize("way", ["autocast", "cast"])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", list(BOUNDS))
@torch.no_grad()
def test_rounding_is_bounded(policy: DeFI, name: str, dtype: torch.dtype, way: str) -> None:
    network, run, inputs = build_case(name, policy)
    exact = run(network, *inputs)
    if way == "autocast":
        with torch.autocast("cpu", dtype):
            rounded = run(network, *inputs)
    else:
        rounded = run(copy.deepcopy(network).to(dtype), *(x.to(dtype) for x in inputs))
        assert rounded.dtype == dtype
    error = ((rounded.float() - exact).norm() / exact.norm()).item()
    assert 0 < error < BOUNDS[name][dtype]


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@torch.no_grad()
def test_actions_in_low_precision(policy: DeFI, dtype: torch.dtype, bound: float) -> None:
    """A whole chunk, ten steps of sampling."""
    batch = policy.config.fake_batch(2)
    noise = torch.randn(2, 10, 7, generator=torch.Generator().manual_seed(0))
    exact = policy.act_on_features(batch["features"], batch["text"], noise=noise)
    with torch.autocast("cpu", dtype):
        rounded = policy.act_on_features(batch["features"], batch["text"], noise=noise)
    assert rounded.dtype == torch.float32
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 0 < error < bound


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_the_loss_in_low_precision(policy: DeFI, dtype: torch.dtype) -> None:
    """Forward and backward under autocast: losses are float32 sums, gradients point the same way."""
    directions, losses = [], []
    for enabled in (False, True):
        policy.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = policy(policy.config.fake_batch(4))["loss"]
        loss.backward()
        assert loss.dtype == torch.float32
        losses.append(loss.item())
        directions.append(torch.cat([p.grad.flatten() for _, p in policy.trainable()]))
    policy.zero_grad()
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert torch.cosine_similarity(*directions, dim=0) > 0.99
