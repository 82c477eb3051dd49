"""Stage 2's data: pairs from videos and demonstrations, one augmentation per pair, displacement, probe."""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_data import MadeData
from PIL import Image
from sklearn.metrics import r2_score

from benchmarks.rlds_writer import write_videos
from defi.data import open_dataset
from defi.data.calvin import FRAME, Span, encode_frame, frame_name, index_files
from defi.data.motions import Motions
from defi.errors import UserError
from defi.robot.spec import Vector
from defi.video import write_mp4
from Step2_GIDM.code_evaluation import CodeEvaluation, displacement, mean_displacement
from Step2_GIDM.data.build import build_pairs
from Step2_GIDM.data.images import Augmentation, Draw, augment, crop, recolour, resize
from Step2_GIDM.data.pairs import PairDataset
from Step2_GIDM.gallery import direction, most_informative_place
from Step2_GIDM.health import Probed, fit_and_predict, one_hot, probe, report
from Step3_DeFI.quickstart import probe_scores


def numbered(*lengths: int, cameras: Sequence[str] = ("front",)) -> MadeData:
    """Frames show their episode's number, their position; the camera's number is added."""

    def frames(number: int, positions: Sequence[int]) -> np.ndarray:
        found = np.zeros((len(positions), 8, 8, 3), np.uint8)
        found[..., 0], found[..., 1] = number, np.array(positions)[:, None, None]
        return found

    return MadeData(lengths, frames, texts=lambda number: (f"text {number}",), cameras=cameras)


def seen(data: PairDataset, index: int) -> tuple[int, int, int]:
    """Episode, earlier and later position as the frames of a pair show them."""
    frames = (data.sample(index)["frames"] * 255).round()
    assert (frames[0, 0] == frames[1, 0]).all(), "both frames are of one clip"
    return int(frames[0, 0, 0, 0]), int(frames[0, 1, 0, 0]), int(frames[1, 1, 0, 0])


def pairs_of(data: MadeData, distance: int, **given) -> PairDataset:
    return PairDataset(data, data.cameras, image_size=8, distance=(distance, distance), **given)


def test_pairs_may_go_without_their_words() -> None:
    data = numbered(4, 3)
    told, silent = pairs_of(data, 2), pairs_of(data, 2, words=False)
    assert told.sample(1)["text"] and not silent.sample(1)["text"]
    assert torch.equal(told.sample(1)["frames"], silent.sample(1)["frames"])


def test_pairs_cover_every_frame_of_every_clip_and_end_with_it() -> None:
    data = pairs_of(numbered(0, 4, 1, 0, 3), 2)
    pairs = [seen(data, i) for i in range(len(data))]
    assert pairs == [
        (1, 0, 2), (1, 1, 3), (1, 2, 3), (1, 3, 3), (2, 0, 0), (4, 0, 2), (4, 1, 2), (4, 2, 2)
    ]  # fmt: skip
    strided = pairs_of(numbered(6, 3), 1, stride=2)
    assert [seen(strided, i)[:2] for i in range(len(strided))] == [(0, 0), (0, 2), (0, 4), (1, 0), (1, 2)]
    with pytest.raises(UserError, match="no clip has two frames"):
        pairs_of(numbered(1, 1), 2)


def test_each_camera_is_a_view_of_its_own() -> None:
    """All episodes of the first, then all of the second; read alone, as they are stored."""
    data = pairs_of(numbered(2, 3, cameras=("front", "wrist")), 1)
    shown = [(*data.locate(i)[1:], *(data.sample(i)["frames"][:, 2, 0, 0] * 255).tolist()) for i in range(10)]
    front = [("front", now, 0, 0) for now in (0, 1, 0, 1, 2)]
    assert shown == front + [("wrist", now, 1, 1) for _, now, *_ in front]


