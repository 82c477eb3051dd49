"""A server in a thread of the test, and clients that speak its protocol."""

import asyncio
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from policy_fakes import build_policy
from websockets.sync.client import ClientConnection, connect

from defi.robot.wire import pack, unpack
from Step3_DeFI.acting import Policy
from Step3_DeFI.serve.server import ServeConfig, Server


class RowPolicy(Policy):
    """Answers at once; they depend on all that is seen, and as a network's on row and size of the batch."""

    fault: str | None = None  # of every answer: nan, or 5: actions of that size

    def infer_batch(
        self, observations: Sequence[Mapping[str, Any]], seeds: Sequence[int], under_way: Any = None
    ) -> np.ndarray:
        chunks = []
        for row, (seen, seed) in enumerate(zip(observations, seeds)):
            self.check(seen)
            chunk = np.random.default_rng(seed).uniform(-1, 1, (10, 7)).astype(np.float32)
            chunk += sum(np.mean(seen["images"][camera]) for camera in self.robot.cameras) / 1000
            chunk += len(seen["instruction"]) * 1e-3 + 1e-5 * row + 1e-4 * len(seeds)
            chunks.append(chunk * float(self.fault) if self.fault else chunk)
        return np.stack(chunks)


def row_policy(fault: str | None = None, **changes: Any) -> RowPolicy:
    policy = RowPolicy(build_policy(**changes))
    policy.fault = fault
    return policy


@contextmanager
def serving(
    policy: Policy, *, api_key: str | None = None, identity: Any = None, **config: Any
) -> Iterator[tuple[str, Server]]:
    """The address of a server in another thread, and the server; it ends without an error."""
    server, found = Server(policy, ServeConfig(**config), api_key, identity), queue.Queue()
    stop, loops = asyncio.Event(), []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        await server.run("127.0.0.1", 0, stop, found.put)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        yield found.get(timeout=60), server
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def client(address: str, **headers: str) -> Iterator[ClientConnection]:
    """A connection that has read the metadata."""
    with connect(address, compression=None, max_size=None, additional_headers=headers) as connection:
        connection.metadata = unpack(connection.recv(timeout=60))
        yield connection


def ask(connection: ClientConnection, message: Any) -> Any:
    """The answer to a message."""
    connection.send(message if isinstance(message, (bytes, str)) else pack(message))
    answer = connection.recv(timeout=60)
    return answer if isinstance(answer, str) else unpack(answer)


def seen(number: int = 0, **changes: Any) -> dict[str, Any]:
    """An observation, as a policy takes it and as the server does."""
    rng = np.random.default_rng(number)
    images = {name: rng.integers(0, 256, (24, 40, 3), np.uint8) for name in ("static", "gripper")}
    return {"images": images, "instruction": f"open drawer {number}", **changes}
