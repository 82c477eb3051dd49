"""What a world is made of: robot, blocks, table, plane, surfaces and cameras, as plain data.

The same `SceneConfig` describes the built-in table and the scenes of a CALVIN clone
(`SceneConfig.from_calvin`).
Lengths in metres, angles in radians, colours RGBA in [0, 1].
"""

from dataclasses import dataclass, field
from pathlib import Path

from defi.errors import UserError
from defi.files import read_yaml

Vector = tuple[float, float, float]
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
    camera_link: str = "gripper_cam"
    max_force: float = 200.0
    max_velocity: float = 2.0
    gripper_force: float = 200.0
    pedestal: bool = True


@dataclass(frozen=True)
class BlockConfig:
    """A block. `position` and `euler` are fixed values, or None: drawn from the scene's surfaces.

    `length` is its size along its x axis, in metres; it is 4 cm wide and high (built-in blocks only).
    """

    name: str
    urdf: Path
    position: Vector | None = None
    euler: Vector | None = None
    length: float | None = None


@dataclass(frozen=True)
class TableConfig:
    """The table. Its joints: base__slide, base__drawer, base__button, base__switch. Its links: base_link,
    slide_link, drawer_link, button_link, switch_link, led_link, light_link, plank_link."""

    urdf: Path
    position: Vector = (0.0, 0.0, 0.0)
    euler: Vector = (0.0, 0.0, 0.0)
    bulb_color: tuple[float, float, float, float] = (1.0, 1.0, 0.0, 1.0)
    led_color: tuple[float, float, float, float] = (0.0, 1.0, 0.0, 1.0)
    off_color: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    grips: dict[str, Vector] = field(default_factory=dict)


@dataclass(frozen=True)
class CameraConfig:
    """A pinhole camera. Without `look_from` it is mounted on the arm's camera link."""

    fov: float
    near: float
    far: float
    size: int
    look_from: Vector | None = None
    look_at: Vector | None = None
    up: Vector | None = None


STATIC_CAMERA = CameraConfig(
    fov=10,
    near=0.01,
    far=10,
    size=200,
    look_from=(2.871459009488717, -2.166602199425597, 2.555159848480571),
    look_at=(-0.026242351159453392, -0.0302329882979393, 0.3920000493526459),
    up=(0.4041403970338857, 0.22629790978217404, 0.8862616969685161),
)
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
        """Scene "A" … "D" of a clone of the CALVIN repository (with its submodule calvin_env)."""
        env = calvin_env_folder(Path(calvin_root))
        conf, data = env / "conf", env / "data"
        file = scene_file(env, scene)
        cfg = _load(file)
        robot = _load(conf / "robot" / "panda.yaml") | _load(conf / "robot" / "panda_longer_finger.yaml")
        try:
            return cls(
                name=scene,
                arm=_arm(data, cfg, robot),
                blocks=tuple(
                    BlockConfig(
                        name, data / block["file"], _pose(block["initial_pos"]), _pose(block["initial_orn"])
                    )
                    for name, block in cfg["objects"]["movable_objects"].items()
                ),
                table=_table(data, cfg["objects"]["fixed_objects"]["table"]),
                plane=data / "plane" / "plane.urdf",
                surfaces={name: (tuple(low), tuple(high)) for name, (low, high) in cfg["surfaces"].items()},
                scale=cfg["global_scaling"],
                cameras={name: _camera(conf, name) for name in ("static", "gripper")},
            )
        except KeyError as error:
            raise UserError(f"{file}: has no {error}; check that the clone is complete") from error


def calvin_env_folder(calvin_root: Path) -> Path:
    """The folder of the simulator's assets in a clone."""
    clone = "`git clone --recurse-submodules https://github.com/mees/calvin`"
    env = calvin_root / "calvin_env"
    if not calvin_root.is_dir():
        raise UserError(f"{calvin_root}: no such folder; make it with {clone}")
    if (calvin_root / "conf" / "scene").is_dir():
        raise UserError(
            f"{calvin_root}: this is calvin_env itself; give the parent folder, the clone of CALVIN"
        )
    if not env.is_dir():
        raise UserError(f"{calvin_root}: not a clone of CALVIN (no calvin_env in it); make one with {clone}")
    if not (env / "conf" / "scene").is_dir():
        raise UserError(
            f"{env}: empty submodule; run `git submodule update --init --recursive` in {calvin_root}"
        )
    return env


def scene_file(env: Path, scene: str) -> Path:
    """The configuration of a scene in the folder that `calvin_env_folder` found."""
    files = {
        path.stem.removeprefix("calvin_scene_"): path for path in env.glob("conf/scene/calvin_scene_*.yaml")
    }
    if scene not in files:
        raise UserError(f"{scene}: no such scene in {env / 'conf'}; choose one of {', '.join(sorted(files))}")
    return files[scene]


def _arm(data: Path, scene: dict, robot: dict) -> ArmConfig:
    return ArmConfig(
        urdf=data / robot["filename"],
        base_position=tuple(scene["robot_base_position"]),
        base_euler=tuple(scene["robot_base_orientation"]),
        rest_joints=tuple(scene["robot_initial_joint_positions"]),
        arm_joints=tuple(robot["arm_joint_ids"]),
        lower_limits=tuple(robot["lower_joint_limits"]),
        upper_limits=tuple(robot["upper_joint_limits"]),
        finger_joints=tuple(robot["gripper_joint_ids"]),
        finger_limits=tuple(robot["gripper_joint_limits"]),
        tcp_link=robot["tcp_link_id"],
        max_force=robot["max_joint_force"],
        max_velocity=robot["max_velocity"],
        gripper_force=robot["gripper_force"],
    )


def _table(data: Path, table: dict) -> TableConfig:
    return TableConfig(
        urdf=data / table["file"],
        position=tuple(table["initial_pos"]),
        euler=tuple(table["initial_orn"]),
        bulb_color=tuple(table["lights"]["lightbulb"]["color"]),
        led_color=tuple(table["lights"]["led"]["color"]),
    )


def _pose(value: str | list[float]) -> Vector | None:
    return None if value == "any" else tuple(value)


def _camera(conf: Path, name: str) -> CameraConfig:
    camera = _load(conf / "cameras" / "cameras" / f"{name}.yaml")
    names = {"look_from": "look_from", "look_at": "look_at", "up": "up_vector"}
    pose = {ours: tuple(camera[theirs]) for ours, theirs in names.items() if theirs in camera}
    return CameraConfig(camera["fov"], camera["nearval"], camera["farval"], camera["width"], **pose)


def _load(path: Path) -> dict:
    """A configuration file, its `${…}` left alone."""
    return read_yaml(path, "get the clone anew, as a whole")
