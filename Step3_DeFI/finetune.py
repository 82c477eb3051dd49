"""Training the video model with the policy: which of its weights move (`gfdm.finetune`; published: none)."""

from collections.abc import Iterator

from torch import nn

from Step1_GFDM.model import GFDM
from Step1_GFDM.unet import FEATURE_PARTS
from Step3_DeFI.config import FinetuneConfig

ADAPTER = "policy"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def open_for_finetuning(gfdm: GFDM, config: FinetuneConfig) -> None:
    """Freeze all of `gfdm` but the part of its UNet that learns; LoRA adapters are added to the UNet here.

    What learns is what a loss reaches: the way to the features, or the whole UNet where there is a video
    loss. Its activations are computed again on the way back: those of 16 frames take too much memory.
    """
    gfdm.requires_grad_(False)
    if config.mode == "none":
        return
    parts = ("",) if config.video_loss else FEATURE_PARTS
    if config.mode == "full":
        for part in parts:
            gfdm.unet.get_submodule(part).requires_grad_(True)
    else:
        from peft import LoraConfig, inject_adapter_in_model  # slow to import, and only wanted here

        # arXiv 2106.09685, on the attention's projections; the first output is that of the bare UNet.
        names = [n for n, _ in gfdm.unet.named_modules() if n.startswith(parts) and n.endswith(ATTENTION)]
        adapters = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=names)
        inject_adapter_in_model(adapters, gfdm.unet, ADAPTER)
    gfdm.unet.enable_gradient_checkpointing()


def idle(module: nn.Module, name: str) -> Iterator[str]:
    """Dotted names, below `name`, of the largest sub-networks in which no weight learns."""
    if not any(parameter.requires_grad for parameter in module.parameters()):
        yield name
        return
    for child_name, child in module.named_children():
        yield from idle(child, f"{name}.{child_name}")