def test_a_pair_has_the_text_of_its_earlier_frame() -> None:
    source = MadeData(
        [3], lambda _, at: np.zeros((len(at), 8, 8, 3), np.uint8), texts=lambda _: ("", "push", "pull")
    )
    data = pairs_of(source, 1)
    assert [data.sample(i, np.random.default_rng(0))["text"] for i in range(3)] == ["", "push", "pull"]


def test_samples_depend_on_their_generator_alone() -> None:
    data = PairDataset(numbered(60), ["front"], image_size=6, distance=(1, 20), augmentation=Augmentation())
    draw = [data.sample(3, np.random.default_rng(7)) for _ in range(2)]
    assert torch.equal(draw[0]["frames"], draw[1]["frames"]) and draw[0]["text"] == "text 0"
    plain = PairDataset(numbered(60), ["front"], image_size=8, distance=(1, 20))
    gaps = {
        round(float((f[1, 1] - f[0, 1]).mean() * 255))
        for f in (plain.sample(0, np.random.default_rng(i))["frames"] for i in range(300))
    }
    assert gaps == set(range(1, 21)), "distances are drawn from all of the range"


def test_one_augmentation_for_both_frames() -> None:
    rng = np.random.default_rng(0)
    picture = torch.randint(0, 256, (1, 3, 28, 28)) / 255
    same = augment(picture.expand(2, -1, -1, -1), Augmentation().draw(rng))
    assert same.shape == (2, 3, 28, 28) and torch.equal(same[0], same[1])
    assert not torch.equal(same, augment(picture.expand(2, -1, -1, -1), Augmentation().draw(rng)))
    nothing = Augmentation(crop=1, brightness=0, contrast=0, saturation=0, hue=0).draw(rng)
    assert torch.equal(augment(picture, nothing), picture)


def test_draws_fill_their_ranges() -> None:
    ranges = Augmentation(crop=0.81, brightness=0.2, contrast=0.3, saturation=0.4, hue=0.05)
    draws = [ranges.draw(np.random.default_rng(i)) for i in range(400)]
    limits = {"side": (0.9, 0.9), "top": (0, 0.1), "left": (0, 0.1), "brightness": (-0.2, 0.2)}
    limits |= {"contrast": (0.7, 1.3), "saturation": (0.6, 1.4), "hue": (-0.05, 0.05)}
    for name, (low, high) in limits.items():
        values = [getattr(draw, name) for draw in draws]
        assert (min(values), max(values)) == pytest.approx((low, high), abs=0.03 * (high - low) + 1e-9), name


def test_each_picture_keeps_its_own_mean_when_contrast_changes() -> None:
    """And what leaves [0, 1] is cut after each operation: a white that was brightened does not come back."""
    shades = torch.tensor([[60, 100], [160, 240]])
    pictures = shades[:, None, None].expand(2, 3, 2, 2) / 255
    for shift, expected in ((0, [[70, 90], [180, 220]]), (0.2, [[121, 141], [222, 244]])):
        draw = Draw(side=1, top=0, left=0, brightness=shift, contrast=0.5, saturation=1, hue=0)
        assert (augment(pictures, draw)[:, 0, 0] * 255).round().tolist() == expected


def test_the_crop_keeps_corners_and_ramps() -> None:
    ramp = torch.arange(9.0).expand(1, 3, 9, 9)
    draw = Draw(side=0.5, top=0.1, left=0.25, brightness=0, contrast=1, saturation=1, hue=0)
    expected = torch.linspace(2, 6, 9).expand(1, 3, 9, 9)
    torch.testing.assert_close(crop(ramp, draw), expected)
    expected = torch.linspace(0.8, 4.8, 9)[:, None].expand(1, 3, 9, 9)
    torch.testing.assert_close(crop(ramp.mT.contiguous(), draw), expected)


