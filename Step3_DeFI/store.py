"""The policy's training data as a command names them: a packed store, or the recordings as they are.

`Step3_DeFI.prepare` makes a store:

<store>/manifest.json   written last: what is in it, from which data, with which stage-1 checkpoint
        inputs.npy      one of three `kind`s, a row per distinct observation:
                            features  float16 [rows, draws, V, F, L, C]  of the frozen GFDM
                            latents   float16 [rows, V, 4, h, w]         scaled VAE mode
                            images    uint8   [rows, V, 3, H, W]
        actions.npy, index.npy, video.npy (only with `store.videos`): see `PolicySamples`
        robot_obs.npy, spans.npy: see `CalvinSamples`; training reads neither
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from defi.config import typed
from defi.data.calvin import TRAINING, VALIDATION
from defi.engine.weights import fingerprint
from defi.errors import UserError
from defi.files import read_json
from defi.npy import map_npy
from Step3_DeFI.config import check_choice
from Step3_DeFI.policy import DeFI
from Step3_DeFI.samples import CalvinSamples, PolicySamples, SampleRules

MANIFEST, INPUTS = "manifest.json", "inputs.npy"
PROGRESS, DONE = "progress.json", "done.npy"  # while it is made: the manifest to be, a byte per row
OLDER = {"tail": "min_remaining", "gfdm": "stage1_weights"}  # names in older manifests
INPUT_DIMENSIONS = {"features": 6, "latents": 5, "images": 5}  # by kind


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

    @classmethod
    def read(cls, file: Path, fix: str) -> "StoreManifest":
        """Raises UserError, with the `fix`, if the file is missing or damaged."""
        record = {OLDER.get(name, name): value for name, value in read_json(file, fix).items()}
        record.pop("look", None)
        manifest = typed(cls, record, str(file))
        check_choice(f"{file}: kind", manifest.kind, INPUT_DIMENSIONS)
        if not all(isinstance(text, str) for text in manifest.texts):
            raise UserError(f"{file}: texts: not a list of texts; {fix}")
        return manifest


class PolicyStore(PolicySamples):
    """Samples of a store. UserError: there is none, it is not complete, or a file is damaged."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            fault = "no prepared data here; make it with Step3_DeFI.prepare, or give data.root instead"
            if (self.folder / PROGRESS).exists():
                fault = "not finished; run Step3_DeFI.prepare again with resume=true"
            raise UserError(f"{self.folder}: {fault}")
        self.manifest = made = StoreManifest.read(self.folder / MANIFEST, "prepare the data again")
        self.kind, self.texts = made.kind, made.texts
        self.fingerprint = f"{made.fingerprint}-{made.kind}-{made.samples}"
        rows = (made.rows,)
        if made.kind == "features":
            self.draws, rows = made.draws, (made.rows, made.draws)
        self.inputs = self._array("inputs", rows, INPUT_DIMENSIONS[made.kind])
        self.actions = self._array("actions", (made.samples, made.chunk), 3)
        self.index = self._array("index", (made.samples, 2), 2)
        self.video = None if made.video_stride is None else self._array("video", (made.samples,), 2)
        inside = (self.index >= 0) & (self.index < (made.rows, len(made.texts)))
        if not inside.all():
            raise UserError(f"{self.folder}: index.npy names what does not exist; prepare it again")

    def _array(self, name: str, shape: tuple[int, ...], dimensions: int) -> np.ndarray:
        """An array whose shape begins with `shape`."""
        file = self.folder / f"{name}.npy"
        array = map_npy(file)
        if array.ndim != dimensions or array.shape[: len(shape)] != shape:
            raise UserError(f"{file}: has shape {array.shape}, the manifest says {shape}; prepare it again")
        return array

    def check_fit(self, policy: DeFI, clip: range | None) -> None:
        """Raises UserError if this policy cannot learn from it, with a video `clip` of each sample if any."""
        made, config = self.manifest, policy.config
        if made.kind == "features" and config.finetune.mode != "none":
            raise UserError(
                f"{self.folder}: stored features have no gradient for gfdm.finetune={config.finetune.mode}; "
                "prepare a store with store.kind=latents, or leave finetune at none"
            )
        wanted: dict[str, object] = {"chunk": config.chunk, "image_size": policy.image_size}
        if made.kind == "features":
            wanted |= {"feature_noise": config.feature_noise, "gfdm_precision": config.video_precision}
        if made.kind != "images":
            wanted["stage1_weights"] = fingerprint(policy.sources["gfdm"])
        for name, value in wanted.items():
            if (found := getattr(made, name)) != value:
                raise UserError(
                    f"{self.folder}: prepared with {name}={found}, the policy has {value}; prepare it again"
                )
        kept = None if self.video is None else (self.video.shape[1], made.video_stride)
        if clip is not None and kept != (len(clip), clip.step):
            raise UserError(
                f"{self.folder}: holds no videos of {len(clip)} frames, {clip.step} apart, for "
                f"gfdm.video_loss; prepare it with store.videos=true gfdm.frame_step={clip.step}, or leave "
                "video_loss at 0"
            )


def open_samples(section: DictConfig, policy: DeFI) -> dict[str, PolicySamples]:
    """`training`, and `held_out` where the section `data` names some.

    Raises:
        UserError: the section names both kinds of data or none, or they are missing, damaged or do not fit.
    """
    root, config = section.root, policy.config
    if (section.store is None) == (root is None):
        raise UserError(
            f"data.store={section.store}, data.root={root}: give one of them, a store made by "
            "Step3_DeFI.prepare or demonstrations in CALVIN's format"
        )
    places = {"training": section.store or f"{root}/{section.split}"}
    if section.held_out is not None:
        of_root = root is not None and section.held_out in (TRAINING, VALIDATION)
        places["held_out"] = f"{root}/{section.held_out}" if of_root else section.held_out
    samples: dict[str, PolicySamples] = {}
    for name, place in places.items():
        # For the video loss the frames that follow a sample, of what is trained on.
        filmed = config.finetune.video_loss and name == "training"
        clip = policy.gfdm.config.clip_frames if filmed else None
        if root is None:
            samples[name] = store = PolicyStore(place)
            store.check_fit(policy, clip)
        else:
            rules = SampleRules(config.chunk, section.min_remaining, section.stride, section.spans)
            samples[name] = CalvinSamples(place, rules, image_size=policy.image_size, clip=clip)
    return samples
