"""The policy server: the same answers as in process, whoever else asks, and whatever strangers send."""

import io
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from inspect import unwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image
from policy_fakes import build_policy, write_stages
from rollout_fakes import fake_evaluation
from serving import RowPolicy, ask, client, row_policy, seen, serving
from websockets.exceptions import ConnectionClosed, InvalidStatus

from defi.config import CONFIG_DIR
from defi.engine import checkpoint
from defi.engine.data import seed_of
from defi.errors import UserError
from defi.picture import decode_picture
from defi.robot.chunk import UnderWay
from defi.robot.client import RemotePolicy
from defi.robot.wire import pack, unpack
from Step3_DeFI.acting import Policy, policy_threads
from Step3_DeFI.policy import DeFI
from Step3_DeFI.rollout.evaluate import main, run_episodes
from Step3_DeFI.rollout.remote import ServedPolicy
from Step3_DeFI.serve.messages import MAPS, Keys

ROOT = Path(__file__).resolve().parents[1]


def encoded(picture: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind)
    return file.getvalue()


# ------------------------------------------------------------ answers


def test_answers_are_those_of_the_policy() -> None:
    policy = Policy(build_policy())
    with serving(policy, seed=5) as (address, _), client(address) as connection:
        assert connection.metadata["cameras"] == ["static", "gripper"]
        assert connection.metadata["chunk"] == 10 and connection.metadata["fps"] == 30
        answer = ask(connection, seen(1, seed=77))
        assert answer["actions"].dtype == np.float32 and list(answer["server_timing"]) == ["infer_ms"]
        np.testing.assert_array_equal(answer["actions"], policy.infer(seen(1), 77))
        answer = ask(connection, seen(2))  # the second observation of the first connection
        np.testing.assert_array_equal(answer["actions"], policy.infer(seen(2), seed_of("serve", 5, 0, 1)))
        assert set(answer["server_timing"]) == {"infer_ms", "prev_total_ms"}
        with client(address) as other:
            expected = policy.infer(seen(2), seed_of("serve", 5, 1, 0))
            np.testing.assert_array_equal(ask(other, seen(2))["actions"], expected)


def test_chunks_go_on_from_what_is_under_way() -> None:
    policy, ahead = Policy(build_policy()), np.full((6, 7), 0.25, np.float32)
    ahead[:, 6] = 1
    with serving(policy, api_key="secret") as (address, _):
        remote = RemotePolicy(address, api_key="secret")
        answer = remote.infer(seen(), 3, UnderWay(ahead, 2))
        remote.close()
    assert remote.metadata["relative"] == policy.robot.actions.relative
    np.testing.assert_array_equal(answer, policy.infer(seen(), 3, UnderWay(ahead, 2)))
    np.testing.assert_array_equal(answer[:2], ahead[:2])
    assert (answer != policy.infer(seen(), 3)).any()


def test_pictures_come_as_pixels_or_encoded() -> None:
    policy, pictures = Policy(build_policy()), seen()["images"]
    keys = {"images": ["observation/image", "observation/wrist_image"], "instruction": "prompt"}
    with serving(policy, keys=keys) as (address, _), client(address) as connection:

        def answer(static: Any, gripper: Any) -> np.ndarray:
            message = {"observation/image": static, "observation": {"wrist_image": gripper}}
            return ask(connection, message | {"prompt": "open drawer 0", "seed": 1})["actions"]

        expected = policy.infer(seen(), 1)
        static, gripper = pictures.values()
        np.testing.assert_array_equal(answer(encoded(static, "PNG"), gripper.transpose(2, 0, 1)), expected)
        jpeg = encoded(static, "JPEG")
        decoded = policy.infer(seen(images=pictures | {"static": decode_picture(jpeg, "")}), 1)
        np.testing.assert_array_equal(answer(np.frombuffer(jpeg, np.uint8), gripper), decoded)
        assert (decoded != expected).any()


