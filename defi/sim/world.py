"""A play table world: load, reset, step with relative actions, observe, render on request.

What a rollout needs of a simulator is the public methods of `World`; `defi.sim.official` has them too.
"""

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
from jaxtyping import Float, UInt8

from defi.errors import UserError, reading
from defi.sim.arm import Arm
from defi.sim.bullet import Bullet, pybullet
from defi.sim.judge import BlockState, Contact, JudgeState
from defi.sim.scene import BlockConfig, SceneConfig, TableConfig

PHYSICS_RATE = 240  # Hz
CONTROL_RATE = 30  # Hz
SUBSTEPS = PHYSICS_RATE // CONTROL_RATE
GRAVITY = -9.8
RELOADS = 8  # into one physics server: a new OpenGL context takes 0.5 s, but each load leaves 12 MB in it
TABLE_FORCE = 4  # of the motors of the table's joints
JOINTS = ("base__slide", "base__drawer", "base__button", "base__switch")
BUTTON, SWITCH = 2, 3  # places in JOINTS
LIGHT_LINKS = {"lightbulb": "light_link", "led": "led_link"}
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
        self.scene, self._renderer, self._sizes = scene, renderer, {}
        given = {"static": static_size, "gripper": gripper_size}
        for name in cameras:
            self._sizes[name] = size = scene.cameras[name].size if given[name] is None else given[name]
            if size < 1:
                raise UserError(f"camera size {size}: must be 1 pixel or more")
        self._connect()

    def reload(self) -> None:
        """Load everything again: exactly a newly made world."""
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
        self._views = {}  # fixed ones, or the link of the arm that the camera is on
        for name in self._sizes:
            camera = scene.cameras[name]
            if camera.look_from is not None:
                pose = camera.look_from, camera.look_at, camera.up
                self._views[name] = pybullet.computeViewMatrix(*pose)
            else:
                links = {info[12].decode(): info[0] for info in bullet.joints(self.arm.body)}
                with reading(scene.arm.urdf, f"the gripper camera is on its link {camera.link}"):
                    self._views[name] = links[camera.link]

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
        """Put robot and scene in the given states. None: at rest; all off, closed, blocks at random."""
        if scene_obs is None:
            self.table.reset()
            self._scatter_blocks()
        else:
            self.table.reset(scene_obs[:4], scene_obs[4:6])
            self._put_blocks(np.reshape(scene_obs[6:], (len(self.blocks), 2, 3)))
        self.arm.reset(robot_obs)
        self._bullet.stepSimulation()
        self.table.refresh()

    def _put_blocks(self, poses: Sequence[Pose] | Float[np.ndarray, "blocks 2 3"]) -> None:
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
        bullet, blocks = self._bullet, {}

        def contacts(body: int) -> frozenset[Contact]:
            return frozenset((point[2], point[4]) for point in bullet.getContactPoints(body))

        for name, body in self.blocks.items():
            pose, velocity = bullet.getBasePositionAndOrientation(body), bullet.getBaseVelocity(body)
            blocks[name] = BlockState(body, *pose, *velocity, contacts(body))
        return JudgeState(
            robot=self.arm.body,
            table=self.table.body,
            links=self.table.links,
            blocks=blocks,
            doors=dict(zip(JOINTS[:2], self.table.positions)),
            lights=dict(self.table.lights),
            robot_contacts=contacts(self.arm.body),
        )

    def render(self) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """A picture per camera: rgb_static, rgb_gripper."""
        pictures = {}
        for name, size in self._sizes.items():
            camera, view = self.scene.cameras[name], self._views[name]
            if camera.look_from is None:  # it looks along its link's y axis, with −z up
                position, quaternion = self._bullet.getLinkState(self.arm.body, view)[:2]
                rotation = np.reshape(pybullet.getMatrixFromQuaternion(quaternion), (3, 3))
                view = pybullet.computeViewMatrix(position, position + rotation[:, 1], -rotation[:, 2])
            projection = pybullet.computeProjectionMatrixFOV(camera.fov, 1, camera.near, camera.far)
            flags = pybullet.ER_NO_SEGMENTATION_MASK
            image = self._bullet.getCameraImage(size, size, view, projection, flags=flags)[2]
            pictures[f"rgb_{name}"] = np.reshape(image, (size, size, 4))[..., :3].copy()
        return pictures

    def close(self) -> None:
        """Free the memory of the physics; the world cannot be used after that."""
        self._bullet.close()

    def __exit__(self, *_: object) -> None:
        self.close()


class Fixtures:
    """The table: slide, drawer, a button that toggles the LED, a switch that lights the bulb.

    `positions` holds the joints (slide, drawer, button, switch) as last read by `refresh`; `links` maps the
    table's link names to indices; `lights` (lightbulb, led) are 0 or 1.
    """

    def __init__(self, config: TableConfig, bullet: Bullet, scale: float) -> None:
        self.config, self._bullet = config, bullet
        self.body = bullet.load(config.urdf, config.position, config.euler, globalScaling=scale)
        infos = bullet.joints(self.body)
        self.links = {info[12].decode(): info[0] for info in infos} | {"base_link": -1}
        index = {info[1].decode(): info[0] for info in infos}
        with reading(config.urdf, "it is not a play table"):
            self._joints = [index[name] for name in JOINTS]
        self._middle = [sum(infos[joint][8:10]) / 2 for joint in self._joints]
        for joint, name in zip(self._joints, JOINTS):
            mode = pybullet.POSITION_CONTROL if name == "base__button" else pybullet.VELOCITY_CONTROL
            bullet.setJointMotorControl2(self.body, joint, mode, force=TABLE_FORCE)  # to 0, in either mode
        self.lights = dict.fromkeys(LIGHT_LINKS, 0)
        self._switch_on = False
        self.refresh()
        self._was_pressed = self._past_middle(BUTTON)

    def refresh(self) -> None:
        """Read the joints."""
        self.positions = [state[0] for state in self._bullet.getJointStates(self.body, self._joints)]

    def _past_middle(self, joint: int) -> bool:
        return self.positions[joint] > self._middle[joint]

    def reset(self, joints: Sequence[float] = (0, 0, 0, 0), lights: Sequence[float] = (0, 0)) -> None:
        """Set the joints and lights (bulb, LED). Whether the button *was* pressed survives."""
        for joint, position in zip(self._joints, joints):
            self._bullet.resetJointState(self.body, joint, position)
        for name, on in zip(self.lights, lights):
            self._set_light(name, int(on))
        self._switch_on = False

    def update(self) -> None:
        """After each action: let the button and the switch work on their lights."""
        self.refresh()
        pressed, on = self._past_middle(BUTTON), self._past_middle(SWITCH)
        if pressed and not self._was_pressed:
            self._set_light("led", 1 - self.lights["led"])
        if on != self._switch_on:
            self._set_light("lightbulb", int(on))
        self._was_pressed, self._switch_on = pressed, on

    def _set_light(self, name: str, on: int) -> None:
        self.lights[name] = on
        color = self.config.light_colors[name] if on else self.config.off_color
        self._bullet.changeVisualShape(self.body, self.links[LIGHT_LINKS[name]], rgbaColor=color)
