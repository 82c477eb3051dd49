"""A policy behind a server, as a rollout asks it."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from defi.config import typed
from defi.errors import UserError
from defi.robot.client import RemotePolicy
from defi.robot.spec import Robot, Vector
from Step3_DeFI.serve.messages import Keys


class ServedPolicy:
    """Answers of a server that speaks openpi's protocol; one of ours gives the same as its policy here.

    Args:
        robot: the benchmark's.
        keys: of the messages, as the setting `serve.keys`, where the server's metadata name none.

    Raises:
        UserError: no server there, or its policy sees other cameras than the simulators'.
    """

    def __init__(self, url: str, keys: Any, robot: Robot) -> None:
        self.client = RemotePolicy(url, api_key=os.environ.get("DEFI_API_KEY"), timeout=300)
        says = self.client.metadata
        cameras = says.get("cameras") or robot.cameras
        if unknown := [camera for camera in cameras if camera not in robot.cameras]:
            raise UserError(
                f"{url}: sees {', '.join(unknown)}; the simulators have {', '.join(robot.cameras)}"
            )
        self.identity = _identity(says)
        self.robot = replace(_robot(says, robot), cameras=list(cameras), executed=says.get("executed"))
        self.keys = Keys.read(says.get("keys") or keys, cameras, state=bool(says.get("state", robot.state)))
        if len(self.keys.state) > 1:
            parts = ", ".join(self.keys.state)
            raise UserError(
                f"{url}: takes the state in parts ({parts}), whose sizes are not known; give one key"
            )

    def infer_batch(
        self, observations: Sequence[Mapping[str, Any]], seeds: Sequence[int]
    ) -> Float[np.ndarray, "B K A"]:
        """One after the other; rows that only fill a batch hold the same observation, which is asked once."""
        rows = [(id(seen), seed) for seen, seed in zip(observations, seeds)]
        asked = dict(zip(rows, observations))
        answers = {row: self._infer(seen, row[1]) for row, seen in asked.items()}
        return np.stack([answers[row] for row in rows])

    def _infer(self, seen: Mapping[str, Any], seed: int) -> Float[np.ndarray, "K A"]:
        message = {key: seen["images"][camera] for camera, key in self.keys.images.items()}
        message |= dict.fromkeys(self.keys.state, seen["state"])
        message[self.keys.instruction] = seen["instruction"]
        answer = self.client.infer(message, seed)
        if _identity(self.client.metadata) != self.identity:  # after a lost connection
            raise UserError(
                f"{self.client.url}: another policy is served there now; continue with the first one"
            )
        return answer


def _robot(says: Mapping[str, Any], simulated: Robot) -> Robot:
    """The policy's robot as far as a server of ours says; of others it counts as the simulators'."""
    ours = {"actions", "units", "relative", "gripper", "fps"} <= says.keys()
    if not ours or not isinstance(says["actions"], list):
        return simulated
    known = asdict(simulated) | {"fps": says["fps"], "gripper": says["gripper"]}
    named = {"names": says["actions"], "units": says["units"], "relative": says["relative"]}
    robot = typed(Robot, known | {"actions": asdict(Vector.plain(says["actions"])) | named}, "the server")
    if len(robot.actions) != len(simulated.actions):
        have = f"{len(robot.actions)} numbers, the simulators' {len(simulated.actions)}"
        raise UserError(f"the server's actions have {have}; give a policy of the benchmark's robot")
    return robot


def _identity(says: Mapping[str, Any]) -> Any:
    """What a server says that its answers depend on, for a record in JSON; None: nothing."""
    return json.loads(json.dumps(says.get("identity"), default=str, skipkeys=True))