def test_colours_change_as_in_hsv() -> None:
    """Beside Python's own colorsys."""
    colours = np.random.default_rng(0).random((64, 3)).round(1)  # with greys and equal channels among them
    frames = torch.tensor(colours, dtype=torch.float32).T.reshape(1, 3, 8, 8)
    for saturation, hue in ((1.3, 0.05), (0.7, -0.3), (1, 0.5)):
        found = recolour(frames, saturation, hue).reshape(3, -1).T
        hsv = [colorsys.rgb_to_hsv(*colour) for colour in colours]
        expected = [colorsys.hsv_to_rgb((h + hue) % 1, min(1, s * saturation), v) for h, s, v in hsv]
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(48, 64), (30, 21), (28, 28), (200, 90)])
def test_pictures_are_resized_by_lanczos(shape: tuple[int, int]) -> None:
    """Beside Pillow's filter on floats, which does not round between its passes."""
    frames = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8)
    found = resize(frames, 28)
    for line, small in zip(frames.flatten(0, 1).numpy(), found.flatten(0, 1).numpy()):
        picture = Image.fromarray(line.astype(np.float32)).resize((28, 28), Image.Resampling.LANCZOS)
        exact = np.asarray(picture).clip(0, 255)
        np.testing.assert_allclose(small * 255, exact, atol=0.5 + 1e-3)


def test_any_folder_of_videos(tmp_path: Path) -> None:
    ramp = np.arange(12, dtype=np.uint8)[:, None, None, None] * 20
    write_mp4(tmp_path / "deep" / "one.mp4", np.broadcast_to(ramp, (12, 64, 80, 3)).copy(), 10)
    write_mp4(tmp_path / "two.mp4", np.zeros((5, 64, 64, 3), np.uint8), 10)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "notes.txt").write_text("no video either")
    elsewhere = (tmp_path / "deep").rename(tmp_path.with_name(f"{tmp_path.name}_elsewhere"))
    (tmp_path / "deep").symlink_to(elsewhere)
    (tmp_path / "deep" / "back").symlink_to(tmp_path)
    with pytest.warns(UserWarning, match=r"1 of 3 videos left out.*broken\.mp4"):
        source = open_dataset({"format": "videos", "root": str(tmp_path)}, "all")
    assert source.lengths.tolist() == [12, 5]
    data = PairDataset(source, source.cameras, image_size=14, distance=(4, 4))
    assert len(data) == 12 + 5
    sample = data.sample(2, np.random.default_rng(0))
    shades = sample["frames"].mean((1, 2, 3)) * 255
    torch.testing.assert_close(shades, torch.tensor([40.0, 120.0]), atol=6, rtol=0)
    assert sample["text"] == ""
    alone = open_dataset({"format": "videos", "root": str(tmp_path / "two.mp4")})
    assert alone.lengths.tolist() == [5]


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recordings of 10 frames whose pictures show their frame number; annotated: frames 2–6 and 10–19."""
    root = tmp_path_factory.mktemp("demonstrations")
    for split in ("training", "validation"):
        (root / split / "lang_annotations").mkdir(parents=True)
        for number in range(20):
            frame = {key: np.zeros([n or 16 for n in shape], dtype) for key, (dtype, shape) in FRAME.items()}
            frame["rgb_static"] += np.uint8(number)
            frame["rgb_gripper"] += np.uint8(100 + number)
            (root / split / frame_name(number)).write_bytes(encode_frame(frame))
        spans = [Span(2, 6, "open the drawer", "open_drawer"), Span(10, 19, "push it", "push")]
        for name, content in index_files([(0, 9), (10, 19)], spans, {"A": (0, 19)}).items():
            (root / split / name).write_bytes(content)
    return root


def section(folder: Path, **changes) -> dict:
    data = {"format": "calvin", "root": str(folder), "split": "training", "held_out": "validation"}
    data |= {"distance": [3, 3], "stride": 1, "augmentation": {"crop": 0.9}}
    return data | changes


def test_demonstrations(demonstrations: Path) -> None:
    """The first camera's, or of all that are named one after the other."""
    pairs = build_pairs(section(demonstrations, cameras=["static", "gripper"]), 14)
    found = [(camera, each.start, each.length, each.text(4)) for each, camera in map(pairs.clip, range(4))]
    assert found == [
        ("static", 2, 5, "open the drawer"), ("static", 10, 10, "push it"),
        ("gripper", 2, 5, "open the drawer"), ("gripper", 10, 10, "push it"),
    ]  # fmt: skip
    assert pairs.read(*pairs.clip(3), [0, 4])[:, 0, 0, 0].tolist() == [110, 114]
    silent = build_pairs(section(demonstrations, spans="recordings"), 14)
    found = [(camera, each.start, each.length, each.text(4)) for each, camera in map(silent.clip, range(2))]
    assert found == [("static", 0, 10, ""), ("static", 10, 10, "")]
    assert pairs.fingerprint == silent.fingerprint and len(silent.lengths) == 2


