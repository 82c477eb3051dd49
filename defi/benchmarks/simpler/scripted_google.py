"""Scripted policies for the Google robot: pick a can, move near, close and open drawers.

They know the true state and go through phases (over it, down, close, lift), in each by feedback: where noise
moves the hand, the next action corrects it; an object or a drawer that is lost is taken again. The phase is
remembered, fingers get 4 steps by a counter, and each episode draws heights, tilts and a speed: a picture
alone does not tell the next action. World frame, metres; the cabinet's front is towards +x. Handles of the
drawers have no collision: a drawer is closed by its front plate, and opened by the plate's upper edge, which
stands free: between two plates, and under the table top, there are 10 cm of open space. A fingertip that
reaches in there and presses down (about 20 N) pulls the drawer along by friction.
"""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float

from defi.benchmarks.simpler.environment import Simpler
from defi.benchmarks.simpler.episodes import yaw
from defi.benchmarks.simpler.poses import Pose, composed, inverse, matrix, multiplied, turn_of, vector_of
from defi.benchmarks.simpler.scene import pose_of

Action = Float[np.ndarray, "7"]
Actions = Iterator[Action]
OPEN, CLOSED = -1.0, 1.0  # said in every step, so that noise in one of them does no harm
TURN = 0.25  # rad, the most of one action
FINGERS_STEPS = 4  # to close or open
ALONG_X, ALONG_Y = np.pi / 2, np.pi  # the hand's spin, with fingers apart along x or y
FRONT, HALF_PLATE = 0.3125, 0.07  # m, of a drawer's front plate: its face from its origin, along z
DEEP = 0.045  # m, from the top of what is grasped to the tip
BESIDE = 0.13  # m, from the target's middle
FAR_OPEN = 0.18  # m; 0.15 is asked for
PUSHED_IN = 0.035  # m; 0.05 is asked for


def turned(spin: float, tilt: float) -> np.ndarray:
    """The hand pointing down, spun about the world's z, then tilted forward, towards −x: a quaternion."""
    return multiplied(turn_of((0, tilt, 0)), multiplied(yaw(spin), (0, 1, 0, 0)))


class Hand:
    """Actions that bring the tip to poses in the world. stride: m, the most of one action."""

    def __init__(self, simpler: Simpler, stride: float) -> None:
        self.simpler, self.stride = simpler, stride
        self.base = pose_of(simpler.scene.arm.root_pose)

    @property
    def tip(self) -> Pose:
        return composed(self.base, self.simpler.tip)

    def off(self, goal: Pose) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
        """The move (m) and the turn (rad) that are left, along the base's axes as in actions."""
        here, there = self.simpler.tip, composed(inverse(self.base), goal)
        return there[:3] - here[:3], vector_of(multiplied(there[3:], here[3:] * (1, -1, -1, -1)))

    def toward(self, goal: Pose, fingers: float) -> Action:
        """Straight there, or a part of it. The arm lags: it moves by about a third of an action's move."""
        move, turn = self.off(goal)
        move *= min(1.0, self.stride / max(float(np.linalg.norm(move)), 1e-9))
        turn *= min(1.0, TURN / max(float(np.linalg.norm(turn)), 1e-9))
        tip = self.simpler.tip
        for _ in range(3):  # the robot ignores what it cannot reach: less of it, then
            pose = np.concatenate([tip[:3] + move, multiplied(turn_of(turn), tip[3:])])
            if self.simpler.control.kinematics.solve(pose)[1]:
                break
            move, turn = move / 2, turn / 2
        return np.array([*move, *turn, fingers])

    def can_reach(self, goal: Pose) -> bool:
        """Within the limits of the arm's seven joints."""
        joints, reached = self.simpler.control.kinematics.solve(composed(inverse(self.base), goal))
        low, high = np.array(self.simpler.scene.limits).T
        return reached and bool(np.all(((joints > low + 0.03) & (joints < high - 0.03))[:7]))

    def reach(
        self,
        goal: Callable[[], Pose],
        fingers: float,
        *,
        within: float = 0.012,
        unless: Callable[[], bool] = lambda: False,
        most: int = 60,
    ) -> Actions:
        """Until the tip is there, to `within` m and ten times as many rad, or something has happened."""
        for _ in range(most):
            move, turn = self.off(goal())
            if unless() or (np.linalg.norm(move) < within and np.linalg.norm(turn) < 10 * within):
                return
            yield self.toward(goal(), fingers)

    def stay(self, fingers: float) -> Actions:
        """Where it is, until the fingers have closed or opened."""
        pose = self.tip
        for _ in range(FINGERS_STEPS):
            yield self.toward(pose, fingers)


