"""LeRobot's pipelines around a DeFI policy: names, batch and device. The policy itself normalises."""

from typing import Any

from lerobot.processor import PolicyAction, PolicyProcessorPipeline, make_default_pre_post_processors

from lerobot_policy_defi.configuration_defi import DeFIConfig


def make_defi_pre_post_processors(
    config: DeFIConfig, dataset_stats: dict[str, Any] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """LeRobot's usual ones, which change no number (`normalization_mapping`), without `dataset_stats`."""
    return make_default_pre_post_processors(config)
