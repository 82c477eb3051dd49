"""The judge on crafted cases: what counts, and what only looks like it."""

import math
from dataclasses import replace

import pytest

from defi.errors import UserError
from defi.sim.judge import BlockState, JudgeState, rotation_between, solved, solved_tasks
from defi.sim.tasks import TASKS

ROBOT, RED, BLUE, PINK, TABLE = 0, 2, 3, 4, 5
LINKS = {"base_link": -1, "drawer_link": 3, "plank_link": 6}
ON_TABLE, IN_DRAWER, ON_SHELF = (TABLE, -1), (TABLE, 3), (TABLE, 6)
FINGERS = [(ROBOT, 9), (ROBOT, 11)]


def block(body: int, position=(0.0, 0.0, 0.5), yaw=0.0, contacts=(ON_TABLE,), speed=0.0) -> BlockState:
    quaternion = (0.0, 0.0, math.sin(yaw / 2), math.cos(yaw / 2))
    return BlockState(body, position, quaternion, (speed, 0.0, 0.0), (0.0, 0.0, 0.0), frozenset(contacts))


def state(red=None, blue=None, pink=None, slide=0.0, drawer=0.0, bulb=0, led=0, held=()) -> JudgeState:
    blocks = {
        "block_red": red or block(RED),
        "block_blue": blue or block(BLUE, (0.2, 0.0, 0.5)),
        "block_pink": pink or block(PINK, (0.4, 0.0, 0.5)),
    }
    doors = {"base__slide": slide, "base__drawer": drawer}
    touched = frozenset((body, -1) for body in held)
    return JudgeState(ROBOT, TABLE, LINKS, blocks, doors, {"lightbulb": bulb, "led": led}, touched)


def test_nothing_happened() -> None:
    assert solved_tasks(state(), state()) == set()


def test_unknown_task() -> None:
    with pytest.raises(UserError, match="open_drawer"):
        solved("open_draw", state(), state())


def test_doors_move_by_more_than_the_threshold() -> None:
    assert solved_tasks(state(), state(slide=0.16)) == {"move_slider_left"}
    assert solved_tasks(state(slide=0.3), state(slide=0.14)) == {"move_slider_right"}
    assert solved_tasks(state(drawer=0.01), state(drawer=0.14)) == {"open_drawer"}
    assert solved_tasks(state(drawer=0.2), state(drawer=0.07)) == {"close_drawer"}
    assert solved_tasks(state(), state(slide=0.15, drawer=0.12)) == set()


def test_lights() -> None:
    assert solved_tasks(state(), state(bulb=1, led=1)) == {"turn_on_lightbulb", "turn_on_led"}
    assert solved_tasks(state(bulb=1, led=1), state()) == {"turn_off_lightbulb", "turn_off_led"}
    assert solved_tasks(state(bulb=1, led=1), state(bulb=1, led=1)) == set()


def test_rotation() -> None:
    left, right = math.radians(61), math.radians(-61)
    assert solved_tasks(state(), state(red=block(RED, yaw=left))) == {"rotate_red_block_left"}
    assert solved_tasks(state(), state(red=block(RED, yaw=right))) == {"rotate_red_block_right"}
    assert not solved_tasks(state(), state(red=block(RED, yaw=math.radians(59))))
    moved = block(RED, (0.0, 0.101, 0.5), yaw=left)
    assert not solved_tasks(state(), state(red=moved)), "moved too far"
    in_hand = block(RED, yaw=left, contacts=FINGERS)
    assert not solved_tasks(state(), state(red=in_hand)), "touches only the robot"
    tilted = replace(block(RED), quaternion=(math.sin(0.3), 0.0, 0.0, math.cos(0.3)))
    turned = rotation_between(tilted.quaternion, block(RED, yaw=left).quaternion)
    assert abs(turned[0]) > 30 or abs(turned[1]) > 30
    assert not solved_tasks(state(red=tilted), state(red=block(RED, yaw=left))), "tipped over"


def test_rotation_angles() -> None:
    for axis in range(3):
        quaternion = [0.0, 0.0, 0.0, math.cos(0.2)]
        quaternion[axis] = math.sin(0.2)
        expected = [0.0, 0.0, 0.0]
        expected[axis] = math.degrees(0.4)
        angles = rotation_between((0.0, 0.0, 0.0, 1.0), tuple(quaternion))
        assert angles == pytest.approx(expected)
        assert rotation_between(tuple(quaternion), tuple(quaternion)) == pytest.approx((0, 0, 0))


