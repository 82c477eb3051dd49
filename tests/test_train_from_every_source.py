"""Each stage trained from each of its sources, from the user's files to a checkpoint, by its own commands."""

import csv
import importlib
import io
import json
import sys
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from policy_fakes import write_demonstrations

from benchmarks.rlds_writer import write_videos
from defi.config import compose_preset
from defi.engine import checkpoint
from defi.engine.checkpoint import read_manifest
from defi.engine.log import METRICS, read_metrics
from defi.video import write_mp4
from Step1_GFDM import adapter as gfdm_adapter
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.vae import VAEConfig, VideoVAE
from Step2_GIDM import adapter as gidm_adapter

SHORT = ("preset=tiny", "trainer.global_batch=2", "trainer.max_steps=2", "trainer.log_every=1")
SHORT = (*SHORT, "trainer.save_every=0", "trainer.preview_every=0")


def run(module: str, *settings: str) -> None:
    """A command as `python -m` runs it, in this process."""
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(errors):
        patch.setattr(sys, "argv", [module, *settings])
        try:
            importlib.import_module(module).main()
        except SystemExit as end:
            assert not end.code, errors.getvalue()


def trained(stage: str, output: Path) -> None:
    """Assert that a run of two steps is complete."""
    losses = [r["loss"] for r in read_metrics(output / METRICS) if r["kind"] == "train"]
    assert len(losses) == 2 and np.isfinite(losses).all()
    manifest = read_manifest(output, stage)
    assert manifest["step"] == 2 and manifest["preset"] == "tiny"


# ------------------------------------------------------------ what a user has


def shots(folder: Path, *names: str) -> list[str]:
    """Videos of eight frames of noise."""
    for number, name in enumerate(names):
        frames = np.random.default_rng(number).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
        write_mp4(folder / f"{name}.mp4", frames, 10)
    return [f"{name}.mp4" for name in names]


def write_captioned(folder: Path) -> None:
    """A folder of videos with captions as JSON lines and as a table."""
    names = shots(folder, "kitchen/1", "kitchen/2", "3")
    lines = [{"video": name, "text": f"do thing {n}"} for n, name in enumerate(names)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("video", "text"), *((line["video"], line["text"]) for line in lines)])


def write_something(folder: Path) -> None:
    """Something-Something's layout."""
    for name in shots(folder / "clips", "11", "12"):
        (folder / "clips" / name).rename(folder / "clips" / name.replace("mp4", "webm"))
    (folder / "labels").mkdir()
    for split, number in (("train", "11"), ("validation", "12")):
        (folder / "labels" / f"{split}.json").write_text(json.dumps([{"id": number, "label": "pushing it"}]))


def write_vpp(folder: Path) -> None:
    """VPP's layout without latents."""
    for split in ("train", "val"):
        (name,) = shots(folder / "videos" / split / "7", "rgb")
        annotation = {"texts": ["lift"], "videos": [{"video_path": f"videos/{split}/7/{name}"}]}
        (folder / "annotation" / split).mkdir(parents=True)
        (folder / "annotation" / split / "7.json").write_text(json.dumps(annotation | {"state": [[0]] * 8}))


def write_hdf5(folder: Path) -> None:
    """Teleoperation, an episode per file."""
    h5py = pytest.importorskip("h5py")
    folder.mkdir()
    for name in ("one", "two"):
        with h5py.File(folder / f"{name}.hdf5", "w") as file:
            file["observations/images/top"] = np.full((6, 24, 32, 3), 90, np.uint8)


def write_lerobot(folder: Path) -> None:
    """CALVIN's demonstrations in LeRobot's format."""
    pytest.importorskip("pyarrow")
    write_calvin(folder.parent / "converted")
    run("defi.data.convert", "data=calvin", f"data.root={folder.parent / 'converted'}", f"output={folder}")


def write_rlds(folder: Path) -> None:
    write_videos(folder.parent, {"train": [[6, 5]], "val": [[6]]}, name=folder.name)


