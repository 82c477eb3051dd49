"""What training and rollouts see, beside what the published data pipelines yield and its scripts set.

The recordings lie in `reference/pipelines`; what of them is missing is skipped. Sizes and names come from
them. What is held to them are the classes and configurations that users run, with `preset=released`.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from hydra import compose, initialize_config_dir
from made_data import MadeData
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection

from defi.config import CONFIG_DIR, compose_preset
from defi.data import open_dataset
from defi.data.calvin import CAMERAS
from defi.engine.config import TrainerConfig
from defi.engine.data import SeededDataset
from defi.engine.optimizer import build_optimizer
from defi.text import CLIPText, TextConfig
from Step1_GFDM import adapter as gfdm_adapter
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.data import LatentMixture, LatentSet, open_sets, read_episodes
from Step1_GFDM.model import GFDM
from Step2_GIDM import adapter as gidm_adapter
from Step2_GIDM.data.build import build_pairs
from Step2_GIDM.data.images import Augmentation, Draw
from Step2_GIDM.data.pairs import PairDataset, later
from Step2_GIDM.model import GIDM, GIDMConfig
from Step3_DeFI import adapter as policy_adapter
from Step3_DeFI.acting import Policy
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.observation import to_unit
from Step3_DeFI.policy import DeFI
from Step3_DeFI.prepare import prepare
from Step3_DeFI.samples import PolicySamples
from Step3_DeFI.store import build_samples, open_sources

pytestmark = pytest.mark.filterwarnings("ignore:.*(are left out|too few episodes):UserWarning")
SIGMAS = 4  # that shares may differ by: dozens of them are compared


def composed(command: str, *settings: str) -> DictConfig:
    """What a user gets from a command with `preset=released`."""
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = compose(command, ["preset=released", *settings])
    OmegaConf.resolve(cfg)
    return cfg


@pytest.fixture(scope="module")
def recorded(reference: Path) -> Callable[[str], dict[str, Any]]:
    """Reads one of the recordings."""

    @lru_cache
    def read(name: str) -> dict[str, Any]:
        file = reference / "pipelines" / name
        if not file.is_file():
            pytest.skip(f"no recording at {file}")
        if file.suffix == ".json":
            return json.loads(file.read_text())
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)

    return read


def some(found: list, what: str) -> list:
    """What was found; skips where that is nothing."""
    return found or pytest.skip(f"{what}: not there")


# ------------------------------------------------------------ stage 1: clips


# The made-up folder's latents say where they come from: channels 0 and 3 hold the frame's number, 1 the
# camera, 2 the episode.

DRAWS = 1000  # of a mixture
# Kinds that the published code knows besides those of its mixture, as settings.
OTHERS = {
    "cloth": {"stride": 5, "every": 5, "cameras": [1.0]},
    "xhand": {"stride": 2, "every": 2, "cameras": [0.75, 0.25]},
    "xbot": {"stride": 2, "every": 2, "cameras": [0.5, 0.25, 0.25]},
}


class Recording:
    """What was recorded, and our clips of the same folder, cut as preset=released does it."""

    def __init__(self, root: Path, said: dict[str, Any]) -> None:
        self.root, self.said = root, said
        cfg = composed("step1_train", "data=latents_paper", f"data.root='{root}'", "output=none")
        self.model = GFDMConfig.from_preset(cfg)
        self.published = OmegaConf.to_container(cfg.data.sets)

    def parts(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Each data set and split that is there, and what it yields."""
        sets = self.said["data_sets"].items()
        found = [(name, split, clips) for name, parts in sets for split, clips in parts.items()]
        there = [each for each in found if (self.root / each[0]).is_dir() and each[2]["samples_total"]]
        return some(there, f"data sets of stage 1 at {self.root}")

    def settings(self, name: str) -> dict[str, Any]:
        """Of a data set, by its kind, which its name tells; what has none is cut as CALVIN, one camera."""
        kinds = {**self.published, **OTHERS, "": {"cameras": [1.0]}}
        section = next(section for kind, section in kinds.items() if kind in name)
        return {**section, "root": str(self.root / name)}

    def open(self, sets: dict[str, dict[str, Any]], split: str) -> LatentMixture:
        return LatentMixture(open_sets({"sets": sets}, self.model, split).values())


@pytest.fixture(scope="module")
def recording(reference: Path, recorded: Callable[[str], dict[str, Any]]) -> Recording:
    return Recording(reference / "pipelines" / "vpp_layout", recorded("stage1.json"))


def seen(sample: dict[str, Any]) -> tuple[int, int, list[int], str]:
    """Episode, camera, frames and text of a sample, read off its latents."""
    numbers = sample["latents"][:, :, 0, 0].int().numpy()
    assert (sample["latents"][:, :, :1, :1] == sample["latents"]).all()
    (episode,), (camera,) = np.unique(numbers[:, 2]), np.unique(numbers[:, 1])
    assert (numbers[:, 0] == numbers[:, 3]).all()
    return int(episode), int(camera), numbers[:, 0].tolist(), sample["text"]


def test_pipelines_stage1_every_sample_of_every_data_set(recording: Recording) -> None:
    """From each camera that has a share; exactly, in number and frames."""
    for name, split, expected in recording.parts():
        section = recording.settings(name)
        cameras = len(section["cameras"])
        for camera in range(cameras):
            alone = section | {"cameras": [float(camera == other) for other in range(cameras)]}
            data = recording.open({name: alone}, split)
            assert len(data) == expected["samples_total"], (name, split)
            found = [seen(data.sample(i, np.random.default_rng(i))) for i in range(len(data))]
            assert {look for _, look, _, _ in found} == {camera}
            windows = section.get("clips") != "spread"
            rows = sorted([episode, n[0] if windows else None, n] for episode, _, n, _ in found)
            assert rows == sorted(expected["samples"]), (name, split, camera)


