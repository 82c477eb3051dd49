"""CALVIN-format demonstrations → the policy's packed store (see `Step3_DeFI.data`).

    python -m Step3_DeFI.prepare data.root=<folder> output=<store> gfdm_checkpoint=<run> [key=value …]

`store.kind=features` runs the frozen stage 1 once per sample, so that training needs no video model;
`latents` stores what its VAE makes of the pictures, `images` only resized pictures (any stage 1 will do).
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from defi.config import entry
from defi.engine.checkpoint import find_weights
from defi.engine.fingerprint import fingerprint
from defi.engine.output import check_output, prepare_output, write_file
from defi.errors import UserError
from Step1_GFDM.model import GFDM
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.data import ACTIONS, INDEX, INPUTS, KINDS, MANIFEST, PROGRESS, VIDEO, StoreManifest
from Step3_DeFI.features import encode_views, imagine, video_noise
from Step3_DeFI.observation import CAMERAS, observe
from Step3_DeFI.sources import check_gfdm

Look = tuple[int, int]  # frame, number of the instruction (-1 where the input does not depend on it)


@dataclass
class Plan:
    """Which samples there are: N starts of chunks, and the distinct looks they need."""

    looks: list[Look]
    index: np.ndarray  # int64 [N, 2]: look, instruction
    actions: np.ndarray  # float32 [N, K, A]
    video: np.ndarray | None  # int64 [N, F]: looks at the frames that follow
    texts: list[str]
    tasks: dict[str, int]


def plan_samples(
    data: CalvinFolder, *, chunk: int, tail: int, stride: int, by_text: bool, video: range | None = None
) -> Plan:
    """Samples start at s … e − tail of every annotated span (s, e); sample i has `chunk` actions from i on.

    `video`: frames of the clip that is kept with each sample, counted from its own; past e, e is repeated.

    Raises:
        UserError: `tail` leaves no room for a chunk, or no span is long enough.
    """
    if tail < chunk - 1:
        raise UserError(f"data.tail={tail}: a chunk has {chunk} actions; set data.tail={chunk - 1} or more")
    looks: dict[Look, int] = {}
    texts: dict[str, int] = {}
    index, actions, clips, tasks = [], [], [], {}
    for span in data.spans:
        starts = range(span.start, span.end - tail + 1, stride)
        if not starts:
            continue
        taken = data.stack("rel_actions", range(span.start, starts[-1] + chunk)).astype(np.float32)
        text = texts.setdefault(span.instruction, len(texts))
        for frame in starts:
            look = looks.setdefault((frame, text if by_text else -1), len(looks))
            index.append((look, text))
            actions.append(taken[frame - span.start : frame - span.start + chunk])
            following = [min(frame + offset, span.end) for offset in video or ()]
            clips.append([looks.setdefault((next_frame, -1), len(looks)) for next_frame in following])
        tasks[span.task] = tasks.get(span.task, 0) + len(starts)
    if not index:
        raise UserError(f"{data.folder}: no annotated span is longer than data.tail={tail} frames; lower it")
    return Plan(
        looks=list(looks),
        index=np.array(index, np.int64),
        actions=np.stack(actions),
        video=None if video is None else np.array(clips, np.int64),
        texts=list(texts),
        tasks=tasks,
    )


def read_looks(data: CalvinFolder, frames: Sequence[int], size: int) -> UInt8[Tensor, "N V 3 size size"]:
    """Both cameras' pictures of some frames, as the policy sees them."""
    with ThreadPoolExecutor(2) as pool:
        return torch.stack(list(pool.map(lambda f: observe(data.frame(f, CAMERAS), size), frames)))


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
        seeds = [
            int(np.random.SeedSequence([self.seed, row, draw]).generate_state(1, np.uint64)[0] >> 1)
            for row in range(first_row, first_row + rows)
        ]
        noise = partial(video_noise, self.gfdm, kind=self.feature_noise, device=self.device)
        return noise(torch.tensor(seeds), views=len(CAMERAS))


@dataclass
class Progress:
    """How many rows are on disk; `batch` of them are made at a time."""

    output: Path
    manifest: StoreManifest
    done: int
    batch: int

    def note(self, done: int) -> None:
        self.done = done
        record = json.loads(self.manifest.to_json()) | {"done": done}
        write_file(self.output / PROGRESS, json.dumps(record))


