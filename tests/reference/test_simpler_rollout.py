"""SIMPLER from the command to the result, with SAPIEN, on the assets of its repository."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from policy_fakes import policy_config, write_stages
from simpler_recordings import simpler_root

pytest.importorskip("sapien", reason="SAPIEN 3 is not installed: pip install .[simpler]")
from defi.benchmarks.simpler.benchmark import Google, WidowX
from defi.benchmarks.simpler.check import drawing
from defi.engine import checkpoint
from defi.errors import UserError
from Step3_DeFI.policy import DeFI
from Step3_DeFI.rollout.evaluate import main
from Step3_DeFI.rollout.results import read_results

CARROT, EGGPLANT = "widowx_carrot_on_plate", "widowx_put_eggplant_in_basket"


@pytest.fixture(scope="module")
def root(reference: Path) -> str:
    try:
        drawing()
    except UserError as error:
        pytest.skip(str(error))
    return str(simpler_root(reference))


def test_what_a_policy_is_shown(root: str) -> None:
    for benchmark in (
        WidowX(root, tasks=[CARROT], starts=1, camera="seen"),
        Google(root, tasks=["google_robot_open_top_drawer"], starts=1, camera="seen"),
    ):
        environment, (trial, *_) = benchmark.environment(), benchmark.episodes(0)
        environment.reset(trial)
        seen, robot = environment.observe(), benchmark.robot
        size = (480, 640, 3) if isinstance(benchmark, WidowX) else (512, 640, 3)
        assert {name: view.shape for name, view in seen["images"].items()} == {"seen": size}
        assert seen["instruction"] == trial.start.instruction
        assert len(seen["state"]) == len(robot.state)
        if isinstance(benchmark, WidowX):  # the gripper points down, as Bridge counts, and is open
            assert np.abs(seen["state"][3:6]).max() < 0.25 and seen["state"][6] == pytest.approx(1, abs=1e-6)
        else:
            assert np.linalg.norm(seen["state"][3:7]) == pytest.approx(1)
            assert seen["state"][7] == pytest.approx(0, abs=1e-3)
        for _ in range(3):
            environment.step(np.array([0, 0, 0.02, 0, 0, 0, 0]))
        assert environment.observe()["state"][2] > seen["state"][2] + 0.01  # it lags behind


def test_a_policy_and_chance_on_two_processes(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    gfdm, gidm = write_stages(tmp_path)
    policy = DeFI.from_stages(policy_config(robot=asdict(WidowX().robot), state=True), gfdm=gfdm, gidm=gidm)
    checkpoint.save(policy, tmp_path / "policy", step=1, config={"preset_name": "test"})
    output = tmp_path / "out"
    given = ["benchmark=simpler_widowx", f"simpler_root={root}", f"tasks=[{CARROT},{EGGPLANT}]", "starts=1"]
    given += ["repeats=1", "max_steps=3", "chunk=2", "processes=2", "videos.chains=1", "baseline=random"]
    given += [f"checkpoint={tmp_path / 'policy'}", f"output={output}"]
    monkeypatch.setattr(sys, "argv", ["rollout", *given])
    main()
    told = capsys.readouterr().out
    assert "renderer: SAPIEN 3" in told and "cut at 3 steps" in told
    results = read_results(output)
    assert [each.outcome["task"] for each in results.episodes] == [CARROT, EGGPLANT]
    assert [(each.control_steps, each.observations) for each in results.episodes] == [(3, 2)] * 2
    assert all(each.outcome["stats"]["moved_correct_obj"] is False for each in results.episodes)
    assert list(results.scores) == ["any step", "last step"]
    assert results.baseline["episodes"][0]["observations"] == 3
    assert results.protocol["max_steps"] == 3 and not results.about.published
    (clip,) = (output / "videos").iterdir()
    assert clip.name == f"0000_1_failed_{CARROT}.mp4"
    assert "cut at 3 steps" in (output / "report.html").read_text()
    assert json.loads((output / "results.json").read_text())["run"]["versions"]["sapien"].startswith("3")
