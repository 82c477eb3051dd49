"""Imagine held-out episodes and measure how close they come: `python -m Step1_GFDM.eval checkpoint=<run>`.

Writes clips/ (the real future beside the imagined one, and beside that of an instruction of yours),
gallery.html with them, and metrics.json: per frame PSNR, SSIM, LPIPS where its weights are given, and the
one-step error (`Step1_GFDM.one_step`), FVD where its weights are given, each beside that of a future which
repeats the first frame. Of a mixture: for each data set (under `sets`), and over all episodes.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from jaxtyping import Float
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from defi.config import entry
from defi.engine.checkpoint import find_weights
from defi.engine.data import SampleNoise, sample_seeds, seed_of
from defi.engine.output import check_output, prepare_output, write_file
from defi.errors import UserError
from defi.processes import processes, share
from defi.video import prepare_frames, read_frames
from Step1_GFDM.config import check_counts, check_rate
from Step1_GFDM.data import Clips, Episode, check_size, made_by_another, open_sets
from Step1_GFDM.fvd import action_scores, fvd_figures
from Step1_GFDM.gallery import TITLES, describe_fvd, film, write_gallery
from Step1_GFDM.i3d import FEWEST_FRAMES, I3D
from Step1_GFDM.lpips import LPIPS
from Step1_GFDM.model import GFDM
from Step1_GFDM.one_step import one_step_error, one_step_figures

Metric = Callable[[Tensor, Tensor], Tensor]
"""Imagined and real frames [F, 3, H, W] in [-1, 1] -> a figure per frame [F]."""


def psnr(a: Float[Tensor, "F 3 H W"], b: Float[Tensor, "F 3 H W"]) -> Float[Tensor, " F"]:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return 10 * torch.log10(4 / (a - b).square().mean((1, 2, 3)).clamp(min=1e-10))


def ssim(a: Float[Tensor, "F 3 H W"], b: Float[Tensor, "F 3 H W"]) -> Float[Tensor, " F"]:
    """Structural similarity of images in [-1, 1], Gaussian window of 11 pixels (Wang et al. 2004)."""
    offsets = torch.arange(11) - 5.0
    gauss = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(gauss, gauss) / gauss.sum() ** 2
    kernel = window.expand(3, 1, 11, 11).to(a)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, groups=3)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # the range of the pixels is 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))


@torch.inference_mode()
def imagine(
    model: GFDM, first: Float[Tensor, "N 4 h w"], texts: list[str], *, steps: int | None, seed: int
) -> Float[Tensor, "N F 3 H W"]:
    """Imagined frames in [-1, 1] from scaled latents of the first ones; each clip has noise of its own."""
    device = model.unet.device
    size = model.noise(1).shape[1:]
    noise = SampleNoise(sample_seeds("imagined", seed, len(first)), device).normal("video", *size)
    latents = model.generate(first.to(device), model.encode_text(texts), noise=noise, steps=steps)
    return model.decode_latents(latents).cpu()


@dataclass(frozen=True)
class Case:
    """An episode of one of the data sets, seen from one camera; `number` counts over all of them."""

    number: int
    data_set: str
    clips: Clips
    episode: Episode
    camera: int

    @property
    def text(self) -> str:
        """Its own instruction."""
        return self.episode.texts[0]

    def latents(self) -> Float[Tensor, "F 4 h w"]:
        """Of its first clip, scaled."""
        return self.clips.latents(self.episode, 0, self.camera)

    def frames(self, size: int) -> Float[Tensor, "F 3 S S"]:
        """The same clip's pictures, in [-1, 1]."""
        file = self.clips.root / self.episode.videos[self.camera]
        return prepare_frames(read_frames(file, self.clips.indices(self.episode, 0)), size)


