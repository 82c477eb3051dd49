"""CALVIN's format: what is written is read back, by this project and by NumPy alone; faults name the file."""

import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from defi.data import open_dataset
from defi.data.calvin import (
    ANNOTATIONS,
    FRAME,
    CalvinFolder,
    Settings,
    Span,
    encode_frame,
    frame_name,
    index_files,
)
from defi.errors import UserError

EPISODES = [(0, 39), (40, 99)]
SPANS = [Span(0, 30, "open the drawer", "open_drawer"), Span(45, 99, "Schiebe die Tür", "move_slider_left")]


def made_up_frame(i: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(i)
    return {
        "rgb_static": rng.integers(0, 256, (16, 20, 3), dtype=np.uint8),
        "rgb_gripper": rng.integers(0, 256, (8, 8, 3), dtype=np.uint8),
        "rel_actions": rng.uniform(-1, 1, 7),
        "actions": rng.uniform(-1, 1, 7),
        "robot_obs": rng.normal(size=15),
        "scene_obs": rng.normal(size=24),
    }


def cut_index(split: Path) -> None:
    """Another data set's index: one recording of 51 frames."""
    np.save(split / "ep_start_end_ids.npy", np.array([[0, 50]]))
    np.save(split / "ep_lens.npy", np.array([51]))


@pytest.fixture
def split(tmp_path: Path) -> Path:
    folder = tmp_path / "training"
    for name, contents in index_files(EPISODES, SPANS, {"A": (0, 39), "B": (40, 99)}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(contents)
    for i in range(100):
        (folder / frame_name(i)).write_bytes(encode_frame(made_up_frame(i)))
    return folder


def test_what_is_written_is_read_back(split: Path) -> None:
    data = CalvinFolder(split)
    assert data.episodes == EPISODES
    assert data.spans == SPANS
    assert data.scenes == {"A": (0, 39), "B": (40, 99)}
    assert data.frame_ids.tolist() == list(range(100))
    for i in (0, 57, 99):
        frame = data.frame(i)
        assert set(frame) == set(FRAME)
        for key, expected in made_up_frame(i).items():
            assert frame[key].dtype == FRAME[key][0]
            np.testing.assert_array_equal(frame[key], expected)
    actions = data.stack("rel_actions", range(10, 20))
    np.testing.assert_array_equal(actions, [made_up_frame(i)["rel_actions"] for i in range(10, 20)])


def test_a_share_is_of_every_task_and_lies_within_a_larger_one(split: Path) -> None:
    """And everything that is remembered of the data is of that share alone."""
    spans = [Span(10 * i, 10 * i + 8, f"text {i}", ("push", "open")[i % 3 == 0]) for i in range(10)]
    for name, contents in index_files([(0, 99)], spans, {}).items():
        (split / name).write_bytes(contents)
    given = {"format": "calvin", "root": str(split.parent), "held_out": "training"}
    found = {share: open_dataset(given | {"share": share}) for share in (0.05, 0.3, 1.0)}
    names = {share: [data.episode(i).name for i in range(len(data))] for share, data in found.items()}
    tasks = [found[0.3].episode(i).task for i in range(len(found[0.3]))]
    assert (tasks.count("push"), tasks.count("open")) == (2, 2)
    assert len(names[0.05]) == 2 and set(names[0.05]) < set(names[0.3]) < set(names[1.0])
    assert names[0.3] == sorted(names[0.3]) and len(names[1.0]) == 10
    assert len({data.fingerprint for data in found.values()}) == 3
    assert found[0.3].lengths.tolist() == [9] * 4
    assert len(open_dataset(given | {"share": 0.05}, "held_out")) == 10
    few = Settings(root=str(split.parent), share=0.05)
    assert len(few.wordless().open("training")) == 2  # the autoencoder's, too
    for wrong in ({"share": 0}, {"share": 0.5, "spans": "recordings"}):
        with pytest.raises(UserError, match="data.share"):
            open_dataset(given | wrong)


def test_numpy_alone_reads_it_as_calvins_own_loader_does(split: Path) -> None:
    frame = np.load(split / "episode_0000042.npz")
    np.testing.assert_array_equal(frame["rgb_static"], made_up_frame(42)["rgb_static"])
    annotation = np.load(split / ANNOTATIONS, allow_pickle=True).item()
    assert annotation["language"]["ann"] == [span.instruction for span in SPANS]
    assert annotation["language"]["task"] == [span.task for span in SPANS]
    assert annotation["language"]["emb"].shape == (2, 1, 384)
    assert annotation["info"]["indx"] == [(0, 30), (45, 99)]
    np.testing.assert_array_equal(np.load(split / "ep_start_end_ids.npy"), EPISODES)
    np.testing.assert_array_equal(np.load(split / "ep_lens.npy"), [40, 60])
    assert np.load(split / "scene_info.npy", allow_pickle=True).item()["calvin_scene_B"] == [40, 99]


def test_only_the_members_asked_for_are_decompressed(split: Path) -> None:
    path = split / frame_name(3)
    whole = path.read_bytes()
    at = whole.index(b"rgb_static.npy") + 200
    path.write_bytes(whole[:at] + bytes(50) + whole[at + 50 :])  # the picture is damaged, the action is not
    data = CalvinFolder(split)
    np.testing.assert_array_equal(
        data.frame(3, ("rel_actions",))["rel_actions"], made_up_frame(3)["rel_actions"]
    )
    with pytest.raises(UserError, match=r"episode_0000003\.npz: cannot be read"):
        data.frame(3)


def test_a_frame_cut_anywhere_is_one_clear_line(split: Path) -> None:
    data, path = CalvinFolder(split), split / frame_name(7)
    whole = path.read_bytes()
    for length in [0, 1, 30, *range(100, len(whole), 211), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"episode_0000007\.npz: [^\n]+$"):
            data.frame(7)


def test_a_frame_of_another_format(split: Path) -> None:
    data = CalvinFolder(split)
    np.savez(split / frame_name(1), **made_up_frame(1) | {"rel_actions": np.zeros(8)})
    with pytest.raises(UserError, match=r"episode_0000001\.npz: rel_actions is float64 \(8,\)"):
        data.frame(1)
    np.savez(split / frame_name(1), pixels=np.zeros(3))
    with pytest.raises(UserError, match=r"episode_0000001\.npz.*rgb_static"):
        data.frame(1)
    np.savez(split / frame_name(1), **made_up_frame(1) | {"rel_actions": np.array([None] * 7)})
    with pytest.raises(UserError, match=r"episode_0000001\.npz.*Object arrays"):
        data.frame(1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda split: (split / "ep_start_end_ids.npy").unlink(), r"ep_start_end_ids\.npy: missing"),
        (lambda split: (split / ANNOTATIONS).unlink(), r"auto_lang_ann\.npy: missing annotation"),
        (lambda split: np.save(split / "ep_lens.npy", [40, 59]), r"ep_lens\.npy: contradicts"),
        (lambda split: (split / frame_name(99)).unlink(), r"episode_0000099\.npz: missing"),
        (lambda split: np.save(split / "ep_start_end_ids.npy", np.zeros((0, 2), int)), "no frames"),
        (lambda split: np.save(split / "ep_start_end_ids.npy", np.zeros((3, 2))), "not an integer array"),
        (lambda split: np.save(split / "ep_start_end_ids.npy", np.array([[3, 2]])), "ends before it starts"),
        (lambda split: cut_index(split), r"span \(45, 99\)"),
        (lambda split: np.save(split / ANNOTATIONS, {"language": {}}), "not CALVIN's annotation"),
        (
            lambda split: (split / ANNOTATIONS).write_bytes(b"\x93NUMPY"),
            r"auto_lang_ann\.npy: cannot be read",
        ),
        (lambda split: np.save(split / "scene_info.npy", [1]), r"scene_info\.npy: .*not a dict"),
    ],
)
def test_damage_is_named(split: Path, damage, message: str) -> None:
    damage(split)
    with pytest.raises(UserError, match=message):
        data = CalvinFolder(split)
        _ = data.spans, data.scenes, data.fingerprint


