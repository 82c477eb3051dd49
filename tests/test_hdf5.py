"""HDF5 files in a process of its own: enough time for healthy ones, seconds for those that only say much."""

import resource
import zlib
from pathlib import Path

import numpy as np
import pytest

from defi import hdf5

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
    episode = hdf5.read_hdf5(tmp_path / "black.hdf5", cameras={"top": "top"}, text="", every=5)
    assert episode.pictures["top"].shape == (300, 256, 256, 3) and not episode.pictures["top"].any()


@pytest.mark.parametrize("pieces", [None, (1, 4, 4, 3), (4, 2, 4, 3), (10, 4, 4, 3)])
@pytest.mark.parametrize("every", [1, 3, 20])
def test_every_so_many_rows_whatever_the_layout(
    tmp_path: Path, pieces: tuple[int, ...] | None, every: int
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file.create_dataset("top", data=frames, chunks=pieces)
    episode = hdf5.read_hdf5(tmp_path / "a.hdf5", cameras={"top": "top"}, text="", every=every)
    assert np.array_equal(episode.pictures["top"], frames[::every])


@pytest.mark.parametrize(
    ("size", "unpacked", "least", "most"),
    [(10**6, 8 * 10**8, 10, 15), (10**9, 10**9, 100, 120), (1000, 2**60, 3, 4), (10**9, 2**60, 100, 300)],
)
def test_time_grows_with_what_is_read_but_not_with_what_a_file_says(
    size: int, unpacked: int, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {}
    monkeypatch.setattr(hdf5.resource, "setrlimit", lambda what, limit: limits.update({what: limit[0]}))
    hdf5._limit(size, unpacked)
    assert least <= limits[resource.RLIMIT_CPU] <= most
