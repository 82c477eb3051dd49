"""The benchmark of stalls: its account of idle steps and seams, where the right numbers are known."""

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import stalls
from benchmarks.stalls import Batch, Episode, Way, attempt, draw, summary, table
from defi.benchmarks.calvin.environment import Chain, ChainEnvironment
from defi.data.calvin import calvin_robot

RISE, JUMP = 0.01, 0.2  # of every number of an action: within a chunk, and from one chunk to the next
CHAIN = Chain(3, ("open_drawer",), ("open the drawer",), np.zeros(15), np.zeros(24))


class Ramps:
    """Chunk n rises from n·(JUMP + 9·RISE); what goes on from others goes on without a jump."""

    robot = calvin_robot()

    def __init__(self) -> None:
        self.answers, self.sizes = 0, []

    def infer_batch(self, observations: Any, seeds: Any, under_way: Any) -> np.ndarray:
        self.sizes.append(len(seeds))
        return np.stack([self.answer(each) for each in under_way])

    def answer(self, under_way: Any) -> np.ndarray:
        begin = self.answers * (JUMP + 9 * RISE)
        if under_way is not None:
            begin = under_way.actions[0, 0]
        self.answers += 1
        return np.repeat(begin + RISE * np.arange(10)[:, None], 7, axis=1)


class World(SimpleNamespace):
    """Nothing happens in it; solved after so many steps."""

    def __getattr__(self, name: str) -> Any:
        return lambda *given: {} if name == "render" else None

    def step(self, action: np.ndarray) -> None:
        self.steps += 1

    def state(self) -> int:
        return self.steps


def environment(limit: int, solved_after: int = 1000) -> ChainEnvironment:
    return ChainEnvironment(
        lambda: World(steps=0), limit, judge=lambda task, start, now: now - start >= solved_after
    )


def run(way: Way, limit: int = 120, solved_after: int = 1000) -> tuple[Episode, Ramps]:
    policy = Ramps()
    episode = attempt(environment(limit, solved_after), Batch(policy), CHAIN, way, seed=0)
    while True:
        try:
            next(episode)
        except StopIteration as over:
            return over.value, policy


def rms(squares: float, numbers: int) -> float:
    return math.sqrt(squares / max(1, numbers))


def test_seams_and_stalls_are_told_from_the_inside_of_chunks() -> None:
    found, policy = run(Way("sync", 10))
    assert (found.steps, found.idle, found.looks, found.solved) == (120, 0, 12, False)
    assert rms(*found.inside) == pytest.approx(RISE, rel=1e-3) and found.inside[1] == 12 * 9 * 6
    assert rms(*found.seam) == pytest.approx(JUMP, rel=1e-3) and found.seam[1] == 11 * 6
    found, _ = run(Way("sync", 10, 500 / 3))
    assert (found.idle, found.looks) == (40, 8)
    assert found.seam[1] == (8 + 7) * 6, "it stops, and sets out again"
    found, _ = run(Way("async", 5, 500 / 3))
    assert found.idle == 0 and rms(*found.seam) == pytest.approx(JUMP + 9 * RISE - 4 * RISE, rel=1e-3)
    found, _ = run(Way("rtc", 5, 500 / 3))
    assert found.idle == 0 and found.seam[1] == 22 * 6
    assert rms(*found.seam) == pytest.approx(RISE, rel=1e-3) == pytest.approx(rms(*found.inside), rel=1e-3)
    assert run(Way("rtc", 5, 233))[0].idle == 2 * 16
    found, _ = run(Way("sync", 10), solved_after=34)
    assert (found.solved, found.steps, found.looks) == (True, 34, 4)


def test_several_arms_are_answered_together(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Ramps()
    monkeypatch.setattr(stalls, "load", lambda checkpoint, fade: policy)
    chains = [replace(CHAIN, index=index) for index in range(11)]
    monkeypatch.setattr(stalls, "episodes", lambda given: (chains, lambda: environment(30)))
    given = SimpleNamespace(checkpoint="", episodes=11, few=2, limit=30, seed=0)
    found = stalls.measure(given, Way("async", 5, stalls.HALF))
    assert len(found) == 11 and {each.steps for each in found} == {30}
    assert policy.sizes.count(8) == 4 and policy.sizes.count(3) == 4, "but the first, for which an arm waits"
    assert len(stalls.measure(given, Way("async", 5, 400))) == 2


def test_the_figures_of_a_way_are_written_and_drawn(tmp_path: Any) -> None:
    def some(solved: int) -> Iterator[Episode]:
        for i in range(10):
            yield Episode(i < solved, 100, 5, 10, (9.0 * 60, 60), (1.0 * 600, 600))

    base, way = list(some(8)), Way("rtc", 5, stalls.HALF, 20)
    rows = [summary(Way("sync", 10), base, {}), summary(way, list(some(5)), {"sync": base})]
    assert rows[1]["success"] == 0.5 and rows[1]["against"]["sync"]["difference"] == pytest.approx(-0.3)
    assert rows[1]["idle"] == 0.05 and rows[1]["roughness"] == 3
    assert table(rows).row_count == 2
    draw(rows).savefig(tmp_path / "stalls.png")
