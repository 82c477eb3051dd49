"""A policy behind a websocket, for several clients: one thread infers, the event loop does the rest."""

import asyncio
import hmac
import itertools
import logging
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import numpy as np
from websockets.asyncio.server import Request, Response, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from defi.engine.data import seed_of
from defi.errors import UserError, choose
from defi.robot.chunk import UnderWay
from defi.robot.wire import pack
from Step3_DeFI.acting import Policy
from Step3_DeFI.batching import Batcher, Question
from Step3_DeFI.serve.messages import Asked, Keys, Reader, describe
from Step3_DeFI.serve.metrics import Metrics

SILENT = logging.getLogger("defi.serve.websockets")
SILENT.setLevel(logging.CRITICAL)  # it reports each stranger's bad handshake with a traceback
ENCODED = (b"\xff\xd8\xff", b"\x89PNG")  # in messages that take milliseconds to decode


@dataclass
class ServeConfig:
    """configs/step3_serve.yaml says what each setting is for."""

    keys: Any = None
    seed: int = 0
    batch: int = 1
    margin: float = 0.1
    beyond: str = "clip"
    message_mb: int = 16
    clients: int = 32

    def __post_init__(self) -> None:
        for key in ("batch", "message_mb", "clients"):
            if getattr(self, key) < 1:
                raise UserError(f"serve.{key}={getattr(self, key)}: must be 1 or more")
        if not self.margin >= 0:
            raise UserError(f"serve.margin={self.margin}: must be 0 or more")
        choose("serve.beyond", self.beyond, ("clip", "refuse"))


@dataclass
class Client:
    """A connection: its number since the start, its row of the batch, and what it has asked so far."""

    number: int
    row: int
    observations: int = 0
    timing: dict[str, float] = field(default_factory=dict)  # of the answer before
    clipped: bool = False


