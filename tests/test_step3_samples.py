"""Samples straight from CALVIN's files, and the store that is made of them: the same, from folder and zip."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from policy_fakes import PRESET, build_gfdm, recorded, write_demonstrations, write_stages
from safetensors.torch import load_file
from test_step3_data import train_settings

from defi.config import CONFIG_DIR, compose_preset
from defi.data.calvin import (
    ANNOTATIONS,
    CAMERAS,
    CalvinFolder,
    Settings,
    calvin_robot,
    encode_frame,
    frame_name,
)
from defi.engine.checkpoint import find_checkpoint, find_weights, read_manifest
from defi.engine.log import read_metrics
from defi.errors import UserError
from Step1_GFDM.config import GFDMConfig
from Step3_DeFI import prepare as preparation
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.observation import observe
from Step3_DeFI.policy import DeFI
from Step3_DeFI.prepare import Encoder, prepare
from Step3_DeFI.store import PolicyStore, build_samples, open_sources
from Step3_DeFI.train import train_policy


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations as a folder and as a zip, and stage 1's run."""
    folder = tmp_path_factory.mktemp("place")
    write_demonstrations(folder / "demos")
    write_demonstrations(folder / "other", lengths=(14,), seed=1)
    (folder / "other" / "training").rename(folder / "demos" / "validation")
    write_stages(folder)
    with zipfile.ZipFile(folder / "DEMOS.ZIP", "w") as archive:
        for path in sorted(p for p in (folder / "demos").rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(folder))
    return folder


def settings(place: Path, output: Path, root: str, kind: str, **values: Any) -> DictConfig:
    given = {
        "data.root": place / root,
        "gfdm_checkpoint": place / "gfdm",
        "data.min_remaining": 9,
        "store.kind": kind,
    }
    given |= {"output": output, "store.kind": kind, "store.batch": 4, **values}
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = compose("step3_prepare", [f"{key}={value}" for key, value in given.items()])
    cfg = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(cfg, resolve=False)), PRESET)
    OmegaConf.resolve(cfg)
    return cfg


@pytest.mark.parametrize("apart", [None, 2])
@pytest.mark.parametrize("root", ["demos", "DEMOS.ZIP"])
def test_store_and_files_yield_the_same_samples(
    place: Path, tmp_path: Path, root: str, apart: int | None
) -> None:
    """With the frames that follow, whose last is repeated at the end of a span, and without."""
    kept = {"store.videos": apart is not None}
    store = PolicyStore(prepare(settings(place, tmp_path / "store", root, "images", **kept)))
    clip = None if apart is None else range(0, 3 * apart, apart)
    raw = recorded(place / root, clip=clip)
    assert len(store) == len(raw) == 6 + 13 and store.fingerprint == raw.fingerprint
    for packed, sample in zip(map(store.__getitem__, range(19)), map(raw.__getitem__, range(19))):
        assert packed.keys() == sample.keys() and packed["text"] == sample["text"]
        for name in packed.keys() - {"text"}:
            assert torch.equal(packed[name], sample[name]), name


LEARNS_ALONG = {"gfdm.finetune": "lora", "gfdm.lora_rank": 2, "gfdm.video_loss": 0.5}
PREVIEWED = {"trainer.preview_every": 4, "shown": 1}
NUMBERS = {"loss", "action_loss", "video_loss", "training_action_error", "held_out_action_error"}


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """A run on a store of pictures, with held-out ones and the video loss."""
    prepare(settings(place, place / "store", "demos", "images", **{"store.videos": True}))
    prepare(settings(place, place / "held_out", "demos", "images", **{"data.split": "validation"}))
    given = {"data.held_out": place / "held_out", **LEARNS_ALONG, **PREVIEWED}
    train_policy(train_settings(place, place / "run", place / "store", **given))
    return place / "run"


