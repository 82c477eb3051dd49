"""What draws: which renderer is chosen among those that are there, and what becomes of those that are not."""

import numpy as np
import pytest

pytest.importorskip("pybullet")
from defi import doctor
from defi.errors import UserError
from defi.sim import renderers, scenes
from defi.sim.renderers import MESA, Renderer, default_kind, egl_devices, find_renderer
from defi.sim.world import RELOADS, World

GPUS = {0: "Fast 1", 1: "Fast 2"}
SOFTWARE = {2: "llvmpipe (LLVM 15)"}


def pretend(monkeypatch: pytest.MonkeyPatch, devices: dict[int, str]) -> None:
    monkeypatch.setattr(renderers, "egl_devices", lambda: devices)


@pytest.mark.parametrize(
    ("there", "kind", "chosen", "device"),
    [
        (GPUS | SOFTWARE, "egl", "gpu", 0),
        (SOFTWARE, "egl", "mesa", 2),
        (GPUS | SOFTWARE, "mesa", "mesa", 2),
        (GPUS | SOFTWARE, "cpu", "cpu", None),
        ({}, "cpu", "cpu", None),
    ],
)
def test_the_best_of_a_kind_is_taken(
    monkeypatch: pytest.MonkeyPatch, there: dict[int, str], kind: str, chosen: str, device: int | None
) -> None:
    pretend(monkeypatch, there)
    renderer = find_renderer(kind)
    assert (renderer.kind, renderer.device) == (chosen, device)
    assert renderer.backend == ("cpu" if chosen == "cpu" else "egl")
    assert device is None or there[device] in str(renderer)


@pytest.mark.parametrize(("kind", "there"), [("gpu", SOFTWARE), ("mesa", GPUS), ("egl", {})])
def test_a_renderer_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, kind: str, there: dict[int, str]
) -> None:
    pretend(monkeypatch, there)
    with pytest.raises(
        UserError, match=rf"^sim.renderer={kind}: no such EGL device works .*install .*=cpu"
    ) as told:
        find_renderer(kind)
    assert "\n" not in str(told.value)
    instead = find_renderer(kind, fallback=True)
    assert instead.kind == "cpu" and f"{kind} was asked for" in str(instead)


def test_unknown_renderers() -> None:
    with pytest.raises(UserError, match="sim.renderer=crayon: must be one of cpu, gpu, mesa, egl"):
        find_renderer("crayon")
    with pytest.raises(UserError, match="cpu, egl"):
        World(scenes.builtin("D"), renderer="crayon")


def test_each_process_gets_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, GPUS | SOFTWARE)
    shares = [find_renderer("egl", share=share) for share in range(3)]
    assert [renderer.environment for renderer in shares] == [
        {"EGL_VISIBLE_DEVICES": str(number)} for number in (0, 1, 0)
    ]


def test_mesa_starts_no_threads_in_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, SOFTWARE)
    assert find_renderer("mesa").environment == {"EGL_VISIBLE_DEVICES": "2", "LP_NUM_THREADS": "0"}


def test_only_the_assets_of_calvin_need_egl() -> None:
    assert default_kind(None) == "cpu" and default_kind("data/calvin") == "egl"


@pytest.mark.parametrize(
    "probe", ["import time; time.sleep(60)", "import os; os.abort()", "print('GL_RENDERER=x'); 1 / 0"]
)
def test_a_broken_driver_is_no_device(monkeypatch: pytest.MonkeyPatch, probe: str) -> None:
    monkeypatch.delenv("EGL_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(renderers, "PROBE", probe)
    monkeypatch.setattr(renderers, "PATIENCE", 2)
    assert egl_devices.__wrapped__() == {}


def test_a_broken_device_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EGL_VISIBLE_DEVICES", raising=False)
    answers = {0: ("Fast", 3), 1: ("", 0), 2: ("llvmpipe", 3)}
    monkeypatch.setattr(renderers, "_probe", answers.__getitem__)
    assert egl_devices.__wrapped__() == {0: "Fast", 2: "llvmpipe"}


def test_devices_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {0: ("Fast", 4), 2: ("", 4), 3: ("llvmpipe", 4)}
    monkeypatch.setattr(renderers, "_probe", answers.__getitem__)
    monkeypatch.setenv("EGL_VISIBLE_DEVICES", "3,0,2")
    assert egl_devices.__wrapped__() == {0: "Fast", 3: "llvmpipe"}
    monkeypatch.setenv("EGL_VISIBLE_DEVICES", "fast")
    with pytest.raises(UserError, match="EGL_VISIBLE_DEVICES=fast: must be numbers of EGL devices"):
        egl_devices.__wrapped__()


def test_the_doctor_says_what_a_missing_device_means(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {})
    monkeypatch.setattr(doctor, "egl_devices", dict)
    finding = list(doctor.check_simulation())[-1]
    assert (finding.what, finding.verdict) == ("EGL", "note") and "libegl-mesa0" in finding.fix
    (wrong,) = doctor.examine("CALVIN's renderer", doctor.check_pictures, "data/calvin")
    assert wrong.verdict == "wrong" and "libegl-mesa0" in wrong.fix and "sim.renderer=cpu" in wrong.fix


# ---------------------------------------------------------------- drawing


@pytest.fixture(scope="module")
def egl() -> Renderer:
    if not egl_devices():
        pytest.skip(f"no EGL device works here; {MESA}")
    return find_renderer("egl")


def test_egl_draws_the_same_scene(egl: Renderer) -> None:
    pictures = []
    for backend in ("cpu", "egl"):
        with World(scenes.builtin("D"), cameras=["static"], renderer=backend, static_size=32) as world:
            world.reset()
            pictures.append(world.render()["rgb_static"].astype(int))
    by_cpu, by_egl = pictures
    assert np.corrcoef(by_cpu.ravel(), by_egl.ravel())[0, 1] > 0.5, "but for light and background"


def test_pictures_do_not_depend_on_what_was_drawn_before(egl: Renderer) -> None:
    """Nor on how often all was loaded; already the first picture has its shadows."""
    with World(scenes.builtin("D"), renderer="egl", static_size=64, gripper_size=32) as world:
        drawn = []
        for load in range(RELOADS + 2):
            world.reset()
            first = world.render()
            for _ in range(3):
                world.step([0.3, 0.2, -0.5, 0, 0, 0.4, 1])
                if load == 1:
                    world.render()
            drawn.append(np.concatenate([p.ravel() for p in (*first.values(), *world.render().values())]))
            world.reload()
    assert all(np.array_equal(one, drawn[0]) for one in drawn)
