"""A robot's data → the policy's packed store (see `Step3_DeFI.store`).

    python -m Step3_DeFI.prepare data=lerobot data.root=<folder> output=<store> gfdm_checkpoint=<run>

`store.kind=features` runs the frozen stage 1 once per sample, so that training needs no video model;
`latents` stores what its VAE makes of the pictures, `images` only resized pictures (any stage 1 will do).
Processes of `accelerate launch` share the work; a killed run continues
with `resume=true`, on any number of processes.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from omegaconf import DictConfig
from rich.progress import track

from defi.config import entry
from defi.data import DataSettings, Part, read_settings
from defi.engine.checkpoint import find_weights
from defi.engine.data import seed_of
from defi.engine.output import check_output, prepare_output, write_file
from defi.engine.weights import fingerprint
from defi.errors import UserError, writing
from defi.processes import print_once, processes, share
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.model import GFDM
from Step3_DeFI.config import PolicyConfig, check, check_choice
from Step3_DeFI.features import encode_views, imagine, set_up, video_noise
from Step3_DeFI.samples import RecordedSamples, SampleSettings
from Step3_DeFI.store import DONE, INPUT_DIMENSIONS, INPUTS, MANIFEST, PROGRESS, StoreManifest

FOLLOWS = {"source", "tasks"}  # of a manifest: may have moved, or comes from the rest
ELSEWHERE = {"root", "index", "held_out"}  # settings that change no sample of a part


@dataclass
class Encoder:
    """Pictures of observations → rows of `inputs.npy`.

    `stage1`: the sizes of the video model `gfdm`, which is None for `images`.
    """

    kind: str
    draws: int
    seed: int
    policy: PolicyConfig
    stage1: GFDMConfig
    gfdm: GFDM | None = None

    @classmethod
    def from_config(cls, cfg: DictConfig, policy: PolicyConfig) -> "Encoder":
        """Raises UserError if settings exclude each other, or there is no such checkpoint."""
        kind, draws = cfg.store.kind, cfg.store.draws
        check_choice("store.kind", kind, INPUT_DIMENSIONS)
        fine = draws == 1 or (draws > 1 and kind == "features" and policy.feature_noise == "fresh")
        check("store.draws", draws, fine, "only features with fresh noise come in several draws; set it to 1")
        fine = not cfg.store.videos or kind != "features"
        check("store.videos", "true", fine, "videos are kept with store.kind=latents or images")
        if kind == "images":
            return cls(kind, draws, cfg.seed, policy, GFDMConfig.from_preset(cfg))
        gfdm = GFDM.from_pretrained(find_weights(cfg.gfdm_checkpoint, "gfdm")).to(processes().device).eval()
        set_up(gfdm, policy)
        return cls(kind, draws, cfg.seed, policy, gfdm.config, gfdm)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of one observation, draws included."""
        sizes, views = self.stage1, self.policy.views
        if self.kind == "images":
            return views, 3, sizes.image_size, sizes.image_size
        if self.kind == "latents":
            return views, sizes.vae.latent_channels, sizes.latent_size, sizes.latent_size
        return self.draws, views, sizes.frames, self.gfdm.feature_tokens, self.gfdm.feature_channels

    @torch.no_grad()
    def __call__(
        self, images: UInt8[np.ndarray, "N V 3 H W"], texts: list[str], rows: Int64[np.ndarray, " N"]
    ) -> np.ndarray:
        """These rows of the store; their noise depends on row, draw and seed alone."""
        if self.kind == "images":
            return images
        latents = encode_views(self.gfdm, torch.from_numpy(images).to(processes().device))
        if self.kind == "latents":
            return latents.half().cpu().numpy()
        versions = []
        for draw in range(self.draws):
            seeds = torch.tensor([seed_of("store", self.seed, int(row), draw) for row in rows])
            noise = video_noise(self.gfdm, self.policy, seeds, latents.device)
            versions.append(imagine(self.gfdm, latents, texts, noise=noise))
        return torch.stack(versions, dim=1).half().cpu().numpy()


def prepare(cfg: DictConfig) -> Path:
    """Make (or finish) a store: what was noted as done is not done again."""
    output = check_output(Path(cfg.output), resume=cfg.resume, overwrite=cfg.overwrite)
    check_choice("part", cfg.part, get_args(Part))
    settings, own = read_settings(cfg.data, SampleSettings)
    data = settings.open(cfg.part)
    policy = PolicyConfig.from_preset(cfg, data.robot())
    own.remaining(data, policy.chunk)  # before the video model is loaded
    encoder = Encoder.from_config(cfg, policy)
    sizes, gfdm = encoder.stage1, encoder.gfdm
    samples = RecordedSamples(
        data,
        own,
        chunk=policy.chunk,
        image_size=sizes.image_size,
        by_text=encoder.kind == "features",
        clip=sizes.clip_frames if cfg.store.videos else None,
    )
    if gfdm is not None:
        print_once(gfdm.clip.truncation_note(samples.texts))
    manifest = describe(cfg, settings, own, encoder, samples)
    state, record = processes(), json.dumps(asdict(manifest), indent=1)
    begun = cfg.resume and is_begun(output, manifest)
    state.wait_for_everyone()  # all have looked at the folder before it changes
    if state.is_main_process:
        prepare_output(output, resume=cfg.resume, overwrite=cfg.overwrite)
        if not begun:
            begin(output, samples, encoder, record)
    state.wait_for_everyone()
    if not (output / MANIFEST).exists():
        fill(output, samples, encoder, batch=cfg.store.batch)
        state.wait_for_everyone()
    if state.is_main_process:
        with writing(output, MANIFEST):
            write_file(output / MANIFEST, record)
        for file in (PROGRESS, DONE):
            (output / file).unlink(missing_ok=True)
        megabytes = (output / INPUTS).stat().st_size / 1e6
        counts = f"{len(samples)} samples of {data.lengths.sum()} frames, {len(samples.texts)} instructions"
        counts += f", {len(samples.tasks)} tasks" if samples.tasks else ""
        print(f"{output}: {counts}, {megabytes:.0f} MB")
    return output


