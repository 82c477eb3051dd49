"""What clients send, in openpi's and starVLA's protocols, as questions to a policy; what it says of itself.

openpi: {keys of an observation, and our own seed, under_way, delay} → {"actions": [K, A], "server_timing"}.
starVLA: {"examples": [{"image": [of each camera], "lang", "state"?}, …], "seeds"?} → {"status", "ok", "type",
"request_id", "data": {"actions": [B, K, A]}}.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from defi.config import CONFIG_DIR
from defi.errors import UserError
from defi.files import read_yaml
from defi.picture import decode_picture
from defi.robot.chunk import UnderWay
from defi.robot.wire import unpack
from Step3_DeFI.acting import Policy

EXAMPLES = 64  # of a starVLA message
INFER = ("infer", "predict_action")  # what starVLA calls messages with examples
WORDS, WORD = 400, 128  # characters of an instruction, and of one without a space: long ones take seconds
SIDE = 4096  # pixels: to resize a picture of 1 x 2,000,000 takes ten seconds
SCANS = 64  # of a JPEG: each goes over the whole picture, however few bytes it has
MAPS = CONFIG_DIR / "serve" / "keys"


@dataclass(frozen=True)
class Keys:
    """Where in a message of openpi's protocol a policy finds what it sees: configs/step3_serve.yaml."""

    images: Mapping[str, str]  # camera → key
    state: list[str]  # joined; empty: not read
    instruction: str

    @classmethod
    def read(cls, setting: Any, cameras: Sequence[str], *, state: bool) -> "Keys":
        """Of the setting `serve.keys`; UserError: it lacks a camera, or the state where that is read."""
        own: dict[str, Any] = {"images": {camera: f"images/{camera}" for camera in cameras}}
        own |= {"state": "state", "instruction": "instruction"}
        if isinstance(setting, str):
            ready = sorted(file.stem for file in MAPS.glob("*.yaml"))
            if setting not in ready:
                raise UserError(f"serve.keys={setting}: choose from {', '.join(ready)}, or give a map")
            setting = read_yaml(MAPS / f"{setting}.yaml", "copy it again")
        if not isinstance(setting or {}, Mapping) or (unknown := set(setting or {}) - set(own)):
            wrong = f"no {min(unknown)}" if isinstance(setting, Mapping) else setting
            raise UserError(f"serve.keys: {wrong}; give {{images: …, state: …, instruction: …}}")
        given = own | dict(setting or {})
        images, states = (
            [value] if isinstance(value, str) else value or [] for value in (given["images"], given["state"])
        )
        if isinstance(images, list):  # by the order of the cameras
            images = dict(zip(cameras, images))
        listed = isinstance(images, Mapping) and isinstance(states, list)
        named: list[Any] = [*images.values(), *states, given["instruction"]] if listed else [None]
        if not all(isinstance(key, str) for key in named):
            raise UserError(f"serve.keys: {images}, {states}, {given['instruction']} must be texts or lists")
        if missing := [camera for camera in cameras if camera not in images]:
            raise UserError(f"serve.keys.images: no key for {', '.join(missing)}, which this policy sees")
        if state and not states:
            raise UserError("serve.keys.state: no key, but this policy reads the state")
        return cls({camera: images[camera] for camera in cameras}, states if state else [], named[-1])


@dataclass(frozen=True, eq=False)
class Asked:
    """A message that was understood: observations that the policy takes; some of starVLA's types have none.

    request: starVLA's number of the message, which is echoed; None: openpi's protocol.
    kind: starVLA's type of the message: infer, ping, or one that is not known here.
    seeds: one per observation; None: the connection counts.
    """

    observations: list[dict[str, Any]]
    request: str | int | None = None
    kind: Any = "infer"
    seeds: list[int] | None = None
    under_way: UnderWay | None = None


