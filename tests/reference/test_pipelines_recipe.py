"""`preset=released`, as the training commands compose it, against the facts read off the published scripts.

Each fact of `pipelines/training.json` meets the first check whose stage and name fit. Facts in words are read
for their numbers and key words. Facts that no setting can hold are `TOLD`: they stand in docs/deviations.md,
or other tests, named there, run them. A fact that is known to neither is skipped with its name.
"""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from defi.config import CONFIG_DIR, compose_preset
from defi.engine.config import TrainerConfig
from defi.engine.optimizer import build_optimizer
from Step1_GFDM.config import GFDMConfig
from Step2_GIDM.model import GIDMConfig
from Step3_DeFI.config import PolicyConfig

FOLDER = Path(
    os.environ.get("DEFI_REFERENCE_DIR", Path(__file__).resolve().parents[3] / "shared" / "reference")
)
FILE = FOLDER / "pipelines" / "training.json"
FACTS = json.loads(FILE.read_text())["facts"] if FILE.is_file() else []
MODELS = {1: GFDMConfig, 2: GIDMConfig, 3: PolicyConfig}
CALVIN_SAMPLES = 696_473  # of stage 3 on CALVIN's ABC
NUMBER = re.compile(r"(?<!\w)(?<!\d\.)-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


def recipe(stage: int) -> SimpleNamespace:
    """What a user gets who trains this stage with `preset=released`."""
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = compose(f"step{stage}_train", ["preset=released"])
    OmegaConf.resolve(cfg)
    trainer, model = TrainerConfig.from_config(cfg.trainer), MODELS[stage].from_preset(cfg)
    return SimpleNamespace(stage=stage, cfg=cfg, trainer=trainer, model=model)


def numbers(value: Any) -> list[float]:
    """Those in a fact, in order."""
    return [float(found.replace(",", "")) for found in NUMBER.findall(str(value))]


def labelled(value: Any, label: str) -> float | None:
    """The first number behind a word, if there is one."""
    return next(iter(numbers(str(value).partition(label)[2])), None)


def processes(r: SimpleNamespace) -> int:
    return r.trainer.global_batch // r.trainer.micro_batch


# ------------------------------------------------------------ what holds for every stage


def batch_per_process(r: SimpleNamespace, value: Any) -> None:
    assert r.trainer.micro_batch in numbers(value)


def number_of_processes(r: SimpleNamespace, value: Any) -> None:
    assert processes(r) == numbers(value)[0]


def effective_batch(r: SimpleNamespace, value: Any) -> None:
    assert r.trainer.global_batch == numbers(value)[0]


def accumulation(r: SimpleNamespace, value: Any) -> None:
    """As many GPUs as published take a global batch at once."""
    assert r.trainer.split_batch(processes(r)) == (r.trainer.micro_batch, numbers(value)[0])


def optimizer(r: SimpleNamespace, value: Any) -> None:
    text = str(value)
    assert "AdamW" in text
    layer = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2))
    layer.trainable = layer.named_parameters
    processes = SimpleNamespace(device=SimpleNamespace(type="cpu"), prepare_optimizer=lambda made: made)
    ours = build_optimizer(layer, r.trainer, processes)
    (group,) = ours.param_groups  # the decay is of all parameters
    assert type(ours).__name__ == "AdamW" and len(group["params"]) == 4
    assert group["lr"] == labelled(text, "lr" if "lr" in text else "AdamW")
    for key, word in (("eps", "eps"), ("weight_decay", "decay")):
        assert labelled(text, word) in (None, group[key])
    if "betas" in text:
        assert list(group["betas"]) == numbers(text.partition("betas")[2])[:2]


def constant_rate(r: SimpleNamespace, value: Any) -> None:
    assert re.search(r"none|constant", str(value))
    assert r.trainer.schedule == "constant" and r.trainer.warmup == 0


def gradient_clip(r: SimpleNamespace, value: Any) -> None:
    found = numbers(value) if value is not None and "none" not in str(value).lower() else [None]
    assert r.trainer.clip == found[0]


def no_averages(r: SimpleNamespace, value: Any) -> None:
    """Nothing published saves or uses averaged weights."""
    assert value is None or re.search(r"none|no |not|never|unused", str(value))
    assert r.trainer.ema is None


def precision(r: SimpleNamespace, value: Any) -> None:
    text = str(value)
    if r.stage < 3:
        assert re.search(r"fp16|16-mixed", text) and r.trainer.precision == "fp16"
        return
    assert re.search(r"UNet, VAE\) fp16; the rest float32", text)
    assert (r.trainer.precision, r.model.gfdm_precision) == ("no", "fp16")
    assert f"matmul precision {r.trainer.matmul}" in text


