"""HDF5: known layouts and others as data of every stage, the process that reads them, and its limits."""

import json
import multiprocessing
import os
import resource
import signal
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from defi.data import Dataset, hdf5, open_dataset
from defi.data.hdf5 import reader
from defi.data.hdf5.reader import READER, ask
from defi.errors import UserError
from defi.picture import decode_picture, encode_picture

h5py = pytest.importorskip("h5py")


def shades(length: int, height: int = 12, width: int = 16) -> np.ndarray:
    """Frames that differ from each other, and in their rows: 10 n at the top, a bright line at the bottom."""
    frames = np.zeros((length, height, width, 3), np.uint8)
    frames[:] = (10 * np.arange(length))[:, None, None, None]
    frames[:, -2:] = 250
    return frames


def numbers(length: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(length, width))


def write_aloha(root: Path, lengths: tuple[int, ...] = (5, 6, 7)) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for number, length in zip((0, 2, 10), lengths):
        with h5py.File(root / f"episode_{number}.hdf5", "w") as file:
            for camera in ("cam_right_wrist", "cam_high", "cam_left_wrist"):
                coded = [np.frombuffer(encode_picture(frame, "PNG"), np.uint8) for frame in shades(length)]
                padded = np.zeros((length, max(map(len, coded)) + 5), np.uint8)
                for row, code in zip(padded, coded):
                    row[: len(code)] = code
                file[f"observations/images/{camera}"] = padded
            file["action"] = numbers(length, 14, number)
            file["observations/qpos"] = numbers(length, 14, number + 1)
            file["observations/qvel"] = numbers(length, 14)