@pytest.mark.parametrize(
    ("root", "held_out", "starts"),
    [("demos", "validation", (2, 4)), ("DEMOS.ZIP", "{place}/DEMOS.ZIP/validation", (4,))],
)
def test_training_from_the_recordings_is_training_from_their_store(
    place: Path, trained: Path, tmp_path: Path, root: str, held_out: str, starts: tuple[int, ...]
) -> None:
    """Losses, errors and weights, bit for bit; of a run that was stopped on the way, too."""
    run, held_out = tmp_path / "run", held_out.format(place=place)
    given = {"data.root": place / root, "data.min_remaining": 9, "data.held_out": held_out}
    given |= LEARNS_ALONG | PREVIEWED
    for number, steps in enumerate(starts):
        stop = {"trainer.max_steps": steps, "resume": number > 0}
        train_policy(train_settings(place, run, "null", **given, **stop))
    found, expected = (
        [{name: r[name] for name in r.keys() & NUMBERS} for r in read_metrics(folder / "metrics.jsonl")]
        for folder in (run, trained)
    )
    assert found == expected and set().union(*expected) == NUMBERS
    ends = [find_checkpoint(folder) for folder in (run, trained)]
    weights = [load_file(end / "model.safetensors") for end in ends]
    assert all(weights[0][name].equal(tensor) for name, tensor in weights[1].items())
    assert read_manifest(run)["data"] == read_manifest(trained)["data"]


@pytest.mark.parametrize(
    ("store", "values", "message"),
    [
        ("null", {}, "data.store=None, data.root=None: give one of them"),
        ("{place}/store", {"data.root": "demos"}, "data.root=demos: give one of them"),
        ("null", {"data.root": "nowhere"}, "nowhere/training: no such folder"),
        (
            "null",
            {"data.root": "{place}/demos", "data.min_remaining": 5},
            "remaining=5: a chunk has 10 actions",
        ),
        ("null", {"data.root": "{place}/demos", "data.stride": 0}, "data.stride=0: must be 1 or more"),
        ("null", {"data.root": "{place}/demos", "data.spans": "some"}, "data.spans=some: choose"),
        ("null", {"data.root": "{place}/demos", "data.held_out": "{place}"}, "ep_start_end_ids.npy: missing"),
    ],
)
def test_data_that_do_not_fit_are_named(
    place: Path, tmp_path: Path, store: str, values: dict[str, Any], message: str
) -> None:
    given = {"data.min_remaining": 9} | {
        name: str(value).format(place=place) for name, value in values.items()
    }
    with pytest.raises(UserError, match=message):
        train_policy(train_settings(place, tmp_path / "run", store.format(place=place), **given))
    assert not (tmp_path / "run").exists()


def test_latents_are_those_of_the_raw_frames(place: Path, tmp_path: Path) -> None:
    store = PolicyStore(prepare(settings(place, tmp_path / "store", "DEMOS.ZIP", "latents")))
    data, gfdm = CalvinFolder(place / "demos" / "training"), build_gfdm().eval()
    for i in (0, 7, 18):
        frame = frames_of(tmp_path / "store", data)[i][1]
        expected = gfdm.encode_images(observe(data.frame(frame), CAMERAS.values(), 16) / 127.5 - 1)
        torch.testing.assert_close(store[i]["latents"].float(), expected, rtol=1e-3, atol=1e-3)


def frames_of(store: Path, data: CalvinFolder, spans: str = "annotated") -> list[list[int]]:
    """Number of the annotated span, −1 without one, and frame of each sample of a store."""
    opened = Settings(root=str(data.folder.parent), spans=spans).open("training")
    found = []
    for number, position in np.load(store / "starts.npy").tolist():
        episode = opened.episode(number)
        found.append([-1 if "recording" in episode.name else int(episode.name), episode.start + position])
    return found


def test_robot_and_places_are_kept(place: Path, tmp_path: Path) -> None:
    store = PolicyStore(prepare(settings(place, tmp_path / "store", "demos", "images")))
    found = frames_of(tmp_path / "store", CalvinFolder(place / "demos" / "training"))
    assert found == [[0, f] for f in range(100, 106)] + [[1, f] for f in range(115, 128)]
    assert store.motions.state.shape == (37, 15) and store.motions.state.dtype == np.float32
    assert store.robot() == calvin_robot() and store.normalisation == "none"


