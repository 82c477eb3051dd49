"""The built-in arm: PyBullet's Panda (joints, masses, collision meshes), long fingers, drawn with few faces.

Link and joint numbers, the TCP and the gripper camera are those of CALVIN's `panda_longer_finger.urdf`: TCP
link 15, 14 cm before the hand; finger joints 9 and 11; the camera link looks along its y axis.
"""

import re
from pathlib import Path

import pybullet_data

from defi.sim.mesh import Color, Material, Mesh, visual_urdf

FINGER_LENGTH = 0.0964  # metres, from the hand's finger joints to the tips
FINGER_WIDTH = 0.024


def _drawn(color: Color, hand: Color, finger: Color, tip: Color) -> dict[str, Mesh]:
    """What is drawn for each link, in the link's frame: round joints and limbs."""
    body = Material(color)
    half = FINGER_LENGTH / 2
    return {
        "panda_link0": Mesh(body).box((-0.04, 0, -0.05), (0.22, 0.19, 0.38), "-y +x +z"),
        "panda_link1": Mesh(body)
        .prism((0, 0, -0.09), 0.055, 0.2)
        .prism((0, -0.04, 0), 0.055, 0.19, axis="y"),
        "panda_link2": Mesh(body).prism((0, -0.1, 0), 0.05, 0.19, axis="y", bottom=True),
        "panda_link3": Mesh(body)
        .prism((0, 0, -0.06), 0.05, 0.13, bottom=True)
        .prism((0.0825, 0.03, 0), 0.055, 0.17, axis="y", bottom=True),
        "panda_link4": Mesh(body)
        .prism((0, 0, 0.03), 0.055, 0.17, bottom=True)
        .prism((-0.0825, 0.06, 0), 0.05, 0.13, axis="y", bottom=True),
        "panda_link5": Mesh(body)
        .prism((0, 0, -0.16), 0.05, 0.2, bottom=True)
        .box((0, 0.06, -0.1), (0.09, 0.06, 0.3)),
        "panda_link6": Mesh(body)
        .prism((0, 0, 0), 0.05, 0.1, bottom=True)
        .box((0.06, 0.02, 0), (0.12, 0.1, 0.09)),
        "panda_link7": Mesh(body).prism((0, 0, 0.08), 0.05, 0.055, bottom=True),
        "panda_hand": Mesh(Material(hand)).box((0, 0, 0.03), (0.063, 0.2, 0.07)),
        "panda_leftfinger": Mesh(Material(finger)).box((0, 0.011, half), (0.02, 0.02, FINGER_LENGTH)),
        "panda_rightfinger": Mesh(Material(finger)).box((0, -0.011, half), (0.02, 0.02, FINGER_LENGTH)),
        "finger_left_tip": Mesh(Material(tip)).box((0, 0.011, -0.0125), (0.026, 0.024, 0.027)),
        "finger_right_tip": Mesh(Material(tip)).box((0, -0.011, -0.0125), (0.026, 0.024, 0.027)),
    }


def _fixed_link(
    child: str, parent: str, xyz: str, *, rpy: str = "0 0 0", mass: float, visual: str = ""
) -> str:
    return (
        f'<joint name="{child}_joint" type="fixed"><origin xyz="{xyz}" rpy="{rpy}"/>'
        f'<parent link="{parent}"/><child link="{child}"/></joint>'
        f'<link name="{child}"><inertial><mass value="{mass}"/>'
        '<inertia ixx="0.1" ixy="0" ixz="0" iyy="0.1" iyz="0" izz="0.1"/></inertial>'
        f"{visual}</link>"
    )


def _finger_collision(side: int) -> str:
    return (
        f'<collision><origin xyz="0 {0.01 * side} {FINGER_LENGTH / 2}" rpy="0 0 0"/>'
        f'<geometry><box size="{FINGER_WIDTH} 0.02 {FINGER_LENGTH}"/></geometry></collision>'
    )


def arm_files(color: Color, hand: Color, fingers: Color, tips: Color) -> dict[str, bytes]:
    """`panda.urdf` and its drawn meshes; the collision meshes stay where pybullet_data is installed."""
    root = Path(pybullet_data.getDataPath()) / "franka_panda"
    text = (root / "panda.urdf").read_text()
    text = re.sub(r"<visual>.*?</visual>", "", text, flags=re.S).replace("package://", f"{root}/")
    drawn = _drawn(color, hand, fingers, tips)
    for name, mesh in drawn.items():
        text = text.replace(
            f'<link name="{name}">', f'<link name="{name}">{visual_urdf(name, mesh.material.color)}'
        )
    for side, name in ((1, "panda_leftfinger"), (-1, "panda_rightfinger")):
        pattern = rf'(<link name="{name}">.*?)<collision>.*?</collision>'
        text = re.sub(pattern, lambda m, s=side: m[1] + _finger_collision(s), text, flags=re.S)
    extra = [
        _fixed_link("gripper_cam", "panda_hand", "-0.1 0 0", rpy="1.3 0 -1.57", mass=0.2),
        _fixed_link("tcp", "panda_hand", "0 0 0.14", mass=0.00001),
    ]
    for side in ("left", "right"):
        tip = f"finger_{side}_tip"
        visual = visual_urdf(tip, drawn[tip].material.color)
        finger = f"panda_{side}finger"
        extra.append(_fixed_link(tip, finger, f"0 0 {FINGER_LENGTH}", mass=0.0001, visual=visual))
    files = {"panda.urdf": text.replace("</robot>", "\n".join(extra) + "\n</robot>").encode()}
    for name, mesh in drawn.items():
        files[f"{name}.obj"] = mesh.obj("plain.mtl").encode()
    return files | {"plain.mtl": b"newmtl surface\nKd 1 1 1\n"}
