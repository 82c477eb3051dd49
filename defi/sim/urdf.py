"""Robots in URDF: links made of parts that are drawn, collide, or both, and the joints between them.

The functions return URDF text and add the meshes and textures that it refers to to a dict: name -> content.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from defi.sim.mesh import Material, Polygon, box, wavefront
from defi.sim.scene import Vector

Range = tuple[float, float]
Files = dict[str, bytes]
FREE = "-x +x -y +z"  # the faces that a camera may see of a part that stands free


@dataclass(frozen=True)
class Part:
    """What is drawn of it, and the shape that collides: in the link's frame, in metres.

    `size`: the edges of a box; radius and length along z of a cylinder; or nothing, if it does not collide.
    """

    material: Material | None = None
    polygons: Sequence[Polygon] = ()
    center: Vector = (0, 0, 0)
    size: Sequence[float] = ()

    def collision(self) -> str:
        geometry = f'<box size="{_numbers(self.size)}"/>'
        if len(self.size) == 2:
            geometry = f'<cylinder radius="{self.size[0]:.5f}" length="{self.size[1]:.5f}"/>'
        origin = f'<origin xyz="{_numbers(self.center)}" rpy="0 0 0"/>'
        return f"<collision>{origin}<geometry>{geometry}</geometry></collision>"


def cuboid(x: Range, y: Range, z: Range, material: Material | None = None, faces=FREE, *, solid=True) -> Part:
    """The box between the ranges; drawn if it has a material, colliding if `solid`."""
    center = tuple((high + low) / 2 for low, high in (x, y, z))
    size = tuple(high - low for low, high in (x, y, z))
    return Part(material, box(center, size, faces) if material else (), center, size if solid else ())


def visuals(name: str, parts: Sequence[Part], files: Files) -> str:
    """What is drawn of a link: a mesh per material."""
    meshes: dict[Material, list[Polygon]] = {}
    for part in parts:
        if part.material:
            meshes.setdefault(part.material, []).extend(part.polygons)
    text = ""
    for number, (material, polygons) in enumerate(meshes.items()):
        stem, color = f"{name}_{number}", material.color if material.pattern == "plain" else (1, 1, 1)
        files |= {f"{stem}.obj": wavefront(polygons, stem)} | material.files(stem)
        text += f"""<visual><geometry><mesh filename="{stem}.obj"/></geometry>
<material name="{stem}"><color rgba="{_numbers((*color, 1), 4)}"/></material></visual>"""
    return text


def link(name: str, parts: Sequence[Part], files: Files, mass=0.0, *, friction=0.5, inertia=1.0) -> str:
    """A rigid body. Mass in kg, 0: static; the same inertia about x, y and z."""
    return f"""<link name="{name}">
<contact><lateral_friction value="{friction}"/></contact>
<inertial><mass value="{mass}"/>
<inertia ixx="{inertia}" ixy="0" ixz="0" iyy="{inertia}" iyz="0" izz="{inertia}"/></inertial>
{visuals(name, parts, files)}
{"".join(part.collision() for part in parts if part.size)}
</link>"""


def joint(child: str, origin: Vector, axis=(), upper=0.0, *, parent="base_link", rpy=(0, 0, 0)) -> str:
    """`<parent>__<child>`, both without "_link": prismatic along `axis` from 0 to `upper` m, else fixed."""
    name, kind = f"{parent}__{child}".replace("_link", ""), "prismatic" if axis else "fixed"
    limits = f'<axis xyz="{_numbers(axis, 6)}"/><limit lower="0" upper="{upper}" effort="0" velocity="0"/>'
    return f"""<joint name="{name}" type="{kind}"><parent link="{parent}"/><child link="{child}"/>
<origin xyz="{_numbers(origin)}" rpy="{_numbers(rpy)}"/>{limits if axis else ""}</joint>"""


def robot_files(name: str, elements: Sequence[str], files: Files) -> Files:
    """`files`, and with them `<name>.urdf`, which holds the links and joints."""
    text = "\n".join(['<?xml version="1.0"?>', f'<robot name="{name}">', *elements, "</robot>"])
    return files | {f"{name}.urdf": text.encode()}


def _numbers(values: Iterable[float], digits: int = 5) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)
