"""What of an instruction reaches the text towers, beside the published pipelines.

`reference/pipelines/text.json` holds strings, token numbers of CLIP and padding for texts of all kinds.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection

from defi.config import CONFIG_DIR, compose_preset
from defi.text import CLIPText, TextConfig
from Step1_GFDM import adapter as gfdm_adapter
from Step1_GFDM.model import GFDM
from Step2_GIDM import adapter as gidm_adapter
from Step2_GIDM.model import GIDM
from Step3_DeFI import adapter as policy_adapter
from Step3_DeFI.policy import DeFI
from Step3_DeFI.rollout.messages import Look
from Step3_DeFI.rollout.policy import ModelPolicy

SMALL = {
    "text.clip": "{width: 32, layers: 1, heads: 2, projection: 32}",
    "text.t5": "{width: 32, layers: 1, heads: 2}",
    "gfdm": "{frames: 6, image_size: 16}",
    "gfdm.unet": "{block_out_channels: [32, 32, 32, 32], num_attention_heads: [1, 1, 1, 1]}",
    "gfdm.unet.layers_per_block": "1",
    "gfdm.vae": "{block_out_channels: [32, 32], layers_per_block: 1}",
    "gidm": "{width: 32, encoder_blocks: 1, decoder_blocks: 1, heads: 2}",
    "gidm.dino": "{image_size: 28, width: 32, layers: 1, heads: 2}",
    "policy": "{feature_tokens: 16, feature_channels: 64}",
    "policy.video_former": "{dim: 32, depth: 1}",
    "policy.action_head": "{dim: 32, encoder_layers: 1, decoder_layers: 1}",
}


@pytest.fixture(scope="module")
def cfg() -> DictConfig:
    """The preset `released` at tiny widths."""
    return compose_preset("released", *(f"{key}={value}" for key, value in SMALL.items()))


@pytest.fixture(scope="module")
def recorded(reference: Path) -> dict[str, Any]:
    file = reference / "pipelines" / "text.json"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    return json.loads(file.read_text())


class Spy:
    """A tokenizer that keeps what it is given and what it makes of it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.given, self.made = tokenizer, [], []

    def __call__(self, texts: list[str] | str, **how: Any) -> Any:
        found = self.tokenizer(texts, **how)
        if not isinstance(texts, str):  # else it is only counted
            self.given += texts
            self.made.append(found)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def spied(tower: torch.nn.Module, act: Callable[[], Any]) -> Spy:
    """What the tower's tokenizer sees while `act` runs; nothing is remembered from before."""
    tokenizer = tower.tokenizer
    tower._cache.clear()
    tower.tokenizer = Spy(tokenizer)
    try:
        act()
        return tower.tokenizer
    finally:
        tower.tokenizer = tokenizer


@pytest.fixture(scope="module")
def gfdm(cfg: DictConfig) -> GFDM:
    return gfdm_adapter.build(cfg)


@pytest.fixture(scope="module")
def gidm(cfg: DictConfig) -> GIDM:
    return gidm_adapter.build(cfg)


@pytest.fixture(scope="module")
def policy(cfg: DictConfig) -> DeFI:
    return policy_adapter.build(cfg)


def test_pipelines_text_of_stage_1(gfdm: GFDM, recorded: dict[str, Any]) -> None:
    for entry in recorded["texts"]:
        published = entry["stage1_clip"]
        spy = spied(gfdm.clip, lambda text=entry["text"]: gfdm.encode_text([text]))
        assert set(spy.given) == {published["string"]}
        assert gfdm.encode_text([entry["text"]]).shape[1] == published["length"]
        _check_padding(spy.made[0], gfdm.clip, published["length"])


def _check_padding(made: Any, clip: CLIPText, length: int) -> None:
    """On the right, with the end mark, which the mask covers."""
    ids, mask = made["input_ids"][0], made["attention_mask"][0]
    used = int(mask.sum())
    assert len(ids) == length and mask[:used].all()
    assert ids[0] == clip.tokenizer.bos_token_id and (ids[used - 1 :] == clip.tokenizer.eos_token_id).all()


