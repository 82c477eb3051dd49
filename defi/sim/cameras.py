"""The static and the gripper camera."""

from dataclasses import replace

import numpy as np
import pybullet
from jaxtyping import UInt8

from defi.sim.scene import CameraConfig


class Camera:
    """Draws pictures of a world from a fixed pose, or from a link of the arm."""

    def __init__(self, config: CameraConfig, client: int, body: int, link: str, size: int | None) -> None:
        self.config = replace(config, size=size or config.size)
        self.client, self.body = client, body
        self._projection = pybullet.computeProjectionMatrixFOV(config.fov, 1, config.near, config.far)
        if config.look_from is not None:
            self._view = pybullet.computeViewMatrix(config.look_from, config.look_at, config.up)
        else:
            self._view = None
            names = [
                pybullet.getJointInfo(body, joint, physicsClientId=client)[12].decode()
                for joint in range(pybullet.getNumJoints(body, physicsClientId=client))
            ]
            self._link = names.index(link)

    def _mounted_view(self) -> tuple[float, ...]:
        """The camera link looks along its y axis, with −z up."""
        state = pybullet.getLinkState(self.body, self._link, physicsClientId=self.client)
        position, quaternion = state[:2]
        rotation = np.reshape(pybullet.getMatrixFromQuaternion(quaternion), (3, 3))
        return pybullet.computeViewMatrix(position, position + rotation[:, 1], -rotation[:, 2])

    def render(self) -> UInt8[np.ndarray, "H W 3"]:
        """One RGB picture."""
        size = self.config.size
        image = pybullet.getCameraImage(
            size,
            size,
            self._view or self._mounted_view(),
            self._projection,
            flags=pybullet.ER_NO_SEGMENTATION_MASK,
            physicsClientId=self.client,
        )
        return np.reshape(image[2], (size, size, 4))[..., :3].astype(np.uint8)
