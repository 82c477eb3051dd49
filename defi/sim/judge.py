"""The judge of the 34 tasks: plain data in, yes or no out."""

from collections.abc import Mapping
from dataclasses import dataclass

Contact = tuple[int, int]
"""(body, link) of the other side of a contact."""


@dataclass(frozen=True)
class BlockState:
    """One block: pose (metres, quaternion xyzw), velocities (m/s, rad/s), and what touches it."""

    body: int
    position: tuple[float, float, float]
    quaternion: tuple[float, float, float, float]
    linear_velocity: tuple[float, float, float]
    angular_velocity: tuple[float, float, float]
    contacts: frozenset[Contact]


@dataclass(frozen=True)
class JudgeState:
    """What the judge sees of a world at one time. `links` maps the table's link names to indices."""

    robot: int
    table: int
    links: Mapping[str, int]
    blocks: Mapping[str, BlockState]
    doors: Mapping[str, float]
    lights: Mapping[str, int]
    robot_contacts: frozenset[Contact]