def prepare(cfg: DictConfig) -> Path:
    """Make (or finish) a store. Rows are written in order; an interrupted run goes on where it stopped."""
    output = check_output(Path(cfg.output), resume=cfg.resume, overwrite=cfg.overwrite)
    policy = PolicyConfig.from_preset(cfg)
    data = CalvinFolder(Path(cfg.data.root) / cfg.data.split)
    encoder, image_size = build_encoder(cfg, policy)
    apart = cfg.store.video_stride
    plan = plan_samples(
        data,
        chunk=policy.chunk,
        tail=cfg.data.tail,
        stride=cfg.data.stride,
        by_text=encoder.kind == "features",
        video=None if apart is None else range(0, policy.frames * apart, apart),
    )
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
        tasks=plan.tasks,
    )
    done = rows_done(output, manifest) if cfg.resume else 0
    prepare_output(output, resume=cfg.resume, overwrite=cfg.overwrite)
    if (output / MANIFEST).exists():
        print(f"{output}: complete already, {manifest.samples} samples")
        return output
    np.save(output / INDEX, plan.index)
    np.save(output / ACTIONS, plan.actions)
    if plan.video is not None:
        np.save(output / VIDEO, plan.video)
    inputs = np.lib.format.open_memmap(
        output / INPUTS,
        mode="r+" if done else "w+",
        dtype=np.uint8 if encoder.kind == "images" else np.float16,
        shape=(len(plan.looks), *shape),
    )
    write_rows(inputs, plan, data, encoder, Progress(output, manifest, done=done, batch=cfg.store.batch))
    write_file(output / MANIFEST, manifest.to_json())
    (output / PROGRESS).unlink()
    print(f"{output}: {manifest.samples} samples of {len(plan.tasks)} tasks, {inputs.nbytes / 1e6:.0f} MB")
    return output


def build_encoder(cfg: DictConfig, policy: PolicyConfig) -> tuple[Encoder, int]:
    """What turns pictures into rows, and the size of the pictures."""
    kind, draws = cfg.store.kind, cfg.store.draws
    if kind not in KINDS:
        raise UserError(f"store.kind={kind}: choose one of {', '.join(KINDS)}")
    if draws < 1 or (draws > 1 and (kind != "features" or policy.feature_noise == "fixed")):
        raise UserError(
            f"store.draws={draws}: only features with fresh noise come in several draws; set it to 1"
        )
    if cfg.store.video_stride is not None and (kind == "features" or cfg.store.video_stride < 1):
        raise UserError(
            f"store.video_stride={cfg.store.video_stride}: 1 or more, with store.kind=latents or images"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gfdm, image_size = None, cfg.gfdm.image_size
    if kind != "images":
        weights = find_weights(cfg.gfdm_checkpoint, "gfdm")
        gfdm = GFDM.from_pretrained(weights).to(device).eval()
        check_gfdm(policy, gfdm, weights)
        image_size = gfdm.config.image_size
    return Encoder(kind, draws, cfg.seed, gfdm, policy.feature_noise, device), image_size


def rows_done(output: Path, manifest: StoreManifest) -> int:
    """Rows that an interrupted preparation has finished; it must have been one of the same store."""
    for file in (output / MANIFEST, output / PROGRESS):
        if file.exists():
            record: dict[str, Any] = json.loads(file.read_text())
            done = record.pop("done", manifest.rows)
            if record != json.loads(manifest.to_json()):
                raise UserError(f"{output}: was begun with other data or settings; set overwrite=true")
            return done
    return 0


def write_rows(
    inputs: np.ndarray,
    plan: Plan,
    data: CalvinFolder,
    encoder: Encoder,
    progress: Progress,
) -> None:
    """Fill the missing rows, noting after every batch how far it is."""
    starts = range(progress.done, len(plan.looks), progress.batch)
    for first in track(starts, description=f"{encoder.kind} of {len(plan.looks)} looks"):
        looks = plan.looks[first : first + progress.batch]
        images = read_looks(data, [frame for frame, _ in looks], progress.manifest.image_size)
        texts = [plan.texts[text] for _, text in looks]
        inputs[first : first + len(looks)] = encoder(images, texts, first)
        inputs.flush()
        progress.note(first + len(looks))


@entry("step3_prepare")
def main(cfg: DictConfig) -> None:
    prepare(cfg)


if __name__ == "__main__":
    main()