class Reader:
    """Reads messages of strangers. most: bytes of all pictures of a message, once they are decoded."""

    def __init__(self, policy: Policy, keys: Keys, most: int) -> None:
        self.policy, self.keys, self.most = policy, keys, most

    def read(self, message: bytes) -> Asked:
        """Raises UserError, in one line, for whatever the policy could not answer."""
        found = unpack(message)
        if not isinstance(found, dict):
            raise UserError(f"message: a {type(found).__name__}; send an observation, a dict")
        payload = found.get("payload", found)
        kind, request = found.get("type", "infer"), found.get("request_id")
        request = request if isinstance(request, (str, int)) else "default"
        if isinstance(payload, dict) and "examples" in payload:
            observations = list(self._examples(payload["examples"]))
            asked = Asked(observations, request, seeds=_seeds(payload, len(observations)))
        elif isinstance(kind, str) and kind not in INFER:
            asked = Asked([], request, kind)
        else:
            seeds = None if found.get("seed") is None else [_seed(found["seed"])]
            asked = Asked([self._observation(found)], seeds=seeds, under_way=self._under_way(found))
        for observation in asked.observations:
            words = observation["instruction"]
            if len(words) > WORDS or max(map(len, words.split()), default=0) > WORD:
                limits = f"more than {WORDS} characters, or {WORD} without a space"
                raise UserError(f"observation: an instruction of {limits}")
            self.policy.check(observation)
        return asked

    def _observation(self, found: dict[str, Any]) -> dict[str, Any]:
        left = self.most
        images = {}
        for camera, key in self.keys.images.items():
            images[camera], left = _picture(_find(found, key), key, left)
        seen = {"images": images, "instruction": _text(_find(found, self.keys.instruction))}
        if self.keys.state:
            seen["state"] = np.concatenate([_numbers(_find(found, key), key) for key in self.keys.state])
        return seen

    def _examples(self, examples: Any) -> Iterator[dict[str, Any]]:
        if not isinstance(examples, list) or not 1 <= len(examples) <= EXAMPLES:
            raise UserError(f"examples: give a list of 1 to {EXAMPLES}")
        cameras, left = self.policy.robot.cameras, self.most
        for number, example in enumerate(examples):
            where = f"examples[{number}]"
            pictures = example.get("image") if isinstance(example, dict) else None
            pictures = pictures if isinstance(pictures, list) else [pictures]
            if len(pictures) != len(cameras):
                fix = f"give {len(cameras)}, in this order: {', '.join(cameras)}"
                raise UserError(f"{where}.image: {len(pictures)} pictures; {fix}")
            images = {}
            for camera, picture in zip(cameras, pictures):
                images[camera], left = _picture(picture, f"{where}.image", left)
            seen = {"images": images, "instruction": _text(example.get("lang"))}
            if self.policy.model.config.state:
                seen["state"] = _numbers(example.get("state"), f"{where}.state")
            yield seen

    def _under_way(self, found: dict[str, Any]) -> UnderWay | None:
        if found.get("under_way") is None:
            return None
        under_way = UnderWay(found["under_way"], found.get("delay", -1))
        under_way.check(self.policy.model.config.chunk, self.policy.model.config.action_dim)
        return under_way


def _find(found: dict[str, Any], key: str) -> Any:
    """The value of a key a/b: as it is, or in the dict a."""
    if key in found:
        return found[key]
    value: Any = found
    for part in key.split("/"):
        if not isinstance(value, dict) or part not in value:
            raise UserError(f"observation: no {key}; the server's metadata name the keys (serve.keys)")
        value = value[part]
    return value


def _picture(value: Any, where: str, left: int) -> tuple[Any, int]:
    """uint8 [H, W, 3], from pixels (also [3, H, W]) or JPEG or PNG; and how many bytes may follow."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1:
        value = value.tobytes()  # as OpenCV encodes
    if isinstance(value, bytes):
        if value.startswith(b"\xff\xd8") and value.count(b"\xff\xda") > SCANS:
            raise UserError(f"{where}: a JPEG of more than {SCANS} scans; send it with fewer, baseline say")
        value = decode_picture(value, where, most=left, fix="encode it again")
    if not isinstance(value, np.ndarray):
        raise UserError(f"{where}: a {type(value).__name__}; give uint8 [H, W, 3], or JPEG or PNG")
    if max(value.shape, default=0) > SIDE:
        raise UserError(f"{where}: a side of more than {SIDE} pixels; send it smaller")
    if value.ndim == 3 and value.shape[0] == 3 != value.shape[2]:
        value = value.transpose(1, 2, 0)
    return np.array(value), left - value.nbytes  # which may be written to, as PyTorch wants


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"observation: the instruction is a {type(value).__name__}; give a sentence")
    return value


def _numbers(value: Any, where: str) -> np.ndarray:
    """float32 [S]; of [1, S], as starVLA sends, its row."""
    try:
        numbers = np.asarray(value)
    except ValueError:  # lists of unequal length
        numbers = np.asarray(None)
    if numbers.dtype.kind not in "fiu" or numbers.ndim > 2:
        raise UserError(f"{where}: give numbers, float32 [S] say")
    with np.errstate(over="ignore"):  # infinite, which the policy refuses
        return numbers.astype(np.float32).reshape(-1)


def _seeds(payload: dict[str, Any], examples: int) -> list[int] | None:
    seeds = payload.get("seeds")
    if seeds is None:
        return None
    if isinstance(seeds, np.ndarray):
        seeds = seeds.tolist()
    if not isinstance(seeds, list) or len(seeds) != examples:
        raise UserError(f"seeds: give a list of {examples}, one for each example")
    return [_seed(seed) for seed in seeds]


def _seed(seed: Any) -> int:
    if isinstance(seed, np.integer):
        seed = int(seed)
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UserError("seed: give a whole number from 0 to 2^63 − 1")
    return seed


def describe(policy: Policy, keys: Keys, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What clients are told on connecting: the robot, what to send, and what the answers depend on. Plain
    values."""
    robot, config = policy.robot, policy.model.config
    gripper = None if robot.gripper is None else vars(robot.gripper)
    return {
        "policy": "DeFI",
        "identity": dict(identity),
        "cameras": robot.cameras,
        "image_size": policy.model.image_size,  # pictures of other sizes are resized
        "actions": robot.actions.names,
        "units": robot.actions.units,
        "relative": robot.actions.relative,
        "low": robot.actions.low,
        "high": robot.actions.high,
        "gripper": gripper,
        "state": robot.state.names if config.state else None,
        "state_units": robot.state.units if config.state else None,
        "fps": robot.fps,
        "chunk": config.chunk,
        "executed": robot.executed or config.chunk,
        "keys": {"images": dict(keys.images), "state": keys.state, "instruction": keys.instruction},
        "real_time_chunking": True,
        "action_chunk_size": robot.executed or config.chunk,  # starVLA's clients carry out so many
        "available_unnorm_keys": [],
    }