def rewrite_annotation(split: Path, **changes) -> None:
    annotation = np.load(split / ANNOTATIONS, allow_pickle=True).item()
    for key, value in changes.items():
        annotation["info" if key == "indx" else "language"][key] = value
    np.save(split / ANNOTATIONS, annotation)


@pytest.mark.parametrize(
    "texts",
    [
        [["lift"], b"T\xc3\xbcr"],
        np.array(["lift", "Tür"]),
        np.array(["lift", b"T\xc3\xbcr"], object),
        np.array([["lift"], ["Tür"]]),
        [np.array("lift"), np.str_("Tür")],
        ([np.array(["lift", "lift"])], "\ufeffTür"),
    ],
)
def test_texts_are_taken_out_of_what_they_are_wrapped_in(split: Path, texts) -> None:
    rewrite_annotation(split, ann=texts)
    data = CalvinFolder(split)
    assert [span.instruction for span in data.spans] == ["lift", "Tür"]
    assert data.missing_text_note(fate="") == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is None"),
        (float("nan"), "is nan"),
        (np.float32(3), "is 3.0"),
        ({"a": 1}, "is a dict"),
        ([], "is a list of 0 texts"),
        (["a", "b"], "is a list of 2 texts"),
        (b"T\xfcr", r"is not UTF-8 \('T\\udcfcr'\)"),
        ("T\udcfcr", "is not UTF-8"),
        (" \t", "is blank"),
        ("\u200b\ufeff\u3164", "is blank"),
    ],
)
def test_spans_without_words_are_named(split: Path, text, said: str) -> None:
    rewrite_annotation(split, ann=["lift", text])
    data = CalvinFolder(split)
    assert [(span.instruction, bool(span.fault)) for span in data.spans] == [("lift", False), ("", True)]
    told = data.missing_text_note(fate="left out")
    assert told.startswith(f"{split}: 1 of 2 annotated spans have no instruction: left out; the first: ")
    assert re.search(rf"auto_lang_ann\.npy: the text of span 1 \(frames 45 to 99\) {said}", told)


