"""The runner's account of every action, in steps that the tests count; and the client of a server."""

import contextlib
import itertools
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from defi.errors import UserError
from defi.robot.chunk import UnderWay
from defi.robot.client import MODES, RECENT, RemotePolicy, Runner
from defi.robot.wire import pack, unpack

ROOT = Path(__file__).resolve().parents[1]
K = 10


class Stamps:
    """A policy whose every action is its place in the plan: [place, 7]. It sees how far the arm is."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, int, UnderWay | None]] = []

    def infer(self, observation: Any, seed: int, under_way: UnderWay | None) -> np.ndarray:
        self.asked.append((observation["place"], seed, under_way))
        return np.stack([observation["place"] + np.arange(K), np.full(K, 7)], axis=1).astype(np.float32)


class Late(Future):
    """Done when it is time; asking for the result before that is waiting."""

    is_time: Callable[[], bool]

    def done(self) -> bool:
        return self.is_time()


def drive(
    mode: str, waits: Sequence[int], steps: int = 300, policy: Stamps | None = None, **given: Any
) -> tuple[list, list, Runner, Stamps]:
    """Actions that were carried out, and those sent in idle steps; answer i takes waits[i] steps, in turn."""
    policy, waiting, arm, still = policy or Stamps(), itertools.cycle(waits), [], []

    def submit(function: Callable[[], np.ndarray]) -> Future:
        late = Late()
        late.set_result(function())
        due = runner.steps + next(waiting)
        late.is_time = lambda: runner.steps >= due
        return late

    runner = Runner(policy, mode, submit=submit, **given)
    for _ in range(steps):
        idle = runner.idle
        action = runner.step(lambda: {"place": len(arm)})
        (still if runner.idle > idle else arm).append(action)
    return arm, still, runner, policy


@pytest.mark.parametrize("executed", [None, 1, 4, 5, 9, 10])
@pytest.mark.parametrize("waits", [[0], [1], [5], [7], [10], [25], [0, 3, 5, 1, 8, 2]], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_action_is_carried_out_once_and_in_order(
    mode: str, waits: list[int], executed: int | None
) -> None:
    arm, still, runner, policy = drive(mode, waits, executed=executed, relative=[True, False])
    np.testing.assert_array_equal(
        [place for place, _ in arm], np.arange(len(arm)), "none twice, none left out"
    )
    assert runner.steps == 300 == len(arm) + runner.idle and runner.idle == len(still)
    assert all(action.tolist() == [0, 7] for action in still), "a change is not sent again, the rest stays"
    assert [seed for _, seed, _ in policy.asked] == list(range(len(policy.asked)))
    horizon = executed or (K if mode == "sync" else K // 2)
    looks = np.diff([place for place, _, _ in policy.asked])
    assert (looks >= min(horizon, max(1, K - max(waits)))).all() and (looks <= K).all()
    if mode == "sync":
        assert (looks == horizon).all()
    if mode != "sync" and max(waits) <= K - max(horizon, *waits):
        assert runner.idle == 0
        if len(waits) == 1:
            assert (looks[1:] == max(horizon, *waits)).all()


@pytest.mark.parametrize(
    ("mode", "wait", "idle"), [("sync", 5, 5), ("async", 5, 0), ("rtc", 5, 0), ("async", 6, 1), ("rtc", 8, 3)]
)
def test_stalls_are_counted(mode: str, wait: int, idle: int) -> None:
    """Idle steps per answer; in the modes that look ahead only what is beyond the other half of a chunk."""
    arm, _, runner, policy = drive(mode, [wait], steps=600)
    assert abs(runner.idle - idle * (len(policy.asked) - 1)) <= idle
    assert set(runner.delays) == {wait} and len(runner.delays) == RECENT


def test_a_chunk_goes_on_from_exactly_what_lies_ahead() -> None:
    """Held to what will have been carried out: the slowest of the last answers, without the first of all."""
    waits = [40, 2, 4, *[1] * 40]
    _, still, runner, policy = drive("rtc", waits, steps=250, executed=6)
    assert policy.asked[0][2] is None and not still and 40 not in runner.delays
    for place, _, ahead in policy.asked[1:]:
        np.testing.assert_array_equal(ahead.actions[:, 0], np.arange(place, place + 4))
    delays = [ahead.delay for _, _, ahead in policy.asked[1:]]
    assert delays[:3] == [4, 2, 4] and delays[3 : 2 + RECENT] == [4] * (RECENT - 1)
    assert set(delays[2 + RECENT :]) == {1}
    for mode in ("sync", "async"):
        assert all(ahead is None for _, _, ahead in drive(mode, [3])[3].asked)


def test_a_new_episode_begins_anew() -> None:
    _, _, runner, policy = drive("rtc", [4], steps=48)
    runner.reset(seed=100)
    assert (runner.steps, runner.idle, runner.answers) == (0, 0, 0) and runner.delays
    action = runner.step(lambda: {"place": 500})
    assert action[0] == 500 and policy.asked[-1][1:] == (100, None)


def test_what_the_policy_says_against_an_observation_reaches_the_loop_and_the_next_step_asks_again() -> None:
    class Refuses(Stamps):
        def infer(self, observation: Any, seed: int, under_way: UnderWay | None) -> np.ndarray:
            if not self.asked:
                self.asked.append((0, 0, None))
                raise UserError("observation: no instruction; give a sentence")
            return super().infer(observation, seed, under_way)

    runner = Runner(Refuses(), "rtc")
    with pytest.raises(UserError, match="^observation: no instruction"):
        runner.step(lambda: {"place": 0})
    assert runner.step(lambda: {"place": 3})[0] == 3
    runner.close()
    with pytest.raises(RuntimeError):
        [runner.step(lambda: {"place": 3}) for _ in range(2 * K)]
    with pytest.raises(UserError, match="^mode=fast: choose one of sync, async, rtc$"):
        Runner(Stamps(), "fast")
    with pytest.raises(UserError, match="^executed=0: must be 1 or more$"):
        Runner(Stamps(), executed=0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e300])
def test_no_motor_gets_what_is_no_number(wrong: float) -> None:
    """The loop hears of it, and the next step asks again."""

    class Breaks(Stamps):
        def infer(self, observation: Any, seed: int, under_way: UnderWay | None) -> np.ndarray:
            chunk = super().infer(observation, seed, under_way).astype(float)
            chunk[8:9] *= wrong if seed == 1 else 1
            return chunk

    def submit(function: Callable[[], np.ndarray]) -> Future:
        (done := Future()).set_result(function())
        return done

    runner, arm = Runner(Breaks(), "async", submit=submit), []
    for step in range(12):
        with pytest.raises(UserError, match="NaN or infinite") if step == 5 else contextlib.nullcontext():
            arm.append(runner.step(lambda: {"place": len(arm)})[0])
    assert arm == list(range(11)) and runner.answers == 3


@pytest.mark.parametrize(
    ("mode", "given", "executed", "horizon"),
    [
        ("sync", None, None, 10),
        ("sync", None, 4, 4),
        ("rtc", None, 4, 4),
        ("rtc", None, 8, 5),
        ("async", None, "many", 5),
        ("rtc", 7, 4, 7),
        ("sync", 3, 4, 3),
    ],
)
def test_what_is_not_given_is_as_the_policy_says(
    mode: str, given: int | None, executed: Any, horizon: int
) -> None:
    for near in (True, False):
        policy = Stamps()
        if near:
            actions = SimpleNamespace(relative=[True, False])
            policy.robot = SimpleNamespace(actions=actions, executed=executed)
        else:
            policy.metadata = {"relative": [True, False], "executed": executed, "real_time_chunking": True}
        _, still, _, policy = drive(mode, [1], 60, policy, executed=given)
        looks = np.diff([place for place, _, _ in policy.asked])
        assert (looks == horizon).all() and len(looks) > 4
        assert all(action.tolist() == [0, 7] for action in still) and (mode == "sync") == bool(still)
    policy.metadata = {"relative": [True] * 7}
    with pytest.warns(UserWarning, match="does not say that it knows real-time chunking"):
        runner = Runner(policy, "rtc")
    with pytest.raises(UserError, match="^relative: 7 values for actions of 2 numbers$"):
        runner.step(lambda: {"place": 0})


@pytest.mark.parametrize("mode", MODES)
def test_the_loop_keeps_its_rate_and_counts_what_is_late(mode: str) -> None:
    """In a world that finishes a command a period after it was sent: a look sees all that lie before it."""
    now, sent = [0.0], []

    def observe() -> dict[str, int]:
        done = sum(at + 0.1 <= now[0] + 1e-9 for at, _ in sent)
        assert done == len(sent) == runner.steps, "the arm is where the chunk begins"
        now[0] += 0.25 if runner.answers == 3 else 0.01  # a camera that hangs once
        return {"place": sum(place > 0 for _, place in sent) + bool(sent)}

    def act(action: np.ndarray) -> None:
        now[0] += 0.02  # a slow bus
        sent.append((now[0] - 0.02, action[0]))

    def sleep(seconds: float) -> None:
        assert seconds > 0
        now[0] += seconds

    _, _, runner, _ = drive(mode, [2], steps=1, relative=[True, False])
    runner.reset()
    clock = {"clock": lambda: now[0], "sleep": sleep}
    runner.run(observe, act, rate=10, until=lambda: len(sent) == 60, **clock)
    times = np.array([at for at, _ in sent])
    hung = np.diff(times).argmax()
    assert runner.late == 1 and np.diff(times)[hung] == pytest.approx(0.35)
    for part in (times[: hung + 1], times[hung + 1 :]):  # the camera shifts an action, no other one
        assert (np.abs((part - part[0] + 0.05) % 0.1 - 0.05) < 0.011).all() and len(part) > 10
        assert len(part) - 1 == round((part[-1] - part[0]) / 0.1)
    places = [place for i, (_, place) in enumerate(sent) if i == 0 or place > 0]
    assert places == list(range(60 - runner.idle))
    for rate in (None, 0.0, math.nan):
        with pytest.raises(UserError, match=f"^rate={rate}: give the robot's control steps per second"):
            runner.run(observe, act, rate=rate, until=lambda: False)


def test_in_real_time_with_a_thread() -> None:
    class Slow(Stamps):
        def infer(self, *given: Any, **named: Any) -> np.ndarray:
            time.sleep(0.02)
            return super().infer(*given, **named)

    acted: list[np.ndarray] = []
    runner = Runner(Slow(), "rtc", relative=[True, False])
    began = time.monotonic()
    runner.run(
        lambda: {"place": sum(action[0] > 0 for action in acted) + bool(acted)},
        acted.append,
        rate=100,
        until=lambda: len(acted) == 60,
    )
    assert time.monotonic() - began >= 0.59 and len(acted) == 60
    places = [action[0] for i, action in enumerate(acted) if i == 0 or action[0] > 0]
    assert places == list(range(len(places))) and len(places) == 60 - runner.idle
    assert runner.delays and max(runner.delays) >= 2


# ------------------------------------------------------------ the client of a server


class Served:
    """A policy server of openpi's protocol for the tests; `says` is what it does with each message."""

    def __init__(self, says: Callable[[Any, dict], None], key: str | None = None) -> None:
        self.says, self.key, self.got, self.connections, self.full = says, key, [], 0, ""

    def __call__(self, connection: Any) -> None:
        self.connections += 1
        connection.send(pack({"chunk": K, "relative": [True, False], "real_time_chunking": True}))
        for message in connection:
            self.got.append(unpack(message))
            self.says(connection, self.got[-1])

    def admit(self, connection: Any, request: Any) -> Any:
        if self.key and request.headers.get("Authorization") != f"Api-Key {self.key}":
            return connection.respond(HTTPStatus.UNAUTHORIZED, "no")
        return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, self.full) if self.full else None