def test_starvla_clients_are_answered_on_the_same_port() -> None:
    policy = Policy(build_policy(state=True))
    state = np.linspace(-1, 1, 15, dtype=np.float32)
    examples = [
        {"image": list(seen(i)["images"].values()), "lang": seen(i)["instruction"], "state": state[None] * i}
        for i in range(2)
    ]
    with serving(policy) as (address, server), client(address) as connection:
        answer = ask(connection, {"examples": examples, "unnorm_key": None})
        seeded = ask(connection, {"payload": {"examples": examples, "seeds": np.array([5, 6])}})
        ping = ask(connection, {"type": "ping", "request_id": "7"})
        reset = ask(connection, {"type": "reset", "request_id": "8"})
        assert server.metrics.counts["errors"] == 1
        own = ask(connection, seen(3, state=state, seed=1))["actions"]
    assert {key: answer[key] for key in ("status", "ok", "type")} == {
        "status": "ok",
        "ok": True,
        "type": "inference_result",
    }
    for i, actions in enumerate(answer["data"]["actions"]):
        expected = policy.infer(seen(i, state=state * i), seed_of("serve", 0, 0, i))
        np.testing.assert_array_equal(actions, expected)
        expected = policy.infer(seen(i, state=state * i), 5 + i)
        np.testing.assert_array_equal(seeded["data"]["actions"][i], expected)
    assert ping == {"status": "ok", "ok": True, "type": "ping", "request_id": "7"}
    assert not reset["ok"] and reset["request_id"] == "8" and "'reset'" in reset["error"]["message"]
    np.testing.assert_array_equal(own, policy.infer(seen(3, state=state), 1))


def test_company_changes_no_answer() -> None:
    """Of four clients at a time on three rows; rows and sizes of batches do change this policy's answers.

    The row is of what the noise is of: the seed, else the numbers of connection and observation.
    """
    policy = row_policy()
    with serving(policy, batch=3) as (address, server):

        def talk(number: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
            with client(address) as connection:
                chunks = [ask(connection, seen(i, seed=100 * number + i))["actions"] for i in range(20)]
                counted = [ask(connection, seen(7))["actions"] for _ in range(5)]
            return chunks, counted

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(talk, range(4)))
        sizes = server.metrics.batches
    for number, (chunks, counted) in enumerate(answers):
        for i, actions in enumerate(chunks):
            seed = 100 * number + i
            np.testing.assert_array_equal(actions, policy.infer_batch([seen(i)] * 3, [seed] * 3)[seed % 3])
        expected = [
            [
                policy.infer_batch([seen(7)] * 3, [seed_of("serve", 0, n, i)] * 3)[(n + i) % 3]
                for i in range(20, 25)
            ]
            for n in range(4)
        ]
        assert any(np.array_equal(counted, each) for each in expected)
    assert sum(size * calls for size, calls in sizes.items()) == 100 and max(sizes) > 1


@pytest.mark.parametrize("name", sorted(file.stem for file in MAPS.glob("*.yaml")))
def test_ready_maps_find_what_robots_send(name: str) -> None:
    keys = Keys.read(name, ["static", "gripper"], state=True)
    assert list(keys.images) == ["static", "gripper"] and keys.state and keys.instruction == "prompt"


