"""The built-in scenes A, B, C and D, and random variations of A, B and C to train on.

Scenes differ in colours, patterns, sizes and places. A, C and D have the switch on a bracket in front of
the table's right corner and the button on the table at the left; B has the button on the bracket and the
switch behind at the left. D's colours and places lie inside the spread of the variations, but no variation
is D.
"""

import hashlib
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from defi.engine.output import user_cache
from defi.errors import UserError
from defi.sim.mesh import Color
from defi.sim.panda import arm_files
from defi.sim.scene import BLOCKS, ArmConfig, BlockConfig, SceneConfig, TableConfig
from defi.sim.table import HSV, TOP, Design, block_files, plane_files, table_files

SMALL, MIDDLE, BIG = 0.04, 0.056, 0.08  # lengths of blocks
BLOCK_COLORS: dict[str, Color] = dict(zip(BLOCKS, [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 1.0)]))
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
    files = arm_files() | table_files(design) | plane_files()
    for block, length in zip(BLOCKS, design.lengths):
        files |= block_files(block, BLOCK_COLORS[block], length)
    folder = _store(files)
    return SceneConfig(
        name=name,
        arm=ArmConfig(urdf=folder / "panda.urdf", pedestal=False),
        blocks=tuple(
            BlockConfig(block, folder / f"{block}.urdf", length=length)
            for block, length in zip(BLOCKS, design.lengths)
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
            raise UserError(
                f"{folder.parent}: cannot write the scene's files ({error.strerror}); set XDG_CACHE_HOME"
            ) from error
    return folder
