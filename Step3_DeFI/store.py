"""The policy's training data as a command names them: a packed store, or the recordings as they are.

`Step3_DeFI.prepare` makes a store:

<store>/manifest.json   written last: what is in it, from which data, with which stage-1 checkpoint
        inputs.npy      one of three `kind`s, a row per distinct observation:
                            features  float16 [rows, draws, V, F, L, C]  of the frozen GFDM
                            latents   float16 [rows, V, 4, h, w]         scaled VAE mode
                            images    uint8   [rows, V, 3, H, W]
        index.npy, video.npy (only with `store.videos`): see `PolicySamples`
        actions.npy, state.npy  float32 [M, A], [M, S] of all frames of the data, in the robot's units
        starts.npy  number of the episode and position in it of each sample; training does not read it
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from defi.config import typed
from defi.data import Dataset, Part, read_sets, read_settings
from defi.data.mixture import Mixture
from defi.data.motions import Motions
from defi.engine.weights import fingerprint
from defi.errors import UserError
from defi.files import read_json
from defi.npy import map_npy
from defi.robot.spec import Robot
from Step3_DeFI.config import check_choice
from Step3_DeFI.policy import DeFI
from Step3_DeFI.samples import PolicySamples, RecordedSamples, SampleSettings

MANIFEST, INPUTS = "manifest.json", "inputs.npy"
PROGRESS, DONE = "progress.json", "done.npy"  # while it is made: the manifest to be, a byte per row
INPUT_DIMENSIONS = {"features": 6, "latents": 5, "images": 5}  # by kind


@dataclass
class StoreManifest:
    """What a store holds.

    robot, normalisation: as the data set says. frames: M. settings: of the data, but for its place.
    stage1_weights: their fingerprint; gfdm_precision: what UNet and VAE computed in.
    video_stride: frames between the frames of the kept videos; None: no videos.
    """

    kind: str
    samples: int
    rows: int
    draws: int
    frames: int
    chunk: int
    robot: Robot
    normalisation: str
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
    gfdm_precision: str = "no"
    tasks: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path, fix: str) -> "StoreManifest":
        """Raises UserError, with the `fix`, if the file is missing or damaged."""
        record = read_json(file, fix)
        if "robot" not in record:
            raise UserError(f"{file}: of an older version, which did not note the robot; {fix}")
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
        self.chunk, self.normalisation = made.chunk, made.normalisation
        self.fingerprint = f"{made.fingerprint}-{made.kind}-{made.samples}"
        rows = (made.rows,)
        if made.kind == "features":
            self.draws, rows = made.draws, (made.rows, made.draws)
        self.inputs = self._array("inputs", rows, INPUT_DIMENSIONS[made.kind])
        sizes = len(made.robot.actions), len(made.robot.state or ())
        motions = (
            self._array(*each)
            for each in zip(("actions", "state"), ((made.frames, s) for s in sizes), (2, 2))
        )
        self.motions = Motions(np.arange(made.frames), *motions)
        self.index = self._array("index", (made.samples, 3), 2)
        self.video = None if made.video_stride is None else self._array("video", (made.samples,), 2)
        ends = made.rows, len(made.texts), made.frames - made.chunk + 1
        inside = (self.index >= 0) & (self.index < ends)
        if not inside.all():
            raise UserError(f"{self.folder}: index.npy names what does not exist; prepare it again")

    def robot(self) -> Robot:
        return self.manifest.robot

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


@dataclass(kw_only=True)
class StoreSettings:
    """A store, and the one of its held-out samples, in the place of a format's settings."""

    store: str
    held_out: str | None = None
    weight: float = 1.0


@dataclass
class Source:
    """One data set that a policy learns from: as it is, with `settings` of its samples, or as a store."""

    data: Dataset | PolicyStore
    settings: SampleSettings | StoreSettings

    def samples(self, policy: DeFI, clip: range | None = None) -> PolicySamples:
        """For this policy, with a video `clip` of each if any. UserError: it cannot learn from them."""
        if isinstance(self.data, PolicyStore):
            self.data.check_fit(policy, clip)
            found: PolicySamples = self.data
        else:
            sizes = {"chunk": policy.config.chunk, "image_size": policy.image_size}
            found = RecordedSamples(self.data, self.settings, clip=clip, **sizes)
        found.with_state = policy.config.state
        return found


def open_sources(section: Mapping[str, Any], part: Part) -> dict[str, Source]:
    """The data sets that a section `data` names, by name; none where nothing is held out.

    Raises:
        UserError: the section names both a store and data or neither, or they are missing or damaged.
    """
    section = dict(section)
    store, sets = section.pop("store", None), section.get("sets")
    if sets is not None:
        stores = {
            name: typed(StoreSettings, s, f"data.sets.{name}") for name, s in sets.items() if "store" in s
        }
        rest = {name: s for name, s in sets.items() if name not in stores}
        chosen = read_sets({**section, "sets": rest}, SampleSettings) if rest or not stores else {}
    elif (store is None) == (section.get("root") is None):
        what = "a store made by Step3_DeFI.prepare, or a robot's data"
        raise UserError(f"data.store={store}, data.root={section.get('root')}: give one of them, {what}")
    elif store is not None:
        stores, chosen = {"data": StoreSettings(store=store, held_out=section["held_out"])}, {}
    else:
        stores, chosen = {}, {"data": read_settings(section, SampleSettings)}
    found = {}
    for name, own in stores.items():
        if folder := own.held_out if part == "held_out" else own.store:
            found[name] = Source(PolicyStore(folder), own)
    for name, (settings, samples) in chosen.items():
        if part != "held_out" or settings.holds_out():
            found[name] = Source(settings.open(part), samples)
    return {name: found[name] for name in sets or found if name in found}  # in the order given


def build_samples(
    sources: Mapping[str, Source], policy: DeFI, clip: range | None = None
) -> PolicySamples | Mixture[PolicySamples]:
    """What a policy learns from, with a video `clip` of each sample if any.

    Raises:
        UserError: it cannot, or the data sets are of different kinds.
    """
    found = {name: source.samples(policy, clip) for name, source in sources.items()}
    if len(found) == 1:
        return found.popitem()[1]
    kinds = {name: samples.kind for name, samples in found.items()}
    if len(set(kinds.values())) > 1:
        raise UserError(f"data.sets: {kinds}; give all as they are, or stores of one kind (store.kind)")
    return Mixture(found, {name: source.settings.weight for name, source in sources.items()})


def members(samples: PolicySamples | Mixture[PolicySamples]) -> list[PolicySamples]:
    """The data sets of a mixture, or the only one."""
    return list(samples.sets.values()) if isinstance(samples, Mixture) else [samples]
