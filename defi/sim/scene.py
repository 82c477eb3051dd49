"""What a world is made of: robot, blocks, table, plane, surfaces and cameras, as plain data.

The same `SceneConfig` describes the built-in table and the scenes of a clone of CALVIN. Lengths in metres,
angles in radians, colours RGBA in [0, 1].
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from defi.errors import UserError, reading
from defi.files import read_yaml

Vector = tuple[float, float, float]
RGBA = tuple[float, float, float, float]
CLONE = "make one with `git clone --recurse-submodules https://github.com/mees/calvin`"
INCOMPLETE = f"the clone of CALVIN is incomplete or changed; {CLONE}"
# What calvin_env's configuration may name to be called; a clone's files could name anything.
CLASSES = ("envs.play_table_env.PlayTableSimEnv", "scene.play_table_scene.PlayTableScene")
CLASSES += ("robot.robot.Robot", "camera.static_camera.StaticCamera", "camera.gripper_camera.GripperCamera")
BLOCKS = ("block_red", "block_blue", "block_pink")


@dataclass(frozen=True)
class ArmConfig:
    """A fixed-base arm with two finger joints. The defaults are CALVIN's Panda with longer fingers."""

    urdf: Path
    base_position: Vector = (-0.34, -0.46, 0.24)
    base_euler: Vector = (0.0, 0.0, 0.0)
    rest_joints: tuple[float, ...] = (
        -1.21779206, 1.03987646, 2.11978261, -2.34205014, -0.87015947, 1.64119353, 0.55344866,
    )  # fmt: skip
    arm_joints: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)
    lower_limits: tuple[float, ...] = (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973)
    upper_limits: tuple[float, ...] = (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973)
    finger_joints: tuple[int, int] = (9, 11)
    finger_limits: tuple[float, float] = (0.0, 0.04)
    tcp_link: int = 15
    max_force: float = 200.0
    max_velocity: float = 2.0
    gripper_force: float = 200.0
    pedestal: bool = True


# The fields above under the names of CALVIN's files for a scene and for a robot.
SCENE_KEYS = ("base_position", "base_orientation", "initial_joint_positions")
ROBOT_KEYS = ("arm_joint_ids", "lower_joint_limits", "upper_joint_limits", "gripper_joint_ids")
ROBOT_KEYS += ("gripper_joint_limits", "tcp_link_id", "max_joint_force", "max_velocity", "gripper_force")


@dataclass(frozen=True)
class BlockConfig:
    """A block. `position` and `euler` are fixed values, or "any": drawn from the scene's surfaces.

    `length` is its size along its x axis, in metres; it is 4 cm wide and high (built-in blocks only).
    """

    name: str
    urdf: Path
    position: Vector | str = "any"
    euler: Vector | str = "any"
    length: float | None = None


@dataclass(frozen=True)
class TableConfig:
    """The table. Its joints: base__slide, base__drawer, base__button, base__switch. Its links: base_link,
    slide_link, drawer_link, button_link, switch_link, led_link, light_link, plank_link."""

    urdf: Path
    position: Vector = (0.0, 0.0, 0.0)
    euler: Vector = (0.0, 0.0, 0.0)
    light_colors: dict[str, RGBA] = field(
        default_factory=lambda: {"lightbulb": (1.0, 1.0, 0.0, 1.0), "led": (0.0, 1.0, 0.0, 1.0)}
    )
    off_color: RGBA = (1.0, 1.0, 1.0, 1.0)
    grips: dict[str, Vector] = field(default_factory=dict)


@dataclass(frozen=True)
class CameraConfig:
    """A pinhole camera. Without `look_from` it is mounted on the arm's `link`."""

    fov: float
    near: float
    far: float
    size: int
    look_from: Vector | None = None
    look_at: Vector | None = None
    up: Vector | None = None
    link: str = "gripper_cam"


STATIC_POSE = {
    "look_from": (2.871459009488717, -2.166602199425597, 2.555159848480571),
    "look_at": (-0.026242351159453392, -0.0302329882979393, 0.3920000493526459),
    "up": (0.4041403970338857, 0.22629790978217404, 0.8862616969685161),
}
STATIC_CAMERA = CameraConfig(fov=10, near=0.01, far=10, size=200, **STATIC_POSE)
GRIPPER_CAMERA = CameraConfig(fov=75, near=0.01, far=2, size=84)


