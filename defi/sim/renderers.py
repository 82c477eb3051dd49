"""What draws the pictures: PyBullet's own renderer on the CPU, or OpenGL on a GPU or by Mesa on the CPU.

OpenGL needs no display: it is reached through EGL, which numbers the devices of a machine. Pictures of
different renderers differ a little, so what was used belongs to a result.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache

from defi.errors import UserError

DEVICE_VARIABLE = "EGL_VISIBLE_DEVICES"  # read by PyBullet's plugin: the number of one device
SOFTWARE = re.compile("llvmpipe|softpipe|swrast", re.IGNORECASE)
KINDS = {
    "cpu": "PyBullet's software renderer, on the CPU",
    "gpu": "OpenGL on a GPU, through EGL",
    "mesa": "OpenGL by Mesa on the CPU, through EGL",
}
NEEDED = {
    "gpu": "install the GPU vendor's driver with its EGL library (in a container: the graphics capability)",
    "mesa": "install Mesa's EGL library (Debian, Ubuntu: libegl-mesa0 libegl1 libgl1-mesa-dri)",
}
PROBE = "from defi.sim.bullet import Bullet; bullet = Bullet('egl'); bullet.getCameraImage(8, 8)"


@dataclass(frozen=True)
class Renderer:
    """A renderer that was seen to work.

    Args:
        kind: "cpu", "gpu" or "mesa".
        name: in words, with the device.
        device: EGL's number of the device; None for "cpu".
        instead_of: the kind that was asked for and does not work here, if another was allowed.
    """

    kind: str
    name: str
    device: int | None = None
    instead_of: str | None = None

    @property
    def backend(self) -> str:
        """What `defi.sim.world.World` calls it."""
        return "cpu" if self.kind == "cpu" else "egl"

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a process that draws with it."""
        return {} if self.device is None else {DEVICE_VARIABLE: str(self.device)}

    def __str__(self) -> str:
        missing = f"; {self.instead_of} was asked for, but is not there" if self.instead_of else ""
        return self.name + missing


def _probe(device: int) -> tuple[str, int]:
    """Name of a device and the number of devices, as a process of its own finds them.

    A broken driver ends the process that tries it.
    """
    run = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=os.environ | {DEVICE_VARIABLE: str(device)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    name = re.search(r"^GL_RENDERER=(.*)$", run.stdout, re.MULTILINE)
    count = re.search(r"^EGL device choice: \S+ of (\d+)", run.stdout, re.MULTILINE)
    works = run.returncode == 0 and name is not None
    return name[1] if works else "", int(count[1]) if count else 0


@cache
def egl_devices() -> dict[int, str]:
    """The EGL devices that can draw here: number -> name."""
    found, device, count = {}, 0, 1
    while device < count:
        name, count = _probe(device)
        if name:
            found[device] = name
        device += 1
    return found


def devices(kind: str) -> dict[int, str]:
    """The EGL devices of a kind, "gpu" or "mesa"."""
    software = kind == "mesa"
    return {number: name for number, name in egl_devices().items() if bool(SOFTWARE.search(name)) == software}


def find_renderer(kind: str, *, fallback: bool = False, share: int = 0) -> Renderer:
    """The renderer of a kind, after it has drawn a picture.

    Args:
        fallback: take the CPU's where `kind` does not work.
        share: the processes of several GPUs number themselves; each gets a device of its own.

    Raises:
        UserError: an unknown kind, or one that does not work here.
    """
    if kind not in KINDS:
        raise UserError(f"renderer={kind}: must be one of {', '.join(KINDS)}")
    if kind == "cpu":
        return Renderer("cpu", KINDS["cpu"])
    there = devices(kind)
    if not there and fallback:
        return Renderer("cpu", KINDS["cpu"], instead_of=kind)
    if not there:
        others = ", ".join(egl_devices().values()) or "none"
        raise UserError(
            f"renderer={kind}: no such EGL device works here (found: {others}); {NEEDED[kind]}, "
            "or take renderer=cpu"
        )
    number = sorted(there)[share % len(there)]
    return Renderer(kind, f"{KINDS[kind]}: {there[number]}", number)
