"""Beside a robot's loop: a policy on a server, and actions in time. Nothing here needs PyTorch.

policy = RemotePolicy("ws://127.0.0.1:8000")
runner = Runner(policy, "rtc")
runner.run(observe, act, rate=30, until=lambda: runner.steps == 900)

Real-time chunking: Black, Galliker and Levine 2025 (arXiv 2506.07339), algorithm 1.
"""

import math
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from defi.errors import UserError, one_line
from defi.robot.chunk import UnderWay

MODES = {
    "sync": "looks when a chunk is carried out, and idles until the answer",
    "async": "asks for the next chunk while this one runs; chunks do not know of each other",
    "rtc": "as async, and each chunk goes on from the one under way",
}
RECENT = 10  # answers: the slowest of them is the delay to expect


def finite(actions: np.ndarray, source: str) -> np.ndarray:
    """Actions as float32. Raises UserError at NaN and infinite ones, which no motor may get."""
    with np.errstate(over="ignore"):
        actions = np.asarray(actions, np.float32)
    if not np.isfinite(actions).all():
        raise UserError(f"{source}: NaN or infinite actions; its weights or its precision are broken")
    return actions


class RemotePolicy:
    """The policy of a server that speaks openpi's protocol, `python -m Step3_DeFI.serve` say.

    One request at a time, from any thread. A connection that is lost is made again, once per request. It goes
    straight to the server, whatever proxy the environment names.

    Args:
        url: ws://host:port
        api_key: where the server wants one.
        timeout: seconds to wait for the connection, and for an answer.

    Raises:
        UserError: no server there, or it refuses. The message is one line.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 10) -> None:
        self.url, self._key, self._timeout = url, api_key, timeout
        self.metadata: Mapping[str, Any] = {}  # what the server says of its robot
        self.timing: Mapping[str, float] = {}  # of the last answer, as the server measured it
        self._connection: Any = None
        self._lock = threading.Lock()
        with self._lock:
            self._connect()

    def infer(
        self, observation: Mapping[str, Any], seed: int | None = None, under_way: UnderWay | None = None
    ) -> np.ndarray:
        """The next actions, float32 [K, A] in the robot's units.

        Args:
            observation: by the keys that the server's metadata name.
            seed: of this answer's noise; None: the server counts.
            under_way: what the answer goes on from.

        Raises:
            UserError: the connection is lost, what the server says against the observation, or NaN actions.
        """
        from defi.robot.wire import pack, unpack

        message = dict(observation)
        if seed is not None:
            message["seed"] = seed
        if under_way is not None:
            message |= {"under_way": under_way.actions, "delay": under_way.delay}
        answer = self._ask(pack(message))
        if isinstance(answer, str):  # openpi's server sends a traceback, whose last line says what it was
            self.close()
            raise UserError(f"{self.url}: {one_line(Exception((answer.strip().splitlines() or [''])[-1]))}")
        found = unpack(answer)
        actions = np.asarray(found.get("actions") if isinstance(found, Mapping) else None)
        if actions.ndim != 2 or not len(actions) or actions.dtype.kind not in "fiu":
            raise UserError(f"{self.url}: an answer without actions [K, A]; is it a policy server?")
        self.timing = found.get("server_timing") or {}
        return finite(actions, self.url)

    def _ask(self, message: bytes) -> bytes | str:
        from websockets.exceptions import ConnectionClosed

        with self._lock:
            lost = False
            while True:
                if self._connection is None:
                    self._connect()
                try:
                    self._connection.send(message)
                    return self._connection.recv(timeout=self._timeout)
                except TimeoutError:
                    self._drop()  # an answer that comes late would be taken for the next one
                    raise UserError(f"{self.url}: no answer in {self._timeout:g} s") from None
                except (ConnectionClosed, OSError) as error:
                    self._drop()
                    if lost:
                        raise UserError(f"{self.url}: connection lost ({one_line(error)})") from None
                    lost = True

    def _connect(self) -> None:
        from websockets.exceptions import InvalidStatus, WebSocketException
        from websockets.sync.client import connect

        from defi.robot.wire import unpack

        headers = {"Authorization": f"Api-Key {self._key}"} if self._key else {}
        how: Any = {"compression": None, "max_size": 2**24, "open_timeout": self._timeout, "proxy": None}
        try:
            self._connection = connect(self.url, additional_headers=headers, **how)
            said = self._connection.recv(timeout=self._timeout)
        except InvalidStatus as error:
            self._drop()
            status = error.response.status_code
            fix = "give the server's api_key" if status in (401, 403) else "is it a policy server?"
            if status == 503:  # it is one, and says what keeps it
                fix = one_line(Exception(bytes(error.response.body or b"busy").decode(errors="replace")))
            raise UserError(f"{self.url}: the server refuses (HTTP {status}); {fix}") from None
        except (OSError, WebSocketException, ValueError) as error:  # a timeout is an OSError
            self._drop()
            raise UserError(f"{self.url}: no policy server answers ({one_line(error)})") from None
        found = unpack(said) if isinstance(said, bytes) else {}
        self.metadata = found if isinstance(found, Mapping) else {}

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close_timeout = 0.2  # the other side may be gone
            connection.close()

    def close(self) -> None:
        """End the connection; the next request makes a new one."""
        with self._lock:
            self._drop()


class Runner:
    """One action per control step, whatever the policy takes to answer.

    Chunks are asked for in a thread. Of an answer, the actions that were carried out since its observation
    are dropped; where none is left before it comes, the step is idle: the last action again, its changes 0.
    The first answer is waited for, and is not measured: it warms the policy up.

    Args:
        policy: a `RemotePolicy`, a `Policy` in this process, or anything else with their `infer`.
        mode: see `MODES`.
        executed: control steps from one look to the next, if answers are that fast. None: as the policy says
            of its robot, else all of a chunk; in modes async and rtc at most half of it, which leaves the
            policy the other half to answer in.
        relative: which numbers of an action are changes. None: as the policy says, else none.
        seed: of the first look; each has the next one.
        submit: runs a function and returns its future, as an executor's; tests give their own.

    What the policy says: `metadata` of a `RemotePolicy`, `robot` of a `Policy`. Warns where mode rtc meets a
    server that does not say that it knows real-time chunking.

    Attributes:
        steps: control steps since the start or `reset`. idle: so many of them were.
        answers: chunks that came; grows in the step that carries out the first action of a new one.
        taken: control steps with an action since the observation of the chunk under way.
        delays: control steps that the last answers took. late: steps that `run` began too late.
    """

    def __init__(
        self,
        policy: Any,
        mode: str = "rtc",
        *,
        executed: int | None = None,
        relative: Sequence[bool] | None = None,
        seed: int = 0,
        submit: Callable[[Callable[[], np.ndarray]], Future] | None = None,
    ) -> None:
        if mode not in MODES:
            raise UserError(f"mode={mode}: choose one of {', '.join(MODES)}")
        if executed is not None and executed < 1:
            raise UserError(f"executed={executed}: must be 1 or more")
        said: Mapping[str, Any] = {"real_time_chunking": True}
        if (robot := getattr(policy, "robot", None)) is not None:
            said = {**said, "relative": robot.actions.relative, "executed": robot.executed}
        said = getattr(policy, "metadata", said)
        if mode == "rtc" and not said.get("real_time_chunking"):
            unknown = "the server does not say that it knows real-time chunking"
            warnings.warn(f"{unknown}; if it does not, chunks come as in mode async", stacklevel=2)
        most, known = said.get("executed"), said.get("relative")
        self._most = most if isinstance(most, int) and most > 0 else None
        if relative is None and isinstance(known, Sequence):
            relative = known
        self._relative = None if relative is None else np.array([bool(each) for each in relative])
        self.policy, self.mode, self.executed = policy, mode, executed
        self._pool = None if submit else ThreadPoolExecutor(1, "policy")
        self._submit = submit or self._pool.submit
        self.delays: deque[int] = deque(maxlen=RECENT)
        self.late = 0
        self.reset(seed)

    def reset(self, seed: int = 0) -> None:
        """Forget the chunk under way, for a new episode. What answers take is remembered."""
        self.steps = self.idle = self.answers = 0
        self._seed, self._last = seed, np.empty(0)
        self._queue: deque[np.ndarray] = deque()  # what is left of the chunk under way
        self._size = self.taken = 0  # of the chunk under way: K, and actions since its observation
        self._pending: Future | None = None
        self._asked = self._consumed = 0  # step of the pending observation, and actions carried out since

    def close(self) -> None:
        """End the thread that asks. The policy stays open."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def step(self, observe: Callable[[], Mapping[str, Any]]) -> np.ndarray:
        """The action [A] of this control step; returns at once, but for the very first.

        observe: returns the observation of this moment; called only where a chunk is asked for.

        Raises:
            UserError: what the policy said against the observation, the connection is lost, or actions that
                no robot can carry out. Those of the chunk before are still there.
        """
        if self._arrived():
            self._take()
        if self._pending is None and (not self._queue or self.taken >= self._horizon()):
            self._ask(observe)
            if not self.answers or self._arrived():  # the first, or of a policy that takes no time
                self._take()
        self.steps += 1
        if not self._queue:
            self.idle += 1
            still = self._last.copy()
            if self._relative is not None:
                still[self._relative] = 0  # a change sent again would be another one
            return still
        self.taken, self._consumed = self.taken + 1, self._consumed + 1
        self._last = self._queue.popleft()
        return self._last.copy()

    def _horizon(self) -> int:
        most = self._size if self.mode == "sync" else max(1, self._size // 2)
        return self.executed or min(self._most or most, most)

    def _ask(self, observe: Callable[[], Mapping[str, Any]]) -> None:
        if self.mode == "sync":
            self._queue.clear()
        observation, seed, under_way = observe(), self._seed, None
        if self.mode == "rtc" and self._queue:
            # Until one was measured, the longest that leaves no gap.
            delay = min(max(self.delays, default=len(self._queue)), len(self._queue))
            under_way = UnderWay(np.stack(self._queue), delay)
        self._pending = self._submit(lambda: self.policy.infer(observation, seed=seed, under_way=under_way))
        self._seed, self._asked, self._consumed = self._seed + 1, self.steps, 0

    def _arrived(self) -> bool:
        return self._pending is not None and self._pending.done()

    def _take(self) -> None:
        pending, self._pending = self._pending, None
        chunk = finite(pending.result(), "the policy")
        if self._relative is not None and len(self._relative) != chunk.shape[1]:
            raise UserError(f"relative: {len(self._relative)} values for actions of {chunk.shape[1]} numbers")
        if self.answers:
            self.delays.append(self.steps - self._asked)
        self._queue = deque(chunk[self._consumed :].copy())
        self._size, self.taken, self.answers = len(chunk), self._consumed, self.answers + 1

    def run(
        self,
        observe: Callable[[], Mapping[str, Any]],
        act: Callable[[np.ndarray], None],
        *,
        rate: float,
        until: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Step `rate` times a second until it is time to stop: look, if it is time for that, and send the
        action at once, when the one before has had its time. What began too late is not made up for.

        Raises:
            UserError: as `step`; or no rate.
        """
        if rate is None or not 0 < rate < math.inf:
            raise UserError(f"rate={rate}: give the robot's control steps per second, more than 0")
        due, sent = None, 0.0
        while not until():
            now = clock()
            if due is not None and now > due:
                self.late += 1
                due = sent + 1 / rate  # an action that was sent late has its time, too
            if due is not None and now < due:
                sleep(due - now)
            began = max(now, due or now)
            action = self.step(observe)
            sent = clock()
            act(action)
            due = (sent if due is None else began) + 1 / rate  # the first one was waited for