@dataclass(frozen=True)
class SceneConfig:
    """Everything a `World` loads. `surfaces` maps names to low and high corners of regions for blocks."""

    name: str
    arm: ArmConfig
    blocks: tuple[BlockConfig, ...]
    table: TableConfig
    plane: Path
    surfaces: dict[str, tuple[Vector, Vector]]
    scale: float = 0.8
    seed: int = 0
    cameras: dict[str, CameraConfig] = field(
        default_factory=lambda: {"static": STATIC_CAMERA, "gripper": GRIPPER_CAMERA}
    )

    @classmethod
    def from_calvin(cls, calvin_root: str | Path, scene: str) -> "SceneConfig":
        """Scene "A" … "D" of a clone of the CALVIN repository; raises UserError as `compose`."""
        cfg = OmegaConf.to_container(compose(calvin_root, scene))  # nothing that it refers to is looked up
        data, robot, world = Path(cfg["data_path"]), cfg["robot"], cfg["scene"]
        with reading(f"{calvin_root}: scene {scene}", INCOMPLETE):
            table, blocks = world["objects"]["fixed_objects"]["table"], world["objects"]["movable_objects"]
            lights = {name: table["lights"][name]["color"] for name in ("lightbulb", "led")}
            lenses = "fov", "nearval", "farval", "width"
            poses = "look_from", "look_at", "up_vector"
            return cls(
                name=scene,
                arm=ArmConfig(
                    data / robot["filename"],
                    *(world[f"robot_{key}"] for key in SCENE_KEYS),
                    *(robot[key] for key in ROBOT_KEYS),
                ),
                blocks=tuple(
                    BlockConfig(name, data / block["file"], block["initial_pos"], block["initial_orn"])
                    for name, block in blocks.items()
                ),
                table=TableConfig(data / table["file"], table["initial_pos"], table["initial_orn"], lights),
                plane=data / "plane" / "plane.urdf",
                surfaces=world["surfaces"],
                scale=world["global_scaling"],
                cameras={
                    name: CameraConfig(*(camera[key] for key in lenses), *map(camera.get, poses))
                    for name, camera in cfg["cameras"].items()
                },
            )


def compose(calvin_root: str | Path, scene: str) -> DictConfig:
    """calvin_env's own configuration of one scene with both cameras, from the files of a clone.

    Raises UserError for an incomplete clone, an unknown scene, and files that name other classes to call.
    """
    root = Path(calvin_root)
    env = root / "calvin_env"
    if (root / "conf" / "scene").is_dir():
        raise UserError(f"{root}: this is calvin_env itself; give the parent folder, the clone of CALVIN")
    if not env.is_dir():
        raise UserError(f"{root}: {'not a clone of CALVIN' if root.is_dir() else 'no such folder'}; {CLONE}")
    conf = env / "conf"
    if not (conf / "scene").is_dir():
        raise UserError(f"{env}: empty submodule; run `git submodule update --init --recursive` in {root}")
    scenes = [file.stem.removeprefix("calvin_scene_") for file in conf.glob("scene/calvin_scene_*.yaml")]
    if scene not in scenes:
        raise UserError(f"{scene}: no such scene in {conf}; choose one of {', '.join(sorted(scenes))}")
    robot, cameras = conf / "robot", conf / "cameras" / "cameras"
    return OmegaConf.create(
        {
            "data_path": str(env.resolve() / "data"),
            "use_vr": False,
            "robot": _read(robot / "panda.yaml") | _read(robot / "panda_longer_finger.yaml"),
            "cameras": {name: _read(cameras / f"{name}.yaml") for name in ("static", "gripper")},
            "scene": _read(conf / "scene" / f"calvin_scene_{scene}.yaml"),
            "env": _read(conf / "env" / "play_table_env.yaml"),
        }
    )


def _read(file: Path) -> dict:
    """A configuration file, without what Hydra would compose."""
    values = read_yaml(file, INCOMPLETE)
    for target in _targets(values):
        if target not in [f"calvin_env.{name}" for name in CLASSES]:
            raise UserError(f"{file}: would call {target}; {INCOMPLETE}")
    values.pop("defaults", None)
    return values


def _targets(values: Any) -> list[Any]:
    """Everything in nested containers that Hydra would call."""
    if isinstance(values, dict):
        own = [values["_target_"]] if "_target_" in values else []
        return own + _targets(list(values.values()))
    return sum(map(_targets, values), []) if isinstance(values, list) else []
