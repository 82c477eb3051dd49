"""Small textured meshes, made by code and written as Wavefront files.

PyBullet's software renderer pays for every pixel of every face that it draws, hidden or not: a part therefore
names the faces that a camera can see. Lengths in metres, colours RGB in [0, 1].
"""

from dataclasses import dataclass, field
from io import BytesIO

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

Vector = tuple[float, float, float]
Color = tuple[float, float, float]

FACES = {"-x": (0, -1), "+x": (0, 1), "-y": (1, -1), "+y": (1, 1), "-z": (2, -1), "+z": (2, 1)}
ALL_FACES = "-x +x -y +y -z +z"
TEXTURE_SIZE = 64  # pixels
TEXTURE_SPAN = 0.5  # metres that one repetition of the texture covers


@dataclass(frozen=True)
class Material:
    """A colour, and how it varies: "plain", "wood" (grain along x), "planks", "checker" or "speckle"."""

    color: Color
    pattern: str = "plain"
    contrast: float = 0.2

    def texture(self) -> UInt8[np.ndarray, "64 64 3"]:
        """The pattern as a tile that repeats without a seam."""
        size = TEXTURE_SIZE
        v, u = np.mgrid[0:size, 0:size] / size
        rng = np.random.default_rng(0)
        if self.pattern == "wood":
            wave = np.sin(2 * np.pi * (6 * v + 0.35 * np.sin(2 * np.pi * u) + 0.2 * np.sin(4 * np.pi * v)))
            shade = 0.7 * wave + 0.3 * rng.uniform(-1, 1, (size, 1))
        elif self.pattern == "planks":
            plank = (v * 6).astype(int)
            seam = (v * 6) % 1 < 0.12
            shade = rng.uniform(-0.6, 0.8, 6)[plank] - 1.2 * seam
        elif self.pattern == "checker":
            shade = np.where(((u * 8).astype(int) + (v * 8).astype(int)) % 2, 1.0, -1.0)
        elif self.pattern == "speckle":
            shade = np.kron(rng.uniform(-1, 1, (size // 2, size // 2)), np.ones((2, 2)))
        else:
            shade = np.zeros((size, size))
        color = np.asarray(self.color) * (1 + self.contrast * shade[..., None])
        return (np.clip(color, 0, 1) * 255).astype(np.uint8)

    def png(self) -> bytes:
        """The texture, compressed."""
        buffer = BytesIO()
        Image.fromarray(self.texture()).save(buffer, "PNG")
        return buffer.getvalue()


@dataclass
class Mesh:
    """Flat polygons with a normal each, in one material. Build it with `box`, `prism` and `ball`."""

    material: Material
    polygons: list[tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "3"]]] = field(default_factory=list)

    def box(self, center: Vector, size: Vector, faces: str = ALL_FACES) -> "Mesh":
        """A box along the axes, of which only the named faces are drawn."""
        middle, half = np.asarray(center, float), np.asarray(size, float) / 2
        for name in faces.split():
            axis, sign = FACES[name]
            normal, across = np.zeros(3), np.zeros(3)
            normal[axis], across[(axis + 1) % 3] = sign, 1
            along = np.cross(normal, across)
            corners = [normal + a * across + b * along for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
            self.polygons.append((middle + half * np.array(corners), normal))
        return self

    def prism(
        self, center: Vector, radius: float, length: float, *, axis: str = "z", sides: int = 10, bottom=False
    ) -> "Mesh":
        """A regular prism along an axis, drawn without its lower end unless `bottom`."""
        index = "xyz".index(axis)
        order = [(index + 1) % 3, (index + 2) % 3, index]
        angle = 2 * np.pi * (np.arange(sides) + 0.5) / sides
        ring = np.zeros((sides, 3))
        ring[:, order[0]], ring[:, order[1]] = radius * np.cos(angle), radius * np.sin(angle)
        end = np.zeros(3)
        end[index] = length / 2
        low, high = ring + np.asarray(center) - end, ring + np.asarray(center) + end
        for i in range(sides):
            j = (i + 1) % sides
            middle = ring[i] + ring[j]
            self.polygons.append(
                (np.stack([low[i], low[j], high[j], high[i]]), middle / np.linalg.norm(middle))
            )
        self.polygons.append((high, end / np.linalg.norm(end)))
        if bottom:
            self.polygons.append((low[::-1], -end / np.linalg.norm(end)))
        return self

    def ball(self, center: Vector, radius: float, *, sides: int = 10) -> "Mesh":
        """A ball of rings of quadrilaterals."""
        rings = sides // 2
        polar = np.linspace(0, np.pi, rings + 1)
        angle = 2 * np.pi * np.arange(sides) / sides
        points = np.stack(
            [
                np.outer(np.sin(polar), np.cos(angle)),
                np.outer(np.sin(polar), np.sin(angle)),
                np.outer(np.cos(polar), np.ones(sides)),
            ],
            axis=-1,
        )
        for r in range(rings):
            for i in range(sides):
                j = (i + 1) % sides
                corners = np.stack([points[r + 1, i], points[r + 1, j], points[r, j], points[r, i]])
                normal = corners.mean(0) / np.linalg.norm(corners.mean(0))
                self.polygons.append((np.asarray(center) + radius * corners, normal))
        return self

    def obj(self, mtl: str) -> str:
        """The Wavefront text; texture coordinates are the two coordinates across the normal."""
        vertices, coordinates, normals, faces = [], [], [], []
        for corners, normal in self.polygons:
            across = [axis for axis in range(3) if axis != np.argmax(np.abs(normal))]
            first = len(vertices) + 1
            normals.append("vn {:.4f} {:.4f} {:.4f}".format(*normal))
            for corner in corners:
                vertices.append("v {:.5f} {:.5f} {:.5f}".format(*corner))
                coordinates.append("vt {:.4f} {:.4f}".format(*(corner[across] / TEXTURE_SPAN)))
            for k in range(1, len(corners) - 1):
                triangle = (first, first + k, first + k + 1)
                faces.append("f " + " ".join(f"{v}/{v}/{len(normals)}" for v in triangle))
        head = [f"mtllib {mtl}", "usemtl surface"]
        return "\n".join(head + vertices + coordinates + normals + faces) + "\n"


def mtl(texture: str) -> str:
    """A Wavefront material library with one textured material."""
    return f"newmtl surface\nKd 1 1 1\nmap_Kd {texture}\n"


def visual_urdf(stem: str, color: Color) -> str:
    """A URDF <visual> of the mesh `<stem>.obj`, which lies beside the URDF file."""
    rgba = " ".join(f"{value:.4f}" for value in (*color, 1))
    return (
        f'<visual><geometry><mesh filename="{stem}.obj"/></geometry>'
        f'<material name="{stem}"><color rgba="{rgba}"/></material></visual>'
    )