def write_robosuite(file: Path, kind: str, demos: tuple[int, ...] = (0, 1, 2, 10), **attributes: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    ending, state = (
        ("rgb", ("ee_states", "gripper_states", "joint_states"))
        if kind == "libero"
        else ("image", ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object"))
    )
    with h5py.File(file, "w") as content:
        for demo in demos:
            place, length = f"data/demo_{demo}", 3 + demo
            content[f"{place}/actions"] = numbers(length, 7, demo)
            for camera in ("eye_in_hand", "agentview"):
                content[f"{place}/obs/{camera}_{ending}"] = shades(length)
                content[f"{place}/obs/{camera}_depth"] = np.zeros((length, 12, 16, 1), np.float32)
            for place_of_state, width in zip(state, (3, 4, 2, 5)):
                content[f"{place}/obs/{place_of_state}"] = numbers(length, width, width)
        for key, value in attributes.items():
            content["data"].attrs[key] = value


def opened(root: Path, part: Any = "all", **given: Any) -> Dataset:
    return open_dataset({"format": "hdf5", "root": str(root), **given}, part)


def check_frames(data: Dataset, episode: int, cameras: tuple[str, ...]) -> None:
    """Any frames, in any order, of all cameras."""
    chosen = data.episode(episode)
    positions = [chosen.length - 1, 0, 2, 2]
    views = data.read(chosen, positions, cameras)
    assert tuple(views) == cameras
    for view in views.values():
        assert np.array_equal(view, shades(chosen.length)[positions])


def test_hdf5_of_aloha(tmp_path: Path) -> None:
    write_aloha(tmp_path / "aloha")
    data = opened(tmp_path / "aloha", instruction="fold the towel")
    assert data.cameras == ("cam_high", "cam_left_wrist", "cam_right_wrist") and data.fps == 50
    assert [data.episode(i).name for i in range(3)] == ["episode_0", "episode_2", "episode_10"]
    assert data.lengths.tolist() == [5, 6, 7] and data.starts.tolist() == [0, 5, 11]
    assert data.episode(1).texts == ("fold the towel",)
    check_frames(data, 2, data.cameras)
    motions = data.motions
    assert data.action_names[0] == "action_0" and data.state_names[13] == "qpos_13"
    assert np.array_equal(motions.actions[11:], numbers(7, 14, 10).astype(np.float32))
    assert np.array_equal(motions.state[5:11], numbers(6, 14, 3).astype(np.float32))
    assert data.robot().gripper is None and len(data.robot().actions) == 14


def test_hdf5_of_robomimic(tmp_path: Path) -> None:
    write_robosuite(tmp_path / "lift.hdf5", "robomimic", ep_meta=json.dumps({"lang": "lift the cube"}))
    data = opened(tmp_path / "lift.hdf5")
    assert data.cameras == ("agentview", "eye_in_hand") and data.fps == 20
    names = [data.episode(i).name for i in range(len(data))]
    assert names == [f"lift-data-demo_{demo}" for demo in (0, 1, 2, 10)]
    assert {data.episode(i).texts for i in range(4)} == {("lift the cube",)}
    assert len(data.state_names) == 9 and data.state_names[3] == "robot0_eef_quat_0"
    assert data.robot().gripper.dimension == 6 and not data.robot().gripper.opens
    check_frames(data, 3, ("eye_in_hand",))
    few = opened(tmp_path, cameras=["hand:obs/eye_in_hand_image", "agentview"], state=[], groups="data")
    assert few.cameras == ("hand", "agentview") and not few.state_names
    check_frames(few, 0, few.cameras)


def test_hdf5_pictures_in_jpeg_are_what_the_decoder_makes_of_them(tmp_path: Path) -> None:
    """In rows of one length with zeros behind, as ALOHA keeps them, and in rows of their own lengths."""
    coded = [encode_picture(np.roll(shades(6, 24, 32), n, 2)[n], "JPEG") for n in range(6)]
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        padded = file.create_dataset("observations/images/padded", (6, max(map(len, coded)) + 9), np.uint8)
        rows = file.create_dataset("observations/images/rows", (6,), h5py.vlen_dtype(np.uint8))
        for n, code in enumerate(coded):
            padded[n, : len(code)] = rows[n] = np.frombuffer(code, np.uint8)
    data = opened(tmp_path)
    for view in data.read(data.episode(0), [5, 0, 3], ("rows", "padded")).values():
        assert np.array_equal(view, [decode_picture(coded[n], "a.jpg") for n in (5, 0, 3)])
    with pytest.raises(UserError, match="holds no actions"):
        assert data.motions


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({"language_instruction": ["turn it on"]}, "turn it on"),
        ({"problem_name": "x"}, "turn on the stove"),
        (None, "turn on the stove"),
    ],
)
def test_hdf5_of_libero(info: dict | None, said: str, tmp_path: Path) -> None:
    attributes = {} if info is None else {"problem_info": json.dumps(info)}
    write_robosuite(tmp_path / "LIVING_ROOM_SCENE3_turn_on_the_stove_demo.hdf5", "libero", **attributes)
    data = opened(tmp_path, layout="libero", flip=False)
    assert data.episode(0).texts == (said,) and len(data.state_names) == 7
    check_frames(data, 1, ("agentview", "eye_in_hand"))
    turned, whole = opened(tmp_path), shades(3)
    view = turned.read(turned.episode(0), [1], ["agentview"])["agentview"]
    assert np.array_equal(view, whole[1:2, ::-1]), "LIBERO's pictures are upside down"