def describe(
    cfg: DictConfig, settings: DataSettings, own: SampleSettings, encoder: Encoder, samples: RecordedSamples
) -> StoreManifest:
    """What the store will hold, and all that decides it."""
    kind, sizes, policy, data = encoder.kind, encoder.stage1, encoder.policy, samples.data
    return StoreManifest(
        kind=kind,
        samples=len(samples),
        rows=len(samples.observations),
        draws=encoder.draws,
        frames=len(samples.motions.frames),
        chunk=samples.chunk,
        robot=samples.robot(),
        normalisation=samples.normalisation,
        image_size=sizes.image_size,
        texts=samples.texts,
        source=str(data.root),
        fingerprint=data.fingerprint,
        min_remaining=own.remaining(data, samples.chunk),
        stride=own.stride,
        seed=cfg.seed,
        stage1_weights=encoder.gfdm and fingerprint(find_weights(cfg.gfdm_checkpoint, "gfdm")),
        feature_noise=policy.feature_noise if kind == "features" else None,
        video_stride=sizes.clip_frames.step if cfg.store.videos else None,
        gfdm_precision="no" if kind == "images" else policy.video_precision,
        tasks=samples.tasks,
        settings={k: v for k, v in asdict(settings).items() if k not in ELSEWHERE},
    )


def is_begun(output: Path, manifest: StoreManifest) -> bool:
    """Whether the folder holds this store, complete or not; UserError if it holds another one."""
    file = output / (MANIFEST if (output / MANIFEST).exists() else PROGRESS)
    if not file.exists():
        return False
    found, wanted = vars(StoreManifest.read(file, "make it again with overwrite=true")), vars(manifest)
    unequal = [name for name in wanted if name not in FOLLOWS and found[name] != wanted[name]]
    if differ := [f"{name} {found[name]}, not {wanted[name]}" for name in unequal]:
        raise UserError(
            f"{output}: was begun with other data or settings ({'; '.join(differ)}); "
            "give those, choose another output=, or replace it with overwrite=true"
        )
    return True


def begin(output: Path, samples: RecordedSamples, encoder: Encoder, record: str) -> None:
    """All files of a store, of whose rows none is done yet; the record of progress comes last."""
    dtype = np.dtype(np.uint8 if encoder.kind == "images" else np.float16)
    shape = (len(samples.observations), *encoder.row_shape)
    with writing(output, f"a store of {np.prod(shape) * dtype.itemsize / 1e9:.1f} GB"):
        motions = {"actions": samples.motions.actions, "state": samples.motions.state}
        arrays = {"index": samples.index, "starts": samples.starts, "video": samples.video, **motions}
        for name, array in arrays.items():
            if array is not None:
                np.save(output / f"{name}.npy", array)
        inputs = np.lib.format.open_memmap(output / INPUTS, mode="w+", dtype=dtype, shape=shape)
        with (output / INPUTS).open("r+b") as file:  # takes the space: writing to mapped memory cannot fail
            os.posix_fallocate(file.fileno(), 0, inputs.offset + inputs.nbytes)
        np.save(output / DONE, np.zeros(len(inputs), np.uint8))
        write_file(output / PROGRESS, record)


def fill(output: Path, samples: RecordedSamples, encoder: Encoder, batch: int) -> None:
    """Encode this process's share of the rows that are not done, whichever process did the others."""
    inputs, done = (np.load(output / name, mmap_mode="r+") for name in (INPUTS, DONE))
    left, quiet = np.flatnonzero(done == 0), not processes().is_local_main_process
    batches = share([left[first : first + batch] for first in range(0, len(left), batch)])
    for rows in track(batches, f"{encoder.kind} of {len(inputs)} observations", disable=quiet):
        texts = [samples.texts[text] for text in samples.observations[rows, 2]]
        inputs[rows] = encoder(samples.inputs[rows], texts, rows)
        inputs.flush()
        done[rows] = 1
        done.flush()


@entry("step3_prepare")
def main(cfg: DictConfig) -> None:
    prepare(cfg)


if __name__ == "__main__":
    main()