class Grasp:
    """An object of the scene, grasped from above."""

    def __init__(self, hand: Hand, index: int, random: np.random.Generator) -> None:
        scene = hand.simpler.scene
        self.hand, self.name = hand, hand.simpler.episode.objects[index].model
        self.random, self.height = random, 0.0  # m, of the tip over the middle, drawn for each try
        box = scene.model(self.name)["bbox"]
        self.size = np.subtract(box["max"], box["min"])

    @property
    def pose(self) -> Pose:
        return pose_of(self.hand.simpler.scene.objects[self.name].entity.pose)

    @property
    def half(self) -> float:
        """Of its height as it lies, m."""
        return float(np.abs(matrix(self.pose[3:])[2]) @ self.size / 2)

    def lost(self) -> bool:
        """Not between the fingers."""
        return bool(np.linalg.norm(self.pose[:3] - self.hand.tip[:3]) > max(0.05, self.half + 0.02))

    def _spin(self) -> float:
        """Fingers on its narrow sides; of several ways the one nearest to how the hand starts."""
        axes = matrix(self.pose[3:]).T
        flat = [each for each in range(3) if abs(axes[each][2]) < 0.6]
        narrow = min(self.size[each] for each in flat) + 0.012
        spins = [np.arctan2(axes[each][0], -axes[each][1]) for each in flat if self.size[each] < narrow]
        turns = [(spin - ALONG_X + np.pi / 2) % np.pi - np.pi / 2 for spin in spins]
        return ALONG_X + float(min(turns, key=abs))

    def _at(self, turn: np.ndarray, back: float) -> Pose:
        """The tip's pose to close the fingers at, and so many m back along the hand."""
        place = self.pose[:3] + (0, 0, max(0.0, self.half - DEEP) + self.height)
        return np.concatenate([place - back * matrix(turn)[:, 2], turn])

    def take(self, rise: float) -> Actions:
        """Until the object has risen with the hand, by about so many m."""
        yield from self._try(rise)
        while self.lost():
            yield from self.hand.stay(OPEN)
            yield from self._try(rise)

    def _try(self, rise: float) -> Actions:
        """Along the hand's own axis, and back. A little otherwise each time."""
        hand, spin, before = self.hand, self._spin(), self.half + 0.03
        self.height = self.random.uniform(-0.004, 0.004)
        # What is far is reached with a tilted hand only.
        for tilt in np.arange(self.random.uniform(0.15, 0.25), 0.7, 0.08):
            turn = turned(spin, tilt)
            if all(hand.can_reach(self._at(turn, back)) for back in (before, 0.0, rise)):
                break
        yield from hand.reach(lambda: self._at(turn, before), OPEN, within=0.03)
        yield from hand.reach(lambda: self._at(turn, 0.0), OPEN, within=0.007)
        risen = self._at(turn, rise)
        yield from hand.stay(CLOSED)
        yield from hand.reach(lambda: risen, CLOSED, within=0.03, unless=self.lost)


def pick(hand: Hand, random: np.random.Generator) -> Actions:
    """Grasp, lift, hold."""
    can = Grasp(hand, hand.simpler.episode.source, random)
    yield from can.take(random.uniform(0.08, 0.12))


