"""The list of SIMPLER's episodes against the one recorded from the official scripts."""

import json
from pathlib import Path

import numpy as np
import pytest

from defi.benchmarks.simpler.episodes import TASKS, episodes, yaw


@pytest.fixture(scope="module")
def recorded(reference: Path) -> dict[str, dict]:
    file = reference / "simpler/episodes.json"
    if not file.is_file():
        pytest.skip(f"no {file}")
    return json.loads(file.read_text())["tasks"]


def test_every_episode_is_as_the_official_scripts_enumerate_it(recorded: dict[str, dict]) -> None:
    assert set(recorded) <= set(TASKS)
    for name, expected in recorded.items():
        task, ours = TASKS[name], episodes(name)
        assert len(ours) == len(expected["episodes"]) == expected["count"]
        assert task.steps == expected["max_episode_steps"]
        assert (task.stage or "dummy_drawer") == expected["scene_name"]
        assert expected.get("model_json", task.models) == task.models
        for mine, its in zip(ours, expected["episodes"]):
            assert (mine.index, mine.instruction) == (its["index"], its["instruction"])
            assert mine.colours == (its.get("urdf_version") or "")
            assert its.get("overlay", expected.get("overlay")).endswith(f"/real_inpainting/{mine.photo}.png")
            robot = its.get("robot_init", expected.get("robot_init"))
            assert (*robot["xy"], robot["yaw"]) == pytest.approx(mine.base, abs=1e-12)
            half_turn = np.array([[0, 0, 0, -1], [0, 0, -1, 0], [0, 1, 0, 0], [1, 0, 0, 0]])  # times yaw pi
            assert np.allclose(half_turn @ yaw(mine.base[2]), robot["quat"], atol=1e-12)
            assert ("orientation" not in its) or mine.setting.split()[0] == its["orientation"]
            roles = ["target" if place == mine.target else "distractor" for place in range(len(mine.objects))]
            for place, (placed, each) in enumerate(zip(mine.objects, its.get("objects", ()), strict=True)):
                assert placed.model == each["name"]
                assert each["role"] == ("source" if place == mine.source else roles[place])
                assert np.allclose(
                    (*placed.xy, *placed.turn), (*each["init_xy"], *each["init_quat"]), atol=1e-12
                )
                assert placed.density == (each.get("density_override") or 0)
            if "cabinet_init_qpos" in its:
                assert (task.kind == "close") == (its["cabinet_init_qpos"] == 0.2)
                assert task.drawer == expected["drawer"]