def test_pipelines_stage1_lengths_and_texts(recording: Recording) -> None:
    """`state` before `video_length`, the first of several texts, unchanged; videos too long are left out."""
    for name, split, expected in recording.parts():
        lengths = {str(each["episode"]): each["frames"] for each in expected["episodes"]}
        assert {e.id: e.frames for e in read_episodes(recording.root / name, split)} == lengths
        files = [recording.root / each["file"] for each in expected["episodes"]]
        texts = {int((a := json.loads(f.read_text()))["episode_id"]): a["texts"][0] for f in files}
        data = recording.open({name: recording.settings(name)}, split)
        found = [seen(data.sample(i, np.random.default_rng(i))) for i in range(len(data))]
        assert all(text == texts[episode] for episode, _, _, text in found)
        kept = {each["episode"] for each in expected["episodes"] if each["samples"]}
        assert {episode for episode, *_ in found} == kept


def test_pipelines_stage1_mixtures(recording: Recording) -> None:
    """Their length, which sample an item takes, and the shares of sets and cameras."""
    mixtures = [(mixture.split("+"), splits) for mixture, splits in recording.said["mixtures"].items()]
    there = [each for each in mixtures if all((recording.root / name).is_dir() for name in each[0])]
    for names, splits in some(there, f"mixtures of stage 1 at {recording.root}"):
        for split, expected in splits.items():
            sets = {name: recording.settings(name) for name in names}
            if set(names) == set(recording.published):
                assert [sets[name]["weight"] for name in names] == expected["prob"]
            for name, weight in zip(names, expected["prob"]):
                sets[name]["weight"] = weight
            data = recording.open(sets, split)
            assert [len(clips) for clips in data.sets] == expected["samples_num"]
            assert len(data) == expected["len"]
            check_draws(data, dict(zip(names, data.sets)), expected)


def check_draws(data: LatentMixture, sets: dict[str, LatentSet], expected: dict[str, Any]) -> None:
    """Samples as training draws them: each is its set's sample of the same number, counted round."""
    drawn: list[str] = []
    for name, clips in sets.items():
        clips.clip = noted(drawn, name, clips.clip)
    draws, counts = SeededDataset(data, 0, tolerant=False), Counter()
    for number in range(DRAWS):
        epoch, index = divmod(number, len(data))
        number_of_episode, camera, frames, _ = seen(draws[epoch, index])
        chosen = sets[drawn[-1]]
        episode, start = chosen.locate(index % len(chosen))
        assert str(number_of_episode) == episode.id
        assert frames == chosen.indices(episode, start).tolist()
        counts[f"{drawn[-1]}/{camera}"] += 1
    recorded = Counter(expected["draws_by_set_and_camera"])
    for key in counts.keys() | recorded.keys():
        totals = np.array([DRAWS, recorded.total()])
        found = np.array([counts[key], recorded[key]])
        share = found.sum() / totals.sum()
        sigma = np.sqrt(share * (1 - share) * (1 / totals).sum())
        assert abs(np.subtract(*(found / totals))) <= SIGMAS * sigma, (key, found, totals)


def noted(drawn: list[str], name: str, clip: Callable[..., Any]) -> Callable[..., Any]:
    """`clip`, which from now on leaves the name of its data set."""

    def note(*given: Any) -> Any:
        drawn.append(name)
        return clip(*given)

    return note


# ------------------------------------------------------------ stage 2: pairs


Recorded = dict[str, dict[str, Any]]
Arrays = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    """configs/data/pairs_oxe.yaml as the commands read it."""
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        return OmegaConf.to_container(compose("data/pairs_oxe"))["data"]


