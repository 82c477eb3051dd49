"""A packed store of the policy's training data, made by `Step3_DeFI.prepare`.

<store>/manifest.json   written last: what is in it, from which data, with which stage-1 checkpoint
        inputs.npy      one of three `kind`s, a row per distinct observation:
                            features  float16 [rows, draws, V, F, L, C]  of the frozen GFDM
                            latents   float16 [rows, V, 4, h, w]         scaled VAE mode
                            images    uint8   [rows, V, 3, H, W]
        actions.npy     float32 [N, K, 7]
        index.npy       int64 [N, 2]: row of inputs, number of the instruction
        video.npy       int64 [N, F]: rows of inputs, the frames that really follow (only with `store.videos`)
        robot_obs.npy   float32 [N, 15] at the sample's frame, and
        spans.npy       int64 [N, 2]: annotated span (-1: none), frame in the source; training reads neither
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from defi.config import typed
from defi.errors import UserError
from defi.files import read_json
from defi.npy import map_npy
from Step3_DeFI.plan import Plan
from Step3_DeFI.samples import PolicySamples

MANIFEST, INPUTS = "manifest.json", "inputs.npy"
PROGRESS, DONE = "progress.json", "done.npy"  # while it is made: the manifest to be, a byte per batch of rows
INPUT_DIMENSIONS = {"features": 6, "latents": 5, "images": 5}  # by kind
OLDER = {"tail": "min_remaining", "gfdm": "stage1_weights"}  # names in older manifests
NOT_READ = ("look", "batch")  # the rows' shape in older ones; of preparation alone


@dataclass
class StoreManifest:
    """What a store holds.

    stage1_weights: their fingerprint; gfdm_precision: what UNet and VAE computed in.
    video_stride: frames between the frames of the kept videos; None: no videos.
    """

    kind: str
    samples: int
    rows: int
    draws: int
    chunk: int
    image_size: int
    texts: list[str]
    source: str
    fingerprint: str
    min_remaining: int
    stride: int
    seed: int
    stage1_weights: str | None = None
    feature_noise: str | None = None
    video_stride: int | None = None
    spans: str = "annotated"
    gfdm_precision: str = "no"
    tasks: dict[str, int] = field(default_factory=dict)

    def to_json(self, **more: Any) -> str:
        return json.dumps(asdict(self) | more, indent=1)

    @classmethod
    def read(cls, file: Path, fix: str) -> "StoreManifest":
        """Raises UserError, with the `fix`, if the file is missing or damaged."""
        record = {OLDER.get(name, name): value for name, value in read_json(file, fix).items()}
        manifest = typed(cls, {n: value for n, value in record.items() if n not in NOT_READ}, str(file))
        fits = manifest.kind in INPUT_DIMENSIONS and (manifest.kind == "features" or manifest.draws == 1)
        if not fits or not all(isinstance(text, str) for text in manifest.texts):
            raise UserError(f"{file}: not the manifest of a policy's store; {fix}")
        return manifest


def write_plan(folder: Path, plan: Plan) -> None:
    """All arrays but the inputs."""
    for name in ("index", "actions", "robot_obs", "spans", "video"):
        if (array := getattr(plan, name)) is not None:
            np.save(folder / f"{name}.npy", array)


class PolicyStore(PolicySamples):
    """Samples of a store.

    Raises:
        UserError: there is no store, it is not complete, or a file is damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            fault = "no prepared data here; make it with Step3_DeFI.prepare, or give data.root instead"
            if (self.folder / PROGRESS).exists():
                fault = "not finished; run Step3_DeFI.prepare again with resume=true"
            raise UserError(f"{self.folder}: {fault}")
        self.manifest = made = StoreManifest.read(self.folder / MANIFEST, "prepare the data again")
        self.kind, self.draws, self.texts = made.kind, made.draws, made.texts
        self.fingerprint = f"{made.fingerprint}-{made.kind}-{made.samples}"
        draws = (made.draws,) if made.kind == "features" else ()
        self.inputs = self._array("inputs", (made.rows, *draws), INPUT_DIMENSIONS[made.kind])
        self.actions = self._array("actions", (made.samples, made.chunk), 3)
        self.index = self._array("index", (made.samples, 2), 2)
        self.video = None if made.video_stride is None else self._array("video", (made.samples,), 2)
        ends = (made.rows, len(made.texts))
        if made.samples and not (self.index.min() >= 0 and (self.index.max(0) < ends).all()):
            raise UserError(
                f"{self.folder}: index.npy names rows or texts that are not there; prepare it again"
            )

    def _array(self, name: str, shape: tuple[int, ...], dimensions: int) -> np.ndarray:
        """An array whose shape begins with `shape`."""
        file = self.folder / f"{name}.npy"
        array = map_npy(file)
        if array.ndim != dimensions or array.shape[: len(shape)] != shape:
            raise UserError(f"{file}: has shape {array.shape}, the manifest says {shape}; prepare it again")
        return array