@contextlib.contextmanager
def serving(served: Served) -> Iterator[str]:
    from websockets.sync.server import serve

    with serve(served, "127.0.0.1", 0, process_request=served.admit, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()


def good(connection: Any, message: dict) -> None:
    actions = message["place"] + np.zeros((K, 2), np.float32)
    connection.send(pack({"actions": actions, "server_timing": {"infer_ms": 1.5}}))


def test_a_policy_far_away_answers_like_one_that_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):  # a laboratory's, which is not there
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    served = Served(good, key="secret")
    with serving(served) as url:
        policy = RemotePolicy(url, api_key="secret", timeout=5)
        assert policy.metadata["relative"] == [True, False]
        actions = policy.infer({"place": 3, "images": {"wrist": np.zeros((4, 4, 3), np.uint8)}})
        assert actions.dtype == np.float32 and actions.shape == (K, 2) and (actions == 3).all()
        assert served.got[0].keys() == {"place", "images"} and policy.timing == {"infer_ms": 1.5}
        policy.infer({"place": 3}, seed=2**62 + 1, under_way=UnderWay(np.ones((4, 2)), 2))
        assert (served.got[1]["seed"], served.got[1]["delay"]) == (2**62 + 1, 2)
        np.testing.assert_array_equal(served.got[1]["under_way"], np.ones((4, 2), np.float32))
        runner = Runner(policy, "rtc")
        assert [runner.step(lambda: {"place": 9})[0] for _ in range(5)] == [9] * 5
        policy.close()
        assert (policy.infer({"place": 4}) == 4).all(), "connects again"
        policy.close()
        with pytest.raises(UserError, match=r"refuses \(HTTP 401\); give the server's api_key$"):
            RemotePolicy(url, api_key="other")
        served.full = "too many\nclients\n"
        with pytest.raises(UserError, match=r"refuses \(HTTP 503\); too many clients$"):
            RemotePolicy(url, api_key="secret")


