"""One batch of `preset=released` per stage, from the user's data to the loss: what goes in, by hand.

Every network is small (sizes alone are overridden) and is watched by hooks; the numbers expected here are the
published code's, written out.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from policy_fakes import write_demonstrations
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from defi.config import CONFIG_DIR
from defi.data.calvin import calvin_robot
from defi.engine import checkpoint
from defi.engine.data import SeededDataset
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.data import LATENTS, LatentMixture, open_sets
from Step1_GFDM.model import GFDM
from Step2_GIDM.data.build import build_pairs
from Step2_GIDM.model import GIDM, GIDMConfig
from Step2_GIDM.train import build_model
from Step3_DeFI.config import FinetuneConfig, PolicyConfig
from Step3_DeFI.policy import DeFI
from Step3_DeFI.store import build_samples, open_sources

SCALING = 0.18215  # of SVD's latents
SMALL = (
    "preset=released",
    "weights=random",
    "output=unused",
    *(f"text.{tower}.{size}" for tower in ("clip", "t5") for size in ("width=16", "layers=1", "heads=2")),
    "text.clip.projection=16",
    *("gfdm.frames=3", "gfdm.image_size=32"),
    *("gfdm.vae.block_out_channels=[32,32]", "gfdm.vae.layers_per_block=1"),
    *("gfdm.unet.block_out_channels=[32,32,32,32]", "gfdm.unet.num_attention_heads=[1,1,1,1]"),
    *("gfdm.unet.layers_per_block=1", "gfdm.unet.addition_time_embed_dim=8"),
    *("gidm.width=16", "gidm.encoder_blocks=2", "gidm.decoder_blocks=1", "gidm.heads=2", "gidm.code_width=8"),
    *(f"gidm.dino.{size}" for size in ("image_size=28", "width=16", "layers=1", "heads=2")),
)  # fmt: skip
SMALL_POLICY = (
    *SMALL,
    "policy.latent_action_frames=[0,2]",
    *(f"policy.video_former.{size}" for size in ("dim=24", "depth=1", "heads=2", "head_dim=12", "queries=2")),
    *(f"policy.action_head.{size}" for size in ("dim=32", "encoder_layers=1", "decoder_layers=2", "heads=2")),
)


def composed(command: str, *settings: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = compose(command, list(settings))
    OmegaConf.resolve(cfg)
    return cfg


def batch_of(dataset: Dataset, count: int, *, seed: int = 6) -> dict[str, Any]:
    """Samples as the engine's loader makes a batch of them."""
    samples = SeededDataset(dataset, seed, tolerant=False)
    return default_collate([samples[0, i % len(dataset)] for i in range(count)])