def test_pipelines_text_of_stage_2(gidm: GIDM, recorded: dict[str, Any]) -> None:
    for entry in recorded["texts"]:
        spy = spied(gidm.text, lambda text=entry["text"]: gidm.language([text]))
        assert spy.given == [entry["stage2_t5"]["string"]]


def test_pipelines_text_of_stage_3(policy: DeFI, recorded: dict[str, Any]) -> None:
    """Training's T5, the video model's tokens and the sentence, which is cut at the tower's own limit."""
    for entry in recorded["texts"]:
        batch = policy.config.fake_batch(1) | {"text": [entry["text"]]}
        spy = spied(policy.t5, lambda batch=batch: policy(batch))
        assert spy.given == [entry["stage3_t5"]["string"]]
        tokens = spied(policy.gfdm.clip, lambda text=entry["text"]: policy.gfdm.encode_text([text]))
        assert set(tokens.given) == {entry["stage3_clip"]["string"]}
        _check_padding(tokens.made[0], policy.gfdm.clip, entry["stage3_clip"]["length"])
        goal = spied(policy.gfdm.clip, lambda batch=batch: policy(batch))
        if "string" in entry["stage3_goal_clip"]:  # else too long for the published code
            assert set(goal.given) == {entry["stage3_goal_clip"]["string"]}
            whole = len(policy.gfdm.clip.tokenizer(entry["text"])["input_ids"])
            assert int(goal.made[-1]["attention_mask"].sum()) == min(whole, policy.gfdm.clip.longest)


def test_pipelines_text_of_a_rollout(policy: DeFI, recorded: dict[str, Any]) -> None:
    """The towers are given what training gives them."""
    images = {camera: np.zeros((16, 16, 3), np.uint8) for camera in ("rgb_static", "rgb_gripper")}
    acting = ModelPolicy(policy)
    for entry in recorded["texts"]:
        assert entry["rollout"]["clip_ids_equal_training"] and entry["rollout"]["t5_string_equal_training"]

        def act(text: str = entry["text"]) -> None:
            acting.act([Look((0, 0, 0), "task", text, images)])

        assert spied(policy.t5, act).given == [entry["stage3_t5"]["string"]]
        assert set(spied(policy.gfdm.clip, act).given) == {entry["stage3_clip"]["string"]}


def test_pipelines_text_length_for_t5(policy: DeFI, recorded: dict[str, Any]) -> None:
    """Never cut, padded on the right to the batch's longest."""
    texts = [entry["stage3_t5"]["string"] for entry in recorded["texts"]]
    lengths = [len(policy.t5.tokenizer(text, verbose=False)["input_ids"]) for text in texts]
    states, mask = policy.t5(texts)
    assert recorded["t5_padding"]["side"] == "right"
    assert states.shape[1] == max(lengths) and mask.sum(1).tolist() == lengths
    for row, length in zip(mask, lengths):
        assert row[:length].all()


@pytest.fixture(scope="module")
def published_clip() -> CLIPText:
    """CLIP's own tokenizer, on a tower of no matter what weights."""
    folder = CONFIG_DIR.parent / "ckpts" / "clip"
    if not folder.is_dir():
        pytest.skip(f"no CLIP tokenizer at {folder}: python -m defi.download preset=released fetches it")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    sizes = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, projection_dim=32,
        num_hidden_layers=1, num_attention_heads=2, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return CLIPText(CLIPTextModelWithProjection(sizes), tokenizer, TextConfig(tokens=20))


def test_pipelines_text_ids_of_clip(published_clip: CLIPText, recorded: dict[str, Any]) -> None:
    for entry in recorded["texts"]:
        spy = spied(published_clip, lambda text=entry["text"]: published_clip.tokens([text]))
        for made, published in ((spy.made[0], "stage1_clip"), (spy.made[-1], "stage3_goal_clip")):
            if "ids" in entry[published]:
                used = int(made["attention_mask"].sum())
                assert made["input_ids"][0, :used].tolist() == entry[published]["ids"]
        assert bool(published_clip.truncated([entry["text"]])) == (len(spy.made) == 2)
