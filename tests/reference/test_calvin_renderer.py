"""CALVIN's assets are drawn as CALVIN's data were; a number that was drawn otherwise says so."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

pytest.importorskip("pybullet")
from defi import doctor
from defi.config import CONFIG_DIR
from defi.data.calvin import calvin_robot
from defi.errors import UserError
from defi.sim import official, renderers
from defi.sim.renderers import NEEDED, egl_devices, find_renderer
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.preview import rollouts
from Step3_DeFI.rollout import evaluate as command
from Step3_DeFI.rollout.config import CommandConfig, read_settings
from Step3_DeFI.rollout.evaluate import Evaluation, main

GPU, MESA = {0: "Fast 1"}, {1: "llvmpipe (LLVM 15)"}
CAVEAT = "does not compare with published ones"


def composed(name: str, *settings: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        return compose(name, list(settings))


def prepare(*settings: str) -> Evaluation:
    cfg = composed("step3_rollout", *settings)
    return Evaluation.prepare(*read_settings(CommandConfig, cfg, "step3_rollout"))


@pytest.fixture
def clone(reference: Path) -> Path:
    folder = reference / "calvin_root"
    if not folder.is_dir():
        pytest.skip(f"no assets of CALVIN at {folder}")
    return folder


@pytest.fixture
def egl() -> None:
    if not egl_devices():
        pytest.skip(f"no EGL device works here; {NEEDED['egl']}")


@pytest.mark.parametrize("given", ["sim=calvin", "sim=builtin", "benchmark=calvin", "sim.backend=calvin_env"])
@pytest.mark.parametrize(("there", "kind"), [(GPU | MESA, "gpu"), (MESA, "mesa")])
def test_egl_is_the_default(
    clone: Path, monkeypatch: pytest.MonkeyPatch, given: str, there: dict[int, str], kind: str
) -> None:
    monkeypatch.setattr(renderers, "egl_devices", lambda: there)
    monkeypatch.setattr(official, "check_installed", lambda: None)
    simulation = prepare(given, f"sim.calvin_root={clone}", "agent=random", "chains=1").simulation
    assert simulation.kind == kind and simulation.caveat is None
    assert simulation.make.args[0].keywords["renderer"] == "egl"
    assert simulation.variables == find_renderer("egl").environment


@pytest.mark.parametrize("given", ["sim.renderer=cpu", "sim.renderer_fallback=true"])
def test_the_cpu_is_taken_only_when_asked_for(
    clone: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setattr(renderers, "egl_devices", dict)
    settings = f"sim.calvin_root={clone}", "agent=random", "chains=1"
    with pytest.raises(
        UserError, match="sim.renderer=egl: no such EGL device .*libegl-mesa0.*sim.renderer=cpu"
    ):
        prepare(*settings)
    simulation = prepare(*settings, given).simulation
    assert simulation.kind == "cpu" and CAVEAT in simulation.caveat
    assert ("egl was asked for" in simulation.renderer) == ("fallback" in given)


def test_processes_do_not_draw_differently(
    clone: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.setattr(command, "gather_object", lambda kinds: [*kinds, "gpu"])
    given = [f"sim.calvin_root={clone}", "sim.renderer=cpu", "agent=random", "chains=1"]
    monkeypatch.setattr(sys, "argv", ["rollout", *given, f"output={tmp_path / 'out'}"])
    with pytest.raises(SystemExit):
        main()
    assert "would draw with different ones (cpu, gpu)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rollouts_during_training_follow(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderers, "egl_devices", dict)
    with pytest.raises(UserError, match="sim.renderer=egl: no such EGL device works here"):
        rollouts(
            composed("step3_train", "preset=tiny", f"sim.calvin_root={clone}"), PolicyConfig(calvin_robot())
        )
    rollouts(composed("step3_train", "preset=tiny"), PolicyConfig(calvin_robot()))


@pytest.mark.parametrize("renderer", ["egl", "cpu"])
def test_the_result_says_what_drew_it(
    clone: Path,
    egl: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    renderer: str,
) -> None:
    """A rollout of a few steps, filmed, so that it draws."""
    given = [] if renderer == "egl" else ["sim.renderer=cpu"]
    given += ["sim=calvin", f"sim.calvin_root={clone}", "agent=random", "chains=1", "max_steps=[4]"]
    monkeypatch.setattr(sys, "argv", ["rollout", *given, f"output={tmp_path / 'out'}", "videos.chains=1"])
    main()
    run = json.loads((tmp_path / "out" / "results.json").read_text())["run"]
    told, page = " ".join(capfd.readouterr().out.split()), (tmp_path / "out" / "report.html").read_text()
    assert run["renderer"] == str(find_renderer(renderer)) and f"renderer: {run['renderer']}" in told
    assert list((tmp_path / "out" / "videos").glob("*.mp4"))
    by_cpu = renderer == "cpu"
    assert (run["caveat"] is not None and CAVEAT in run["caveat"]) == by_cpu
    assert (CAVEAT in told, CAVEAT in page, "<td>FLOWER</td>" in page) == (by_cpu, by_cpu, not by_cpu)


def test_the_doctor_shows_how_far_the_renderers_differ(clone: Path, egl: None) -> None:
    _, chosen, *others = doctor.examine("CALVIN's renderer", doctor.check_clone, str(clone))
    assert chosen.verdict == "ok" and str(find_renderer("egl")) in chosen.detail
    cpu = others[-1]
    assert (cpu.what, cpu.verdict) == ("sim.renderer=cpu", "note") and "no published one" in cpu.fix
    shares = [int(word.rstrip("%")) for word in cpu.detail.split() if word.endswith("%")]
    assert len(shares) == 2 and min(shares) > 10, "another domain in both views"


def test_egl_pictures_are_the_official_package_s(clone: Path, egl: None) -> None:
    pytest.importorskip("calvin_env")
    with find_renderer("egl").process() as process:
        assert process.submit(official_differences, str(clone)).result() == 0


def official_differences(clone: str) -> int:
    """Values that differ, where the package draws at every step, as in an evaluation, and we now and then."""
    from defi.sim.scene import SceneConfig
    from defi.sim.sequences import initial_states, start_state
    from defi.sim.world import World

    theirs = official.OfficialWorld(clone, "D", renderer="egl")
    different, rng = 0, np.random.default_rng(0)
    with World(SceneConfig.from_calvin(clone, "D"), renderer="egl") as ours:
        for state in initial_states()[:3]:
            ours.reset(*start_state(state))
            theirs.reset(*start_state(state))
            for step in range(21):
                seen = theirs.render()
                if step % 10 == 0:
                    different += sum(int((ours.render()[name] != seen[name]).sum()) for name in seen)
                action = np.append(rng.uniform(-1, 1, 6), 1.0)
                ours.step(action)
                theirs.step(action)
    theirs.close()
    return different
