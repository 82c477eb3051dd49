"""Robots in URDF: links made of parts that are drawn, collide, or both, and the joints between them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from defi.sim.mesh import Material, Polygon, Vector, box, wavefront

Range = tuple[float, float]
SEEN_FROM_ABOVE = "-x +x -y +z"  # the faces that a camera sees of a part in front of it


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


def cuboid(
    x: Range,
    y: Range,
    z: Range,
    material: Material | None = None,
    faces: str = SEEN_FROM_ABOVE,
    *,
    solid=True,
) -> Part:
    """The box between the ranges; drawn if it has a material, colliding if `solid`."""
    center = tuple((high + low) / 2 for low, high in (x, y, z))
    size = tuple(high - low for low, high in (x, y, z))
    return Part(material, box(center, size, faces) if material else (), center, size if solid else ())


@dataclass(frozen=True)
class Link:
    """A rigid body. Mass in kg, 0: static; the same inertia about x, y and z."""

    name: str
    parts: Sequence[Part] = ()
    mass: float = 0
    friction: float = 0.5
    inertia: float = 1

    def _meshes(self) -> Iterable[tuple[str, Material, list[Polygon]]]:
        """Per material: name of the files, material, what is drawn in it."""
        drawn: dict[Material, list[Polygon]] = {}
        for part in self.parts:
            if part.material:
                drawn.setdefault(part.material, []).extend(part.polygons)
        for number, (material, polygons) in enumerate(drawn.items()):
            yield f"{self.name}_{number}", material, polygons

    def files(self) -> dict[str, bytes]:
        """The files that `visuals` refers to."""
        files = {}
        for stem, material, polygons in self._meshes():
            files |= {f"{stem}.obj": wavefront(polygons, stem)} | material.files(stem)
        return files

    def visuals(self) -> str:
        """URDF of what is drawn."""
        text = []
        for stem, material, _ in self._meshes():
            color = material.color if material.pattern == "plain" else (1, 1, 1)
            geometry = f'<geometry><mesh filename="{stem}.obj"/></geometry>'
            color = f'<material name="{stem}"><color rgba="{_numbers((*color, 1), 4)}"/></material>'
            text.append(f"<visual>{geometry}{color}</visual>")
        return "\n".join(text)

    def urdf(self) -> str:
        collisions = "\n".join(part.collision() for part in self.parts if part.size)
        return f"""<link name="{self.name}">
<contact><lateral_friction value="{self.friction}"/></contact>
<inertial><mass value="{self.mass}"/>
<inertia ixx="{self.inertia}" ixy="0" ixz="0" iyy="{self.inertia}" iyz="0" izz="{self.inertia}"/></inertial>
{self.visuals()}
{collisions}
</link>"""


def joint(
    parent: str, child: str, origin: Vector, *, rpy: Vector = (0, 0, 0), axis: Vector | None = None, upper=0.0
) -> str:
    """`<parent>__<child>`, both without "_link": prismatic along `axis` from 0 to `upper` m, else fixed."""
    name = f"{parent.removesuffix('_link')}__{child.removesuffix('_link')}"
    limits = (
        f'<axis xyz="{_numbers(axis or (), 6)}"/><limit lower="0" upper="{upper}" effort="0" velocity="0"/>'
    )
    return f"""<joint name="{name}" type="{"prismatic" if axis else "fixed"}">
<origin xyz="{_numbers(origin)}" rpy="{_numbers(rpy)}"/><parent link="{parent}"/><child link="{child}"/>
{limits if axis else ""}
</joint>"""


def robot_files(name: str, links: Sequence[Link], joints: Sequence[str] = ()) -> dict[str, bytes]:
    """`<name>.urdf` and the files that it refers to."""
    body = "\n".join([*(link.urdf() for link in links), *joints])
    files = {f"{name}.urdf": f'<?xml version="1.0"?>\n<robot name="{name}">\n{body}\n</robot>\n'.encode()}
    for link in links:
        files |= link.files()
    return files


def _numbers(values: Iterable[float], digits: int = 5) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)
