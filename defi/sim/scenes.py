"""The built-in scenes A, B, C and D, and random variations of A, B and C to train on.

A, C and D have the switch on a bracket in front of the table's right corner and the button on the table at
the left; B has the button on the bracket and the switch behind at the left. D's colours and places lie inside
the spread of the variations, but no variation is D.

Joints, links, ranges and directions are those of CALVIN's table: the slide moves along −x (0 … 0.28 m), the
drawer along −y (0 … 0.22 m), the button down (0 … 0.02 m), the switch up and back (0 … 0.088 m). The parts
are made for a gripper that points down: a handle to hook from above, a knob to push sideways, a lever to push
back and to press down, a wide button. Lengths in metres, in world coordinates.
"""

import colorsys
import hashlib
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from defi.engine.output import user_cache
from defi.errors import UserError
from defi.sim.mesh import ALL_FACES, Files, Material, Part, ball, cuboid, joint, link, prism, robot_files
from defi.sim.panda import arm_files
from defi.sim.scene import BLOCKS, ArmConfig, BlockConfig, SceneConfig, TableConfig, Vector

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
BLOCK_WIDTH = 0.04  # and height
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
        """Joint name -> where it is worked, with all joints at 0."""
        knob, (x, y, z) = SLIDE_X + DOOR_WIDTH / 2 + self.knob_offset, self.button_place
        return {
            "base__slide": (knob, 0.025 - KNOB[1] / 2, TOP + 0.12),
            "base__drawer": (self.drawer_x, DRAWER_FRONT - HANDLE_GAP / 2, HANDLE_TOP),  # behind the handle
            "base__button": (x, y, z + BUTTON_HEIGHT),
            "base__switch": self.switch_place,  # the lower front edge of the lever
        }


SMALL, MIDDLE, BIG = 0.04, 0.056, 0.08  # lengths of blocks
BLOCK_COLORS = dict(zip(BLOCKS, [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 1.0)]))
BRACKET = (0.335, -0.345, 0.335)  # the lever in front of the right corner
BEHIND_LEFT = (-0.38, -0.06, 0.485)  # the lever behind at the left
PATTERNS = ("wood", "planks", "speckle", "plain")
SURFACES = {
    "table": ((-0.02, -0.13, 0.46), (0.28, -0.05, 0.46)),
    "slider_left": ((-0.30, 0.085, 0.46), (-0.18, 0.10, 0.46)),
    "slider_right": ((0.0, 0.085, 0.46), (0.12, 0.10, 0.46)),
}

# How far a variation's hue, and its saturation and value, may be from its scene's.
FURNITURE = dict.fromkeys(("top", "wall", "door", "drawer"), (0.03, 0.14))
SPREAD = FURNITURE | dict.fromkeys(("knob", "handle", "lever", "button"), (0.03, 0.1))
SPREAD |= {"handle": (0.5, 0.06), "plank": (0.5, 0.05)}
FAMILIES = {
    "A": Design(
        top=(0.05, 0.55, 0.50), wall=(0.04, 0.60, 0.36), door=(0.07, 0.45, 0.62), drawer=(0.05, 0.50, 0.42),
        knob=(0.50, 1.0, 0.85), handle=(0.14, 0.30, 0.18), lever=(0.76, 0.75, 0.80),
        button=(0.14, 0.95, 0.95), plank=(0.60, 0.05, 0.80), patterns=("wood", "wood"),
        button_place=(-0.27, -0.13, TOP), switch_place=BRACKET, knob_offset=-0.05, drawer_x=0.08,
        lengths=(MIDDLE, BIG, SMALL),
    ),
    "B": Design(
        top=(0.11, 0.38, 0.88), wall=(0.10, 0.45, 0.70), door=(0.09, 0.55, 0.55), drawer=(0.11, 0.35, 0.78),
        knob=(0.47, 0.9, 0.65), handle=(0.60, 0.30, 0.18), lever=(0.74, 0.65, 0.70),
        button=(0.13, 0.90, 1.00), plank=(0.10, 0.05, 0.88), patterns=("planks", "plain"),
        button_place=(0.335, -0.245, TOP), switch_place=BEHIND_LEFT, knob_offset=0.06, drawer_x=0.09,
        lengths=(SMALL, BIG, MIDDLE), button_radius=0.042, handle_width=0.18,
    ),
    "C": Design(
        top=(0.58, 0.25, 0.62), wall=(0.60, 0.30, 0.48), door=(0.56, 0.12, 0.78), drawer=(0.59, 0.28, 0.52),
        knob=(0.53, 0.9, 0.90), handle=(0.10, 0.30, 0.18), lever=(0.78, 0.70, 0.75),
        button=(0.15, 0.95, 0.90), plank=(0.30, 0.05, 0.75), patterns=("speckle", "planks"),
        button_place=(-0.23, -0.13, TOP), switch_place=(0.31, -0.34, 0.33), knob_offset=0.03, drawer_x=0.12,
        lengths=(BIG, SMALL, MIDDLE), handle_width=0.21,
    ),
    "D": Design(
        top=(0.24, 0.30, 0.68), wall=(0.22, 0.36, 0.50), door=(0.16, 0.32, 0.80), drawer=(0.25, 0.32, 0.55),
        knob=(0.51, 0.95, 0.75), handle=(0.30, 0.30, 0.18), lever=(0.75, 0.70, 0.76),
        button=(0.14, 0.90, 0.98), plank=(0.50, 0.05, 0.82), patterns=("wood", "planks"),
        button_place=(-0.25, -0.125, TOP), switch_place=(0.32, -0.335, 0.335), knob_offset=0.0, drawer_x=0.10,
        lengths=(MIDDLE, SMALL, BIG), handle_width=0.19,
    ),
}  # fmt: skip
SCENES = tuple(FAMILIES)