def test_sections_of_the_configuration(demonstrations: Path) -> None:
    train, held = (
        build_pairs(section(demonstrations), 14),
        build_pairs(section(demonstrations), 14, "held_out"),
    )
    assert len(train) == len(held) == 5 + 10
    assert train.augmentation.crop == 0.9 and held.augmentation is None
    assert held.data.root.name == "validation"
    own = {"format": "calvin", "root": str(demonstrations), "cameras": None}
    assert build_pairs(own, 14).distance == [15, 15] and build_pairs(own, 14).augmentation is None


@pytest.mark.parametrize(("spans", "clips"), [(None, 2), ("recordings", 2), ("annotated", 4)])
def test_all_of_the_demonstrations(demonstrations: Path, spans: str | None, clips: int) -> None:
    """Training takes annotated spans; where all is wanted, all recordings, unless data.spans says so."""
    cameras = ["static", "gripper"] if spans == "annotated" else ["static"]
    given = section(demonstrations, spans=spans, cameras=cameras)
    whole = build_pairs(given, 14, "all")
    assert len(whole.lengths) == clips
    assert len(build_pairs(given, 14)) == len(cameras) * (10 + 10 if spans == "recordings" else 5 + 10)
    if spans == "annotated":
        assert whole.data.scope == f"{demonstrations / 'training'} (static, gripper; annotated spans)"
        assert whole.data.left_out[0] == "frames without annotation (data.spans)"
    else:
        left_out = ["the camera gripper (data.cameras)", "the split validation (data.split)"]
        assert whole.data.left_out == left_out and whole.lengths.sum() == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distance": [5, 2]}, r"data.distance=\[5, 2\]"),
        ({"distance": [1, 10**30]}, r"data.distance=\[1, 10+\]: .* <= 1,000,000"),
        ({"distance": 15}, "data.distance=.*must be a list"),
        ({"distance": [15]}, r"data.distance=\[15\]: must be \[low, high\]"),
        ({"distance": [1, "far"]}, r"data.distance\[1\]: .*'far'"),
        ({"augmentation": {"crops": 0.9}}, "data.augmentation.crops=0.9: "),
        ({"augmentation": {"crop": "most"}}, "data.augmentation.crop=most: .*'most'"),
        ({"augmentation": 0.9}, "data.augmentation"),
        ({"cameras": "static"}, "data.cameras=.*must be a list"),
        ({"stride": 0}, "data.stride=0"),
        ({"cameras": ["front"]}, "'front' is no camera"),
        ({"format": "tapes"}, "data.format=tapes: choose from calvin, "),
        ({"split": "testing"}, "testing: no such folder"),
        ({"distence": [3, 5]}, r"data.distence=\[3, 5\]: .*; see Settings in defi.data.calvin"),
        ({"format": "videos", "spans": "all"}, "data.spans=all: .*; see Settings in defi.data.videos"),
        ({"augmentation": {"crop": 1.5}}, "data.augmentation.crop=1.5: must be above 0 and at most 1"),
        ({"augmentation": {"crop": 0}}, "data.augmentation.crop=0.0: must be above 0"),
        ({"augmentation": {"hue": float("nan")}}, "data.augmentation.hue=nan: must be between 0 and 1"),
    ],
)
def test_mistakes_in_the_section_are_named(demonstrations: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_pairs(section(demonstrations, **change), 14)


def test_folders_without_videos(tmp_path: Path) -> None:
    own = {"format": "videos", "distance": [3, 3], "stride": 1, "augmentation": None}
    for root, message in ((tmp_path, "no videos here"), ("/nowhere", "/nowhere: no such file")):
        with pytest.raises(UserError, match=message):
            build_pairs(own | {"root": str(root)}, 14)


def test_settings_of_a_mixture(demonstrations: Path, tmp_path: Path) -> None:
    """A common setting need not be one of every source; one of a set must be its source's."""
    own = {"format": "calvin", "root": str(demonstrations), "weight": 1}
    toy = {"format": "rlds", "root": str(write_videos(tmp_path, {"train": [[4]], "val": [[1]]})), "weight": 1}
    common = {"spans": "recordings", "language": None, "distance": [3, 3]}
    assert len(build_pairs(common | {"sets": {"own": own, "toy": toy}}, 14)) == 20 + 5
    known = "Key .* not in 'Settings'; see Settings in defi.data.calvin"
    for common, change, message in (
        ({}, {"distence": [3, 5]}, rf"data.sets.own.distence=\[3, 5\]: {known}"),
        ({}, {"trim": [1, 1]}, rf"data.sets.own.trim=\[1, 1\]: {known}"),
        ({"strid": 2}, {}, "data.strid=2: no data set has such a setting"),
        ({}, {"weight": 0}, "data.sets.own.weight=0.0: must be above 0"),
        ({}, {"weight": 1e30}, r"data.sets.own.weight=1e\+30: must be above 0 and at most 1,000,000"),
    ):
        with pytest.raises(UserError, match=message):
            build_pairs({**common, "sets": {"own": own | change}}, 14)


def test_displacement_of_a_moved_square() -> None:
    square = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)
    square = square.repeat_interleave(2, 1)
    frames = torch.zeros(2, 2, 3, 112, 112)
    frames[:, 0, :, 40:64, 40:64] = square
    frames[0, 1, :, 40:64, 54:78] = square  # 14 pixels to the right
    frames[1, 1, :, 32:56, 40:64] = square  # 8 pixels up
    moves = mean_displacement(*displacement(frames))
    torch.testing.assert_close(moves, torch.tensor([[14.0, 0], [0, -8]]) / 112, atol=0.03, rtol=0)
    still = frames[:, :1].expand(-1, 2, -1, -1, -1)
    assert displacement(still)[1].sum() == 0


