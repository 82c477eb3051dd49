"""Presets: every one composes for every command, and has the parameters it says, counted without memory."""

import re

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from defi.config import CONFIG_DIR, compose_preset, flatten, presets
from defi.engine.config import TrainerConfig
from defi.engine.model import StageModel
from Step1_GFDM.config import GFDMConfig
from Step2_GIDM import adapter as gidm_adapter
from Step2_GIDM.model import GIDMConfig
from Step3_DeFI import adapter as policy_adapter
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.policy import DeFI

# Those that read a preset.
COMMANDS = {
    file.stem
    for file in CONFIG_DIR.glob("*.yaml")
    if any("preset" in str(line) for line in OmegaConf.load(file).get("defaults", []))
}

README = (CONFIG_DIR.parent / "README.md").read_text()
SETTINGS = {"step1": GFDMConfig, "step2": GIDMConfig, "step3": PolicyConfig}


def millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def build(preset: str, *settings: str) -> DeFI:
    with torch.device("meta"):
        return policy_adapter.build(compose_preset(preset, *settings))


@pytest.fixture(scope="module")
def paper() -> DeFI:
    return build("paper")


def test_the_presets() -> None:
    assert {"tiny", "small", "paper", "released"} <= set(presets())
    assert {"step1_vae", "step1_train", "step2_train", "step3_prepare", "step3_train"} <= COMMANDS


@pytest.mark.parametrize("preset", presets())
def test_every_preset_composes_for_every_command(preset: str) -> None:
    for command in sorted(COMMANDS):
        with initialize_config_dir(str(CONFIG_DIR), version_base=None):
            cfg = compose(command, [f"preset={preset}"])
        OmegaConf.resolve(cfg)
        assert cfg.preset_name == preset
        if (stage := command.split("_")[0]) in SETTINGS:
            SETTINGS[stage].from_preset(cfg)
        if "trainer" in cfg:
            TrainerConfig.from_config(cfg.trainer)


def test_random_weights_need_no_files() -> None:
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        start = compose("step3_train", ["preset=paper"])
        dry = compose("step3_train", ["preset=paper", "weights=random"])
    sections = ("text.clip", "text.t5", "gfdm", "gidm.dino")
    for section in sections:
        assert OmegaConf.select(start, f"{section}.pretrained").startswith("ckpts/")
        assert OmegaConf.select(dry, f"{section}.pretrained") is None


def test_published_sizes(paper: DeFI) -> None:
    assert millions(paper.gfdm.unet) == pytest.approx(1524.6, abs=0.05)
    assert paper.gfdm.feature_channels == 2560 and paper.gfdm.feature_tokens == 256
    assert paper.gfdm.unet.config.cross_attention_dim == 1024
    noise = paper.gfdm.config
    assert (noise.latent_size, noise.frames) == (32, 16)


def trained(model: StageModel) -> float:
    return sum(parameter.numel() for _, parameter in model.trainable()) / 1e6


@pytest.mark.parametrize("preset", presets())
def test_stages_of_a_preset_fit_each_other(preset: str) -> None:
    """The policy's constructor checks stage 1; here stage 2 too. And the README's table counts right."""
    policy = build(preset)
    with torch.device("meta"):
        gidm = gidm_adapter.build(compose_preset(preset))
    assert policy.config.stages.latent_action == gidm.tokenizer.sizes
    row = next(line for line in README.splitlines() if line.startswith(f"| `{preset}` |"))
    unet, stages = (cell.strip().removesuffix(" M").replace(",", "") for cell in row.split("|")[2:4])
    counts = [float(count) for count in stages.split(" / ")]
    found = [millions(policy.gfdm.unet), trained(gidm), trained(policy)]
    assert float(unet) == pytest.approx(millions(policy.gfdm.unet), abs=0.05)
    assert counts == pytest.approx(found, abs=0.5 if max(found) > 10 else 0.05)


def settings(command: str, preset: str) -> dict[str, object]:
    """What a training command composes from a preset, by dotted name."""
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = compose(command, [f"preset={preset}"])
    OmegaConf.resolve(cfg)
    return flatten(OmegaConf.to_container(cfg))


def test_every_setting_by_which_paper_differs_from_released_is_told() -> None:
    """docs/deviations.md names each of them, and no other setting."""
    differing = set()
    for command in ("step1_train", "step2_train", "step3_train"):
        released, paper = settings(command, "released"), settings(command, "paper")
        assert released.keys() == paper.keys()
        differing |= {name for name in paper if paper[name] != released[name]} - {"preset_name"}
    page = (CONFIG_DIR.parent / "docs" / "deviations.md").read_text()
    table = page.partition("## Settings")[2].partition("\n## ")[0]
    told = set(re.findall(r"`([a-z0-9_]+(?:\.[a-z0-9_]+)+)`", table))
    # What is derived from a setting that is told needs no line of its own.
    assert differing - {"policy.mixed_text_masks"} == told


def test_small_runs_on_one_gpu() -> None:
    """Adam in float32 takes 16 bytes per trained parameter: half of a 24 GB card at most."""
    policy = build("small")
    assert 16 * millions(policy.gfdm.unet) / 1e3 < 12
    assert 50 < millions(policy.gfdm.unet) < 300
