"""The world of one task on SAPIEN 3: table or cabinet, robot and objects from the user's clone of SimplerEnv.

What the official environment does on SAPIEN 2 is kept number by number; where SAPIEN 3's solver (PhysX 5 for
PhysX 4) needs another setting for the same motion, a comment says so.
"""

import json
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from defi.benchmarks.simpler import grip
from defi.benchmarks.simpler.episodes import STILL, Episode, Placed, yaw
from defi.benchmarks.simpler.judge import Contact
from defi.benchmarks.simpler.mesh import convex_parts
from defi.benchmarks.simpler.poses import Pose, multiplied
from defi.benchmarks.simpler.robots import GOOGLE, ROBOTS
from defi.errors import UserError

DATA = "ManiSkill2_real2sim/data"
TABLE = 0.87  # m, its top
DROP = 0.5  # m above it objects are let go
CABINET = (-0.295, 0.0, 0.017)
OFFSETS = {"google": (-1.6616, -3.0337, 0.0), "widowx": (-2.0634, -2.8313, 0.0)}
ROOMS = {  # where these stages are put, before their offset
    "modern_bedroom_no_roof": (0.178, -2.235, 1.669, 0.007, 0, 0, -1),
    "modern_office_no_roof": (-0.192, -1.728, 1.48, 0.709, 0, 0, -0.705),
}
# Along and about x, y, z: what a body may not do.
FREE, UPRIGHT_ONLY, LOCKED = [False] * 6, [False] * 3 + [True, True, False], [True] * 6
FALL_ONLY = [True, True, False, True, True, False]


@cache
def sapien() -> Any:
    """The simulator.

    Raises:
        UserError: the package is not there.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing Vulkan: `check.py` tells it where it matters
            import sapien
    except ImportError as error:
        fix = 'pip install -e ".[simpler]", Linux, Python 3.10 to 3.12'
        raise UserError(f"SIMPLER needs SAPIEN 3, which is missing ({error}): {fix}") from None
    sapien.set_log_level("error")  # it warns of each STL file
    return sapien


def asset(root: Path, name: str) -> Path:
    """A file of the clone.

    Raises:
        UserError: there is none.
    """
    file = root / name
    if not file.is_file():
        fix = "git clone --recurse-submodules https://github.com/simpler-env/SimplerEnv, and give its folder"
        raise UserError(f"simpler_root={root}: no {name}; {fix}")
    return file


def pose_of(pose: Any) -> Pose:
    """A pose of SAPIEN's as numbers."""
    return np.concatenate([pose.p, pose.q]).astype(float)


def sapien_pose(pose: Any) -> Any:
    return sapien().Pose(np.asarray(pose[:3], np.float32), np.asarray(pose[3:], np.float32))