def choose(sets: dict[str, Clips], count: int, camera: int) -> list[Case]:
    """`count` episodes of each data set, spread evenly over it.

    Raises:
        UserError: an episode has no such camera.
    """
    cases: list[Case] = []
    for name, clips in sets.items():
        spread = np.linspace(0, len(clips.episodes) - 1, min(count, len(clips.episodes)))
        for i in spread.round().astype(int):
            episode = clips.episodes[i]
            if camera >= min(len(episode.latents), len(episode.videos)):
                raise UserError(
                    f"camera={camera}: {clips.root}: episode {episode.id} has {len(episode.videos)} videos "
                    f"and latents of {len(episode.latents)} cameras; they are counted from 0"
                )
            cases.append(Case(len(cases), name, clips, episode, camera))
    return cases


def other_than(case: Case, cases: Sequence[Case]) -> Case:
    """The episode before it in its data set, or of all where its own has no other; round at the start."""
    alike = [each for each in cases if each.data_set == case.data_set]
    others = alike if len(alike) > 1 else cases
    return others[others.index(case) - 1]


def score(
    metrics: dict[str, Metric], imagined: Float[Tensor, "F 3 H W"], real: Float[Tensor, "F 3 H W"]
) -> dict[str, Float[Tensor, " F"]]:
    """Each metric of the imagined future, and of one that repeats the first frame (`…_still`)."""
    still = real[:1].expand_as(real)
    found = {name: metric(imagined, real) for name, metric in metrics.items()}
    return found | {f"{name}_still": metric(still, real) for name, metric in metrics.items()}


@dataclass
class Judged:
    """An episode: its film (the real future beside what each instruction leads to) and its figures."""

    number: int
    data_set: str
    film: Path
    caption: str
    scores: dict[str, Float[Tensor, " F"]]
    one_step: dict[str, Tensor]
    actions: dict[str, Float[Tensor, "400"]] | None  # I3D's scores, for FVD


@dataclass
class Judge:
    """Imagines an episode, films it and measures. instruction: another one to imagine it under as well."""

    model: GFDM
    metrics: dict[str, Metric]
    i3d: I3D | None
    output: Path
    instruction: str | None
    steps: int | None
    seed: int
    fps: float

    def __call__(self, case: Case, other: Case) -> Judged:
        """`other`: another episode, for the one-step figures."""
        seed, latents = seed_of("case", self.seed, case.number), case.latents()
        real = case.frames(self.model.config.image_size)
        texts = [case.text, *([] if self.instruction is None else [self.instruction])]
        imagined = {  # from the same noise: only the words differ
            text: imagine(self.model, latents[:1], [text], steps=self.steps, seed=seed)[0] for text in texts
        }
        path = self.output / "clips" / case.data_set / f"{case.number:04d}.mp4"
        film(path, real, imagined, self.fps)
        there = other.latents()[:1], other.text
        one_step = one_step_error(self.model, latents, case.text, other=there, seed=seed)
        own = imagined[case.text]
        return Judged(
            case.number,
            case.data_set,
            path,
            f"{case.episode.id}: {' | '.join(imagined)}",
            score(self.metrics, own, real),
            {name: value.cpu() for name, value in one_step.items()},
            None if self.i3d is None else action_scores(self.i3d, own, real),
        )


