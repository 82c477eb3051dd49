"""Small textured meshes, made by code and written as Wavefront files.

PyBullet's software renderer pays for every pixel of every face that it draws, hidden or not: a part therefore
names the faces that a camera can see. Lengths in metres, colours RGB in [0, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from defi.sim.scene import Vector

Color = tuple[float, float, float]
Polygon = tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "3"]]  # corners, counterclockwise; normal

FACES = {"-x": (0, -1), "+x": (0, 1), "-y": (1, -1), "+y": (1, 1), "-z": (2, -1), "+z": (2, 1)}
ALL_FACES = " ".join(FACES)
TEXTURE_SIZE = 64  # pixels
TEXTURE_SPAN = 0.5  # metres that one repetition of the texture covers
CONTRAST = 0.2


@dataclass(frozen=True)
class Material:
    """A colour, and how it varies: "plain", "wood" (grain along x), "planks" or "speckle"."""

    color: Color
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
