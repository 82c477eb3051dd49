"""Random numbers: all that one step and one look of each stage draw come from streams that share nothing."""

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pytest
import torch
from made_data import MadeData
from numpy.lib.stride_tricks import sliding_window_view
from policy_fakes import build_gfdm, build_policy
from torch.utils.data import Dataset, default_collate

from defi.engine import data
from defi.engine.data import SampleNoise, SeededDataset, seed_of, stream
from Step1_GFDM.config import VAESizes
from Step1_GFDM.vae import VAEConfig, VideoVAE
from Step2_GIDM.data.images import Augmentation
from Step2_GIDM.data.pairs import PairDataset
from Step3_DeFI.acting import Policy

RUNS, SAMPLES = (0, 1), 4  # neighbouring seeds of runs, neighbouring samples


class Spy(np.random.Generator):
    """A generator that keeps what is drawn from it, and where it began."""

    def __init__(self, generator: np.random.Generator) -> None:
        super().__init__(generator.bit_generator)
        state = self.bit_generator.state["state"]
        self.began, self.drawn = (state["state"], state["inc"]), []

    def _keep(self, found):
        self.drawn.append(np.ravel(np.asarray(found, np.float32)))
        return found

    def standard_normal(self, *args, **settings):
        return self._keep(super().standard_normal(*args, **settings))

    def random(self, *args, **settings):
        return self._keep(super().random(*args, **settings))

    def uniform(self, *args, **settings):
        return self._keep(super().uniform(*args, **settings))


@pytest.fixture
def spies(monkeypatch: pytest.MonkeyPatch) -> list[Spy]:
    """All streams that are opened in a test."""
    opened: list[Spy] = []

    def spied(*name: object) -> Spy:
        opened.append(Spy(stream(*name)))
        return opened[-1]

    monkeypatch.setattr(data, "stream", spied)
    return opened


class Samples(Dataset):
    """The same numbers in every sample; the engine adds the seeds."""

    def __init__(self, sample: dict) -> None:
        self.sample_itself = sample

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict:
        return self.sample_itself


def batches(sample: dict) -> list[dict]:
    """What the engine hands to a model in one step of each run."""
    sets = [SeededDataset(Samples(sample), seed, tolerant=False) for seed in RUNS]
    return [default_collate([each[(0, index)] for index in range(SAMPLES)]) for each in sets]


def assert_nothing_is_shared(spies: list[Spy], *, least: int) -> None:
    """No stream begins where another does, no three numbers in a row occur twice, and single numbers recur no
    more often than rounding to float32 makes those of one long stream recur."""
    assert len({spy.began for spy in spies}) == len(spies)
    streams = [np.concatenate(spy.drawn) for spy in spies if spy.drawn]
    values = np.concatenate(streams)
    assert len(values) >= least
    in_a_row = np.concatenate([sliding_window_view(part, 3) for part in streams if len(part) >= 3])
    assert len(np.unique(in_a_row, axis=0)) == len(in_a_row)
    expected = recurring(np.random.default_rng(0).standard_normal(len(values), np.float32))
    assert recurring(values) <= expected + 6 * expected**0.5 + 3


def recurring(values: np.ndarray) -> int:
    return len(values) - len(np.unique(values))


@pytest.mark.parametrize("pixels", [False, True])
def test_stage_1(spies: list[Spy], pixels: bool) -> None:
    model = build_gfdm()
    frames = {"frames": torch.rand(3, 3, 16, 16), "text": "push"}
    latents = {"latents": torch.randn(3, 4, 8, 8), "text": "push"}
    for batch in batches(frames if pixels else latents):
        model(batch)
    each = 2 + 3 * 4 * 8 * 8 + (1 + 3 * 16 * 16 if pixels else 0)  # dropout, σ, video; strength, condition
    assert_nothing_is_shared(spies, least=len(RUNS) * SAMPLES * each)


def test_stage_1_autoencoder(spies: list[Spy]) -> None:
    model = VideoVAE.from_config(VAEConfig(image_size=16, sizes=VAESizes([32, 32], 1)))
    for batch in batches({"frames": torch.rand(2, 3, 16, 16)}):
        model(batch)
    assert_nothing_is_shared(spies, least=len(RUNS) * SAMPLES * 2 * 4 * 8 * 8)


def test_stage_2(spies: list[Spy]) -> None:
    def noise(episode: int, positions: Sequence[int]) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 255, (len(positions), 20, 20, 3), np.uint8)

    data = MadeData([40], noise)
    pairs = PairDataset(data, ["front"], image_size=16, distance=(3, 9), augmentation=Augmentation())
    for run, epoch, index in product(RUNS, range(3), range(39)):
        SeededDataset(pairs, run, tolerant=False)[(epoch, index)]
    assert_nothing_is_shared(spies, least=len(RUNS) * 3 * 39 * 4)  # brightness, contrast, saturation, hue


def train_step() -> int:
    """A step on pictures that finetunes the video model as well; returns how many numbers it needs."""
    settings = {"draws": 2, "text_dropout": 0.5}
    policy = build_policy(diffusion=settings, finetune={"mode": "full", "video_loss": 1.0})
    video = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8)
    for batch in batches(
        {"images": video[:, 0], "video": video, "text": "push", "actions": torch.zeros(10, 7)}
    ):
        policy(batch)
    clip = 3 * 4 * 8 * 8
    return len(RUNS) * SAMPLES * (2 * clip + 1 + 2 + 2 * 70 + 2 * (2 + clip))


def look() -> int:
    """Looks of neighbouring chains; returns how many numbers they need."""
    images = {name: np.zeros((20, 20, 3), np.uint8) for name in ("static", "gripper")}
    seeds = list(product(RUNS, range(2), range(2)))
    seen = [{"images": images, "instruction": "push"}] * len(seeds)
    Policy(build_policy()).infer_batch(seen, [seed_of("rollout", *seed) for seed in seeds])
    return len(seeds) * (2 * 3 * 4 * 8 * 8 + 70)


@pytest.mark.parametrize("parts", [(train_step,), (look,), (train_step, look)])
def test_stage_3(spies: list[Spy], parts: tuple[Callable[[], int], ...]) -> None:
    assert_nothing_is_shared(spies, least=sum(part() for part in parts))


def test_streams_are_kept_apart_by_the_whole_seed() -> None:
    """Also where PyTorch's generator, which reads 32 bits of its seed, would not."""
    seeds = torch.tensor([5, 5 + (1 << 32), 5 + (1 << 40)])
    noise = SampleNoise(seeds, torch.device("cpu"))
    drawn = noise.normal("a", 100)
    assert not any(torch.equal(drawn[i], drawn[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(noise.normal("a", 100), drawn) and not torch.equal(noise.normal("b", 100), drawn)
    assert torch.equal(SampleNoise(seeds[2:], torch.device("cpu")).normal("a", 100), drawn[2:])
    assert seed_of("a", 1, 23) != seed_of("a", 12, 3) != seed_of("a 1", 2, 3)


def test_noise_is_standard_and_uniform() -> None:
    noise = SampleNoise(torch.arange(50), torch.device("cpu"))
    normal, uniform = noise.normal("n", 2000), noise.uniform("u", 2000)
    assert normal.dtype == uniform.dtype == torch.float32
    assert abs(normal.mean()) < 0.01 and abs(normal.std() - 1) < 0.01
    assert abs(uniform.mean() - 0.5) < 0.005 and uniform.min() >= 0 and uniform.max() < 1
