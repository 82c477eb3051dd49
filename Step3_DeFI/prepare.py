"""CALVIN-format demonstrations → the policy's packed store (see `Step3_DeFI.store`).

    python -m Step3_DeFI.prepare data.root=<folder> output=<store> gfdm_checkpoint=<run> [key=value …]

`store.kind=features` runs the frozen stage 1 once per sample, so that training needs no video model;
`latents` stores what its VAE makes of the pictures, `images` only resized pictures (any stage 1 will do).
The root may be CALVIN's zip itself. Processes of `accelerate launch` share the work; a killed run goes on
with `resume=true`, on any number of processes.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

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
from defi.errors import UserError, going_on
from defi.processes import print_once, processes, share
from defi.text import CLIPText, TextConfig
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.model import GFDM
from Step3_DeFI.config import PolicyConfig, check_choice
from Step3_DeFI.features import encode_views, imagine, keep_in, video_noise
from Step3_DeFI.plan import Plan, SampleRules, plan_samples
from Step3_DeFI.samples import Pictures
from Step3_DeFI.store import INPUT_DIMENSIONS, INPUTS, MANIFEST, PROGRESS, StoreManifest, write_plan

DONE = "done.npy"
FOLLOWS = ("samples", "rows", "texts", "tasks")  # of a manifest: from the data and the other settings


@dataclass
class Encoder:
    """Pictures of observations → rows of `inputs.npy`. `gfdm`: None for `images`; `stage1`: its sizes."""

    kind: str
    draws: int
    seed: int
    policy: PolicyConfig
    stage1: GFDMConfig
    gfdm: GFDM | None = None

    @classmethod
    def from_config(cls, cfg: DictConfig, policy: PolicyConfig) -> "Encoder":
        """Raises UserError if settings exclude each other, or there is no such checkpoint."""
        kind, draws, seed = cfg.store.kind, cfg.store.draws, cfg.seed
        check_choice("store.kind", kind, INPUT_DIMENSIONS)
        if draws < 1 or (draws > 1 and (kind != "features" or policy.feature_noise == "fixed")):
            raise UserError(
                f"store.draws={draws}: only features with fresh noise come in several draws; set it to 1"
            )
        if cfg.store.videos and kind == "features":
            raise UserError("store.videos=true: videos are kept with store.kind=latents or images")
        if kind == "images":
            return cls(kind, draws, seed, policy, GFDMConfig.from_preset(cfg))
        gfdm = GFDM.from_pretrained(find_weights(cfg.gfdm_checkpoint, "gfdm")).to(processes().device).eval()
        keep_in(policy.video_precision, gfdm)
        return cls(kind, draws, seed, policy, gfdm.config, gfdm)

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
        self, images: UInt8[np.ndarray, "N V 3 H W"], texts: list[str], first_row: int
    ) -> np.ndarray:
        """Rows `first_row` … of the store; their noise depends on row, draw and seed alone."""
        if self.kind == "images":
            return images
        latents = encode_views(self.gfdm, torch.from_numpy(images).to(processes().device))
        if self.kind == "latents":
            return latents.half().cpu().numpy()
        rows = range(first_row, first_row + len(images))
        draws = [
            imagine(self.gfdm, latents, texts, noise=self._noise(rows, draw)) for draw in range(self.draws)
        ]
        return torch.stack(draws, dim=1).half().cpu().numpy()

    def _noise(self, rows: range, draw: int) -> Float[Tensor, "N V F 4 h w"]:
        seeds = torch.tensor([seed_of("store", self.seed, row, draw) for row in rows])
        how = {"views": self.policy.views, "kind": self.policy.feature_noise}
        return video_noise(self.gfdm, seeds, **how, device=processes().device)


class Progress:
    """Which batches of rows are on disk, whichever process wrote them: a byte for each, in a file."""

    def __init__(self, output: Path, rows: int) -> None:
        self.rows, self.batch = rows, json.loads((output / PROGRESS).read_text())["batch"]
        self.done = np.load(output / DONE, mmap_mode="r+")

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
    encoder = Encoder.from_config(cfg, policy)
    clip = encoder.stage1.clip_frames if cfg.store.videos else None
    rules = SampleRules.of(cfg.data, policy.chunk)
    plan = plan_samples(data, rules, by_text=encoder.kind == "features", clip=clip)
    print_once(truncation_note(cfg, encoder.gfdm, plan.texts))
    manifest = StoreManifest(
        kind=encoder.kind,
        samples=len(plan.index),
        rows=len(plan.observations),
        draws=encoder.draws,
        image_size=encoder.stage1.image_size,
        texts=plan.texts,
        source=str(data.folder),
        fingerprint=data.fingerprint,
        seed=cfg.seed,
        gfdm=encoder.gfdm and fingerprint(find_weights(cfg.gfdm_checkpoint, "gfdm")),
        feature_noise=policy.feature_noise if encoder.kind == "features" else None,
        video_stride=clip and clip.step,
        gfdm_precision="no" if encoder.kind == "images" else policy.video_precision,
        tasks=plan.tasks,
        **asdict(rules),
    )
    state = processes()
    begun = cfg.resume and is_begun(output, manifest)
    state.wait_for_everyone()  # all have looked at the folder before it changes
    if state.is_main_process:
        prepare_output(output, resume=cfg.resume, overwrite=cfg.overwrite)
        if not begun:
            with going_on(output, "the samples' list"):
                begin(output, manifest, plan, encoder, batch=cfg.store.batch)
    state.wait_for_everyone()
    if not (output / MANIFEST).exists():
        fill(output, Pictures(data, plan.observations[:, 0], manifest.image_size), plan, encoder)
        state.wait_for_everyone()
        if state.is_main_process:
            with going_on(output, MANIFEST):
                write_file(output / MANIFEST, json.dumps(asdict(manifest), indent=1))
    if state.is_main_process:
        for file in (PROGRESS, DONE):
            (output / file).unlink(missing_ok=True)
        size = (output / INPUTS).stat().st_size / 1e6
        print(f"{output}: {manifest.samples} samples of {len(plan.tasks)} tasks, {size:.0f} MB")
    return output


def is_begun(output: Path, manifest: StoreManifest) -> bool:
    """Whether the folder holds this store, complete or not.

    `source` may be another path: the data are known by their fingerprint, wherever they lie.

    Raises:
        UserError: it holds another store; what differs is named.
    """
    file = next((output / name for name in (MANIFEST, PROGRESS) if (output / name).exists()), None)
    if file is None:
        return False
    begun = asdict(StoreManifest.read(file, "make it anew with overwrite=true"))
    differ = {
        name: f"{name} {begun[name]}, not {value}"
        for name, value in asdict(manifest).items()
        if name != "source" and begun[name] != value
    }
    if differ:
        reasons = [reason for name, reason in differ.items() if name not in FOLLOWS] or list(differ)
        raise UserError(
            f"{output}: was begun with other data or settings ({'; '.join(reasons)}); "
            "give those, choose another output=, or replace it with overwrite=true"
        )
    return True


def begin(output: Path, manifest: StoreManifest, plan: Plan, encoder: Encoder, *, batch: int) -> None:
    """Everything but the rows' content, of which nothing is done yet; the record of progress comes last."""
    write_plan(output, plan)
    dtype = np.dtype(np.uint8 if encoder.kind == "images" else np.float16)
    allocate(output / INPUTS, dtype, (manifest.rows, *encoder.row_shape))
    np.save(output / DONE, np.zeros(-(-manifest.rows // batch), np.uint8))
    write_file(output / PROGRESS, json.dumps(asdict(manifest) | {"batch": batch}))


def allocate(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """An `.npy` file of this size. Its space is taken at once: writing to mapped memory cannot fail later.

    Raises:
        UserError: the disk has not that much space.
    """
    array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
    size = array.offset + array.nbytes
    del array
    try:
        with file.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, size)
    except OSError as error:
        raise UserError(
            f"{file}: cannot take {size / 1e9:.1f} GB ({error.strerror}); free space or change output="
        ) from None


def fill(output: Path, pictures: Pictures, plan: Plan, encoder: Encoder) -> None:
    """Write this process's share of the missing rows, noting every batch that is on disk."""
    progress = Progress(output, len(plan.observations))
    inputs, quiet = np.load(output / INPUTS, mmap_mode="r+"), not processes().is_local_main_process
    for rows in track(progress.missing(), f"{encoder.kind} of {len(inputs)} observations", disable=quiet):
        part = slice(rows.start, rows.stop)
        texts = [plan.texts[text] for text in plan.observations[part, 1]]
        inputs[part] = encoder(pictures[part], texts, rows.start)
        inputs.flush()
        progress.note(rows)


def truncation_note(cfg: DictConfig, gfdm: GFDM | None, texts: list[str]) -> str:
    """On texts that CLIP cuts: the video model's; without one the preset's, if it is there."""
    try:
        clip = gfdm.clip if gfdm else CLIPText.from_config(typed(TextConfig, cfg.text.clip, "text.clip"))
    except UserError:
        return ""
    return clip.told(texts)


@entry("step3_prepare")
def main(cfg: DictConfig) -> None:
    prepare(cfg)


if __name__ == "__main__":
    main()
