"""Samples of stage 3 per second: `python -m benchmarks.calvin_loader --folder <a split of CALVIN>`.

From the same frames, in random order, in batches of 32:
  published    np.load of the chunk's ten frames, pictures and states of each, as published loaders do
  folder, zip  Step3_DeFI.samples.RecordedSamples: the sample's frame alone, pictures resized to 256²
  images       a store of kind images: memory-mapped, 256² pixels
  latents      a store of kind latents: 32² × 4 float16 for each view
Rates are per second of processor time, so that other work on the machine does not count; the files are in the
page cache. Also printed: bytes per frame of the stores, and whether they yield what the folder does.
"""

import argparse
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.utils.data import default_collate

from defi.config import CONFIG_DIR
from defi.data.calvin import CalvinFolder, Settings
from defi.engine import checkpoint
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.model import GFDM
from Step3_DeFI.prepare import prepare
from Step3_DeFI.samples import RecordedSamples, SampleSettings
from Step3_DeFI.store import PolicyStore

CHUNK, MIN_REMAINING, BATCH, SIDE = 10, 21, 32, 256
KEYS = ("rgb_static", "rgb_gripper", "rel_actions", "robot_obs", "scene_obs")
# An autoencoder whose latents have Stable Video Diffusion's shape, with few channels within: it is not timed.
SIZES = [
    f"gfdm.image_size={SIDE}",
    "gfdm.vae={block_out_channels: [32, 32, 32, 32], layers_per_block: 1, latent_channels: 4}",
]


def settings(folder: Path, output: Path, kind: str, gfdm: Path) -> Any:
    """Of Step3_DeFI.prepare."""
    given = [
        f"data.root={folder.parent}",
        f"data.split={folder.name}",
        f"data.min_remaining={MIN_REMAINING}",
        f"output={output}",
    ]
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = compose("step3_prepare", [*given, *SIZES, f"store.kind={kind}", f"gfdm_checkpoint={gfdm}"])
    OmegaConf.resolve(cfg)
    return cfg


def make_zip(folder: Path, archive: Path) -> Path:
    """The split as it is downloaded: stored in a zip, in a folder of the data set's name."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            file.write(path, f"calvin/{folder.name}/{path.relative_to(folder)}")
    return archive / folder.name


def samples(root: Path, split: str) -> RecordedSamples:
    data = Settings(root=str(root), split=split).open("training")
    own = SampleSettings(min_remaining=MIN_REMAINING)
    return RecordedSamples(data, own, chunk=CHUNK, image_size=SIDE)


def published(data: CalvinFolder, starts: list[int], i: int) -> dict[str, Any]:
    """As published: all of the ten frames of a chunk, then the first picture is used."""
    frames = []
    for frame in range(starts[i], starts[i] + CHUNK):
        with np.load(data.path(frame)) as file:
            frames.append({key: file[key] for key in KEYS})
    stacked = {key: np.stack([frame[key] for frame in frames]) for key in KEYS}
    return {key: torch.from_numpy(value).float() for key, value in stacked.items()}


def rate(sample: Callable[[int], dict[str, Any]], size: int, seconds: float) -> float:
    """Samples per second of processor time, with the collation of batches."""
    rng, drawn = np.random.default_rng(0), 0
    default_collate([sample(i) for i in range(min(size, BATCH))])
    began, wall = time.process_time(), time.perf_counter()
    while time.process_time() - began < seconds and time.perf_counter() - wall < 10 * seconds:
        default_collate([sample(int(i)) for i in rng.integers(size, size=BATCH)])
        drawn += BATCH
    return drawn / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="say, data/calvin/training")
    parser.add_argument("--seconds", type=float, default=5.0, help="of processor time, for each")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = given.folder.resolve()
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        torch.manual_seed(0)
        cfg = settings(folder, work / "unused", "images", work)
        checkpoint.save(GFDM.from_config(GFDMConfig.from_preset(cfg)), work / "gfdm", step=1, config={})
        stores = {
            kind: PolicyStore(prepare(settings(folder, work / kind, kind, work / "gfdm")))
            for kind in ("images", "latents")
        }
        make_zip(folder, work / "calvin.zip")
        raw, archive = (samples(root, folder.name) for root in (folder.parent, work / "calvin.zip"))
        starts = (raw.data.starts[raw.starts[:, 0]] + raw.starts[:, 1]).tolist()
        sources = {
            "published": lambda i: published(raw.data.files, starts, i),
            "folder": raw.__getitem__,
            "zip": archive.__getitem__,
            **{kind: store.__getitem__ for kind, store in stores.items()},
        }
        for name, sample in sources.items():
            print(f"{name:10}{rate(sample, len(raw), given.seconds):9.0f} samples/s")
        for kind, store in stores.items():
            print(f"{kind:10}{store.inputs[0].nbytes / 1024:9.1f} KB per frame, both views")
        for i in range(len(raw)):
            expected, packed, zipped = raw[i], stores["images"][i], archive[i]
            for found in (packed, zipped):
                assert found["text"] == expected["text"] and found.keys() == expected.keys()
                assert all(torch.equal(found[key], expected[key]) for key in ("images", "actions")), i
        print(f"{'equal':10}{len(raw):9} samples of folder, zip and images store, bit for bit")


if __name__ == "__main__":
    main()
