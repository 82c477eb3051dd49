"""SIMPLER as a benchmark: episodes, averages, published figures, what is refused. Without SAPIEN."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from defi import doctor
from defi.benchmarks.benchmark import Benchmark
from defi.benchmarks.find import find_benchmark
from defi.benchmarks.simpler import check
from defi.benchmarks.simpler.benchmark import EVER, LAST, Google, Trial, WidowX
from defi.benchmarks.statistics import nested_weights, paired_difference, rate, weighted_rate
from defi.config import CONFIG_DIR
from defi.errors import UserError


def outcomes(benchmark: Benchmark, solved: set[tuple[str, str]]) -> list[dict]:
    """Of all episodes: those of these tasks and settings are solved, and all others on the way only."""
    return [
        {
            "task": trial.start.task.name,
            "setting": trial.start.setting,
            "success": (trial.start.task.name, trial.start.setting) in solved,
            "start": trial.start.index,
            "first_success": 7 if trial.start.index % 2 else None,
        }
        for trial in benchmark.episodes(0)
    ]


def test_episodes_are_the_official_ones_and_repeats_come_last() -> None:
    widowx, google = WidowX().episodes(0), Google().episodes(1)
    assert (len(widowx), len(google)) == (4 * 24 * 3, 300 + 240 + 216)
    assert [each.index for each in widowx] == list(range(288))
    assert [each.repeat for each in widowx] == sorted(each.repeat for each in widowx)
    assert [each.start for each in widowx[:96]] == [each.start for each in widowx[96:192]]
    assert len({(each.start.task.name, each.start.index) for each in widowx}) == 96
    few = Google(tasks=["google_robot_pick_coke_can"], starts=12).episodes(0)
    assert len({each.start.setting for each in few}) == 12  # evenly spread
    by_world: dict[str, list[Trial]] = {}
    for each in google:
        by_world.setdefault(each.world, []).append(each)
    assert len(by_world) == 4 * 8 and {len(each) for each in by_world.values()} == {75, 60, 9}


def test_an_average_is_a_mean_of_means() -> None:
    groups = [("a", 1), ("a", 1), ("a", 1), ("a", 2), ("b", 1)]
    assert np.allclose(nested_weights(groups), [1 / 12] * 3 + [1 / 4, 1 / 2])
    for hits in ([True] * 3 + [False] * 21, [False] * 24, [True] * 24):
        found, wilson = weighted_rate(hits, np.full(24, 1 / 24)), rate(hits)
        assert np.allclose([found["rate"], *found["interval"]], [wilson["rate"], *wilson["interval"]])
    assert weighted_rate([1, 0, 0, 0, 0], nested_weights(groups))["interval"][1] > 0.6  # of few that count


def test_repeats_that_end_alike_say_nothing_new() -> None:
    once, thrice = WidowX(repeats=1), WidowX(repeats=3)
    solved = {("widowx_stack_cube", "")}
    one, three = (each.summarise(outcomes(each, solved), LAST) for each in (once, thrice))
    other = [each.summarise(outcomes(each, set()), LAST) for each in (once, thrice)]
    assert np.allclose([0.25, *one["interval"]], [three["average"], *three["interval"]])
    first, again = (paired_difference(b["values"], a["values"]) for a, b in zip((one, three), other))
    assert first["difference"] == pytest.approx(again["difference"]) and first["p"] == again["p"]


def test_scores_of_one_run() -> None:
    google = Google()
    solved = {("google_robot_pick_coke_can", "upright"), ("google_robot_move_near_v0", "")}
    solved |= {("google_robot_open_top_drawer", ""), ("google_robot_close_top_drawer", "")}
    solved |= {("google_robot_close_middle_drawer", "")}
    ran = outcomes(google, solved)
    assert google.scores == (EVER, LAST)
    last, ever = google.summarise(ran, LAST), google.summarise(ran, EVER)
    columns = google.about(google.protocol(ran, 0), 0).columns
    assert list(columns) == ["coke can", "move near", "drawers"]
    of_settings = [1 / 12, 1 / 4, (1 / 12 + 2 / 12) / 2]
    assert np.allclose([each["rate"] for each in last["success"]], of_settings)
    assert last["average"] == pytest.approx(np.mean(of_settings))
    assert last["average"] != pytest.approx(np.mean([each["success"] for each in ran]))
    assert np.mean(last["values"]) == pytest.approx(last["average"])
    assert last["interval"][0] < last["average"] < last["interval"][1]
    assert last["tasks"]["google_robot_pick_coke_can, upright"] == {"solved": 25, "tried": 100}
    assert last["tasks"]["google_robot_close_middle_drawer"] == {"solved": 9, "tried": 36}
    assert 0.4 < ever["average"] < 0.5
    (first, *_) = ran
    assert sum(google.reached(first, LAST)) == 0 and len(google.reached(first, LAST)) == 3


def test_published_figures_stand_beside_what_was_measured_alike() -> None:
    def beside(benchmark: Benchmark) -> dict[str, float]:
        about = benchmark.about(benchmark.protocol(benchmark.episodes(0), 0), 0)
        assert bool(about.incomparable) != bool(about.published)
        assert all(each.score in about.percent for each in about.published)
        return {each.method: round(100 * each.figure, 1) for each in about.published}

    assert beside(WidowX()) == {"Octo-base": 16.0, "starVLA-GR00T": 63.3}
    assert beside(WidowX(tasks=["widowx_stack_cube"])) == {"Octo-base": 0.0, "starVLA-GR00T": 18.8}
    assert beside(Google()) == {"RT-1": 67.7, "RT-1-X": 49.3, "Octo-base": 14.6}
    assert beside(Google(tasks=["google_robot_pick_coke_can"]))["DeFI"] == 54.2
    other = (
        Google(tasks=["google_robot_open_top_drawer"]),
        Google(tasks=["google_robot_move_near_v1"]),
        Google(variants=True),
        WidowX(max_steps=30),
        WidowX(starts=4),
    )
    assert [beside(each) for each in other] == [{}] * 5
    assert "RT-1 coke can 85.7" in Google().about(Google().protocol([], 0), 0).tasks_note


@pytest.mark.parametrize("name", ["simpler_widowx", "simpler_google"])
def test_the_files_have_the_classes_own_settings(name: str) -> None:
    written = yaml.safe_load((CONFIG_DIR / "benchmark" / f"{name}.yaml").read_text())
    assert written.pop("benchmark") == name
    benchmark = find_benchmark(name)
    assert vars(benchmark()) == written
    robot = benchmark().robot
    assert (len(robot.actions), robot.fps) == ((7, 5) if name == "simpler_widowx" else (7, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["widowx_stack"]}, "tasks=widowx_stack: must be one of widowx_carrot_on_plate, "),
        ({"tasks": ["google_robot_pick_coke_can"]}, "must be one of widowx_carrot_on_plate"),
        ({"tasks": ["widowx_stack_cube"] * 2}, "none of them twice"),
        ({"tasks": []}, "name one or more"),
        ({"repeats": 0}, "repeats=0: must be 1 or more"),
        ({"shader": "ibl"}, "shader=ibl: must be one of raster, rt"),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        (Google if "shader" in settings else WidowX)(**settings)


def test_what_is_missing_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"simpler_root=: not given; git clone"):
        WidowX().prepare(0)
    with monkeypatch.context() as patch:
        patch.setattr(check, "find_spec", lambda name: None if name == "sapien" else importlib.util)
        with pytest.raises(UserError, match=r'needs sapien, .*; pip install -e "\.\[simpler\]"'):
            WidowX(simpler_root=str(tmp_path)).prepare(0)
    monkeypatch.setattr(check, "find_spec", lambda name: importlib.util)
    with pytest.raises(UserError, match="holds no ManiSkill2_real2sim/data; git clone"):
        WidowX(simpler_root=str(tmp_path)).prepare(0)
    (tmp_path / "ManiSkill2_real2sim/data").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no ManiSkill2.* and \d+ more; git -C .* submodule update"):
        WidowX(simpler_root=str(tmp_path)).prepare(0)
    (finding,) = doctor.examine("SIMPLER", doctor.check_simpler, str(tmp_path))
    assert finding.wrong and finding.fix.startswith("git -C")

    monkeypatch.setattr(check, "check_assets", lambda *_: None)
    monkeypatch.setattr(check, "DRAW", "print('a GPU')")
    simulation = WidowX(simpler_root=str(tmp_path)).prepare(0)
    assert (simulation.renderer, simulation.kind) == ("SAPIEN 3, a GPU, raster", "raster")
    assert simulation.caveat is None
    assert "ray-traced" in str(Google(simpler_root=str(tmp_path)).prepare(0).caveat)

    monkeypatch.setattr(check, "TRACE", "")
    traced = Google(simpler_root=str(tmp_path), shader="rt")
    with pytest.raises(UserError, match="shader=rt: a GPU draws here"):
        traced.prepare(0)
    cans = Google(simpler_root=str(tmp_path), shader="rt", tasks=["google_robot_pick_coke_can"]).prepare(0)
    assert cans.kind == "raster"
    monkeypatch.setattr(check, "DRAW", "print('GPU: NVIDIA H200')")
    simulation = traced.prepare(0)
    assert simulation.renderer == "SAPIEN 3, NVIDIA H200, raster, drawers ray-traced"
    assert simulation.caveat is None and traced.protocol([], 0)["pictures"] == simulation.kind
    monkeypatch.setattr(check, "DRAW", "import os; os.abort()")
    with pytest.raises(UserError, match="SIGABRT.*vulkan_cpu"):
        WidowX(simpler_root=str(tmp_path)).prepare(0)
    with pytest.raises(UserError, match=r"cannot ray-trace here .*SIGABRT"):
        traced.prepare(0)