class Server:
    """Answers clients until it is told to stop.

    Args:
        api_key: what clients must send, `Authorization: Api-Key …`; None: nothing.
    """

    def __init__(self, policy: Policy, config: ServeConfig, api_key: str | None = None) -> None:
        keys = Keys.read(config.keys, policy.robot.cameras, state=policy.model.config.state)
        self.policy, self.config, self.metrics = policy, config, Metrics()
        self._wanted = f"Api-Key {api_key}".encode() if api_key else None
        self._most = config.message_mb * 2**20
        self._reader, self._metadata = Reader(policy, keys, self._most), pack(describe(policy, keys))
        self._batcher = Batcher(policy, config.batch)
        self._asked, self._numbers = asyncio.Event(), itertools.count()
        self._clients: list[Client] = []
        self._thread = ThreadPoolExecutor(1, "inference")

    async def run(self, host: str, port: int, stop: asyncio.Event, listening: Callable[[str], None]) -> None:
        """Warm up, listen, and close all connections when `stop` is set.

        listening: called with the address, once clients may come. port: 0 takes one that is free.

        Raises:
            UserError: it cannot listen there.
        """
        await asyncio.get_running_loop().run_in_executor(self._thread, self._warm_up)
        how: dict[str, Any] = {"compression": None, "max_size": self._most, "max_queue": 1}
        how |= {"origins": [None], "close_timeout": 2, "logger": SILENT}  # no pages in somebody's browser
        inferring = asyncio.create_task(self._infer())
        try:
            async with serve(self._talk, host, port, process_request=self._admit, **how) as server:
                port = server.sockets[0].getsockname()[1]
                listening(f"ws://{host}:{port}")
                await stop.wait()
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"host={host} port={port}: cannot listen ({reason}); choose others") from None
        finally:
            inferring.cancel()
            self._thread.shutdown()

    def _warm_up(self) -> None:
        """Call the policy as clients will: what is made at the first call is not in anybody's way."""
        robot, size = self.policy.robot, self.policy.model.image_size
        seen: dict[str, Any] = {
            "images": {each: np.zeros((size, size, 3), np.uint8) for each in robot.cameras}
        }
        seen |= {"instruction": "warm up", "state": np.zeros(len(robot.state or ()), np.float32)}
        config = self.policy.model.config
        ahead = UnderWay(np.zeros((config.chunk, config.action_dim)), 1)
        for under_way in (None, ahead):
            self._batcher.ask({0: Question(None, seen, 0, 0, under_way)})

    # ---------------------------------------------------------------- connections

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer plain HTTP, or let a client in."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        given = ",".join(request.headers.get_all("Authorization")).encode(errors="surrogateescape")
        if self._wanted is not None and not hmac.compare_digest(given, self._wanted):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "give the server's API key\n")
        if path == "/metrics":
            return connection.respond(HTTPStatus.OK, self.metrics.text())
        if len(self._clients) >= self.config.clients:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "too many clients\n")
        return None

    async def _talk(self, connection: ServerConnection) -> None:
        """With one client, until it leaves or sends what cannot be answered."""
        taken = Counter(client.row for client in self._clients)
        row = min(range(self.config.batch), key=lambda row: taken[row])
        client = Client(next(self._numbers), row)
        self._clients.append(client)
        self.metrics.clients = len(self._clients)
        try:
            await connection.send(self._metadata)
            async for message in connection:
                await connection.send(await self._answer(client, message))
        except ConnectionClosed:
            return
        except Exception as error:
            if not isinstance(error, UserError):
                traceback.print_exc()  # a fault of ours
            self.metrics.counts["errors"] += 1
            await _refuse(connection, error)
        finally:
            self._clients.remove(client)
            self.metrics.clients = len(self._clients)

    async def _answer(self, client: Client, message: str | bytes) -> bytes:
        began = time.perf_counter()
        if isinstance(message, str):
            raise UserError("message: a text; send msgpack, as openpi's client does")
        if any(mark in message for mark in ENCODED):
            asked = await asyncio.to_thread(self._reader.read, message)
        else:  # faster than the way to a thread and back
            asked = self._reader.read(message)
        about = {"status": "ok", "ok": True, "request_id": asked.request}
        if not asked.observations:
            return pack(about | {"type": "ping"})
        chunks = await asyncio.gather(
            *(self._infer_for(client, asked, i) for i in range(len(asked.observations)))
        )
        actions = np.stack([self._checked(client, chunk) for chunk in chunks])
        self.metrics.counts["requests"] += 1
        total = time.perf_counter() - began
        self.metrics.request.add(total)
        if asked.request is not None:
            return pack(about | {"type": "inference_result", "data": {"actions": actions}})
        timing, client.timing["prev_total_ms"] = dict(client.timing), 1000 * total
        return pack({"actions": actions[0], "server_timing": timing})

    def _checked(self, client: Client, chunk: np.ndarray) -> np.ndarray:
        """The actions as they may leave."""
        try:
            within, beyond = self.policy.robot.limit(chunk, self.config.margin)
            if beyond and self.config.beyond == "refuse":
                more = f" and {len(beyond) - 1} more" if beyond[1:] else ""
                raise UserError(f"actions refused: {beyond[0]}{more}; the training data held none like these")
        except UserError:
            self.metrics.counts["actions_refused"] += 1
            raise
        self.metrics.counts["actions_clipped"] += len(beyond)
        if beyond and not client.clipped:
            print(
                f"client {client.number}: actions clipped, {beyond[0]}; the next ones are counted only",
                flush=True,
            )
            client.clipped = True
        return within

    # ---------------------------------------------------------------- inference

    async def _infer_for(self, client: Client, asked: Asked, i: int) -> np.ndarray:
        """The policy's answer to the i-th observation of a message."""
        seed = asked.seed
        if seed is None:
            seed = seed_of("serve", self.config.seed, client.number, client.observations)
        client.observations += 1
        answer: asyncio.Future = asyncio.get_running_loop().create_future()
        row = (client.row + i) % self.config.batch
        self._batcher.waiting.append(Question(answer, asked.observations[i], seed, row, asked.under_way))
        self._asked.set()
        chunk, client.timing["infer_ms"] = await answer
        return chunk

    async def _infer(self) -> None:
        """Call the policy whenever somebody waits, for all who do; who asks meanwhile joins the next call."""
        loop = asyncio.get_running_loop()
        while await self._asked.wait():
            picked = self._batcher.take()
            if not self._batcher.waiting:
                self._asked.clear()
            began = time.perf_counter()
            try:
                actions: Any = await loop.run_in_executor(self._thread, self._batcher.ask, picked)
            except Exception as error:
                for question in picked.values():
                    question.asker.set_exception(error)
                continue
            seconds = time.perf_counter() - began
            self.metrics.inference.add(seconds)
            self.metrics.batches[len(picked)] += 1
            for row, question in picked.items():
                question.asker.set_result((actions[row], 1000 * seconds))


async def _refuse(connection: ServerConnection, error: Exception) -> None:
    """One line for the client, and for the one who runs the server; then the connection is closed."""
    text = " ".join(f"{type(error).__name__}: {error}".removeprefix("UserError: ").split())[:500]
    line = "".join(c if c.isprintable() else "?" for c in text)  # it may quote what the client sent
    print(f"{(connection.remote_address or ['a client'])[0]}: {line}", file=sys.stderr, flush=True)
    try:
        await connection.send(line)
        await connection.close(1011, "refused, see the text before")
    except ConnectionClosed:
        pass
