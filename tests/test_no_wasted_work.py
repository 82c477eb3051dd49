"""Nothing is computed twice, or for nothing; attention is fused; the policy's networks compile as a whole."""

from collections.abc import Callable

import pytest
import torch
from policy_fakes import PRESET, build_gfdm, build_policy
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from Step1_GFDM.unet import FEATURE_PARTS
from Step3_DeFI.policy import DeFI

TEXTS = ["open the drawer", "push the red block to the left", "open the drawer"]


@pytest.fixture(scope="module")
def policy() -> DeFI:
    return build_policy().eval()


@pytest.fixture(scope="module")
def looks() -> Tensor:
    return torch.randint(
        0, 256, (3, 2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def watch(module: nn.Module, calls: list[str], name: str = "") -> None:
    module.register_forward_pre_hook(lambda *_: calls.append(name))


# ------------------------------------------------------------ the video model


def test_features_run_the_first_part_of_the_unet_once() -> None:
    gfdm = build_gfdm()
    calls: list[str] = []
    children = {
        f"{name}.{number}": block
        for name in ("down_blocks", "up_blocks")
        for number, block in enumerate(gfdm.unet.get_submodule(name))
    }
    children |= {n: m for n, m in gfdm.unet.named_children() if n not in ("down_blocks", "up_blocks")}
    for name, child in children.items():
        watch(child, calls, name)
    with torch.no_grad():
        gfdm.features(torch.randn(2, 4, 8, 8), TEXTS[:2], noise=torch.randn(2, *gfdm.config.clip_shape))
    expected = {name for name in children if name.startswith(FEATURE_PARTS)} | {"time_proj", "add_time_proj"}
    assert sorted(calls) == sorted(expected)
    assert {"up_blocks.2", "up_blocks.3", "conv_norm_out", "conv_out"}.isdisjoint(calls)


# ------------------------------------------------------------ text and attention


def test_text_is_encoded_once_per_distinct_instruction(looks: Tensor) -> None:
    policy = build_policy().eval()
    calls: list[str] = []
    watch(policy.gfdm.clip.model, calls, "clip")
    watch(policy.t5.model, calls, "t5")
    for seed in range(3):
        policy.act(looks, TEXTS, noise=policy.noise(torch.arange(3) + seed))
    assert sorted(calls) == ["clip", "clip", "t5", "t5"]


class Attentions(TorchFunctionMode):
    """Counts fused attention and softmax, which only attention by hand would call."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = self.softmax = 0

    def __torch_function__(self, function: Callable, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        self.fused += name == "scaled_dot_product_attention"
        self.softmax += name == "softmax"
        return function(*args, **(kwargs or {}))


def test_all_attention_is_fused(looks: Tensor) -> None:
    """Of everything that runs per look; the text towers, which run once per instruction, have run before."""
    policy = build_policy().eval()
    noise = policy.noise(torch.arange(3))
    policy.act(looks, TEXTS, noise=noise)
    with Attentions() as attentions:
        policy.act(looks, TEXTS, noise=noise)
    assert attentions.fused > 20 and attentions.softmax == 0
    with Attentions() as by_hand:
        torch.randn(2, 2).softmax(-1)
        nn.functional.softmax(torch.randn(2, 2), dim=-1)
        nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 1, 2, 2))
    assert by_hand.softmax >= 2 and by_hand.fused == 1


# ------------------------------------------------------------ compilation


def compiled(function: Callable) -> Callable:
    """Traced as one graph, forward and backward; no compiler is needed for that."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("cross_attention", ["full", "causal"])
def test_the_action_denoiser_compiles(cross_attention: str) -> None:
    settings = PRESET["policy"]["action_head"] | {"cross_attention": cross_attention}
    head = build_policy(action_head=settings).action_head.eval()
    context = {
        "sentence": torch.randn(2, 16),
        "video_tokens": torch.randn(2, 6, 24),
        "latent_actions": torch.randn(2, 4, 16),
    }
    memory = compiled(head.encode)(**context)
    torch.testing.assert_close(memory, head.encode(**context))
    noisy, sigma = torch.randn(2, 10, 7), torch.tensor([0.1, 5.0])
    levels = compiled(head.noise_levels)(sigma)
    torch.testing.assert_close(levels, head.noise_levels(sigma))
    torch.testing.assert_close(
        compiled(head.decode)(memory, noisy, levels), head.decode(memory, noisy, levels)
    )


def test_video_former_compiles(policy: DeFI) -> None:
    features = torch.randn(2, 3, 8, 256)
    torch.testing.assert_close(compiled(policy.video_former)(features), policy.video_former(features))


def test_gidm_encoder_compiles(policy: DeFI) -> None:
    encoder = policy.gidm_branch.tokenizer.encoder
    patches, text, mask = torch.randn(2, 2, 4, 16), torch.randn(2, 5, 16), torch.ones(2, 5).bool()
    torch.testing.assert_close(compiled(encoder)(patches, text, mask), encoder(patches, text, mask))