def write_oxe(folder: Path) -> None:
    """Two data sets of a mixture."""
    for name in ("bridge_orig", "fractal20220817_data"):
        write_videos(folder, {"train": [[7, 6]]}, name=name)


def write_calvin(folder: Path) -> None:
    write_demonstrations(folder)
    write_demonstrations(folder / "more", lengths=(14,), seed=1)
    (folder / "more" / "training").rename(folder / "validation")


def write_own(folder: Path) -> None:
    """Demonstrations on the built-in table."""
    pytest.importorskip("pybullet")
    sizes = ["static_size=32", "gripper_size=24", "demos_per_task=1", "validation.demos_per_task=1"]
    scenes = ["scenes=[A]", "variations=0", "workers=1", "tasks=[open_drawer]"]
    run("defi.sim.collect", f"output={folder}", *sizes, *scenes)


WRITERS: dict[str, Callable[[Path], None]] = {
    "captioned": write_captioned,
    "something": write_something,
    "vpp": write_vpp,
    "hdf5": write_hdf5,
    "lerobot": write_lerobot,
    "toy": write_rlds,
    "oxe": write_oxe,
    "calvin": write_calvin,
    "own": write_own,
}


class Sources:
    """The user's data and the stages' runs in a folder, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data, self.latents, self.weights = map(cache, (self._data, self._latents, self._weights))

    def _data(self, name: str) -> Path:
        place = self.folder / name
        if place.suffix != ".zip":
            WRITERS[name](place)
            return place
        with zipfile.ZipFile(place, "w") as archive:
            for file in sorted(p for p in self.data(place.stem).rglob("*") if p.is_file()):
                archive.write(file, file.relative_to(self.folder))
        return place

    def fill(self, settings: str) -> list[str]:
        """Settings with each `{name}` as the place of that data."""
        words = settings.split(";")
        names = [name for name in (*WRITERS, "calvin.zip") if f"{{{name}}}" in settings]
        for name in names:
            place = str(self.data(name))
            words = [word.replace(f"{{{name}}}", place) for word in words]
        return [word.replace("{index}", str(self.folder / "index")) for word in words]

    def _latents(self, source: str) -> Path:
        """Prepared for stage 1."""
        output = self.folder / f"latents_{list(STAGE1).index(source)}"
        given = [*self.fill(STAGE1[source]), f"vae={self.weights('vae')}", f"output={output}"]
        run("Step1_GFDM.prepare", *given)
        return output

    def _weights(self, stage: str) -> Path:
        """A run of an earlier stage, as it begins."""
        torch.manual_seed(0)
        cfg = compose_preset("tiny")
        if stage == "vae":
            sizes = GFDMConfig.from_preset(cfg)
            model = VideoVAE.from_config(VAEConfig(sizes.image_size, sizes.vae))
        else:
            model = {"gfdm": gfdm_adapter, "gidm": gidm_adapter}[stage].build(cfg)
        checkpoint.save(model, self.folder / stage, step=1, config={"preset_name": "tiny"})
        return self.folder / stage


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("sources"))


# ------------------------------------------------------------ stage 1

STAGE1 = {
    "videos, JSON lines": "data=videos;data.root={captioned};data.captions=captions.jsonl",
    "videos, CSV": "data=videos;data.root={captioned};data.captions=captions.csv",
    "Something-Something": "data=videos;data.root={something};data.videos=clips;data.longest=100;"
    "data.split=labels/train.json;data.held_out=labels/validation.json",
    "VPP's layout": "data=vpp;data.root={vpp}",
    "HDF5": "data=hdf5;data.root={hdf5};data.instruction=fold the towel",
    "RLDS": "data=rlds;data.root={toy};data.index={index};data.fps=5",
    "LeRobot": "data=lerobot;data.root={lerobot}",
    "CALVIN": "data.root={calvin}",
    "CALVIN's zip": "data.root={calvin.zip}",
}


@pytest.mark.parametrize("source", [name for name in STAGE1 if "videos" not in name])
def test_the_autoencoder_of_stage_1(source: str, sources: Sources, tmp_path: Path) -> None:
    """From the pictures alone: captions and rates are not asked for."""
    given = [s for s in sources.fill(STAGE1[source]) if s.split("=")[0] not in ("data.longest", "data.fps")]
    run("Step1_GFDM.train_vae", *given, f"output={tmp_path}", *SHORT)
    trained("vae", tmp_path)


def test_the_autoencoder_of_stage_1_from_a_folder_of_videos(sources: Sources, tmp_path: Path) -> None:
    given = ["data=videos", f"data.root={sources.data('captioned')}", f"output={tmp_path}"]
    run("Step1_GFDM.train_vae", *given, *SHORT)
    trained("vae", tmp_path)


@pytest.mark.parametrize("source", STAGE1)
def test_stage_1(source: str, sources: Sources, tmp_path: Path) -> None:
    given = [f"data.root={sources.latents(source)}", f"vae={sources.weights('vae')}"]
    run("Step1_GFDM.train", *given, f"output={tmp_path}", *SHORT)
    trained("gfdm", tmp_path)


def test_stage_1_from_a_mixture(sources: Sources, tmp_path: Path) -> None:
    sets = {
        "human": f"root: {sources.latents('videos, CSV')}, weight: 0.4, clips: spread, cameras: [1.0]",
        "rlds": f"root: {sources.latents('RLDS')}, weight: 0.2, cameras: [1.0]",
        "calvin": f"root: {sources.latents('CALVIN')}, weight: 0.4",
    }
    given = [f"+data.sets.{name}={{{section}}}" for name, section in sets.items()]
    given += ["~data.sets.demonstrations", "data.root=none", f"vae={sources.weights('vae')}"]
    run("Step1_GFDM.train", *given, f"output={tmp_path}", *SHORT)
    trained("gfdm", tmp_path)


# ------------------------------------------------------------ stage 2

STAGE2 = {
    "a folder of videos": "data=videos;data.root={captioned}",
    "RLDS": "data=rlds;data.root={toy};data.index={index}",
    "Open X-Embodiment": "data=pairs_oxe;data.root={oxe};data.index={index};data.mixture=bridge_rt_1;"
    "data.sets.bridge_orig.cameras=[image]",
    "CALVIN": "data.root={calvin}",
    "CALVIN's zip": "data.root={calvin.zip}",
    "own demonstrations": "data.root={own}",
    "a mixture of all": "data=mixture;+data.sets.mine={format: videos, root: {captioned}, weight: 1};"
    "+data.sets.toy={format: rlds, root: {toy}, index: {index}, weight: 0.5};"
    "+data.sets.calvin={format: calvin, root: {calvin}, weight: 2}",
}


@pytest.mark.parametrize("source", STAGE2)
def test_stage_2(source: str, sources: Sources, tmp_path: Path) -> None:
    run("Step2_GIDM.train", *sources.fill(STAGE2[source]), f"output={tmp_path}", *SHORT)
    trained("gidm", tmp_path)


# ------------------------------------------------------------ stage 3


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        *(("calvin", kind) for kind in ("features", "latents", "images", None)),
        *(("calvin.zip", kind) for kind in ("latents", None)),
        ("own", "features"),
    ],
    ids=lambda value: value or "as it is",
)
def test_stage_3(source: str, kind: str | None, sources: Sources, tmp_path: Path) -> None:
    """From a store of each kind, and from the recordings as they are."""
    root = [f"data.root={sources.data(source)}", "data.min_remaining=9", "data.stride=8"]
    gfdm = f"gfdm_checkpoint={sources.weights('gfdm')}"
    data = root
    if kind is not None:
        store = tmp_path / "store"
        run("Step3_DeFI.prepare", *root, f"store.kind={kind}", gfdm, f"output={store}", "preset=tiny")
        data = [f"data.store={store}"]
    given = [gfdm, f"gidm_checkpoint={sources.weights('gidm')}", f"output={tmp_path / 'run'}", *SHORT]
    run("Step3_DeFI.train", *data, *given)
    trained("policy", tmp_path / "run")
