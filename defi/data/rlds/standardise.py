"""Actions of Open X-Embodiment's data sets as policies learn them: one meaning for the gripper's number, and
movements that the robot really made.

The rules are Octo's (github.com/octo-models/octo, octo/data/utils/data_utils.py: `binarize_gripper_actions`,
`rel2abs_gripper_actions`, `relabel_actions`), which OpenVLA, UniVLA and DeFI share. All of them are of whole
episodes, before any step is left out.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Float32

OPEN, CLOSED = 0.95, 0.05  # of Bridge's openness: above and below it is meant, between on the way
CHANGES = 0.1  # of fractal's command: less is none
POSE = 6  # numbers of place, roll, pitch and yaw, with which state and actions begin


def binarised(openness: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Openness 0 … 1 of each step → 0 or 1: between, what is reached next; at the end, the last's own."""
    meant = (openness > OPEN) | (openness < CLOSED)
    steps = np.where(meant, np.arange(len(openness)), len(openness) - 1)
    reached = np.minimum.accumulate(steps[::-1])[::-1]
    found = openness[reached]
    return np.where(meant[reached], found > OPEN, found).astype(openness.dtype)


def accumulated(closing: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Changes (1 closes, −1 opens, 0 none) → openness 0 or 1 after each.

    Before the first change the gripper is what that one ends; without any it is open.
    """
    opened = np.where(closing < -CHANGES, 1, np.where(closing > CHANGES, 0, -1))  # −1: no change
    given = np.flatnonzero(opened >= 0)
    if not len(given):
        return np.ones_like(closing)
    last = np.searchsorted(given, np.arange(len(closing)), side="right") - 1
    before = 1 - opened[given[0]]
    return np.where(last < 0, before, opened[given[last.clip(0)]]).astype(closing.dtype)


def movements(state: Float32[np.ndarray, "N S"]) -> Float32[np.ndarray, "N 6"]:
    """What the pose, with which the state begins, changes by until the next step; at the last step 0.

    Turns are taken the short way. (Octo's difference jumps by 2π where yaw passes π: the statistics that are
    published with its kin have 6.28 as Bridge's largest yaw.)
    """
    moved = np.diff(state[:, :POSE].astype(np.float64), axis=0, append=state[-1:, :POSE])
    moved[:, 3:] = (moved[:, 3:] + np.pi) % (2 * np.pi) - np.pi
    return moved.astype(np.float32)


GRIPPERS: dict[str, Callable[[Float[np.ndarray, " N"]], Float[np.ndarray, " N"]]] = {
    "binarised": binarised,
    "accumulated": accumulated,
}
