"""RLDS as it is written: what was put in comes out, in the layout that TFDS has."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from policy_fakes import write_demonstrations

from benchmarks.rlds_writer import write_videos
from defi.data import convert, open_dataset
from defi.data.rlds.tfrecord import parse_example, read_records
from defi.errors import UserError


def run(**values: Any) -> None:
    """The command."""
    GlobalHydra.instance().clear()
    sys.argv = ["convert", *(f"{key}={value}" for key, value in ({"to": "rlds"} | values).items())]
    convert.main()


@pytest.mark.parametrize("pictures", ["images", "jpeg"])
def test_rlds_from_calvin(pictures: str, tmp_path: Path) -> None:
    """Without a setting: cameras in order, names, rate, words, numbers to the last bit; in several files."""
    demos = write_demonstrations(tmp_path / "demos", lengths=(15, 22, 8))
    before = open_dataset({"format": "calvin", "root": str(demos)})
    root = tmp_path / "My set"
    run(data="calvin", **{"data.root": demos}, output=root, pictures=pictures, data_mb=0.02)
    after = open_dataset({"format": "rlds", "root": str(root)}, "all")
    names = sorted(file.name for file in root.glob("1.0.0/*.tfrecord*"))
    assert names == [f"my_set-train.tfrecord-{i:05d}-of-{len(names):05d}" for i in range(len(names))]
    assert len(names) > 1
    assert after.cameras == before.cameras and after.fps == before.fps and len(after) == len(before)
    assert after.action_names == before.action_names and after.state_names == before.state_names
    for number in range(len(after)):
        mine, other = after.episode(number), before.episode(number)
        assert mine.length == other.length and [*mine.sentences()] == [*other.sentences()]
        for camera in after.cameras:
            one, two = (
                data.read(each, range(each.length), [camera])[camera].astype(int)
                for data, each in ((after, mine), (before, other))
            )
            assert np.array_equal(one, two) if pictures == "images" else np.abs(one - two).mean() < 60
        rows = [
            data.motions.rows(each.start + np.arange(each.length))
            for data, each in ((after, mine), (before, other))
        ]
        assert np.array_equal(after.motions.actions[rows[0]], before.motions.actions[rows[1]])
        assert np.array_equal(after.motions.state[rows[0]], before.motions.state[rows[1]])


def leaves(node: dict, path: str = "") -> dict[str, dict]:
    """What features.json says of each feature, and of each dictionary of them but for what is in it."""
    inner = node.get("featuresDict", {}).get("features", {})
    if "sequence" in node:
        assert node["sequence"]["length"] == "-1"
        inner = {"": node["sequence"]["feature"]}
    found = {path: {key: value for key, value in node.items() if key not in ("featuresDict", "sequence")}}
    for name, child in inner.items():
        found |= leaves(child, f"{path}/{name}".strip("/") if name else path + "/*")
    return found


def test_rlds_layout_is_that_of_tfds(reference: Path, tmp_path: Path) -> None:
    """Read from a set that TFDS wrote and written again, all that both hold is described and kept alike."""
    official = reference / "rlds/bridge_dataset"
    run(data="rlds", **{"data.root": official}, output=tmp_path / "bridge_dataset", pictures="jpeg")
    theirs, mine = official / "1.0.0", tmp_path / "bridge_dataset/1.0.0"
    one, other = (leaves(json.loads((folder / "features.json").read_text())) for folder in (theirs, mine))
    assert one.keys() <= other.keys() and {path: other[path] for path in one} == one
    one, other = (json.loads((folder / "dataset_info.json").read_text()) for folder in (theirs, mine))
    assert one.keys() - {"description"} == other.keys()
    assert one["splits"][0].keys() == other["splits"][0].keys()
    records = [next(read_records(min(folder.glob("*train*"))))[2] for folder in (theirs, mine)]
    found = [parse_example(data) for data in records]
    assert found[0].keys() <= found[1].keys()
    for name, values in found[0].items():
        again = found[1][name]
        assert values.kind == again.kind and len(values_of(values, records[0])) > 0
        if "image" not in name and "file_path" not in name:  # pictures are packed anew, episodes named
            assert values_of(values, records[0]) == values_of(again, records[1]), name


def values_of(values: Any, data: bytes) -> list:
    if values.kind == 1:
        return [data[slice(*place)] for place in values.places]
    return values.numbers(data).tolist()


@pytest.mark.parametrize("to", ["rlds", "lerobot"])
def test_episodes_that_trimming_leaves_nothing_of_are_counted(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if to == "lerobot":
        pytest.importorskip("pyarrow")
    short = write_videos(tmp_path, {"train": [[2, 5, 1]]}, name="short")
    given = {"data.root": short, "data.split": "train", "data.trim": "[1,1]", "data.fps": 5}
    run(data="rlds", **given, output=tmp_path / "out", to=to)
    assert "1 episodes, 3 frames" in (said := capsys.readouterr().out)
    assert "left out: 2 episodes without a frame" in said
    after = open_dataset({"format": to, "root": str(tmp_path / "out")}, "all")
    assert after.lengths.tolist() == [3]
    with pytest.raises(SystemExit):
        run(data="rlds", **given | {"data.trim": "[9,1]"}, output=tmp_path / "none", to=to)
    assert "no episode has a frame" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_rlds_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In one line, and the output is as it was."""
    empty = write_videos(tmp_path, {"train": [[3, 2]]}, name="short")
    with pytest.raises(SystemExit):
        run(data="rlds", **{"data.root": empty}, output=tmp_path / "out", pictures="av1")
    assert capsys.readouterr().err == "error: pictures=av1: must be one of images, jpeg\n"
    with pytest.raises(UserError, match="a camera is called state"):
        section = {"format": "calvin", "root": str(write_demonstrations(tmp_path / "demos", lengths=(8,)))}
        data = open_dataset(section | {"cameras": ["state:static"]})
        convert.writer_of("rlds", data, tmp_path / "out", "images", name="out")
    assert not (tmp_path / "out").exists()
    damaged = tmp_path / "short/1.0.0/metadata.json"
    damaged.write_text('{"fps": -1, "cameras": [], "names": {}}')
    with pytest.raises(UserError, match=r"metadata\.json: fps=-1"):
        open_dataset({"format": "rlds", "root": str(empty)})
    damaged.write_text('{"fps": "of another writer"}')
    assert open_dataset({"format": "rlds", "root": str(empty)}).fps is None
