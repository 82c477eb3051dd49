"""Poses as arrays [7]: x, y, z in metres, then a unit quaternion w, x, y, z."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Pose = NDArray[np.float64]


def multiplied(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """The turn `second`, then `first`: quaternions [4]."""
    a, b, c, d = np.asarray(first, float)
    w, x, y, z = np.asarray(second, float)
    return np.array(
        [
            a * w - b * x - c * y - d * z,
            a * x + b * w + c * z - d * y,
            a * y - b * z + c * w + d * x,
            a * z + b * y - c * x + d * w,
        ]
    )


def matrix(quaternion: ArrayLike) -> np.ndarray:
    """The rotation [3, 3] of a quaternion, which need not be of length 1."""
    w, x, y, z = np.asarray(quaternion, float) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def turn_of(vector: ArrayLike) -> np.ndarray:
    """The quaternion of a rotation vector [3], in radians."""
    vector = np.asarray(vector, float)
    angle = float(np.linalg.norm(vector))
    return np.array([np.cos(angle / 2), *(vector * (0.5 * np.sinc(angle / (2 * np.pi))))])


def composed(first: ArrayLike, second: ArrayLike) -> Pose:
    """`second`, given in the frame of `first`, as what `first` is given in."""
    first, second = np.asarray(first, float), np.asarray(second, float)
    return np.concatenate([first[:3] + matrix(first[3:]) @ second[:3], multiplied(first[3:], second[3:])])


def inverse(pose: ArrayLike) -> Pose:
    pose = np.asarray(pose, float)
    turn = pose[3:] * (1, -1, -1, -1) / np.dot(pose[3:], pose[3:])
    return np.concatenate([-(matrix(turn) @ pose[:3]), turn])


def vector_of(quaternion: ArrayLike) -> np.ndarray:
    """The rotation vector [3] of a unit quaternion, in radians, of length π at most."""
    w, *rest = np.asarray(quaternion, float)
    length = float(np.linalg.norm(rest))
    if length < 1e-12:
        return np.zeros(3)
    return np.array(rest) * (2 * np.arctan2(np.copysign(length, w), abs(w)) / length)
