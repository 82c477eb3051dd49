"""The official simulator, the package calvin_env, behind the interface of `defi.sim.world.World`.

For those who want their number from the original code. It is driven as the official evaluation drives it,
except that pictures are drawn only when the policy looks: the package draws all cameras at every step. Its
scene comes from a clone of CALVIN, as the native simulator's does. The package is not a requirement;
docs/evaluation.md says how to install it.
"""

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate
from jaxtyping import Float, UInt8
from omegaconf import DictConfig, OmegaConf

from defi.errors import UserError, one_line
from defi.files import read_yaml
from defi.sim.judge import BlockState, Contact, JudgeState
from defi.sim.scene import calvin_env_folder, scene_file

INSTALL = (
    "pip install --no-deps -e <clone>/calvin_env, then "
    "pip install gym gitpython numpy-quaternion opencv-python-headless scipy"
)

# What its configuration may name to be called; a clone's files could name anything.
CLASSES = (
    "calvin_env.envs.play_table_env.PlayTableSimEnv",
    "calvin_env.scene.play_table_scene.PlayTableScene",
    "calvin_env.robot.robot.Robot",
    "calvin_env.camera.static_camera.StaticCamera",
    "calvin_env.camera.gripper_camera.GripperCamera",
)


def check_installed() -> None:
    """Raises UserError where the package is not there; its own requirements show when it is loaded."""
    if importlib.util.find_spec("calvin_env") is None:
        raise UserError(f"sim.backend=calvin_env: the package is not installed; {INSTALL}")


def compose(calvin_root: str | Path, scene: str, *, egl: bool) -> DictConfig:
    """The package's own configuration of one scene with both cameras, from the files of a clone.

    Raises:
        UserError: a folder that is not a complete clone, an unknown scene, or files that name other classes
            than the package's.
    """
    env = calvin_env_folder(Path(calvin_root))
    conf = env / "conf"
    parts = {
        "scene": scene_file(env, scene),
        "env": conf / "env" / "play_table_env.yaml",
        "cameras.static": conf / "cameras" / "cameras" / "static.yaml",
        "cameras.gripper": conf / "cameras" / "cameras" / "gripper.yaml",
    }
    cfg = OmegaConf.create({"data_path": str(env.resolve() / "data"), "use_vr": False})
    robots = [conf / "robot" / name for name in ("panda.yaml", "panda_longer_finger.yaml")]
    for file in (*parts.values(), *robots):
        if not file.is_file():
            raise UserError(f"{file}: missing; the clone is incomplete")
    for key, file in parts.items():
        OmegaConf.update(cfg, key, _read(file))
    cfg.robot = OmegaConf.merge(*map(_read, robots))
    for section in (cfg.robot, cfg.scene):
        section.pop("defaults", None)
    cfg.env.use_egl = egl
    return cfg


def _read(file: Path) -> DictConfig:
    values = read_yaml(file, "get the clone anew, as a whole")
    for target in _targets(values):
        if target not in CLASSES:
            raise UserError(f"{file}: would call {target}; get the clone anew, as a whole")
    return OmegaConf.create(values)


def _targets(values: Any) -> Iterator[Any]:
    """Everything in nested containers that Hydra would call."""
    if isinstance(values, dict):
        yield from (value for key, value in values.items() if key == "_target_")
    if isinstance(values, (dict, list)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _targets(value)


class OfficialWorld:
    """calvin_env's play table. A context manager; one per process, since the package uses PyBullet's first
    connection for some calls.

    Args:
        renderer: "cpu", or "egl" for OpenGL without a display.
    """

    def __init__(self, calvin_root: str | Path, scene: str, *, renderer: str = "cpu") -> None:
        self._cfg = compose(calvin_root, scene, egl=renderer == "egl")
        self._renderer = renderer
        self._env: Any = None
        self.reload()

    def reload(self) -> None:
        """Load everything anew into a new physics server."""
        self.close()
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                self._env = instantiate(self._cfg.env, show_gui=False, use_vr=False, use_scene_info=True)
            except Exception as error:
                if not isinstance(error.__cause__, ImportError):
                    raise
                raise UserError(
                    f"sim.backend=calvin_env: it cannot be imported ({one_line(error.__cause__)}); {INSTALL}"
                ) from error
        # With no cameras of its own it draws nothing in `reset` and `step`.
        self._cameras, self._env.cameras = self._env.cameras, []
        if self._renderer == "egl":
            self.render()  # as `reset` would: the first picture of a new OpenGL context lacks the shadows

    def reset(self, robot_obs: Float[np.ndarray, "15"], scene_obs: Float[np.ndarray, "24"]) -> None:
        """Put robot and scene in the given states."""
        self._env.reset(robot_obs=np.asarray(robot_obs), scene_obs=np.asarray(scene_obs))

    def step(self, action: Float[np.ndarray, "7"]) -> None:
        """One control step: relative action in [−1, 1], gripper ±1."""
        self._env.step(np.asarray(action, dtype=np.float64))

    def robot_obs(self) -> Float[np.ndarray, "15"]:
        """TCP xyz, TCP Euler, finger width, 7 joints, last gripper action."""
        return np.asarray(self._env.get_state_obs()["robot_obs"], dtype=np.float64)

    def scene_obs(self) -> Float[np.ndarray, "24"]:
        """Slide, drawer, button, switch, bulb, LED, then xyz and Euler per block in the scene's order."""
        return np.asarray(self._env.get_state_obs()["scene_obs"], dtype=np.float64)

    def state(self) -> JudgeState:
        """What the judge looks at, from the package's own account of the world."""
        info = self._env.get_info()
        scene, robot = info["scene_info"], info["robot_info"]
        table = scene["fixed_objects"]["table"]
        return JudgeState(
            robot=robot["uid"],
            table=table["uid"],
            links=table["links"],
            blocks={
                name: BlockState(
                    block["uid"],
                    block["current_pos"],
                    block["current_orn"],
                    block["current_lin_vel"],
                    block["current_ang_vel"],
                    _contacts(block["contacts"]),
                )
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

    def __enter__(self) -> "OfficialWorld":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _contacts(points: Any) -> frozenset[Contact]:
    return frozenset((point[2], point[4]) for point in points or ())