@pytest.mark.parametrize(
    "keys, wrong",
    [
        ("aloha", "choose from bridge, calvin, droid, libero"),
        ({"images": {"static": "image"}}, "no key for gripper"),
        ({"pictures": {}}, "no pictures"),
        ({"state": None}, "no key, but this policy reads the state"),
        ({"images": {"static": 1, "gripper": "b"}}, "must be texts"),
    ],
)
def test_keys_that_do_not_fit_the_policy_are_refused(keys: Any, wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        Keys.read(keys, ["static", "gripper"], state=True)


def test_a_rollout_asks_a_server_as_its_own_policy() -> None:
    """In batches too, whose rows are asked one by one, and those that only fill it not at all."""
    policy, evaluation = row_policy(), fake_evaluation(chains=3, processes=2)
    policy.robot.executed = 7
    own = run_episodes(evaluation, "policy", policy, show=False)
    for batch in (1, 3):
        evaluation = fake_evaluation(chains=3, processes=2, batch=batch)
        with serving(policy, keys="calvin") as (address, server):
            served = run_episodes(evaluation, "policy", ServedPolicy(address, None, policy.robot), show=False)
        assert [chain.outcome for chain in served] == [chain.outcome for chain in own]
        observations = sum(chain.observations for chain in own)
        assert server.metrics.counts["requests"] == observations > 20


def test_a_rollout_goes_on_with_the_policy_that_it_was_begun_with(tmp_path: Path) -> None:
    """Not with what a server that was started again serves, whether the rollout was too or not."""
    pytest.importorskip("pybullet", reason="the simulation needs pybullet")
    policy = row_policy()

    def roll_out(*settings: str) -> None:
        with initialize_config_dir(str(CONFIG_DIR), version_base=None):
            unwrap(main)(compose("step3_rollout", [f"output={tmp_path}/out", *settings]))

    with serving(policy, keys="calvin", identity={"fingerprint": "a"}) as (address, server):
        short = ["tasks=[open_drawer,turn_on_led]", "length=1", "chains=1", "max_steps=[5]", "processes=1"]
        settings = [f"policy={address}", "videos.chains=0", *short]
        roll_out(*settings)
        asked = ServedPolicy(address, None, policy.robot)
        server._metadata = pack(unpack(server._metadata) | {"identity": {"fingerprint": "b"}})
        asked.client.close()
        with pytest.raises(UserError, match="another policy is served"):
            asked.infer_batch([seen(state=np.zeros(15))], [0])
        (tmp_path / "out" / "results.json").unlink()
        with pytest.raises(UserError, match="was begun with served={'fingerprint': 'a', .*'margin': 0.1"):
            roll_out(*settings, "resume=true")


def test_a_rollout_does_not_guess_the_parts_of_a_state() -> None:
    policy = row_policy(state=True)
    keys = {"images": ["a", "b"], "state": ["joints", "gripper"]}
    with (
        serving(policy, keys=keys) as (address, _),
        pytest.raises(UserError, match="joints, gripper.*one key"),
    ):
        ServedPolicy(address, None, policy.robot)


# ------------------------------------------------------------ actions that may leave


def ranged(fault: str | None) -> Any:
    """A policy whose training data held −1 … 1 in all numbers but the gripper's, which never left 0 … 0.1."""
    policy = row_policy(fault)
    policy.robot.actions.low, policy.robot.actions.high = [-1.0] * 6 + [0.0], [1.0] * 6 + [0.1]
    return policy


def test_actions_beyond_the_training_data_are_clipped_and_counted() -> None:
    policy = ranged("5")
    with serving(policy, margin=0.25) as (address, server), client(address) as connection:
        actions = ask(connection, seen(seed=1))["actions"]
        counted = server.metrics.counts["actions_clipped"]
    raw = policy.infer(seen(), 1)
    np.testing.assert_array_equal(actions[:, :6], raw[:, :6].clip(-1.5, 1.5))
    np.testing.assert_array_equal(actions[:, 6], raw[:, 6])
    assert counted == (np.abs(raw[:, :6]) > 1.5).sum() > 10


def test_limits_allow_for_rounding_and_for_what_is_under_way() -> None:
    robot, rng = ranged("1").robot, np.random.default_rng(0)
    robot.actions.low[:3] = robot.actions.high[:3] = [0.0, 0.1, 1.3]  # never moved
    actions = np.array([0.0, 0.1, 1.3, 0, 0, 0, 9], np.float32) + rng.uniform(-2e-7, 2e-7, (10, 7)).astype(
        "f4"
    )
    assert robot.limit(actions, 0.1)[1] == []
    clipped, beyond = robot.limit(actions + np.float32(0.01), 0.1)
    assert len(beyond) == 30 and robot.limit(clipped, 0.1)[1] == [] and clipped.dtype == np.float32

    policy, ahead = Policy(build_policy()), np.full((10, 7), 5, np.float32)
    policy.robot.actions.low, policy.robot.actions.high = [-1e-6] * 7, [1e-6] * 7
    with serving(policy, beyond="refuse") as (address, _), client(address) as connection:
        held = ask(connection, seen(seed=1, under_way=ahead, delay=10))
        np.testing.assert_array_equal(held["actions"], ahead)
        assert "actions refused: dx" in ask(connection, seen(seed=1, under_way=ahead, delay=9))


@pytest.mark.parametrize("fault, how, wrong", [("5", "refuse", "dx .*at -1.2 … 1.2"), ("nan", "clip", "NaN")])
def test_actions_are_refused_and_counted(fault: str, how: str, wrong: str) -> None:
    with serving(ranged(fault), beyond=how) as (address, server):
        with client(address) as connection:
            text = ask(connection, seen(seed=1))
        assert server.metrics.counts["actions_refused"] == server.metrics.counts["errors"] == 1
    assert isinstance(text, str) and re.search(wrong, text)


# ------------------------------------------------------------ who may ask, and how much


def fetch(address: str, path: str, **headers: str) -> str:
    request = urllib.request.Request(address.replace("ws:", "http:") + path, headers=headers)
    return urllib.request.urlopen(request, timeout=60).read().decode()


def test_health_metrics_and_the_key() -> None:
    with serving(row_policy(), api_key="secret", clients=1) as (address, _):
        for headers in ({}, {"Authorization": "Api-Key secre"}, {"Authorization": "Api-Key sécret"}):
            with pytest.raises(InvalidStatus, match="401"), client(address, **headers):
                pass
        with pytest.raises(urllib.error.HTTPError, match="401"):
            fetch(address, "/metrics")
        key = {"Authorization": "Api-Key secret"}
        with client(address, **key) as connection:
            ask(connection, seen())
            with pytest.raises(InvalidStatus, match="503"), client(address, **key):
                pass
        text = fetch(address, "/metrics", **key)
        assert fetch(address, "/healthz") == "OK\n"
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values["defi_requests_total"] == values['defi_batches_total{size="1"}'] == "1"
    assert 0 < float(values['defi_request_seconds{quantile="0.99"}']) < 60
    assert values["defi_request_seconds_count"] == "1" and values["defi_errors_total"] == "0"


class Gate(RowPolicy):
    """Waits at the first question, and notes all of them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked, self.go_on = [], threading.Event()

    def infer_batch(self, observations: Any, seeds: Any, under_way: Any = None) -> np.ndarray:
        self.asked.append(observations[0]["instruction"])
        if self.asked[-1] == "wait":
            assert self.go_on.wait(60)
        return super().infer_batch(observations, seeds)


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not reached() and time.monotonic() < end:
        time.sleep(0.005)
    assert reached()


def test_clients_that_are_gone_cost_no_call() -> None:
    policy = Gate(build_policy())
    with serving(policy) as (address, server), client(address) as first:
        first.send(pack(seen(instruction="wait")))
        until(lambda: "wait" in policy.asked)
        for _ in range(5):
            with client(address) as gone:
                gone.send(pack(seen(instruction="gone")))
        until(lambda: len(server._batcher.waiting) == 5)
        policy.go_on.set()
        assert unpack(first.recv(timeout=60))["actions"].shape == (10, 7)
        ask(first, seen(instruction="last"))
        until(lambda: server.metrics.clients == 1)
    assert policy.asked[2:] == ["wait", "last"]


def test_many_examples_of_one_client_let_others_in_between() -> None:
    policy = Gate(build_policy())
    example = {"image": list(seen()["images"].values())}
    examples = [example | {"lang": words} for words in ("wait", *"abcdefgh")]
    with serving(policy) as (address, server), client(address) as many, client(address) as one:
        many.send(pack({"examples": examples}))
        until(lambda: "wait" in policy.asked)
        one.send(pack(seen(instruction="one")))
        until(lambda: len(server._batcher.waiting) == 1)
        policy.go_on.set()
        one.recv(timeout=60)
        assert len(unpack(many.recv(timeout=60))["data"]["actions"]) == 9
    assert policy.asked[2:4] in (["wait", "one"], ["wait", "a"]) and "one" in policy.asked[2:5]
    assert policy.asked[-1] == "h"


def test_pages_in_a_browser_are_not_let_in() -> None:
    origin = {"Origin": "http://example.org"}
    with serving(row_policy()) as (address, _), pytest.raises(InvalidStatus, match="403"):
        client(address, **origin).__enter__()


def test_large_messages_end_their_connection_only() -> None:
    with serving(row_policy(), message_mb=1) as (address, server), client(address) as good:
        with client(address) as connection, pytest.raises(ConnectionClosed, match="1009"):
            ask(connection, b"x" * (2**20 + 1))
        until(lambda: server.metrics.counts["errors"] == 1)
        bomb = encoded(np.zeros((1000, 1000, 3), np.uint8), "PNG")
        assert len(bomb) < 2**14
        with client(address) as connection:
            text = ask(connection, seen(images={"static": bomb, "gripper": bomb}))
        assert "images/static: 1000 x 1000 pixels are too large" in text
        assert ask(good, seen())["actions"].shape == (10, 7)


# ------------------------------------------------------------ messages of strangers


THIN = encoded(np.zeros((100_000, 1, 3), np.uint8), "PNG")
SCANS = encoded(np.zeros((9, 9, 3), np.uint8), "JPEG")[:-2] + b"\xff\xda" * 64 + b"\xff\xd9"
EXAMPLE = {"image": list(seen()["images"].values()), "lang": "open it"}
BAD: dict[str, tuple[Any, str]] = {
    "text": ("hello", "a text"),
    "no dict": (pack([1, 2]), "a list"),
    "cut": (pack(seen())[:-3], "incomplete"),
    "no camera": ({"instruction": "x"}, "no images/static"),
    "float picture": (
        seen(images={"static": np.zeros((4, 4, 3)), "gripper": np.zeros((4, 4, 3))}),
        "float64",
    ),
    "GIF": (seen(images=dict.fromkeys(("static", "gripper"), b"GIF89a" + bytes(40))), "neither JPEG nor PNG"),
    "no sentence": (seen(instruction=3), "give a sentence"),
    "long sentence": (seen(instruction="open it " * 60), "more than 400"),
    "long word": (seen(instruction="\ufdfa" * 200), "128 without a space"),
    "thin picture": (seen(images=dict.fromkeys(("static", "gripper"), THIN)), "more than 4096 pixels"),
    "thin pixels": (seen(images=dict.fromkeys(("static", "gripper"), np.zeros((5000, 1, 3), "u1"))), "4096"),
    "many scans": (seen(images=dict.fromkeys(("static", "gripper"), SCANS)), "more than 64 scans"),
    "seeds": ({"examples": [EXAMPLE], "seeds": [1, 2]}, "a list of 1"),
    "seed": (seen(seed=-1), "seed"),
    "delay": (seen(under_way=np.zeros((4, 7)), delay=5), "delay=5"),
    "longer than a chunk": (seen(under_way=np.zeros((11, 7)), delay=1), "at most 10 actions"),
    "no examples": ({"examples": []}, "1 to 64"),
    "one picture": ({"examples": [{"image": [np.zeros((4, 4, 3), np.uint8)], "lang": "x"}]}, "1 pictures"),
    "no example": ({"examples": [3]}, "examples"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_messages_are_told_why_and_cost_nobody_else(name: str, capfd: Any) -> None:
    message, wrong = BAD[name]
    with serving(row_policy()) as (address, _), client(address) as good:
        with client(address) as connection:
            text = ask(connection, message)
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv(timeout=60)
        assert wrong in text and "\n" not in text and closed.value.rcvd.code == 1011
        assert ask(good, seen())["actions"].shape == (10, 7)
    assert "Traceback" not in "".join(capfd.readouterr())


def mutated(message: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, removed or repeated, mostly near the front or the end, where the types are."""
    data = bytearray(message)
    for _ in range(rng.choice((1, 1, 2, 8))):
        near = rng.choice((60, 60, len(data)))
        place = rng.choice(
            (rng.randrange(min(near, len(data))), len(data) - 1 - rng.randrange(min(near, len(data))))
        )
        how = rng.randrange(4)
        if how == 0:
            data[place] = rng.randrange(256)
        elif how == 1:
            data[place] ^= 1 << rng.randrange(8)
        elif how == 2:
            del data[place : place + rng.choice((1, 4, 1000))]
        else:
            data[place:place] = rng.choice((bytes(5), b"\xdd\xff\xff\xff\xff", data[place : place + 40]))
        data = data or bytearray(b"\xc0")
    return bytes(data)


def test_2000_mutated_messages_harm_nobody(capfd: Any) -> None:
    policy, rng = Policy(build_policy(state=True)), random.Random(0)
    state, pictures = np.linspace(-1, 1, 15, dtype=np.float32), seen()["images"]
    small = {name: picture[:6, :5].copy() for name, picture in pictures.items()}
    coded = {"static": encoded(pictures["static"], "JPEG"), "gripper": encoded(pictures["gripper"], "PNG")}
    example = {"image": list(small.values()), "lang": "x", "state": state}
    valid = [
        pack(seen(images=small, state=state, seed=1, under_way=np.zeros((4, 7), np.float32), delay=2)),
        pack(seen(images=coded, state=state.tolist())),
        pack({"examples": [example], "unnorm_key": None, "type": "infer", "request_id": "a"}),
    ]
    answered, texts = 0, set()
    with serving(policy) as (address, server):
        number = 0
        while number < 2000:
            with client(address) as connection:
                while number < 2000:
                    number += 1
                    answer = ask(connection, mutated(rng.choice(valid), rng))
                    if isinstance(answer, str):
                        assert "\n" not in answer and 0 < len(answer) <= 500
                        texts.add(answer)
                        break
                    answered += answer.get("ok", True)  # starVLA's clients are told and may go on
        with client(address) as connection:
            good = ask(connection, seen(5, state=state, seed=9))["actions"]
        assert server.metrics.counts["errors"] == 2000 - answered
    np.testing.assert_array_equal(good, policy.infer(seen(5, state=state), 9))
    assert answered > 100 and len(texts) > 50
    printed = capfd.readouterr().err  # libjpeg remarks on damage too
    assert "Traceback" not in printed and ".py:" not in printed


# ------------------------------------------------------------ the command, and openpi's own client


STOCK_CLIENT = """
import sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
given, answers = np.load(sys.argv[2]), []
client = WebsocketClientPolicy(sys.argv[1], api_key="secret")
for seed in (None, 3, 4):
    message = {"observation/image": given["static"], "observation/wrist_image": given["gripper"]}
    message["prompt"] = "open it"
    answer = client.infer(message if seed is None else message | {"seed": seed})
    answers.append(answer["actions"])
assert client.get_server_metadata()["chunk"] == 10 and answer["server_timing"]["infer_ms"] > 0
np.save(sys.argv[3], answers)
"""


@pytest.fixture(scope="session")
def openpi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """openpi's client, without what it pins."""
    folder = tmp_path_factory.mktemp("openpi")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*pip, "openpi-client==0.1.2"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"openpi-client cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    return folder


def test_openpis_client_in_another_process_gets_the_policys_actions(tmp_path: Path, openpi: Path) -> None:
    gfdm, gidm = write_stages(tmp_path)
    model = DeFI.from_stages(build_policy().config, gfdm=gfdm, gidm=gidm)
    checkpoint.save(model, tmp_path / "policy", step=1, config={"preset_name": "test"})
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{openpi}",
        "DEFI_API_KEY": "secret",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "Step3_DeFI.serve", f"checkpoint={tmp_path / 'policy'}", "port=0"]
    command += ["serve.keys=libero", "seed=2", "device=cpu", "threads=1"]
    server = subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    printed = []
    try:
        for line in server.stdout:
            printed.append(line)
            if line.startswith("serving on "):
                break
        else:
            pytest.fail("".join(printed))
        pictures = seen()["images"]
        np.savez(tmp_path / "seen.npz", **pictures)
        arguments = [line.split()[-1], str(tmp_path / "seen.npz"), str(tmp_path / "answers.npy")]
        subprocess.run(
            [sys.executable, "-c", STOCK_CLIENT, *arguments], env=environment, check=True, timeout=120
        )
        server.send_signal(signal.SIGTERM)
        rest, _ = server.communicate(timeout=60)
        assert server.returncode == 0 and rest == ""
    finally:
        server.kill()
    policy = Policy.load(tmp_path / "policy")
    observation = {"images": pictures, "instruction": "open it"}
    with policy_threads(1):
        expected = [policy.infer(observation, seed) for seed in (seed_of("serve", 2, 0, 0), 3, 4)]
    np.testing.assert_array_equal(np.load(tmp_path / "answers.npy"), expected)