def test_hdf5_of_another_layout_is_named_by_hand(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["eyes/left"], file["control"] = shades(4), np.arange(4)
            file["hand/force"], file.attrs["say"] = numbers(4, 2), f"fold {name}"
    with pytest.raises(UserError, match=r"name its cameras, data\.cameras=.*holds eyes/left"):
        opened(tmp_path)
    given = {"actions": ["control", "hand/force"], "state": ["control"], "language": "say"}
    data = opened(tmp_path, cameras=["top:eyes/left"], **given)
    assert data.action_names == ("control", "force_0", "force_1") and data.state_names == ("control",)
    assert [data.episode(i).texts for i in range(2)] == [("fold one",), ("fold two",)]
    check_frames(data, 1, ("top",))
    assert np.array_equal(data.motions.actions[4:, 0], np.arange(4))
    with pytest.raises(UserError, match=r"does not say its frames per second; give data\.fps"):
        data.rate(data.episode(0))
    crop = {"top": [2, 4, 5, 8]}
    cut = opened(tmp_path, cameras=["top:eyes/left"], crop=crop, pad=True, flip=True)
    view = cut.read(cut.episode(0), [3], ["top"])["top"]
    expected = np.pad(shades(4)[3:4, ::-1][:, 2:7, 4:12], [(0, 0), (1, 2), (0, 0), (0, 0)])
    assert view.shape == (1, 8, 8, 3) and np.array_equal(view, expected)


def test_hdf5_recordings_that_disagree_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "data"
    write_aloha(root)
    good = (root / "episode_0.hdf5").read_bytes()
    faults = {
        "short": ("action", numbers(4, 14), "action has 4 rows for 5 pictures"),
        "wide": ("action", numbers(5, 7), r"action is \[5, 7\], the first recording's \[5, 14\]"),
        "still": ("observations/images/cam_high", shades(4), "cameras of different or no length"),
        "grey": ("observations/images/cam_high", shades(5)[..., 0], "not pictures"),
        "words": ("observations/qpos", [b"a"] * 5, "not numbers"),
    }
    for name, (place, value, _) in faults.items():
        (root / f"{name}.hdf5").write_bytes(good)
        with h5py.File(root / f"{name}.hdf5", "a") as file:
            del file[place]
            file[place] = value
    (root / "torn.hdf5").write_bytes(good[:900])
    with h5py.File(root / "without.hdf5", "w") as file:
        file["action"] = numbers(5, 14)
    data = opened(root)
    assert len(data) == 3 and len(data.faults) == 7
    assert "data: 7 of 10 recordings are left out; the first: " in capsys.readouterr().out
    for name, (_, _, said) in faults.items():
        with pytest.raises(UserError, match=rf"{name}\.hdf5: .*{said}"):
            raise UserError(data.faults[name])
    assert "torn.hdf5: cannot be read" in data.faults["torn"]
    assert "without.hdf5: has no observations/images/cam_high" in data.faults["without"]
    assert len(data.motions.actions) == 18
    (root / "torn.hdf5").write_bytes(good)
    assert len(opened(root)) == 4, "what changed is looked at again"


def test_hdf5_held_out_folder_is_not_trained_on(tmp_path: Path) -> None:
    """Also where it alone is named, below the root."""
    for folder in ("train", "val"):
        write_aloha(tmp_path / folder)
    training, held_out = (opened(tmp_path, part, held_out="val") for part in ("training", "held_out"))
    names = [training.episode(number).name for number in range(len(training))]
    assert names == ["train-episode_0", "train-episode_2", "train-episode_10"] and len(held_out) == 3
    assert training.left_out == [f"{tmp_path / 'val'} (data.held_out)"]
    assert len(opened(tmp_path, "all", held_out="val")) == 6


def test_hdf5_files_are_opened_once_for_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_robosuite(tmp_path / "a.hdf5", "robomimic", demos=tuple(range(25)))
    whole = opened(tmp_path)
    monkeypatch.setattr(hdf5, "_episodes", None)
    parts = [opened(tmp_path, part) for part in ("training", "held_out")]
    assert [len(part) for part in parts] == [24, 1] and parts[1].episode(0).name == "a-data-demo_19"
    assert parts[1].starts[0] == whole.starts[19], "frames keep their numbers"
    expected = numbers(22, 7, 19)[3:5]
    start = int(parts[1].starts[0])
    np.testing.assert_allclose(parts[1].read_motions(range(start + 3, start + 5))[:, :7], expected, rtol=1e-6)
    assert parts[0].left_out == ["1 episodes of the other part (data.split, data.held_out)"]
    assert parts[0].fingerprint == parts[1].fingerprint == whole.fingerprint
    monkeypatch.undo()
    assert len(opened(tmp_path, "held_out", held_out="a.hdf5")) == 25
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        file["data/demo_3/actions"][2, 1] = 7
    again = opened(tmp_path)
    assert again.motions.actions[3 + 4 + 5 + 2, 1] == 7, "what was corrected in its place is read again"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"layout": "droid"}, r"data\.layout=droid: choose from aloha, robomimic, libero"),
        ({"layout": "libero"}, r"data\.layout=libero: .*has no pictures obs/\*_rgb"),
        ({"fps": 0}, r"data\.fps=0"),
        ({"crop": {"side": [0, 0, 1, 1]}}, r"data\.crop\.side=\[0, 0, 1, 1\]: give one of the cameras"),
        ({"cameras": ["cam_low"]}, r"3 of 3 recordings are left out; the first: .*has no cam_low"),
        ({"actions": ["acts"]}, r"3 of 3 recordings are left out; the first: .*has no acts"),
        ({"split": "none"}, r"none: no HDF5 files here"),
    ],
)
def test_hdf5_settings_that_cannot_be(given: dict, said: str, tmp_path: Path) -> None:
    write_aloha(tmp_path)
    with pytest.raises(UserError, match=said):
        opened(tmp_path, **given)