class Spy:
    """What went into and came out of modules in their latest call."""

    def __init__(self, **modules: nn.Module) -> None:
        self.inputs: dict[str, tuple] = {}
        self.named: dict[str, dict[str, Any]] = {}
        self.outputs: dict[str, Any] = {}
        self.training: dict[str, bool] = {}
        for name, module in modules.items():
            module.register_forward_hook(self._note(name), with_kwargs=True)

    def _note(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            self.inputs[name], self.named[name], self.outputs[name] = args, kwargs, output
            self.training[name] = module.training

        return note


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def is_normal(draws: Tensor) -> None:
    """Standard normal numbers: mean and deviation within four standard errors."""
    bound = 4 / math.sqrt(draws.numel())
    assert abs(draws.mean().item()) < bound and abs(draws.std().item() - 1) < bound


def spread_over_batch(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (like.ndim - 1))


# ------------------------------------------------------------ stage 1


def write_latents(root: Path, *, episodes: int = 3, frames: int = 9, size: int = 16) -> Path:
    """Latents in VPP's layout, one camera."""
    for number in range(episodes):
        file = root / "latent_videos" / "train" / str(number) / "0.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        latents = torch.randn(frames, 4, size, size, generator=torch.Generator().manual_seed(number))
        save_file({LATENTS: latents.half()}, file)
        annotation = {
            "texts": [f"move thing {number}"],
            "episode_id": number,
            "video_length": frames,
            "videos": [{"video_path": f"videos/train/{number}/0.mp4"}],
            "latent_videos": [{"latent_video_path": str(file.relative_to(root))}],
        }
        place = root / "annotation" / "train" / f"{number}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(annotation))
    return root


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> tuple[GFDM, LatentMixture]:
    root = write_latents(tmp_path_factory.mktemp("latents"))
    cfg = composed("step1_train", *SMALL, f"data.root={root}")
    config = GFDMConfig.from_preset(cfg)
    torch.manual_seed(cfg.seed)
    data = LatentMixture(open_sets(cfg.data, config, "train").values())
    return GFDM.from_config(config).train(), data


def test_stage_1_batch(stage1: tuple[GFDM, LatentMixture]) -> None:
    model, data = stage1
    batch = batch_of(data, 6)
    spy = Spy(unet=model.unet)
    loss = model(batch)["loss"]
    sample, c_noise = spy.inputs["unet"]
    named, out = spy.named["unet"], spy.outputs["unet"].sample
    clean = batch["latents"]

    sigma = spread_over_batch((4 * c_noise).exp(), clean)
    noisy = sample[:, :, :4] * (sigma**2 + 1).sqrt()  # c_in = 1 / √(σ² + 1)
    is_normal((noisy - clean) / sigma)
    close(sample[:, :, 4:], (clean[:, :1] / SCALING).expand_as(clean))  # the first frame, unscaled, repeated
    assert named["added_time_ids"].tolist() == [[7, 127, 0]] * 6

    states = model.clip.tokens(batch["text"])
    assert states.shape[1] == 20
    doubled = torch.cat([states, states], dim=-1)
    for given, expected in zip(named["encoder_hidden_states"], doubled):
        assert torch.equal(given, expected) or not given.any()

    denoised = noisy / (sigma**2 + 1) - sigma / (sigma**2 + 1).sqrt() * out
    weight = (sigma**2 + 1) / sigma**2
    close(loss, (weight * (denoised - clean) ** 2).mean())


def test_stage_1_draws(stage1: tuple[GFDM, LatentMixture], monkeypatch: pytest.MonkeyPatch) -> None:
    """ln σ is N(0.7, 1.6), 5 % of the texts are zeroed as a whole, the image condition never."""
    model, data = stage1
    count, seen = 2000, {}

    def stand_in(sample: Tensor, c_noise: Tensor, **named: Tensor) -> Any:
        seen.update(sample=sample, c_noise=c_noise, **named)
        return type("Out", (), {"sample": torch.zeros_like(sample[:, :, :4])})

    monkeypatch.setattr(model.unet, "forward", stand_in)
    few = batch_of(data, 1)
    latents = few["latents"][..., :2, :2].expand(count, -1, -1, -1, -1)
    seeds = torch.from_numpy(np.random.default_rng(0).integers(2**62, size=count))
    model({"latents": latents, "text": few["text"] * count, "seed": seeds})
    is_normal((4 * seen["c_noise"] - 0.7) / 1.6)
    dropped = (seen["encoder_hidden_states"] == 0).all(2).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.05, abs=0.02)
    assert (seen["encoder_hidden_states"][~dropped] != 0).any(2).all()
    close(seen["sample"][:, :, 4:], (latents[:, :1] / SCALING).expand_as(latents))


