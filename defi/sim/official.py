"""The official simulator, the package calvin_env, behind the interface of `defi.sim.world.World`.

It is driven as the official evaluation drives it, except that pictures are drawn only when the policy looks:
the package draws all cameras at every step. The package is not a requirement.
"""

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate
from jaxtyping import Float, UInt8

from defi.errors import UserError, one_line
from defi.sim.judge import BlockState, Contact, JudgeState
from defi.sim.scene import compose

INSTALL = (
    "pip install --no-deps -e <clone>/calvin_env, then "
    "pip install gym gitpython numpy-quaternion opencv-python-headless scipy"
)


def check_installed() -> None:
    """Raises UserError where the package is not there; its own requirements show when it is loaded."""
    if importlib.util.find_spec("calvin_env") is None:
        raise UserError(f"sim.backend=calvin_env: the package is not installed; {INSTALL}")


class OfficialWorld(contextlib.AbstractContextManager):
    """calvin_env's play table; its methods are those of `World`.

    One per process, since the package uses PyBullet's first connection for some calls.
    """

    def __init__(self, calvin_root: str | Path, scene: str, *, renderer: str = "cpu") -> None:
        self._cfg = compose(calvin_root, scene)
        self._cfg.env.use_egl = renderer == "egl"
        self._env: Any = None
        self.reload()

    def reload(self) -> None:
        """Load everything again into a new physics server."""
        self.close()
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                self._env = instantiate(self._cfg.env, show_gui=False, use_vr=False, use_scene_info=True)
            except Exception as error:
                if not isinstance(error.__cause__, ImportError):
                    raise
                problem = f"cannot be imported ({one_line(error.__cause__)})"
                raise UserError(f"sim.backend=calvin_env: {problem}; {INSTALL}") from error
        # With no cameras of its own it draws nothing in `reset` and `step`.
        self._cameras, self._env.cameras = self._env.cameras, []
        if self._cfg.env.use_egl:
            self.render()  # as `reset` would: the first picture of a new OpenGL context lacks the shadows

    def reset(self, robot_obs: Float[np.ndarray, "15"], scene_obs: Float[np.ndarray, "24"]) -> None:
        """Put robot and scene in the given states."""
        self._env.reset(robot_obs=np.asarray(robot_obs), scene_obs=np.asarray(scene_obs))

    def step(self, action: Float[np.ndarray, "7"]) -> None:
        """As `World.step`."""
        self._env.step(np.asarray(action, dtype=np.float64))

    def robot_obs(self) -> Float[np.ndarray, "15"]:
        """As `World.robot_obs`."""
        return np.asarray(self._env.get_state_obs()["robot_obs"], dtype=np.float64)

    def scene_obs(self) -> Float[np.ndarray, "24"]:
        """As `World.scene_obs`."""
        return np.asarray(self._env.get_state_obs()["scene_obs"], dtype=np.float64)

    def state(self) -> JudgeState:
        """What the judge looks at, from the package's own account of the world."""
        info = self._env.get_info()
        scene, robot = info["scene_info"], info["robot_info"]
        table = scene["fixed_objects"]["table"]
        keys = "uid", "current_pos", "current_orn", "current_lin_vel", "current_ang_vel"
        return JudgeState(
            robot=robot["uid"],
            table=table["uid"],
            links=table["links"],
            blocks={
                name: BlockState(*(block[key] for key in keys), _contacts(block["contacts"]))
                for name, block in scene["movable_objects"].items()
            },
            doors={name: door["current_state"] for name, door in scene["doors"].items()},
            lights={name: light["logical_state"] for name, light in scene["lights"].items()},
            robot_contacts=_contacts(robot["contacts"]),
        )

    def render(self) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """A picture per camera: rgb_static, rgb_gripper."""
        return {f"rgb_{camera.name}": np.asarray(camera.render()[0], np.uint8) for camera in self._cameras}

    def close(self) -> None:
        """End the physics server."""
        if self._env is not None:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints the number of its connection
                self._env.close()
            self._env.ownsPhysicsClient = False  # so that its finalizer does not disconnect another world
            self._env = None

    def __exit__(self, *_: object) -> None:
        self.close()


def _contacts(points: Any) -> frozenset[Contact]:
    return frozenset((point[2], point[4]) for point in points or ())