def test_all_recorded_frames(place: Path, tmp_path: Path) -> None:
    """The annotated samples come first, unchanged; every other frame with a chunk follows, without text."""
    given = {"data.min_remaining": 12, "data.spans": "all"}
    store = PolicyStore(prepare(settings(place, tmp_path / "store", "demos", "images", **given)))
    annotated = [[0, f] for f in range(100, 103)] + [[1, f] for f in range(115, 125)]
    others = [[-1, f] for f in (103, 104, 105, 125, 126, 127)]
    data = CalvinFolder(place / "demos" / "training")
    assert frames_of(tmp_path / "store", data, "all") == annotated + others
    raw = recorded(place / "demos", 12, spans="all")
    assert len(store) == len(raw) == 19
    for i, (number, frame) in enumerate(annotated + others):
        packed, sample = store[i], raw[i]
        assert packed["text"] == sample["text"] == ("" if number < 0 else f"do thing {number}")
        assert torch.equal(packed["images"], sample["images"])
        assert torch.equal(packed["actions"], sample["actions"])
        assert (1000 * packed["actions"][:, 0]).round().tolist() == list(range(frame, frame + 10))
    with pytest.raises(UserError, match="data.spans=some"):
        prepare(settings(place, tmp_path / "new", "demos", "images", **{"data.spans": "some"}))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("annotated", [True, False])
