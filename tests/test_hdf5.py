"""HDF5 files in a process of its own: enough time for healthy ones, seconds for those that only say much."""

import resource
import zlib
from pathlib import Path

import numpy as np
import pytest

from defi import hdf5
from defi.errors import UserError
from defi.hdf5 import READER

h5py = pytest.importorskip("h5py")


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
    (pictures,) = READER.pictures(tmp_path / "black.hdf5", "", ["top"], range(0, 1500, 5))
    assert pictures.shape == (300, 256, 256, 3) and not pictures.any()


def test_a_link_to_a_link_does_not_lead_out_of_the_file(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "private.hdf5", "w") as file:
        file["top"], file.attrs["say"] = np.zeros((2, 4, 4, 3), np.uint8), "lift"
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["out"] = h5py.ExternalLink("private.hdf5", "/")
        file["top"], file["obs"] = h5py.SoftLink("/out/top"), h5py.SoftLink("/out")
    for place in ("out/top", "top", "obs/top"):
        with pytest.raises(UserError, match=f"a.hdf5: {place} leads out of the file"):
            READER.pictures(tmp_path / "a.hdf5", "", [place], [0])


@pytest.mark.parametrize("pieces", [None, (1, 4, 4, 3), (4, 2, 4, 3), (10, 4, 4, 3)])
@pytest.mark.parametrize("every", [1, 3, 20])
def test_every_so_many_rows_whatever_the_layout(
    tmp_path: Path, pieces: tuple[int, ...] | None, every: int
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file.create_dataset("top", data=frames, chunks=pieces)
    for positions in (range(0, 10, every), range(9, -1, -every), [7, 0, 7, 7]):
        (found,) = READER.pictures(tmp_path / "a.hdf5", "", ["top"], positions)
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
    found = READER.episodes(file, "data", ["obs/top"], [], [text])[1]
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
        READER.pictures(tmp_path / "a.hdf5", "", ["top"], [0])


@pytest.mark.parametrize(
    ("size", "unpacked", "least", "most"),
    [(10**6, 8 * 10**8, 10, 15), (10**9, 10**9, 100, 120), (1000, 2**60, 3, 4), (10**9, 2**60, 100, 300)],
)
def test_time_grows_with_what_is_read_but_not_with_what_a_file_says(
    size: int, unpacked: int, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: dict[int, int] = {}
    monkeypatch.setattr(hdf5.time, "process_time", lambda: 0.0)
    monkeypatch.setattr(hdf5.resource, "setrlimit", lambda what, limit: limits.update({what: limit[0]}))
    hdf5._limit(size, unpacked)
    assert least <= limits[resource.RLIMIT_CPU] <= most
