"""The plug-in for LeRobot, by LeRobot's own commands. `scripts/test_lerobot.sh` makes the place for it."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from policy_fakes import write_stages
from safetensors.torch import load_file

WHERE = "needs LeRobot and the plug-in: scripts/test_lerobot.sh runs it"
pytest.importorskip("lerobot_policy_defi", reason=WHERE, exc_type=ImportError)
pytestmark = pytest.mark.lerobot

import gym_pusht  # noqa: E402, F401
import gymnasium  # noqa: E402
import tomllib  # noqa: E402
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata  # noqa: E402
from lerobot.policies import make_policy  # noqa: E402
from lerobot_policy_defi.configuration_defi import DeFIConfig  # noqa: E402
from lerobot_policy_defi.modeling_defi import DeFIPolicy, under_way  # noqa: E402
from lerobot_recorder import ACTIONS, CAMERAS, STATE  # noqa: E402
from torch.utils.data import default_collate  # noqa: E402

from defi.checkpoints import export as export_command  # noqa: E402
from defi.data import open_dataset  # noqa: E402
from defi.engine import checkpoint  # noqa: E402
from defi.engine.data import seed_of  # noqa: E402
from Step3_DeFI.acting import Policy  # noqa: E402
from Step3_DeFI.config import PolicyConfig  # noqa: E402
from Step3_DeFI.policy import DeFI  # noqa: E402
from Step3_DeFI.samples import RecordedSamples, SampleSettings, fit_robot  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SIZES = ["policy.merge=2", "policy.latent_action_frames=[0,2]"]  # of the tests' small stages
SETTINGS = [*SIZES, "policy.state=true", "policy.robot={gripper: {dimension: 6}}"]
HERE = ("--policy.device=cpu", "--policy.push_to_hub=false", "--num_workers=0", "--log_freq=1")


def run(folder: Path, command: str, *settings: object, record: Path | None = None) -> str:
    """One of LeRobot's commands, in `folder`, with the recorder as a plug-in where a record is wanted."""
    plugins = folder / "plugins"
    (plugins / "lerobot_robot_recorder").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "tests" / "lerobot_recorder.py", plugins / "lerobot_robot_recorder" / "__init__.py")
    (information := plugins / "lerobot_robot_recorder-0.dist-info").mkdir(exist_ok=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: lerobot_robot_recorder\nVersion: 0\n")
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")}
    own["PYTHONPATH"] = os.pathsep.join([str(plugins), os.environ.get("PYTHONPATH", "")])
    own |= {} if record is None else {"RECORD": str(record)}
    done = subprocess.run(
        [sys.executable, "-m", f"lerobot.scripts.lerobot_{command}", *map(str, settings)],
        cwd=folder, env=os.environ | own, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def train(folder: Path, stages: Path, data: Path, output: str, *more: object) -> Path:
    """A new policy after four steps."""
    given = [f"--policy.gfdm={stages / 'gfdm'}", f"--policy.gidm={stages / 'gidm'}", *HERE]
    given += [f"--dataset.root={data}", "--dataset.repo_id=local/data", "--dataset.video_backend=pyav"]
    given += ["--batch_size=4", "--steps=4", "--save_freq=2", f"--output_dir={output}", *more]
    said = run(folder, "train", "--policy.type=defi", *given)
    assert len(re.findall(r"action_loss:\d", said)) == 4
    return folder / output / "checkpoints"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_stages((folder := tmp_path_factory.mktemp("lerobot")) / "stages")
    return folder


@pytest.fixture(scope="module")
def data(folder: Path, reference: Path) -> Path:
    """Videos of two cameras; names of joints as LeRobot's robots have them."""
    shutil.copytree(reference / "lerobot" / "data_v30", folder / "data", copy_function=shutil.copyfile)
    for path in (folder / "data", *(folder / "data").rglob("*")):
        path.chmod(0o755)
    text = (info := folder / "data" / "meta" / "info.json").read_text()
    for name in (*STATE, *ACTIONS):
        text = text.replace(f'"{name.removesuffix(".pos")}"', f'"{name}"')
    info.write_text(text)
    return folder / "data"


@pytest.fixture(scope="module")
def trained(folder: Path, data: Path) -> Path:
    settings = "[" + ",".join(f'"{each}"' for each in SETTINGS) + "]"
    return train(folder, folder / "stages", data, "run", f"--policy.settings={settings}")


def test_the_plugin_requires_what_defi_does() -> None:
    """By itself: DeFI's own requirements ask for a newer PyAV than LeRobot allows."""
    text = (ROOT / "integrations" / "lerobot_policy_defi" / "pyproject.toml").read_text()
    lerobots = {"torch", "torchvision", "numpy", "pillow", "av", "safetensors", "huggingface_hub", "einops"}
    wanted = [line for line in (ROOT / "requirements.txt").read_text().split() if line]
    ours = {line for line in wanted if re.split("[>=<]", line)[0] not in {*lerobots, "accelerate"}}
    assert ours < {*tomllib.loads(text)["project"]["dependencies"]}


# ------------------------------------------------------------ training


def test_a_batch_of_lerobot_is_one_of_defi(folder: Path, reference: Path) -> None:
    """The same robot, pictures, texts, actions, state and loss."""
    root = folder / "images"
    shutil.copytree(reference / "lerobot" / "data_v30_images", root, copy_function=shutil.copyfile)
    stages = {name: str(folder / "stages" / name) for name in ("gfdm", "gidm")}
    config = DeFIConfig(**stages, settings=SETTINGS, device="cpu", push_to_hub=False)
    torch.manual_seed(0)
    policy = make_policy(config, LeRobotDatasetMetadata("local/images", root=root))
    assert not torch.equal(policy.defi.standardise.mean, torch.zeros_like(policy.defi.standardise.mean))
    ours = open_dataset({"format": "lerobot", "root": str(root)}, "all")
    changes = {"gripper": {"dimension": 6}}
    assert policy.defi.config.robot == fit_robot({"data": ours}, changes=changes)
    assert set(policy.defi.config.robot.actions.normalisation) == {"bounds", "none"}

    times = {"action": [i / 30 for i in config.action_delta_indices]}
    theirs = LeRobotDataset("local/images", root=root, delta_timestamps=times)
    frames = [0, 10, 20, 42, 52, 82]  # of all episodes, the last with a chunk behind them
    samples = RecordedSamples(ours, SampleSettings(), chunk=10, image_size=16)
    samples.with_state = True
    starts = ours.starts[samples.starts[:, 0]] + samples.starts[:, 1]
    wanted = default_collate([samples[int(np.flatnonzero(starts == frame)[0])] for frame in frames])
    batch = default_collate([theirs[frame] for frame in frames])
    found = policy._inputs(batch)
    torch.testing.assert_close(found["images"], wanted["images"], rtol=0, atol=0)
    assert found["text"] == wanted["text"] and len(set(found["text"])) == 2
    torch.testing.assert_close(batch["action"], wanted["actions"], rtol=0, atol=0)
    torch.testing.assert_close(found["state"], wanted["state"], rtol=0, atol=0)
    loss, parts = policy.eval().forward(batch)  # without dropout
    own = policy.defi(wanted | {"seed": torch.tensor([seed_of("lerobot", 0, 0, frame) for frame in frames])})
    assert loss.item() == own["loss"].item() and parts["action_loss"] == own["action_loss"].item()
    assert loss.requires_grad and len(policy.get_optim_params()) == len(list(policy.defi.trainable()))

    # LeRobot's sampler leaves out the ends of episodes, its evaluation and its streams do not.
    ends = default_collate([theirs[frame] for frame in (*frames[:3], 11, 51, *frames[3:])])
    assert ends["action_is_pad"].any(dim=1).nonzero().flatten().tolist() == [3, 4]
    again, _ = policy.forward(ends)
    assert again.item() == loss.item()
    nothing, _ = policy.train().forward(default_collate([theirs[51]] * 2))
    nothing.backward()
    assert nothing.item() == 0 and not any(each.grad.any() for each in policy.get_optim_params())


def test_train_writes_whole_policies_and_resumes_exactly(folder: Path, trained: Path) -> None:
    wanted = load_file(trained / "000004" / "pretrained_model" / "model.safetensors")
    before = load_file(trained / "000002" / "pretrained_model" / "model.safetensors")
    assert any(not torch.equal(before[name], tensor) for name, tensor in wanted.items())
    for step in ("000002", "000004"):
        place = trained / step / "pretrained_model"
        assert (place / "model.safetensors").samefile(place / "defi" / "model.safetensors")
        assert checkpoint.read_manifest(place, "policy")["step"] == int(step)
    unet = "pretrained_model/defi/gfdm/unet/diffusion_pytorch_model.safetensors"
    assert (trained / "000002" / unet).samefile(trained / "000004" / unet)
    assert Policy.load(trained / "000004" / "pretrained_model").robot.cameras == ["static", "wrist"]
    shutil.rmtree(trained / "000004")
    config = trained / "000002" / "pretrained_model" / "train_config.json"
    run(folder, "train", f"--config_path={config}", "--resume=true")
    found = load_file(trained / "000004" / "pretrained_model" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


# ------------------------------------------------------------ acting


def read(record: Path) -> list[tuple[str, Any]]:
    return pickle.loads(record.read_bytes())  # of this test


def assert_same_observation(given: dict[str, Any], pictures: dict[str, Any], state: Any, text: str) -> None:
    assert given["images"].keys() == pictures.keys() and given["instruction"] == text
    for name, picture in pictures.items():
        np.testing.assert_array_equal(given["images"][name], picture)
    np.testing.assert_array_equal(given["state"], np.asarray(state, np.float32))


def test_eval_in_pusht(folder: Path) -> None:
    """Pictures and state arrive as the simulator gave them, the actions as the policy gave them."""
    shape = {"shape": (96, 96, 3), "dtype": "image", "names": ["height", "width", "channels"]}
    two = {"shape": (2,), "dtype": "float32", "names": ["x", "y"]}
    features = {"observation.image": shape, "observation.state": two, "action": two}
    data = LeRobotDataset.create("local/pusht", 10, features, root=folder / "pusht", use_videos=False)
    table = gymnasium.make("gym_pusht/PushT-v0", obs_type="pixels_agent_pos")
    rng = np.random.default_rng(0)
    for episode in range(2):
        seen, _ = table.reset(seed=episode)
        for _ in range(20):
            action = rng.uniform(100, 400, 2).astype(np.float32)
            state = seen["agent_pos"].astype(np.float32)
            pixels = {"observation.image": seen["pixels"], "observation.state": state}
            data.add_frame(pixels | {"action": action, "task": "push the T"})
            seen = table.step(action)[0]
        data.save_episode()
    data.finalize()
    settings = '["policy.state=true","policy.merge=2","policy.latent_action_frames=[0,2]"]'
    env = ("--env.type=pusht", "--env.episode_length=25", "--eval.use_async_envs=false")
    small = ("--eval.n_episodes=4", "--eval.batch_size=2")
    # With an evaluation between the steps: what acting leaves behind must not stop the training.
    more = (*env, "--eval.n_episodes=1", "--eval.batch_size=1", "--env_eval_freq=2")
    policy = train(
        folder, folder / "stages", folder / "pusht", "pusht_run", f"--policy.settings={settings}", *more
    )
    place, record = policy / "last" / "pretrained_model", folder / "pusht.pkl"
    path = (f"--policy.path={place}", "--policy.device=cpu", "--output_dir=evaluated")
    words = ("--policy.seed=3", "--policy.instruction=push the T")  # the simulator has none
    run(folder, "eval", *path, *env, *small, *words, record=record)

    ours, events = Policy.load(place), read(record)
    looks = [values for kind, values in events if kind == "look"]
    tables = list(dict.fromkeys(values[0] for kind, values in events if kind == "step"))
    assert len(looks) == 6 and len(tables) == 2  # 25 steps: chunks of 10, 10 and 5; two rounds
    for row, table in enumerate(tables):
        seen, sent = [], []  # of each round
        for kind, values in events:
            if kind in ("reset", "step") and values[0] == table:
                if kind == "reset":
                    seen.append([])
                    sent.append([])
                seen[-1].append(values[1:3])
                sent[-1].extend(values[3:])
        rounds = [n for n in range(len(seen)) if sent[n]]
        assert len(rounds) == 2 and all(len(sent[n]) == 25 for n in rounds)
        for number, (observations, seeds, ahead, actions) in enumerate(looks):
            n, first = rounds[number // 3], number % 3 * 10
            pixels, position = seen[n][first]
            assert_same_observation(observations[row], {"image": pixels}, position, "push the T")
            assert seeds[row] == seed_of("act", 3, number, row) and ahead is None
            np.testing.assert_array_equal(actions, ours.infer_batch(observations, seeds))
            for step in range(first, min(first + 10, 25)):
                np.testing.assert_array_equal(sent[n][step], actions[row, step - first])


def rollout(folder: Path, policy: Path, *settings: str) -> list[tuple[str, Any]]:
    given = ["--strategy.type=base", "--robot.type=recorder", "--task=open it", "--device=cpu"]
    given += [f"--policy.path={policy}", "--return_to_initial_position=false", *settings]
    run(folder, "rollout", *given, record=folder / "rollout.pkl")
    return read(folder / "rollout.pkl")


def test_an_exported_policy_rolls_out_on_an_arm(folder: Path, trained: Path, data: Path, monkeypatch) -> None:
    """And a training goes on from it."""
    config = PolicyConfig.read(trained / "000004" / "pretrained_model" / "defi" / "config.json")
    stages = {name: folder / "stages" / name for name in ("gfdm", "gidm")}
    config.robot.executed = 4
    checkpoint.save(
        DeFI.from_stages(config, **stages), folder / "own", step=1, config={"preset_name": "tiny"}
    )
    settings = [f"checkpoint={folder / 'own'}", f"output={folder / 'exported'}", "format=lerobot"]
    monkeypatch.setattr(sys, "argv", ["export", *settings])
    export_command.main()
    events, ours = (
        rollout(folder, folder / "exported", "--fps=20", "--duration=1.2"),
        Policy.load(folder / "own"),
    )
    seen = [values[0] for kind, values in events if kind == "seen"][1:]  # the first: when connecting
    sent = [values[0] for kind, values in events if kind == "sent"]
    looks = [values for kind, values in events if kind == "look"]
    assert len(sent) >= 8 and len(looks) == -(-len(sent) // 4)
    for number, (observations, seeds, _, actions) in enumerate(looks):
        given = seen[4 * number]
        pictures, state = {name: given[name] for name in CAMERAS}, [given[name] for name in STATE]
        assert_same_observation(observations[0], pictures, state, "open it")
        assert seeds == [seed_of("act", 0, number, 0)]
        np.testing.assert_array_equal(actions, ours.infer_batch(observations, seeds))
        np.testing.assert_array_equal(actions[0, : len(sent[4 * number :][:4])], sent[4 * number :][:4])
        assert set(actions[..., 6].flat) <= {-1.0, 1.0}  # the gripper's two values

    path = (
        f"--policy.path={folder / 'exported'}",
        *HERE,
        f"--dataset.root={data}",
        "--dataset.repo_id=local/data",
    )
    last = ("--dataset.video_backend=pyav", "--batch_size=2", "--steps=1", "--output_dir=further")
    run(folder, "train", *path, *last)
    place = folder / "further" / "checkpoints" / "last" / "pretrained_model"
    further = DeFIPolicy.from_pretrained(place)
    assert further.defi.config == config and further.steps == 2
    further.save_pretrained(place)  # in its own place
    again = DeFIPolicy.from_pretrained(place).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in further.state_dict().items())


def test_real_time_chunking(folder: Path, trained: Path) -> None:
    """What an answer begins with is what the arm carried out while it was computed."""
    place = trained / "000004" / "pretrained_model"
    given = ("--inference.type=rtc", "--inference.queue_threshold=6", "--fps=10", "--duration=6")
    events, ours = rollout(folder, place, *given), Policy.load(place)
    looks = [values for kind, values in events if kind == "look"][1:]  # the first: warming up
    sent = [values[0] for kind, values in events if kind == "sent"]
    seen = {given["s0.pos"]: given for kind, (given, *_) in events if kind == "seen"}
    assert looks[0][2] is None and len(looks) >= 5
    for number, (observations, _, ahead, actions) in enumerate(looks):
        given = seen[float(observations[0]["state"][0])]  # an observation of the arm, whole
        pictures, state = {name: given[name] for name in CAMERAS}, [given[name] for name in STATE]
        assert_same_observation(observations[0], pictures, state, "open it")
        if number:
            flow, delay = ahead
            assert 1 <= delay <= len(flow) <= 7 and flow.any(axis=1).all()  # no zeros that LeRobot adds
            before = looks[number - 1][3][0]
            np.testing.assert_array_equal(flow, before[-len(flow) :])
            np.testing.assert_array_equal(actions[0, :delay], flow[:delay])
    assert not np.array_equal(
        looks[1][3], ours.infer_batch(looks[1][0], looks[1][1])
    )  # what was under way counts
    every = np.concatenate([actions[0] for *_, actions in looks])
    assert all((every == action).all(axis=1).any() for action in sent) and len(sent) >= 40


def test_what_lerobot_fills_up_is_not_under_way() -> None:
    actions = torch.arange(1.0, 13).reshape(6, 2)
    actions[1] = 0  # stands still: a real one
    filled = torch.cat([actions, torch.zeros(4, 2)])
    chunk = np.concatenate([np.ones((4, 2)), actions.numpy()])
    for last in (chunk, np.empty((0, 0))):
        found = under_way(filled, 3, last)
        np.testing.assert_array_equal(found.actions, actions.numpy())
        assert found.delay == 3 and under_way(filled, 9, last).delay == 6
        assert under_way(None, 3, last) is None and under_way(torch.zeros(10, 2), 3, last) is None
        assert under_way(torch.zeros(0, 2), 0, last) is None
    chunk[7:] = 0  # a robot without a gripper stops
    left = torch.from_numpy(chunk[5:].copy())
    for last, length, real in ((chunk, 10, 5), (chunk, 4, 4), (chunk[:0], 10, 2)):  # LeRobot's fixed length
        filled = torch.cat([left, torch.zeros(5, 2)])[:length]
        np.testing.assert_array_equal(under_way(filled, 3, last).actions, left[:real])
    still = under_way(torch.zeros(10, 2), 2, chunk)
    assert still.delay == 2 and still.actions.shape == (2, 2) and not still.actions.any()
    assert under_way(torch.zeros(10, 2), 9, chunk).delay == 3, "no more than the chunk has"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "neither a checkpoint nor what a new policy is made from"),
        ({"gfdm": "stages/gfdm", "gidm": "stages/gidm", "preset": "huge"}, "policy.preset=huge: choose from"),
        (
            {"gfdm": "stages/gfdm", "gidm": "stages/gidm", "settings": ["policy.stat=true"]},
            "did you mean policy.st",
        ),
        (
            {"gfdm": "stages/gfdm", "gidm": "stages/gidm", "settings": ["trainer.lr=1"]},
            "trainer.lr=1: leave it out",
        ),
        ({"gfdm": "nothing", "gidm": "stages/gidm", "settings": SIZES}, "nothing: no checkpoint here"),
    ],
)
def test_mistakes_are_said(
    folder: Path, data: Path, monkeypatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(folder)
    config = DeFIConfig(**changes, device="cpu", push_to_hub=False)
    with pytest.raises(Exception, match=re.escape(message)) as caught:
        make_policy(config, LeRobotDatasetMetadata("local/data", root=data))
    assert type(caught.value).__name__ == "UserError" and "\n" not in str(caught.value)
