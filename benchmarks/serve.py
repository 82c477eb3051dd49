"""A policy server beside its policy: `python -m benchmarks.serve --checkpoint RUN [--requests 300]`.

1. What the server adds: round trip of a client in another process less the time that the policy's
   `infer_batch` took for that very answer (it reports it in its first number), milliseconds. Two cameras of
   200 × 200, as pixels and as JPEG; a policy that takes constant time (asleep for 20 ms), the checkpoint's.
2. Where the time of an answer goes, part by part, with the checkpoint's own sampler; texts that it has read
   before cost nothing, so a new one each time stands beside it.
3. A chunk by DPM-Solver++(2M) with 2, 4 and 6 steps.
"""

import argparse
import asyncio
import io
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from websockets.sync.client import connect

import Step3_DeFI.acting
import Step3_DeFI.policy
from defi.config import one_line_errors
from defi.robot.wire import pack, unpack
from Step3_DeFI.acting import Policy, policy_threads
from Step3_DeFI.serve.server import ServeConfig, Server

ASLEEP = 0.02
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Reporting(Policy):
    """Reports how many seconds its answer took, in the first number."""

    def infer_batch(self, *given: Any, **chosen: Any) -> np.ndarray:
        began = time.perf_counter()
        actions = self.act(*given, **chosen)
        actions[:, 0, 0] = time.perf_counter() - began
        return actions

    act = Policy.infer_batch


class Constant(Reporting):
    """Takes the same time for every answer."""

    def act(self, observations: Sequence[Any], *_: Any, **__: Any) -> np.ndarray:
        time.sleep(ASLEEP)
        return np.zeros((len(observations), 10, len(self.robot.actions)), np.float32)


def serve(checkpoint: str, kind: type[Reporting], threads: int | None, said: Connection) -> None:
    """A server, as the process that it is."""
    policy = kind.load(checkpoint, device=DEVICE)
    policy.robot.actions.low = []  # the reported seconds are not clipped
    with policy_threads(threads):
        asyncio.run(Server(policy, ServeConfig()).run("127.0.0.1", 0, asyncio.Event(), said.send))


