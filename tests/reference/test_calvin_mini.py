"""The recorded CALVIN sample: the reader agrees with NumPy on every frame and index."""

from pathlib import Path

import numpy as np
import pytest

from defi.data.calvin import ANNOTATIONS, FRAME, CalvinFolder


@pytest.fixture(scope="module")
def splits(reference: Path) -> list[Path]:
    found = sorted(path.parent for path in reference.glob("calvin_*/*/ep_start_end_ids.npy"))
    if not found:
        pytest.skip(f"no data set in CALVIN's format under {reference}")
    return found


def test_index_and_annotation(splits: list[Path]) -> None:
    for split in splits:
        data = CalvinFolder(split)
        np.testing.assert_array_equal(data.episodes, np.load(split / "ep_start_end_ids.npy"))
        annotation = np.load(split / ANNOTATIONS, allow_pickle=True).item()
        assert [(span.start, span.end) for span in data.spans] == annotation["info"]["indx"]
        assert [span.instruction for span in data.spans] == annotation["language"]["ann"]
        assert [span.task for span in data.spans] == annotation["language"]["task"]
        on_disk = sorted(int(path.stem.split("_")[1]) for path in split.glob("episode_*.npz"))
        assert data.frame_ids.tolist() == on_disk
        covered = [i for first, last in data.scenes.values() for i in range(first, last + 1)]
        assert sorted(covered) == on_disk


def test_frames(splits: list[Path]) -> None:
    for split in splits:
        data = CalvinFolder(split)
        for i in data.frame_ids[:: max(1, len(data.frame_ids) // 10)]:
            with np.load(data.path(i)) as expected:
                for key, array in data.frame(i).items():
                    assert array.dtype == FRAME[key][0]
                    np.testing.assert_array_equal(array, expected[key])


def test_actions_of_a_span(splits: list[Path]) -> None:
    for split in splits:
        data = CalvinFolder(split)
        span = data.spans[0]
        actions = data.stack("rel_actions", range(span.start, span.end + 1))
        assert actions.shape == (span.end - span.start + 1, 7)
        assert np.abs(actions).max() <= 1
        assert np.isin(actions[:, 6], (-1, 1)).all()
