"""A play table world: load, reset, step with relative actions, observe, render on request."""

import itertools
from collections.abc import Sequence

import numpy as np
import pybullet
from jaxtyping import Float, UInt8

from defi.sim.arm import Arm
from defi.sim.cameras import Camera
from defi.sim.judge import BlockState, JudgeState
from defi.sim.mechanisms import Mechanisms
from defi.sim.scene import BlockConfig, SceneConfig

PHYSICS_RATE = 240  # Hz
CONTROL_RATE = 30  # Hz
SUBSTEPS = PHYSICS_RATE // CONTROL_RATE
GRAVITY = -9.8


class World:
    """One robot, table and blocks in a physics client of their own. A context manager.

    Loading order and load poses decide the order of contacts, and so every later collision: they follow
    CALVIN's. `reload()` gives the state of a newly made world, whatever was simulated before.
    """

    def __init__(
        self,
        scene: SceneConfig,
        *,
        cameras: Sequence[str] = ("static", "gripper"),
        static_size: int | None = None,
        gripper_size: int | None = None,
    ) -> None:
        self.scene = scene
        self._sizes = {name: {"static": static_size, "gripper": gripper_size}[name] for name in cameras}
        self.client = pybullet.connect(pybullet.DIRECT)
        self.reload()

    def reload(self) -> None:
        """Load everything anew: nothing of the past is left."""
        pybullet.setPhysicsEngineParameter(deterministicOverlappingPairs=1, physicsClientId=self.client)
        pybullet.setTimeStep(1 / PHYSICS_RATE, physicsClientId=self.client)
        pybullet.resetSimulation(physicsClientId=self.client)
        pybullet.setGravity(0, 0, GRAVITY, physicsClientId=self.client)
        scene = self.scene
        self.rng = np.random.default_rng(scene.seed)
        self.arm = Arm(scene.arm, self.client)
        self.blocks = {block.name: self._load_block(block) for block in scene.blocks}
        table = pybullet.loadURDF(
            str(scene.table.urdf),
            scene.table.position,
            pybullet.getQuaternionFromEuler(scene.table.euler),
            globalScaling=scene.scale,
            physicsClientId=self.client,
        )
        self.table = Mechanisms(scene.table, table, self.client)
        pybullet.loadURDF(str(scene.plane), physicsClientId=self.client)
        self.cameras = {
            name: Camera(scene.cameras[name], self.client, self.arm.body, scene.arm.camera_link, size)
            for name, size in self._sizes.items()
        }

    def _load_block(self, block: BlockConfig) -> int:
        position, quaternion = self._block_pose(block)
        return pybullet.loadURDF(
            str(block.urdf),
            position,
            quaternion,
            globalScaling=self.scene.scale,
            physicsClientId=self.client,
        )

    def _block_pose(self, block: BlockConfig) -> tuple[Sequence[float], Sequence[float]]:
        position, euler = block.position, block.euler
        if position is None:
            surface = self.rng.choice(list(self.scene.surfaces))
            position = self.rng.uniform(*self.scene.surfaces[surface])
        if euler is None:
            euler = self.rng.uniform([0, 0, -np.pi], [0, 0, np.pi])
        return position, pybullet.getQuaternionFromEuler(euler)

    def reset(
        self,
        robot_obs: Float[np.ndarray, "15"] | None = None,
        scene_obs: Float[np.ndarray, "24"] | None = None,
    ) -> None:
        """Put robot and scene in the given states (None: at rest; blocks drawn so that they do not touch)."""
        if scene_obs is None:
            self.table.reset()
            self._scatter_blocks()
        else:
            self.table.reset(scene_obs[:4], scene_obs[4:6])
            for body, pose in zip(
                self.blocks.values(), np.split(np.asarray(scene_obs[6:]), len(self.blocks))
            ):
                self._put_block(body, pose[:3], pybullet.getQuaternionFromEuler(pose[3:]))
        self.arm.reset(robot_obs)
        pybullet.stepSimulation(physicsClientId=self.client)
        self.table.refresh()

    def _put_block(self, body: int, position: Sequence[float], quaternion: Sequence[float]) -> None:
        pybullet.resetBasePositionAndOrientation(body, position, quaternion, physicsClientId=self.client)

    def _scatter_blocks(self) -> None:
        bodies = list(self.blocks.values())
        for _ in range(1000):
            for block, body in zip(self.scene.blocks, bodies):
                self._put_block(body, *self._block_pose(block))
            pybullet.stepSimulation(physicsClientId=self.client)
            pairs = itertools.combinations(bodies, 2)
            if not any(pybullet.getContactPoints(*pair, physicsClientId=self.client) for pair in pairs):
                return
        raise ValueError(f"scene {self.scene.name}: no free place for the blocks; enlarge its surfaces")

    def step(self, action: Float[np.ndarray, "7"]) -> None:
        """One control step (1/30 s): [dx, dy, dz]/0.02 m, [droll, dpitch, dyaw]/0.05 rad, gripper ±1."""
        self.arm.act(np.asarray(action, dtype=np.float64))
        for _ in range(SUBSTEPS):
            pybullet.stepSimulation(physicsClientId=self.client)
        self.table.update()

    def robot_obs(self) -> Float[np.ndarray, "15"]:
        """TCP xyz, TCP Euler, finger width, 7 joints, last gripper action."""
        return self.arm.observe()

    def scene_obs(self) -> Float[np.ndarray, "24"]:
        """Slide, drawer, button, switch, bulb, LED, then xyz and Euler per block in the scene's order."""
        poses = []
        for body in self.blocks.values():
            position, quaternion = pybullet.getBasePositionAndOrientation(body, physicsClientId=self.client)
            poses += [*position, *pybullet.getEulerFromQuaternion(quaternion)]
        table = self.table
        return np.array([*table.positions, table.lightbulb, table.led, *poses], dtype=np.float64)

    def state(self) -> JudgeState:
        """What the judge looks at."""
        return JudgeState(
            robot=self.arm.body,
            table=self.table.body,
            links=self.table.links,
            blocks={name: self._block_state(body) for name, body in self.blocks.items()},
            doors={"base__slide": self.table.positions[0], "base__drawer": self.table.positions[1]},
            lights={"lightbulb": self.table.lightbulb, "led": self.table.led},
            robot_contacts=self._contacts(self.arm.body),
        )

    def _block_state(self, body: int) -> BlockState:
        pose = pybullet.getBasePositionAndOrientation(body, physicsClientId=self.client)
        velocity = pybullet.getBaseVelocity(body, physicsClientId=self.client)
        return BlockState(body, *pose, *velocity, contacts=self._contacts(body))

    def _contacts(self, body: int) -> frozenset[tuple[int, int]]:
        points = pybullet.getContactPoints(bodyA=body, physicsClientId=self.client)
        return frozenset((point[2], point[4]) for point in points)

    def render(self) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """A picture per camera: rgb_static, rgb_gripper."""
        return {f"rgb_{name}": camera.render() for name, camera in self.cameras.items()}

    def close(self) -> None:
        """Free the physics client."""
        if self.client >= 0:
            pybullet.disconnect(self.client)
            self.client = -1

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