def move_near(hand: Hand, random: np.random.Generator) -> Actions:
    """Grasp, lift, carry to beside the target, set down, let go, rise; again, until it is there."""
    episode = hand.simpler.episode
    source, target = (Grasp(hand, index, random) for index in (episode.source, episode.target))
    floor, rise = source.pose[2], random.uniform(0.05, 0.07)

    def carried(height: float) -> Pose:
        """The tip's pose with the source so high over the table, beside the target."""
        apart = source.pose[:2] - target.pose[:2]
        beside = target.pose[:2] + apart * BESIDE / np.linalg.norm(apart)
        place = hand.tip[:3] - source.pose[:3] + (*beside, floor + height)
        return np.concatenate([place, turn])

    while np.linalg.norm(source.pose[:2] - target.pose[:2]) > BESIDE + 0.03:
        yield from source.take(rise)
        turn = hand.tip[3:]
        yield from hand.reach(lambda: carried(0.05), CLOSED, unless=source.lost)
        yield from hand.reach(lambda: carried(0.006), CLOSED, unless=source.lost)
        yield from hand.stay(OPEN)
    up = hand.tip + (0, 0, 0.08, 0, 0, 0, 0)
    yield from hand.reach(lambda: up, OPEN, within=0.02)


def front(simpler: Simpler) -> np.ndarray:
    """Middle of the front plate's outer face."""
    name = f"{simpler.episode.task.drawer}_drawer"
    link = next(each for each in simpler.scene.cabinet.links if each.name == name)
    return pose_of(link.entity.pose)[:3] + (FRONT, 0, 0)


def close_drawer(hand: Hand, random: np.random.Generator) -> Actions:
    """Closed fingers before the plate, then into it; again, until it is closed."""
    simpler = hand.simpler
    aside, low = random.uniform(-0.05, 0.05), random.uniform(-0.05, -0.03)
    shut = front(simpler) - (simpler.state().drawer, -aside, -low)
    tilts = np.arange(random.uniform(0.3, 0.4), 1.0, 0.1)  # what is far is reached with a tilted hand only
    turns = [turned(ALONG_X, tilt) for tilt in tilts]
    turn = next((each for each in turns if hand.can_reach(np.concatenate([shut, each]))), turns[-1])

    def before(by: float) -> Pose:
        return np.concatenate([front(simpler) + (by, aside, low), turn])

    def closed() -> bool:
        return simpler.state().drawer < PUSHED_IN

    while not closed():
        yield from hand.reach(lambda: before(0.08), CLOSED, within=0.02)
        yield from hand.reach(lambda: before(-0.1), CLOSED, unless=closed, most=40)


def open_drawer(hand: Hand, random: np.random.Generator) -> Actions:
    """Closed fingers over the plate's upper edge, down on it, pull; again, until it is open.

    It comes in flat, to clear what is above, then presses with the fingers as steep as there is room for.
    """
    simpler = hand.simpler
    tilt, aside = random.uniform(0.9, 1.0), random.uniform(-0.05, 0.05)

    def at(x: float, z: float, steeper: float = 0.0) -> Pose:
        """From the middle of the plate's upper edge."""
        place = front(simpler) + (x, aside, HALF_PLATE + z)
        return np.concatenate([place, turned(ALONG_Y, tilt - steeper)])

    def opened() -> bool:
        return simpler.state().drawer > FAR_OPEN

    while not opened():
        yield from hand.reach(lambda: at(0.07, 0.1), CLOSED, within=0.02)
        yield from hand.reach(lambda: at(-0.045, 0.038), CLOSED, within=0.01, most=20)
        yield from hand.reach(lambda: at(-0.05, -0.02, 0.2), CLOSED, within=0.01, most=5)
        yield from hand.reach(lambda: at(0.05, -0.03, 0.2), CLOSED, unless=opened, most=30)


SCRIPTS = {"pick": pick, "near": move_near, "close": close_drawer, "open": open_drawer}


class GoogleScripted:
    """One episode's policy; made after the reset. done: it has finished; the hand stays from then on."""

    def __init__(self, simpler: Simpler, random: np.random.Generator) -> None:
        self.done = False
        self._hand = Hand(simpler, random.uniform(0.07, 0.09))
        self._script = SCRIPTS[simpler.episode.task.kind](self._hand, random)
        self._fingers = 0.0

    def action(self) -> Action:
        """The next step's, by phase and state: move (m), turn (rotation vector, rad), fingers (1 closes)."""
        action = next(self._script, None)
        if action is None:
            self.done = True
            action = np.array([0, 0, 0, 0, 0, 0, self._fingers])
        self._fingers = action[6]
        return action


def google(simpler: Simpler, random: np.random.Generator) -> GoogleScripted:
    """The scripted policy for an episode of the Google robot, after its reset."""
    return GoogleScripted(simpler, random)