# ------------------------------------------------------------ the process that reads


class Items:
    """Random frames, as stage 3's samples."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return 40

    def __getitem__(self, number: int) -> np.ndarray:
        episode = self.data.episode(number % 3)
        return self.data.read(episode, [number % 5], ["cam_high"])["cam_high"][0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_hdf5_in_workers_and_threads(start: str, tmp_path: Path) -> None:
    """Each process has a reader of its own, which stays; it ends with it."""
    write_aloha(tmp_path)
    items = Items(opened(tmp_path))
    items[0]
    reader = READER.process.pid
    context = multiprocessing.get_context(start)
    loader = DataLoader(items, batch_size=None, num_workers=2, multiprocessing_context=context)
    for number, frame in enumerate(loader):
        assert frame[0, 0, 0] == 10 * (number % 5)
    with ThreadPoolExecutor(4) as pool:
        assert [frame[0, 0, 0] for frame in pool.map(items.__getitem__, range(40))] == [
            10 * (number % 5) for number in range(40)
        ]
    assert READER.process.pid == reader


def test_hdf5_reader_that_was_killed_is_started_again(tmp_path: Path) -> None:
    write_aloha(tmp_path)
    items = Items(opened(tmp_path))
    items[0]
    os.kill(READER.process.pid, signal.SIGKILL)
    READER.process.wait()
    assert items[1][0, 0, 0] == 10
    os.kill(READER.process.pid, signal.SIGSTOP)  # it is busy, and then ends
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(items.__getitem__, 0)
        while not READER.lock.locked():
            time.sleep(0.01)
        os.kill(READER.process.pid, signal.SIGKILL)
        with pytest.raises(
            UserError, match=r"episode_0\.hdf5: damaged, .* not end well \(SIGKILL\); copy it"
        ):
            waiting.result()
    assert items[1][0, 0, 0] == 10
    (tmp_path / "episode_0.hdf5").write_bytes(b"no HDF5 any more")
    with pytest.raises(UserError, match=r"episode_0\.hdf5: cannot be read"):
        items[0]
    assert items[1][0, 0, 0] == 10


def write_black(file: Path, frames: int) -> None:
    """An episode whose pictures take a thousandth of their size."""
    with h5py.File(file, "w") as content:
        shape = (frames, 256, 256, 3)
        pictures = content.create_dataset("top", shape, np.uint8, chunks=(1, *shape[1:]), compression="gzip")
        packed = zlib.compress(bytes(256 * 256 * 3))
        for number in range(frames):
            pictures.id.write_direct_chunk((number, 0, 0, 0), packed)


def test_strongly_packed_pictures_are_read(tmp_path: Path) -> None:
    write_black(tmp_path / "black.hdf5", 1500)
    assert (tmp_path / "black.hdf5").stat().st_size < 10**6
    (pictures,) = ask(tmp_path / "black.hdf5", "rows", "", ["top"], True, list(range(0, 1500, 5)))
    assert pictures.shape == (300, 256, 256, 3) and not pictures.any()


def test_a_link_to_a_link_does_not_lead_out_of_the_file(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "private.hdf5", "w") as file:
        file["top"], file.attrs["say"] = np.zeros((2, 4, 4, 3), np.uint8), "lift"
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["out"] = h5py.ExternalLink("private.hdf5", "/")
        file["top"], file["obs"] = h5py.SoftLink("/out/top"), h5py.SoftLink("/out")
    for place in ("out/top", "top", "obs/top"):
        with pytest.raises(UserError, match=f"a.hdf5: {place} leads out of the file"):
            ask(tmp_path / "a.hdf5", "rows", "", [place], True, [0])


def test_hdf5_files_that_point_elsewhere_or_claim_too_much(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Each is left out, with the reason; none of what lies outside is read, and no memory is taken for it."""
    private = tmp_path / "private.bin"
    private.write_bytes(bytes(range(48)) * 3)
    with h5py.File(tmp_path / "other.hdf5x", "w") as file:
        file["numbers"], file["pictures"] = np.zeros((3, 2)), np.zeros((3, 4, 4, 3), np.uint8)

    def virtual(file: h5py.File, name: str, shape: tuple[int, ...], dtype: type) -> None:
        layout = h5py.VirtualLayout(shape, dtype)
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.hdf5x"), name, shape)
        file.create_virtual_dataset(name, layout)

    def huge(file: h5py.File, name: str, shape: tuple[int, ...], dtype: type) -> None:
        file.create_dataset(name, (10**12, *shape[1:]), dtype, chunks=(1, *shape[1:]))

    ways = {
        "link": lambda file, name, *_: file.__setitem__(name, h5py.ExternalLink("other.hdf5x", f"/{name}")),
        "raw": lambda file, *of: file.create_dataset(*of, external=[(str(private), 0, h5py.h5f.UNLIMITED)]),
        "virtual": virtual,
        "huge": huge,
        "fine": lambda file, *of: file.create_dataset(*of),
    }
    wanted = {"pictures": ((3, 4, 4, 3), np.uint8), "numbers": ((3, 2), np.float64)}
    for way, write in ways.items():
        for odd in wanted:
            with h5py.File(tmp_path / f"{way}_{odd}.hdf5", "w") as file:
                for name, of in wanted.items():
                    (write if name == odd else ways["fine"])(file, name, *of)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = opened(tmp_path, cameras=["top:pictures"], actions=["numbers"])
    assert [data.episode(number).name for number in range(len(data))] == ["fine_numbers", "fine_pictures"]
    assert len(data.motions.actions) == 6 and len(data.faults) == 8
    for name, fault in data.faults.items():
        way, odd = name.split("_")
        reason = "more than a file of its size can hold" if way == "huge" else f"{odd} leads out of the file"
        assert f"{name}.hdf5: " in fault and reason in fault
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10**5, "kilobytes"


