"""CALVIN-format demonstrations → the policy's packed store (see `Step3_DeFI.data`).

    python -m Step3_DeFI.prepare data.root=<folder> output=<store> gfdm_checkpoint=<run> [key=value …]

`store.kind=features` runs the frozen stage 1 once per sample, so that training needs no video model;
`latents` stores what its VAE makes of the pictures, `images` only resized pictures (any stage 1 will do).
The root may be CALVIN's zip itself. Processes of `accelerate launch` share the work; a killed run goes on
with `resume=true`, on any number of processes.
"""

import json
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from omegaconf import DictConfig
from rich.progress import track
from torch import Tensor

from defi.calvin import CalvinFolder
from defi.config import entry, typed
from defi.engine.checkpoint import find_weights
from defi.engine.data import seed_of
from defi.engine.output import check_output, prepare_output, write_file
from defi.engine.weights import fingerprint
from defi.errors import UserError, writing
from defi.files import read_json
from defi.processes import print_once, processes, share
from defi.text import CLIPText, TextConfig
from Step1_GFDM.model import GFDM
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.data import (
    ACTIONS,
    INDEX,
    INPUTS,
    KINDS,
    MANIFEST,
    PROGRESS,
    ROBOT,
    SPANS,
    VIDEO,
    StoreManifest,
)
from Step3_DeFI.features import encode_views, imagine, keep_in, video_noise
from Step3_DeFI.observation import CAMERAS
from Step3_DeFI.samples import Plan, following, plan_samples, read_looks
from Step3_DeFI.sources import check_gfdm

DONE = "done.npy"
RESULTS = ("samples", "rows", "look", "texts", "tasks")  # of a store: what follows from data and settings


@dataclass
class Encoder:
    """Pictures of looks → rows of `inputs.npy`. `gfdm` is None for `images`."""

    kind: str
    draws: int
    seed: int
    gfdm: GFDM | None
    feature_noise: str
    device: torch.device

    def row_shape(self, policy: PolicyConfig, image_size: int) -> tuple[int, ...]:
        """Of one look, draws included."""
        if self.kind == "images":
            return policy.views, 3, image_size, image_size
        config = self.gfdm.config
        if self.kind == "latents":
            size = config.latent_size
            return policy.views, config.vae.latent_channels, size, size
        tokens = policy.frames, policy.feature_tokens, policy.feature_channels
        return self.draws, policy.views, *tokens

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "N V 3 H W"], texts: list[str], first_row: int) -> np.ndarray:
        """Rows `first_row` … of the store; their noise depends on row, draw and seed alone."""
        if self.kind == "images":
            return images.numpy()
        latents = encode_views(self.gfdm, images.to(self.device))
        if self.kind == "latents":
            return latents.half().cpu().numpy()
        draws = [
            imagine(self.gfdm, latents, texts, noise=self._noise(first_row, len(images), draw))
            for draw in range(self.draws)
        ]
        return torch.stack(draws, dim=1).half().cpu().numpy()

    def _noise(self, first_row: int, rows: int, draw: int) -> Float[Tensor, "N V F 4 h w"]:
        seeds = [seed_of("store", self.seed, row, draw) for row in range(first_row, first_row + rows)]
        noise = partial(video_noise, self.gfdm, kind=self.feature_noise, device=self.device)
        return noise(torch.tensor(seeds), views=len(CAMERAS))


