"""The arm: relative Cartesian actions, inverse kinematics, position motors."""

import numpy as np
from jaxtyping import Float

from defi.sim.bullet import Bullet, pybullet
from defi.sim.scene import ArmConfig

POSITION_STEP = 0.02  # metres per unit of action
ROTATION_STEP = 0.05  # radians per unit of action
FINGER_VELOCITY = 1.0
PEDESTAL_RADIUS = 0.13
NULL_SPACE = 7.0  # limits and range, radians


class Arm:
    """A fixed-base arm, steered by its tool centre point (TCP).

    `target_position` and `target_euler` are where the TCP is to go; `gripper_action` is the last one, 1 open
    or −1 closed, and survives a reset.
    """

    def __init__(self, config: ArmConfig, bullet: Bullet) -> None:
        self.config, self._bullet = config, bullet
        self.gripper_action = 1
        self._joints = [*config.arm_joints, *config.finger_joints]
        self.body = bullet.load(config.urdf, config.base_position, config.base_euler, useFixedBase=True)
        if config.pedestal:  # drawn below; a body of its own, so that those loaded later count from it
            (x, y, z), yaw = config.base_position, config.base_euler[2]
            middle = [x - np.cos(yaw) * 0.05, y - np.sin(yaw) * 0.05, z / 2]
            cylinder = {"radius": PEDESTAL_RADIUS, "length": z, "rgbaColor": [1, 1, 1, 1]}
            shape = bullet.createVisualShape(pybullet.GEOM_CYLINDER, visualFramePosition=middle, **cylinder)
            bullet.createMultiBody(baseVisualShapeIndex=shape)
        axis, origin = [1, 0, 0], [0, 0, 0]
        left, right = config.finger_joints
        ends = self.body, left, self.body, right
        gear = bullet.createConstraint(*ends, pybullet.JOINT_GEAR, axis, origin, origin)
        bullet.changeConstraint(gear, gearRatio=-1, erp=0.1, maxForce=50)  # the fingers move together
        dof = bullet.computeDofCount(self.body)
        limits = [-NULL_SPACE] * dof, [NULL_SPACE] * dof, [NULL_SPACE] * dof
        self._null_space = (*limits, [*config.rest_joints, *[config.finger_limits[1]] * 2])
        self.reset()

    def reset(self, robot_obs: Float[np.ndarray, "15"] | None = None) -> None:
        """Put the joints where `robot_obs` says (None: at rest), and aim at the TCP that results."""
        config = self.config
        joints = config.rest_joints if robot_obs is None else robot_obs[7:14]
        finger = config.finger_limits[1] if robot_obs is None else robot_obs[6] / 2
        for joint, position in zip(self._joints, [*joints, finger, finger]):
            self._bullet.resetJointState(self.body, joint, position)
            motor = {"force": config.max_force, "maxVelocity": config.max_velocity}
            if joint in config.finger_joints:
                motor = {"force": config.gripper_force, "maxVelocity": FINGER_VELOCITY}
            control = self.body, joint, pybullet.POSITION_CONTROL
            self._bullet.setJointMotorControl2(*control, targetPosition=position, **motor)
        position, quaternion = self.tcp()
        self.target_position = np.array(position)
        self.target_euler = np.array(pybullet.getEulerFromQuaternion(quaternion))

    def act(self, action: Float[np.ndarray, "7"]) -> None:
        """Move the target by the relative action and drive the joints to it."""
        config = self.config
        self.target_position += action[:3] * POSITION_STEP
        self.target_euler += action[3:6] * ROTATION_STEP
        self.gripper_action = int(action[6])
        target = self.target_position, pybullet.getQuaternionFromEuler(self.target_euler)
        joints = self._bullet.calculateInverseKinematics(
            self.body, config.tcp_link, *target, *self._null_space
        )
        joints = np.clip(joints[: len(config.arm_joints)], config.lower_limits, config.upper_limits)
        opening = self.gripper_action == 1
        finger = config.finger_limits[1 if opening else 0]
        grip = config.gripper_force / 100 if opening else config.gripper_force
        # One call for all joints; the velocity limits that reset() gave each motor stay in force.
        self._bullet.setJointMotorControlArray(
            self.body,
            self._joints,
            pybullet.POSITION_CONTROL,
            targetPositions=[*joints, finger, finger],
            forces=[*[config.max_force] * len(joints), grip, grip],
        )

    def tcp(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Position and quaternion (xyzw) of the tool centre point."""
        return self._bullet.getLinkState(self.body, self.config.tcp_link)[:2]

    def observe(self) -> Float[np.ndarray, "15"]:
        """TCP xyz, TCP Euler, finger width, 7 joints, last gripper action."""
        position, quaternion = self.tcp()
        euler = pybullet.getEulerFromQuaternion(quaternion)
        states = self._bullet.getJointStates(self.body, self._joints)
        *joints, left, right = (state[0] for state in states)
        return np.array([*position, *euler, left + right, *joints, self.gripper_action])
