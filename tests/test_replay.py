"""The open-loop check, as a command and over made-up data: what it asks, prints, writes and refuses."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from made_data import MadeData
from omegaconf import DictConfig, OmegaConf
from policy_fakes import write_demonstrations
from test_export import write_run
from test_html import parse

from defi.data import calvin
from defi.data.motions import Motions
from defi.engine.data import seed_of
from defi.errors import UserError
from defi.robot import replay as command
from defi.robot.spec import Robot, Vector
from Step3_DeFI.acting import Policy

LENGTHS = (70, 55, 80)


class Recorded(MadeData):
    """Pictures that show which step of which episode they are of; smooth actions, and a state."""

    def __init__(self, cameras: tuple[str, ...] = ("top", "wrist")) -> None:
        self.asked: list[int] = []
        super().__init__(LENGTHS, self._look, texts=lambda number: (f"do {number}",), cameras=cameras)
        self.action_names, self.state_names = ("x", "y"), ("u",)
        steps = np.arange(sum(LENGTHS))
        actions = np.stack([np.sin(steps / 7), np.cos(steps / 4)], 1).astype(np.float32)
        self.motions = Motions(steps, actions, (steps[:, None] / 100).astype(np.float32))

    def _look(self, number: int, positions: Any) -> np.ndarray:
        self.asked.append(len(positions))
        seen = np.zeros((len(positions), 4, 6, 3), np.uint8)
        seen[:, 1, 1] = 100
        seen[:, 0, 0, :2] = np.stack([np.full(len(positions), number), positions], 1)
        return seen

    def robot(self) -> Robot:
        return Robot(list(self.cameras), Vector.plain(self.action_names), Vector.plain(self.state_names), 10)


class Seeing:
    """Says what was recorded from the step on that the picture of `top` shows; `wrist` shows one more."""

    def __init__(self, data: Recorded, **robot: Any) -> None:
        spec = data.robot()
        spec.cameras, spec.executed = ["top", "wrist"], 5
        self.robot = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(spec), robot))
        self.model = SimpleNamespace(config=SimpleNamespace(chunk=8, state=True))
        self.data, self.seeds, self.batches = data, [], []

    def infer_batch(self, observations: list[dict], seeds: list[int]) -> np.ndarray:
        self.batches.append(len(observations))
        self.seeds += seeds
        return np.stack([self._answer(each) for each in observations])

    def _answer(self, seen: dict[str, Any]) -> np.ndarray:
        top, wrist = (seen["images"][name][0, 0].astype(int) for name in ("top", "wrist"))
        if (top > wrist).any():  # exchanged
            return np.random.default_rng(top[1]).normal(size=(8, 2))
        first = self.data.starts[top[0]] + top[1]
        assert seen["state"] == np.float32(first / 100) and seen["instruction"] == f"do {top[0]}"
        return np.concatenate([self.data.motions.actions, np.zeros((8, 2))])[first : first + 8]


def settings(**changes: Any) -> DictConfig:
    plain = {"seed": 3, "episodes": None, "every": None, "batch": 4, "swap_cameras": False, "checkpoint": "x"}
    return OmegaConf.create(plain | changes)


def test_each_look_is_asked_once_with_its_own_pictures_state_and_words() -> None:
    data = Recorded()
    policy = Seeing(data)
    found = command.replay(policy, data, settings())
    assert found.warnings == [] and found.loop.errors()["of_range"]["policy"] == 0
    assert found.facts["data"] == data.scope
    places = [(n, at) for n, length in enumerate(LENGTHS) for at in range(0, length, 5)]
    assert policy.seeds == [seed_of("replay", 3, *place) for place in places]
    assert len(set(policy.seeds)) == len(places) and max(policy.batches) == 4 == max(data.asked)
    some = command.replay(Seeing(data), data, settings(episodes=2, every=8))
    few = "too few looks to tell: x, y, time"  # these are slow
    assert found.judged == f"{few} (41 looks; try more episodes or every=2)"
    assert some.judged == f"{few} (19 looks; try episodes=null or every=2)"
    assert some.numbers == [0, 2] and [len(each.positions) for each in some.loop.episodes] == [9, 10]


def test_a_gripper_that_never_switches_is_no_evidence() -> None:
    switches = {"predicted": 2, "recorded": 0, "found": 0}
    found = {"agreement": 1.0, "opposite": 0.0, "switches": switches, "late": None, "off": None}
    share = dict.fromkeys(("policy", "mean_action", "last_action"), 0.1)
    said = command.summary({"of_range": share, "gripper": found})
    assert said["gripper"] == "never switched; 2 switches predicted" and "100%" not in said.values()


def test_cameras_that_were_swapped_are_named_where_it_is_asked() -> None:
    data = Recorded()
    assert command.replay(Seeing(data), data, settings(swap_cameras=True)).warnings == []
    swapped = Recorded(cameras=("wrist", "top"))
    assert not any(
        "exchanged" in line for line in command.replay(Seeing(swapped), swapped, settings()).warnings
    )
    found = command.replay(Seeing(swapped), swapped, settings(swap_cameras=True))
    said = "cameras: with top and wrist exchanged, 0% of the squared error is left: are their names"
    assert said in found.warnings[-1] and found.exchanged == {"top and wrist": 0}


def test_what_differs_is_said_and_what_cannot_go_on_is_refused() -> None:
    data = Recorded()
    range_ = {"low": [0.0], "high": [1.0]}
    policy = Seeing(data, fps=20, state=range_, actions={"units": ["m", "m"]})
    found = command.replay(policy, data, settings()).warnings
    assert found == [
        "the policy's robot is not the data's: 20 steps per second, not 10",
        "state u: 0 … 2.04, in training 0 … 1 (46% lie outside)",
    ]
    for change, said in (
        (
            {"cameras": ["static", "gripper"]},
            "has top, wrist, the policy sees static, gripper; say which is which, "
            "'data.cameras=[static:top,gripper:wrist]' for example",
        ),
        (
            {"cameras": ["top", "left", "right"]},
            "'data.cameras=[top,left:wrist,right:its place in the data]'",
        ),
        (
            {"action_names": ("x",)},
            "has 1 numbers of actions, the policy's are 2: x, y; name them, data.actions=…",
        ),
        ({"state_names": ()}, "has 0 numbers of state, the policy's are 1: u; name them, data.state=…"),
    ):
        data, policy = Recorded(), Seeing(Recorded())
        for name, value in change.items():
            setattr(policy.robot if name == "cameras" else data, name, value)
        with pytest.raises(UserError) as error:
            command.replay(policy, data, settings())
        assert said in str(error.value)
    with pytest.raises(UserError, match="every=9: must lie in 1 … 8, the actions of a chunk"):
        command.replay(Seeing(Recorded()), Recorded(), settings(every=9))
    policy = Seeing(Recorded())
    policy.infer_batch = lambda seen, seeds: np.full((len(seen), 8, 2), np.nan)
    with pytest.raises(UserError, match="x: answers with NaN or infinite actions; try another checkpoint"):
        command.replay(policy, Recorded(), settings())


def test_pictures_and_words_that_are_missing_are_counted() -> None:
    data = Recorded()
    look, data._frames = (
        data._frames,
        lambda number, at: look(number, at)[:, : 4 - number] * (np.array(at) > 0)[:, None, None, None],
    )
    data._texts = lambda number: ("",)
    policy = Seeing(data)
    policy.infer_batch = lambda seen, seeds: np.zeros((len(seen), 8, 2))
    found = command.replay(policy, data, settings()).warnings
    for line in (
        "41 of 41 looks have no instruction",
        "3 of 41 looks have one colour in the picture of top",
        "camera wrist: pictures of several sizes, 2 x 6, 3 x 6, 4 x 6",
    ):
        assert line in found


# ------------------------------------------------------------ the command


def run(*given: object) -> None:
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["replay", *map(str, given)])
        command.main()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    write_demonstrations(folder / "data")
    (folder / "data/training").rename(folder / "data/validation")
    write_run(folder / "runs", {"preset_name": "test", "trainer": {"precision": "no"}})
    return folder


def test_the_command_writes_figures_and_a_page(place: Path, capsys: pytest.CaptureFixture) -> None:
    """The figures are those of the policy's own answers."""
    output, given = (
        place / "out",
        [f"checkpoint={place / 'runs/run'}", "data=calvin", f"data.root={place / 'data'}"],
    )
    run(*given, f"output={output}", "batch=1", "seed=5", "swap_cameras=true")
    said, page = capsys.readouterr().out, parse(output / "index.html")
    record = json.loads((output / "results.json").read_text())
    policy, apart = Policy.load(place / "runs/run"), []
    data = calvin.Settings(root=str(place / "data")).open("held_out")
    for number in range(2):
        episode = data.episode(number)
        recorded = data.motions.actions[data.motions.rows(episode.start + np.arange(episode.length))]
        for at in range(0, episode.length, 10):
            images = {name: frames[0] for name, frames in data.read(episode, [at], data.cameras).items()}
            seen = {"images": images, "instruction": episode.text(at)}
            rest = recorded[at : at + 10]
            apart.append(policy.infer(seen, seed_of("replay", 5, number, at))[: len(rest)] - rest)
    rmse = np.sqrt(np.square(np.concatenate(apart)).mean(0))
    np.testing.assert_allclose([each["rmse"] for each in record["dimensions"]], rmse, rtol=1e-4)
    assert record["dimensions"][6]["rmse_of_range"] is None, "it never changes"
    assert f"{rmse[0]:.3g}" in said and f"{rmse[0]:.3g}" in page.text
    assert record["facts"]["policy's step"] == 7 and record["settings"]["seed"] == 5
    assert record["warnings"] and all(line in said and line in page.text for line in record["warnings"])
    assert "no warnings" not in said and "too few looks to tell: " in said and "size: how many" in said
    share = record["exchanged"]["static and gripper"]
    for where in (said, page.text):
        assert f"static and gripper exchanged: {share:.0%} of the squared error" in where
    assert "do thing 0" in page.text and len(page.sources) == 2 + 2 * 2
    with pytest.raises(SystemExit):
        run(*given, f"output={output}")
    assert "overwrite=true replaces it, or choose another output=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("part=some",), "part=some: choose training, held_out or all"),
        (("batch=0",), "batch=0: must be 1 or more"),
        (("data=",), "data=: not given; choose from bridge, calvin, "),
        (("data=mixture",), "data: several data sets; replay one of them"),
        (("checkpoint=none",), "none"),
    ],
)
def test_settings_that_cannot_be(
    given: tuple[str, ...], said: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = () if given == ("data=",) else given
    data = () if not given or given[0].startswith("data=") else ("data=calvin", f"data.root={place / 'data'}")
    with pytest.raises(SystemExit):
        run(f"checkpoint={place / 'runs/run'}", f"output={tmp_path / 'out'}", *data, *given)
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {said}") and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_names_the_settings_before_data_are_chosen(capsys: pytest.CaptureFixture) -> None:
    run("--help")
    said = capsys.readouterr().out
    assert "part: held_out # training | held_out | all" in said and "checkpoint: ???" in said
