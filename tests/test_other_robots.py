"""A robot that is not CALVIN's, in three formats: through all stages, its demonstrations replayed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_data import MadeData
from policy_fakes import PRESET
from test_train_from_every_source import run, write_calvin

from benchmarks.rlds_writer import write_set
from defi.config import flatten
from defi.data import open_dataset
from defi.data.rlds.write import features_dict, image, tensor, text
from defi.engine import checkpoint
from defi.engine.checkpoint import read_manifest
from defi.engine.log import METRICS, read_metrics
from defi.errors import UserError
from defi.picture import encode_picture
from defi.robot.spec import Vector
from defi.video import write_mp4
from Step1_GFDM.config import VAESizes
from Step1_GFDM.vae import VAEConfig, VideoVAE
from Step3_DeFI.acting import Policy
from Step3_DeFI.samples import fit_robot

ACTIONS, STATE = ("slide", "turn", "lift", "grip"), ("place", "angle", "height")
GOALS = {"push it away": (90.0, 0.5, 2.0), "pull it back": (10.0, -0.5, 8.0)}  # mm, rad, mm
FPS, LENGTH, EPISODES = 5, 16, 20
SIDE, STEPS = PRESET["gfdm"]["image_size"], 250
LEARNED = (
    0.05  # mean square of what is predicted less what was done, in units of the robot's normalised range
)

GIDM = {"width": 16, "encoder_blocks": 1, "decoder_blocks": 1, "heads": 2, "codes": 8, "code_width": 8}
SIZES = PRESET | {"gidm": GIDM | {"dino": {"image_size": 28, "width": 16, "layers": 1, "heads": 2}}}
SHORT = [
    "trainer.global_batch=4",
    "trainer.max_steps=3",
    "trainer.log_every=1",
    "trainer.save_every=0",
    "trainer.preview_every=0",
]


def sizes(*sections: str) -> list[str]:
    """Settings that make the models tiny."""
    chosen = {name: SIZES[name] for name in sections}
    values = flatten(chosen)
    values.pop("text.t5.projection", None)
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def demonstrations() -> list[dict[str, Any]]:
    """A robot that goes to where it is told in steps of a quarter of what is left."""
    rng, found = np.random.default_rng(0), []
    for number in range(EPISODES):
        said = list(GOALS)[number % 2]
        place, states = rng.uniform((0, -1, 0), (100, 1, 10)), []
        for _ in range(LENGTH):
            states.append(place)
            place = place + (np.array(GOALS[said]) - place) / 4
        state = np.array(states, np.float32)
        moves = (np.array(GOALS[said], np.float32) - state) / 4
        actions = np.concatenate([moves, (state[:, :1] > 50).astype(np.float32)], axis=1)
        pictures = np.zeros((LENGTH, 24, 32, 3), np.uint8)
        pictures[:, :, :, 0] = (2 * state[:, 0])[:, None, None]
        found.append({"text": said, "state": state, "actions": actions, "wrist": pictures})
    return found


class Demonstrations(MadeData):
    """The same as a data set, of which LeRobot's format is written."""

    fps, action_names, state_names = FPS, ACTIONS, STATE

    def __init__(self) -> None:
        self.shown = demonstrations()
        super().__init__(
            [LENGTH] * EPISODES,
            lambda number, positions: self.shown[number]["wrist"][list(positions)],
            texts=lambda number: (self.shown[number]["text"],),
            cameras=("wrist",),
        )

    def read_motions(self, frames: range) -> np.ndarray:
        number, first = divmod(frames.start, LENGTH)
        shown = self.shown[number]
        both = np.concatenate([shown["actions"], shown["state"]], axis=1)
        return both[first : first + len(frames)]


def write_as_lerobot(folder: Path) -> list[str]:
    pytest.importorskip("pyarrow")
    from defi.data.lerobot.write import LeRobotWriter

    writer = LeRobotWriter(data := Demonstrations(), folder, "images", 2**20, 2**20, "arm")
    for number in range(len(data)):
        writer.add(data.episode(number))
    writer.close()
    return ["data=lerobot", f"data.root={folder}"]


