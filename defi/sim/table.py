"""The built-in play table, its blocks and the ground: URDF and meshes made by code.

Joints, links, ranges and directions are those of CALVIN's table: the slide moves along −x (0 … 0.28 m), the
drawer along −y (0 … 0.22 m), the button down (0 … 0.02 m), the switch up and back (0 … 0.088 m). The parts
are made for a gripper that points down: a handle to hook from above, a knob to push sideways, a lever to push
back and to press down, a wide button. Lengths in metres, in world coordinates.
"""

import colorsys
from dataclasses import dataclass

import numpy as np

from defi.sim.mesh import ALL_FACES, Color, Material, ball, prism
from defi.sim.scene import Vector
from defi.sim.urdf import Files, Part, cuboid, joint, link, robot_files

TOP = 0.44  # height of the table top
BOTTOM = TOP - 0.04  # of the table top's board
FRONT, BACK = -0.18, 0.20  # y of the table's edges
HALF_WIDTH = 0.44
SHELF = (-0.38, 0.18, 0.02, 0.165)  # x and y range of the plank behind the slide
WALL_TOP = 0.56
DOOR_WIDTH = 0.28
SLIDE_X = -0.1  # left edge of the closed door
SWITCH_TRAVEL = 0.088
SWITCH_AXIS = (0.0, 0.5, float(np.sqrt(0.75)))
LEVER = (0.085, 0.10, 0.055)  # size of the switch's lever
KNOB = (0.06, 0.05, 0.09)  # size of the slide's knob: width, reach, height
HANDLE_GAP = 0.09  # between the drawer's front and the bar of its handle
HANDLE_TOP = 0.405
DRAWER_FRONT = -0.185
DRAWER_BOTTOM = 0.295
BUTTON_HEIGHT = 0.04
BLOCK_HEIGHT = 0.04
WHITE = Material((1.0, 1.0, 1.0))
HSV = tuple[float, float, float]


@dataclass(frozen=True)
class Design:
    """What tables differ in: colours as hue, saturation, value; patterns; places and sizes in metres.

    `button_place` is the centre of the button's foot, `switch_place` the middle of the lever's front edge in
    its lower position. A part whose y lies in front of the table's edge stands on a bracket.
    """

    top: HSV
    wall: HSV
    door: HSV
    drawer: HSV
    knob: HSV
    handle: HSV
    lever: HSV
    button: HSV
    plank: HSV
    patterns: tuple[str, str]  # of the top and wall, of the door and drawer
    button_place: Vector
    switch_place: Vector
    knob_offset: float  # from the middle of the door, along x
    drawer_x: float
    lengths: tuple[float, float, float]  # of the red, blue and pink block
    button_radius: float = 0.04
    handle_width: float = 0.2

    def material(self, part: str) -> Material:
        """Colour (RGB) and pattern of one of the fields above."""
        large, small = self.patterns
        pattern = {"top": large, "wall": large, "door": small, "drawer": small}.get(part, "plain")
        return Material(colorsys.hsv_to_rgb(*getattr(self, part)), pattern)

    def grips(self) -> dict[str, Vector]:
        """Joint name -> where it is worked, with all joints at 0.

        The middle of the knob, the top of the gap behind the handle, the button's top, the lower front edge
        of the lever.
        """
        x, y, z = self.button_place
        return {
            "base__slide": (SLIDE_X + DOOR_WIDTH / 2 + self.knob_offset, 0.025 - KNOB[1] / 2, TOP + 0.12),
            "base__drawer": (self.drawer_x, DRAWER_FRONT - HANDLE_GAP / 2, HANDLE_TOP),
            "base__button": (x, y, z + BUTTON_HEIGHT),
            "base__switch": self.switch_place,
        }


def _base(design: Design) -> list[Part]:
    left, right, near, far = SHELF
    edge, leg = HALF_WIDTH, HALF_WIDTH - 0.05
    board, legs = (BOTTOM, TOP), (0, BOTTOM)
    top, wall = design.material("top"), design.material("wall")
    dark = Material(tuple(0.35 * value for value in top.color))
    inside = (design.drawer_x - 0.19, design.drawer_x + 0.19)
    parts = [
        cuboid((-edge, edge), (FRONT, near), board, top, "+z -y +x"),
        cuboid((right, edge), (near, BACK), board),
        cuboid((-edge, left), (near, BACK), board),
        cuboid((left, right), (far, BACK), board),
        cuboid((right, edge), (near, far + 0.01), board, top, "+z +x", solid=False),
        cuboid((-edge, left), (near, far + 0.01), board, top, "+z", solid=False),
        cuboid((-edge, -leg), (FRONT, FRONT + 0.05), legs, wall, "-y +x"),
        cuboid((leg, edge), (FRONT, FRONT + 0.05), legs, wall, "-y +x"),
        cuboid((leg, edge), (BACK - 0.05, BACK), legs, wall, "-y +x", solid=False),
        cuboid(inside, (FRONT + 0.004, 0), (0.28, BOTTOM), dark, "-y", solid=False),
    ]
    x, y, z = design.switch_place
    if y < FRONT:
        parts.append(cuboid((x - 0.02, x + 0.02), (y + LEVER[1], FRONT), (z - 0.03, TOP - 0.005), wall))
    x, y, z = design.button_place
    if y < FRONT:
        radius = design.button_radius
        parts.append(cuboid((x - radius, x + radius), (y - 0.045, FRONT), (z - 0.03, z), wall))
    back = cuboid((-edge, edge), (far + 0.01, BACK), (TOP, WALL_TOP), wall, "+z -y +x")
    return [*parts, back]


