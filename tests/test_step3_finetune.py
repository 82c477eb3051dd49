"""The video model trained with the policy: what moves, what is saved, what a frozen one costs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from policy_fakes import build_policy, policy_config, recorded, write_demonstrations, write_stages
from safetensors.torch import load_file
from test_step3_data import prepare_settings, train_settings
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from defi.engine import checkpoint
from defi.engine.checkpoint import find_weights
from defi.engine.log import read_metrics
from defi.errors import UserError
from Step1_GFDM.model import GFDM
from Step1_GFDM.unet import FEATURE_PARTS
from Step3_DeFI.acting import Policy
from Step3_DeFI.policy import DeFI
from Step3_DeFI.prepare import prepare
from Step3_DeFI.store import PolicyStore
from Step3_DeFI.train import train_policy

MODES = [("lora", 0.0), ("lora", 0.5), ("full", 0.0), ("full", 0.5)]


def build(mode: str, video_loss: float = 0.0) -> DeFI:
    return build_policy(finetune={"mode": mode, "rank": 2, "video_loss": video_loss})


def fake_batch(policy: DeFI) -> dict[str, Any]:
    """Two samples as a store of latents with videos gives them."""
    config = policy.gfdm.config
    latent = (config.vae.latent_channels, config.latent_size, config.latent_size)
    generator = torch.Generator().manual_seed(0)
    batch = policy.config.fake_batch(2)
    del batch["features"]
    return batch | {
        "latents": torch.randn(2, 2, *latent, generator=generator),
        "video": torch.randn(2, 2, config.frames, *latent, generator=generator),
    }


def step(policy: DeFI) -> dict[str, Tensor]:
    """One training step; returns what the model reports."""
    optimizer = torch.optim.Adam([p for _, p in policy.trainable()], lr=1e-2)
    result = policy.train()(fake_batch(policy))
    result["loss"].backward()
    optimizer.step()
    return result


def unet_state(policy: DeFI) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.gfdm.unet.state_dict().items()}


@pytest.mark.parametrize("mode, video_loss", MODES)
def test_exactly_what_learns_gets_a_gradient_and_moves(mode: str, video_loss: float) -> None:
    policy = build(mode, video_loss)
    before = unet_state(policy)
    result = step(policy)
    assert ("video_loss" in result) == (video_loss > 0)
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    parts = ("",) if video_loss else FEATURE_PARTS
    learning = {name for name, p in policy.gfdm.unet.named_parameters() if p.requires_grad}
    assert learning and all(
        name.startswith(parts) and ("lora_" in name) == (mode == "lora") for name in learning
    )
    if mode == "full":
        assert learning == {name for name in before if name.startswith(parts)}
    moved = {name for name, tensor in policy.gfdm.unet.state_dict().items() if not tensor.equal(before[name])}
    if mode == "lora":  # adapters begin with B = 0, so that A's first gradient is zero
        assert moved == {name for name in learning if "lora_B" in name}
    else:  # a norm over one number (1 channel per group, 1 × 1 pixels) passes nothing to its weight
        assert moved < learning
        assert all("spatial_res_block.norm1.weight" in name for name in learning - moved)
    assert not any(p.requires_grad for part in (policy.gfdm.vae, policy.gfdm.clip) for p in part.parameters())


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_features_move(mode: str) -> None:
    # In float64: norms over one number turn another order of sums into thousandths.
    exact, frozen = build(mode).double(), build("none").double()
    torch.testing.assert_close(
        exact._features_of(fake_batch(exact)).detach(), frozen._features_of(fake_batch(frozen))
    )
    policy = build(mode)
    features = policy._features_of(fake_batch(policy)).detach()
    step(policy)
    assert (policy._features_of(fake_batch(policy)) - features).abs().max() > 0.05


def test_gradient_checkpointing_changes_memory_not_gradients() -> None:
    """What is kept for the way back, and the gradients, with the activations kept or computed again."""
    kept, gradients = [], []
    for checkpointing in (True, False):
        policy = build("full").eval()
        if not checkpointing:
            policy.gfdm.unet.disable_gradient_checkpointing()
        size = 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal size
            size += tensor.numel()
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            loss = policy(fake_batch(policy))["loss"]
        loss.backward()
        kept.append(size)
        gradients.append([p.grad for _, p in policy.trainable()])
    assert kept[0] < 0.7 * kept[1]
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_frozen_video_model_keeps_nothing_for_a_way_back() -> None:
    policy = build("none").train()
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        features = policy._features_of(fake_batch(policy))
        assert not kept and not features.requires_grad
        build("full")._features_of(fake_batch(policy))
    assert kept


def test_without_finetuning_the_checkpoint_has_nothing_of_the_video_model(tmp_path: Path) -> None:
    policy = build("none")
    policy.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if name.startswith("gfdm.")]
    assert policy.frozen == ("gfdm", "t5")
    assert not [name for name, _ in policy.gfdm.named_modules() if "lora" in name]


# ------------------------------------------------------------ from the store to the rollout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations, both stages' runs, and a store of each kind."""
    folder = tmp_path_factory.mktemp("place")
    write_demonstrations(folder / "demos")
    write_stages(folder)
    for kind in ("latents", "images"):
        settings = {"store.kind": kind, "store.videos": True, "data.stride": 2}
        prepare(prepare_settings(folder, folder / kind, **settings))
    return folder


def run_settings(place: Path, output: Path, mode: str, *, store: str = "latents", **values: Any) -> Any:
    given = {"gfdm.finetune": mode, "gfdm.lora_rank": 2, "gfdm.video_loss": 0.1, "trainer.global_batch": 2}
    return train_settings(place, output, place / store, **(given | {"trainer.preview_every": 0} | values))


