"""The 1092 visual-matching episodes of SIMPLER, by the rules of the official evaluation's scripts.

Metres and radians; quaternions w, x, y, z; the world's z is up.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations, product
from math import cos, pi, sin

Place = tuple[float, float]
Quaternion = tuple[float, float, float, float]


@dataclass(frozen=True)
class Task:
    """What all episodes of a task share.

    kind: put (the source on the target), pick, near, open or close; chooses judge and reset.
    robot: widowx, widowx_sink or google. steps: after so many an episode ends.
    models: the list of the objects' densities and boxes, in `data/custom`.
    stage: the mesh with the table; "" for the cabinet.
    contact_offset: m, of the physics. above: m that the source may float over the target.
    alone: the source must touch nothing but target and robot.
    """

    name: str
    kind: str
    robot: str
    steps: int
    models: str
    stage: str
    contact_offset: float
    above: float = 0.02
    alone: bool = False

    @property
    def drawer(self) -> str:
        """top, middle or bottom."""
        return self.name.split("_")[-2]

    @property
    def robot_kind(self) -> str:
        """widowx or google."""
        return self.robot.split("_")[0]


@dataclass(frozen=True)
class Placed:
    """An object before it is dropped. density: kg/m³; 0 for the one in the task's list of models."""

    model: str
    xy: Place
    turn: Quaternion
    density: float = 0.0


@dataclass(frozen=True)
class Look:
    """What variant aggregation changes. stage, light: "" for the task's own. station: the cabinet's
    description, in `data/custom`."""

    stage: str = ""
    light: str = ""
    station: str = "mk_station_recolor"


@dataclass(frozen=True)
class Episode:
    """One start.

    base: the robot's x, y and yaw. photo: its name in `data/real_inpainting`; "" for none.
    source, target: places in `objects`. colours: the version of the robot's URDF, "" for the plain one.
    setting: scores are averaged within it first, then over the settings.
    """

    task: Task
    index: int
    instruction: str
    base: tuple[float, float, float]
    photo: str
    objects: tuple[Placed, ...] = ()
    source: int = 0
    target: int = 0
    colours: str = ""
    setting: str = ""
    look: Look = Look()

    @property
    def name(self) -> str:
        return f"{self.task.name}/{self.index}"


def yaw(angle: float) -> Quaternion:
    """A turn about the world's z."""
    return (cos(angle / 2), 0.0, 0.0, sin(angle / 2))


STILL = yaw(0)
UPRIGHT = (cos(pi / 4), sin(pi / 4), 0.0, 0.0)  # a can's own axis is y

# WidowX: a source and a target stand on two corners of a square, the source is turned in several ways.


def _on_corners(*halves: float) -> list[tuple[Place, Place]]:
    return [
        pair
        for half in halves
        for pair in permutations([(-0.16 + x, y) for x in (-half, half) for y in (-half, half)], 2)
    ]


IN_SINK = [((x, y), (-0.125, 0.025)) for x in (-0.115, -0.095) for y in (0.191, 0.201, 0.211, 0.221)]


def _put(
    source: str, target: str, places: list[tuple[Place, Place]], turns: list[Quaternion], instruction: str
):
    def episodes(task: Task) -> Iterator[Episode]:
        base, photo = (0.147, 0.028, 0.0), "bridge_real_eval_1"
        if task.robot == "widowx_sink":
            base, photo = (0.127, 0.06, 0.0), "bridge_sink"
        for index, ((start, goal), turn) in enumerate(product(places, turns)):
            objects = (Placed(source, start, turn), Placed(target, goal, STILL))
            yield Episode(task, index, instruction, base, photo, objects, 0, 1)

    return episodes


# Google robot: its colours were matched to the photos in four ways, and each start is tried with each.
COLOURS = (
    "",
    "recolor_tabletop_visual_matching_1",
    "recolor_tabletop_visual_matching_2",
    "recolor_cabinet_visual_matching_1",
)
CAN_LIES = {"lr_switch": yaw(pi), "upright": UPRIGHT, "laid_vertically": yaw(pi / 2)}
CAN_PLACES = list(product((-0.35, -0.2925, -0.235, -0.1775, -0.12), (-0.02, 0.09, 0.2, 0.31, 0.42)))


def _pick(task: Task) -> Iterator[Episode]:
    each = product(COLOURS, CAN_LIES.items(), CAN_PLACES)
    for index, (colours, (lies, turn), xy) in enumerate(each):
        base, photo = (0.35, 0.2, 0.0), "google_coke_can_real_eval_1"
        objects = (Placed("opened_coke_can", xy, turn),)
        setting = f"{lies} {colours}".strip()
        yield Episode(task, index, "pick coke can", base, photo, objects, colours=colours, setting=setting)


TRIPLETS = (
    ("blue_plastic_bottle", "baked_opened_pepsi_can", "orange"),
    ("baked_opened_7up_can", "baked_apple", "baked_sponge"),
    ("baked_opened_coke_can", "baked_opened_redbull_can", "baked_apple"),
    ("baked_sponge", "blue_plastic_bottle", "baked_opened_7up_can"),
    ("orange", "baked_opened_pepsi_can", "baked_opened_redbull_can"),
)
LAYOUTS = (
    ((-0.33, 0.04), (-0.33, 0.34), (-0.13, 0.19)),
    ((-0.13, 0.04), (-0.33, 0.19), (-0.13, 0.34)),
)
STANDS = {
    "blue_plastic_bottle": (0.5, 0.5, 0.5, 0.5),
    "apple": STILL,
    "orange": yaw(pi / 2),
    "sponge": yaw(pi / 2),
}