def pictures(cameras: Sequence[str], kind: str) -> dict[str, Any]:
    """Smooth random pictures, 200 × 200, as a table seen from somewhere."""
    rng, found = np.random.default_rng(0), {}
    for camera in cameras:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
        picture = coarse.resize((200, 200), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
        found[camera] = np.array(picture) if kind == "pixels" else file.getvalue()
    return found


def overhead(address: str, cameras: Sequence[str], kind: str, requests: int) -> tuple[float, np.ndarray]:
    """Megabytes of a message; and per request (policy, server) milliseconds."""
    seen = {"images": pictures(cameras, kind), "instruction": "open the drawer"}
    with connect(address, compression=None, max_size=None) as connection:
        connection.recv()
        found = []
        for _ in range(requests + 20):
            began = time.perf_counter()
            connection.send(pack(seen))
            actions = unpack(connection.recv())["actions"]
            inferred = float(actions[0, 0])
            found.append((1000 * inferred, 1000 * (time.perf_counter() - began - inferred)))
    return len(pack(seen)) / 1e6, np.array(found[20:])


@contextmanager
def clocked(model: Any, spent: Counter[str]) -> Iterator[None]:
    """While it acts, the seconds of its parts; what a part calls counts for itself."""
    owners: list[tuple[Any, str, str]] = [
        (Step3_DeFI.acting, "observe", "pictures to one size"),
        (model.gfdm.clip, "_encode", "CLIP"),
        (model.t5, "_encode", "T5"),
        (Step3_DeFI.policy, "encode_views", "VAE"),
        (Step3_DeFI.policy, "imagine", "UNet"),
        (model.video_former, "forward", "VideoFormer"),
        (model.gidm_branch, "forward", "GIDM branch"),
        (model.action_head, "encode", "action head, encoder"),
        (model.action_head, "decode", "action head, decoder"),
    ]
    stack: list[float] = []

    def timed(function: Callable, label: str) -> Callable:
        def call(*given: Any, **chosen: Any) -> Any:
            began = now()
            stack.append(0.0)
            answer = function(*given, **chosen)
            took = now() - began
            spent[label] += took - stack.pop()
            if stack:
                stack[-1] += took
            return answer

        return call

    before = [(owner, name, getattr(owner, name)) for owner, name, _ in owners]
    for owner, name, label in owners:
        setattr(owner, name, timed(getattr(owner, name), label))
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def parts(policy: Policy, answers: int, *, new_texts: bool) -> Counter[str]:
    """Milliseconds of each part per answer."""
    spent: Counter[str] = Counter()
    images = pictures(policy.robot.cameras, "pixels")
    state = np.zeros(policy.model.config.state_dim or 0, np.float32)
    seen = {"images": images, "instruction": "open the drawer", "state": state}
    policy.infer(seen)
    with clocked(policy.model, spent):
        for number in range(answers):
            text = f"open drawer {number} of {answers}" if new_texts else seen["instruction"]
            began = now()
            policy.infer(seen | {"instruction": text}, number)
            spent["all"] += now() - began
    return Counter({part: 1000 * seconds / answers for part, seconds in spent.items()})


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    drawn = Table(box=SIMPLE)
    for number, column in enumerate(columns):
        drawn.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    console = Console(highlight=False, width=110)
    console.print(title)
    console.print(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a stage-3 run, checkpoint or exported folder")
    parser.add_argument("--requests", type=int, default=300, help="of each kind")
    parser.add_argument("--answers", type=int, default=50, help="timed part by part")
    parser.add_argument(
        "--threads", type=int, help="of PyTorch, on the CPU; default: one less than processors"
    )
    given = parser.parse_args()
    with one_line_errors(), policy_threads(given.threads):
        policy = Policy.load(given.checkpoint, device=DEVICE)
    rows, start = [], multiprocessing.get_context("spawn")
    for name, policy_class in (("20 ms asleep", Constant), ("the checkpoint's", Reporting)):
        here, there = start.Pipe()
        server = start.Process(target=serve, args=(given.checkpoint, policy_class, given.threads, there))
        server.start()
        try:
            address = here.recv()
            for kind in ("pixels", "JPEG"):
                size, found = overhead(address, policy.robot.cameras, kind, given.requests)
                inferred, added = np.quantile(found, (0.5, 0.99), axis=0).T
                figures = (1000 * size, inferred[0], *added, inferred[1])
                rows.append((name, kind, *(f"{figure:.1f}" for figure in figures)))
        finally:
            server.terminate()
            server.join()
    columns = ("policy", "pictures", "kB", "infer p50", "server p50", "server p99", "infer p99")
    table(f"Milliseconds of {given.requests} requests each, on {DEVICE}", columns, rows)
    with policy_threads(given.threads):
        known, new = (parts(policy, given.answers, new_texts=new) for new in (False, True))
        rows = [(part, f"{known[part]:.1f}", f"{new[part]:.1f}") for part in new if part != "all"]
        rest = [2 * each["all"] - each.total() for each in (known, new)]
        rows.append(("noise, sampler, …", *(f"{milliseconds:.1f}" for milliseconds in rest)))
        rows.append(("an answer", f"{known['all']:.1f}", f"{new['all']:.1f}"))
        diffusion = policy.model.config.diffusion
        title = f"Milliseconds of an answer's parts, {diffusion.sampler} with {diffusion.steps} steps"
        table(title, ("part", "known text", "new text"), rows)
        rows = []
        for steps in (2, 4, 6):
            diffusion.sampler, diffusion.steps = "dpmpp_2m", steps
            found = parts(policy, given.answers, new_texts=False)
            rows.append((str(steps), f"{found['action head, decoder']:.1f}", f"{found['all']:.1f}"))
        table("Milliseconds, dpmpp_2m", ("steps", "action head, decoder", "an answer"), rows)


if __name__ == "__main__":
    main()
