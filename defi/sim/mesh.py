"""Bodies made by code: small textured meshes (Wavefront) on links in URDF, and the joints between them.

PyBullet's software renderer pays for every pixel of every face that it draws, hidden or not: a part therefore
names the faces that a camera can see. Lengths in metres, colours RGB in [0, 1]. Functions that return URDF
text add the meshes and textures that it refers to to `files`: name -> content.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from defi.sim.scene import Vector

Polygon = tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "3"]]  # corners, counterclockwise; normal
Range = tuple[float, float]
Files = dict[str, bytes]

FACES = {"-x": (0, -1), "+x": (0, 1), "-y": (1, -1), "+y": (1, 1), "-z": (2, -1), "+z": (2, 1)}
ALL_FACES = " ".join(FACES)
FREE = "-x +x -y +z"  # the faces that a camera may see of a part that stands free
TEXTURE_SIZE = 64  # pixels
TEXTURE_SPAN = 0.5  # metres that one repetition of the texture covers
CONTRAST = 0.2


@dataclass(frozen=True)
class Material:
    """A colour, and how it varies: "plain", "wood" (grain along x), "planks" or "speckle"."""

    color: Vector
    pattern: str = "plain"

    def texture(self) -> UInt8[np.ndarray, "64 64 3"]:
        """The pattern as a tile that repeats without a seam."""
        size = TEXTURE_SIZE
        v, u = np.mgrid[0:size, 0:size] / size
        rng = np.random.default_rng(0)
        shade = np.zeros((size, size))
        if self.pattern == "wood":
            wave = np.sin(2 * np.pi * (6 * v + 0.35 * np.sin(2 * np.pi * u) + 0.2 * np.sin(4 * np.pi * v)))
            shade = 0.7 * wave + 0.3 * rng.uniform(-1, 1, (size, 1))
        elif self.pattern == "planks":
            shade = rng.uniform(-0.6, 0.8, 6)[(v * 6).astype(int)] - 1.2 * ((v * 6) % 1 < 0.12)
        elif self.pattern == "speckle":
            shade = np.kron(rng.uniform(-1, 1, (size // 2, size // 2)), np.ones((2, 2)))
        color = np.asarray(self.color) * (1 + CONTRAST * shade[..., None])
        return (np.clip(color, 0, 1) * 255).astype(np.uint8)

    def files(self, stem: str) -> dict[str, bytes]:
        """The Wavefront material `surface` and, for a pattern, its texture."""
        if self.pattern == "plain":
            return {f"{stem}.mtl": b"newmtl surface\nKd 1 1 1\n"}
        png = BytesIO()
        Image.fromarray(self.texture()).save(png, "PNG")
        material = f"newmtl surface\nKd 1 1 1\nmap_Kd {stem}.png\n"
        return {f"{stem}.mtl": material.encode(), f"{stem}.png": png.getvalue()}


def box(center: Vector, size: Vector, faces: str = ALL_FACES) -> list[Polygon]:
    """A box along the axes, of which only the named faces are drawn."""
    middle, half = np.asarray(center), np.asarray(size) / 2
    polygons = []
    for axis, sign in map(FACES.get, faces.split()):
        normal, across = sign * np.eye(3)[axis], np.eye(3)[(axis + 1) % 3]
        along = np.cross(normal, across)
        corners = [normal + a * across + b * along for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        polygons.append((middle + half * np.array(corners), normal))
    return polygons


def prism(
    center: Vector, radius: float, length: float, axis: str = "z", *, sides: int = 10, bottom: bool = True
) -> list[Polygon]:
    """A regular prism along an axis, with or without its lower end."""
    angle = 2 * np.pi * (np.arange(sides) + 0.5) / sides
    circle = np.stack([np.cos(angle), np.sin(angle), np.zeros(sides)], axis=1)
    shift = "xyz".index(axis) + 1
    ring, up = np.roll(radius * circle, shift, axis=1), np.roll([0.0, 0.0, 1.0], shift)
    low, high = ring + center - up * length / 2, ring + center + up * length / 2
    polygons = []
    for i, j in zip(range(sides), [*range(1, sides), 0]):
        middle = ring[i] + ring[j]
        polygons.append((np.stack([low[i], low[j], high[j], high[i]]), middle / np.linalg.norm(middle)))
    return [*polygons, (high, up), *([(low[::-1], -up)] if bottom else [])]


def ball(center: Vector, radius: float, *, sides: int = 10) -> list[Polygon]:
    """A ball of rings of quadrilaterals."""
    polar, angle = np.linspace(0, np.pi, sides // 2 + 1)[:, None], np.linspace(0, 2 * np.pi, sides + 1)
    x, y = np.sin(polar) * np.cos(angle), np.sin(polar) * np.sin(angle)
    points = np.stack([x, y, np.broadcast_to(np.cos(polar), x.shape)], axis=-1)
    polygons = []
    for i, j in np.ndindex(sides // 2, sides):
        corners = np.stack([points[i + 1, j], points[i + 1, j + 1], points[i, j + 1], points[i, j]])
        normal = corners.mean(0) / np.linalg.norm(corners.mean(0))
        polygons.append((np.asarray(center) + radius * corners, normal))
    return polygons


def wavefront(polygons: Sequence[Polygon], material: str) -> bytes:
    """A Wavefront file drawn in `<material>.mtl`; texture coordinates are the two across the normal."""
    lines: dict[str, list[str]] = {"v": [], "vt": [], "vn": [], "f": []}
    for number, (corners, normal) in enumerate(polygons, start=1):
        across = [axis for axis in range(3) if axis != np.argmax(np.abs(normal))]
        first = len(lines["v"]) + 1
        lines["v"] += ["v {:.5f} {:.5f} {:.5f}".format(*corner) for corner in corners]
        lines["vt"] += ["vt {:.4f} {:.4f}".format(*corner[across] / TEXTURE_SPAN) for corner in corners]
        lines["vn"].append("vn {:.4f} {:.4f} {:.4f}".format(*normal))
        for k in range(first + 1, first + len(corners) - 1):
            lines["f"].append("f " + " ".join(f"{v}/{v}/{number}" for v in (first, k, k + 1)))
    return "\n".join([f"mtllib {material}.mtl", "usemtl surface", *sum(lines.values(), []), ""]).encode()


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