def columns(rows: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Of one dictionary per episode, one of lists."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def summarise(judged: list[Judged]) -> dict[str, Any]:
    """The figures of some episodes: their number, means per frame, one-step error, FVD if it is measured."""
    scores = columns([each.scores for each in judged])
    found: dict[str, Any] = {
        "episodes": len(judged),
        **{name: torch.stack(values).mean(0).tolist() for name, values in scores.items()},
        "one_step": one_step_figures(columns([each.one_step for each in judged])),
    }
    if judged[0].actions is not None:
        found["fvd"] = fvd_figures(columns([each.actions for each in judged]))
    return found


def report(figures: dict[str, Any], title: str) -> None:
    """Print the figures per frame, and FVD."""
    shown = {label: (figures, name) for name, label in TITLES.items() if name in figures}
    shown["one-step error"] = (figures["one_step"], "latents")
    table = Table("frame", *shown, title=f"{title} (in brackets: standing still)")
    pairs = [zip(part[name], part[f"{name}_still"]) for part, name in shown.values()]
    for frame, cells in enumerate(zip(*pairs)):
        table.add_row(str(frame), *(f"{_short(value)} ({_short(still)})" for value, still in cells))
    console = Console()
    console.print(table)
    if figures.get("fvd"):
        console.print(describe_fvd(figures["fvd"]))


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def load_i3d(place: str | None, model: GFDM) -> I3D | None:
    """For FVD, if its weights are given.

    Raises:
        UserError: they do not fit, or the clips are too short for it.
    """
    if place is None:
        return None
    if model.config.frames < FEWEST_FRAMES:
        raise UserError(
            f"fvd={place}: needs clips of at least {FEWEST_FRAMES} frames, this checkpoint imagines "
            f"{model.config.frames}; leave fvd out"
        )
    return I3D.from_published(place).to(model.unet.device)


def check_settings(cfg: DictConfig) -> None:
    """Raises UserError for numbers that mean nothing."""
    check_counts(cfg, episodes=1, camera=0)
    if cfg.steps is not None:
        check_counts(cfg, steps=1)
    check_rate("fps", cfg.fps)


def check_latents(model: GFDM, weights: Path, sets: Sequence[Clips]) -> None:
    """Whether the model can go on from the latents; of a pretrained one another file's are told, not refused.

    Raises:
        UserError: another autoencoder made them, or they are of another size.
    """
    if wrong := made_by_another(sets, weights / "vae"):
        if model.config.pretrained is None:
            raise UserError(
                f"{wrong}; give the data that this checkpoint was trained on, or prepare them again"
            )
        print(f"note: {wrong}; these must be the same weights in another file")
    check_size(sets, model.noise(1).shape[2:])


@entry("step1_eval")
def main(cfg: DictConfig) -> None:
    check_settings(cfg)
    output, state = check_output(cfg.output, overwrite=cfg.overwrite), processes()
    weights = find_weights(cfg.checkpoint, "gfdm")
    model = GFDM.from_pretrained(weights).to(state.device).eval()
    metrics: dict[str, Metric] = {"psnr": psnr, "ssim": ssim}
    if cfg.lpips is not None:
        metrics["lpips"] = LPIPS.from_folder(cfg.lpips)
    i3d = load_i3d(cfg.fvd, model)
    frames, step = model.config.frames, model.config.frame_step
    sets = open_sets(cfg.data, frames=frames, frame_step=step, split=cfg.split)
    cases = choose(sets, cfg.episodes, cfg.camera)
    check_latents(model, weights, list(sets.values()))
    state.wait_for_everyone()
    if state.is_main_process:
        prepare_output(output, overwrite=cfg.overwrite)
    state.wait_for_everyone()

    judge = Judge(model, metrics, i3d, output, cfg.instruction, cfg.steps, cfg.seed, cfg.fps)
    quiet = not state.is_main_process
    mine = [judge(case, other_than(case, cases)) for case in track(share(cases), "imagine", disable=quiet)]
    judged = sorted(gather_object(mine), key=lambda each: each.number)
    if quiet:
        return
    by_set = {name: [each for each in judged if each.data_set == name] for name in sets}
    found = {
        "checkpoint": str(weights),
        "split": cfg.split,
        "instruction": cfg.instruction,
        **summarise(judged),
        "sets": {name: {"root": str(sets[name].root), **summarise(part)} for name, part in by_set.items()},
    }
    write_file(output / "metrics.json", json.dumps(found, indent=1))
    films = {name: {each.film: each.caption for each in part} for name, part in by_set.items()}
    write_gallery(output / "gallery.html", films, found)
    for name, figures in found["sets"].items():
        report(figures, f"{name}, {figures['episodes']} episodes")
    if len(sets) > 1:
        report(found, f"all data sets, {len(judged)} episodes")
    print(f"{output / 'metrics.json'}\n{output / 'gallery.html'}: {len(judged)} clips, real beside imagined")


if __name__ == "__main__":
    main()