def test_recordings_without_samples_that_have_text(
    annotated: bool, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """No annotation, or only spans that are too short: of all frames, samples without text remain."""
    root = write_demonstrations(tmp_path / "demos")
    if not annotated:
        (root / "training" / ANNOTATIONS).unlink()
    given = {"data.root": root, "data.min_remaining": 30}
    store = PolicyStore(
        prepare(settings(place, tmp_path / "s", "demos", "images", **given, **{"data.spans": "all"}))
    )
    assert [store[i]["text"] for i in range(len(store))] == [""] * (6 + 13)
    told = "2 of 2 episodes are too short for data.min_remaining=30: left out"
    assert (told in capsys.readouterr().out) == annotated
    with pytest.raises(
        UserError, match="is longer than data.min_rem.*=30" if annotated else "data.spans=recordings, or all"
    ):
        prepare(settings(place, tmp_path / "new", "demos", "images", **given))
    with pytest.raises(UserError, match="no episode has the 30 frames of a chunk"):
        recorded(root, 29, chunk=30, spans="all")


def change_frame(root: Path, number: int, key: str, place: int, value: float) -> Path:
    file = root / "training" / frame_name(number)
    frame = dict(np.load(file))
    frame[key][place] = value
    file.write_bytes(encode_frame(frame))
    return file


@pytest.mark.parametrize(
    ("key", "at", "value", "said"),
    [
        ("rel_actions", 2, np.nan, "rel_actions holds nan at place 2"),
        ("rel_actions", 0, 50, "rel_actions holds 50 at place 0"),
        (
            "rel_actions",
            6,
            0,
            r"rel_actions holds the gripper's action 0, expected is 1 \(open\) or -1 \(closed\)",
        ),
        ("robot_obs", 3, np.inf, "robot_obs holds inf at place 3"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_any_work(
    key: str, at: int, value: float, said: str, place: Path, tmp_path: Path
) -> None:
    """A store is not begun, and training straight from the files neither."""
    root = write_demonstrations(tmp_path / "demos")
    file = change_frame(root, 120, key, at, value)
    with pytest.raises(UserError, match=f"^{file}: {said}"):
        prepare(settings(place, tmp_path / "store", "demos", "images", **{"data.root": root}))
    assert not (tmp_path / "store").exists()
    with pytest.raises(UserError, match=f"^{file}: {said}"):
        recorded(root)


@pytest.mark.parametrize("text", [None, " ", ["a", "b"]])
def test_spans_without_words(
    text: object, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Left out and counted, or taken as recordings without text; a data set of nothing else is refused."""
    root = write_demonstrations(tmp_path / "demos")
    file = root / "training" / ANNOTATIONS
    annotation = np.load(file, allow_pickle=True).item()
    annotation["language"]["ann"] = [["lift"], text]
    np.save(file, annotation)
    given = {"data.root": root}
    store = PolicyStore(prepare(settings(place, tmp_path / "s", "demos", "images", **given)))
    assert {sample["text"] for sample in map(store.__getitem__, range(len(store)))} == {"lift"}
    assert (
        f"1 of 2 annotated spans have no instruction: left out; the first: {file}" in capsys.readouterr().out
    )
    more = prepare(settings(place, tmp_path / "t", "demos", "images", **given, **{"data.spans": "all"}))
    assert PolicyStore(more).texts == ["lift", ""] and len(PolicyStore(more)) == 6 + 13
    annotation["language"]["ann"] = [text, text]
    np.save(file, annotation)
    with pytest.raises(UserError, match=f"{file}: the text of span 0"):
        prepare(settings(place, tmp_path / "u", "demos", "images", **given))


def test_instructions_that_are_cut_are_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Where a video model is: when latents are made, and when training starts."""
    root = write_demonstrations(tmp_path / "demos")
    file = root / "training" / ANNOTATIONS
    annotation = np.load(file, allow_pickle=True).item()
    texts = [f"put it {'very ' * 40}far to the {side}" for side in ("left", "right")]
    annotation["language"]["ann"] = texts
    np.save(file, annotation)
    tokens = build_gfdm().clip.config.tokens
    for kind in ("images", "latents"):
        given = {"data.root": root, "text.clip.keep_end": False}
        prepare(settings(place, tmp_path / kind, "demos", kind, **given))
    told = capsys.readouterr().out
    assert f"2 of 2 instructions are truncated at {tokens} tokens" in told
    assert f"2 of them are equal to another, the first: {texts[0]!r} = {texts[1]!r}" in told
    train_policy(train_settings(place, tmp_path / "run", tmp_path / "images", **{"trainer.max_steps": 1}))
    assert f"2 of 2 instructions are truncated at {tokens} tokens" in capsys.readouterr().out


def test_a_frame_of_latents_takes_at_most_17_kb() -> None:
    """Both views, at the sizes of Stable Video Diffusion's autoencoder and 256² pixels."""
    cfg = compose_preset("paper")
    encoder = Encoder(
        "latents", 1, 0, PolicyConfig.from_preset(cfg, calvin_robot()), GFDMConfig.from_preset(cfg)
    )
    assert np.prod(encoder.row_shape) * np.float16().nbytes <= 17 * 1024


def test_missing_frames_are_named_before_any_work(place: Path, tmp_path: Path) -> None:
    root = write_demonstrations(tmp_path / "demos")
    for frame in (103, 120):
        (root / "training" / frame_name(frame)).unlink()
    with pytest.raises(UserError, match=r"episode_0000103\.npz: missing, and 1 more of the 37 frames"):
        recorded(root)


def test_a_full_disk_is_named_before_any_work(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(preparation.os, "posix_fallocate", full)
        with pytest.raises(UserError, match=r"cannot write a store of 0\.0 GB \(No space left on device\)"):
            prepare(settings(place, tmp_path / "store", "demos", "images"))
    prepare(settings(place, tmp_path / "store", "demos", "images", resume=True))
    assert len(PolicyStore(tmp_path / "store")) == 19


# ------------------------------------------------------------ several data sets


def sets_of(place: Path, **sections: str) -> dict[str, Any]:
    return {f"+data.sets.{name}": f"{{{section}}}" for name, section in sections.items()}


@pytest.fixture(scope="module")
def image_store(place: Path) -> Path:
    return prepare(settings(place, place / "images_of_demos", "demos", "images"))


def test_a_mixture_of_data_and_store_trains_by_weight(place: Path, image_store: Path, tmp_path: Path) -> None:
    """19 samples of each: weights 1 and 2 give 19 + 38 places, each store's sample twice among its own."""
    sets = sets_of(
        place,
        plain=f"format: calvin, root: {place / 'demos'}, min_remaining: 9, weight: 1",
        packed=f"store: {image_store}, weight: 2",
    )
    given = {"data": "mixture", **sets, "shown": 2, "trainer.max_steps": 2}
    cfg = train_settings(place, tmp_path / "run", "null", **given)
    train_policy(cfg)
    assert read_manifest(tmp_path / "run")["data"]["size"] == 19 + 38
    mixed = build_samples(
        open_sources(cfg.data, "training"), DeFI.from_pretrained(find_weights(tmp_path / "run"))
    )
    alone = PolicyStore(image_store)
    for index in range(57):
        sample, expected = mixed.sample(index), alone[index if index < 19 else (index - 19) // 2]
        assert sample["text"] == expected["text"] and torch.equal(sample["images"], expected["images"])
        assert torch.equal(sample["actions"], expected["actions"])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            "format: calvin, root: {demos}, cameras: [static], weight: 1",
            r"sets.b: .*cameras \['static'\], not",
        ),
        ("format: calvin, root: {demos}, weight: 0", "data.sets.b.weight=0.0: must be above 0"),
        (
            "store: {features}, weight: 1",
            "data.sets: .*'features'.*give all as they are, or stores of one kind",
        ),
        ("store: {features}, wait: 1", "data.sets.b.wait=1: Key 'wait' not in"),
        ("format: calvin, weight: 1", "data.sets.b: lacks root"),
    ],
)
def test_what_does_not_go_with_the_rest_of_a_mixture_is_named(
    other: str, said: str, place: Path, tmp_path: Path
) -> None:
    features = tmp_path / "features"
    if "{features}" in other:
        prepare(settings(place, features, "demos", "features"))
    first = f"format: calvin, root: {place / 'demos'}, weight: 1"
    sets = sets_of(place, a=first, b=other.format(demos=place / "demos", features=features))
    with pytest.raises(UserError, match=said):
        train_policy(train_settings(place, tmp_path / "run", "null", data="mixture", **sets))
    assert not (tmp_path / "run").exists()


OTHER = {"policy.normalisation": "bounds"}


def test_a_store_goes_on_with_its_settings(place: Path, tmp_path: Path) -> None:
    prepare(settings(place, tmp_path / "s", "demos", "images"))
    given = {"data.cameras": "[static:gripper,gripper:static]", "resume": True}
    with pytest.raises(UserError, match="with other data or settings .settings .*gripper:static"):
        prepare(settings(place, tmp_path / "s", "demos", "images", **given))


def test_a_run_goes_on_with_its_robot(place: Path, image_store: Path, tmp_path: Path) -> None:
    """Its normalisation stays; other cameras are refused."""
    given = {"policy.normalisation": "mean_std", "trainer.max_steps": 1}
    train_policy(train_settings(place, tmp_path / "run", image_store, **given))
    first = DeFI.from_pretrained(find_weights(tmp_path / "run")).config.robot
    assert first.actions.normalisation == ["mean_std"] * 6 + ["none"] and first.actions.scale[0] != 1
    given = {"resume": True, "trainer.max_steps": 2}
    train_policy(train_settings(place, tmp_path / "run", image_store, **given))
    assert DeFI.from_pretrained(find_weights(tmp_path / "run")).config.robot == first
    with pytest.raises(
        UserError, match="policy.normalisation=bounds: .*/run began with another; leave it out"
    ):
        train_policy(train_settings(place, tmp_path / "run", image_store, **given, **OTHER))
    given |= {"data.root": place / "demos", "data.cameras": "[static]"}
    with pytest.raises(
        UserError, match=r"the training data: .*cameras \['static'\], not \['static', 'gripper'\]"
    ):
        train_policy(train_settings(place, tmp_path / "run", "null", **given))
