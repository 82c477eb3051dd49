"""Stage 2's networks: blocks, quantizer, initial weights, GIDM."""

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from step2_restart import BATCH, QUERIES, quantize, quantize_in_process
from torch import nn

from defi.errors import UserError
from defi.text import TextConfig
from Step2_GIDM.blocks import SelfAttention, SpatioTemporalBlock, sinusoid
from Step2_GIDM.dino import DinoConfig, DinoPatches
from Step2_GIDM.initial import start_as_difference, use_codes_early
from Step2_GIDM.latent_action import LatentActionModel, LatentActionSizes, LatentActionTokenizer
from Step2_GIDM.model import GIDM, GIDMConfig, plain
from Step2_GIDM.quantizer import VectorQuantizer, perplexity

SIZES = LatentActionSizes(
    patch_width=16, text_width=12, width=16, blocks=2, heads=2, queries=3, codes=5, code_width=8
)


def small(**changes) -> GIDMConfig:
    sizes = {"width": 32, "encoder_blocks": 2, "decoder_blocks": 1, "heads": 2, "code_width": 8, "codes": 8}
    dino = DinoConfig(image_size=42, width=32, layers=1, heads=2)
    text = TextConfig(width=16, layers=1, heads=2)
    return GIDMConfig(**(sizes | {"dino": dino, "text": text} | changes))


def test_instructions_are_cleaned_for_t5() -> None:
    assert plain("Öffne the  Drawer, now! ") == "öffne the  drawer now "
    assert plain("back\\slash ^caret_ [brackets] don't") == "back\\slash caret brackets dont"
    model = GIDM(small())
    assert torch.equal(model.language(["Open it!"])[0], model.language(["open it"])[0])


def test_positions_are_sine_on_even_and_cosine_on_odd_channels() -> None:
    table = sinusoid(7, 6)
    rate = 10_000 ** (-2 / 6)
    position = torch.arange(7.0)
    torch.testing.assert_close(table[:, 2], (position * rate).sin())
    torch.testing.assert_close(table[:, 3], (position * rate).cos())


def test_time_is_causal() -> None:
    torch.manual_seed(0)
    block = SpatioTemporalBlock(16, 2)
    x = torch.randn(2, 2, 5, 16)
    changed = x.clone()
    changed[:, 1] += 1
    before, after = block(x), block(changed)
    torch.testing.assert_close(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1], after[:, 1])


def test_padded_text_of_one_sample_masks_only_that_sample() -> None:
    """Each sample of a padded batch gives what it gives alone, and padding may hold anything."""
    torch.manual_seed(0)
    model = LatentActionModel(SIZES, decoder_blocks=1).eval()
    patches, states = torch.randn(3, 2, 9, 16), torch.randn(3, 6, 12)
    lengths = [2, 6, 4]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    together = model(patches, states, mask)
    dirty = model(patches, states.masked_fill(~mask[:, :, None], 1e3), mask)
    torch.testing.assert_close(dirty.predicted, together.predicted)
    for i, length in enumerate(lengths):
        alone = model(patches[i : i + 1], states[i : i + 1, :length], mask[i : i + 1, :length])
        torch.testing.assert_close(alone.predicted, together.predicted[i : i + 1])
        torch.testing.assert_close(alone.actions.vectors, together.actions.vectors[i : i + 1])


def test_mixed_text_masks_are_the_published_fault() -> None:
    """In training row n of the B·F rows gets the mask of sample n mod B; the decoder's masks are right."""
    model = LatentActionModel(SIZES, decoder_blocks=1)
    seen: dict[str, torch.Tensor] = {}
    for name, block in (("encoder", model.tokenizer.encoder.blocks[0]), ("decoder", model.decoder.blocks[0])):
        block.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[1]}))
    mask = torch.arange(6) < torch.tensor([2, 6, 4])[:, None]
    batch = torch.randn(3, 2, 9, 16), torch.randn(3, 6, 12), mask
    model.tokenizer.encoder.mixed_text_masks = True
    for mode, order in ((True, [0, 1, 2, 0, 1, 2]), (False, [0, 0, 1, 1, 2, 2])):
        model.train(mode)(*batch)
        assert torch.equal(seen["encoder"][:, -6:], mask[order])
        assert torch.equal(seen["decoder"][:, -6:], mask)