def _near(task: Task) -> Iterator[Episode]:
    version = "_v2" if task.name.endswith("v1") else ""
    each = product(COLOURS, TRIPLETS, LAYOUTS, permutations(range(3), 2))
    for index, (colours, kinds, places, (source, target)) in enumerate(each):
        objects = tuple(
            Placed(
                kind + version if kind.startswith("baked") else kind,
                place,
                STANDS.get(kind.removeprefix("baked_"), UPRIGHT),
                200.0 if kind in ("baked_apple", "orange") else 0.0,
            )
            for kind, place in zip(kinds, places)
        )
        instruction = f"move {spoken(kinds[source])} near {spoken(kinds[target])}"
        base, photo = (0.35, 0.21, -0.09), "google_move_near_real_eval_1"
        yield Episode(task, index, instruction, base, photo, objects, source, target, colours, colours)


UNSPOKEN = {"opened", "light", "generated", "modified", "objaverse", "bridge", "baked", "v2"}


def spoken(model: str) -> str:
    """What an instruction calls a model: `baked_opened_7up_can_v2` is a "7up can"."""
    return " ".join(word for word in model.split("_") if word not in UNSPOKEN and not word.endswith("cm"))


DRAWER_BASES = {  # where the robot stood when this photo was taken
    "a0": (0.644, -0.179, -0.03),
    "a1": (0.765, -0.182, -0.02),
    "a2": (0.889, -0.203, -0.06),
    "b0": (0.652, 0.009, 0.0),
    "b1": (0.752, 0.009, 0.0),
    "b2": (0.851, 0.035, 0.0),
    "c0": (0.665, 0.224, 0.0),
    "c1": (0.765, 0.222, -0.025),
    "c2": (0.865, 0.222, -0.025),
}


def _drawer(task: Task) -> Iterator[Episode]:
    each = product((COLOURS[3], COLOURS[1], COLOURS[2], COLOURS[0]), DRAWER_BASES.items())
    for index, (colours, (tag, base)) in enumerate(each):
        instruction = f"{task.kind} {task.drawer} drawer"
        yield Episode(task, index, instruction, base, f"open_drawer_{tag}", colours=colours, setting=colours)


def _widowx(name: str, models: str = "v0", **options) -> Task:
    models = f"info_bridge_custom_{models}.json"
    return Task(f"widowx_{name}", "put", "widowx", 60, models, "bridge_table_1_v1", 0.005, **options)


def _google(name: str, kind: str, steps: int, models: str, contact_offset: float) -> Task:
    stage = "" if kind in ("open", "close") else "google_pick_coke_can_1_v4"
    models = f"info_pick_custom_{models}.json"
    return Task(f"google_robot_{name}", kind, "google", steps, models, stage, contact_offset)


RULES: dict[Task, Callable[[Task], Iterator[Episode]]] = {
    _widowx("carrot_on_plate", alone=True): _put(
        "bridge_carrot_generated_modified",
        "bridge_plate_objaverse_larger",
        _on_corners(0.075),
        [yaw(pi), yaw(-pi / 2)],
        "put carrot on plate",
    ),
    _widowx("spoon_on_towel"): _put(
        "bridge_spoon_generated_modified",
        "table_cloth_generated_shorter",
        _on_corners(0.075),
        [STILL, yaw(pi / 2)],
        "put the spoon on the towel",
    ),
    _widowx("stack_cube", "baked_tex_v0", alone=True): _put(
        "baked_green_cube_3cm",
        "baked_yellow_cube_3cm",
        _on_corners(0.05, 0.1),
        [STILL],
        "stack the green block on the yellow block",
    ),
    Task(
        "widowx_put_eggplant_in_basket",
        "put",
        "widowx_sink",
        120,
        "info_bridge_custom_v0.json",
        "bridge_table_1_v2",
        0.005,
        above=0.06,
    ): _put(
        "eggplant",
        "dummy_sink_target_plane",
        IN_SINK,
        [STILL, yaw(pi / 4), yaw(-pi / 4)],
        "put eggplant into yellow basket",
    ),
    _google("pick_coke_can", "pick", 80, "v0", 0.02): _pick,
    _google("move_near_v0", "near", 80, "baked_tex_v0", 0.005): _near,
    _google("move_near_v1", "near", 80, "baked_tex_v1", 0.005): _near,
}
RULES |= {
    _google(f"{kind}_{drawer}_drawer", kind, 113, "v0", 0.02): _drawer
    for kind in ("open", "close")
    for drawer in ("top", "middle", "bottom")
}
TASKS = {task.name: task for task in RULES}


def episodes(task: str) -> list[Episode]:
    """All visual-matching episodes of a task of `TASKS`, in the official order."""
    return list(RULES[TASKS[task]](TASKS[task]))
