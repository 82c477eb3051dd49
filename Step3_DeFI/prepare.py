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
from jaxtyping import UInt8
from omegaconf import DictConfig
from rich.progress import track

from defi.calvin import CalvinFolder
from defi.config import entry, typed
from defi.engine.checkpoint import find_weights
from defi.engine.data import seed_of
from defi.engine.output import check_output, prepare_output, write_file
from defi.engine.weights import fingerprint
from defi.errors import UserError, writing
from defi.processes import print_once, processes, share
from defi.text import CLIPText, TextConfig
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.model import GFDM
from Step3_DeFI.config import PolicyConfig, check, check_choice
from Step3_DeFI.features import encode_views, imagine, keep_in, video_noise
from Step3_DeFI.plan import Plan, SampleRules, plan_samples
from Step3_DeFI.samples import Pictures
from Step3_DeFI.store import DONE, INPUT_DIMENSIONS, INPUTS, MANIFEST, PROGRESS, StoreManifest, write_plan

FOLLOWS = {"source", "samples", "rows", "texts", "tasks"}  # of a manifest: from data and settings


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
        keep_in(policy.video_precision, gfdm)
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
        self, images: UInt8[np.ndarray, "N V 3 H W"], texts: list[str], first_row: int
    ) -> np.ndarray:
        """Rows `first_row` … of the store; their noise depends on row, draw and seed alone."""
        if self.kind == "images":
            return images
        device, views = processes().device, self.policy.views
        latents = encode_views(self.gfdm, torch.from_numpy(images).to(device))
        if self.kind == "latents":
            return latents.half().cpu().numpy()
        versions = []
        for draw in range(self.draws):
            rows = range(first_row, first_row + len(images))
            seeds = torch.tensor([seed_of("store", self.seed, row, draw) for row in rows])
            kind = self.policy.feature_noise
            noise = video_noise(self.gfdm, seeds, views=views, kind=kind, device=device)
            versions.append(imagine(self.gfdm, latents, texts, noise=noise))
        return torch.stack(versions, dim=1).half().cpu().numpy()


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
        stage1_weights=encoder.gfdm and fingerprint(find_weights(cfg.gfdm_checkpoint, "gfdm")),
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
            begin(output, manifest, plan, encoder.row_shape, batch=cfg.store.batch)
    state.wait_for_everyone()
    if not (output / MANIFEST).exists():
        fill(output, Pictures(data, plan.observations[:, 0], manifest.image_size), plan, encoder)
        state.wait_for_everyone()
        if state.is_main_process:
            with writing(output, MANIFEST):
                write_file(output / MANIFEST, manifest.to_json())
    if state.is_main_process:
        for file in (PROGRESS, DONE):
            (output / file).unlink(missing_ok=True)
        size = (output / INPUTS).stat().st_size / 1e6
        print(f"{output}: {manifest.samples} samples of {len(plan.tasks)} tasks, {size:.0f} MB")
    return output


def is_begun(output: Path, manifest: StoreManifest) -> bool:
    """Whether the folder holds this store, complete or not; data are known by their fingerprint.

    Raises:
        UserError: it holds another store; what differs is named.
    """
    file = next((output / name for name in (MANIFEST, PROGRESS) if (output / name).exists()), None)
    if file is None:
        return False
    found, wanted = vars(StoreManifest.read(file, "make it anew with overwrite=true")), vars(manifest)
    unequal = [name for name in wanted if name not in FOLLOWS and found[name] != wanted[name]]
    if differ := [f"{name} {found[name]}, not {wanted[name]}" for name in unequal]:
        raise UserError(
            f"{output}: was begun with other data or settings ({'; '.join(differ)}); "
            "give those, choose another output=, or replace it with overwrite=true"
        )
    return True


def begin(
    output: Path, manifest: StoreManifest, plan: Plan, row_shape: tuple[int, ...], *, batch: int
) -> None:
    """All files of a store, of whose rows none is done yet; the record of progress comes last."""
    dtype = np.dtype(np.uint8 if manifest.kind == "images" else np.float16)
    size = manifest.rows * int(np.prod(row_shape)) * dtype.itemsize
    with writing(output, f"a store of {size / 1e9:.1f} GB"):
        write_plan(output, plan)
        shape = (manifest.rows, *row_shape)
        inputs = np.lib.format.open_memmap(output / INPUTS, mode="w+", dtype=dtype, shape=shape)
        with (output / INPUTS).open("r+b") as file:  # takes the space: writing to mapped memory cannot fail
            os.posix_fallocate(file.fileno(), 0, inputs.offset + inputs.nbytes)
        np.save(output / DONE, np.zeros(-(-manifest.rows // batch), np.uint8))
        write_file(output / PROGRESS, manifest.to_json(batch=batch))


def fill(output: Path, pictures: Pictures, plan: Plan, encoder: Encoder) -> None:
    """Encode this process's share of the batches that are not done, whichever process did the others."""
    batch = json.loads((output / PROGRESS).read_text())["batch"]
    inputs, done = (np.load(output / name, mmap_mode="r+") for name in (INPUTS, DONE))
    left, quiet = share(np.flatnonzero(done == 0).tolist()), not processes().is_local_main_process
    for number in track(left, f"{encoder.kind} of {len(inputs)} observations", disable=quiet):
        rows = slice(number * batch, (number + 1) * batch)
        texts = [plan.texts[text] for text in plan.observations[rows, 1]]
        inputs[rows] = encoder(pictures[rows], texts, rows.start)
        inputs.flush()
        done[number] = 1
        done.flush()


def truncation_note(cfg: DictConfig, gfdm: GFDM | None, texts: list[str]) -> str:
    """On texts that CLIP cuts: the video model's; without one the preset's, if it is there."""
    try:
        clip = gfdm.clip if gfdm else CLIPText.from_config(typed(TextConfig, cfg.text.clip, "text.clip"))
    except UserError:
        return ""
    return clip.truncation_note(texts)


@entry("step3_prepare")
def main(cfg: DictConfig) -> None:
    prepare(cfg)


if __name__ == "__main__":
    main()
