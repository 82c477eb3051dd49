"""FVD: the distance against closed forms, I3D and its published weights; the evaluation of a mixture."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_step1_commands import TINY, command, moving_square, succeed
from torch import Tensor, nn

from defi.engine import checkpoint
from defi.errors import UserError
from defi.video import write_mp4
from Step1_GFDM import eval as evaluation
from Step1_GFDM.data import LATENTS
from Step1_GFDM.evaluation.i3d import FEWEST_FRAMES, I3D, PUBLISHED, SIDE, Pool, pad_same
from Step1_GFDM.evaluation.metrics import FEW, action_scores, frechet_distance, fvd_figures
from Step1_GFDM.model import GFDM


def exact_sample(count: int, mean: Tensor, deviations: Tensor) -> Tensor:
    """Rows whose mean and standard deviations are exactly these, uncorrelated."""
    draw = torch.randn(count, len(mean), dtype=torch.float64)
    basis = torch.linalg.qr(draw - draw.mean(0)).Q * (count - 1) ** 0.5
    return basis * deviations + mean


# ------------------------------------------------------------ the distance


@pytest.mark.parametrize("count", [7, 300], ids=["fewer clips than scores", "more"])
def test_distance_of_a_set_to_itself_and_to_itself_elsewhere(count: int) -> None:
    torch.manual_seed(0)
    scores, shift = 50 * torch.randn(count, 40), torch.randn(40)
    assert frechet_distance(scores, scores) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(scores, scores.flip(0)) == pytest.approx(0, abs=1e-8)
    expected = shift.square().sum().item()
    assert frechet_distance(scores.double(), scores.double() + shift) == pytest.approx(expected, rel=1e-6)


def test_distance_of_normal_distributions() -> None:
    """Without correlations it is Σ (μa − μb)² + (σa − σb)²; of rotated ones the same."""
    torch.manual_seed(0)
    means, deviations = torch.randn(2, 6, dtype=torch.float64), torch.rand(2, 6, dtype=torch.float64)
    a, b = (exact_sample(n, *row) for n, row in zip((50, 80), zip(means, deviations)))
    expected = ((means[0] - means[1]).square() + (deviations[0] - deviations[1]).square()).sum().item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(expected, rel=1e-9)


def test_distance_by_roots_of_matrices() -> None:
    """The definition, with correlations: tr (Σa^½ Σb Σa^½)^½ by eigenvalues."""
    torch.manual_seed(0)
    a, b = (torch.randn(n, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) for n in (30, 20))
    values, vectors = torch.linalg.eigh(a.T.cov())
    root = vectors * values.sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ b.T.cov() @ root).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    expected = means + a.T.cov().trace() + b.T.cov().trace() - 2 * trace
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_few_clips_are_told() -> None:
    torch.manual_seed(0)
    rows = {name: torch.randn(FEW, 4) for name in ("imagined", "real", "still")}
    assert fvd_figures(rows)["warning"] is None and fvd_figures(rows)["clips"] == FEW
    some = {name: found[:9] for name, found in rows.items()}
    assert "biased upwards" in fvd_figures(some)["warning"] and fvd_figures(some)["clips"] == 9
    assert fvd_figures(some)["imagined"] > fvd_figures(rows)["imagined"]
    assert fvd_figures({name: found[:1] for name, found in rows.items()}) is None


# ------------------------------------------------------------ the network


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file as published, of other numbers."""
    folder = tmp_path_factory.mktemp("i3d")
    torch.manual_seed(0)
    torch.save(I3D().state_dict(), folder / PUBLISHED[0])
    return folder


def test_published_names_and_sizes() -> None:
    """As in the public files: 344 tensors, of which 57 count batches."""
    tensors = I3D().state_dict()
    assert len(tensors) == 344 and sum(t.numel() for t in tensors.values()) == 12_711_881
    for name, shape in {
        "Conv3d_1a_7x7.conv3d.weight": (64, 3, 7, 7, 7),
        "Conv3d_2c_3x3.bn.running_var": (192,),
        "Mixed_3b.b1a.bn.running_mean": (96,),
        "Mixed_4f.b2b.conv3d.weight": (128, 32, 3, 3, 3),
        "Mixed_5c.b3b.conv3d.weight": (128, 832, 1, 1, 1),
        "logits.conv3d.bias": (400,),
    }.items():
        assert tensors[name].shape == shape, name