class Scene:
    """Robot, objects and what they stand on, built for one episode; `environment.py` places them.

    drawn: with pictures; without, no Vulkan driver is needed. gripping: the Google robot's fingers press on
    something; set by its controller.
    """

    def __init__(self, root: Path, episode: Episode, *, drawn: bool = True) -> None:
        physx = sapien().physx
        task = episode.task
        self.root, self.task, self.drawn = root, task, drawn
        self.robot = ROBOTS[task.robot]
        physx.set_scene_config(
            gravity=[0, 0, -9.81],
            bounce_threshold=2.0,
            enable_pcm=False,
            enable_tgs=True,
            enable_ccd=False,
            enable_friction_every_iteration=True,
        )
        physx.set_body_config(
            solver_position_iterations=25, solver_velocity_iterations=1, sleep_threshold=0.005
        )
        physx.set_shape_config(contact_offset=task.contact_offset, rest_offset=0.0)
        physx.set_default_material(1.0, 1.0, 0.0)
        self.physics = physx.PhysxCpuSystem()
        systems = [self.physics] + ([sapien().render.RenderSystem()] if drawn else [])
        self.world = sapien().Scene(systems)
        self.rate = self.robot.rate * self.robot.substeps
        self.world.set_timestep(1 / self.rate)
        self.twist, self.gripping = grip.Twist(self), False
        self.arm = self._load_robot(episode.colours)
        self.cabinet = None if task.stage else self._load_cabinet(episode.look.station)
        if stage := episode.look.stage or task.stage:
            self._load_stage(stage)
        elif drawn:
            self._load_floor()
        self.objects = {placed.model: self._load_object(placed) for placed in episode.objects}
        self.sink = self._load_object(Placed("sink", (0, 0), STILL)) if task.robot == "widowx_sink" else None

    def _articulation(self, file: Path, prepare: Any = None) -> Any:
        loader = self.world.create_urdf_loader()
        loader.load_multiple_collisions_from_file = True
        if not self.drawn:  # the loader would make materials, which need a driver
            build = loader._build_link

            def unseen(link: Any, builder: Any) -> None:
                link.visuals = []
                build(link, builder)

            loader._build_link = unseen
        if prepare is not None:
            prepare(loader)
        builders, _, _ = loader.parse(str(file))
        return builders[0].build(build_mimic_joints=False)  # the official loader knows no mimic joints

    def _load_robot(self, colours: str) -> Any:
        def surfaces(loader: Any) -> None:
            for surface in self.robot.surfaces:
                for link in surface.links:
                    loader.set_link_material(link, surface.static, surface.dynamic, 0.0)
                    loader.set_link_min_patch_radius(link, surface.patch)
                    loader.set_link_patch_radius(link, surface.patch)

        arm = self._articulation(asset(self.root, self.robot.description(colours)), surfaces)
        arm.name = "robot"
        joints = {joint.name: joint for joint in arm.active_joints}
        names = list(joints)
        self.limits = [tuple(map(float, joints[drive.joint].limits[0])) for drive in self.robot.drives]
        self.joints = [joints[drive.joint] for drive in self.robot.drives]
        self.order = [names.index(drive.joint) for drive in self.robot.drives]  # official -> SAPIEN 3's
        for drive, joint in zip(self.robot.drives, self.joints):
            joint.set_friction(0.0)
            joint.set_drive_properties(drive.stiffness, drive.damping, drive.limit, mode="force")
        self.links = {link.name: link for link in arm.links}
        for bit, pair in enumerate(self.robot.apart):
            self.keep_apart(pair, bit)
        if self.robot is GOOGLE:
            grip.prepare(self)
        return arm

    def keep_apart(self, links: Iterable[str], bit: int) -> None:
        """These links don't touch each other. bit: of its own for each such group."""
        for link in links:
            for shape in self.links[link].collision_shapes:
                groups = shape.get_collision_groups()
                groups[2] |= 1 << bit
                shape.set_collision_groups(groups)

    def _load_cabinet(self, station: str) -> Any:
        cabinet = self._articulation(asset(self.root, f"{DATA}/custom/{station}.urdf"))
        cabinet.name = "cabinet"
        cabinet.set_root_pose(sapien_pose((*CABINET, 1, 0, 0, 0)))
        for joint in cabinet.active_joints:
            joint.set_friction(0.05)
            joint.set_drive_properties(0.0, 1.0)
        return cabinet

    def _load_floor(self) -> None:
        """White, to look at only: nothing stands on it."""
        builder = self.world.create_actor_builder()
        builder.add_box_visual(half_size=[10, 10, 0.017], material=sapien().render.RenderMaterial())
        builder.build_kinematic("arena")

    def _load_stage(self, stage: str) -> None:
        """What the table belongs to; around a cabinet only to look at."""
        file = asset(self.root, f"{DATA}/hab2_bench_assets/stages/{stage}.glb")
        pose = sapien_pose((0, 0, 0, 0.707, 0.707, 0, 0))
        if stage in ROOMS:
            pose = sapien_pose(ROOMS[stage]) * pose
        builder = self.world.create_actor_builder()
        if self.task.stage:
            builder.add_nonconvex_collision_from_file(str(file), pose)
        if self.drawn:
            builder.add_visual_from_file(str(file), pose)
        arena = builder.build_static("arena")
        offset = OFFSETS[self.task.robot_kind]
        arena.set_pose(sapien_pose((*(-np.array(offset)), 1, 0, 0, 0)))

    def _load_object(self, placed: Placed) -> Any:
        folder = f"{DATA}/custom/models/{placed.model}"
        body = sapien().physx.PhysxRigidDynamicComponent()
        density = placed.density or self.model(placed.model)["density"]
        for shape in self._convex(asset(self.root, f"{folder}/collision.obj")):
            shape.density = density
            body.attach(shape)
        entity = sapien().Entity()
        entity.name = placed.model
        if self.drawn:
            names = [f"{folder}/textured.{kind}" for kind in ("obj", "dae", "glb")]
            name = next((each for each in names if (self.root / each).is_file()), names[-1])
            look = sapien().render.RenderBodyComponent()
            look.attach(sapien().render.RenderShapeTriangleMesh(str(asset(self.root, name))))
            entity.add_component(look)
        entity.add_component(body)
        self.world.add_entity(entity)
        body.solver_velocity_iterations = 0  # PhysX 5: with 1 an orange rolls 65 mm while it settles
        if placed.model != "sink":
            body.linear_damping = body.angular_damping = 0.1
        return body

    def _convex(self, file: Path) -> list[Any]:
        hull = sapien().physx.PhysxCollisionShapeConvexMesh
        material = sapien().physx.PhysxMaterial(0.5, 0.5, 0.0)
        whole = hull.load_multiple(str(file), [1, 1, 1], material)
        pieces = convex_parts(file)
        # An orange rests on a facet or rolls on, by its last digits: the loader's hulls, where they will do.
        return whole if len(whole) == len(pieces) else [hull(each, [1, 1, 1], material) for each in pieces]

    def model(self, name: str) -> dict[str, Any]:
        """density in kg/m³, and bbox: min and max in m."""
        models = json.loads(asset(self.root, f"{DATA}/custom/{self.task.models}").read_text())
        if name not in models and name in ("sink", "dummy_sink_target_plane"):
            models = json.loads(asset(self.root, f"{DATA}/custom/info_bridge_custom_v0.json").read_text())
        return models[name]

    def joint_places(self) -> np.ndarray:
        """Measured, in the official order, rad or m."""
        return np.asarray(self.arm.qpos, float)[self.order]

    def joint_speeds(self) -> np.ndarray:
        return np.asarray(self.arm.qvel, float)[self.order]

    def drive(self, joint: int, place: float, speed: float = 0.0) -> None:
        """A target of one joint's drive; PhysX 4 kept it within the joint's limits."""
        low, high = self.limits[joint]
        self.joints[joint].set_drive_target(min(max(place, low), high))
        self.joints[joint].set_drive_velocity_target(speed)

    def substep(self) -> None:
        """One step of physics with the arm's weight and its links' own pull taken off."""
        self.arm.set_qf(self.arm.compute_passive_force(gravity=True, coriolis_and_centrifugal=True))
        self.world.step()
        if self.gripping:
            self.twist.resist()

    def place(self, body: Any, pose: Any, locked: list[bool]) -> None:
        """An object at rest at a pose, with some of its six axes locked."""
        body.set_locked_motion_axes(locked)
        body.entity.set_pose(sapien_pose(pose))
        body.set_linear_velocity([0, 0, 0])
        body.set_angular_velocity([0, 0, 0])

    def rest(self, seconds: float) -> None:
        for _ in range(int(self.rate * seconds)):
            self.world.step()

    def stand(self, base: tuple[float, float, float]) -> None:
        """The robot at its start, its base at x, y and yaw."""
        arm = self.arm
        start = np.zeros(arm.dof, np.float32)
        start[self.order] = [drive.start for drive in self.robot.drives]
        arm.set_qpos(start)
        arm.set_qvel(np.zeros(arm.dof, np.float32))
        turn = multiplied(yaw(base[2]), (0, 0, 0, 1))
        arm.set_root_pose(sapien_pose((*base[:2], self.robot.height, *turn)))
        for joint in self.joints:
            joint.set_drive_target(0.0)
            joint.set_drive_velocity_target(0.0)

    def open_drawer(self, by: float) -> None:
        """The task's drawer, in m; the others are closed."""
        assert self.cabinet is not None
        names = [joint.name for joint in self.cabinet.active_joints]
        places = np.zeros(len(names), np.float32)
        places[names.index(f"{self.task.drawer}_drawer_joint")] = by
        self.cabinet.set_qpos(places)
        self.cabinet.set_qvel(np.zeros(len(names), np.float32))

    def drawer(self) -> float:
        """How far the task's drawer is open, m."""
        assert self.cabinet is not None
        names = [joint.name for joint in self.cabinet.active_joints]
        return float(self.cabinet.qpos[names.index(f"{self.task.drawer}_drawer_joint")])

    def contacts(self) -> list[Contact]:
        """Of the last sub-step."""
        found = []
        for contact in self.physics.get_contacts():
            first, second = (body.entity.name for body in contact.bodies)
            impulse = (
                np.sum([point.impulse for point in contact.points], 0) if contact.points else np.zeros(3)
            )
            found.append(Contact(first, second, impulse))
        return found
