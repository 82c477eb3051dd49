"""Benchmarks of the models, at small sizes: what they compare is the same thing, counted right."""

import sys
from pathlib import Path

import torch
from policy_fakes import build_policy

from benchmarks.action_sampling import PUBLISHED, fake_context, samplers
from benchmarks.action_sampling import measure as measure_time
from benchmarks.sampler_steps import draw, measure
from benchmarks.training_step import importable, size_of


def test_steps_against_a_reference() -> None:
    policy = build_policy().eval()
    rows = measure(policy, policy.config.fake_batch(2), steps=[2, 20], last_sigma=0.5)
    found = {(row.sampler, row.steps): row for row in rows}
    assert {key: row.calls for key, row in found.items()} == {
        ("ddim", 2): 2,
        ("ddim", 20): 20,
        ("dpmpp_2m", 2): 2,
        ("dpmpp_2m", 20): 20,
        ("heun", 2): 3,
        ("heun", 20): 39,
    }
    for sampler in ("ddim", "dpmpp_2m", "heun"):
        assert found[sampler, 20].to_reference < found[sampler, 2].to_reference / 3
    assert found["dpmpp_2m", 20].to_reference < found["ddim", 20].to_reference
    assert policy.config.diffusion.sampler == "ddim" and policy.config.diffusion.steps == 10
    assert draw(rows, "title").row_count == 6


@torch.no_grad()
def test_ways_to_sample_a_chunk() -> None:
    ways = samplers(build_policy().config, "cpu")
    torch.testing.assert_close(ways["once"](), ways["each step"]())
    assert ways["guided"]().shape == (1, 10, 7)
    times = measure_time(ways, repeats=2)
    assert times.keys() == ways.keys() and min(times.values()) > 0


def test_the_published_context_has_229_tokens() -> None:
    shapes = {name: tuple(x.shape) for name, x in fake_context(PUBLISHED, 2, "cpu").items()}
    assert shapes == {"sentence": (2, 512), "video_tokens": (2, 224, 384), "latent_actions": (2, 4, 768)}


def test_training_step_leaves_nothing_of_the_published_code_importable(tmp_path: Path) -> None:
    for side in ("one", "other"):
        for file in ("too_general/models.py", "too_general/inner/__init__.py"):
            (tmp_path / side / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / side / file).write_text(f"side = {side!r}\n")
    before, path = set(sys.modules), list(sys.path)
    for side in ("one", "other"):
        with importable(tmp_path / side):
            import too_general.inner
            import too_general.models

            assert too_general.models.side == too_general.inner.side == side
        assert set(sys.modules) == before and sys.path == path


def test_a_look_needs_no_moments() -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(3, 4), torch.nn.Linear(4, 5).requires_grad_(False)])
    weights = 4 * (3 * 4 + 4 + 4 * 5 + 5)
    assert size_of(model, learning=False) == weights
    assert size_of(model, model[1]) == weights + 2 * 4 * (3 * 4 + 4)