def test_push() -> None:
    right = block(RED, (0.11, 0.0, 0.5))
    assert solved_tasks(state(), state(red=right)) == {"push_red_block_right"}
    assert solved_tasks(state(red=right), state()) == {"push_red_block_left"}
    assert not solved_tasks(state(), state(red=block(RED, (0.1, 0.0, 0.5)))), "not far enough"
    lifted = block(RED, (0.11, 0.0, 0.5), contacts=FINGERS)
    assert not solved_tasks(state(), state(red=lifted)), "left the table"
    more = block(RED, (0.11, 0.0, 0.5), contacts=[ON_TABLE, (BLUE, -1), *FINGERS])
    assert "push_red_block_right" in solved_tasks(state(), state(red=more)), "gained a contact"
    in_the_air = block(RED, contacts=())
    assert not solved_tasks(state(red=in_the_air), state(red=right)), "touched nothing before"


@pytest.mark.parametrize(
    "place, surface, height",
    [("table", ON_TABLE, 0.05), ("slider", ON_SHELF, 0.03), ("drawer", IN_DRAWER, 0.05)],
)
def test_lift(place: str, surface: tuple[int, int], height: float) -> None:
    start = state(blue=block(BLUE, contacts=[surface, FINGERS[0]]))
    up = (0.0, 0.0, 0.501 + height)
    assert solved(f"lift_blue_block_{place}", start, state(blue=block(BLUE, up, contacts=FINGERS)))
    touching = block(BLUE, up, contacts=[*FINGERS, (RED, -1)])
    assert not solved(f"lift_blue_block_{place}", start, state(blue=touching)), "touches another block"
    low = block(BLUE, (0.0, 0.0, 0.499 + height), contacts=FINGERS)
    assert not solved(f"lift_blue_block_{place}", start, state(blue=low)), "too low"
    elsewhere = state(blue=block(BLUE, contacts=[(TABLE, 2)]))
    assert not solved(f"lift_blue_block_{place}", elsewhere, state(blue=block(BLUE, up, contacts=FINGERS)))


def test_place() -> None:
    held = state(pink=block(PINK, contacts=FINGERS), held=[PINK])
    in_drawer = block(PINK, contacts=[IN_DRAWER])
    assert solved("place_in_drawer", held, state(pink=in_drawer))
    assert solved("place_in_slider", held, state(pink=block(PINK, contacts=[ON_SHELF])))
    assert not solved("place_in_slider", held, state(pink=in_drawer))
    assert not solved("place_in_drawer", held, state(pink=in_drawer, held=[PINK])), "still touched"
    two = state(pink=block(PINK, contacts=FINGERS), held=[PINK, TABLE])
    assert not solved("place_in_drawer", two, state(pink=in_drawer)), "touched two things"
    resting = state(pink=block(PINK, contacts=[*FINGERS, ON_TABLE]), held=[PINK])
    assert not solved("place_in_drawer", resting, state(pink=in_drawer)), "was not in the air"
    table_only = state(held=[TABLE])
    assert not solved("place_in_drawer", table_only, state(pink=in_drawer)), "held no block"


def test_stack_and_unstack() -> None:
    free = state(red=block(RED, contacts=FINGERS))
    tower = state(red=block(RED, contacts=[(BLUE, -1)]))
    assert solved_tasks(free, tower) == {"stack_block"}
    assert solved_tasks(tower, free) == {"unstack_block"}
    gripped = state(red=block(RED, contacts=[(BLUE, -1), *FINGERS]))
    assert not solved("stack_block", free, gripped), "not let go"
    falling = state(red=block(RED, contacts=[(BLUE, -1)], speed=1.0))
    assert not solved("stack_block", free, falling), "too fast"
    assert not solved("unstack_block", falling, free), "was too fast"


def test_push_into_drawer() -> None:
    after = state(red=block(RED, contacts=[IN_DRAWER, FINGERS[0]]))
    assert solved("push_into_drawer", state(), after), "the robot may touch it then"
    touched = state(red=block(RED, contacts=[ON_TABLE, FINGERS[0]]))
    assert not solved("push_into_drawer", touched, after), "touched at the start"


def test_only_tasks_asked_for() -> None:
    assert solved_tasks(state(), state(bulb=1, led=1), ["turn_on_led"]) == {"turn_on_led"}
    assert len(TASKS) == 34