def test_whatever_goes_wrong_is_one_line() -> None:
    lost: list[bool] = []

    def faults(connection: Any, message: dict) -> None:
        match message["place"]:
            case "error":
                connection.send("Traceback\n  File x\nValueError: no picture of the camera wrist\n")
                connection.close(1011)
            case "hang":
                time.sleep(0.4)
            case "gone once" if not lost:
                lost.append(True)
                connection.close()
            case "always gone":
                connection.close()
            case "other":
                connection.send(pack({"data": [1, 2]}))
            case "nan":
                connection.send(pack({"actions": np.full((K, 2), np.nan)}))
            case "damaged":
                connection.send(b"\xc1")
            case _:
                good(connection, {"place": 1})

    served = Served(faults)
    with serving(served) as url:
        policy = RemotePolicy(url, timeout=0.2)
        for place, message in {
            "error": "ValueError: no picture of the camera wrist$",
            "hang": "no answer in 0.2 s$",
            "always gone": r"connection lost \(.*\)$",
            "other": r"an answer without actions \[K, A\]; is it a policy server\?$",
            "nan": "NaN or infinite actions; its weights or its precision are broken$",
            "damaged": "message: cannot be read",
        }.items():
            with pytest.raises(UserError, match=message) as caught:
                policy.infer({"place": place})
            assert "\n" not in str(caught.value)
            assert (policy.infer({"place": "fine"}) == 1).all(), "the next one is answered"
        assert (policy.infer({"place": "gone once"}) == 1).all() and lost, "made again, and asked again"
        policy.close()
    with pytest.raises(UserError, match=rf"^{re.escape(url)}: no policy server answers \([^\n]*\)$"):
        RemotePolicy(url, timeout=0.2)
    with pytest.raises(UserError, match="no policy server answers"):
        RemotePolicy("nonsense")


def test_a_robots_computer_needs_three_packages() -> None:
    """NumPy, msgpack and websockets: everything else that is not Python's own is refused here."""
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "defi", "numpy", "msgpack", "websockets"}:
            raise ImportError(f"{name} is not on a robot's computer")
sys.meta_path.insert(0, Refuse())
import numpy as np
from defi.errors import UserError
from defi.robot.chunk import UnderWay
from defi.robot.client import RemotePolicy, Runner
from defi.robot.wire import pack, unpack
class Still:
    def infer(self, observation, seed, under_way):
        return np.zeros((10, 2))
runner = Runner(Still())
assert all((runner.step(dict) == 0).all() for _ in range(30))
assert unpack(pack({"a": np.ones(2)}))["a"].sum() == 2
try:
    RemotePolicy("ws://127.0.0.1:9", timeout=0.2)
except UserError as error:
    print(error)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ws://127.0.0.1:9: no policy server answers (")
