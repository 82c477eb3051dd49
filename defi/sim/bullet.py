"""PyBullet, bound to one physics server per world, and quiet."""

import functools
import importlib.util
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from defi.errors import UserError, reading

RENDERERS = ("cpu", "egl")

_stderr, _null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
os.dup2(_null, 2)  # PyBullet prints when it was built
try:
    import pybullet
except ModuleNotFoundError as error:
    fix = "`pip install pybullet` on Python 3.10 or 3.11"
    raise UserError(f"pybullet: not installed, but the simulator needs it; {fix}") from error
finally:
    os.dup2(_stderr, 2)
    os.close(_stderr)
    os.close(_null)


class Bullet:
    """A physics server inside this process: PyBullet's functions are its methods.

    It is freed by `close`, or with the last reference to it. Pictures are drawn by the CPU (TinyRenderer, the
    same everywhere) or by OpenGL without a display (EGL: a GPU, or Mesa's software).
    """

    def __init__(self, renderer: str = "cpu") -> None:
        if renderer not in RENDERERS:
            raise UserError(f"renderer={renderer}: must be one of {', '.join(RENDERERS)}")
        self._client = pybullet.connect(pybullet.DIRECT)
        self._disconnect = weakref.finalize(self, pybullet.disconnect, self._client)
        if renderer == "egl":
            plugin = importlib.util.find_spec("eglRenderer")
            if plugin is None or self.loadPlugin(plugin.origin, "_eglRendererPlugin") < 0:
                raise UserError("renderer=egl: no EGL here; install a GPU driver or Mesa's, or use cpu")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if not self._disconnect.alive:
            raise ValueError("this world is closed; make a new one")
        function = functools.partial(getattr(pybullet, name), physicsClientId=self._client)
        self.__dict__[name] = function
        return function

    def load(self, urdf: Path, position: Sequence[float], euler: Sequence[float], **options: Any) -> int:
        """Load a body; returns its number."""
        with reading(urdf, "check that the folder of assets is complete"):
            urdf.stat()  # of a missing file PyBullet only says that it cannot load it
            return self.loadURDF(str(urdf), position, pybullet.getQuaternionFromEuler(euler), **options)

    def joints(self, body: int) -> list[tuple]:
        """PyBullet's facts about each joint of a body, and the link that it moves."""
        return [self.getJointInfo(body, joint) for joint in range(self.getNumJoints(body))]

    def close(self) -> None:
        """Free the server; any later call raises ValueError."""
        self._disconnect()
        for name in [name for name in self.__dict__ if not name.startswith("_")]:
            del self.__dict__[name]
