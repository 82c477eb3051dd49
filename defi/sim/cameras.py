"""The static and the gripper camera."""

import numpy as np
from jaxtyping import UInt8

from defi.errors import UserError, reading
from defi.sim.arm import Arm
from defi.sim.bullet import Bullet, pybullet
from defi.sim.scene import CameraConfig


class Camera:
    """Draws square pictures of `size` pixels from a fixed pose, or from the link of the arm that it is on."""

    def __init__(self, config: CameraConfig, size: int, bullet: Bullet, arm: Arm) -> None:
        if size < 1:
            raise UserError(f"camera size {size}: must be 1 pixel or more")
        self.size, self._bullet, self._arm = size, bullet, arm.body
        self._projection = pybullet.computeProjectionMatrixFOV(config.fov, 1, config.near, config.far)
        self._view = None
        if config.look_from is not None:
            self._view = pybullet.computeViewMatrix(config.look_from, config.look_at, config.up)
        else:
            links = {info[12].decode(): info[0] for info in bullet.joints(arm.body)}
            with reading(arm.config.urdf, f"the gripper camera is on its link {config.link}"):
                self._link = links[config.link]

    def _mounted_view(self) -> tuple[float, ...]:
        """The camera link looks along its y axis, with −z up."""
        position, quaternion = self._bullet.getLinkState(self._arm, self._link)[:2]
        rotation = np.reshape(pybullet.getMatrixFromQuaternion(quaternion), (3, 3))
        return pybullet.computeViewMatrix(position, position + rotation[:, 1], -rotation[:, 2])

    def render(self) -> UInt8[np.ndarray, "H W 3"]:
        """One RGB picture."""
        view, flags = self._view or self._mounted_view(), pybullet.ER_NO_SEGMENTATION_MASK
        image = self._bullet.getCameraImage(self.size, self.size, view, self._projection, flags=flags)
        return np.reshape(image[2], (self.size, self.size, 4))[..., :3].copy()