def test_directions_in_words() -> None:
    cases = {
        (0.12, 0): "right 12%",
        (0, -0.07): "up 7%",
        (-0.03, 0.04): "down left 5%",
        (0.001, 0): "little motion",
    }
    assert {move: direction(*move) for move in cases} == cases


def test_the_most_informative_place_is_the_one_that_follows_the_motion() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (200, 3), generator=generator)
    moves = torch.stack([codes[:, 1].float(), -codes[:, 1].float()], dim=1)
    assert most_informative_place(codes, moves) == (1, pytest.approx(1.0))


def test_probe_finds_what_is_linear_and_nothing_in_noise() -> None:
    rng = np.random.default_rng(0)
    codes, effect = rng.integers(8, size=(400, 2)), rng.normal(size=(8, 3))
    targets = effect[codes[:, 0]] + 0.1 * rng.normal(size=(400, 3))
    groups = np.arange(200) // 10

    def scores(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        guess = fit_and_predict(inputs[:200], targets[:200], inputs[200:], groups=groups)
        return r2_score(targets[200:], guess, multioutput="raw_values")

    assert (scores(one_hot(codes, 8), targets) > 0.9).all()
    assert (np.abs(scores(one_hot(rng.integers(8, size=(400, 2)), 8), targets)) < 0.15).all()
    # More inputs than samples, alike within a group: what is learned of one group does not carry over.
    per_group = rng.normal(size=(40, 300))[np.arange(400) // 10] + 0.01 * rng.normal(size=(400, 300))
    drift = rng.normal(size=(40, 1))[np.arange(400) // 10]
    assert scores(per_group, drift)[0] < 0.2


def test_probe_is_chosen_for_the_actions_that_vary_most() -> None:
    """Six that are hardly more than noise do not shrink what is read of the seventh."""
    rng = np.random.default_rng(0)
    inputs, groups = rng.normal(size=(160, 40)), np.arange(80) // 8
    large = 100 * inputs @ rng.normal(size=(40, 1)) + rng.normal(size=(160, 1))
    targets = np.hstack([large, 0.2 * rng.normal(size=(160, 6))])
    alone, together = (
        fit_and_predict(inputs[:80], chosen[:80], inputs[80:], groups=groups)[:, 0]
        for chosen in (large, targets)
    )
    assert r2_score(targets[80:, 0], together) == pytest.approx(r2_score(targets[80:, 0], alone), abs=0.01)


def test_probe_of_actions_whose_units_are_unknown() -> None:
    """Sums of relative actions, means of absolute ones; small numbers count as much as large ones."""
    robot = Vector.plain(["tiny", "huge", "still"])
    robot.relative = [True, False, False]
    rng = np.random.default_rng(0)
    codes, moves = rng.integers(4, size=40), rng.normal(size=4)
    actions = np.zeros((40, 4, 3), np.float32)  # of 40 episodes of 4 frames
    actions[..., 0], actions[..., 1] = 1e-5 * moves[codes, None], 1e4 * moves[codes, None]
    data = numbered(*[4] * 40)
    data.robot = lambda: SimpleNamespace(actions=robot)
    data.motions = Motions(np.arange(160), actions.reshape(160, 3), np.zeros((160, 0)))
    pairs = pairs_of(data, 2)
    shown = torch.from_numpy(codes.repeat(4)[:, None])
    seen = CodeEvaluation(
        np.arange(160), torch.zeros(160, 2, 3, 8, 8), shown, torch.rand(160, 3), *[None] * 3
    )
    part = Probed.of(pairs, seen)
    assert part.clips.tolist() == [i // 4 for i in range(160)]
    factors = np.tile([[2, 1], [2, 1], [1, 1], [0, 1]], (40, 1))
    single = actions.reshape(160, 3)[:, :2]
    np.testing.assert_allclose(part.actions[:, :2], factors * single, rtol=1e-6)
    assert (part.actions[:, 2] == 0).all()
    found = probe(part, part, robot, codes=4)["codes"]
    assert list(found) == ["tiny", "huge", "all"] and found["huge"] > 0.99
    assert found["all"] == pytest.approx((found["tiny"] + found["huge"]) / 2, abs=0.01)


def test_where_no_action_varies_there_is_nothing_to_probe(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Neither in the table, nor on the page of a whole recipe."""
    still = torch.zeros(4, 2, dtype=torch.long)
    seen = CodeEvaluation(
        np.arange(4), torch.zeros(4, 2, 3, 8, 8), still, torch.rand(4, 3), *torch.zeros(3, 4)
    )
    part = Probed(seen, np.array([0, 0, 1, 1]), np.zeros((4, 7)))
    found = probe(part, part, Vector.plain(["still"] * 7), codes=8)
    assert set(found) == {"codes", "random codes", "feature differences"}
    assert all(scores == {"all": None} for scores in found.values())
    numbers = seen.numbers(8) | {"probe": found}
    report(numbers, 8)
    told = capsys.readouterr().out
    assert "No action varies in both splits: there is nothing to probe." in told and told.count("—") == 3
    assert list(probe_scores(numbers).values()) == ["—"] * 3