@pytest.mark.parametrize("pieces", [None, (1, 4, 4, 3), (4, 2, 4, 3), (10, 4, 4, 3)])
@pytest.mark.parametrize("every", [1, 3, 20])
def test_every_so_many_rows_whatever_the_layout(
    tmp_path: Path, pieces: tuple[int, ...] | None, every: int
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file.create_dataset("top", data=frames, chunks=pieces)
    for positions in (range(0, 10, every), range(9, -1, -every), [7, 0, 7, 7]):
        (found,) = ask(tmp_path / "a.hdf5", "rows", "", ["top"], True, list(positions))
        assert np.array_equal(found, frames[np.array(positions)])


PICTURES = np.zeros((2, 4, 4, 3), np.uint8)


def write_texts(file: Path, **texts: object) -> None:
    """Two episodes below `data`; each text lies where its name says: `group__attribute`."""
    with h5py.File(file, "w") as content:
        for number in range(2):
            content[f"data/demo_{number}/obs/top"] = PICTURES
            content.create_group(f"data/demo_{number}/info")
        for name, text in texts.items():
            place, _, attribute = name.partition("__")
            content[place.replace(".", "/")].attrs[attribute] = text


def told(file: Path, text: str) -> str:
    """What a file says of its second episode."""
    found = ask(file, "episodes", "data", ["obs/top"], [], [text])[1]
    if found["fault"]:
        raise UserError(found["fault"])
    return found["text"]


@pytest.mark.parametrize(
    "place",
    ["/__say", "data__say", "data.demo_1__say", "data.demo_1.info__say", "data.demo_1.obs.top__say"],
    ids=lambda place: place.removesuffix("__say"),
)
@pytest.mark.parametrize("text", ["lift", b"lift", ["lift"], np.array([b"lift"] * 2)], ids=repr)
def test_a_text_at_an_episode_around_it_or_in_it(tmp_path: Path, place: str, text: object) -> None:
    write_texts(tmp_path / "a.hdf5", **{place: text})
    assert told(tmp_path / "a.hdf5", "say") == "lift"


def test_the_nearest_text_counts_and_none_of_another_episode(tmp_path: Path) -> None:
    texts = {"/__say": "far", "data.demo_0.info__say": "other", "data.demo_1__say": " ", "data__say": "near"}
    write_texts(tmp_path / "a.hdf5", **texts)
    assert told(tmp_path / "a.hdf5", "say") == "near"
    write_texts(tmp_path / "b.hdf5", **{"data.demo_0.info__say": "other"})
    assert told(tmp_path / "b.hdf5", "say") == ""
    write_texts(tmp_path / "c.hdf5", **{"data.demo_1.info__say": "a", "data.demo_1.obs__say": "b"})
    with pytest.raises(UserError, match=r"c\.hdf5: /data/demo_1 holds different say; give the path of one"):
        told(tmp_path / "c.hdf5", "say")
    assert told(tmp_path / "c.hdf5", "obs/say") == "b"


@pytest.mark.parametrize(
    ("text", "said"), [(3, "3"), (["a", "b"], "a list of 2 texts"), (np.bytes_(b"T\xfcr"), "not UTF-8")]
)
def test_what_is_no_text_is_named(tmp_path: Path, text: object, said: str) -> None:
    write_texts(tmp_path / "a.hdf5", data__say=text)
    with pytest.raises(UserError, match=rf"a\.hdf5: say of /data is {said}"):
        told(tmp_path / "a.hdf5", "say")


@pytest.mark.parametrize(
    "pictures",
    [
        PICTURES.astype(np.uint16),
        PICTURES / 255,
        PICTURES[..., 0],
        PICTURES[..., :1],
        PICTURES.transpose(0, 3, 1, 2),
        PICTURES.reshape(2, -1).astype(np.uint16),
    ],
    ids=["16 bits", "floats", "grey", "one channel", "channels first", "coded in 16 bits"],
)
def test_pictures_of_another_kind_are_refused(tmp_path: Path, pictures: np.ndarray) -> None:
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["top"] = pictures
    with pytest.raises(UserError, match=r"a\.hdf5: /top is .*, not pictures: uint8 \[F, H, W, 3\]"):
        ask(tmp_path / "a.hdf5", "rows", "", ["top"], True, [0])


@pytest.mark.parametrize(
    ("size", "unpacked", "least", "most"),
    [(10**6, 8 * 10**8, 10, 15), (10**9, 10**9, 100, 120), (1000, 2**60, 3, 4), (10**9, 2**60, 100, 300)],
)
def test_time_grows_with_what_is_read_but_not_with_what_a_file_says(
    size: int, unpacked: int, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: dict[int, int] = {}
    monkeypatch.setattr(reader.time, "process_time", lambda: 0.0)
    monkeypatch.setattr(reader.resource, "setrlimit", lambda what, limit: limits.update({what: limit[0]}))
    reader._limit(size, unpacked)
    assert least <= limits[resource.RLIMIT_CPU] <= most
