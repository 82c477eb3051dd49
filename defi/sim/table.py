"""The built-in play table and its blocks: URDF text and meshes made by code.

Joints, links, ranges and directions are those of CALVIN's table: the slide moves along −x (0 … 0.28 m), the
drawer along −y (0 … 0.22 m), the button down (0 … 0.02 m), the switch up and back (0 … 0.088 m). The parts
are made for a gripper that points down: a handle to hook from above, a knob to push sideways, a lever to push
back and to press down, a wide button. Lengths in metres, in world coordinates.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from defi.sim.mesh import ALL_FACES, Color, Material, Mesh, Vector, mtl, visual_urdf

TOP = 0.44  # height of the table top
FRONT, BACK = -0.18, 0.20  # y of the table's edges
HALF_WIDTH = 0.44
SHELF = (-0.38, 0.18, 0.02, 0.165)  # x and y range of the plank behind the slide
WALL_TOP = 0.56
DOOR_WIDTH = 0.28
SWITCH_TRAVEL = 0.088
SWITCH_AXIS = (0.0, 0.5, float(np.sqrt(0.75)))
LEVER = (0.085, 0.10, 0.055)  # size of the switch's lever
KNOB = (0.06, 0.05, 0.09)  # size of the slide's knob: width, reach, height
HANDLE_GAP = 0.09  # between the drawer's front and the bar of its handle
HANDLE_TOP = 0.405
DRAWER_FRONT = -0.185
BUTTON_HEIGHT = 0.04
BLOCK_HEIGHT = 0.04
UNSEEN_BELOW = "-x +x -y +z"


@dataclass(frozen=True)
class TableSpec:
    """Places, sizes and colours of one table.

    `button` is the centre of the button's foot, `switch` the middle of the lever's front edge in its lower
    position. A part whose y lies in front of the table's edge stands on a bracket.
    """

    top: Material
    wall: Material
    door: Material
    drawer: Material
    plank: Color
    knob: Color
    handle: Color
    lever: Color
    button_color: Color
    button: Vector
    switch: Vector
    knob_offset: float  # from the middle of the door, along x
    drawer_x: float
    led_x: float
    bulb_x: float
    button_radius: float = 0.04
    handle_width: float = 0.2
    slide_x: float = -0.1  # left edge of the closed door

    def grips(self) -> dict[str, Vector]:
        """Joint name -> where it is worked, with all joints at 0.

        The middle of the knob, the top of the gap behind the handle, the button's top, the lower front edge
        of the lever.
        """
        x, y, z = self.button
        return {
            "base__slide": (
                self.slide_x + DOOR_WIDTH / 2 + self.knob_offset,
                0.025 - KNOB[1] / 2,
                TOP + 0.12,
            ),
            "base__drawer": (self.drawer_x, DRAWER_FRONT - HANDLE_GAP / 2, HANDLE_TOP),
            "base__button": (x, y, z + BUTTON_HEIGHT),
            "base__switch": self.switch,
        }


@dataclass(frozen=True)
class Shape:
    """One collision box or cylinder of a link, in the link's frame."""

    center: Vector
    size: tuple[float, ...]  # box: three edges; cylinder: radius and length along z

    def urdf(self) -> str:
        numbers = " ".join(f"{value:.5f}" for value in self.size)
        if len(self.size) == 3:
            geometry = f'<box size="{numbers}"/>'
        else:
            geometry = f'<cylinder radius="{self.size[0]:.5f}" length="{self.size[1]:.5f}"/>'
        origin = " ".join(f"{value:.5f}" for value in self.center)
        return f'<collision><origin xyz="{origin}" rpy="0 0 0"/><geometry>{geometry}</geometry></collision>'


def slab(x: tuple[float, float], y: tuple[float, float], z: tuple[float, float]) -> tuple[Vector, Vector]:
    """Centre and size of the box between the given ranges."""
    low, high = np.array([x, y, z]).T
    return tuple((low + high) / 2), tuple(high - low)


@dataclass
class Link:
    """A link: what is drawn, what collides, and how heavy it is (0: static)."""

    name: str
    meshes: list[Mesh]
    shapes: list[Shape]
    mass: float
    friction: float = 0.5

    def files(self) -> Iterable[tuple[str, bytes]]:
        """The meshes' files, with texture where the material has a pattern."""
        for number, mesh in enumerate(self.meshes):
            stem = f"{self.name}_{number}"
            yield f"{stem}.obj", mesh.obj(f"{stem}.mtl").encode()
            if mesh.material.pattern == "plain":
                yield f"{stem}.mtl", b"newmtl surface\nKd 1 1 1\n"
            else:
                yield f"{stem}.mtl", mtl(f"{stem}.png").encode()
                yield f"{stem}.png", mesh.material.png()

    def urdf(self) -> str:
        parts = [
            f'<link name="{self.name}">',
            f'<contact><lateral_friction value="{self.friction}"/></contact>',
            f'<inertial><mass value="{self.mass}"/>'
            '<inertia ixx="1" ixy="0" ixz="0" iyy="1" iyz="0" izz="1"/></inertial>',
        ]
        for number, mesh in enumerate(self.meshes):
            color = mesh.material.color if mesh.material.pattern == "plain" else (1.0, 1.0, 1.0)
            parts.append(visual_urdf(f"{self.name}_{number}", color))
        return "\n".join([*parts, *(shape.urdf() for shape in self.shapes), "</link>"])