def test_weights_are_read_from_file_and_folder_and_checked(published: Path, tmp_path: Path) -> None:
    tensors = torch.load(published / PUBLISHED[0], weights_only=True)
    for place in (published, published / PUBLISHED[0]):
        found = I3D.from_published(place).state_dict()
        assert all(found[name].equal(tensor) for name, tensor in tensors.items())
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith("tracked")}
    torch.save(plain, tmp_path / PUBLISHED[1], _use_new_zipfile_serialization=False)  # as old PyTorch did
    assert I3D.from_published(tmp_path).logits.conv3d.bias.equal(tensors["logits.conv3d.bias"])
    for change, message in (
        ({"logits.conv3d.bias": torch.zeros(157)}, r"logits\.conv3d\.bias has shape \(157,\)"),
        ({"Mixed_6a.b0.conv3d.weight": torch.zeros(1)}, "Mixed_6a"),
    ):
        torch.save(plain | change, tmp_path / "other.pt")
        with pytest.raises(UserError, match=message):
            I3D.from_published(tmp_path / "other.pt")
    del plain["Mixed_3b.b0.bn.bias"]
    torch.save(plain, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"lacks Mixed_3b\.b0\.bn\.bias"):
        I3D.from_published(tmp_path / "other.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty/rgb_imagenet\.pt: no such file"):
        I3D.from_published(tmp_path / "empty")


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [(224, 7, 2, (2, 3)), (9, 7, 2, (3, 3)), (112, 3, 2, (0, 1)), (7, 3, 1, (1, 1)), (5, 2, 2, (0, 1))],
)
def test_padding_is_that_of_tensorflow(size: int, kernel: int, stride: int, padding: tuple[int, int]) -> None:
    """`SAME`: ceil(size / stride) windows, an odd zero at the end."""
    line = torch.arange(1.0, size + 1).view(1, 1, size, 1, 1)
    padded = pad_same(line, (kernel, 1, 1), (stride, 1, 1)).flatten()
    zeros = (padded == 0).nonzero().flatten()
    assert ((zeros < size).sum().item(), (zeros >= size).sum().item()) == padding
    assert Pool((kernel, 1, 1), (stride, 1, 1))(line).shape[2] == -(-size // stride)


def test_scores_of_a_clip(published: Path) -> None:
    """The shortest clip ends as two steps of time and 7 × 7 places, whose mean is scored."""
    i3d, seen = I3D.from_published(published), []
    i3d.avg_pool.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    clip = torch.rand(1, 3, FEWEST_FRAMES, SIDE, SIDE) * 2 - 1
    with torch.inference_mode():
        scores = i3d(clip)
    assert seen[0].shape == (1, 1024, 2, 7, 7)
    head = i3d.logits.conv3d
    expected = seen[0].mean((2, 3, 4)) @ head.weight.flatten(1).T + head.bias
    torch.testing.assert_close(scores, expected)


class Averages(nn.Module):
    """Stands in for I3D, which takes a second per clip: 400 averages of the pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, clips: Tensor) -> Tensor:
        assert clips.shape[1:] == (3, FEWEST_FRAMES, SIDE, SIDE)
        return self.factor * nn.functional.adaptive_avg_pool3d(clips, (1, 20, 20))[:, 0].flatten(1)


def test_a_future_that_stands_still_has_the_scores_of_its_first_frame() -> None:
    real = torch.rand(FEWEST_FRAMES, 3, 32, 32) * 2 - 1
    scores = action_scores(Averages(), real.flip(0), real)
    still = action_scores(Averages(), real[:1].expand_as(real), real)
    assert scores["imagined"].shape == (400,) and not scores["real"].equal(scores["still"])
    torch.testing.assert_close(scores["imagined"], scores["real"])
    torch.testing.assert_close(scores["still"], still["imagined"])


# ------------------------------------------------------------ the command


def write_set(root: Path, episodes: int, cameras: tuple[str, ...] = ("static",)) -> Path:
    """Prepared latents and videos in VPP's layout, split `val`, of moving squares."""
    for number in range(episodes):
        name, listed = f"{number:03d}", {"videos": [], "latent_videos": []}
        for camera in cameras:
            latent = f"latent_videos/val/{name}/{camera}.safetensors"
            (root / latent).parent.mkdir(parents=True, exist_ok=True)
            generator = torch.Generator().manual_seed(number)
            save_file({LATENTS: torch.randn(12, 4, 4, 4, generator=generator)}, root / latent)
            video = f"videos/val/{name}/{camera}.mp4"
            write_mp4(root / video, moving_square(5 * number, 12, 32), 10)
            listed["videos"].append({"video_path": video})
            listed["latent_videos"].append({"latent_video_path": latent})
        annotation = {"episode_id": f"{root.name}_{name}", "texts": ["push"], "video_length": 12, **listed}
        file = root / "annotation" / "val" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(annotation))
    return root


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of nine frames, and two data sets of three episodes and of one."""
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    for name, frames in (("gfdm", FEWEST_FRAMES), ("short", 3)):
        model = GFDM.from_config(replace(TINY, frames=frames))
        checkpoint.save(model, folder / name, step=1, config={"preset_name": "test"})
    write_set(folder / "kitchen", 3, ("static", "gripper"))
    write_set(folder / "street", 1)
    return folder


def settings(mixture: Path, *names: str) -> list[str]:
    """Of an evaluation of these data sets."""
    sets = ", ".join(f"{n}: {{root: {mixture / n}, cameras: [1.0], stride: 1}}" for n in names)
    return [f"data.root={mixture}", "~data.sets.demonstrations", f"+data.sets={{{sets}}}", "steps=1"]


def test_each_data_set_of_a_mixture_is_evaluated(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation.I3D, "from_published", lambda place: Averages())
    given = [f"checkpoint={mixture}/gfdm", *settings(mixture, "kitchen", "street"), "fvd=here", "episodes=2"]
    succeed("eval", *given, f"output={tmp_path / 'out'}")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    kitchen, street = found["sets"]["kitchen"], found["sets"]["street"]
    assert (found["episodes"], kitchen["episodes"], street["episodes"]) == (3, 2, 1)
    for name in ("psnr", "psnr_still", "ssim"):
        mean = (2 * np.array(kitchen[name]) + np.array(street[name])) / 3
        np.testing.assert_allclose(found[name], mean, rtol=1e-5)
    assert kitchen["one_step"]["features"] > 0 and street["one_step"]["features"] is None
    assert found["one_step"]["features"] > 0
    assert street["fvd"] is None and (found["fvd"]["clips"], kitchen["fvd"]["clips"]) == (3, 2)
    assert found["fvd"]["imagined"] > 0 and "biased upwards" in found["fvd"]["warning"]
    clips = sorted(p.relative_to(tmp_path / "out" / "clips") for p in (tmp_path / "out").rglob("*.mp4"))
    assert list(map(str, clips)) == ["kitchen/0000.mp4", "kitchen/0001.mp4", "street/0002.mp4"]
    page = (tmp_path / "out" / "gallery.html").read_text()
    titles = ["<h2>kitchen</h2>", "kitchen_000: push", "kitchen_002: push", "<h2>street</h2>", "street_000"]
    places = [page.index(title) for title in [*titles, "<h2>All data sets</h2>"]]
    assert places == sorted(places) and page.count("3 imagined and as many real clips: biased upwards") == 1


def test_figures_of_a_data_set_do_not_depend_on_its_neighbours(mixture: Path, tmp_path: Path) -> None:
    for name, sets in (("one", ["kitchen"]), ("two", ["kitchen", "street"])):
        given = [f"checkpoint={mixture}/short", *settings(mixture, *sets), f"output={tmp_path / name}"]
        succeed("eval", *given)
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one["sets"]["kitchen"] == two["sets"]["kitchen"] and "fvd" not in one
    assert {**one["sets"]["kitchen"], "root": 0} == {
        name: one.get(name, 0) for name in one["sets"]["kitchen"]
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["fvd={place}/street"], "needs clips of at least 9 frames, this checkpoint imagines 3"),
        (["checkpoint={place}/gfdm", "fvd={place}/street"], "street/rgb_imagenet.pt: no such file"),
        (["camera=1"], "camera=1: {place}/street: episode street_000 has 1 videos"),
        (["split=test"], "kitchen/annotation/test: no annotations"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    mixture: Path, tmp_path: Path, changes: list[str], message: str
) -> None:
    given = [f"checkpoint={mixture}/short", *settings(mixture, "kitchen", "street")]
    given += [change.format(place=mixture) for change in changes]
    code, errors = command("eval", *given, f"output={tmp_path / 'out'}")
    assert code == 2 and message.format(place=mixture) in errors
    assert not (tmp_path / "out").exists()
