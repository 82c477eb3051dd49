"""The commands of all stages on the sample data: CALVIN's frames, RLDS written by tensorflow_datasets."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_train_from_every_source import SHORT, Sources, run, trained

from defi.config import CONFIG_DIR
from Step1_GFDM.data import read_episodes

TABLE = yaml.safe_load((CONFIG_DIR / "data" / "pairs_oxe.yaml").read_text())["sets"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Runs of earlier stages, as they begin."""
    return Sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def calvin(reference: Path) -> Path:
    folder = reference / "calvin_mini"
    if not folder.is_dir():
        pytest.skip(f"no sample of CALVIN at {folder}")
    return folder


@pytest.fixture(scope="module")
def rlds(reference: Path) -> dict[str, list[dict]]:
    """Data set -> what its training episodes are."""
    files = sorted((reference / "rlds").glob("*_expected.json"))
    if not files:
        pytest.skip(f"no samples of RLDS under {reference / 'rlds'}")
    return {f.name.removesuffix("_expected.json"): json.loads(f.read_text())["train"] for f in files}


def test_stage_1(
    calvin: Path, rlds: dict[str, list[dict]], reference: Path, sources: Sources, tmp_path: Path
) -> None:
    """Latents of every sample, a model trained on their mixture, and what it imagines."""
    vae = f"vae={sources.weights('vae')}"
    run("Step1_GFDM.prepare", f"data.root={calvin}", vae, f"output={tmp_path / 'calvin'}")
    sets = {"calvin": "cameras: [0.75, 0.25]"} | dict.fromkeys(rlds, "clips: spread, cameras: [1.0]")
    for name, episodes in rlds.items():
        given = ["data=rlds", f"data.root={reference / 'rlds' / name}", f"data.index={tmp_path}"]
        given += [f"data.cameras={TABLE[name]['cameras']}", "data.every=2", "data.fps=5"]
        # A few episodes are enough; the last one is held out.
        given += ["data.split='train[:3]'", "data.held_out='train[-1:]'"]
        run("Step1_GFDM.prepare", *given, vae, f"output={tmp_path / name}")
        said = [(e.frames, e.texts) for e in read_episodes(tmp_path / name, "train")]
        assert said == [(-(-e["length"] // 2), [e["language"]]) for e in episodes[:3]]
    mixture = [f"+data.sets.{name}={{root: {tmp_path / name}, {how}}}" for name, how in sets.items()]
    mixture += ["~data.sets.demonstrations", "data.root=none"]
    run("Step1_GFDM.train", *mixture, vae, f"output={tmp_path / 'run'}", *SHORT)
    trained("gfdm", tmp_path / "run")
    given = [f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'imagined'}", "episodes=1", "steps=1"]
    run("Step1_GFDM.eval", *mixture, *given)
    assert set(json.loads((tmp_path / "imagined" / "metrics.json").read_text())["sets"]) == set(sets)


def test_stage_2(
    calvin: Path, rlds: dict[str, list[dict]], reference: Path, sources: Sources, tmp_path: Path
) -> None:
    """Trained on a mixture of the table, then on CALVIN's frames; what the codes mean; labels."""
    shares = ", ".join(f"{name}: 1.0" for name in rlds)
    given = ["data=pairs_oxe", f"data.root={reference / 'rlds'}", f"+data.mixtures.samples={{{shares}}}"]
    given += ["data.mixture=samples", f"data.index={tmp_path}", f"output={tmp_path / 'oxe'}"]
    run("Step2_GIDM.train", *given, *SHORT)
    trained("gidm", tmp_path / "oxe")
    run("Step2_GIDM.train", f"data.root={calvin}", f"output={tmp_path / 'calvin'}", *SHORT)
    trained("gidm", tmp_path / "calvin")
    made = [f"checkpoint={tmp_path / 'calvin'}", f"data.root={calvin}"]
    run("Step2_GIDM.health", *made, f"output={tmp_path / 'codes'}", "pairs=40")
    assert "probe" in json.loads((tmp_path / "codes" / "health.json").read_text())
    name, episodes = next(iter(rlds.items()))
    given = ["data=rlds", f"data.root={reference / 'rlds' / name}", f"data.index={tmp_path}"]
    given += [f"data.cameras={TABLE[name]['cameras']}", "data.split='train[:2]'"]
    run("Step2_GIDM.label", made[0], *given, f"output={tmp_path / 'codes.npz'}")
    with np.load(tmp_path / "codes.npz", allow_pickle=False) as labels:
        assert len(labels["frame"]) == sum(episode["length"] for episode in episodes[:2])


def test_stage_3(calvin: Path, sources: Sources, tmp_path: Path) -> None:
    """From a store of latents and from the frames as they are, with held-out ones."""
    stages = [f"{stage}_checkpoint={sources.weights(stage)}" for stage in ("gfdm", "gidm")]
    for split in ("training", "validation"):
        given = [f"data.root={calvin}", f"data.split={split}", stages[0], f"output={tmp_path / split}"]
        run("Step3_DeFI.prepare", *given, "store.kind=latents", "data.stride=40", "preset=tiny")
    shown = [*SHORT, "trainer.preview_every=2", "shown=2"]
    packed = [f"data.store={tmp_path / 'training'}", f"data.held_out={tmp_path / 'validation'}"]
    raw = [f"data.root={calvin}", "data.held_out=validation", "data.stride=40"]
    for name, data in (("packed", packed), ("raw", raw)):
        run("Step3_DeFI.train", *data, *stages, f"output={tmp_path / name}", *shown)
        trained("policy", tmp_path / name)
