"""Environments of gymnasium as a benchmark: a made-up one, and gym-pusht where it is installed."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from defi.benchmarks.gym import Gym
from defi.errors import UserError
from Step3_DeFI.rollout.config import RolloutConfig
from Step3_DeFI.rollout.evaluate import Evaluation, run_episodes
from Step3_DeFI.rollout.simulator import EpisodeResult, run_episode


class Slide:
    """A number that must come to 1; two cameras, two actions of which the second does nothing."""

    action_space = SimpleNamespace(
        shape=(2,), dtype=np.dtype(np.float32), low=np.full(2, -0.5, np.float32), high=np.ones(2, np.float32)
    )

    def __init__(self, max_episode_steps: int | None = None, render_mode: str = "none", speed: float = 1):
        self.limit, self.mode, self.speed, self.closed = max_episode_steps or 5, render_mode, speed, False

    def reset(self, seed: int) -> tuple[dict, dict]:
        self.place, self.steps = np.random.default_rng(seed).uniform(-1, 0), 0
        return self.seen(), {}

    def seen(self) -> dict[str, Any]:
        shade = np.full((4, 6, 3), int(20 * (2 + self.place)), np.uint8)
        return {"pixels": {"top": shade, "side": shade + 1}, "place": [self.place]}

    def step(self, action: np.ndarray) -> tuple:
        assert action.dtype == np.float32 and (action <= 1).all() and (action >= -0.5).all()
        self.place += self.speed * float(action[0])
        self.steps += 1
        done = self.place >= 1
        return self.seen(), self.place, False, self.steps == self.limit, {"is_success": done}

    def render(self) -> np.ndarray:
        assert self.mode == "rgb_array"
        return np.zeros((8, 8, 3), np.uint8)

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def gymnasium(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, with nothing in it but `Slide`."""

    class Error(Exception):
        pass

    def make(name: str, **options: Any) -> Slide:
        if name != "slide/Slide-v0":
            raise Error(f"no\nenvironment {name}")
        return Slide(**options)

    if "pusht" not in request.node.name:
        monkeypatch.setitem(
            sys.modules, "gymnasium", SimpleNamespace(make=make, error=SimpleNamespace(Error=Error))
        )


def run(benchmark: Gym, action: tuple[float, float]) -> list[EpisodeResult]:
    evaluation, results = Evaluation.prepare(benchmark, RolloutConfig()), []
    environment = evaluation.simulation.make()
    for episode in evaluation.episodes:
        results += run_episode(
            environment, lambda *_: np.array([action]), episode, evaluation.setup("policy")
        )
    return results


def test_spaces_make_the_robot_and_episodes_their_outcomes() -> None:
    benchmark = Gym("slide/Slide-v0", trials=6, state="place", fps=5, max_steps=4)
    robot = benchmark.robot
    assert (robot.cameras, len(robot.actions), len(robot.state)) == (["pixels_top", "pixels_side"], 2, 1)
    assert (robot.actions.low, robot.actions.high, robot.fps) == ([-0.5, -0.5], [1.0, 1.0], 5)
    results = run(benchmark, (9.0, 0.0))  # more than the space allows
    assert [result.control_steps for result in results] == [4] * 6
    outcomes = [result.outcome for result in results]
    assert all(
        outcome["success"] and outcome["ever"] and outcome["task"] == "Slide-v0" for outcome in outcomes
    )
    assert len({outcome["best_reward"] for outcome in outcomes}) == 6  # each from another start
    assert outcomes == [result.outcome for result in run(benchmark, (9.0, 0.0))]
    about = benchmark.about(benchmark.protocol(benchmark.episodes(0), 0), 0)
    assert about.title == "6 episodes of slide/Slide-v0, seed 0"
    scores = {score: benchmark.summarise(outcomes, score)["average"] for score in benchmark.scores}
    assert scores["success"] == scores["ever"] == 1 and scores["best reward"] > 3


def test_success_is_that_of_the_last_step() -> None:
    there_and_back = np.array([[1.0, 0], [1.0, 0], [-0.5, 0], [-0.5, 0], [-0.5, 0]])
    evaluation = Evaluation.prepare(Gym("slide/Slide-v0", trials=1), RolloutConfig())
    (result,) = run_episode(
        evaluation.simulation.make(),
        lambda *_: there_and_back,
        evaluation.episodes[0],
        evaluation.setup("policy"),
    )
    assert (result.outcome["ever"], result.outcome["success"]) == (True, False)


def test_pictures_and_options_are_chosen() -> None:
    benchmark = Gym(
        "slide/Slide-v0", trials=1, cameras={"a": "render", "b": "pixels.side"}, options={"speed": 2}
    )
    environment = benchmark.environment()
    environment.reset(benchmark.episodes(0)[0])
    seen = environment.observe()
    assert {camera: picture.shape for camera, picture in seen["images"].items()} == {
        "a": (8, 8, 3),
        "b": (4, 6, 3),
    }
    assert "state" not in seen and environment.env.speed == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env": None}, "env=: not given"),
        ({"env": "other"}, "env=other: no environment other"),
        ({"options": {"colour": 1}}, "env=slide/Slide-v0: .*unexpected keyword argument 'colour'"),
        (
            {"cameras": {"a": "pixels"}},
            "cameras: no pixels in the observation; choose from render",
        ),
        ({"cameras": {"a": "place"}}, "no pictures in its observation"),
        ({"state": "pose"}, "state=pose: not in the observation; choose from pixels.top, pixels.side, place"),
        ({"trials": 0}, "trials=0: must be 1 or more"),
        ({"success": "done"}, "success=done: not in the environment's info; choose from is_success"),
    ],
)
def test_what_does_not_fit_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        benchmark = Gym(**{"env": "slide/Slide-v0", "trials": 1} | settings)
        assert benchmark.robot
        run(benchmark, (0.0, 0.0))
    assert "\n" not in str(caught.value)


def test_pusht_in_two_processes() -> None:
    pytest.importorskip("gym_pusht", reason="needs gym-pusht, which is no requirement: pip install gym-pusht")
    options = {"obs_type": "pixels_agent_pos"}
    benchmark = Gym("gym_pusht/PushT-v0", trials=4, max_steps=20, options=options, state="agent_pos")
    assert (benchmark.robot.cameras, len(benchmark.robot.state)) == (["pixels"], 2)
    runs = [
        run_episodes(Evaluation.prepare(benchmark, RolloutConfig(processes=n)), "random", show=False)
        for n in (1, 2)
    ]
    one, two = ([(each.outcome, each.control_steps) for each in run] for run in runs)
    assert one == two and len(one) == 4
