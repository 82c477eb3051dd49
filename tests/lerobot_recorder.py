"""What commands of LeRobot import as a plug-in in `test_lerobot_plugin.py`: an arm that is not there, and a
record of what goes in and out of it, of gym-pusht and of the policy, written to $RECORD at the end."""

import atexit
import os
import pickle
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
from lerobot.robots import Robot, RobotConfig

from Step3_DeFI.acting import Policy

CAMERAS = {"static": (200, 200, 3), "wrist": (84, 84, 3)}
STATE = [f"s{n}.pos" for n in range(15)]
ACTIONS = [f"{name}.pos" for name in ("x", "y", "z", "roll", "pitch", "yaw", "gripper")]
events: list[tuple[str, Any]] = []  # in the order that they happened


def record(kind: str, *values: Any) -> None:
    events.append((kind, values))


def write() -> None:
    with open(os.environ["RECORD"], "wb") as file:
        pickle.dump(events, file)


def recorded(method: Any) -> Any:
    """`Policy.infer_batch`, its arguments and its answer."""

    @wraps(method)
    def infer_batch(self: Policy, observations: Any, seeds: Any, under_way: Any = None) -> Any:
        actions = method(self, observations, seeds, under_way)
        ahead = None if under_way is None or under_way[0] is None else under_way[0]
        record("look", observations, seeds, ahead and (ahead.actions, ahead.delay), actions.copy())
        return actions

    return infer_batch


def record_pusht() -> None:
    from gym_pusht.envs.pusht import PushTEnv

    reset, step = PushTEnv.reset, PushTEnv.step

    def reset_recorded(self: Any, *given: Any, **settings: Any) -> Any:
        answer = reset(self, *given, **settings)
        record("reset", id(self), answer[0]["pixels"].copy(), answer[0]["agent_pos"].copy())
        return answer

    def step_recorded(self: Any, action: Any) -> Any:
        answer = step(self, action)
        record(
            "step",
            id(self),
            answer[0]["pixels"].copy(),
            answer[0]["agent_pos"].copy(),
            np.array(action),
        )
        return answer

    PushTEnv.reset, PushTEnv.step = reset_recorded, step_recorded


@RobotConfig.register_subclass("recorder")
@dataclass(kw_only=True)
class RecorderConfig(RobotConfig):
    pass


class Recorder(Robot):
    """Its pictures and its state say how often it was looked at."""

    config_class, name = RecorderConfig, "recorder"
    observation_features = CAMERAS | dict.fromkeys(STATE, float)
    action_features = dict.fromkeys(ACTIONS, float)
    is_connected, is_calibrated = False, True

    def connect(self, calibrate: bool = True) -> None:
        self.is_connected, self.looks = True, 0

    def get_observation(self) -> dict[str, Any]:
        rng, self.looks = np.random.default_rng(self.looks), self.looks + 1
        seen = {name: rng.integers(0, 256, shape, np.uint8) for name, shape in CAMERAS.items()}
        seen |= {name: float(np.float32(rng.normal())) for name in STATE}
        record("seen", seen)
        return seen

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        record("sent", np.array([action[name] for name in ACTIONS], np.float32))
        return action

    def calibrate(self) -> None: ...

    def configure(self) -> None: ...

    def disconnect(self) -> None:
        self.is_connected = False


if "RECORD" in os.environ:
    Policy.infer_batch = recorded(Policy.infer_batch)
    record_pusht()
    atexit.register(write)