# ------------------------------------------------------------ stage 2


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Spans with instructions of different length."""
    folder = write_demonstrations(tmp_path_factory.mktemp("demos"), lengths=(30, 30))
    file = folder / "training" / "lang_annotations" / "auto_lang_ann.npy"
    found = np.load(file, allow_pickle=True).item()
    found["language"]["ann"] = ["push the red block to the left now", "stop"]
    np.save(file, found)
    return folder


def test_stage_2_batch(demonstrations: Path) -> None:
    cfg = composed("step2_train", *SMALL, f"data.root={demonstrations}")
    config = GIDMConfig.from_preset(cfg)
    torch.manual_seed(cfg.seed)
    model = build_model(config, None).train()
    pairs = build_pairs(cfg.data, config.dino.image_size)
    batch = batch_of(pairs, len(pairs))
    picked = [0, 1, len(pairs) - 1]  # of both spans
    batch = {
        name: value[picked] if torch.is_tensor(value) else [value[i] for i in picked]
        for name, value in batch.items()
    }
    tokenizer = model.tokenizer
    spy = Spy(
        dino=model.dino.model,
        patches=model.dino,
        t5=model.text.model,
        embed=tokenizer.encoder.embed,
        block=tokenizer.encoder.blocks[0],
        to_code=tokenizer.encoder.to_code[0],
        decoder_block=model.core.decoder.blocks[0],
        decoder=model.core.decoder,
    )
    loss = model(batch)["loss"]

    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (batch["frames"].flatten(0, 1) - mean[:, None, None]) / deviation[:, None, None]
    close(spy.named["dino"]["pixel_values"], pixels)
    patches = spy.outputs["patches"].unflatten(0, (3, 2))  # normalised tokens without class and registers
    assert torch.equal(patches.flatten(0, 1), spy.outputs["dino"].last_hidden_state[:, 5:])

    (tokens,) = spy.inputs["embed"]
    assert tokens.shape[2] == 4 + patches.shape[2]
    close(tokens[:, :, :4], tokenizer.encoder.queries[0].expand(3, 2, -1, -1))
    close(tokens[:, :, 4:], patches)

    assert not spy.training["t5"]  # its dropout is off in stage 2
    lengths = spy.named["t5"]["attention_mask"].sum(1)
    longest = int(lengths.max())
    assert len(set(lengths.tolist())) == 2
    own = torch.arange(longest) < lengths[:, None]
    seen = spy.inputs["block"][1]
    assert seen[:, :-longest].all()  # queries and patches
    assert torch.equal(seen[:, -longest:], own[[0, 1, 2, 0, 1, 2]])  # the published order of the six rows
    assert torch.equal(spy.inputs["decoder_block"][1][:, -longest:], own)

    vectors = spy.outputs["to_code"]
    codebook = tokenizer.quantizer.codebook
    nearest = codebook[(vectors[:, :, None] - codebook).norm(dim=-1).argmin(-1)]
    quantization = ((vectors - nearest) ** 2).mean()
    mse = ((spy.outputs["decoder"] - patches[:, 1]) ** 2).mean()
    close(loss, mse + quantization + 0.25 * quantization)


# ------------------------------------------------------------ stage 3


@pytest.fixture(scope="module")
def stage3(demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DeFI, Any]:
    folder = tmp_path_factory.mktemp("stages")
    torch.manual_seed(0)
    gfdm = GFDM.from_config(GFDMConfig.from_preset(composed("step1_train", *SMALL)))
    gidm = GIDM(GIDMConfig.from_preset(composed("step2_train", *SMALL)))
    for name, model in (("gfdm", gfdm), ("gidm", gidm)):
        checkpoint.save(model, folder / name, step=1, config={"preset_name": "released"})
    cfg = composed("step3_train", *SMALL_POLICY, f"data.root={demonstrations}")
    config = PolicyConfig.from_preset(cfg, calvin_robot())
    policy = DeFI.from_stages(config, gfdm=folder / "gfdm", gidm=folder / "gidm")
    samples = build_samples(open_sources(cfg.data, "training"), policy)
    return policy.train(), samples


def half(module: nn.Module) -> bool:
    (dtype,) = {parameter.dtype for parameter in module.parameters()}
    return dtype == torch.float16


def test_stage_3_parts_in_half_precision(stage3: tuple[DeFI, Any]) -> None:
    policy, _ = stage3
    assert half(policy.gfdm.unet) and half(policy.gfdm.vae)
    rest = (policy.gfdm.clip, policy.t5, policy.video_former, policy.gidm_branch, policy.action_head)
    assert not any(half(module) for module in rest)
    learning = replace(policy.config, finetune=FinetuneConfig(mode="lora"))
    assert (policy.config.video_precision, learning.video_precision) == ("fp16", "no")
    assert policy.epoch_end() == {}  # no code is restarted


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_stage_3_acts_in_half_precision(stage3: tuple[DeFI, Any], precision: str) -> None:
    """The video model computes in fp16 where the rest computes in something else."""
    policy, samples = stage3
    spy = Spy(conv_in=policy.gfdm.unet.conv_in, vae=policy.gfdm.vae.encoder)
    noise = policy.noise(torch.tensor([1]))
    pictures = batch_of(samples, 1)["images"]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        chunk = policy.eval().act(pictures, ["stop"], noise=noise)
    policy.train()
    assert chunk.dtype == torch.float32 and chunk.isfinite().all()
    assert {spy.outputs[name].dtype for name in ("conv_in", "vae")} == {torch.float16}


def test_stage_3_video(stage3: tuple[DeFI, Any]) -> None:
    """What the frozen video model sees and gives."""
    policy, samples = stage3
    batch = batch_of(samples, 4)
    gfdm, unet = policy.gfdm, policy.gfdm.unet
    spy = Spy(
        conv_in=unet.conv_in,
        time=unet.time_proj,
        ids=unet.add_time_proj,
        down=unet.down_blocks[0],
        up0=unet.up_blocks[0],
        up1=unet.up_blocks[1],
        former=policy.video_former,
        branch=policy.gidm_branch,
    )
    policy(batch)
    (sample,) = spy.inputs["conv_in"]
    assert sample.dtype == torch.float16
    sample = sample.unflatten(0, (4, 2, 3)).float()  # samples, views, frames
    pictures = batch["images"].flatten(0, 1)
    if pictures.dtype == torch.uint8:
        pictures = pictures.float() / 127.5 - 1
    mode = gfdm.vae.encode(pictures.half()).latent_dist.mode().unflatten(0, (4, 2))
    close(sample[:, :, :, 4:], mode[:, :, None].expand_as(sample[:, :, :, 4:]), 2e-3)  # unscaled, repeated
    is_normal(sample[:, :, :, :4])  # noise · √(700² + 1) / √(700² + 1)
    close(spy.inputs["time"][0], torch.full((8,), math.log(700) / 4))  # the first of 20 steps
    assert spy.inputs["ids"][0].reshape(8, 3).tolist() == [[4, 127, 0]] * 8
    text = spy.named["down"]["encoder_hidden_states"]
    states = gfdm.clip.tokens([text for text in batch["text"] for _ in range(2)])
    doubled = torch.cat([states, states], dim=-1)
    assert text.dtype == torch.float16 and states.dtype == torch.float32
    close(text, doubled.repeat_interleave(3, dim=0), 2e-3)

    coarse = nn.functional.interpolate(spy.outputs["up0"], scale_factor=2, mode="nearest")
    maps = torch.cat([coarse, spy.outputs["up1"]], dim=1)  # [8·3, C, h, w]
    expected = maps.flatten(2).transpose(1, 2).unflatten(0, (4, 2, 3)).float()
    both = torch.cat([expected[:, 0], expected[:, 1]], dim=2)  # static, then gripper
    (seen,) = spy.inputs["former"]
    assert seen.dtype == torch.float32
    close(seen, both)
    close(spy.inputs["branch"][0], expected[:, 0])


def test_stage_3_text(stage3: tuple[DeFI, Any]) -> None:
    """T5's dropout is on, and off again where the policy acts; no text is dropped; masks are in order."""
    policy, samples = stage3
    batch = batch_of(samples, len(samples))
    picked = [0, 1, len(samples) - 1]
    batch = {
        name: value[picked] if torch.is_tensor(value) else [value[i] for i in picked]
        for name, value in batch.items()
    }
    spy = Spy(
        t5=policy.t5.model,
        block=policy.gidm_branch.tokenizer.encoder.blocks[0],
        sentence=policy.action_head.embed_sentence,
    )
    policy(batch)
    states, mask = spy.outputs["t5"].last_hidden_state, spy.named["t5"]["attention_mask"].bool()
    assert spy.training["t5"] and not policy.t5.model.training
    assert {m.p for m in policy.t5.model.modules() if isinstance(m, nn.Dropout)} == {0.1}
    assert torch.equal(spy.inputs["block"][1][:, -mask.shape[1] :], mask[[0, 1, 2, 0, 1, 2]])
    assert torch.equal(spy.inputs["sentence"][0], policy.gfdm.clip.sentence(batch["text"]))
    policy(batch)
    assert not torch.equal(spy.outputs["t5"].last_hidden_state, states)
    policy.eval()
    spy.training.clear()
    with torch.no_grad():
        policy(batch)
    assert not spy.training.get("t5", False)
    policy.train()


