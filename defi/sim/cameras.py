"""The static and the gripper camera."""

import numpy as np
from jaxtyping import UInt8

from defi.errors import UserError
from defi.sim.bullet import Bullet, pybullet
from defi.sim.scene import ArmConfig, CameraConfig


class Camera:
    """Draws square pictures of `size` pixels from a fixed pose, or from a link of the arm `body`."""

    def __init__(self, config: CameraConfig, size: int, bullet: Bullet, arm: ArmConfig, body: int) -> None:
        if size < 1:
            raise UserError(f"camera size {size}: must be 1 pixel or more")
        self.size, self._bullet, self._body = size, bullet, body
        self._projection = pybullet.computeProjectionMatrixFOV(config.fov, 1, config.near, config.far)
        self._view = None
        if config.look_from is not None:
            self._view = pybullet.computeViewMatrix(config.look_from, config.look_at, config.up)
            return
        joints = range(bullet.getNumJoints(body))
        links = [bullet.getJointInfo(body, joint)[12].decode() for joint in joints]
        if arm.camera_link not in links:
            raise UserError(f"{arm.urdf}: has no link {arm.camera_link} for the gripper camera")
        self._link = links.index(arm.camera_link)

    def _mounted_view(self) -> tuple[float, ...]:
        """The camera link looks along its y axis, with −z up."""
        position, quaternion = self._bullet.getLinkState(self._body, self._link)[:2]
        rotation = np.reshape(pybullet.getMatrixFromQuaternion(quaternion), (3, 3))
        return pybullet.computeViewMatrix(position, position + rotation[:, 1], -rotation[:, 2])

    def render(self) -> UInt8[np.ndarray, "H W 3"]:
        """One RGB picture."""
        image = self._bullet.getCameraImage(
            self.size,
            self.size,
            self._view or self._mounted_view(),
            self._projection,
            flags=pybullet.ER_NO_SEGMENTATION_MASK,
        )
        return np.reshape(image[2], (self.size, self.size, 4))[..., :3].copy()