def builtin(name: str) -> SceneConfig:
    """Scene "A", "B", "C" or "D" of the built-in table."""
    if name not in SCENES:
        raise UserError(f"scene {name!r}: not a built-in scene; choose one of {', '.join(SCENES)}")
    return _build(name, FAMILIES[name])


def variation(name: str, seed: int) -> SceneConfig:
    """The `seed`-th random relative of scene "A", "B" or "C"; the scene keeps the name of its family."""
    families = [scene for scene in SCENES if scene != "D"]
    if name not in families:
        raise UserError(f"scene {name!r}: only {', '.join(families)} have variations to train on")
    return _build(name, _vary(FAMILIES[name], np.random.default_rng([ord(name), seed])))


def _vary(family: Design, rng: np.random.Generator) -> Design:
    """Another member of the family: hues and shades, a few centimetres, sizes."""
    shift = rng.uniform(-0.16, 0.16)  # the same for all furniture, so that it matches

    def color(part: str) -> HSV:
        (h, s, v), (hue, other) = getattr(family, part), SPREAD[part]
        middle = np.array([(h + shift) % 1 if part in FURNITURE else h, s, v])
        h, s, v = (middle + rng.uniform(-1, 1, 3) * (hue, other, other)).tolist()
        return h % 1, min(max(s, 0.0), 1.0), min(max(v, 0.06), 1.0)

    def near(middle: float | tuple[float, ...], spread: float | tuple[float, ...]) -> tuple[float, ...]:
        return tuple((middle + rng.uniform(-1, 1, np.size(spread)) * spread).tolist())

    on_bracket = family.button_place[1] < -0.2
    return replace(
        family,
        **{part: color(part) for part in SPREAD},
        patterns=(str(rng.choice(PATTERNS)), str(rng.choice(PATTERNS))),
        button_place=near(family.button_place, (0.01 if on_bracket else 0.025, 0.01, 0)),
        switch_place=near(family.switch_place, (0.018, 0.012, 0.01)),
        knob_offset=near(family.knob_offset, 0.03)[0],
        drawer_x=near(family.drawer_x, 0.025)[0],
        lengths=tuple(rng.permutation([SMALL, MIDDLE, BIG]).tolist()),
        button_radius=float(rng.uniform(0.036, 0.044)),
        handle_width=float(rng.uniform(0.17, 0.21)),
    )


def _build(name: str, design: Design) -> SceneConfig:
    """The scene, its files written into the user's cache."""
    files, lengths = arm_files() | table_files(design), dict(zip(BLOCKS, design.lengths))
    across = (-BLOCK_WIDTH / 2, BLOCK_WIDTH / 2)
    for block, length in lengths.items():
        part = cuboid((-length / 2, length / 2), across, across, Material(BLOCK_COLORS[block]), ALL_FACES)
        files = robot_files(block, [link(block, [part], files, 0.5, friction=0.7)], files)
    # Drawing all of the ground would cost much, so only a speck is drawn.
    speck = cuboid((-0.005, 0.005), (-0.005, 0.005), (-0.015, -0.005), WHITE, "+z", solid=False)
    ground = Part(center=(0, 0, -5), size=(200, 200, 10))
    files = robot_files("plane", [link("plane", [speck, ground], files, friction=1.0)], files)
    folder = _store(files)
    return SceneConfig(
        name=name,
        arm=ArmConfig(urdf=folder / "panda.urdf", pedestal=False),
        blocks=tuple(
            BlockConfig(name, folder / f"{name}.urdf", length=length) for name, length in lengths.items()
        ),
        table=TableConfig(folder / "table.urdf", off_color=(0.3, 0.3, 0.33, 1.0), grips=design.grips()),
        plane=folder / "plane.urdf",
        surfaces=SURFACES,
        scale=1.0,
    )


def _store(files: dict[str, bytes]) -> Path:
    """Write the files once into a folder named by their content; safe for many processes at once."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}:{len(files[name])}:".encode() + files[name])
    folder = user_cache() / "assets" / digest.hexdigest()[:20]
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".draft", dir=folder.parent) as draft:
            for name, content in files.items():
                (Path(draft) / name).write_bytes(content)
            os.rename(draft, folder)
    except OSError as error:
        if not folder.is_dir():  # otherwise another process was first
            problem = f"cannot write the scene's files ({error.strerror})"
            raise UserError(f"{folder.parent}: {problem}; set XDG_CACHE_HOME") from error
    return folder


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
    door = cuboid((0, DOOR_WIDTH), (0, 0.015), (0.003, 0.16), design.material("door"), "-y +z +x")
    x, (width, reach, height) = DOOR_WIDTH / 2 + design.knob_offset, KNOB
    sides, heights = (x - width / 2, x + width / 2), (0.075, 0.075 + height)
    knob = cuboid(sides, (-reach, 0), heights, design.material("knob"))
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
        link("slide_link", [door, knob], files, 1.5, friction=0.3),
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
