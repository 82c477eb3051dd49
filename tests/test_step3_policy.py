"""The policy: gradients, learning, independence of the batch, work done once, checkpoints of all stages."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from policy_fakes import TEXT, build_gfdm, build_gidm, build_policy, policy_config, write_stages

from defi.config import CONFIG_DIR, presets
from defi.data.calvin import calvin_robot
from defi.engine import checkpoint
from defi.errors import UserError
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.policy import DeFI, PolicyNoise

TEXTS = ["open the drawer", "push the red block to the left", "turn on the light bulb"]


@pytest.fixture(scope="module")
def policy() -> DeFI:
    return build_policy().eval()


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(0, 256, (3, 2, 3, 16, 16), dtype=torch.uint8)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_stages(tmp_path_factory.mktemp("stages"))


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list:
    calls: list = []
    original = getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_every_trained_parameter_gets_a_gradient_and_no_frozen_one() -> None:
    policy = build_policy().train()
    result = policy(policy.config.fake_batch(3))
    result["loss"].backward()
    for name, parameter in policy.named_parameters():
        trained = not name.startswith(("gfdm.", "t5."))
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None) == trained, name
    assert not any(module.training for module in (policy.gfdm.unet, policy.gfdm.vae, policy.t5))
    expected = result["action_loss"] + result["codebook"] + 0.25 * result["commitment"]
    assert torch.isclose(result["loss"], expected)


def test_without_latent_actions_nothing_of_stage_2_is_read(stages: tuple[Path, Path], tmp_path: Path) -> None:
    gfdm, gidm = stages
    config = policy_config(latent_actions=False)
    policy = DeFI.from_stages(config, gfdm=gfdm, gidm=gidm).train()
    result = policy(policy.config.fake_batch(3))
    result["loss"].backward()
    assert result["loss"] == result["action_loss"] and "perplexity" not in result
    assert not any(name.startswith("gidm_branch") for name, _ in policy.trainable())
    assert all(parameter.grad is not None for _, parameter in policy.trainable())  # as DDP wants it
    assert policy.epoch_end() == {}
    checkpoint.save(policy.eval(), tmp_path / "policy", step=1, config={"preset_name": "test"})
    again = DeFI.from_pretrained(checkpoint.find_weights(tmp_path / "policy")).eval()
    batch = policy.config.fake_batch(2)
    assert torch.equal(policy.predict(batch), again.predict(batch))


def test_frozen_networks_build_no_graph(policy: DeFI, pictures: torch.Tensor) -> None:
    batch = {
        "images": pictures,
        "text": TEXTS,
        "actions": torch.zeros(3, 10, 7),
        "seed": torch.arange(3),
    }
    assert not policy._features_of(batch).requires_grad


def test_overfits_one_batch() -> None:
    policy = build_policy(diffusion={"draws": 8}).train()
    batch = policy.config.fake_batch(2)
    batch["actions"] = batch["actions"].sign() * 0.5
    optimizer = torch.optim.Adam([p for _, p in policy.trainable()], lr=3e-3)
    for step in range(300):
        batch["seed"] = torch.arange(2) + 2 * step
        loss = policy(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.eval()
    error = (policy.predict(batch) - batch["actions"]).square().mean().item()
    assert error < 0.02, error  # 0.25 for all zeros


def test_actions_do_not_depend_on_the_rest_of_the_batch(policy: DeFI, pictures: torch.Tensor) -> None:
    seeds = torch.tensor([5, 6, 7])
    together = policy.act(pictures, TEXTS, noise=policy.noise(seeds))
    assert together.shape == (3, 10, 7) and together.dtype == torch.float32
    for i in range(3):
        one = slice(i, i + 1)
        alone = policy.act(pictures[one], TEXTS[one], noise=policy.noise(seeds[one]))
        torch.testing.assert_close(alone, together[one], rtol=1e-4, atol=1e-5)


def test_text_pictures_and_noise_change_the_actions(policy: DeFI, pictures: torch.Tensor) -> None:
    noise = policy.noise(torch.tensor([1]))
    base = policy.act(pictures[:1], TEXTS[:1], noise=noise)
    other_noise = PolicyNoise(video=noise.video, actions=-noise.actions)
    other_video = PolicyNoise(video=-noise.video, actions=noise.actions)
    for changed in (
        policy.act(pictures[1:2], TEXTS[:1], noise=noise),
        policy.act(pictures[:1], TEXTS[1:2], noise=noise),
        policy.act(pictures[:1].flip(1), TEXTS[:1], noise=noise),
        policy.act(pictures[:1], TEXTS[:1], noise=other_noise),
        policy.act(pictures[:1], TEXTS[:1], noise=other_video),
    ):
        assert not torch.equal(base, changed)
    assert torch.equal(base, policy.act(pictures[:1] / 127.5 - 1, TEXTS[:1], noise=noise))


def test_fixed_feature_noise_is_the_same_for_every_observation() -> None:
    policy = build_policy(feature_noise="fixed")
    noise = policy.noise(torch.tensor([1, 2]))
    assert torch.equal(noise.video[0], noise.video[1])
    assert not torch.equal(noise.actions[0], noise.actions[1])


def test_the_context_is_encoded_once_per_chunk(policy: DeFI, pictures: torch.Tensor, monkeypatch) -> None:
    once = [
        count_calls(monkeypatch, policy.gfdm, "features"),
        count_calls(monkeypatch, policy.video_former, "forward"),
        count_calls(monkeypatch, policy.gidm_branch, "forward"),
        count_calls(monkeypatch, policy.action_head, "encode"),
    ]
    steps = count_calls(monkeypatch, policy.action_head.decoder[0], "forward")
    policy.act(pictures, TEXTS, noise=policy.noise(torch.arange(3)))
    assert [len(calls) for calls in once] == [1, 1, 1, 1]
    assert len(steps) == policy.config.diffusion.steps


@pytest.fixture(scope="module")
def guidable() -> DeFI:
    return build_policy(diffusion={"text_dropout": 0.5}).eval()


def guide_by(policy: DeFI, scale: float) -> None:
    policy.config.diffusion = replace(policy.config.diffusion, guidance=scale)


@pytest.mark.parametrize("sampler, calls", [("ddim", 6), ("dpmpp_2m", 6), ("heun", 11)])
def test_guidance_encodes_twice_as_many_rows_once(
    guidable: DeFI, monkeypatch, sampler: str, calls: int
) -> None:
    monkeypatch.setattr(
        guidable.config, "diffusion", replace(guidable.config.diffusion, sampler=sampler, steps=6)
    )
    encoded = count_calls(monkeypatch, guidable.action_head, "encode")
    decoded = count_calls(monkeypatch, guidable.action_head.decoder[0], "forward")
    once = count_calls(monkeypatch, guidable.gidm_branch, "forward")
    features = guidable.config.fake_batch(3)["features"]
    for scale, rows in ((1.0, 3), (2.0, 6)):
        for seen in (encoded, decoded, once):
            seen.clear()
        guide_by(guidable, scale)
        guidable.act_on_features(features, TEXTS, noise=torch.zeros(3, 10, 7))
        assert [len(kwargs["sentence"]) for _, kwargs in encoded] == [rows]
        assert [len(args[0]) for args, _ in decoded] == [rows] * calls
        assert len(once) == 1


def test_guidance_leads_away_from_what_the_policy_does_without_words(guidable: DeFI, monkeypatch) -> None:
    monkeypatch.setattr(guidable.config, "diffusion", guidable.config.diffusion)
    features, noise = guidable.config.fake_batch(3)["features"], torch.randn(3, 10, 7)
    noisy, sigmas = torch.randn(3, 10, 7), torch.tensor([2.0, 0.0])
    context = guidable.context(features, TEXTS)
    with torch.no_grad():
        conditioned = guidable.denoiser(context, sigmas)(noisy, 0)
        no_words = replace(context, sentence=torch.zeros_like(context.sentence))
        without = guidable.denoiser(no_words, sigmas)(noisy, 0)
        unguided = guidable.act_on_features(features, TEXTS, noise=noise)
        for scale in (0.0, 1.0, 2.5):
            guide_by(guidable, scale)
            expected = without + scale * (conditioned - without)
            torch.testing.assert_close(guidable.denoiser(context, sigmas)(noisy, 0), expected)
            same = torch.equal(guidable.act_on_features(features, TEXTS, noise=noise), unguided)
            assert same == (scale == 1)
    assert not torch.allclose(conditioned, without, atol=1e-4)


def test_text_is_dropped_for_its_share_of_the_samples(monkeypatch) -> None:
    policy = build_policy(diffusion={"text_dropout": 0.25})
    encoded = count_calls(monkeypatch, policy.action_head, "encode")
    batch = policy.config.fake_batch(200)
    policy(batch)
    policy({name: value[:1] for name, value in batch.items()})
    (_, all_of_them), (_, first) = encoded
    dropped = (all_of_them["sentence"] == 0).all(1)
    assert 30 < dropped.sum() < 70
    kept = policy.gfdm.clip.sentence(batch["text"])[~dropped]
    assert torch.equal(all_of_them["sentence"][~dropped], kept)
    assert (first["sentence"] == 0).all() == dropped[0], "depends on the sample's seed alone"


def test_without_text_dropout_training_is_as_it_was(monkeypatch) -> None:
    policy = build_policy().train()
    batch = policy.config.fake_batch(2)
    loss = policy(batch)["action_loss"]
    dropping = build_policy(diffusion={"draws": 2, "text_dropout": 1e-9}).train()
    assert torch.equal(loss, dropping(batch)["action_loss"])


def test_several_draws_share_a_context(monkeypatch) -> None:
    policy = build_policy(diffusion={"draws": 5})
    encoded = count_calls(monkeypatch, policy.action_head, "encode")
    policy(policy.config.fake_batch(2))
    assert len(encoded) == 1


def test_training_and_rollout_share_the_feature_path(policy: DeFI, pictures: torch.Tensor) -> None:
    seeds = torch.arange(3)
    batch = {"images": pictures, "text": TEXTS, "seed": seeds}
    noise = policy.noise(seeds)
    torch.testing.assert_close(policy.predict(batch), policy.act(pictures, TEXTS, noise=noise))


# ------------------------------------------------------------ checkpoints


def test_stage_2_is_the_start_of_the_branch(stages: tuple[Path, Path]) -> None:
    gfdm, gidm = stages
    policy = DeFI.from_stages(policy_config(), gfdm=gfdm, gidm=gidm)
    tokenizer = build_gidm().tokenizer
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(policy.gidm_branch.tokenizer.state_dict()[name], tensor), name
    frames = build_gfdm().unet.state_dict()
    assert all(torch.equal(policy.gfdm.unet.state_dict()[name], t) for name, t in frames.items())


def test_a_saved_policy_acts_the_same_also_after_moving(
    stages: tuple[Path, Path], pictures: torch.Tensor, tmp_path: Path
) -> None:
    place = tmp_path / "a"
    shutil.copytree(stages[0].parent, place)
    policy = DeFI.from_stages(policy_config(), gfdm=place / "gfdm", gidm=place / "gidm").eval()
    noise = policy.noise(torch.arange(3))
    wanted = policy.act(pictures, TEXTS, noise=noise)
    checkpoint.save(policy, place / "run", step=1, config={"preset_name": "test"})
    shutil.move(place, tmp_path / "b")
    run = checkpoint.find_weights(tmp_path / "b" / "run", "policy")
    assert torch.equal(DeFI.from_pretrained(run).eval().act(pictures, TEXTS, noise=noise), wanted)
    assert {file.name for file in run.iterdir()} >= {"model.safetensors", "config.json", "sources.json"}

    shutil.move(tmp_path / "b" / "gfdm", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="gfdm checkpoint of this policy is gone; give its place with gfdm="):
        DeFI.from_pretrained(run)
    moved = DeFI.from_pretrained(run, gfdm=tmp_path / "elsewhere").eval()
    assert torch.equal(moved.act(pictures, TEXTS, noise=noise), wanted)

    checkpoint.save(build_gfdm(seed=1), tmp_path / "other", step=1, config={"preset_name": "test"})
    with pytest.raises(UserError, match="not the gfdm checkpoint that .* was trained on"):
        DeFI.from_pretrained(run, gfdm=tmp_path / "other")
    check_older_config(run, tmp_path / "elsewhere")
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: cannot be read"):
        DeFI.from_pretrained(run, gfdm=tmp_path / "elsewhere")


def test_sizes_are_those_of_the_checkpoints(tmp_path: Path) -> None:
    """Others than the presets name fit as well; what a policy was built on is in its own checkpoint."""
    clip = TEXT | {"seed": 1, "projection": 8}
    for stage, model in (
        ("gfdm", build_gfdm(frames=4, image_size=32, clip=clip)),
        ("gidm", build_gidm(codes=4, queries=3)),
    ):
        checkpoint.save(model, tmp_path / stage, step=1, config={"preset_name": "test"})
    policy = DeFI.from_stages(policy_config(), gfdm=tmp_path / "gfdm", gidm=tmp_path / "gidm")
    stages = policy.config.stages
    assert (stages.frames, stages.feature_tokens, stages.feature_channels) == (4, 64, 64)
    assert (stages.sentence_width, stages.latent_action.codes, stages.latent_action.queries) == (8, 4, 3)
    assert policy(policy.config.fake_batch(2))["loss"].isfinite()
    run = checkpoint.save(policy, tmp_path / "run", step=1, config={"preset_name": "test"})
    assert DeFI.from_pretrained(run).config == policy.config


def test_refuses_other_checkpoints(stages: tuple[Path, Path], tmp_path: Path) -> None:
    gfdm, gidm = stages
    other = build_gidm(variant="controllable")
    checkpoint.save(other, tmp_path / "gidm", step=1, config={"preset_name": "test"})
    with pytest.raises(UserError, match="gidm.variant=controllable: a policy needs"):
        DeFI.from_stages(policy_config(), gfdm=gfdm, gidm=tmp_path / "gidm")
    for changes, message in (
        ({"latent_action_frames": [0, 5]}, "the last frame that the stage-1 checkpoint imagines is 2"),
        ({"latent_action_frames": []}, r"policy.latent_action_frames=\[\]: name two"),
        ({"merge": 3}, "policy.merge=3: must divide 4"),
    ):
        with pytest.raises(UserError, match=message):
            DeFI.from_stages(policy_config(**changes), gfdm=gfdm, gidm=gidm)
    with pytest.raises(UserError, match="no checkpoint here"):
        DeFI.from_stages(policy_config(), gfdm=tmp_path / "nothing", gidm=gidm)
    with pytest.raises(UserError, match="holds a gidm checkpoint, not gfdm"):
        DeFI.from_stages(policy_config(), gfdm=gidm, gidm=gidm)


def check_older_config(run: Path, gfdm: Path) -> None:
    """Sizes lay among the choices, and positions were a setting of their own: read where they follow from the
    cross-attention."""
    file = run / "config.json"
    config = json.loads(file.read_text())
    config |= config.pop("stages")
    older = config | {"action_head": config["action_head"] | {"action_positions": True}}
    file.write_text(json.dumps(older))
    DeFI.from_pretrained(run, gfdm=gfdm)
    for kind, positions in (("full", False), ("causal", True)):
        older["action_head"] |= {"action_positions": positions, "cross_attention": kind}
        file.write_text(json.dumps(older))
        with pytest.raises(UserError, match=f"cross_attention={kind} with action_positions={positions}"):
            DeFI.from_pretrained(run, gfdm=gfdm)
    file.write_text(json.dumps(config | {"action_head": ["damaged"]}))
    with pytest.raises(UserError, match="config.json: .*ActionHeadConfig"):
        DeFI.from_pretrained(run, gfdm=gfdm)


@pytest.mark.parametrize("preset", presets())
def test_every_choice_can_be_set_with_any_preset(preset: str) -> None:
    choices = {
        "policy.diffusion.sampler": "heun",
        "policy.diffusion.text_dropout": 0.1,
        "policy.diffusion.guidance": 2.0,
        "policy.action_head.cross_attention": "causal",
        "gfdm.finetune": "lora",
        "gfdm.video_loss": 0.5,
    }
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        plain = compose("step3_train", [f"preset={preset}"])
        cfg = compose(
            "step3_train", [f"preset={preset}", *(f"{key}={value}" for key, value in choices.items())]
        )
    OmegaConf.resolve(plain), OmegaConf.resolve(cfg)
    config = PolicyConfig.from_preset(cfg)
    assert (config.diffusion.sampler, config.diffusion.guidance) == ("heun", 2.0)
    assert (config.finetune.mode, config.finetune.video_loss) == ("lora", 0.5)
    assert config.action_head.cross_attention == "causal"
    assert PolicyConfig.from_preset(plain).finetune.mode == "none"


def test_codes_are_restarted_where_that_is_wanted() -> None:
    for wanted, found in ((True, {"restarted_codes"}), (False, set())):
        policy = build_policy(restart_codes=wanted).train()
        policy(policy.config.fake_batch(2))
        before = policy.gidm_branch.tokenizer.quantizer.codebook.detach().clone()
        assert set(policy.epoch_end()) == found
        assert torch.equal(policy.gidm_branch.tokenizer.quantizer.codebook, before) != wanted


def test_settings_are_checked() -> None:
    for section, message in (
        ({"feature_noise": "some"}, "policy.feature_noise=some: choose one of fresh, fixed"),
        ({"frames": 3}, "policy.frames=3: no longer a setting; it is read from the stage-1 checkpoint"),
        ({"latent_action": {"codes": 8}}, "policy.latent_action.*: no longer a setting; its sizes are read"),
        ({"action_head": {"cross_attention": "half"}}, "choose one of full, causal"),
        (
            {"action_head": {"action_positions": True}},
            "action_positions=True: no longer a setting; positions",
        ),
        ({"diffusion": {"sampler": "euler"}}, "choose one of ddim, dpmpp_2m, heun"),
        ({"diffusion": {"steps": 0}}, "policy.diffusion.steps=0: must be 1 or more"),
        ({"diffusion": {"text_dropout": 1.0}}, r"policy.diffusion.text_dropout=1.0: must lie in \[0, 1\)"),
        ({"diffusion": {"guidance": 2.0}}, "the policy never saw a dropped text"),
        ({"chunks": 3}, "policy.chunks"),
    ):
        with pytest.raises(UserError, match=message):
            policy_config(**section)
    assert PolicyConfig.from_preset({"policy": asdict(policy_config())}, calvin_robot()) == policy_config()
