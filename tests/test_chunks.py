"""Chunks that go on from what is under way: exact where it counts, and nothing changes for the others."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from test_acting import other_policy, seen

from defi.errors import UserError
from defi.robot.chunk import UnderWay
from Step3_DeFI.acting import Policy
from Step3_DeFI.diffusion import SAMPLERS, soft_weights

GUIDED = {"text_dropout": 0.5, "guidance": 2.0}


@pytest.fixture(scope="module")
def acting() -> Policy:
    return Policy(other_policy())


def under_way(n: int = 7, delay: int = 4, seed: int = 0) -> UnderWay:
    """In the units of `other_robot`, the gripper at one of its values."""
    rng = np.random.default_rng(seed)
    actions = rng.normal((5, -2, 0), (0.05, 15, 0), (n, 3))
    actions[:, 2] = rng.integers(0, 2, n)
    return UnderWay(actions, delay)


@pytest.mark.parametrize("guidance", [{}, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_answer_begins_with_what_is_under_way(sampler: str, guidance: dict[str, Any]) -> None:
    acting = Policy(other_policy(diffusion={"sampler": sampler, "steps": 4, **guidance}))
    ahead, free = under_way(), acting.infer(seen(1), 5)
    actions = acting.infer(seen(1), 5, ahead)
    np.testing.assert_array_equal(actions[:4], ahead.actions[:4])
    np.testing.assert_array_equal(actions, acting.infer(seen(1), 5, ahead))
    assert set(np.unique(actions[:, 2])) <= {0.0, 1.0} and np.isfinite(actions).all()
    inside = acting.robot.actions.normalise
    distance, before = (
        np.abs(inside(each) - inside(ahead.actions[4]))[:2].mean() for each in (actions[4], free[4])
    )
    assert 0 < distance < before / 2, "the first one that may change leans towards the plan"
    assert not np.allclose(actions[7:, :2], free[7:, :2]), "and what comes after goes on from there"
    np.testing.assert_array_equal(acting.infer(seen(1), 5, under_way(0, 0)), free)


@pytest.mark.parametrize("guidance", [{}, GUIDED], ids=["plain", "guided"])
def test_rows_with_nothing_under_way_stay_as_they_are(guidance: dict[str, Any]) -> None:
    acting = Policy(other_policy(diffusion=guidance))
    observations, seeds = [seen(n) for n in range(4)], [5, 6, 7, 8]
    free = acting.infer_batch(observations, seeds)
    mixed = acting.infer_batch(observations, seeds, [None, under_way(), None, under_way(3, 3, 1)])
    np.testing.assert_array_equal(mixed[[0, 2]], free[[0, 2]])
    np.testing.assert_array_equal(acting.infer_batch(observations, seeds, [None] * 4), free)
    everyone = acting.infer_batch(observations, seeds, [under_way(seed=n) for n in (8, 0, 9, 10)])
    np.testing.assert_array_equal(everyone[1], mixed[1])
    np.testing.assert_allclose(mixed[3], acting.infer(seen(3), 8, under_way(3, 3, 1)), rtol=1e-3, atol=1e-3)
    for given, message in (([[5], None], "seeds: 1"), ([seeds, [under_way()]], "under_way: 1")):
        with pytest.raises(UserError, match=f"^{message} for 4 observations; give one for each$"):
            acting.infer_batch(observations, *given)


def test_weights_are_those_of_the_paper() -> None:
    """Equation 5 of arXiv 2506.07339, H − s = n."""
    n, d = 8, 3
    wanted = [1.0] * d
    for i in range(d, n):
        c = (n - i) / (n - d + 1)
        wanted.append(c * (np.exp(c) - 1) / (np.e - 1))
    wanted += [0.0] * 2
    np.testing.assert_allclose(soft_weights(10, under_way=n, delay=d, fade=0), wanted, atol=1e-6)
    torch.testing.assert_close(
        soft_weights(10, under_way=5, delay=5, fade=3), soft_weights(10, under_way=8, delay=5, fade=0)
    )
    assert soft_weights(10, under_way=5, delay=5, fade=0).tolist() == [1] * 5 + [0] * 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((np.zeros((3, 2)), 1), "under_way: is [3, 2]; this policy takes at most 10 actions of 3 numbers"),
        ((np.zeros((11, 3)), 1), "under_way: is [11, 3]; this policy takes at most 10"),
        ((np.zeros(3), 0), "under_way: is float64 [3]; give finite numbers [n, A]"),
        (([[0.0] * 3, [0.0]], 0), "under_way: is float64 [0]; give finite numbers [n, A]"),
        ((np.full((3, 3), np.nan), 0), "under_way: holds NaN or infinite numbers"),
        ((np.full((3, 3), 1e300), 0), "under_way: holds NaN or infinite numbers"),
        ((np.array([["a"] * 3]), 0), "under_way: is <U1 [1, 3]"),
        ((np.zeros((3, 3)), 4), "delay=4: 3 actions are under way; give 0 … that many"),
        ((np.zeros((3, 3)), -1), "delay=-1: 3 actions"),
        ((np.zeros((3, 3)), 1.5), "delay=1.5: 3 actions"),
        ((np.zeros((3, 3)), None), "delay=None: 3 actions"),
    ],
)
def test_what_is_no_chunk_under_way_is_one_line(acting: Policy, given: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}[^\n]*$"):
        acting.infer(seen(), 0, UnderWay(*given))
