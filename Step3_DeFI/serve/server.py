"""A policy behind a websocket, for several clients: one thread infers, the event loop does the rest."""

import asyncio
import hmac
import itertools
import logging
import sys
import time
import traceback
from asyncio import FIRST_COMPLETED
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import numpy as np
from websockets.asyncio.server import Request, Response, ServerConnection, serve
from websockets.exceptions import ConnectionClosed, ConnectionClosedError
from websockets.frames import CloseCode
from websockets.protocol import State

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
TEXTS = 256  # instructions whose encodings are kept on the device
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
    """A connection: its number since the start, and what it has asked so far."""

    number: int
    connection: ServerConnection
    observations: int = 0
    timing: dict[str, float] = field(default_factory=dict)  # of the answer before
    clipped: bool = False


class Answer:
    """What a question's connection waits for: a chunk, and the milliseconds of the call."""

    def __init__(self, connection: ServerConnection) -> None:
        self.connection, self.future = connection, asyncio.get_running_loop().create_future()

    def give(self, found: tuple[np.ndarray, float] | Exception) -> None:
        if self.future.done():
            return
        if isinstance(found, Exception):
            self.future.set_exception(found)
        else:
            self.future.set_result(found)


class Server:
    """Answers clients until it is told to stop.

    Args:
        api_key: what clients must send, `Authorization: Api-Key …`; None: nothing.
        identity: what answers depend on, as clients are told: weights, sampler.
    """

    def __init__(
        self,
        policy: Policy,
        config: ServeConfig,
        api_key: str | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        keys = Keys.read(config.keys, policy.robot.cameras, state=policy.model.config.state)
        self.policy, self.config, self.metrics = policy, config, Metrics()
        self._wanted = f"Api-Key {api_key}".encode() if api_key else None
        self._most = config.message_mb * 2**20
        own = {"batch": config.batch, "margin": config.margin, "beyond": config.beyond}
        self._reader = Reader(policy, keys, self._most)
        self._metadata = pack(describe(policy, keys, {**(identity or {}), **own}))
        for tower in (policy.model.gfdm.clip, policy.model.t5):  # strangers may never say the same twice
            tower.config.cache = min(tower.config.cache, TEXTS)
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
                await asyncio.wait({asyncio.create_task(stop.wait()), inferring}, return_when=FIRST_COMPLETED)
                if inferring.done():  # by a fault of ours
                    for question in self._batcher.waiting:
                        question.asker.give(RuntimeError("the server ends"))
                    inferring.result()
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
        client = Client(next(self._numbers), connection)
        self._clients.append(client)
        self.metrics.clients = len(self._clients)
        try:
            await connection.send(self._metadata)
            async for message in connection:
                await connection.send(await self._answer(client, message))
        except ConnectionClosed as error:
            if error.sent and error.sent.code == CloseCode.MESSAGE_TOO_BIG:
                self.metrics.counts["errors"] += 1
                print(f"{_who(connection)}: a message of more than {self._most:,} bytes", file=sys.stderr)
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
        if asked.kind == "ping":
            return pack(about | {"type": "ping"})
        if not asked.observations:  # starVLA's clients may go on, as with its own server
            self.metrics.counts["errors"] += 1
            wrong = {"message": f"no message of type {asked.kind[:20]!r}; infer or ping"}
            return pack(about | {"status": "error", "ok": False, "type": "unknown", "error": wrong})
        chunks, count = [], len(asked.observations)
        for first in range(0, count, self.config.batch):  # no more at a time: others' turn comes between
            some = range(first, min(first + self.config.batch, count))
            chunks += await asyncio.gather(*(self._infer_for(client, asked, i) for i in some))
        held = asked.under_way.delay if asked.under_way else 0
        actions = np.stack([self._checked(client, chunk, held) for chunk in chunks])
        self.metrics.counts["requests"] += 1
        total = time.perf_counter() - began
        self.metrics.request.add(total)
        if asked.request is not None:
            return pack(about | {"type": "inference_result", "data": {"actions": actions}})
        timing, client.timing["prev_total_ms"] = dict(client.timing), 1000 * total
        return pack({"actions": actions[0], "server_timing": timing})

    def _checked(self, client: Client, chunk: np.ndarray, held: int) -> np.ndarray:
        """The actions as they may leave; the first `held` are the client's own."""
        try:
            within, beyond = self.policy.robot.limit(chunk, self.config.margin, held)
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
        counted = client.number, client.observations
        client.observations += 1
        if asked.seeds is None:
            seed, row = seed_of("serve", self.config.seed, *counted), sum(counted)
        else:
            seed = row = asked.seeds[i]
        answer = Answer(client.connection)
        observation, row = asked.observations[i], row % self.config.batch  # whoever else is connected
        self._batcher.waiting.append(Question(answer, observation, seed, row, asked.under_way))
        self._asked.set()
        chunk, client.timing["infer_ms"] = await answer.future
        return chunk

    async def _infer(self) -> None:
        """Call the policy whenever somebody waits, for all who do; who asks meanwhile joins the next call."""
        loop = asyncio.get_running_loop()
        while await self._asked.wait():
            for question in self._batcher.waiting:
                if question.asker.connection.state is not State.OPEN:
                    question.asker.give(ConnectionClosedError(None, None))
            self._batcher.waiting = [each for each in self._batcher.waiting if not each.asker.future.done()]
            picked = self._batcher.take()
            if not self._batcher.waiting:
                self._asked.clear()
            if not picked:
                continue
            began = time.perf_counter()
            try:
                actions: Any = await loop.run_in_executor(self._thread, self._batcher.ask, picked)
                seconds = time.perf_counter() - began
                for row, question in picked.items():
                    question.asker.give((actions[row], 1000 * seconds))
            except Exception as error:
                for question in picked.values():
                    question.asker.give(error)
                continue
            self.metrics.inference.add(seconds)
            self.metrics.batches[len(picked)] += 1


async def _refuse(connection: ServerConnection, error: Exception) -> None:
    """One line for the client, and for the one who runs the server; then the connection is closed."""
    text = " ".join(f"{type(error).__name__}: {error}".removeprefix("UserError: ").split())[:500]
    line = "".join(c if c.isprintable() else "?" for c in text)  # it may quote what the client sent
    print(f"{_who(connection)}: {line}", file=sys.stderr, flush=True)
    try:
        await connection.send(line)
        await connection.close(1011, "refused, see the text before")
    except ConnectionClosed:
        pass


def _who(connection: ServerConnection) -> str:
    return (connection.remote_address or ["a client"])[0]
