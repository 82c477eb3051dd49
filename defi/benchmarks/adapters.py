"""Between the actions of a policy and those that an environment takes: small functions, chosen by name.

Actions are [A] with x, y, z, three numbers of rotation and the gripper last, as most data sets have them.
`adapters=[euler_to_rotation_vector,gripper_binary,repeat:2]` applies them in this order; a benchmark may call
them itself. Where nobody names any, the two robots say which are needed (`adapters_between`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from jaxtyping import Float

from defi.errors import UserError
from defi.robot.spec import Robot

Action = Float[np.ndarray, " A"]
Adapter = Callable[[Action], Sequence[Action]]  # one action → one or more; may remember those before
TURN = slice(3, 6)  # of an action
EULER, VECTOR = ["roll", "pitch", "yaw"], ["rx", "ry", "rz"]  # what robots call these numbers


def euler_to_rotation_vector(euler: Float[np.ndarray, "*B 3"]) -> Float[np.ndarray, "*B 3"]:
    """Roll, pitch, yaw (about fixed x, then y, then z) → axis times angle; radians."""
    from scipy.spatial.transform import Rotation  # takes a while, for nothing where it is not asked for

    return Rotation.from_euler("xyz", euler).as_rotvec()


def rotation_vector_to_euler(vector: Float[np.ndarray, "*B 3"]) -> Float[np.ndarray, "*B 3"]:
    """The reverse."""
    from scipy.spatial.transform import Rotation

    return Rotation.from_rotvec(vector).as_euler("xyz")


def gripper_binary(openness: float, threshold: float = 0.5) -> float:
    """Openness 0 … 1 → 1 (open) or −1 (closed)."""
    return 1.0 if openness > threshold else -1.0


def gripper_signed(openness: float) -> float:
    """Openness 0 … 1 → −1 … 1."""
    return 2 * openness - 1


def gripper_unsigned(command: float) -> float:
    """−1 … 1 → 0 … 1."""
    return (command + 1) / 2


def gripper_flipped(command: float) -> float:
    """Where one side opens with the numbers with which the other closes."""
    return -command


class StickyGripper:
    """Openness 0 … 1 → its change from the step before, 1 closes and −1 opens.

    A change of more than `threshold` is held for `steps` steps; while one is held, no other is begun. The
    Google robot of SIMPLER takes such commands; the official evaluation of Octo has the same rule.
    """

    def __init__(self, steps: int = 15, threshold: float = 0.5) -> None:
        self.steps, self.threshold = steps, threshold
        self._before: float | None = None
        self._held, self._left = 0.0, 0

    def __call__(self, openness: float) -> float:
        change = 0.0 if self._before is None else self._before - openness
        self._before = openness
        if not self._left and abs(change) > self.threshold:
            self._held, self._left = change, self.steps
        if not self._left:
            return change
        self._left -= 1
        return self._held


def repeat(steps: int, action: Action) -> list[Action]:
    """The same action for `steps` control steps: for places and velocities of a slower policy."""
    return [action] * steps


def split(steps: int, action: Action) -> list[Action]:
    """A change of pose in `steps` equal parts, the gripper's command with each: for changes at a slower rate.

    Rotation vectors and small Euler angles may be divided so.
    """
    part = np.append(action[:-1] / steps, action[-1])
    return [part] * steps


def _rotation(function: Callable[[np.ndarray], np.ndarray], action: Action) -> list[Action]:
    action = action.copy()
    action[TURN] = function(action[TURN])
    return [action]


def _gripper(function: Callable[[float], float], action: Action) -> list[Action]:
    return [np.append(action[:-1], function(float(action[-1])))]


GRIPPERS = {
    "gripper_binary": gripper_binary,
    "gripper_signed": gripper_signed,
    "gripper_unsigned": gripper_unsigned,
    "gripper_flipped": gripper_flipped,
}
STICKY = "sticky_gripper"
# name → makes one for an episode, of the whole number that may follow the name after a colon.
ADAPTERS: dict[str, Callable[..., Adapter]] = {
    "euler_to_rotation_vector": lambda: partial(_rotation, euler_to_rotation_vector),
    "rotation_vector_to_euler": lambda: partial(_rotation, rotation_vector_to_euler),
    **{name: partial(partial, _gripper, function) for name, function in GRIPPERS.items()},
    STICKY: lambda steps=15: partial(_gripper, StickyGripper(steps)),
    "repeat": lambda steps=2: partial(repeat, steps),
    "split": lambda steps=2: partial(split, steps),
}


def make_adapter(name: str) -> Adapter:
    """Raises UserError for a name that is none, or a number that is none or where none belongs."""
    name, colon, number = name.partition(":")
    if name not in ADAPTERS:
        raise UserError(f"adapters={name}: choose from {', '.join(ADAPTERS)}")
    counts = name in (STICKY, "repeat", "split")
    if colon and not (counts and number.isdecimal() and int(number) > 0):
        wanted = "a number of steps, such as repeat:2" if counts else "no number"
        raise UserError(f"adapters={name}:{number}: takes {wanted}")
    return ADAPTERS[name](int(number)) if colon else ADAPTERS[name]()


def adapt(names: Sequence[str]) -> Callable[[Float[np.ndarray, "K A"]], Iterator[Action]]:
    """All adapters of an episode, in this order: a chunk → actions as the environment takes them.

    Each action is adapted when it is asked for: what is not carried out is not remembered.
    """
    adapters = [make_adapter(name) for name in names]

    def through(action: Action, place: int = 0) -> Iterator[Action]:
        if place == len(adapters):
            yield action
            return
        for adapted in adapters[place](action):
            yield from through(adapted, place + 1)

    return lambda chunk: (each for action in chunk for each in through(np.array(action, np.float64)))


# ---------------------------------------------------------------- which are needed

WAYS = (  # from any gripper's numbers to any other's, the shortest first
    (),
    ("gripper_binary",),
    ("gripper_unsigned",),
    ("gripper_flipped",),
    ("gripper_signed", "gripper_flipped"),
    ("gripper_flipped", "gripper_unsigned"),
    ("gripper_signed", "gripper_flipped", "gripper_unsigned"),
    (STICKY,),
    ("gripper_unsigned", STICKY),
    ("gripper_flipped", "gripper_unsigned", STICKY),
    ("gripper_signed", "gripper_flipped", "gripper_unsigned", STICKY),
)


def adapters_between(policy: Robot, simulated: Robot) -> list[str]:
    """Names of the adapters that a policy of one robot needs to act as another, as far as both say.

    Nothing is guessed: a robot that does not call its turns roll, pitch, yaw or rx, ry, rz, or says nothing
    of its gripper, gets none for these.
    """
    ways = {"euler_to_rotation_vector": (EULER, VECTOR), "rotation_vector_to_euler": (VECTOR, EULER)}
    turns = policy.actions.names[TURN], simulated.actions.names[TURN]
    needed = [name for name, way in ways.items() if way == turns]
    wanted = simulated.grip()
    if policy.gripper is not None and wanted is not None:
        needed += next((way for way in WAYS if adapted(policy, way).grip() == wanted), ())
    return needed


def adapted(robot: Robot, adapters: Sequence[str]) -> Robot:
    """A policy's robot as it looks from behind adapters: its actions' names, its gripper, its rate."""
    for name, _, steps in (each.partition(":") for each in adapters):
        actions, gripper = robot.actions, robot.gripper
        if name in ("euler_to_rotation_vector", "rotation_vector_to_euler"):
            before, after = (EULER, VECTOR) if name.startswith("euler") else (VECTOR, EULER)
            names = list(actions.names)
            names[TURN] = after if names[TURN] == before else [f"{name} of {each}" for each in names[TURN]]
            robot = replace(robot, actions=replace(actions, names=names))
        elif name in ("repeat", "split"):
            robot = replace(robot, fps=robot.fps and robot.fps * int(steps or 2))
        elif gripper is not None and gripper.dimension == len(actions) - 1:
            above, below, opens = gripper.above, gripper.below, gripper.opens
            relative, units = list(actions.relative), list(actions.units)
            units[-1] = ""  # they were of its own numbers
            if name == STICKY:  # positive where the number falls
                above, below = above - below, below - above
                relative[-1], opens = True, not opens
            else:
                above, below = GRIPPERS[name](above), GRIPPERS[name](below)
                if above < below:
                    above, below, opens = below, above, not opens
            gripper = replace(gripper, above=above, below=below, opens=opens)
            robot = replace(robot, actions=replace(actions, relative=relative, units=units), gripper=gripper)
    return robot