def joint(name: str, child: str, origin: Vector, axis: Vector | None = None, upper: float = 0) -> str:
    """A joint on the base link: prismatic along `axis` from 0 to `upper`, or fixed without an axis."""
    xyz = " ".join(f"{value:.5f}" for value in origin)
    lines = [
        f'<joint name="{name}" type="{"prismatic" if axis else "fixed"}">',
        f'<origin xyz="{xyz}" rpy="0 0 0"/><parent link="base_link"/><child link="{child}"/>',
    ]
    if axis:
        direction = " ".join(f"{value:.6f}" for value in axis)
        lines.append(f'<axis xyz="{direction}"/><limit lower="0" upper="{upper}" effort="0" velocity="0"/>')
    return "\n".join([*lines, "</joint>"])


def _base(spec: TableSpec) -> Link:
    left, right, near, far = SHELF
    top, wall = Mesh(spec.top), Mesh(spec.wall)
    dark = Mesh(Material(tuple(0.35 * value for value in spec.top.color)))
    boxes = [
        slab((-HALF_WIDTH, HALF_WIDTH), (FRONT, near), (TOP - 0.04, TOP)),
        slab((right, HALF_WIDTH), (near, BACK), (TOP - 0.04, TOP)),
        slab((-HALF_WIDTH, left), (near, BACK), (TOP - 0.04, TOP)),
        slab((left, right), (far, BACK), (TOP - 0.04, TOP)),
    ]
    back = slab((-HALF_WIDTH, HALF_WIDTH), (far + 0.01, BACK), (TOP, WALL_TOP))
    top.box(*slab((-HALF_WIDTH, HALF_WIDTH), (FRONT, near), (TOP - 0.04, TOP)), "+z -y +x")
    top.box(*slab((right, HALF_WIDTH), (near, far + 0.01), (TOP - 0.04, TOP)), "+z +x")
    top.box(*slab((-HALF_WIDTH, left), (near, far + 0.01), (TOP - 0.04, TOP)), "+z")
    wall.box(*back, "+z -y +x")
    for x in (-HALF_WIDTH + 0.025, HALF_WIDTH - 0.025):
        boxes.append(slab((x - 0.025, x + 0.025), (FRONT, FRONT + 0.05), (0, TOP - 0.04)))
    wall.box(*boxes[-1], "-y +x")
    wall.box(*slab((HALF_WIDTH - 0.05, HALF_WIDTH), (BACK - 0.05, BACK), (0, TOP - 0.04)), "-y +x")
    wall.box(*boxes[-2], "-y +x")
    dark.box(
        *slab((spec.drawer_x - 0.19, spec.drawer_x + 0.19), (FRONT + 0.004, 0), (0.28, TOP - 0.04)), "-y"
    )
    for x, y, z, width in ((*spec.switch, LEVER[0]), (*spec.button, 2 * spec.button_radius)):
        if y < FRONT:
            bracket = slab((x - width / 2, x + width / 2), (y - 0.045, FRONT), (z - 0.03, z))
            if z == spec.switch[2]:
                bracket = slab((x - 0.02, x + 0.02), (y + LEVER[1], FRONT), (z - 0.03, TOP - 0.005))
            wall.box(*bracket, UNSEEN_BELOW)
            boxes.append(bracket)
    return Link("base_link", [top, wall, dark], [Shape(*box) for box in [*boxes, back]], 0, 0.7)


def _button(spec: TableSpec) -> Link:
    radius = spec.button_radius
    mesh = Mesh(Material(spec.button_color)).prism((0, 0, BUTTON_HEIGHT / 2), radius, BUTTON_HEIGHT, sides=14)
    return Link("button_link", [mesh], [Shape((0, 0, BUTTON_HEIGHT / 2), (radius, BUTTON_HEIGHT))], 0.15)


def _switch(spec: TableSpec) -> Link:
    lever = (0, LEVER[1] / 2, LEVER[2] / 2), LEVER
    mesh = Mesh(Material(spec.lever)).box(*lever, UNSEEN_BELOW)
    return Link("switch_link", [mesh], [Shape(*lever)], 0.24, 0.1)


def _slide(spec: TableSpec) -> Link:
    door = slab((0, DOOR_WIDTH), (0.0, 0.015), (0.003, 0.16))
    x = DOOR_WIDTH / 2 + spec.knob_offset
    knob = slab((x - KNOB[0] / 2, x + KNOB[0] / 2), (-KNOB[1], 0), (0.075, 0.075 + KNOB[2]))
    meshes = [Mesh(spec.door).box(*door, "-y +z +x"), Mesh(Material(spec.knob)).box(*knob, UNSEEN_BELOW)]
    return Link("slide_link", meshes, [Shape(*door), Shape(*knob)], 1.5, 0.3)