def test_a_store_keeps_the_frames_that_follow(place: Path) -> None:
    """Samples 0, 1, 2 start at frames 100, 102, 104 of the span (100, 114), sample 3 at 115."""
    latents, images = PolicyStore(place / "latents"), PolicyStore(place / "images")
    assert latents[0]["video"].shape == (2, 3, 4, 8, 8) and images[0]["video"].shape == (2, 3, 3, 16, 16)
    for i in range(len(images)):
        assert torch.equal(images[i]["video"][:, 0], images[i]["images"])
    assert torch.equal(images[0]["video"][:, 1], images[1]["images"])
    assert torch.equal(images[0]["video"][:, 2], images[2]["images"])
    gfdm = GFDM.from_pretrained(find_weights(place / "gfdm"))
    encoded = gfdm.encode_images(images[3]["video"].flatten(0, 1) / 127.5 - 1).unflatten(0, (2, 3))
    torch.testing.assert_close(latents[3]["video"].float(), encoded, rtol=2e-3, atol=2e-3)
    plan = recorded(place / "demos", stride=5, clip=range(0, 30, 10))
    assert [plan.observations[row, 1] for row in plan.video[1]] == [5, 14, 14]  # not beyond the span


@pytest.mark.parametrize("mode, store", [("lora", "latents"), ("full", "images")])
def test_training_changes_the_video_model_and_the_rollout_has_it(
    place: Path, tmp_path: Path, mode: str, store: str
) -> None:
    given = {"trainer.max_steps": 2, "trainer.ema": 0.9, "trainer.lr": 1e-3}
    train_policy(run_settings(place, tmp_path / "run", mode, store=store, **given))
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert all(record["video_loss"] > 0 for record in records)
    weights = load_file(find_weights(tmp_path / "run") / "model.safetensors")
    of_gfdm = {name for name in weights if name.startswith("gfdm.")}
    assert all(name.startswith("gfdm.unet.") and ("lora_" in name) == (mode == "lora") for name in of_gfdm)

    policy = Policy.load(tmp_path / "run").model
    assert policy.config.finetune.mode == mode
    for name in of_gfdm:
        assert torch.equal(policy.state_dict()[name], weights[name]), name
    bare = DeFI.from_stages(policy_config(), gfdm=place / "gfdm", gidm=place / "gidm").eval()
    latents, noise = torch.randn(1, 2, 4, 8, 8), policy.noise(torch.tensor([3])).video
    batch = {"latents": latents, "text": ["open the drawer"], "seed": torch.tensor([3])}
    with torch.no_grad():
        assert not torch.equal(policy._features_of(batch), bare._features_of(batch))
        assert torch.equal(policy.noise(torch.tensor([3])).video, noise)


def test_a_checkpoint_of_adapters_is_loaded_strictly(place: Path, tmp_path: Path) -> None:
    config = policy_config(finetune={"mode": "lora", "rank": 2, "video_loss": 0.1})
    policy = DeFI.from_stages(config, gfdm=place / "gfdm", gidm=place / "gidm")
    weights = checkpoint.save(policy, tmp_path / "run", step=1, config={"preset_name": "test"})
    written = (weights / "config.json").read_text()
    (weights / "config.json").write_text(written.replace('"rank": 2', '"rank": 4'))
    with pytest.raises(UserError, match="lora_A.* has shape .*, the model wants"):
        DeFI.from_pretrained(weights)
    (weights / "config.json").write_text(
        written.replace('"lora"', '"none"').replace('"video_loss": 0.1', '"video_loss": 0.0')
    )
    with pytest.raises(UserError, match="has gfdm.unet.*lora_A.*, unknown to the model"):
        DeFI.from_pretrained(weights)


def test_finetuning_resumes_exactly(place: Path, tmp_path: Path) -> None:
    def go(output: str, steps: int, **values: Any) -> None:
        given = {"trainer.max_steps": steps, "trainer.save_every": 2, "trainer.ema": 0.9}
        train_policy(run_settings(place, tmp_path / output, "lora", **given, **values))

    go("whole", 4)
    go("parts", 2)
    go("parts", 4, resume=True)
    for file in ("model.safetensors", "../model.safetensors", "../state/optimizer.safetensors"):
        whole, parts = (find_weights(tmp_path / run, "policy") / file for run in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes(), file


def test_what_cannot_be_finetuned_is_refused(place: Path, tmp_path: Path) -> None:
    prepare(prepare_settings(place, tmp_path / "features"))
    prepare(prepare_settings(place, tmp_path / "latents", **{"store.kind": "latents"}))
    for store, values, message in (
        ("features", {"gfdm.video_loss": 0.0}, "stored features have no gradient for gfdm.finetune=lora"),
        (
            "latents",
            {},
            "holds no videos of 3 frames, 2 apart, for gfdm.video_loss; prepare it with store.videos=true",
        ),
        ("latents", {"gfdm.finetune": "some"}, "gfdm.finetune=some: choose one of none, lora, full"),
        ("latents", {"gfdm.finetune": "none"}, "gfdm.video_loss=0.1: must be 0, or positive with"),
        ("latents", {"gfdm.lora_rank": 0}, "gfdm.lora_rank=0: must be 1 or more"),
    ):
        settings = run_settings(
            place, tmp_path / "run", "lora", **({"data.store": tmp_path / store} | values)
        )
        with pytest.raises(UserError, match=message):
            train_policy(settings)
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="store.videos=true: videos are kept with store.kind=latents or"):
        prepare(prepare_settings(place, tmp_path / "none", **{"store.videos": True}))
