"""A play table world: load, reset, step with relative actions, observe, render on request.

What a rollout needs of a simulator is the public methods of `World`; `defi.sim.official` has them too.
"""

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
from jaxtyping import Float, UInt8

from defi.errors import UserError
from defi.sim.arm import Arm
from defi.sim.bullet import Bullet, pybullet
from defi.sim.cameras import Camera
from defi.sim.fixtures import Fixtures
from defi.sim.judge import BlockState, Contact, JudgeState
from defi.sim.scene import BlockConfig, SceneConfig

PHYSICS_RATE = 240  # Hz
CONTROL_RATE = 30  # Hz
SUBSTEPS = PHYSICS_RATE // CONTROL_RATE
GRAVITY = -9.8
RELOADS = 8  # into one physics server: a new OpenGL context takes 0.5 s, but each load leaves 12 MB in it
Pose = tuple[Sequence[float], Sequence[float]]  # position, Euler angles


class World(AbstractContextManager):
    """Robot, blocks, table and plane in a physics server of their own. A context manager.

    Bullet's order of contacts decides every later collision. It depends on the order and the poses in which
    bodies are loaded, and on everything simulated since: only `reload` forgets the past.

    Args:
        cameras: which of the scene's cameras `render` draws.
        renderer: "cpu", or "egl" for OpenGL without a display.
        static_size, gripper_size: pixels; None: the scene's own.
    """

    def __init__(
        self,
        scene: SceneConfig,
        *,
        cameras: Sequence[str] = ("static", "gripper"),
        renderer: str = "cpu",
        static_size: int | None = None,
        gripper_size: int | None = None,
    ) -> None:
        given = {"static": static_size, "gripper": gripper_size}
        sizes = {
            name: given[name] if given[name] is not None else scene.cameras[name].size for name in cameras
        }
        self.scene, self._sizes, self._renderer = scene, sizes, renderer
        self._connect()

    def reload(self) -> None:
        """Load everything anew: exactly a newly made world."""
        if self._loads < RELOADS:
            self._load()
        else:
            self._bullet.close()
            self._connect()

    def _connect(self) -> None:
        """A new physics server, and everything in it."""
        self._bullet, self._loads = Bullet(self._renderer), 0
        self._load()
        if self._renderer == "egl":
            self.render()  # the first picture of a new OpenGL context lacks the shadows

    def _load(self) -> None:
        bullet, scene = self._bullet, self.scene
        self._loads += 1
        bullet.setPhysicsEngineParameter(deterministicOverlappingPairs=1)
        bullet.setTimeStep(1 / PHYSICS_RATE)
        bullet.resetSimulation()  # after the parameters: what it keeps of them is part of the physics
        bullet.setGravity(0, 0, GRAVITY)
        self._rng = np.random.default_rng(scene.seed)
        self.arm = Arm(scene.arm, bullet)
        self.blocks = {
            block.name: bullet.load(block.urdf, *self._block_pose(block), globalScaling=scene.scale)
            for block in scene.blocks
        }
        self.table = Fixtures(scene.table, bullet, scene.scale)
        bullet.load(scene.plane, (0, 0, 0), (0, 0, 0))
        self.cameras = {
            name: Camera(scene.cameras[name], size, bullet, self.arm) for name, size in self._sizes.items()
        }

    def _block_pose(self, block: BlockConfig) -> Pose:
        """Drawn where the scene does not give it."""
        position, euler = block.position, block.euler
        if position == "any":
            surface = self._rng.choice(list(self.scene.surfaces))
            position = self._rng.uniform(*self.scene.surfaces[surface])
        if euler == "any":
            euler = self._rng.uniform([0, 0, -np.pi], [0, 0, np.pi])
        return position, euler

    def reset(
        self,
        robot_obs: Float[np.ndarray, "15"] | None = None,
        scene_obs: Float[np.ndarray, "24"] | None = None,
    ) -> None:
        """Put robot and scene in the given states. None: at rest; all off and closed, blocks drawn anew."""
        if scene_obs is None:
            self.table.reset()
            self._scatter_blocks()
        else:
            self.table.reset(scene_obs[:4], scene_obs[4:6])
            poses = np.reshape(scene_obs[6:], (len(self.blocks), 2, 3))
            self._put_blocks([tuple(pose) for pose in poses])
        self.arm.reset(robot_obs)
        self._bullet.stepSimulation()
        self.table.refresh()

    def _put_blocks(self, poses: Sequence[Pose]) -> None:
        for body, (position, euler) in zip(self.blocks.values(), poses):
            quaternion = pybullet.getQuaternionFromEuler(euler)
            self._bullet.resetBasePositionAndOrientation(body, position, quaternion)

    def _scatter_blocks(self) -> None:
        """Draw the blocks' poses until none touches another."""
        for _ in range(1000):
            self._put_blocks([self._block_pose(block) for block in self.scene.blocks])
            self._bullet.stepSimulation()
            pairs = itertools.combinations(self.blocks.values(), 2)
            if not any(self._bullet.getContactPoints(*pair) for pair in pairs):
                return
        raise UserError(f"scene {self.scene.name}: no free place for the blocks; enlarge its surfaces")

    def step(self, action: Float[np.ndarray, "7"]) -> None:
        """One control step (1/30 s): [dx, dy, dz]/0.02 m, [droll, dpitch, dyaw]/0.05 rad, gripper ±1."""
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,) or not np.isfinite(action).all() or abs(action[6]) != 1:
            raise UserError(f"action {action}: must be 7 finite numbers, the last of them 1 or −1")
        self.arm.act(action)
        for _ in range(SUBSTEPS):
            self._bullet.stepSimulation()
        self.table.update()

    def robot_obs(self) -> Float[np.ndarray, "15"]:
        """TCP xyz, TCP Euler, finger width, 7 joints, last gripper action."""
        return self.arm.observe()

    def scene_obs(self) -> Float[np.ndarray, "24"]:
        """Slide, drawer, button, switch, bulb, LED, then xyz and Euler per block in the scene's order."""
        poses = []
        for body in self.blocks.values():
            position, quaternion = self._bullet.getBasePositionAndOrientation(body)
            poses += [*position, *pybullet.getEulerFromQuaternion(quaternion)]
        return np.array([*self.table.positions, *self.table.lights.values(), *poses])

    def state(self) -> JudgeState:
        """What the judge looks at."""
        slide, drawer, _, _ = self.table.positions
        return JudgeState(
            robot=self.arm.body,
            table=self.table.body,
            links=self.table.links,
            blocks={name: self._block_state(body) for name, body in self.blocks.items()},
            doors={"base__slide": slide, "base__drawer": drawer},
            lights=dict(self.table.lights),
            robot_contacts=self._contacts(self.arm.body),
        )

    def _block_state(self, body: int) -> BlockState:
        pose, velocity = self._bullet.getBasePositionAndOrientation(body), self._bullet.getBaseVelocity(body)
        return BlockState(body, *pose, *velocity, self._contacts(body))

    def _contacts(self, body: int) -> frozenset[Contact]:
        return frozenset((point[2], point[4]) for point in self._bullet.getContactPoints(body))

    def render(self) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """A picture per camera: rgb_static, rgb_gripper."""
        return {f"rgb_{name}": camera.render() for name, camera in self.cameras.items()}

    def close(self) -> None:
        """Free the memory of the physics; the world cannot be used after that."""
        self._bullet.close()

    def __exit__(self, *_: object) -> None:
        self.close()
