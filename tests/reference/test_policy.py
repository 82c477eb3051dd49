"""Stage 3 against recorded outputs of the published modules (float32, CPU)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from Step2_GIDM.latent_action import LatentActionSizes
from Step3_DeFI.action_head import ActionDenoiser
from Step3_DeFI.adapter import ACTION_DENOISER, VIDEO_FORMER, load_branch
from Step3_DeFI.config import ActionHeadConfig
from Step3_DeFI.diffusion import ddim as sample_ddim
from Step3_DeFI.diffusion import denoising_loss, exponential_schedule, log_logistic, precondition
from Step3_DeFI.gidm_branch import GIDMBranch
from Step3_DeFI.video_former import VideoFormer

SIGMA_DATA = 0.5


class Recording:
    """One recorded module: config, weights, inputs, outputs."""

    def __init__(self, path: Path):
        with safe_open(path, "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.weights, self.inputs, self.outputs = (
            {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            for prefix in ("weights.", "in.", "out.")
        )


def assert_close(ours: torch.Tensor, recorded: torch.Tensor) -> None:
    error = (ours.double() - recorded.double()).norm() / recorded.double().norm()
    assert ours.shape == recorded.shape
    assert error < 1e-5, f"relative error {error:.2e}"


@pytest.fixture(scope="module")
def denoiser(reference: Path) -> tuple[ActionDenoiser, Recording]:
    record = Recording(reference / "models" / "action_denoiser.safetensors")
    c, w = record.config, record.weights
    head = ActionHeadConfig(
        dim=c["embed_dim"],
        encoder_layers=c["n_enc_layers"],
        decoder_layers=c["n_dec_layers"],
        heads=c["n_heads"],
        cross_attention="causal",
    )
    model = ActionDenoiser(
        head,
        sentence_dim=c["goal_dim"],
        video_dim=c["obs_dim"],
        latent_action_dim=w["tok_emb_token.weight"].shape[1],
        action_dim=c["action_dim"],
        chunk=c["action_seq_len"],
    )
    model.load_state_dict(ACTION_DENOISER.split(w))
    return model.eval(), record


@pytest.fixture(scope="module")
def network(denoiser):
    model, record = denoiser
    with torch.no_grad():
        memory = model.encode(
            sentence=record.inputs["goal"][:, 0],
            video_tokens=record.inputs["video_tokens"],
            latent_actions=record.inputs["latent_action_tokens"],
        )
    return lambda x, sigma: model.decode(memory, x, model.noise_levels(sigma))


@torch.no_grad()
def test_action_denoiser(denoiser, network):
    _, record = denoiser
    actions, noise, sigma = (record.inputs[k] for k in ("actions", "noise", "sigma"))
    assert_close(network(actions, sigma), record.outputs["inner_model"])
    noisy = actions + noise * sigma[:, None, None]
    denoise = precondition(lambda x, i: network(x, sigma), sigma[None], sigma_data=SIGMA_DATA)
    assert_close(denoise(noisy, 0), record.outputs["denoised"])
    loss = denoising_loss(network, actions, noise=noise, sigma=sigma, sigma_data=SIGMA_DATA)
    assert_close(loss, record.outputs["loss"])


@torch.no_grad()
def test_ddim(denoiser, network):
    _, record = denoiser
    recorded = record.outputs["ddim_sigmas"]
    sigmas = exponential_schedule(
        len(recorded) - 1, sigma_max=float(recorded[0]), sigma_min=float(recorded[-2])
    )
    assert_close(sigmas, recorded)
    denoise = precondition(lambda x, i: network(x, sigmas[i]), sigmas, sigma_data=SIGMA_DATA)
    actions = sample_ddim(denoise, record.inputs["x_T"], sigmas)
    assert_close(actions, record.outputs["ddim_actions"])


def test_sigma_density(denoiser):
    _, record = denoiser
    bounds = {"minimum": 0.001, "maximum": 80.0}
    sigma = log_logistic(
        record.outputs["loglogistic_u"], loc=torch.tensor(SIGMA_DATA).log().item(), scale=0.5, **bounds
    )
    assert_close(sigma, record.outputs["loglogistic_sigma"])


@torch.no_grad()
def test_several_draws_equal_one_at_a_time(denoiser):
    model, record = denoiser
    memory = model.encode(
        sentence=record.inputs["goal"][:, 0],
        video_tokens=record.inputs["video_tokens"],
        latent_actions=record.inputs["latent_action_tokens"],
    )
    noisy = torch.stack([record.inputs["actions"], record.inputs["noise"]], dim=1)
    sigma = torch.stack([record.inputs["sigma"], record.inputs["sigma"].flip(0)], dim=1)
    levels = model.noise_levels(sigma)
    together = model.decode(memory, noisy, levels)
    for draw in range(2):
        one = model.decode(memory, noisy[:, draw], [level[:, draw] for level in levels])
        assert_close(together[:, draw], one)


@torch.no_grad()
def test_video_former(reference: Path):
    record = Recording(reference / "models" / "video_former.safetensors")
    c = record.config
    model = VideoFormer(
        feature_channels=c["condition_dim"],
        dim=c["dim"],
        depth=c["depth"],
        heads=c["heads"],
        head_dim=c["dim_head"],
        frames=c["num_frame"],
        queries=c["num_latents"] // c["num_frame"],
        ff_mult=c["ff_mult"],
    )
    model.load_state_dict(VIDEO_FORMER.split(record.weights))
    assert_close(model(record.inputs["features"]), record.outputs["tokens"])
    back = VIDEO_FORMER.join(model.state_dict())
    assert back.keys() == record.weights.keys()


@torch.no_grad()
def test_gidm_branch(reference: Path):
    record = Recording(reference / "models" / "gidm_branch.safetensors")
    c, w = record.config, record.weights
    sizes = LatentActionSizes(
        patch_width=w["goal_emb.2.weight"].shape[0],
        text_width=w["lam.lang_proj.weight"].shape[1],
        width=c["model_dim"],
        blocks=c["enc_blocks"],
        heads=c["num_heads"],
        queries=w["lam.action_latent"].shape[2],
        codes=c["num_latents"],
        code_width=c["latent_dim"],
    )
    model = GIDMBranch(sizes, feature_channels=c["condition_dim"], frames=c["frames"])
    load_branch(model, w)
    actions = model(
        record.inputs["predicted_features"],
        record.inputs["text_embedding"],
        record.inputs["text_mask"].bool(),
    )
    assert torch.equal(actions.indices, record.outputs["indices"])
    assert_close(actions.vectors, record.outputs["encoder_vectors"])
    assert_close(actions.codes.vectors, record.outputs["codebook_vectors"])
    assert_close(actions.tokens, record.outputs["latent_action_tokens"])
