"""Scripted policies (oracles) for all 34 tasks: `ScriptedPolicy(task, world).act(world)` is the next action.

They steer by the state of the world alone, with the hand pointing down, and leave with a short retreat, so
that the next task starts from a sane pose. `python -m defi.sim.scripted` measures how often they succeed.
"""

import numpy as np
from jaxtyping import Float

from defi.errors import UserError
from defi.sim.scripted.blocks import BLOCK_SKILLS, let_go
from defi.sim.scripted.fixtures import FIXTURE_SKILLS
from defi.sim.scripted.motion import Move, Point, View, action
from defi.sim.tasks import check_task
from defi.sim.world import World

SKILLS = FIXTURE_SKILLS | BLOCK_SKILLS
RETREAT_STEPS = 12


class ScriptedPolicy:
    """Solves one task, once. Made when the task is given: it may depend on the state at its start."""

    def __init__(self, task: str, world: World) -> None:
        check_task(task)
        if not world.scene.table.grips:
            raise UserError(
                f"scene {world.scene.name}: scripted policies know the built-in tables only; use sim=builtin"
            )
        self.skill = SKILLS[task](View.of(world))
        self._home: Point | None = None  # where the hand goes when the task is done

    def act(self, world: World) -> Float[np.ndarray, "7"] | None:
        """The next action, or None when the task is done and the hand is out of the way."""
        view = View.of(world)
        if not self.skill.done(view):
            self._home = None
            in_hand = next((name for name in view.blocks if view.between(name)), self.skill.block)
            move = self.skill.move(view) if in_hand == self.skill.block else let_go(view, in_hand)
            return action(move, view, world.arm.target_position)
        if self._home is None:
            self._home, self._yaw, self._retreat = view.tcp + self.skill.leave, view.yaw, RETREAT_STEPS
        self._retreat -= 1
        if self._retreat < 0 or np.linalg.norm(self._home - view.tcp) < 0.02:
            return None
        move = Move(self._home, gripper=self.skill.leave_gripper, yaw=self._yaw)
        return action(move, view, world.arm.target_position)
