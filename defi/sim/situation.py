"""The situation of a world, as `defi.sim.tasks` reasons about it: what is where, read off its state."""

from defi.sim.judge import BlockState, JudgeState
from defi.sim.scene import BLOCKS
from defi.sim.tasks import Situation

# A door counts as being on a side from here on; in between only tasks that do not depend on it are possible:
# the judge asks for 0.15 m of slide and 0.12 m of drawer, too far for a door that stands nearer.
SLIDE_RIGHT, SLIDE_LEFT = 0.05, 0.20
DRAWER_CLOSED, DRAWER_OPEN = 0.04, 0.16
SHELF_MIDDLE = -0.085  # x between the two halves behind the sliding door
BACK = 0.05  # y behind which the table's base is the cabinet


def observe_situation(state: JudgeState) -> Situation:
    """The situation; a door or block that is nowhere in particular is `between` or `elsewhere`."""
    places = {name: _place(state, state.blocks[name]) for name in BLOCKS}
    for top in [name for name, place in places.items() if place == "stacked_top"]:
        for name, block in state.blocks.items():
            if block.body in state.blocks[top].touching and places[name] == "table":
                places[name] = "stacked_bottom"
    return {
        "led": state.lights["led"],
        "lightbulb": state.lights["lightbulb"],
        "slider": _side(state.doors["base__slide"], SLIDE_RIGHT, SLIDE_LEFT, "right", "left"),
        "drawer": _side(state.doors["base__drawer"], DRAWER_CLOSED, DRAWER_OPEN, "closed", "open"),
        **{f"{name.removeprefix('block_')}_block": place for name, place in places.items()},
        "grasped": int("grasped" in places.values()),
    }


def _side(position: float, low: float, high: float, below: str, above: str) -> str:
    return below if position < low else above if position > high else "between"


def _place(state: JudgeState, block: BlockState) -> str:
    x, y, _ = block.position
    if state.surface("slider") in block.contacts:
        return "slider_left" if x < SHELF_MIDDLE else "slider_right"
    if state.surface("drawer") in block.contacts:
        return "drawer"
    if state.surface("table") in block.contacts:
        return "table" if y < BACK else "elsewhere"
    if block.touching == {state.robot}:
        return "grasped"
    others = {other.body for other in state.blocks.values()}
    return "stacked_top" if block.touching and block.touching <= others else "elsewhere"