def test_default_initial_weights_are_pytorchs() -> None:
    """Queries U(-1, 1), codes U(-1/codes, 1/codes), weights and biases of Linear U(±1/√inputs)."""
    torch.manual_seed(0)
    model = GIDM(small(width=64))
    queries, codes = model.tokenizer.encoder.queries[0].detach(), model.tokenizer.quantizer.codebook.detach()
    assert 0.8 < queries.abs().max() <= 1 and 0.8 / len(codes) < codes.abs().max() <= 1 / len(codes)
    for name, layer in model.core.named_modules():
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            assert 0.9 * bound < layer.weight.abs().max() <= bound, name
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
            assert layer.bias is None or 0 < layer.bias.abs().max() <= bound, name
        elif isinstance(layer, nn.LayerNorm):
            assert (layer.weight == 1).all() and (layer.bias == 0).all(), name
    early = GIDM(small(width=64, initial="early_codes"))
    assert (early.tokenizer.from_code.bias == 0).all()


def test_quantizer_takes_the_nearest_code_and_passes_gradients_straight_through() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(6, 4)
    z = (0.2 * torch.randn(5, 3, 4)).requires_grad_()
    out = quantizer(z)
    distances = (z[:, :, None] - quantizer.codebook).norm(dim=-1)
    assert torch.equal(out.indices, distances.argmin(-1))
    codes = quantizer.codebook[out.indices]
    torch.testing.assert_close(out.vectors, codes)
    weights = torch.randn_like(z)
    (gradient,) = torch.autograd.grad((out.vectors * weights).sum(), z, retain_graph=True)
    torch.testing.assert_close(gradient, weights)
    mean_square = (z - codes).square().mean()
    torch.testing.assert_close(out.codebook_loss, mean_square)
    torch.testing.assert_close(out.commitment_loss, mean_square)
    assert torch.autograd.grad(out.codebook_loss, z, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(out.commitment_loss, quantizer.codebook, allow_unused=True) == (None,)


def test_unused_codes_are_restarted_at_encoder_vectors() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4, 2)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 0], [1, 1], [50, 50], [-50, 50]]))
    z = 0.1 * torch.randn(8, 2, 2)
    z[4:] += 1
    quantizer(z)
    assert quantizer.usage.tolist() == [8, 8, 0, 0]
    kept = quantizer.codebook[:2].clone()
    assert quantizer.restart_unused() == 2
    assert torch.equal(quantizer.codebook[:2], kept)
    for code in quantizer.codebook[2:]:
        assert (z.flatten(0, 1) - code).norm(dim=-1).min() < 1e-6
    assert quantizer.usage.sum() == 0
    assert quantizer.restart_unused() == 0, "nothing was counted since: nothing is known to be unused"
    quantizer.eval()(z)
    assert quantizer.usage.sum() == 0, "only training counts"


def test_unused_codes_are_restarted_at_other_codes_as_published() -> None:
    quantizer = VectorQuantizer(16, 2)
    before = quantizer.codebook.detach().clone()
    quantizer(before[None, :3])
    assert quantizer.restart_unused("codes") == 13
    after = quantizer.codebook.detach()
    assert torch.equal(after[:3], before[:3]) and not torch.equal(after, before)
    assert all((code == before).all(1).any() for code in after)


def test_perplexity() -> None:
    assert float(perplexity(torch.tensor([7, 0, 0, 0]))) == pytest.approx(1)
    assert float(perplexity(torch.tensor([3, 3, 3, 3]))) == pytest.approx(4)
    assert float(perplexity(torch.tensor([1, 1, 0, 0]))) == pytest.approx(2)


