"""The built-in arm: PyBullet's Panda (joints, masses, collision meshes), long fingers, drawn with few faces.

Link and joint numbers, the TCP and the gripper camera are those of CALVIN's `panda_longer_finger.urdf`: TCP
link 15, 14 cm before the hand; finger joints 9 and 11; the camera link looks along its y axis.
"""

import re
from functools import cache
from pathlib import Path

import pybullet_data

from defi.sim.mesh import Files, Material, Part, Polygon, box, joint, link, prism, visuals

FINGER_LENGTH = 0.0964  # metres, from the hand's finger joints to the tips
FINGER_WIDTH = 0.024
WHITE, ORANGE, BLACK = Material((0.85, 0.86, 0.9)), Material((1.0, 0.5, 0.0)), Material((0.05, 0.05, 0.05))
MIDDLE = FINGER_LENGTH / 2
FINGER = {1: "panda_leftfinger", -1: "panda_rightfinger"}  # by the sign of y
TIP = {1: "finger_left_tip", -1: "finger_right_tip"}

# What is drawn of each link, in the link's frame.
DRAWN: dict[str, tuple[Material, list[Polygon]]] = {
    "panda_link0": (WHITE, box((-0.04, 0, -0.05), (0.22, 0.19, 0.38), "-y +x +z")),
    "panda_link1": (
        WHITE,
        prism((0, 0, -0.09), 0.055, 0.2, bottom=False) + prism((0, -0.04, 0), 0.055, 0.19, "y", bottom=False),
    ),
    "panda_link2": (WHITE, prism((0, -0.1, 0), 0.05, 0.19, "y")),
    "panda_link3": (WHITE, prism((0, 0, -0.06), 0.05, 0.13) + prism((0.0825, 0.03, 0), 0.055, 0.17, "y")),
    "panda_link4": (WHITE, prism((0, 0, 0.03), 0.055, 0.17) + prism((-0.0825, 0.06, 0), 0.05, 0.13, "y")),
    "panda_link5": (WHITE, prism((0, 0, -0.16), 0.05, 0.2) + box((0, 0.06, -0.1), (0.09, 0.06, 0.3))),
    "panda_link6": (WHITE, prism((0, 0, 0), 0.05, 0.1) + box((0.06, 0.02, 0), (0.12, 0.1, 0.09))),
    "panda_link7": (WHITE, prism((0, 0, 0.08), 0.05, 0.055)),
    "panda_hand": (ORANGE, box((0, 0, 0.03), (0.063, 0.2, 0.07))),
    **{FINGER[s]: (ORANGE, box((0, s * 0.011, MIDDLE), (0.02, 0.02, FINGER_LENGTH))) for s in (1, -1)},
    **{TIP[s]: (BLACK, box((0, s * 0.011, -0.0125), (0.026, 0.024, 0.027))) for s in (1, -1)},
}


@cache
def arm_files() -> Files:
    """`panda.urdf` and its drawn meshes; the collision meshes stay where pybullet_data is installed."""
    root, files = Path(pybullet_data.getDataPath()) / "franka_panda", {}
    text = (root / "panda.urdf").read_text().removesuffix("</robot>\n")
    text = re.sub(r"<visual>.*?</visual>", "", text, flags=re.S).replace("package://", f"{root}/")
    for name, drawn in DRAWN.items():
        start = f'<link name="{name}">'
        text = text.replace(start, start + visuals(name, [Part(*drawn)], files))
    text += joint("gripper_cam", (-0.1, 0, 0), parent="panda_hand", rpy=(1.3, 0, -1.57))
    text += link("gripper_cam", [], files, 0.2, inertia=0.1)
    text += joint("tcp", (0, 0, 0.14), parent="panda_hand")
    text += link("tcp", [], files, 0.00001, inertia=0.1)
    for side, finger in FINGER.items():
        shape = Part(center=(0, side * 0.01, MIDDLE), size=(FINGER_WIDTH, 0.02, FINGER_LENGTH)).collision()
        first = rf'(<link name="{finger}">.*?)<collision>.*?</collision>'
        text = re.sub(first, rf"\1{shape}", text, flags=re.S)
        text += joint(TIP[side], (0, 0, FINGER_LENGTH), parent=finger)
        text += link(TIP[side], [Part(*DRAWN[TIP[side]])], files, 0.0001, inertia=0.1)
    return files | {"panda.urdf": f"{text}</robot>\n".encode()}