def write_as_rlds(folder: Path) -> list[str]:
    def episode(number: int, shown: dict[str, Any]) -> dict[str, Any]:
        return {
            "episode_metadata/file_path": [f"/{number}".encode()],
            "steps/observation/wrist": [encode_picture(frame, "PNG") for frame in shown["wrist"]],
            "steps/observation/state": shown["state"],
            "steps/language_instruction": [shown["text"].encode()] * LENGTH,
            "steps/action": shown["actions"],
        }

    examples = [episode(*each) for each in enumerate(demonstrations())]
    described = {
        "observation": features_dict(wrist=image(24, 32, "png"), state=tensor("float32", 3)),
        "language_instruction": text(),
        "action": tensor("float32", 4),
    }
    root = write_set(
        folder.parent, described, {"train": [examples[:-1]], "val": [examples[-1:]]}, name=folder.name
    )
    return ["data=rlds", f"data.root={root}", f"data.fps={FPS}", "data.cameras=[wrist]"]


def write_as_hdf5(folder: Path) -> list[str]:
    h5py = pytest.importorskip("h5py")
    folder.mkdir()
    for number, shown in enumerate(demonstrations()):
        with h5py.File(folder / f"episode_{number}.hdf5", "w") as file:
            file["eye"], file["moves"], file["pose"] = shown["wrist"], shown["actions"], shown["state"]
            file.attrs["said"] = shown["text"]
    places = "data.cameras=[wrist:eye];data.actions=[moves];data.state=[pose];data.language=said"
    return ["data=hdf5", f"data.root={folder}", f"data.fps={FPS}", *places.split(";"), "data.groups=''"]


WRITERS: dict[str, Callable[[Path], list[str]]] = {
    "lerobot": write_as_lerobot,
    "rlds": write_as_rlds,
    "hdf5": write_as_hdf5,
}


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = VAESizes(**PRESET["gfdm"]["vae"])
    folder = tmp_path_factory.mktemp("vae")
    model = VideoVAE.from_config(VAEConfig(PRESET["gfdm"]["image_size"], sizes))
    checkpoint.save(model, folder, step=1, config={"preset_name": "test"})
    return folder


@pytest.mark.parametrize("form", WRITERS)
def test_another_robot_through_all_stages(form: str, vae: Path, tmp_path: Path) -> None:
    data = WRITERS[form](tmp_path / "demos")
    runs = {name: tmp_path / name for name in ("latents", "gfdm", "gidm", "store", "policy")}
    gfdm, below = sizes("text", "gfdm"), [f"gfdm_checkpoint={runs['gfdm']}"]
    run("Step1_GFDM.prepare", *data, f"image_size={SIDE}", f"vae={vae}", f"output={runs['latents']}")
    given = [f"data.root={runs['latents']}", f"vae={vae}", f"output={runs['gfdm']}"]
    run("Step1_GFDM.train", *given, *gfdm, *SHORT)
    run("Step2_GIDM.train", *data, *sizes("text", "gidm"), f"output={runs['gidm']}", *SHORT)
    given = [*sizes("text", "gfdm", "policy"), *below]
    run("Step3_DeFI.prepare", *data, *given, f"output={runs['store']}")
    given += [f"gidm_checkpoint={runs['gidm']}", f"data.store={runs['store']}", "policy.state=true"]
    steps = [
        f"trainer.max_steps={STEPS}",
        "trainer.global_batch=32",
        "trainer.lr=3e-3",
        "trainer.save_every=0",
    ]
    run("Step3_DeFI.train", *given, *steps, f"trainer.preview_every={STEPS}", f"output={runs['policy']}")
    assert read_manifest(runs["policy"], "policy")["step"] == STEPS
    policy = Policy.load(runs["policy"])
    robot = policy.robot
    assert (robot.cameras, robot.fps) == (["wrist"], FPS)
    assert set(robot.actions.normalisation) == {"bounds"}
    apart = []
    for number, shown in enumerate(demonstrations()):
        for position in (0, 4):
            observation = {
                "images": {"wrist": shown["wrist"][position]},
                "state": shown["state"][position],
                "instruction": shown["text"],
            }
            chunk = policy.infer(observation, seed=number)
            expert = shown["actions"][position : position + len(chunk)]
            apart.append(robot.actions.normalise(chunk) - robot.actions.normalise(expert))
    assert np.square(apart).mean() < LEARNED


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(output / METRICS) if record["kind"] == "train"]