def test_codes_depend_on_the_global_batch_alone(tmp_path: Path) -> None:
    """Counts, kept vectors and restarts of one batch, micro-batches, and micro-batches of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(quantize_in_process, args=(port, str(tmp_path)), nprocs=2)
    processes = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    whole = quantize(1)
    assert whole["restarted"] > 6 and whole["restarts"] > 2
    assert whole["usage"].sum() == 10 * BATCH * QUERIES, "of the steps since the latest restart"
    for split in (quantize(2), quantize(4), *processes):
        for name, tensor in whole.items():
            assert torch.equal(split[name], tensor), name


def test_more_unused_codes_than_vectors() -> None:
    quantizer = VectorQuantizer(20, 2)
    z = torch.randn(1, 3, 2)
    quantizer(z)
    assert quantizer.restart_unused() >= 17
    distances = torch.cdist(quantizer.codebook.detach(), z[0]).amin(1)
    assert (distances == 0).sum() >= 17, "on vectors that were seen, not on the empty part of the store"


def test_attention_over_time_starts_as_a_difference() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(8, 2)
    start_as_difference(attention)
    still = torch.randn(3, 1, 8).expand(3, 2, 8)
    torch.testing.assert_close(attention(still, causal=True), -still, atol=1e-5, rtol=1e-4)


def test_decoder_starts_near_a_copy() -> None:
    torch.manual_seed(0)
    model = LatentActionModel(SIZES, decoder_blocks=1)
    use_codes_early(model)
    norm = nn.LayerNorm(16, elementwise_affine=False)
    now = norm(torch.randn(8, 9, 16))
    guess = model.decoder(now, torch.zeros(8, 3, 16))
    assert (guess - now).square().mean() < 0.5 * now.square().mean()


def test_gradients_reach_everything_trained_and_nothing_frozen() -> None:
    torch.manual_seed(0)
    config = small()
    model = GIDM(config)
    out = model(config.fake_batch(4))
    assert all(value.ndim == 0 and torch.isfinite(value) for value in out.values())
    out["loss"].backward()
    trained = dict(model.trainable())
    assert not [name for name in trained if name.startswith(("dino", "text"))]
    silent = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_overfits_one_batch_with_codes_that_matter() -> None:
    torch.manual_seed(0)
    config = small(restart_pairs=64, initial="early_codes")
    model, batch = GIDM(config), config.fake_batch(8)
    optimizer = torch.optim.AdamW([p for _, p in model.trainable()], 3e-3)
    first = model(batch)["mse"]
    for _ in range(150):
        out = model(batch)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        model.step_end()
    assert float(out["mse"]) < 0.4 * first
    assert float(out["perplexity"]) > 2
    core, patches = model.eval().core, model.patches(batch["frames"])
    states, mask = model.language(batch["text"])
    with torch.no_grad():
        actions = core.tokenizer(patches, states, mask)
        errors = [
            float((core.decoder(patches[:, 0], tokens, actions.text, mask) - patches[:, 1]).square().mean())
            for tokens in (actions.tokens, actions.tokens.roll(1, 0))
        ]
    assert errors[0] < 0.95 * errors[1], "another sample's latent action predicts worse"


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = small()
    model = GIDM(config)
    model.save_pretrained(tmp_path)
    again = GIDM.from_pretrained(tmp_path)
    batch = config.fake_batch(2)
    assert again.config == config
    torch.testing.assert_close(again.eval()(batch)["loss"], model.eval()(batch)["loss"], rtol=0, atol=0)
    tokenizer = LatentActionTokenizer(model.tokenizer.sizes)
    tokenizer.load_state_dict(model.tokenizer.state_dict())  # how stage 3 takes it over
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        GIDM.from_pretrained(tmp_path)


def test_controllable_variant_keeps_the_first_codebook() -> None:
    torch.manual_seed(0)
    first, config = GIDM(small()), small(variant="controllable", frozen_codes=8, codes=4)
    model = GIDM(config)
    model.adopt_first_stage(first)
    frozen = model.tokenizer.frozen_quantizer
    assert torch.equal(frozen.codebook, first.tokenizer.quantizer.codebook)
    assert torch.equal(model.tokenizer.encoder.queries[1], first.tokenizer.encoder.queries[0])
    optimizer = torch.optim.AdamW([p for _, p in model.trainable()], 1e-2, weight_decay=0.1)
    before = model.tokenizer.quantizer.codebook.detach().clone()
    out = model(config.fake_batch(4))
    out["loss"].backward()
    optimizer.step()
    model.epoch_end()
    assert torch.equal(frozen.codebook, first.tokenizer.quantizer.codebook)
    assert not torch.equal(model.tokenizer.quantizer.codebook, before)
    assert "core.tokenizer.frozen_quantizer.codebook" in model.own_state(), "it is saved"


def test_dino_is_frozen_and_gives_one_token_per_patch() -> None:
    dino = DinoPatches.from_config(DinoConfig(image_size=42, width=16, layers=1, heads=2))
    assert not GIDM(small()).train().dino.model.training
    assert not any(p.requires_grad for p in dino.parameters())
    tokens = dino(torch.rand(2, 3, 42, 42))
    assert tokens.shape == (2, 9, 16) and not tokens.requires_grad
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 9), atol=1e-5, rtol=0)  # after the LayerNorm
    same = DinoPatches.from_config(DinoConfig(image_size=42, width=16, layers=1, heads=2))
    torch.testing.assert_close(same(torch.ones(1, 3, 42, 42)), dino(torch.ones(1, 3, 42, 42)))
    with pytest.raises(UserError, match="image_size=50"):
        DinoPatches.from_config(DinoConfig(image_size=50, width=16, layers=1, heads=2))
    with pytest.raises(UserError, match="no_such_dino"):
        DinoPatches.from_config(DinoConfig("/no_such_dino", image_size=42))


@pytest.mark.parametrize(
    ("change", "message"), [({"variant": "wild"}, "gidm.variant=wild"), ({"heads": 3}, "gidm.width=32")]
)
def test_impossible_settings_are_named(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**change)