class Progress:
    """Which batches of rows are on disk, whichever process wrote them: a byte for each, in a file."""

    def __init__(self, output: Path, rows: int) -> None:
        self.rows, self.batch = rows, json.loads((output / PROGRESS).read_text())["batch"]
        self.done = np.load(output / DONE, mmap_mode="r+")

    @staticmethod
    def begin(output: Path, manifest: StoreManifest, batch: int) -> None:
        """Nothing is done yet. Written when the store's other files are there."""
        np.save(output / DONE, np.zeros(-(-manifest.rows // batch), np.uint8))
        write_file(output / PROGRESS, json.dumps(json.loads(manifest.to_json()) | {"batch": batch}))

    @staticmethod
    def end(output: Path) -> None:
        """Forget it: the store is complete."""
        for file in (PROGRESS, DONE):
            (output / file).unlink(missing_ok=True)

    def missing(self) -> list[range]:
        """Rows of the batches that are left, shared among the processes."""
        left = np.flatnonzero(self.done == 0).tolist()
        return [range(b * self.batch, min((b + 1) * self.batch, self.rows)) for b in share(left)]

    def note(self, rows: range) -> None:
        self.done[rows.start // self.batch] = 1
        self.done.flush()


def prepare(cfg: DictConfig) -> Path:
    """Make (or finish) a store: what was noted as done is not done again."""
    output = check_output(Path(cfg.output), resume=cfg.resume, overwrite=cfg.overwrite)
    policy = PolicyConfig.from_preset(cfg)
    data = CalvinFolder(Path(cfg.data.root) / cfg.data.split)
    encoder, image_size = build_encoder(cfg, policy)
    frame_step = encoder.gfdm.config.frame_step if encoder.gfdm else cfg.gfdm.frame_step
    apart = frame_step if cfg.store.videos else None
    plan = plan_samples(
        data,
        chunk=policy.chunk,
        tail=cfg.data.tail,
        stride=cfg.data.stride,
        by_text=encoder.kind == "features",
        video=following(policy.frames, apart),
        spans=cfg.data.spans,
    )
    print_once(told_of_texts(cfg, encoder.gfdm, plan.texts))
    shape = encoder.row_shape(policy, image_size)
    manifest = StoreManifest(
        kind=encoder.kind,
        samples=len(plan.index),
        rows=len(plan.looks),
        draws=encoder.draws,
        look=list(shape[1:] if encoder.kind == "features" else shape),
        chunk=policy.chunk,
        image_size=image_size,
        texts=plan.texts,
        source=str(data.folder),
        fingerprint=data.fingerprint,
        tail=cfg.data.tail,
        stride=cfg.data.stride,
        seed=cfg.seed,
        gfdm=None if encoder.gfdm is None else fingerprint(find_weights(cfg.gfdm_checkpoint, "gfdm")),
        feature_noise=policy.feature_noise if encoder.kind == "features" else None,
        video_stride=apart,
        spans=cfg.data.spans,
        gfdm_precision="no" if encoder.kind == "images" else policy.video_precision,
        tasks=plan.tasks,
    )
    state = processes()
    goes_on = cfg.resume and is_begun(output, manifest)
    state.wait_for_everyone()
    if state.is_main_process:
        prepare_output(output, resume=cfg.resume, overwrite=cfg.overwrite)
    state.wait_for_everyone()
    if (output / MANIFEST).exists():
        if state.is_main_process:
            Progress.end(output)  # of a run that was killed at its last step
            print(f"{output}: complete already, {manifest.samples} samples")
        return output
    dtype = np.dtype(np.uint8 if encoder.kind == "images" else np.float16)
    if state.is_main_process and not goes_on:
        with writing(output, "the samples' list"):
            write_plan(output, plan)
            allocate(output / INPUTS, dtype, (len(plan.looks), *shape))
            Progress.begin(output, manifest, cfg.store.batch)
    state.wait_for_everyone()
    inputs = np.load(output / INPUTS, mmap_mode="r+")
    write_rows(inputs, plan, data, encoder, Progress(output, manifest.rows), image_size)
    state.wait_for_everyone()
    if state.is_main_process:
        with writing(output, MANIFEST):
            write_file(output / MANIFEST, manifest.to_json())
        Progress.end(output)
        print(
            f"{output}: {manifest.samples} samples of {len(plan.tasks)} tasks, {inputs.nbytes / 1e6:.0f} MB"
        )
    return output


def write_plan(output: Path, plan: Plan) -> None:
    """The arrays that do not come from pictures."""
    arrays = {INDEX: plan.index, ACTIONS: plan.actions, ROBOT: plan.robot_obs, SPANS: plan.spans}
    if plan.video is not None:
        arrays[VIDEO] = plan.video
    for name, array in arrays.items():
        np.save(output / name, array)


def allocate(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """An `.npy` file of this size. Its room is taken at once: writing to mapped memory cannot fail later.

    Raises:
        UserError: the disk has not that much room.
    """
    array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
    size = array.offset + array.nbytes
    del array
    try:
        with file.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, size)
    except OSError as error:
        raise UserError(
            f"{file}: cannot take {size / 1e9:.1f} GB ({error.strerror}); make room or choose another output="
        ) from None


def build_encoder(cfg: DictConfig, policy: PolicyConfig) -> tuple[Encoder, int]:
    """What turns pictures into rows, and the size of the pictures."""
    kind, draws = cfg.store.kind, cfg.store.draws
    if kind not in KINDS:
        raise UserError(f"store.kind={kind}: choose one of {', '.join(KINDS)}")
    if draws < 1 or (draws > 1 and (kind != "features" or policy.feature_noise == "fixed")):
        raise UserError(
            f"store.draws={draws}: only features with fresh noise come in several draws; set it to 1"
        )
    if cfg.store.videos and kind == "features":
        raise UserError("store.videos=true: videos are kept with store.kind=latents or images")
    device = processes().device
    gfdm, image_size = None, cfg.gfdm.image_size
    if kind != "images":
        weights = find_weights(cfg.gfdm_checkpoint, "gfdm")
        gfdm = GFDM.from_pretrained(weights).to(device).eval()
        keep_in(policy.video_precision, gfdm)
        check_gfdm(policy, gfdm, weights)
        image_size = gfdm.config.image_size
    return Encoder(kind, draws, cfg.seed, gfdm, policy.feature_noise, device), image_size


def told_of_texts(cfg: DictConfig, gfdm: GFDM | None, texts: list[str]) -> str:
    """What to tell of texts that CLIP cuts: the video model's; without one the preset's, if it is there."""
    try:
        clip = gfdm.clip if gfdm else CLIPText.from_config(typed(TextConfig, cfg.text.clip, "text.clip"))
    except UserError:
        return ""
    return clip.truncation_note(texts)


def is_begun(output: Path, manifest: StoreManifest) -> bool:
    """Whether the folder holds this store, complete or not.

    `source` may be another path: the data are known by their fingerprint, wherever they lie.

    Raises:
        UserError: it holds another store; what differs is named.
    """
    for file in (output / MANIFEST, output / PROGRESS):
        if file.exists():
            record: dict[str, Any] = read_json(file, "make it anew with overwrite=true")
            record.pop("batch", None)
            begun, wanted = asdict(typed(StoreManifest, record, str(file))), asdict(manifest)
            differ = [name for name in wanted if name != "source" and begun[name] != wanted[name]]
            if differ:
                told = [f"{name} {begun[name]}, not {wanted[name]}" for name in differ if name not in RESULTS]
                raise UserError(
                    f"{output}: was begun with other data or settings ({'; '.join(told or differ)}); "
                    "give those, choose another output=, or replace it with overwrite=true"
                )
            return True
    return False


def write_rows(
    inputs: np.ndarray, plan: Plan, data: CalvinFolder, encoder: Encoder, progress: Progress, image_size: int
) -> None:
    """Fill this process's share of the missing rows, noting every batch that is on disk."""
    quiet = not processes().is_local_main_process
    for rows in track(progress.missing(), f"{encoder.kind} of {len(plan.looks)} looks", disable=quiet):
        looks = plan.looks[rows.start : rows.stop]
        images = read_looks(data, [frame for frame, _ in looks], image_size)
        texts = [plan.texts[text] for _, text in looks]
        inputs[rows.start : rows.stop] = encoder(images, texts, rows.start)
        inputs.flush()
        progress.note(rows)


@entry("step3_prepare")
def main(cfg: DictConfig) -> None:
    prepare(cfg)


if __name__ == "__main__":
    main()
