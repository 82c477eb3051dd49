"""Training data of the policy: what samples are, and a packed store of them, made by `Step3_DeFI.prepare`.

<store>/manifest.json   written last: what is in it, from which data, with which stage-1 checkpoint
        inputs.npy      one of three `kind`s, a row per distinct look:
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
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from defi.config import typed
from defi.errors import UserError
from defi.files import read_json
from defi.npy import map_npy

MANIFEST, PROGRESS = "manifest.json", "progress.json"
INPUTS, ACTIONS, INDEX, VIDEO = "inputs.npy", "actions.npy", "index.npy", "video.npy"
ROBOT, SPANS = "robot_obs.npy", "spans.npy"
KINDS = ("features", "latents", "images")


class PolicySamples(Protocol):
    """A data set of the policy's, packed (`PolicyStore`) or straight from recordings (`CalvinSamples`).

    Samples are {features | latents | images, text, actions [K, A]} and, where wanted, `video` [V, F, ...].
    texts: the distinct instructions.
    """

    texts: list[str]

    @property
    def fingerprint(self) -> str:
        """Identifies the data, for the checkpoints' manifests."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, Any]: ...


@dataclass
class StoreManifest:
    """What a store holds. look: shape of one row less its draws. gfdm: fingerprint of the stage-1 weights.

    video_stride: frames between the frames of the kept videos; None: no videos. spans: annotated or all.
    gfdm_precision: what UNet and VAE computed in.
    """

    kind: str
    samples: int
    rows: int
    draws: int
    look: list[int]
    chunk: int
    image_size: int
    texts: list[str]
    source: str
    fingerprint: str
    tail: int
    stride: int
    seed: int
    gfdm: str | None = None
    feature_noise: str | None = None
    video_stride: int | None = None
    spans: str = "annotated"
    gfdm_precision: str = "no"
    tasks: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def read_manifest(folder: Path) -> StoreManifest:
    """The manifest of a complete store.

    Raises:
        UserError: there is no store, it is not complete, or its manifest is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        if (folder / PROGRESS).exists():
            raise UserError(
                f"{folder}: preparation was not finished; run Step3_DeFI.prepare again with resume=true"
            )
        raise UserError(
            f"{folder}: no prepared data here; make it with Step3_DeFI.prepare, or give demonstrations as "
            "data.root"
        )
    manifest = typed(StoreManifest, read_json(file, "prepare the data again"), str(file))
    whole = manifest.kind in KINDS and (manifest.kind == "features" or manifest.draws == 1)
    if not whole or not all(isinstance(text, str) for text in manifest.texts):
        raise UserError(f"{file}: not that of a policy's store; prepare the data again")
    return manifest


class PolicyStore(Dataset):
    """Samples of a store; of features in several draws, a sample per draw."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        m = self.manifest
        self.texts = m.texts
        draws = (m.draws,) if m.kind == "features" else ()
        self.inputs = self._array(INPUTS, (m.rows, *draws, *m.look))
        self.actions = self._array(ACTIONS, (m.samples, m.chunk, None))
        self.index = self._array(INDEX, (m.samples, 2))
        if m.samples and not (self.index.min() >= 0 and (self.index.max(0) < (m.rows, len(m.texts))).all()):
            raise UserError(
                f"{self.folder / INDEX}: names rows or texts that are not there; prepare it again"
            )
        self.video = None if m.video_stride is None else self._array(VIDEO, (m.samples, None))

    def _array(self, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
        file = self.folder / name
        array = map_npy(file)
        if len(array.shape) != len(shape) or any(e not in (None, n) for n, e in zip(array.shape, shape)):
            raise UserError(f"{file}: has shape {array.shape}, the manifest says {shape}; prepare it again")
        return array

    @property
    def fingerprint(self) -> str:
        """Identifies the data, for the checkpoints' manifests."""
        return f"{self.manifest.fingerprint}-{self.manifest.kind}-{self.manifest.samples}"

    def __len__(self) -> int:
        return self.manifest.samples * self.manifest.draws

    def __getitem__(self, i: int) -> dict[str, Any]:
        sample, draw = divmod(i, self.manifest.draws)
        row, text = self.index[sample]
        look = self.inputs[row, draw] if self.manifest.kind == "features" else self.inputs[row]
        found = {
            self.manifest.kind: torch.from_numpy(np.array(look)),
            "text": self.manifest.texts[text],
            "actions": torch.from_numpy(np.array(self.actions[sample])),
        }
        if self.video is not None:
            found["video"] = torch.from_numpy(self.inputs[self.video[sample]]).transpose(0, 1)
        return found