@pytest.fixture(scope="module")
def stage2(recorded: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return recorded("stage2.json")


@pytest.fixture(scope="module")
def pictures(recorded: Callable[[str], dict[str, Any]]) -> Arrays:
    return recorded("stage2_arrays.npz")


@pytest.fixture(scope="module")
def sets(stage2: dict[str, Any], root: Path) -> Recorded:
    """What was recorded of each data set that is there."""
    there = {name: found for name, found in stage2["data_sets"].items() if (root / name).is_dir()}
    return there or pytest.skip(f"no recorded data set at {root}")


@pytest.fixture(scope="module")
def root(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all data sets that were recorded."""
    together = tmp_path_factory.mktemp("rlds")
    for place in (reference / "rlds", reference / "pipelines" / "rlds_made"):
        for folder in place.glob("*/"):
            (together / folder.name).symlink_to(folder, target_is_directory=True)
    return together


@pytest.fixture(scope="module")
def mixture(table: dict[str, Any], root: Path):
    """The section of a mixture of some sets, with settings of each changed."""

    def section(weights: Mapping[str, float], **changes: Any) -> dict[str, Any]:
        sets = {name: table["sets"][name] | changes for name in weights}
        given = {"root": str(root), "index": str(root / "index"), "mixture": "own"}
        return table | given | {"mixtures": {"own": dict(weights)}, "sets": sets}

    return section


def parts(sets: Recorded) -> list[tuple[str, bool, int, dict[str, Any]]]:
    """Every data set's part, whether it is held out, with every window that was recorded."""
    return [
        (name, part == "held_out", int(window), found)
        for name, data in sets.items()
        for part, split in data["parts"].items()
        for window, found in split.get("windows", {}).items()
    ]


def opened(section: dict[str, Any], name: str, side: int, *, held_out: bool = False) -> PairDataset:
    """One data set of a mixture, without augmentation."""
    pairs = build_pairs(section, side, "held_out") if held_out else build_pairs(section, side, augment=False)
    return pairs.sets[name]


def test_pipelines_stage2_pairs_and_texts(sets: Recorded, mixture) -> None:
    for name, held_out, window, found in parts(sets):
        section = mixture({name: 1.0}, distance=[window - 1] * 2)
        data = opened(section, name, 28, held_out=held_out)
        assert len(data) == found["pairs"]
        mine: dict[int, list[tuple[list[int], str]]] = {}
        for index in range(len(data)):
            clip, _, now = data.locate(index)
            pair = [data.data.trim[0] + position for position in (now, later(clip, now, window - 1))]
            mine.setdefault(int(clip.name) - data.data.data.first, []).append((pair, clip.text(now)))
        assert list(mine) == [episode["episode"] for episode in found["episodes"]]
        assert data.data.dropped == len(found["dropped"]) and not set(mine) & set(found["dropped"])
        for episode in found["episodes"]:
            pairs, texts = zip(*mine[episode["episode"]])
            assert list(pairs) == episode["pairs"], (name, window, episode["episode"])
            assert set(texts) == set(episode["stored_text"])
            said = dict(zip(episode["stored_text"], episode["text"]))
            expected = episode["text_of_pair"] or [said[texts[0]]] * len(texts)
            assert [said[text] for text in texts] == expected


def test_pipelines_stage2_samples_show_the_frames_of_their_pair(sets: Recorded, mixture) -> None:
    for name, held_out, window, found in parts(sets):
        data = opened(mixture({name: 1.0}, distance=[window - 1] * 2), name, 28, held_out=held_out)
        first = 0
        for episode in found["episodes"]:
            for place in {0, len(episode["pairs"]) // 2, len(episode["pairs"]) - 1}:
                now, then = episode["pairs"][place]
                source, picture = data.data.data, data.data.data.picture(data.cameras[0])
                expected = source.frames(episode["episode"], [now, then], picture)
                clip, camera, at = data.locate(first + place)
                shown = data.read(clip, camera, [at, later(clip, at, window - 1)])
                assert np.array_equal(shown.permute(0, 2, 3, 1).numpy(), expected)
            sample = data.sample(first, np.random.default_rng(0))
            assert sample["text"] in episode["stored_text"]
            first += len(episode["pairs"])


def test_pipelines_stage2_settings_of_the_table(stage2: dict[str, Any], table: dict[str, Any]) -> None:
    """Windows of W frames, as the release's lists give them: distances of W - 1."""
    for name, data in stage2["data_sets"].items():
        windows = data["windows_that_can_be_drawn"]
        assert table["sets"][name]["cameras"] == [data["image_key"]]
        assert table["sets"][name]["distance"] == [min(windows) - 1, max(windows) - 1]


def test_pipelines_stage2_sets_too_small_to_hold_out(sets: Recorded, mixture) -> None:
    """The release fails on them; here they train on the same pairs, and what is held out is said."""
    for name, data in sets.items():
        if "raises" not in data["parts"].get("held_out", {}):
            continue
        with pytest.warns(UserWarning, match=f"{name}: too few episodes to hold any out"):
            held_out = build_pairs(mixture({name: 1.0}), 28, "held_out")
        assert len(held_out) == len(opened(mixture({name: 1.0}), name, 28))


def test_pipelines_stage2_sizes_and_shares(stage2: dict[str, Any], sets: Recorded, mixture) -> None:
    for name, data in sets.items():
        assert len(build_pairs(mixture({name: 1.0}), 28)) == data["num_transitions"]
    for name, run in stage2["whole_run"].items():
        if name not in sets:
            continue
        _, *shape, side = run["videos_shape"]
        pairs = build_pairs(mixture({name: 1.0}), side)
        sample = pairs.sample(len(pairs) // 2, np.random.default_rng(0))["frames"]
        assert list(sample.shape) == [*shape, side] and str(sample.dtype) == run["dtype"]
        levels = sample * 255
        assert sample.min() >= 0 and sample.max() <= 1 and (levels - levels.round()).abs().max() < 1e-3
        assert len(pairs) == run["len"]


def test_pipelines_stage2_mixture(stage2: dict[str, Any], sets: Recorded, mixture) -> None:
    run = stage2["mixture_run"]
    weights = dict(run["mixture"])
    if not weights.keys() <= sets.keys():
        pytest.skip(f"of the mixture {', '.join(weights)} only {', '.join(sets)} are there")
    pairs = build_pairs(mixture(weights), 28)
    assert abs(len(pairs) - run["dataset_length"]) <= len(weights)
    shares = pairs.shares()
    for name, expected in zip(weights, run["sample_weights"]):
        assert shares[name] == pytest.approx(expected, abs=1 / len(pairs))
    total = sum(run["drawn_of_1500"].values())
    for name, drawn in run["drawn_of_1500"].items():
        assert abs(drawn - total * shares[name]) < SIGMAS * (total * shares[name]) ** 0.5


def test_pipelines_stage2_resized_pictures(pictures: Arrays, sets: Recorded, mixture) -> None:
    """To a level where nothing is lost in coding.

    TensorFlow decodes JPEG by a faster, coarser transform (1.2 levels in the mean, 16 at most on these; with
    that decoder the pictures are equal); what the filter adds must be less than a bilinear one would.
    """
    keys = [key for key in pictures if key.startswith("resized|") and key.split("|")[1] in sets]
    ours, others = [], []
    for key in some(keys, "resized pictures of stage 2"):
        _, name, split, episode, step = key.split("|")
        expected = torch.from_numpy(pictures[key]).permute(2, 0, 1).float()
        side = expected.shape[-1]
        section = mixture({name: 1.0}, split=split, trim=[0, 0], drop_unlabelled=False)
        data = opened(section, name, side)
        source, camera = data.data.data, data.cameras[0]
        index = int(source.lengths[: int(episode)].sum()) + int(step)
        found = data.sample(index, np.random.default_rng(0))["frames"][0] * 255
        difference = (found - expected).abs()
        (coded,) = source.encoded(int(episode), [int(step)], source.picture(camera))
        if coded[:2] != b"\xff\xd8":
            assert difference.max() < 1.001, key
            continue
        assert difference.mean() < 2, key
        bilinear = TF.resize(
            data.read(data.locate(index)[0], camera, [int(step)])[0], [side, side], antialias=True
        )
        ours.append(difference.mean().item())
        others.append((bilinear - expected).abs().mean().item())
    assert sum(ours) < sum(others) or not ours


def test_pipelines_stage2_augmentation(
    stage2: dict[str, Any], pictures: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorded parameters in place of a draw, on the way that every sample takes; both frames alike."""
    if "augmented_source" not in pictures:
        pytest.skip("no augmented pictures")
    picture = pictures["augmented_source"]

    still = MadeData([2], lambda episode, positions: np.stack([picture for _ in positions]))
    side, one = len(picture), Augmentation()
    data = PairDataset(still, still.cameras, image_size=side, distance=(1, 1), augmentation=one)
    for number, given in enumerate(stage2["augmentation_examples"]):
        names = {"brightness": "brightness_delta", "hue": "hue_delta"}
        names |= {"contrast": "contrast_factor", "saturation": "saturation_factor"}
        draw = Draw(**given["crop"], **{mine: given[theirs] for mine, theirs in names.items()})
        monkeypatch.setattr(Augmentation, "draw", lambda self, rng, draw=draw: draw)
        frames = data.sample(0, np.random.default_rng(0))["frames"] * 255
        expected = torch.from_numpy(pictures[f"augmented|{number}"]).permute(2, 0, 1)
        difference = (frames - expected).abs()
        assert difference.max() < 1.001
        assert (difference > 0.5).float().mean() < 1e-3


# ------------------------------------------------------------ stage 3: samples


@pytest.fixture(scope="module")
def settings_of_policy() -> DeFI:
    """Only its settings are looked at."""
    with torch.device("meta"):
        return policy_adapter.build(compose_preset("released"))


@pytest.fixture(scope="module")
def stage3(recorded: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return recorded("stage3.json")


@pytest.fixture(scope="module")
def looks(recorded: Callable[[str], dict[str, Any]]) -> Arrays:
    return recorded("stage3_arrays.npz")


@pytest.fixture(scope="module", params=["training", "validation"])
def split(request: pytest.FixtureRequest, stage3: dict[str, Any], reference: Path) -> str:
    """Its name: recorded, and there to be read."""
    if request.param not in stage3["splits"]:
        pytest.skip(f"nothing recorded of {request.param}")
    if not (reference / "calvin_mini" / request.param).is_dir():
        pytest.skip(f"no {reference}/calvin_mini/{request.param}")
    return request.param


@pytest.fixture(scope="module", params=["root", "store"])
def samples(
    request: pytest.FixtureRequest,
    split: str,
    reference: Path,
    settings_of_policy: DeFI,
    tmp_path_factory: pytest.TempPathFactory,
) -> PolicySamples:
    """As training opens them, with the settings of the preset."""
    source = [f"data.root='{reference}/calvin_mini'", f"data.split={split}"]
    if request.param == "store":
        output = tmp_path_factory.mktemp("store") / split
        prepare(composed("step3_prepare", *source, "store.kind=images", f"output='{output}'"))
        source = [f"data.store='{output}'"]
    cfg = composed("step3_train", "output=unused", *source)
    return build_samples(open_sources(cfg.data, "training"), settings_of_policy)


def test_pipelines_stage3_samples_texts_and_actions(
    samples: PolicySamples, split: str, stage3: dict[str, Any], looks: Arrays
) -> None:
    found, rows = stage3["splits"][split], stage3["splits"][split]["rows"]
    assert len(samples) == found["samples"] and len(rows) == found["recorded"]
    actions = looks[f"{split}_actions"]
    for (number, _, annotation, _), expected in zip(rows, actions, strict=True):
        sample = samples[number]
        assert sample["text"] == found["annotation_texts"][annotation]
        assert sample["actions"].dtype == torch.float32
        np.testing.assert_array_equal(sample["actions"], expected)


def test_pipelines_stage3_rows(
    samples: PolicySamples, split: str, stage3: dict[str, Any], reference: Path
) -> None:
    """Which annotation and which frame a sample is of."""
    store = getattr(samples, "folder", None)
    starts = samples.starts if store is None else np.load(store / "starts.npy")
    data = open_dataset({"format": "calvin", "root": str(reference / "calvin_mini"), "split": split})
    for number, start, annotation, frame in stage3["splits"][split]["rows"]:
        episode = data.episode(starts[number, 0])  # named by its annotation
        assert [int(episode.name), episode.start + starts[number, 1]] == [annotation, start]
        assert start == frame


def test_pipelines_stage3_pictures(samples: PolicySamples, split: str, looks: Arrays) -> None:
    """The recorded levels exactly, and what the networks see of them."""
    numbers = {int(name.split("_")[1]) for name in looks if name.startswith(split) and "rgb" in name}
    if not numbers:
        pytest.skip(f"no pictures recorded of {split}")
    for number in sorted(numbers):
        images = samples[number]["images"]
        for view, camera in enumerate(CAMERAS.values()):
            expected = looks[f"{split}_{number}_{camera}"].astype(np.float32)
            np.testing.assert_array_equal(images[view], np.round((expected * 0.5 + 0.5) * 255))
            np.testing.assert_allclose(to_unit(images)[view], expected, atol=2**-11)


def test_pipelines_stage3_batch(samples: PolicySamples, stage3: dict[str, Any]) -> None:
    published = stage3["batch"]
    static, gripper = (published["rgb_obs"][camera] for camera in CAMERAS.values())
    size = published["actions"][0]
    if len(samples) < size:
        pytest.skip(f"{len(samples)} samples are no batch of {size}")
    batch = next(iter(DataLoader(samples, batch_size=size)))
    assert list(batch["actions"].shape) == published["actions"]
    assert [size, 1, *batch["images"].shape[2:]] == static == gripper
    assert batch["images"].shape[1] == len(CAMERAS) and len(batch["text"]) == size


# ------------------------------------------------------------ texts, as they reach the towers


SMALL = {
    "text.clip": "{width: 32, layers: 1, heads: 2, projection: 32}",
    "text.t5": "{width: 32, layers: 1, heads: 2}",
    "gfdm": "{frames: 6, image_size: 16}",
    "gfdm.unet": "{block_out_channels: [32, 32, 32, 32], num_attention_heads: [1, 1, 1, 1]}",
    "gfdm.unet.layers_per_block": "1",
    "gfdm.vae": "{block_out_channels: [32, 32], layers_per_block: 1}",
    "gidm": "{width: 32, encoder_blocks: 1, decoder_blocks: 1, heads: 2}",
    "gidm.dino": "{image_size: 28, width: 32, layers: 1, heads: 2}",
    "policy.video_former": "{dim: 32, depth: 1}",
    "policy.action_head": "{dim: 32, encoder_layers: 1, decoder_layers: 1}",
}


@pytest.fixture(scope="module")
def small() -> DictConfig:
    """The preset `released` at tiny widths."""
    return compose_preset("released", *(f"{key}={value}" for key, value in SMALL.items()))


@pytest.fixture(scope="module")
def said(recorded: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return recorded("text.json")


class Spy:
    """A tokenizer that keeps what it is given and what it makes of it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.given, self.made = tokenizer, [], []

    def __call__(self, texts: list[str] | str, **how: Any) -> Any:
        found = self.tokenizer(texts, **how)
        if not isinstance(texts, str):  # else it is only counted
            self.given += texts
            self.made.append(found)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def spied(tower: nn.Module, act: Callable[[], Any]) -> Spy:
    """What the tower's tokenizer sees while `act` runs; nothing is remembered from before."""
    tokenizer = tower.tokenizer
    tower._cache.clear()
    tower.tokenizer = Spy(tokenizer)
    try:
        act()
        return tower.tokenizer
    finally:
        tower.tokenizer = tokenizer


@pytest.fixture(scope="module")
def gfdm(small: DictConfig) -> GFDM:
    return gfdm_adapter.build(small)


@pytest.fixture(scope="module")
def gidm(small: DictConfig) -> GIDM:
    return gidm_adapter.build(small)


@pytest.fixture(scope="module")
def policy(small: DictConfig) -> DeFI:
    return policy_adapter.build(small)


def test_pipelines_text_of_stage_1(gfdm: GFDM, said: dict[str, Any]) -> None:
    for entry in said["texts"]:
        published = entry["stage1_clip"]
        spy = spied(gfdm.clip, lambda text=entry["text"]: gfdm.encode_text([text]))
        assert set(spy.given) == {published["string"]}
        assert gfdm.encode_text([entry["text"]]).shape[1] == published["length"]
        _check_padding(spy.made[0], gfdm.clip, published["length"])


def _check_padding(made: Any, clip: CLIPText, length: int) -> None:
    """On the right, with the end mark, which the mask covers."""
    ids, mask = made["input_ids"][0], made["attention_mask"][0]
    used = int(mask.sum())
    assert len(ids) == length and mask[:used].all()
    assert ids[0] == clip.tokenizer.bos_token_id and (ids[used - 1 :] == clip.tokenizer.eos_token_id).all()


def test_pipelines_text_of_stage_2(gidm: GIDM, said: dict[str, Any]) -> None:
    for entry in said["texts"]:
        spy = spied(gidm.text, lambda text=entry["text"]: gidm.language([text]))
        assert spy.given == [entry["stage2_t5"]["string"]]


def test_pipelines_text_of_stage_3(policy: DeFI, said: dict[str, Any]) -> None:
    """Training's T5, the video model's tokens and the sentence, which is cut at the tower's own limit."""
    for entry in said["texts"]:
        batch = policy.config.fake_batch(1) | {"text": [entry["text"]]}
        spy = spied(policy.t5, lambda batch=batch: policy(batch))
        assert spy.given == [entry["stage3_t5"]["string"]]
        tokens = spied(policy.gfdm.clip, lambda text=entry["text"]: policy.gfdm.encode_text([text]))
        assert set(tokens.given) == {entry["stage3_clip"]["string"]}
        _check_padding(tokens.made[0], policy.gfdm.clip, entry["stage3_clip"]["length"])
        goal = spied(policy.gfdm.clip, lambda batch=batch: policy(batch))
        if "string" in entry["stage3_goal_clip"]:  # else too long for the published code
            assert set(goal.given) == {entry["stage3_goal_clip"]["string"]}
            whole = len(policy.gfdm.clip.tokenizer(entry["text"])["input_ids"])
            mask = torch.as_tensor(goal.made[-1]["attention_mask"])
            assert int(mask.sum()) == min(whole, policy.gfdm.clip.longest)


def test_pipelines_text_of_a_rollout(policy: DeFI, said: dict[str, Any]) -> None:
    """The towers are given what training gives them."""
    images = {camera: np.zeros((16, 16, 3), np.uint8) for camera in CAMERAS}
    acting = Policy(policy)
    for entry in said["texts"]:
        assert entry["rollout"]["clip_ids_equal_training"] and entry["rollout"]["t5_string_equal_training"]

        def act(text: str = entry["text"]) -> None:
            acting.infer({"images": images, "instruction": text})

        assert spied(policy.t5, act).given == [entry["stage3_t5"]["string"]]
        assert set(spied(policy.gfdm.clip, act).given) == {entry["stage3_clip"]["string"]}


def test_pipelines_text_length_for_t5(policy: DeFI, said: dict[str, Any]) -> None:
    """Never cut, padded on the right to the batch's longest."""
    texts = [entry["stage3_t5"]["string"] for entry in said["texts"]]
    lengths = [len(policy.t5.tokenizer(text, verbose=False)["input_ids"]) for text in texts]
    states, mask = policy.t5(texts)
    assert said["t5_padding"]["side"] == "right"
    assert states.shape[1] == max(lengths) and mask.sum(1).tolist() == lengths
    for row, length in zip(mask, lengths):
        assert row[:length].all()


@pytest.fixture(scope="module")
def published_clip() -> CLIPText:
    """CLIP's own tokenizer, on a tower of no matter what weights."""
    folder = CONFIG_DIR.parent / "ckpts" / "clip"
    if not folder.is_dir():
        pytest.skip(f"no CLIP tokenizer at {folder}: python -m defi.download preset=released fetches it")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    sizes = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, projection_dim=32,
        num_hidden_layers=1, num_attention_heads=2, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return CLIPText(CLIPTextModelWithProjection(sizes), tokenizer, TextConfig(tokens=20))


def test_pipelines_text_ids_of_clip(published_clip: CLIPText, said: dict[str, Any]) -> None:
    for entry in said["texts"]:
        spy = spied(published_clip, lambda text=entry["text"]: published_clip.tokens([text]))
        for made, published in ((spy.made[0], "stage1_clip"), (spy.made[-1], "stage3_goal_clip")):
            if "ids" in entry[published]:
                used = int(made["attention_mask"].sum())
                assert made["input_ids"][0, :used].tolist() == entry[published]["ids"]
        assert bool(published_clip.truncation_note([entry["text"]])) == (len(spy.made) == 2)


# ------------------------------------------------------------ settings


# Each fact of `training.json` meets the first check whose stage and name fit. Facts in words are read for
# their numbers and key words. Facts that no setting can hold are `TOLD`: they stand in docs/deviations.md, or
# other tests, named there, run them. A fact that is known to neither is skipped with its name.

FOLDER = Path(
    os.environ.get("DEFI_REFERENCE_DIR", Path(__file__).resolve().parents[3] / "shared" / "reference")
)
FILE = FOLDER / "pipelines" / "training.json"
FACTS = json.loads(FILE.read_text())["facts"] if FILE.is_file() else []
MODELS = {1: GFDMConfig, 2: GIDMConfig, 3: PolicyConfig}
CALVIN_SAMPLES = 696_473  # of stage 3 on CALVIN's ABC
NUMBER = re.compile(r"(?<!\w)(?<!\d\.)-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


def recipe(stage: int) -> SimpleNamespace:
    """What a user gets who trains this stage with `preset=released`."""
    cfg = composed(f"step{stage}_train", "output=none")
    trainer, model = TrainerConfig.from_config(cfg.trainer), MODELS[stage].from_preset(cfg)
    return SimpleNamespace(stage=stage, cfg=cfg, trainer=trainer, model=model)


def numbers(value: Any) -> list[float]:
    """Those in a fact, in order."""
    return [float(found.replace(",", "")) for found in NUMBER.findall(str(value))]


def labelled(value: Any, label: str) -> float | None:
    """The first number behind a word, if there is one."""
    return next(iter(numbers(str(value).partition(label)[2])), None)


def processes(r: SimpleNamespace) -> int:
    return r.trainer.global_batch // r.trainer.micro_batch


# of every stage


def batch_per_process(r: SimpleNamespace, value: Any) -> None:
    assert r.trainer.micro_batch in numbers(value)


def number_of_processes(r: SimpleNamespace, value: Any) -> None:
    assert processes(r) == numbers(value)[0]


def effective_batch(r: SimpleNamespace, value: Any) -> None:
    assert r.trainer.global_batch == numbers(value)[0]


def accumulation(r: SimpleNamespace, value: Any) -> None:
    """As many GPUs as published take a global batch at once."""
    assert r.trainer.split_batch(processes(r)) == (r.trainer.micro_batch, numbers(value)[0])


def optimizer(r: SimpleNamespace, value: Any) -> None:
    text = str(value)
    assert "AdamW" in text
    layer = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2))
    layer.trainable = layer.named_parameters
    processes = SimpleNamespace(device=SimpleNamespace(type="cpu"), prepare_optimizer=lambda made: made)
    ours = build_optimizer(layer, r.trainer, processes)
    (group,) = ours.param_groups  # the decay is of all parameters
    assert type(ours).__name__ == "AdamW" and len(group["params"]) == 4
    assert group["lr"] == labelled(text, "lr" if "lr" in text else "AdamW")
    for key, word in (("eps", "eps"), ("weight_decay", "decay")):
        assert labelled(text, word) in (None, group[key])
    if "betas" in text:
        assert list(group["betas"]) == numbers(text.partition("betas")[2])[:2]


def constant_rate(r: SimpleNamespace, value: Any) -> None:
    assert re.search(r"none|constant", str(value))
    assert r.trainer.schedule == "constant" and r.trainer.warmup == 0


def gradient_clip(r: SimpleNamespace, value: Any) -> None:
    found = numbers(value) if value is not None and "none" not in str(value).lower() else [None]
    assert r.trainer.clip == found[0]


def no_averages(r: SimpleNamespace, value: Any) -> None:
    """Nothing published saves or uses averaged weights."""
    assert value is None or re.search(r"none|no |not|never|unused", str(value))
    assert r.trainer.ema is None


def precision(r: SimpleNamespace, value: Any) -> None:
    text = str(value)
    if r.stage < 3:
        assert re.search(r"fp16|16-mixed", text) and r.trainer.precision == "fp16"
        return
    assert re.search(r"UNet, VAE\) fp16; the rest float32", text)
    assert (r.trainer.precision, r.model.gfdm_precision) == ("no", "fp16")
    assert f"matmul precision {r.trainer.matmul}" in text


def seed(r: SimpleNamespace, value: Any) -> None:
    """A stage that sets none may take any."""
    if value is not None and not re.search(r"\b(none|no|not|nothing|never|unused)\b", str(value)):
        assert r.cfg.seed in numbers(value)


def gradient_checkpointing(r: SimpleNamespace, value: Any) -> None:
    assert "UNet" in value and r.model.gradient_checkpointing


# of single stages


def steps(r: SimpleNamespace, value: Any) -> None:
    """Of the whole run; of an epoch where the publication counts in epochs."""
    if r.trainer.epochs is None:
        assert r.trainer.max_steps in numbers(value)
        return
    per_epoch = math.ceil(r.trainer.passes * CALVIN_SAMPLES / r.trainer.global_batch)
    total = r.trainer.for_samples(CALVIN_SAMPLES).max_steps
    assert total == r.trainer.epochs * per_epoch
    large = {number for number in numbers(value) if number > 1000}
    if r.stage == 3 and large:  # told exactly, or rounded to hundreds
        assert {per_epoch, total, total // 100 * 100, CALVIN_SAMPLES} & large


def epochs(r: SimpleNamespace, value: Any) -> None:
    assert r.trainer.max_steps is None and r.trainer.epochs == numbers(value)[0]


def video_modes(r: SimpleNamespace, value: Any) -> None:
    """Every part of GFDM but the UNet stays in eval mode; nothing in it drops anything."""
    assert re.search(r"UNet train\(\), VAE and CLIP image tower eval\(\)", value)
    assert "no dropout above 0" in value


def policy_modes(r: SimpleNamespace, value: Any) -> None:
    assert r.model.t5_dropout == ("dropout 0.1 ON" in value)
    head = r.model.action_head
    for word, rate in (
        ("attention", head.attention_dropout),
        ("residual", head.residual_dropout),
        ("mlp", head.mlp_dropout),
        ("goal_drop", r.model.diffusion.text_dropout),
    ):
        assert rate == labelled(value.partition("Action head")[2], word)


def text_dropout(r: SimpleNamespace, value: Any) -> None:
    assert r.model.diffusion.text_dropout == numbers(value)[0] / 100


def time_ids(r: SimpleNamespace, value: Any) -> None:
    edm = r.model.diffusion
    assert [edm.fps, edm.motion_bucket] == [labelled(value, word) for word in ("fps", "motion")]


def noise_levels(r: SimpleNamespace, value: Any) -> None:
    edm = r.model.diffusion
    wanted = (
        (edm.sigma_mean, edm.sigma_std) if r.stage == 1 else (edm.density_scale, edm.sigma_min, edm.sigma_max)
    )
    assert set(wanted) <= set(numbers(value))


def codebook_restart(r: SimpleNamespace, value: Any) -> None:
    """Stage 2: at the end of every epoch, from other codes; stage 3: never."""
    if r.stage == 3:
        assert not r.model.restart_codes
        return
    assert "end of every epoch" in value
    assert r.model.restart_pairs is None and r.model.restart_from == "codes"


def gidm_loss(r: SimpleNamespace, value: Any) -> None:
    assert value.replace(" ", "").startswith(f"mse+(sg[emb]-z)^2+{r.model.commitment}(emb-sg[z])^2")


def policy_loss(r: SimpleNamespace, value: Any) -> None:
    assert [r.model.codebook_weight, r.model.commitment_weight] == [
        labelled(value, "+"),
        labelled(value, "^2 +"),
    ]


def every_epoch_is_kept(r: SimpleNamespace, value: Any) -> None:
    """The published evaluation runs all of them."""
    assert "after every epoch" in value
    assert r.trainer.save_every == math.ceil(CALVIN_SAMPLES / r.trainer.global_batch)
    assert r.trainer.keep == r.trainer.epochs


def initial_weights(r: SimpleNamespace, value: Any) -> None:
    if r.stage == 2:
        assert r.model.initial == "default"
    if r.stage == 3:
        assert not r.model.action_head.identity_modulation


def windows(r: SimpleNamespace, value: Any) -> None:
    """Windows of W frames, as the release's lists give them: distances of W - 1."""
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        table = compose("data/pairs_oxe").data.sets
    known = value.keys() & table.keys()
    assert known, "the release's lists and the table have sets in common"
    for name in known:
        assert list(table[name].distance) == [frames - 1 for frames in value[name]], name


def cross_attention(r: SimpleNamespace, value: Any) -> None:
    assert r.model.action_head.cross_attention == "causal"


def feature_time_ids(r: SimpleNamespace, value: Any) -> None:
    features = GFDMConfig.from_preset(compose_preset("released")).features
    assert [features.fps, features.motion_bucket] == [labelled(value, word) for word in ("fps", "motion")]


CHECKS: list[tuple[str, str, Callable[[SimpleNamespace, Any], None]]] = [  # stages, name of the fact, check
    ("123", "batch per process|batch size.*|micro.?batch", batch_per_process),
    ("123", "processes|gpus|devices", number_of_processes),
    ("123", "effective batch|global batch|total batch.*", effective_batch),
    ("123", "(gradient )?accumulation.*", accumulation),
    ("123", "optimi[sz]er", optimizer),
    ("123", "schedule|lr schedule|scheduler", constant_rate),
    ("123", "(gradient )?clip(ping)?", gradient_clip),
    ("123", "ema", no_averages),
    ("123", "(mixed )?precision", precision),
    ("123", "seed", seed),
    ("1", "gradient checkpointing", gradient_checkpointing),
    ("1", "steps|max(imum)? steps", steps),
    ("23", "steps.*", steps),
    ("23", "epochs", epochs),
    ("1", "modes", video_modes),
    ("3", "modes", policy_modes),
    ("1", "(text|caption) drop(out)?", text_dropout),
    ("1", "time ids", time_ids),
    ("3", "time ids", feature_time_ids),
    ("13", "sigmas?|noise levels?|sigma (distribution|density)", noise_levels),
    ("23", "(codebook|code) restarts?", codebook_restart),
    ("2", "loss", gidm_loss),
    ("3", "loss", policy_loss),
    ("23", "initial weights|initiali[sz]ation", initial_weights),
    ("2", "W that can be drawn.*", windows),
    ("3", "cross.?attention", cross_attention),
    ("3", "checkpoints", every_epoch_is_kept),
]

TOLD = [  # stages, name of the fact, where it is told or run
    ("1", "epochs", "the steps end the run first"),
    ("1", "samples per epoch", "stage 1 above"),
    ("1", "text", "stage 1 and texts above"),
    ("1", "loss", "test_released_step.py"),
    ("2", "(text|texts).*", "stage 2 and texts above"),
    ("3", "(text|texts).*", "stage 3 and texts above"),
    ("12", "checkpoints", "docs/deviations.md: formats of our own, and more often"),
    ("123", "validation.*", "docs/deviations.md: pictures and held-out figures at intervals"),
    ("123", "resume.*", "docs/deviations.md: exact"),
    ("2", "modes", "test_released_step.py: T5 and DINOv2 in eval mode"),
    ("2", "order|shuffl.*", "docs/deviations.md: a shuffle over indices"),
    ("2", "window", "docs/deviations.md: the distance is drawn per pair; stage 2 above"),
    ("2", "windows that seed.*", "docs/deviations.md: its random stream is not imitated"),
    ("2", "steps that a set's transform removes", "stage 2 above"),
    ("2", "(data )?mixture|data.*|augmentation.*|image.*", "stage 2 above"),
    ("1", "(data )?mixture|data.*", "stage 1 above"),
    ("3", "loader|samples.*|data.*", "stage 3 above; test_engine.py fills up the last batch"),
    ("3", "annotations read from", "stage 3 above"),
    ("3", "rollout.*", "docs/deviations.md: noise belongs to (seed, chain, look)"),
]  # fmt: skip


def fits(fact: dict[str, Any], stages: str, name: str) -> bool:
    return str(fact["stage"]) in stages and re.fullmatch(name, fact["fact"], re.IGNORECASE) is not None


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: f"stage {fact['stage']}, {fact['fact']}")
def test_pipelines_recipe(fact: dict[str, Any]) -> None:
    for stages, name, place in TOLD:
        if fits(fact, stages, name):
            pytest.skip(f"told: {place}")
    for stages, name, check in CHECKS:
        if fits(fact, stages, name):
            return check(recipe(fact["stage"]), fact["value"])
    pytest.skip(f"no check for: stage {fact['stage']}, {fact['fact']} = {fact['value']}")


def test_pipelines_recipe_is_recorded(reference: Path) -> None:
    if not FACTS:
        pytest.skip(f"no {FILE}")
    checked = [fact for fact in FACTS if any(fits(fact, stages, name) for stages, name, _ in CHECKS)]
    assert len(checked) > len(FACTS) // 3, "most facts are settings, whatever is left out"