def _drawer(spec: TableSpec) -> Link:
    floor = slab((-0.155, 0.155), (-0.005, 0.205), (0.0, 0.015))
    walls = [
        slab((-0.165, -0.15), (-0.005, 0.205), (0, 0.085)),
        slab((0.15, 0.165), (-0.005, 0.205), (0, 0.085)),
        slab((-0.165, 0.165), (0.2, 0.215), (0, 0.085)),
    ]
    front = slab((-0.18, 0.18), (-0.015, 0.0), (-0.01, 0.105))
    half, bar = spec.handle_width / 2, -0.015 - HANDLE_GAP
    low, high = HANDLE_TOP - 0.055 - 0.295, HANDLE_TOP - 0.295
    handle = [
        slab((-half - 0.02, half + 0.02), (bar - 0.025, bar), (low, high)),
        slab((-half - 0.02, -half), (bar, -0.015), (low, high)),
        slab((half, half + 0.02), (bar, -0.015), (low, high)),
    ]
    wood, grip = Mesh(spec.drawer), Mesh(Material(spec.handle))
    wood.box(*floor, "+z").box(*walls[0], "+x +z").box(*walls[1], "-x +x +z").box(*walls[2], "-y")
    wood.box(*front, UNSEEN_BELOW)
    for box in handle:
        grip.box(*box, UNSEEN_BELOW)
    shapes = [Shape(*box) for box in (floor, *walls, front, *handle)]
    return Link("drawer_link", [wood, grip], shapes, 4.2, 0.5)


def _lights() -> list[Link]:
    white = Material((1.0, 1.0, 1.0))
    led = slab((-0.075, 0.075), (-0.02, 0.02), (0, 0.04))
    bulb = Mesh(white).ball((0, 0, 0.045), 0.045)
    return [
        Link("led_link", [Mesh(white).box(*led, "-x +x -y +z")], [Shape(*led)], 0.2),
        Link("light_link", [bulb], [Shape((0, 0, 0.045), (0.02, 0.09))], 0.2),
    ]


def _plank(spec: TableSpec) -> Link:
    left, right, near, far = SHELF
    plank = slab((left, right), (near, far), (-0.02, 0))
    return Link("plank_link", [Mesh(Material(spec.plank)).box(*plank, "+z")], [Shape(*plank)], 2.8)


def table_files(spec: TableSpec) -> dict[str, bytes]:
    """The table's files: `table.urdf` and its meshes and textures."""
    led, light = _lights()
    links = [_base(spec), _button(spec), _switch(spec), _slide(spec), _drawer(spec), led, light, _plank(spec)]
    joints = [
        joint("base__button", "button_link", spec.button, (0, 0, -1), 0.02),
        joint("base__switch", "switch_link", spec.switch, SWITCH_AXIS, SWITCH_TRAVEL),
        joint("base__slide", "slide_link", (spec.slide_x, 0.025, TOP), (-1, 0, 0), 0.28),
        joint("base__drawer", "drawer_link", (spec.drawer_x, DRAWER_FRONT + 0.015, 0.295), (0, -1, 0), 0.22),
        joint("base__led", "led_link", (spec.led_x, 0.2, WALL_TOP)),
        joint("base__light", "light_link", (spec.bulb_x, 0.195, WALL_TOP)),
        joint("base__plank", "plank_link", (0, 0, TOP)),
    ]
    body = "\n".join([*(link.urdf() for link in links), *joints])
    files = {"table.urdf": f'<?xml version="1.0"?>\n<robot name="playtable">\n{body}\n</robot>\n'.encode()}
    for link in links:
        files.update(link.files())
    return files


def block_files(name: str, color: Color, length: float) -> dict[str, bytes]:
    """`<name>.urdf` and its mesh: a block 4 cm high and wide, `length` m along its x axis."""
    size = (length, BLOCK_HEIGHT, BLOCK_HEIGHT)
    mesh = Mesh(Material(color)).box((0, 0, 0), size, ALL_FACES)
    link = Link(name, [mesh], [Shape((0, 0, 0), size)], 0.5, 0.7)
    urdf = f'<?xml version="1.0"?>\n<robot name="{name}">\n{link.urdf()}\n</robot>\n'
    return {f"{name}.urdf": urdf.encode(), **dict(link.files())}


def plane_files() -> dict[str, bytes]:
    """`plane.urdf`: the ground. Drawing all of it would cost much, so only a speck is drawn."""
    mesh = Mesh(Material((1.0, 1.0, 1.0))).box((0, 0, -0.01), (0.01, 0.01, 0.01), "+z")
    link = Link("plane", [mesh], [Shape((0, 0, -5), (200, 200, 10))], 0, 1.0)
    return {
        "plane.urdf": f'<?xml version="1.0"?>\n<robot name="plane">\n{link.urdf()}\n</robot>\n'.encode(),
        **dict(link.files()),
    }
