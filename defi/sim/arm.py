"""The arm: relative Cartesian actions, inverse kinematics, position motors."""

import numpy as np
import pybullet
from jaxtyping import Float

from defi.sim.scene import ArmConfig

POSITION_STEP = 0.02  # metres per unit of action
ROTATION_STEP = 0.05  # radians per unit of action
FINGER_VELOCITY = 1.0


class Arm:
    """A fixed-base arm in the physics client `client`, steered by its tool centre point (TCP)."""

    def __init__(self, config: ArmConfig, client: int) -> None:
        self.config, self.client = config, client
        self.gripper_action = 1
        self._joints = [*config.arm_joints, *config.finger_joints]
        self.body = pybullet.loadURDF(
            str(config.urdf),
            config.base_position,
            pybullet.getQuaternionFromEuler(config.base_euler),
            useFixedBase=True,
            physicsClientId=client,
        )
        if config.pedestal:
            self._add_pedestal()
        self._couple_fingers()
        dof = pybullet.computeDofCount(self.body, physicsClientId=client)
        rest = [*config.rest_joints, config.finger_limits[1], config.finger_limits[1]]
        self._null_space = ([-7] * dof, [7] * dof, [7] * dof, rest)
        self._lower, self._upper = np.array(config.lower_limits), np.array(config.upper_limits)
        self.reset()

    def _add_pedestal(self) -> None:
        """The drawn cylinder below the base: a body of its own, whose uid shifts those loaded after it."""
        x, y, z = self.config.base_position
        yaw = self.config.base_euler[2]
        shape = pybullet.createVisualShape(
            pybullet.GEOM_CYLINDER,
            radius=0.13,
            length=z,
            rgbaColor=[1, 1, 1, 1],
            visualFramePosition=[x - np.cos(yaw) * 0.05, y - np.sin(yaw) * 0.05, z / 2],
            physicsClientId=self.client,
        )
        pybullet.createMultiBody(baseVisualShapeIndex=shape, physicsClientId=self.client)

    def _couple_fingers(self) -> None:
        left, right = self.config.finger_joints
        gear = pybullet.createConstraint(
            self.body, left, self.body, right, pybullet.JOINT_GEAR,
            [1, 0, 0], [0, 0, 0], [0, 0, 0], physicsClientId=self.client,
        )  # fmt: skip
        pybullet.changeConstraint(gear, gearRatio=-1, erp=0.1, maxForce=50, physicsClientId=self.client)

    def reset(self, robot_obs: Float[np.ndarray, "15"] | None = None) -> None:
        """Put the joints where `robot_obs` says (or at rest) and aim at the TCP that results."""
        config = self.config
        joints = config.rest_joints if robot_obs is None else robot_obs[7:14]
        finger = config.finger_limits[1] if robot_obs is None else robot_obs[6] / 2
        for joint, target in zip(config.arm_joints, joints):
            pybullet.resetJointState(self.body, joint, target, physicsClientId=self.client)
            self._drive(joint, target, config.max_force, config.max_velocity)
        for joint in config.finger_joints:
            pybullet.resetJointState(self.body, joint, finger, physicsClientId=self.client)
            self._drive(joint, finger, config.gripper_force, FINGER_VELOCITY)
        position, quaternion = self.tcp()
        self.target_position = np.array(position)
        self.target_euler = np.array(pybullet.getEulerFromQuaternion(quaternion))

    def _drive(self, joint: int, target: float, force: float, velocity: float) -> None:
        pybullet.setJointMotorControl2(
            self.body,
            joint,
            pybullet.POSITION_CONTROL,
            targetPosition=target,
            force=force,
            maxVelocity=velocity,
            physicsClientId=self.client,
        )

    def act(self, action: Float[np.ndarray, "7"]) -> None:
        """Move the target by the relative action and drive the joints to it."""
        config = self.config
        self.target_position += action[:3] * POSITION_STEP
        self.target_euler += action[3:6] * ROTATION_STEP
        self.gripper_action = int(action[6])
        joints = pybullet.calculateInverseKinematics(
            self.body,
            config.tcp_link,
            self.target_position,
            pybullet.getQuaternionFromEuler(self.target_euler),
            *self._null_space,
            physicsClientId=self.client,
        )
        joints = np.clip(joints[: len(self._lower)], self._lower, self._upper)
        opening = self.gripper_action == 1
        finger = config.finger_limits[1 if opening else 0]
        grip = config.gripper_force / 100 if opening else config.gripper_force
        # The velocity limits that reset() gave each motor stay in force.
        pybullet.setJointMotorControlArray(
            self.body,
            self._joints,
            pybullet.POSITION_CONTROL,
            targetPositions=[*joints, finger, finger],
            forces=[config.max_force] * len(joints) + [grip, grip],
            physicsClientId=self.client,
        )

    def tcp(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Position and quaternion (xyzw) of the tool centre point."""
        return pybullet.getLinkState(self.body, self.config.tcp_link, physicsClientId=self.client)[:2]

    def observe(self) -> Float[np.ndarray, "15"]:
        """TCP xyz, TCP Euler, finger width, 7 joints, last gripper action."""
        position, quaternion = self.tcp()
        states = pybullet.getJointStates(self.body, self._joints, physicsClientId=self.client)
        *joints, left, right = (state[0] for state in states)
        euler = pybullet.getEulerFromQuaternion(quaternion)
        return np.array([*position, *euler, left + right, *joints, self.gripper_action], dtype=np.float64)
