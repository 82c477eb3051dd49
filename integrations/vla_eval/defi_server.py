"""A DeFI policy as a model server of vla-eval (vla-evaluation-harness): its benchmarks, our checkpoints.

python integrations/vla_eval/defi_server.py --args.checkpoint=ckpts/policy --address=127.0.0.1:8000
vla-eval run --config <a benchmark's>.yaml --server-url ws://127.0.0.1:8000
"""

import json
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation
from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.model_servers.serve import run_server
from vla_eval.specs import (
    GRIPPER_CLOSE_01,
    GRIPPER_CLOSE_NEG,
    GRIPPER_CLOSE_POS,
    GRIPPER_RAW,
    IMAGE_RGB,
    LANGUAGE,
    RAW,
    DimSpec,
)

from defi.config import one_line_errors
from defi.engine.data import seed_of
from defi.errors import UserError
from Step3_DeFI.acting import Policy
from Step3_DeFI.batching import Batcher, Question

GRIPPERS = {(1, -1): GRIPPER_CLOSE_POS, (-1, 1): GRIPPER_CLOSE_NEG, (1, 0): GRIPPER_CLOSE_01}  # closed, open


class DeFIServer(PredictModelServer):
    """Answers with a chunk's actions, one per step: in the robot's units, changed by `factors` and `euler`.

    Each episode's noise comes from its task and number, so that it is acted alike in any order, in any shard
    and beside any other (`max_batch_size` the same).
    """

    def __init__(
        self,
        checkpoint: str,
        cameras: dict[str, str] | None = None,
        state: str = "states",
        factors: list[float] | None = None,
        euler: int | None = None,
        device: str = "cpu",
        precision: str | None = None,
        seed: int = 0,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            checkpoint: a run, a checkpoint, an exported folder, or one on the hub.
            cameras: the policy's cameras → the benchmark's; those left out have the same name.
            state: the observation's key of the state, for a policy that reads it.
            factors: [A], what one of the robot's units is in the benchmark's: 0.02 where the robot's is 2 cm
                and the benchmark's 1 m, −1 where they differ in sign.
            euler: the first of three dimensions that are roll, pitch and yaw (about fixed axes) where the
                benchmark wants a rotation vector; None: nothing is turned into one.
            precision: no, fp16 or bf16; None: that of its training.
            chunk_size: actions carried out before the next look; None: as the robot's spec says.
            kwargs: see `PredictModelServer`: max_batch_size, …
        """
        self.policy = Policy.load(checkpoint, device=device, precision=precision)
        robot, size = self.policy.robot, self.policy.model.config.action_dim
        if unknown := set(cameras or {}) - set(robot.cameras):
            seen = f"this policy sees {', '.join(robot.cameras)}"
            raise UserError(f"cameras: {min(unknown)}: no such camera; {seen}")
        if factors is not None and len(factors) != size:
            raise UserError(f"factors: {len(factors)} numbers; give {size}: {', '.join(robot.actions.names)}")
        executed = robot.executed or self.policy.model.config.chunk
        super().__init__(chunk_size=chunk_size or executed, **kwargs)
        self.cameras = {camera: camera for camera in robot.cameras} | (cameras or {})
        self.factors = np.array(factors or [1] * size, np.float32)
        self.euler = None if euler is None else slice(euler, euler + 3)
        self.state, self.seed = state if self.policy.model.config.state else None, seed
        self.rows = self.max_batch_size
        self._episodes: dict[str, str] = {}  # session → its task and number

    def get_observation_params(self) -> dict[str, Any]:
        return {"send_wrist_image": len(self.cameras) > 1, "send_state": self.state is not None}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        state = {} if self.state is None else {"state": RAW}
        return {"language": LANGUAGE, **dict.fromkeys(self.cameras.values(), IMAGE_RGB), **state}

    def get_action_spec(self) -> dict[str, DimSpec]:
        """Of the gripper, where sign errors are usual; vla-eval has no words for the rest of a robot."""
        if (gripper := self.policy.robot.gripper) is None:
            return {"actions": RAW}
        ends = np.array([gripper.below, gripper.above]) * self.factors[gripper.dimension]
        closed, opened = ends if gripper.opens else ends[::-1]
        return {"gripper": GRIPPERS.get((closed, opened), GRIPPER_RAW)}

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        self._episodes[ctx.session_id] = json.dumps(config.get("task"), sort_keys=True)
        await super().on_episode_start(config, ctx)

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        self._episodes.pop(ctx.session_id, None)
        await super().on_episode_end(result, ctx)

    async def on_observation(self, obs: dict[str, Any], ctx: SessionContext) -> None:
        if obs.get("episode_restart"):  # another instruction: what is left of the chunk is for the last one
            await super().on_episode_start({}, ctx)
        await super().on_observation(obs, ctx)

    def predict_batch(
        self, obs_batch: list[dict[str, Any]], ctx_batch: list[SessionContext]
    ) -> list[dict[str, Any]]:
        """`actions` [K, A] for each observation; `predict` asks with one."""
        batcher, answers = Batcher(self.policy, self.rows), {}
        for asker, (obs, ctx) in enumerate(zip(obs_batch, ctx_batch)):
            episode = self._episodes.get(ctx.session_id, "")
            seed = seed_of(f"vla-eval {episode}", self.seed, ctx.step)
            row = seed_of(f"vla-eval {episode}") % self.rows
            batcher.waiting.append(Question(asker, self._observation(obs), seed, row))
        while batcher.waiting:
            picked = batcher.take()
            actions = batcher.ask(picked) * self.factors
            if self.euler is not None:
                angles = actions[..., self.euler]
                vectors = Rotation.from_euler("xyz", angles.reshape(-1, 3)).as_rotvec()
                actions[..., self.euler] = vectors.reshape(angles.shape)
            answers |= {question.asker: {"actions": actions[row]} for row, question in picked.items()}
        return [answers[asker] for asker in range(len(obs_batch))]

    def _observation(self, obs: dict[str, Any]) -> dict[str, Any]:
        images = obs.get("images", {})
        if missing := [name for name in self.cameras.values() if name not in images]:
            fix = "name the benchmark's camera for each of the policy's in cameras"
            raise UserError(f"no camera {missing[0]} among {', '.join(images)}; {fix}")
        pictures = {camera: np.asarray(images[name]) for camera, name in self.cameras.items()}
        seen = {"images": pictures, "instruction": obs.get("task_description")}
        return seen if self.state is None or self.state not in obs else seen | {"state": obs[self.state]}


if __name__ == "__main__":
    with one_line_errors():
        run_server(DeFIServer)
