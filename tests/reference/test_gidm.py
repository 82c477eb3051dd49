"""The latent action model against recorded outputs of the published one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from Step2_GIDM.adapter import load_published, to_published
from Step2_GIDM.latent_action import LatentActionModel, LatentActionSizes, LatentActionTokenizer

TOLERANCE = 1e-5


class Recording:
    """One file of recorded numerics: configuration, and tensors by their first name part."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for part in ("weights", "in", "out", "grad"):
            found = {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(part + ".")}
            setattr(self, {"in": "inputs"}.get(part, part), found)
        self.source = path.name

    def sizes(self, prefix: str = "") -> LatentActionSizes:
        """What the configuration does not say is read off the weights."""
        w = {k.removeprefix(prefix): v for k, v in self.weights.items() if k.startswith(prefix)}
        return LatentActionSizes(
            patch_width=w["action_latent"].shape[-1],
            text_width=w["lang_proj.weight"].shape[1] if "lang_proj.weight" in w else None,
            width=self.config["model_dim"],
            blocks=self.config["enc_blocks"],
            heads=self.config["num_heads"],
            queries=w["action_latent"].shape[-2],
            codes=self.config["num_latents"],
            code_width=self.config["latent_dim"],
            frozen_codes=self.config.get("uncontrolled_codebook"),
        )


def close(ours: Tensor, recorded: Tensor) -> None:
    error = (ours.reshape(recorded.shape).double() - recorded.double()).norm() / recorded.double().norm()
    assert error < TOLERANCE, f"relative error {error:.1e}"


def recordings(reference: Path, stem: str) -> list[Recording]:
    found = sorted((reference / "models").glob(f"{stem}*.safetensors"))
    if not found:
        pytest.skip(f"no models/{stem}*.safetensors in the recorded data")
    return [Recording(path) for path in found]


def loaded(recording: Recording) -> LatentActionModel:
    blocks = recording.config["dec_blocks"]
    model = LatentActionModel(
        recording.sizes(),
        decoder_blocks=blocks,
        commitment=recording.config.get("commit_weight", 0.25),
    )
    load_published(model, recording.weights, source=recording.source)
    return model


def test_latent_action_model(reference: Path) -> None:
    for recording in recordings(reference, "gidm_latent_action_model"):
        model = loaded(recording)
        out = model(
            recording.inputs["dino_patch_features"],
            recording.inputs["text_embedding"],
            recording.inputs["text_mask"].bool(),
        )
        out.loss.backward()
        codes = out.actions.codes
        assert torch.equal(codes.indices, recording.out["indices"])
        ours = {
            "encoder_vectors": out.actions.vectors,
            "codebook_vectors": model.tokenizer.quantizer.codebook[codes.indices],
            "z_q": codes.vectors,
            "recon": out.predicted,
            "target": recording.inputs["dino_patch_features"][:, 1],
            "mse_loss": out.mse,
            "q_loss": codes.codebook_loss,
            "commit_loss": codes.commitment_loss,
            "total_loss": out.loss,
        }
        assert set(ours) | {"indices"} == set(recording.out), "every recorded output is compared"
        for name, value in ours.items():
            close(value, recording.out[name])
        gradients = to_published(model, {k: p.grad for k, p in model.named_parameters()})
        assert recording.grad
        for name, value in recording.grad.items():
            close(gradients[name], value)


def test_controllable_model(reference: Path) -> None:
    for recording in recordings(reference, "gidm_controllable_latent_action_model"):
        out = loaded(recording)(recording.inputs["dino_patch_features"])
        new, rest = out.actions, out.actions.rest
        assert torch.equal(new.indices, recording.out["indices"])
        assert torch.equal(rest.indices, recording.out["indices_uncontrol"])
        close(new.codes.vectors, recording.out["z_q"])
        close(rest.codes.vectors, recording.out["z_q_uncontrol"])
        close(out.predicted, recording.out["recon"])


def test_tokenizer_in_the_policy(reference: Path) -> None:
    """Stage 3 runs the same tokenizer over features of the imagined video instead of DINOv2 patches."""
    for recording in recordings(reference, "gidm_branch"):
        sizes = recording.sizes("lam.")
        tokenizer = LatentActionTokenizer(sizes)
        weights = {k.removeprefix("lam."): v for k, v in recording.weights.items() if k.startswith("lam.")}
        load_published(tokenizer, weights, source=recording.source)
        w = recording.weights
        features = recording.inputs["predicted_features"][:, recording.config["frames"]]
        hidden = torch.nn.functional.linear(features, w["goal_emb.0.weight"], w["goal_emb.0.bias"])
        hidden = torch.nn.functional.gelu(hidden)
        patches = torch.nn.functional.linear(hidden, w["goal_emb.2.weight"], w["goal_emb.2.bias"])
        patches = patches + w["time_pos_emb"]
        states, mask = recording.inputs["text_embedding"], recording.inputs["text_mask"].bool()
        actions = tokenizer(patches, states, mask)
        assert torch.equal(actions.indices, recording.out["indices"])
        close(actions.vectors, recording.out["encoder_vectors"])
        close(tokenizer.quantizer.codebook[actions.indices], recording.out["codebook_vectors"])
        close(actions.tokens, recording.out["latent_action_tokens"])


def test_published_round_trip(reference: Path) -> None:
    """Published weights → ours → published: identical."""
    for stem in ("gidm_latent_action_model", "gidm_controllable_latent_action_model"):
        for recording in recordings(reference, stem):
            back = to_published(loaded(recording))
            assert set(back) == set(recording.weights)
            assert all(torch.equal(back[k], v) for k, v in recording.weights.items())