def test_single_values_where_arrays_of_one_are_meant(split: Path) -> None:
    """As scripts leave them that squeeze what they save."""
    whole = CalvinFolder(split).spans[0]
    np.save(split / "ep_start_end_ids.npy", np.array([0, 99]))
    np.save(split / "ep_lens.npy", 100)
    for indx, text, task in (
        ((0, 30), whole.instruction, whole.task),
        (np.array([0, 30]), [whole.instruction.encode()], np.array(whole.task)),
        (np.array([[0, 30]], object), np.array([whole.instruction]), [whole.task]),
    ):
        rewrite_annotation(split, indx=indx, ann=text, task=task)
        data = CalvinFolder(split)
        assert data.episodes == [(0, 99)] and data.spans == [whole]
    np.save(split / ANNOTATIONS, np.array([np.load(split / ANNOTATIONS, allow_pickle=True).item()]))
    assert CalvinFolder(split).spans == [whole], "CALVIN's own reader calls .item(), too"


def test_hidden_files_are_no_data(split: Path) -> None:
    """macOS leaves them on disks of others."""
    for name in (
        "._episode_0000001.npz",
        ".DS_Store",
        "._ep_lens.npy",
        "lang_annotations/._auto_lang_ann.npy",
    ):
        (split / name).write_bytes(b"\0\5\x16\7")
    data = CalvinFolder(split)
    data.check_frames(data.frame_ids)
    assert data.spans == SPANS


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        (
            "rel_actions",
            {2: np.nan},
            "rel_actions holds nan at place 2, expected are numbers of at most 1.01",
        ),
        ("rel_actions", {6: np.inf}, "rel_actions holds inf at place 6"),
        ("rel_actions", {0: 50}, "rel_actions holds 50 at place 0"),
        ("rel_actions", {0: -1.02}, "rel_actions holds -1.02 at place 0"),
        ("robot_obs", {14: -np.inf}, "robot_obs holds -inf at place 14"),
        ("robot_obs", {0: 712.5}, r"robot_obs holds 712.5 at place 0, .* 100 \(metres and radians\)"),
        ("actions", {0: np.nan}, "actions holds nan"),
    ],
)
def test_numbers_that_are_none_or_absurd(split: Path, key: str, change: dict[int, float], said: str) -> None:
    frame = made_up_frame(3)
    frame["rel_actions"][0] = 1.001  # room for rounding
    (split / frame_name(3)).write_bytes(encode_frame(frame))
    CalvinFolder(split).frame(3)
    for place, value in change.items():
        frame[key][place] = value
    (split / frame_name(3)).write_bytes(encode_frame(frame))
    with pytest.raises(UserError, match=rf"episode_0000003\.npz: {said}"):
        CalvinFolder(split).frame(3)


