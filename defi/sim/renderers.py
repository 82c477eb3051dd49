"""What draws the pictures: PyBullet's own renderer on the CPU, or OpenGL on a GPU or by Mesa on the CPU.

OpenGL needs no display: it is reached through EGL, which numbers the devices of a machine. CALVIN's data and
the published evaluations were drawn with it; the CPU's pictures of the same scene are others, and to a policy
another world. So CALVIN's assets are drawn with EGL unless the CPU is asked for, and a result says which.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context

import numpy as np
from jaxtyping import UInt8

from defi.errors import UserError
from defi.sim.scene import SceneConfig

DEVICE_VARIABLE = "EGL_VISIBLE_DEVICES"  # read by PyBullet's plugin: the number of one device
SOFTWARE = re.compile("llvmpipe|softpipe|swrast", re.IGNORECASE)
KINDS = {
    "cpu": "PyBullet's software renderer, on the CPU",
    "gpu": "OpenGL on a GPU, through EGL",
    "mesa": "OpenGL by Mesa on the CPU, through EGL",
    "egl": "OpenGL through EGL: on a GPU, else by Mesa",
}
PACKAGES = "libegl-mesa0 libegl1 libgl1 libgl1-mesa-dri"
MESA = f"install Mesa's EGL library (Debian, Ubuntu: apt-get install {PACKAGES})"
NEEDED = {
    "gpu": "install the GPU vendor's driver with its EGL library (in a container: the graphics capability)",
    "mesa": MESA,
    "egl": f"{MESA} or a GPU's",
}
PROBE = "from defi.sim.bullet import Bullet; bullet = Bullet('egl'); bullet.getCameraImage(8, 8)"
PATIENCE = 120  # seconds for one device; a broken driver may never come back
FAR = 20  # levels of 255: clearly another colour

Pictures = dict[str, UInt8[np.ndarray, "H W 3"]]


@dataclass(frozen=True)
class Renderer:
    """A renderer that was seen to work."""

    kind: str  # cpu, gpu or mesa
    name: str  # in words, with the device
    device: int | None = None  # EGL's number of it
    instead_of: str | None = None  # the kind that was asked for but is not there, if another was allowed

    @property
    def backend(self) -> str:
        """What `defi.sim.world.World` calls it."""
        return "cpu" if self.kind == "cpu" else "egl"

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a process that draws with it, one of as many as there are processors."""
        device = {} if self.device is None else {DEVICE_VARIABLE: str(self.device)}
        # Mesa's helper threads, one per processor in each process, would only wait for each other: none.
        return device | ({"LP_NUM_THREADS": "0"} if self.kind == "mesa" else {})

    def process(self) -> ProcessPoolExecutor:
        """One process to draw in: EGL's device is chosen once in a process, and a broken driver ends it."""
        return ProcessPoolExecutor(1, get_context("spawn"), initializer=_begin, initargs=(self.environment,))

    def __str__(self) -> str:
        return self.name + (f"; {self.instead_of} was asked for, but is not there" if self.instead_of else "")


def _begin(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    for stream in (1, 2):  # the terminal is kept free of what the EGL plugin prints
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def _probe(device: int) -> tuple[str, int]:
    """Name of a device ("" if it cannot draw) and the number of devices (0 if unknown)."""
    environment = os.environ | {DEVICE_VARIABLE: str(device)}
    command = [sys.executable, "-c", PROBE]  # in a process of its own, which a broken driver ends
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return "", 0
    name = re.search(r"^GL_RENDERER=(.*)$", run.stdout, re.MULTILINE)
    total = re.search(r"^EGL device choice: \S+ of (\d+)", run.stdout, re.MULTILINE)
    return name[1] if name and run.returncode == 0 else "", int(total[1]) if total else 0


@cache
def egl_devices() -> dict[int, str]:
    """The EGL devices that can draw here: number -> name. EGL_VISIBLE_DEVICES=0,2 allows these only."""
    given = os.environ.get(DEVICE_VARIABLE)
    try:
        numbers = sorted(map(int, given.split(","))) if given else [0]
    except ValueError:
        needed = "must be numbers of EGL devices, such as 0,2; unset it for all"
        raise UserError(f"{DEVICE_VARIABLE}={given}: {needed}") from None
    probes = {number: _probe(number) for number in numbers}
    if not given:
        probes |= {number: _probe(number) for number in range(1, probes[0][1])}
    return {number: name for number, (name, _) in probes.items() if name}


def default_kind(calvin_root: str | None) -> str:
    """CALVIN's assets as its data were drawn; the built-in table by what draws the same on any machine."""
    return "cpu" if calvin_root is None else "egl"


def find_renderer(kind: str, *, fallback: bool = False, share: int = 0) -> Renderer:
    """The renderer of a kind of `KINDS`, after it has drawn a picture; UserError if it does not work here.

    Args:
        fallback: take the CPU's where `kind` does not work.
        share: the processes of several GPUs number themselves; each gets a device of its own.
    """
    if kind not in KINDS:
        raise UserError(f"sim.renderer={kind}: must be one of {', '.join(KINDS)}")
    there = {} if kind == "cpu" else egl_devices()
    mesa = {number: name for number, name in there.items() if SOFTWARE.search(name)}
    gpu = {number: name for number, name in there.items() if number not in mesa}
    if available := {"cpu": {}, "gpu": gpu, "mesa": mesa, "egl": gpu or mesa}[kind]:
        number = sorted(available)[share % len(available)]
        kind = "mesa" if SOFTWARE.search(available[number]) else "gpu"
        return Renderer(kind, f"{KINDS[kind]}: {available[number]}", number)
    if kind == "cpu" or fallback:
        return Renderer("cpu", KINDS["cpu"], instead_of=None if kind == "cpu" else kind)
    found = ", ".join(there.values()) or "none"
    fix = f"{NEEDED[kind]}, or take sim.renderer=cpu (its pictures are not those of CALVIN's data)"
    raise UserError(f"sim.renderer={kind}: no such EGL device works here (found: {found}); {fix}")


def draw_with_each(calvin_root: str, scene: str) -> dict[Renderer, Pictures]:
    """A scene of CALVIN by each kind of renderer that works here, first by the one that a rollout takes."""
    pictures = {}
    software = ["mesa" for name in egl_devices().values() if SOFTWARE.search(name)]
    for kind in dict.fromkeys([find_renderer("egl").kind, *software, "cpu"]):
        renderer = find_renderer(kind)
        with renderer.process() as process:
            try:
                pictures[renderer] = process.submit(_draw, calvin_root, scene, renderer.backend).result()
            except BrokenProcessPool:
                raise UserError(f"{renderer}: crashes drawing scene {scene}; update its driver") from None
    return pictures


def _draw(calvin_root: str, scene: str, backend: str) -> Pictures:
    from defi.sim.world import World  # loads PyBullet

    with World(SceneConfig.from_calvin(calvin_root, scene), renderer=backend) as world:
        world.reset()
        return world.render()


def describe_difference(first: Pictures, second: Pictures) -> str:
    """Per camera the mean difference, and the share of pixels with a colour further apart than `FAR`."""
    views = []
    for name, picture in first.items():
        apart = np.abs(picture.astype(int) - second[name])
        share = (apart.max(axis=-1) > FAR).mean()
        view = f"{name.removeprefix('rgb_')} view by {apart.mean():.1f} of 255 in the mean"
        views.append(f"{view}, {share:.0%} of its pixels by more than {FAR}")
    return "; ".join(views)
