"""PyBullet, bound to one physics server per world, and quiet."""

import contextlib
import functools
import importlib.util
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from defi.errors import UserError


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Keep what C code prints off the terminal."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


try:
    with _without_stderr():  # it prints when it was built
        import pybullet
except ModuleNotFoundError as error:
    raise UserError(
        "pybullet: not installed, but the simulator needs it; `pip install pybullet` on Python 3.10 or 3.11"
    ) from error


RENDERERS = ("cpu", "egl")


class Bullet:
    """A physics server inside this process. PyBullet's functions are its methods.

    >>> bullet = Bullet()
    >>> bullet.setGravity(0, 0, -9.8)

    It is freed by `close`, or with the last reference to it. Pictures are drawn by the CPU (TinyRenderer, the
    same everywhere) or by OpenGL without a display (EGL: a GPU, or Mesa's software).
    """

    def __init__(self, renderer: str = "cpu") -> None:
        _check_renderer(renderer)
        self._client = pybullet.connect(pybullet.DIRECT)
        self._disconnect = weakref.finalize(self, pybullet.disconnect, self._client)
        if renderer == "egl":
            plugin = importlib.util.find_spec("eglRenderer")
            if plugin is None or self.loadPlugin(plugin.origin, "_eglRendererPlugin") < 0:
                raise UserError(
                    "renderer=egl: no EGL here; install a GPU driver or Mesa's libEGL, or use cpu"
                )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if not self._disconnect.alive:
            raise ValueError("this world is closed; make a new one")
        function = functools.partial(getattr(pybullet, name), physicsClientId=self._client)
        self.__dict__[name] = function
        return function

    def load(self, urdf: Path, position: Sequence[float], euler: Sequence[float], **options: Any) -> int:
        """Load a body; returns its number. UserError where the file or something it refers to is missing."""
        if not urdf.is_file():
            raise UserError(f"{urdf}: missing; check that the folder of assets is complete")
        try:
            return self.loadURDF(str(urdf), position, pybullet.getQuaternionFromEuler(euler), **options)
        except pybullet.error as error:
            raise UserError(f"{urdf}: PyBullet cannot load it ({error}); check its meshes") from error

    def close(self) -> None:
        """Free the server; any later call raises ValueError."""
        self._disconnect()
        for name in [name for name in self.__dict__ if not name.startswith("_")]:
            del self.__dict__[name]


def _check_renderer(renderer: str) -> None:
    if renderer not in RENDERERS:
        raise UserError(f"renderer={renderer}: must be one of {', '.join(RENDERERS)}")
