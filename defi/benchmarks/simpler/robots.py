"""The two robots: where their files are, how they start, how their joints are driven, what their camera sees.

Numbers are SIMPLER's (system identification of the real arms); radians, metres, newtons.
"""

from dataclasses import dataclass, replace

from defi.benchmarks.simpler.episodes import Quaternion

DESCRIPTIONS = "ManiSkill2_real2sim/mani_skill2_real2sim/assets/descriptions"


@dataclass(frozen=True)
class Drive:
    """A joint, driven by a spring and a damper with a limit; start: its value at reset."""

    joint: str
    start: float
    stiffness: float
    damping: float
    limit: float


@dataclass(frozen=True)
class Surface:
    """Friction of links, and the radius over which it resists turning."""

    links: tuple[str, ...]
    static: float
    dynamic: float
    patch: float


@dataclass(frozen=True)
class Camera:
    """Pixels, and the place on a link: x is forward, y left, z up."""

    name: str
    link: str
    place: tuple[float, float, float]
    turn: Quaternion
    width: int
    height: int
    focal: float
    centre: tuple[float, float]
    near: float = 0.1
    far: float = 10.0


@dataclass(frozen=True)
class Robot:
    """drives: in the official order. height: of its base. rate: of control, Hz; substeps: of physics."""

    urdf: str
    drives: tuple[Drive, ...]
    tip: str
    height: float
    rate: int
    substeps: int
    camera: Camera
    surfaces: tuple[Surface, ...] = ()
    apart: tuple[tuple[str, ...], ...] = ()  # links that do not touch each other

    @property
    def fingers(self) -> tuple[Drive, ...]:
        return tuple(drive for drive in self.drives if "finger" in drive.joint)

    @property
    def arm(self) -> tuple[Drive, ...]:
        return tuple(drive for drive in self.drives if "finger" not in drive.joint)

    def description(self, colours: str) -> str:
        """The URDF's place in a clone of SimplerEnv."""
        return f"{DESCRIPTIONS}/{self.urdf}{'_' * bool(colours)}{colours}.urdf"


# Looking along (1, 0.553, -1.085), upright.
BESIDE = (0.8992916724159137, -0.09263244865988092, 0.35892477478725227, 0.23209205807735797)
WIDOWX = Robot(
    urdf="widowx_description/wx250s",
    drives=(
        Drive("waist", -0.01840777, 1169.7891719504198, 330.0, 200),
        Drive("shoulder", 0.0398835, 730.0, 180.0, 200),
        Drive("elbow", 0.22242722, 808.4601346394447, 152.12036565582588, 100),
        Drive("forearm_roll", -0.00460194, 1229.1299089624076, 309.6215302722146, 100),
        Drive("wrist_angle", 1.36524296, 1272.2760456418862, 201.04998711007383, 100),
        Drive("wrist_rotate", 0.00153398, 1056.3326605132252, 269.51458932695414, 100),
        Drive("left_finger", 0.037, 1000.0, 200.0, 60),
        Drive("right_finger", 0.037, 1000.0, 200.0, 60),
    ),
    tip="ee_gripper_link",
    height=0.870,
    rate=5,
    substeps=100,
    camera=Camera(
        "3rd_view_camera", "base_link", (0, -0.16, 0.36), BESIDE, 640, 480, 623.588, (319.501, 239.545)
    ),
    surfaces=(Surface(("left_finger_link", "right_finger_link"), 2.0, 2.0, 0.01),),
    apart=(("gripper_bar_link", "left_finger_link"), ("gripper_bar_link", "right_finger_link")),
)

SINK_START = (-0.2600599, -0.12875618, 0.04461369, -0.00652761, 1.7033415, -0.26983038, 0.037, 0.037)
WIDOWX_SINK = replace(
    WIDOWX,
    drives=tuple(replace(drive, start=start) for drive, start in zip(WIDOWX.drives, SINK_START)),
    height=0.85,
    camera=replace(
        WIDOWX.camera,
        place=(-0.00300001, -0.21, 0.39),
        turn=(-0.907313, 0.0782, -0.36434, -0.194741),
        near=0.01,
    ),
)

GOOGLE = Robot(
    urdf="googlerobot_description/google_robot_meta_sim_fix_wheel_fix_fingertip",
    drives=(
        Drive("joint_torso", -0.2639457174606611, 1700.0, 1059.9791902443303, 300),
        Drive("joint_shoulder", 0.0831913360274175, 1737.0471680861954, 1010.4720585373592, 300),
        Drive("joint_bicep", 0.5017611504652179, 979.975871856535, 767.2803161582076, 100),
        Drive("joint_elbow", 1.156859026208673, 930.0, 680.0, 100),
        Drive("joint_forearm", 0.028583671314766423, 1212.154500274304, 674.9946964336588, 100),
        Drive("joint_wrist", 1.592598203487462, 432.96500923932535, 274.613381336198, 100),
        Drive("joint_gripper", -1.080652960128774, 468.0013365498738, 340.532560578637, 100),
        Drive("joint_finger_right", 0.0, 200.0, 8.0, 60),
        Drive("joint_finger_left", 0.0, 200.0, 8.0, 60),
        Drive("joint_head_pan", -0.00285961, 2000.0, 900.0, 100),
        Drive("joint_head_tilt", 0.7851361, 2000.0, 900.0, 100),
    ),
    tip="link_gripper_tcp",
    height=0.07905,
    rate=3,
    substeps=171,
    camera=Camera(
        "overhead_camera", "link_camera", (0, 0, 0), (0.5, 0.5, -0.5, 0.5), 640, 512, 425.0, (320, 256)
    ),
    surfaces=(
        Surface(
            ("link_finger_left", "link_finger_right", "link_finger_tip_left", "link_finger_tip_right"),
            2,
            2,
            0.1,
        ),
        Surface(("link_finger_nail_left", "link_finger_nail_right"), 0.1, 0.1, 0.01),
        Surface(("link_base",), 0.1, 0.0, 0.1),
        Surface(("link_wheel_left", "link_wheel_right"), 1.0, 0.0, 0.1),
    ),
)
ROBOTS = {"widowx": WIDOWX, "widowx_sink": WIDOWX_SINK, "google": GOOGLE}