@pytest.mark.parametrize(
    "change",
    [
        lambda picture: picture.astype(np.uint16) * 257,
        lambda picture: picture / 255,
        lambda picture: picture[..., 0],
        lambda picture: np.concatenate([picture, picture[..., :1]], 2),
        lambda picture: picture.transpose(2, 0, 1),
    ],
    ids=["16 bits", "floats", "grey", "alpha", "channels first"],
)
def test_pictures_of_another_kind_are_refused(split: Path, change) -> None:
    frame = made_up_frame(3)
    np.savez(split / frame_name(3), **frame | {"rgb_static": change(frame["rgb_static"])})
    with pytest.raises(
        UserError, match=r"episode_0000003\.npz: rgb_static is .* expected uint8 \(None, None, 3\)"
    ):
        CalvinFolder(split).frame(3, ("rgb_static",))


def test_pictures_that_change_their_size_are_named(split: Path) -> None:
    wider = made_up_frame(4) | {"rgb_static": np.zeros((16, 30, 3), np.uint8)}
    (split / frame_name(4)).write_bytes(encode_frame(wider))
    data = CalvinFolder(split)
    assert data.stack("rgb_static", [4, 4]).shape == (2, 16, 30, 3)
    with pytest.raises(UserError, match=r"episode_0000004\.npz: .* from 16 x 20 to 16 x 30"):
        data.stack("rgb_static", range(2, 6))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        CalvinFolder(tmp_path / "nowhere")


# ------------------------------------------------------------ within a zip


@pytest.fixture(params=[zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def packed(split: Path, request: pytest.FixtureRequest) -> Path:
    """The data set as it is downloaded: a zip with one folder, the splits in it."""
    archive = split.parent / "task_ABC_D.zip"
    with zipfile.ZipFile(archive, "w", request.param) as file:
        file.writestr("task_ABC_D/", "")
        for path in sorted(p for p in split.rglob("*") if p.is_file()):
            file.write(path, f"task_ABC_D/training/{path.relative_to(split)}")
    return archive


def test_a_zip_reads_as_the_folder_it_holds(split: Path, packed: Path) -> None:
    whole, data = CalvinFolder(split), CalvinFolder(packed / "training")
    assert (data.episodes, data.spans, data.scenes) == (whole.episodes, whole.spans, whole.scenes)
    assert data.fingerprint == whole.fingerprint
    for i in (0, 57, 99):
        for key, expected in whole.frame(i).items():
            np.testing.assert_array_equal(data.frame(i)[key], expected)
    data.check_frames(data.frame_ids)
    assert str(data.path(3)) == f"{packed}/task_ABC_D/training/episode_0000003.npz"


def test_a_damaged_zip_is_named_with_the_position(split: Path, packed: Path) -> None:
    content = packed.read_bytes()
    packed.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"task_ABC_D\.zip: cannot be read"):
        CalvinFolder(packed / "training")
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        info = file.getinfo("task_ABC_D/training/episode_0000042.npz")
    at = info.header_offset + 30 + len(info.filename) + info.compress_size // 2
    packed.write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
    data = CalvinFolder(packed / "training")
    data.frame(41)
    with pytest.raises(UserError, match=r"episode_0000042\.npz, at byte \d+ of the zip: cannot be read"):
        data.frame(42)
    with pytest.raises(UserError, match="no folder validation in it"):
        CalvinFolder(packed / "validation")


def test_missing_frames_are_counted(split: Path) -> None:
    for i in (7, 8, 50):
        (split / frame_name(i)).unlink()
    data = CalvinFolder(split)
    data.check_frames(np.arange(9, 50))
    with pytest.raises(UserError, match=r"episode_0000007\.npz: missing, and 2 more of the 100 frames"):
        data.check_frames(data.frame_ids)


def test_the_fingerprint_follows_the_data(split: Path) -> None:
    before = CalvinFolder(split).fingerprint
    assert CalvinFolder(split).fingerprint == before
    (split / frame_name(0)).write_bytes(encode_frame(made_up_frame(1000)))
    assert CalvinFolder(split).fingerprint != before