def _slide(design: Design) -> list[Part]:
    x, (width, reach, height) = DOOR_WIDTH / 2 + design.knob_offset, KNOB
    sides, heights = (x - width / 2, x + width / 2), (0.075, 0.075 + height)
    return [
        cuboid((0, DOOR_WIDTH), (0, 0.015), (0.003, 0.16), design.material("door"), "-y +z +x"),
        cuboid(sides, (-reach, 0), heights, design.material("knob")),
    ]


def _drawer(design: Design) -> list[Part]:
    wood, grip = design.material("drawer"), design.material("handle")
    depth, walls, gap = (-0.005, 0.205), (0, 0.085), (-0.015 - HANDLE_GAP, -0.015)
    half, rim = design.handle_width / 2, design.handle_width / 2 + 0.02
    heights = (HANDLE_TOP - 0.055 - DRAWER_BOTTOM, HANDLE_TOP - DRAWER_BOTTOM)
    return [
        cuboid((-0.155, 0.155), depth, (0, 0.015), wood, "+z"),
        cuboid((-0.165, -0.15), depth, walls, wood, "+x +z"),
        cuboid((0.15, 0.165), depth, walls, wood, "-x +x +z"),
        cuboid((-0.165, 0.165), (0.2, 0.215), walls, wood, "-y"),
        cuboid((-0.18, 0.18), (-0.015, 0), (-0.01, 0.105), wood),
        cuboid((-rim, rim), (gap[0] - 0.025, gap[0]), heights, grip),
        cuboid((-rim, -half), gap, heights, grip),
        cuboid((half, rim), gap, heights, grip),
    ]


def table_files(design: Design) -> Files:
    """The table's files: `table.urdf` and its meshes and textures."""
    left, right, near, far = SHELF
    width, depth, height = LEVER
    lever = cuboid((-width / 2, width / 2), (0, depth), (0, height), design.material("lever"))
    middle, cylinder = (0, 0, BUTTON_HEIGHT / 2), (design.button_radius, BUTTON_HEIGHT)
    disc = prism(middle, *cylinder, sides=14, bottom=False)
    button = Part(design.material("button"), disc, middle, cylinder)
    led = cuboid((-0.075, 0.075), (-0.02, 0.02), (0, 0.04), WHITE)
    bulb = Part(WHITE, ball((0, 0, 0.045), 0.045), (0, 0, 0.045), (0.02, 0.09))
    plank = cuboid((left, right), (near, far), (-0.02, 0), design.material("plank"), "+z")
    drawer = (design.drawer_x, DRAWER_FRONT + 0.015, DRAWER_BOTTOM)
    led_x = float(np.clip(design.button_place[0], -0.2, 0.28))
    bulb_x = float(np.clip(design.switch_place[0], -0.36, 0.34))
    files: Files = {}
    elements = [
        link("base_link", _base(design), files, friction=0.7),
        link("button_link", [button], files, 0.15),
        link("switch_link", [lever], files, 0.24, friction=0.1),
        link("slide_link", _slide(design), files, 1.5, friction=0.3),
        link("drawer_link", _drawer(design), files, 4.2),
        link("led_link", [led], files, 0.2),
        link("light_link", [bulb], files, 0.2),
        link("plank_link", [plank], files, 2.8),
        joint("button_link", design.button_place, (0, 0, -1), 0.02),
        joint("switch_link", design.switch_place, SWITCH_AXIS, SWITCH_TRAVEL),
        joint("slide_link", (SLIDE_X, 0.025, TOP), (-1, 0, 0), 0.28),
        joint("drawer_link", drawer, (0, -1, 0), 0.22),
        joint("led_link", (led_x, 0.2, WALL_TOP)),
        joint("light_link", (bulb_x, 0.195, WALL_TOP)),
        joint("plank_link", (0, 0, TOP)),
    ]
    return robot_files("table", elements, files)


def block_files(name: str, color: Color, length: float) -> Files:
    """`<name>.urdf` and its mesh: a block 4 cm high and wide, `length` m along its x axis."""
    half, width, files = length / 2, (-BLOCK_HEIGHT / 2, BLOCK_HEIGHT / 2), {}
    block = cuboid((-half, half), width, width, Material(color), ALL_FACES)
    return robot_files(name, [link(name, [block], files, 0.5, friction=0.7)], files)


def plane_files() -> Files:
    """`plane.urdf`: the ground. Drawing all of it would cost much, so only a speck is drawn."""
    speck, files = cuboid((-0.005, 0.005), (-0.005, 0.005), (-0.015, -0.005), WHITE, "+z", solid=False), {}
    ground = Part(center=(0, 0, -5), size=(200, 200, 10))
    return robot_files("plane", [link("plane", [speck, ground], files, friction=1.0)], files)
