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

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from defi.config import typed
from defi.errors import UserError
from defi.files import read_json
from defi.npy import map_npy
from Step3_DeFI.plan import Plan
from Step3_DeFI.samples import PolicySamples

MANIFEST, PROGRESS = "manifest.json", "progress.json"
INPUTS, ACTIONS, INDEX, VIDEO = "inputs.npy", "actions.npy", "index.npy", "video.npy"
ROBOT, SPANS = "robot_obs.npy", "spans.npy"
INPUT_DIMENSIONS = {"features": 6, "latents": 5, "images": 5}  # of inputs.npy, by kind
OLDER = {"tail": "min_remaining"}  # names in older manifests


@dataclass
class StoreManifest:
    """What a store holds.

    gfdm: fingerprint of the stage-1 weights; gfdm_precision: what their UNet and VAE computed in.
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
    gfdm: str | None = None
    feature_noise: str | None = None
    video_stride: int | None = None
    spans: str = "annotated"
    gfdm_precision: str = "no"
    tasks: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path, fix: str) -> "StoreManifest":
        """Raises UserError, with the `fix`, if the file is missing or damaged."""
        record = {OLDER.get(name, name): value for name, value in read_json(file, fix).items()}
        for name in ("look", "batch"):  # the rows' shape in older ones; of preparation alone
            record.pop(name, None)
        manifest = typed(cls, record, str(file))
        fits = manifest.kind in INPUT_DIMENSIONS and (manifest.kind == "features" or manifest.draws == 1)
        if not fits or not all(isinstance(text, str) for text in manifest.texts):
            raise UserError(f"{file}: not the manifest of a policy's store; {fix}")
        return manifest


def write_plan(folder: Path, plan: Plan) -> None:
    """All arrays but the inputs."""
    arrays = {INDEX: plan.index, ACTIONS: plan.actions, ROBOT: plan.robot_obs, SPANS: plan.spans}
    if plan.video is not None:
        arrays[VIDEO] = plan.video
    for name, array in arrays.items():
        np.save(folder / name, array)


class PolicyStore(PolicySamples):
    """Samples of a store.

    Raises:
        UserError: there is no store, it is not complete, or a file is damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            if (folder / PROGRESS).exists():
                raise UserError(f"{folder}: not finished; run Step3_DeFI.prepare again with resume=true")
            raise UserError(
                f"{folder}: no prepared data here; make it with Step3_DeFI.prepare, or give demonstrations "
                "as data.root"
            )
        self.manifest = made = StoreManifest.read(folder / MANIFEST, "prepare the data again")
        self.kind, self.draws, self.texts = made.kind, made.draws, made.texts
        self.fingerprint = f"{made.fingerprint}-{made.kind}-{made.samples}"
        shape = (made.rows, made.draws) if made.kind == "features" else (made.rows,)
        self.inputs = self._array(INPUTS, shape, INPUT_DIMENSIONS[made.kind])
        self.actions = self._array(ACTIONS, (made.samples, made.chunk), 3)
        self.index = self._array(INDEX, (made.samples, 2), 2)
        self.video = None if made.video_stride is None else self._array(VIDEO, (made.samples,), 2)
        if made.samples and (
            self.index.min() < 0 or (self.index.max(0) >= (made.rows, len(made.texts))).any()
        ):
            raise UserError(f"{folder / INDEX}: names rows or texts that are not there; prepare it again")

    def _array(self, name: str, shape: tuple[int, ...], dimensions: int) -> np.ndarray:
        """An array whose shape begins with `shape`."""
        array = map_npy(self.folder / name)
        if array.ndim != dimensions or array.shape[: len(shape)] != shape:
            raise UserError(
                f"{self.folder / name}: has shape {array.shape}, the manifest says {shape}; prepare it again"
            )
        return array
