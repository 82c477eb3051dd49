"""Skills for drawer, slide, switch and button: the closed fingers hook, push and press."""

import numpy as np

from defi.sim.scripted.motion import TIP, Move, Skill, View, descend
from defi.sim.table import HANDLE_GAP, HANDLE_TOP, LEVER

HOOK = HANDLE_TOP - 0.042 + TIP  # height of the TCP with the fingers behind the handle
BESIDE_KNOB, BEFORE_KNOB = 0.105, -0.17  # how far beside the knob the hand is; y where it goes around it


def drawer(*, opens: bool) -> Skill:
    """Hook the fingers between the drawer's front and its handle; pull, or push the front."""

    def done(view: View) -> bool:
        return view.joints["base__drawer"] > 0.21 if opens else view.joints["base__drawer"] < 0.006

    def move(view: View) -> Move:
        gap = view.grips["base__drawer"]
        offset = view.tcp - gap
        if abs(offset[1]) < HANDLE_GAP / 2 and abs(offset[0]) < 0.07 and view.tcp[2] < HANDLE_TOP + 0.005:
            pull = -0.1 if opens else 0.1
            return Move(np.array([view.tcp[0], view.tcp[1] + pull, HOOK]))
        return Move(descend(view.tcp, np.array([*gap[:2], HOOK]), clear=HANDLE_TOP + 0.05))

    return Skill(move, done, leave=(0.0, 0.0, 0.14))


def slide(*, left: bool) -> Skill:
    """Go beside the knob, from the front, and push it along."""
    side = 1 if left else -1

    def done(view: View) -> bool:
        return view.joints["base__slide"] > 0.272 if left else view.joints["base__slide"] < 0.006

    def move(view: View) -> Move:
        x, y, z = view.grips["base__slide"]
        place = side * (view.tcp[0] - x)  # how far on the pushing side of the knob
        before = np.array([x + side * BESIDE_KNOB, BEFORE_KNOB, z])
        if view.tcp[1] > y + 0.035 or view.tcp[2] < z - 0.05:
            return Move(descend(view.tcp, before, clear=z))
        if view.tcp[1] > y - 0.035 and place > 0.035:
            return Move(np.array([view.tcp[0] - side * 0.1, y, z]))
        if place > 0.065 and abs(place - BESIDE_KNOB) < 0.05:
            return Move(np.array([x + side * BESIDE_KNOB, y, z]))
        if view.tcp[1] > y - 0.075:
            before[0] = view.tcp[0]  # back off before going around
        return Move(before)

    return Skill(move, done, leave=(0.0, -0.13, 0.0))


def switch_on() -> Skill:
    """From the front, push the lever back and climb with it."""

    def move(view: View) -> Move:
        x, y, z = view.grips["base__switch"]
        offset = view.tcp - (x, y, z)
        low = z + 0.01 + TIP
        if -0.1 < offset[1] < 0.01 and abs(offset[0]) < 0.05 and offset[2] < LEVER[2]:
            climb = 0.02 if view.joints["base__switch"] > 0.003 else 0
            return Move(np.array([x, view.tcp[1] + 0.05, low + climb]))
        return Move(descend(view.tcp, np.array([x, y - 0.05, low]), clear=z + LEVER[2] + TIP + 0.03))

    return Skill(move, lambda view: view.joints["base__switch"] > 0.075, leave=(0.0, -0.12, 0.04))


def switch_off() -> Skill:
    """From above, press the lever down along its way."""

    def move(view: View) -> Move:
        x, y, z = view.grips["base__switch"]
        top = z + LEVER[2] + TIP
        over = np.array([x, y + LEVER[1] / 2, top - 0.06])
        return Move(descend(view.tcp, over, clear=top + 0.03, near=0.035))

    return Skill(move, lambda view: view.joints["base__switch"] < 0.012, leave=(0.0, 0.0, 0.13))


def button(*, on: bool) -> Skill:
    """From above, press the button; again, if the light has the wrong state."""

    def move(view: View) -> Move:
        x, y, z = view.grips["base__button"]
        if view.joints["base__button"] > 0.014:
            return Move(view.tcp + (0, 0, 0.05))
        return Move(descend(view.tcp, np.array([x, y, z - 0.04]), clear=z + TIP + 0.03))

    return Skill(move, lambda view: view.led == on, leave=(0.0, 0.0, 0.12))


FIXTURE_SKILLS = {
    "open_drawer": lambda _: drawer(opens=True),
    "close_drawer": lambda _: drawer(opens=False),
    "move_slider_left": lambda _: slide(left=True),
    "move_slider_right": lambda _: slide(left=False),
    "turn_on_lightbulb": lambda _: switch_on(),
    "turn_off_lightbulb": lambda _: switch_off(),
    "turn_on_led": lambda _: button(on=True),
    "turn_off_led": lambda _: button(on=False),
}
