"""Scripted experts: `Expert(task, world).act(world)` gives the next action until the task is done.

They steer by the state of the world alone, with the hand pointing down, and leave with a short retreat, so
that the next task starts from a sane pose. `python -m defi.sim.experts` measures how often the judge agrees.
"""

import numpy as np
from jaxtyping import Float

from defi.errors import UserError
from defi.sim.experts.blocks import BLOCK_SKILLS, between, let_go
from defi.sim.experts.fixtures import FIXTURE_SKILLS
from defi.sim.experts.motion import Move, View, action
from defi.sim.tasks import TASKS, check_task
from defi.sim.world import World

SKILLS = FIXTURE_SKILLS | BLOCK_SKILLS
EXPERT_TASKS = tuple(task for task in TASKS if task in SKILLS)
RETREAT_STEPS = 12


class Expert:
    """Solves one task, once. Made when the task is given, for it may need to know how things stood then."""

    def __init__(self, task: str, world: World) -> None:
        if check_task(task) not in SKILLS:
            raise UserError(f"{task}: no expert; choose from {', '.join(EXPERT_TASKS)}")
        if not world.scene.table.grips:
            raise UserError(
                f"scene {world.scene.name}: experts know the built-in tables only; use sim=builtin"
            )
        self.skill = SKILLS[task](View.of(world))
        self._home: Float[np.ndarray, "3"] | None = None  # noqa: UP037
        self._retreat = RETREAT_STEPS

    def act(self, world: World) -> Float[np.ndarray, "7"] | None:
        """The next action, or None when the task is done and the hand is out of the way."""
        view = View.of(world)
        if not self.skill.done(view):
            self._home = None
            burden = next((name for name in view.blocks if between(view, name)), self.skill.block)
            move = self.skill.move(view) if burden == self.skill.block else let_go(view, burden)
            return action(move, view, world.arm.target_position)
        if self._home is None:
            self._home, self._retreat = view.tcp + self.skill.leave, RETREAT_STEPS
            self._yaw = float(view.euler[2])
        self._retreat -= 1
        if self._retreat < 0 or np.linalg.norm(self._home - view.tcp) < 0.02:
            return None
        return action(
            Move(self._home, gripper=self.skill.leave_gripper, yaw=self._yaw), view, world.arm.target_position
        )