def test_calvin_data_as_lerobot_train_to_the_same_losses(vae: Path, tmp_path: Path) -> None:
    """Of all three stages, to the last bit, as the pictures are kept as such."""
    write_calvin(tmp_path / "calvin")
    given = ["data=calvin", f"data.root={tmp_path / 'calvin'}", "pictures=images"]
    run("defi.data.convert", *given, f"output={tmp_path / 'lerobot'}")
    found = {}
    for form in ("calvin", "lerobot"):
        here = tmp_path / f"{form}_runs"
        data = [f"data={form}", f"data.root={tmp_path / form}", "data.cameras=[static,gripper]"]
        if form == "lerobot":  # all of it is trained on
            data += ["data.split=0:2", "data.held_out=0:1"]
        run("Step1_GFDM.prepare", *data, f"image_size={SIDE}", f"vae={vae}", f"output={here / 'latents'}")
        given = [f"data.root={here / 'latents'}", f"vae={vae}", f"output={here / 'gfdm'}"]
        run("Step1_GFDM.train", *given, *sizes("text", "gfdm"), *SHORT)
        run("Step2_GIDM.train", *data, *sizes("text", "gidm"), f"output={here / 'gidm'}", *SHORT)
        given = [f"gfdm_checkpoint={here / 'gfdm'}", f"gidm_checkpoint={here / 'gidm'}"]
        given += [*data, "data.min_remaining=9", "policy.normalisation=none", f"output={here / 'policy'}"]
        run("Step3_DeFI.train", *given, *sizes("text", "gfdm", "policy"), *SHORT)
        found[form] = {stage: losses(here / stage) for stage in ("gfdm", "gidm", "policy")}
    assert found["calvin"] == found["lerobot"] and all(map(len, found["calvin"].values()))


def test_settings_change_the_robot_before_it_is_normalised() -> None:
    given = {"executed": 5, "fps": None, "gripper": {"dimension": 3}}
    robot = fit_robot({"a": Demonstrations()}, None, given)
    assert (robot.executed, robot.fps, robot.gripper.dimension) == (5, FPS, 3)
    assert robot.actions.normalisation == ["bounds"] * 3 + ["none"], "a gripper has two values"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cameras": ["eye"]}, "policy.robot.cameras=.'eye'.: choose and name them with data.cameras"),
        ({"state": None, "actions": asdict(Vector.plain("ab"))}, "robot.actions=2 numbers: the data have 4"),
        ({"gripper": {"dimension": 4}}, "robot.gripper.dimension=4: must lie in 0 … 3"),
        ({"executed": 0}, "robot.executed=0: must be 1 or more"),
        ({"hands": 2}, "policy.robot.hands=2: Key 'hands' not in 'Robot'"),
    ],
)
def test_changes_that_do_not_fit_the_data_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        fit_robot({"a": Demonstrations()}, None, changes)


class Stateless(Demonstrations):
    state_names = ()

    def read_motions(self, frames: range) -> np.ndarray:
        return super().read_motions(frames)[:, :4]


def test_a_state_that_one_set_lacks_counts_only_where_it_is_read() -> None:
    sets = {"a": Demonstrations(), "b": Stateless()}
    assert fit_robot(sets, state=False).state is None
    with pytest.raises(UserError, match="data.sets.b: not the robot of data.sets.a: no state; "):
        fit_robot(sets, state=True)


def test_corrected_actions_are_read_again(tmp_path: Path) -> None:
    """TFRecords of the same size, and annotations of the same names in another split."""
    for number in (1, 2):
        described = {"observation": features_dict(eye=image(8, 8, "png")), "action": tensor("float32", 1)}
        one = {
            "steps/observation/eye": [encode_picture(np.zeros((8, 8, 3), np.uint8), "PNG")] * 3,
            "steps/action": np.full(3, number, np.float32),
        }
        shutil.rmtree(tmp_path / "toy", ignore_errors=True)
        write_set(tmp_path, described, {"train": [[one]]})
        given = {"format": "rlds", "root": str(tmp_path / "toy"), "fps": 5, "split": "train"}
        assert (open_dataset(given).motions.actions == number).all()
    for number, split in enumerate(("train", "val", "train")):
        write_mp4(tmp_path / "videos/eye.mp4", np.zeros((3, 16, 16, 3), np.uint8), 5)
        (tmp_path / "annotation" / split).mkdir(parents=True, exist_ok=True)
        said = {"texts": ["go"], "videos": [{"video_path": "videos/eye.mp4"}], "action": [[number]] * 3}
        (tmp_path / "annotation" / split / "0.json").write_text(json.dumps(said))
        data = open_dataset({"format": "vpp", "root": str(tmp_path), "split": split})
        assert (data.motions.actions == number).all()