def test_stage_3_actions(stage3: tuple[DeFI, Any]) -> None:
    policy, samples = stage3
    batch = batch_of(samples, 20)
    head = policy.action_head
    spy = Spy(
        sigma=head.embed_sigma,
        action=head.embed_action,
        cross=head.decoder[0].cross_attention,
        own=head.decoder[0].attention,
        encoder=head.encoder[0].attention,
        predict=head.predict,
        quantizer=policy.gidm_branch.tokenizer.quantizer,
    )
    reported = policy(batch)
    actions = batch["actions"][:, None].float()
    sigma = spread_over_batch(spy.inputs["sigma"][0], actions)
    c_in, c_out = 1 / (sigma**2 + 0.25).sqrt(), 0.5 * sigma / (sigma**2 + 0.25).sqrt()
    noisy = spy.inputs["action"][0] / c_in
    is_normal((noisy - actions) / sigma)
    denoised = 0.25 / (sigma**2 + 0.25) * noisy + c_out * spy.outputs["predict"]
    action_loss = (((denoised - actions) / c_out) ** 2).mean()
    close(reported["action_loss"], action_loss, 1e-4)
    quantized = spy.outputs["quantizer"]
    nearest = policy.gidm_branch.tokenizer.quantizer.codebook[quantized.indices]
    distance = ((spy.inputs["quantizer"][0] - nearest) ** 2).mean()
    close(reported["loss"], action_loss + distance + 0.25 * distance, 1e-4)

    context = 1 + 3 * 2 + 4  # sentence, video tokens, latent action
    assert spy.inputs["encoder"][0].shape[1] == context and len(spy.inputs["encoder"]) == 1
    assert spy.named["own"] == {"causal": True}
    assert torch.equal(spy.named["cross"]["mask"], torch.ones(10, context).tril().bool())
    assert head.action_positions is None


def test_stage_3_noise_levels(stage3: tuple[DeFI, Any]) -> None:
    """σ is log-logistic around 0.5 with scale 0.5: quartiles 0.5/√3, 0.5, 0.5·√3."""
    policy, _ = stage3
    spy = Spy(sigma=policy.action_head.embed_sigma)
    batch = policy.config.fake_batch(1000)
    policy(batch | {"seed": torch.from_numpy(np.random.default_rng(0).integers(2**62, size=1000))})
    sigma = spy.inputs["sigma"][0]
    assert sigma.shape == (1000, 1) and sigma.min() >= 0.001 and sigma.max() <= 80
    for share, level in ((0.25, 0.5 / 3**0.5), (0.5, 0.5), (0.75, 0.5 * 3**0.5)):
        assert (sigma < level).float().mean().item() == pytest.approx(share, abs=0.06)
