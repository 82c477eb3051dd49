"""The Google robot's gripper on SAPIEN 3, whose solver (PhysX 5) does not hold things as SAPIEN 2's did.

Measured against recorded grasps of the official environment, three things differ:
- Torsional friction of a contact patch has no effect (radius 0, 0.1 and 2 m give the same numbers): a can
  that is held at one point on either side turns about the line between them and slips out. `Twist` does it.
- A finger presses with a fifth of its drive's torque on SAPIEN 2 (the recorded impulses say so), and with all
  of it on SAPIEN 3, which moves the arm. The drives are weakened; free fingers are light and follow still.
- Fingers that press on each other throw the whole arm: they don't touch, and stop where the tips would meet.
"""

from typing import TYPE_CHECKING

import numpy as np

from defi.benchmarks.simpler.poses import matrix, multiplied

if TYPE_CHECKING:
    from defi.benchmarks.simpler.scene import Scene

WEAKER = 0.05  # 0.2 gives the recorded impulses, but moves a hand that holds by 4 mm, and loses cans
ARMATURE = 0.0005  # kg m², of a finger's joint: without, light fingers on a hard drive disturb the arm
TIPS_MEET = 1.0732  # rad
LAG = 0.02  # rad behind its plan: something is in a finger's way
PATCH, FRICTION = 0.1, 1.25  # m, and the mean of a finger's and an object's friction


def prepare(scene: "Scene") -> None:
    """Change the fingers' joints and collisions, once they are loaded."""
    for drive, joint in zip(scene.robot.drives, scene.joints):
        if "finger" in drive.joint:
            joint.set_drive_properties(
                drive.stiffness * WEAKER, drive.damping * WEAKER, drive.limit, mode="force"
            )
            joint.set_armature([ARMATURE])
            joint.set_limits([[joint.limits[0][0], TIPS_MEET]])
    scene.keep_apart([name for name in scene.links if "finger" in name], bit=31)


class Twist:
    """Friction against turning about the line between the places where two sides hold an object.

    The torque is summed up from sub-step to sub-step until the object stands still relative to the hand,
    and is at most what the friction of a patch can be.
    """

    def __init__(self, scene: "Scene") -> None:
        self.scene = scene
        self.turned: dict[str, np.ndarray] = {}  # relative to the hand, one sub-step ago
        self.impulses: dict[str, float] = {}

    def resist(self) -> None:
        """After a sub-step: the torques of the next one."""
        hand = np.asarray(self.scene.links["link_gripper"].entity.pose.q, float)
        held = self._held()
        for name, body in self.scene.objects.items():
            turned = multiplied(hand * (1, -1, -1, -1), body.entity.pose.q)
            before, self.turned[name] = self.turned.get(name), turned
            if before is None or len(held.get(name, {})) < 2:
                self.impulses[name] = 0.0
                continue
            (left, push), (right, pull) = (held[name][side] for side in ("left", "right"))
            axis = (left - right) / np.linalg.norm(left - right)
            change = multiplied(turned, before * (1, -1, -1, -1))
            spin = 2 * np.sign(change[0]) * matrix(hand) @ change[1:] @ axis * self.scene.rate
            frame = matrix(multiplied(body.entity.pose.q, body.cmass_local_pose.q))
            inertia = np.square(axis @ frame) @ body.inertia
            most = FRICTION * PATCH * (push + pull)
            # Half: it answers late, and must not swing.
            impulse = float(np.clip(self.impulses[name] - 0.5 * inertia * spin, -most, most))
            self.impulses[name] = impulse
            body.add_force_torque([0, 0, 0], axis * impulse * self.scene.rate)

    def _held(self) -> dict[str, dict[str, tuple[np.ndarray, float]]]:
        """Per object and side: where it is pressed on [3], m, and the impulse, N s."""
        points: dict[str, dict[str, list[tuple[np.ndarray, float]]]] = {}
        for contact in self.scene.physics.get_contacts():
            names = [body.entity.name for body in contact.bodies]
            if names[0] not in self.scene.objects:
                names.reverse()
            if names[0] not in self.scene.objects or "finger" not in names[1]:
                continue
            side = points.setdefault(names[0], {}).setdefault(names[1].split("_")[-1], [])
            pushes = [
                (np.asarray(each.position, float), float(np.linalg.norm(each.impulse)))
                for each in contact.points
            ]
            side += [(place, push) for place, push in pushes if push > 1e-6]
        return {
            name: {
                side: (
                    np.average([place for place, _ in each], 0, [push for _, push in each]),
                    sum(p for _, p in each),
                )
                for side, each in sides.items()
                if each
            }
            for name, sides in points.items()
        }