# ------------------------------------------------------------ the wire


def test_messages_are_openpis() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    coded = (
        b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x18"
        + array.tobytes()
        + b"\xc4\x05dtype\xa3<f4\xc4\x05shape\x92\x02\x03"
    )
    assert pack(array) == coded
    message = {"a": array.T, "b": [np.uint8(3), np.bool_(True), None, b"x"], "c": np.zeros((0, 2), np.int64)}
    again = unpack(pack(message))
    np.testing.assert_array_equal(again["a"], array.T)
    assert again["b"] == message["b"] and isinstance(again["b"][0], np.uint8) and again["c"].shape == (0, 2)


def array(dtype: Any = "<f4", data: Any = bytes(8), shape: Any = (2,)) -> bytes:
    import msgpack

    return msgpack.packb({b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape})


@pytest.mark.parametrize(
    "message",
    [
        *(
            array(dtype)
            for dtype in ("|O", "O8", "<f4,<f4", "<M8[s]", "<U2", "|V8", "<c8", 4, None, "x" * 99)
        ),
        *(array(shape=shape) for shape in ((3,), (-1, -2), (2.0,), 2, (0, 2**62, 2**62), (True, 2))),
        array(data="12345678"),
        b"\x91" * 5000,
        b"\xdd\xff\xff\xff\xff" * 1000,
        b"\xc7\x04\x05abcd",
        (b"\xdc\x10\x00" + b"\x80" * 4096) * 30,
        b"\xdc\x10\x00" + (b"\xdc\x10\x00" + b"\x80" * 4096) * 4096,
        b"",
    ],
    ids=lambda message: message[:60].hex(),
)
def test_messages_that_are_not_plain_are_refused_in_a_line(message: bytes) -> None:
    with pytest.raises(UserError, match="^message: [^\n]*; "):
        unpack(message)


@pytest.mark.parametrize("value", [np.array([None]), np.array("text"), {1, 2}, np.zeros(2, complex)])
def test_what_cannot_be_sent_is_said(value: Any) -> None:
    with pytest.raises(UserError, match="^message: "):
        pack({"a": value})


def test_robots_need_no_torch() -> None:
    code = "import sys, defi.robot.wire, defi.robot.spec, defi.robot.chunk; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