def seed(r: SimpleNamespace, value: Any) -> None:
    """A stage that sets none may take any."""
    if value is not None and not re.search(r"\b(none|no|not|nothing|never|unused)\b", str(value)):
        assert r.cfg.seed in numbers(value)


def gradient_checkpointing(r: SimpleNamespace, value: Any) -> None:
    assert "UNet" in value and r.model.gradient_checkpointing


# ------------------------------------------------------------ single stages


def steps(r: SimpleNamespace, value: Any) -> None:
    """Of the whole run; of an epoch where the publication counts in epochs."""
    if r.trainer.epochs is None:
        assert r.trainer.max_steps in numbers(value)
        return
    per_epoch = math.ceil(r.trainer.passes * CALVIN_SAMPLES / r.trainer.global_batch)
    total = r.trainer.for_samples(CALVIN_SAMPLES).max_steps
    assert total == r.trainer.epochs * per_epoch
    large = {number for number in numbers(value) if number > 1000}
    if r.stage == 3 and large:  # told exactly, or rounded to hundreds
        assert {per_epoch, total, total // 100 * 100, CALVIN_SAMPLES} & large


def epochs(r: SimpleNamespace, value: Any) -> None:
    assert r.trainer.max_steps is None and r.trainer.epochs == numbers(value)[0]


def video_modes(r: SimpleNamespace, value: Any) -> None:
    """Every part of GFDM but the UNet stays in eval mode; nothing in it drops anything."""
    assert re.search(r"UNet train\(\), VAE and CLIP image tower eval\(\)", value)
    assert "no dropout above 0" in value


def policy_modes(r: SimpleNamespace, value: Any) -> None:
    assert r.model.t5_dropout == ("dropout 0.1 ON" in value)
    head = r.model.action_head
    for word, rate in (
        ("attention", head.attention_dropout),
        ("residual", head.residual_dropout),
        ("mlp", head.mlp_dropout),
        ("goal_drop", r.model.diffusion.text_dropout),
    ):
        assert rate == labelled(value.partition("Action head")[2], word)


def text_dropout(r: SimpleNamespace, value: Any) -> None:
    assert r.model.diffusion.text_dropout == numbers(value)[0] / 100


def time_ids(r: SimpleNamespace, value: Any) -> None:
    edm = r.model.diffusion
    assert [edm.fps, edm.motion_bucket] == [labelled(value, word) for word in ("fps", "motion")]


def noise_levels(r: SimpleNamespace, value: Any) -> None:
    edm = r.model.diffusion
    wanted = (
        (edm.sigma_mean, edm.sigma_std) if r.stage == 1 else (edm.density_scale, edm.sigma_min, edm.sigma_max)
    )
    assert set(wanted) <= set(numbers(value))


def codebook_restart(r: SimpleNamespace, value: Any) -> None:
    """Stage 2: at the end of every epoch, from other codes; stage 3: never."""
    if r.stage == 3:
        assert not r.model.restart_codes
        return
    assert "end of every epoch" in value
    assert r.model.restart_pairs is None and r.model.restart_from == "codes"


def gidm_loss(r: SimpleNamespace, value: Any) -> None:
    assert value.replace(" ", "").startswith(f"mse+(sg[emb]-z)^2+{r.model.commitment}(emb-sg[z])^2")


def policy_loss(r: SimpleNamespace, value: Any) -> None:
    assert [r.model.codebook_weight, r.model.commitment_weight] == [
        labelled(value, "+"),
        labelled(value, "^2 +"),
    ]


def every_epoch_is_kept(r: SimpleNamespace, value: Any) -> None:
    """The published evaluation runs all of them."""
    assert "after every epoch" in value
    assert r.trainer.save_every == math.ceil(CALVIN_SAMPLES / r.trainer.global_batch)
    assert r.trainer.keep == r.trainer.epochs


def initial_weights(r: SimpleNamespace, value: Any) -> None:
    if r.stage == 2:
        assert r.model.initial == "default"
    if r.stage == 3:
        assert not r.model.action_head.identity_modulation


def cross_attention(r: SimpleNamespace, value: Any) -> None:
    assert r.model.action_head.cross_attention == "causal"


def feature_time_ids(r: SimpleNamespace, value: Any) -> None:
    features = GFDMConfig.from_preset(compose_preset("released")).features
    assert [features.fps, features.motion_bucket] == [labelled(value, word) for word in ("fps", "motion")]


CHECKS: list[tuple[str, str, Callable[[SimpleNamespace, Any], None]]] = [  # stages, name of the fact, check
    ("123", "batch per process|batch size.*|micro.?batch", batch_per_process),
    ("123", "processes|gpus|devices", number_of_processes),
    ("123", "effective batch|global batch|total batch.*", effective_batch),
    ("123", "(gradient )?accumulation.*", accumulation),
    ("123", "optimi[sz]er", optimizer),
    ("123", "schedule|lr schedule|scheduler", constant_rate),
    ("123", "(gradient )?clip(ping)?", gradient_clip),
    ("123", "ema", no_averages),
    ("123", "(mixed )?precision", precision),
    ("123", "seed", seed),
    ("1", "gradient checkpointing", gradient_checkpointing),
    ("1", "steps|max(imum)? steps", steps),
    ("23", "steps.*", steps),
    ("23", "epochs", epochs),
    ("1", "modes", video_modes),
    ("3", "modes", policy_modes),
    ("1", "(text|caption) drop(out)?", text_dropout),
    ("1", "time ids", time_ids),
    ("3", "time ids", feature_time_ids),
    ("13", "sigmas?|noise levels?|sigma (distribution|density)", noise_levels),
    ("23", "(codebook|code) restarts?", codebook_restart),
    ("2", "loss", gidm_loss),
    ("3", "loss", policy_loss),
    ("23", "initial weights|initiali[sz]ation", initial_weights),
    ("3", "cross.?attention", cross_attention),
    ("3", "checkpoints", every_epoch_is_kept),
]

TOLD = [  # stages, name of the fact, where it is told or run
    ("1", "epochs", "the steps end the run first"),
    ("1", "samples per epoch", "test_pipelines_stage1.py"),
    ("1", "text", "test_pipelines_stage1.py, test_pipelines_text.py"),
    ("1", "loss", "test_released_step.py"),
    ("2", "(text|texts).*", "test_pipelines_stage2.py, test_pipelines_text.py"),
    ("3", "(text|texts).*", "test_pipelines_stage3.py, test_pipelines_text.py"),
    ("12", "checkpoints", "docs/deviations.md: formats of our own, and more often"),
    ("123", "validation.*", "docs/deviations.md: pictures and held-out figures at intervals"),
    ("123", "resume.*", "docs/deviations.md: exact"),
    ("2", "modes", "test_released_step.py: T5 and DINOv2 in eval mode"),
    ("2", "order|shuffl.*", "docs/deviations.md: a shuffle over indices"),
    ("2", "window", "docs/deviations.md: the distance is drawn per pair; test_pipelines_stage2.py"),
    ("2", "W that can be drawn.*", "test_pipelines_stage2.py"),
    ("2", "windows that seed.*", "docs/deviations.md: its random stream is not imitated"),
    ("2", "steps that a set's transform removes", "test_pipelines_stage2.py"),
    ("2", "(data )?mixture|data.*|augmentation.*|image.*", "test_pipelines_stage2.py"),
    ("1", "(data )?mixture|data.*", "test_pipelines_stage1.py"),
    ("3", "loader|samples.*|data.*", "test_pipelines_stage3.py; test_engine.py fills up the last batch"),
    ("3", "annotations read from", "test_pipelines_stage3.py"),
    ("3", "rollout.*", "docs/deviations.md: noise belongs to (seed, chain, look)"),
]  # fmt: skip


def fits(fact: dict[str, Any], stages: str, name: str) -> bool:
    return str(fact["stage"]) in stages and re.fullmatch(name, fact["fact"], re.IGNORECASE) is not None


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: f"stage {fact['stage']}, {fact['fact']}")
def test_pipelines_recipe(fact: dict[str, Any]) -> None:
    for stages, name, place in TOLD:
        if fits(fact, stages, name):
            pytest.skip(f"told: {place}")
    for stages, name, check in CHECKS:
        if fits(fact, stages, name):
            return check(recipe(fact["stage"]), fact["value"])
    pytest.skip(f"no check for: stage {fact['stage']}, {fact['fact']} = {fact['value']}")


def test_pipelines_recipe_is_recorded(reference: Path) -> None:
    if not FACTS:
        pytest.skip(f"no {FILE}")
    checked = [fact for fact in FACTS if any(fits(fact, stages, name) for stages, name, _ in CHECKS)]
    assert len(checked) > len(FACTS) // 3, "most facts are settings, whatever is left out"
