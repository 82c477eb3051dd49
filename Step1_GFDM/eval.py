"""Imagine held-out episodes and measure how close they come: `python -m Step1_GFDM.eval checkpoint=<run>`.

Writes clips/ (the real future beside the imagined one, and beside that of an instruction of yours),
gallery.html with them, and metrics.json: per frame PSNR, SSIM, LPIPS where its weights are given, and the
one-step error, FVD where its weights are given (`Step1_GFDM.evaluation.metrics`), each beside that of a
future which repeats the first frame. Of a mixture: for each data set (`sets`), and over all episodes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from jaxtyping import Float
from omegaconf import DictConfig
from rich.progress import track
from torch import Tensor

from defi.config import entry
from defi.data.vpp import Annotation
from defi.engine.checkpoint import find_weights
from defi.engine.data import seed_of
from defi.engine.output import check_output, prepare_output, write_file
from defi.errors import UserError
from defi.processes import processes, share
from defi.video import prepare_frames, read_frames
from Step1_GFDM.config import check_counts, check_rate
from Step1_GFDM.data import LatentSet, check_latents, open_sets
from Step1_GFDM.evaluation import metrics as measures
from Step1_GFDM.evaluation.i3d import FEWEST_FRAMES, I3D
from Step1_GFDM.evaluation.metrics import METRICS, Metric
from Step1_GFDM.gallery import TITLES, describe_fvd, film, write_gallery
from Step1_GFDM.model import GFDM


@dataclass(frozen=True)
class Case:
    """An episode of one of the data sets; `number` counts over all of them. texts: what it is imagined under,
    its own instruction first. film: the real future beside what each of them leads to.
    """

    number: int
    data_set: str
    clips: LatentSet
    episode: Annotation
    texts: list[str]
    film: Path


def choose(sets: dict[str, LatentSet], cfg: DictConfig) -> list[Case]:
    """`episodes` of each data set, spread evenly. Raises UserError if one has no such camera."""
    cases: list[Case] = []
    for name, clips in sets.items():
        last = len(clips.episodes) - 1
        for i in np.linspace(0, last, min(cfg.episodes, last + 1)).round().astype(int):
            episode, film = clips.episodes[i], Path(cfg.output, "clips", name, f"{len(cases):04d}.mp4")
            if cfg.camera >= min(len(episode.latents), len(episode.videos)):
                raise UserError(
                    f"camera={cfg.camera}: {clips.root}: episode {episode.id} has {len(episode.videos)} "
                    f"videos and latents of {len(episode.latents)} cameras; they are counted from 0"
                )
            other = [] if cfg.instruction is None else [cfg.instruction]
            texts = list(dict.fromkeys([episode.texts[0], *other]))
            cases.append(Case(len(cases), name, clips, episode, texts, film))
    return cases


def other_than(case: Case, cases: Sequence[Case]) -> Case:
    """The episode before it in its data set, or of all where its own has no other; round at the start."""
    alike = [each for each in cases if each.data_set == case.data_set]
    others = alike if len(alike) > 1 else cases
    return others[others.index(case) - 1]


def evaluate(
    case: Case, other: Case, model: GFDM, metrics: dict[str, Metric], i3d: I3D | None, cfg: DictConfig
) -> dict[str, dict[str, Tensor]]:
    """Imagine an episode, film it and measure: `per_frame`, `one_step`, and `fvd`, if I3D is given.

    other: another episode, for the one-step figures.
    """
    seed, own_text = seed_of("case", cfg.seed, case.number), case.texts[0]
    latents, there = (each.clips.latents(each.episode, 0, cfg.camera) for each in (case, other))
    video = case.clips.root / case.episode.videos[cfg.camera]
    frames = read_frames(video, case.clips.indices(case.episode, 0))
    real = prepare_frames(frames, model.config.image_size)
    imagined = {  # from the same noise: only the words differ
        text: model.imagine(latents[:1], [text], steps=cfg.steps, seed=seed)[0] for text in case.texts
    }
    film(case.film, real, imagined, cfg.fps)
    elsewhere = (there[:1], other.texts[0])
    figures = {
        "per_frame": measures.per_frame(metrics, imagined[own_text], real),
        "one_step": measures.one_step_error(model, latents, own_text, other=elsewhere, seed=seed),
    }
    return figures | ({} if i3d is None else {"fvd": measures.action_scores(i3d, imagined[own_text], real)})


def stacked(rows: Sequence[dict[str, Tensor]]) -> dict[str, Float[Tensor, "E ..."]]:
    """Of a dictionary per episode, one of all episodes."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def summarise(episodes: list[dict[str, dict[str, Tensor]]]) -> dict[str, Any]:
    """The figures of some episodes: their number, means per frame, one-step error, FVD if it is measured."""
    parts = {part: stacked([figures[part] for figures in episodes]) for part in episodes[0]}
    means = {name: values.mean(0).tolist() for name, values in parts["per_frame"].items()}
    found = {"episodes": len(episodes), **means, "one_step": measures.one_step_figures(parts["one_step"])}
    return found | ({"fvd": measures.fvd_figures(parts["fvd"])} if "fvd" in parts else {})


def describe(figures: dict[str, Any], title: str) -> str:
    """The figures in a few words: means over the frames after the given one."""
    shown = {label: (figures, name) for name, label in TITLES.items() if name in figures}
    shown["one-step error"] = (figures["one_step"], "latents")
    words = [f"{title}, {figures['episodes']} episodes"]
    for label, (part, name) in shown.items():
        own, still = (np.mean(part[key][1:]) for key in (name, f"{name}_still"))
        words.append(f"{label} {own:.4g} (first frame repeated {still:.4g})")
    return "; ".join([*words, *([describe_fvd(figures["fvd"])] if figures.get("fvd") else [])])


@entry("step1_eval")
def main(cfg: DictConfig) -> None:
    check_counts(cfg, episodes=1, camera=0, **({} if cfg.steps is None else {"steps": 1}))
    check_rate("fps", cfg.fps)
    output, state = check_output(cfg.output, overwrite=cfg.overwrite), processes()
    weights = find_weights(cfg.checkpoint, "gfdm")
    model = GFDM.from_pretrained(weights).to(state.device).eval()
    metrics = METRICS if cfg.lpips is None else {**METRICS, "lpips": measures.load_lpips(cfg.lpips)}
    if cfg.fvd is not None and model.config.frames < FEWEST_FRAMES:
        fault = (
            f"needs clips of at least {FEWEST_FRAMES} frames, this checkpoint imagines {model.config.frames}"
        )
        raise UserError(f"fvd={cfg.fvd}: {fault}; leave fvd out")
    i3d = None if cfg.fvd is None else I3D.from_published(cfg.fvd).to(state.device)
    sets = open_sets(cfg.data, model.config, cfg.split)
    cases = choose(sets, cfg)
    check_latents(sets.values(), weights / "vae", model.config)
    state.wait_for_everyone()
    if state.is_main_process:
        prepare_output(output, overwrite=cfg.overwrite)
    state.wait_for_everyone()

    own = track(share(cases), "imagine", disable=not state.is_main_process)
    mine = [(c.number, evaluate(c, other_than(c, cases), model, metrics, i3d, cfg)) for c in own]
    figures = dict(gather_object(mine))
    if not state.is_main_process:
        return
    by_set = {name: [case for case in cases if case.data_set == name] for name in sets}
    summaries = {name: summarise([figures[c.number] for c in part]) for name, part in by_set.items()}
    found = {
        "checkpoint": str(weights),
        "split": cfg.split,
        "instruction": cfg.instruction,
        **summarise([figures[case.number] for case in cases]),
        "sets": {name: {"root": str(sets[name].root), **part} for name, part in summaries.items()},
    }
    write_file(output / "metrics.json", json.dumps(found, indent=1))
    films = {
        n: {c.film: f"{c.episode.id}: {' | '.join(c.texts)}" for c in part} for n, part in by_set.items()
    }
    write_gallery(output / "gallery.html", films, found)
    shown = found["sets"] | ({"all data sets": found} if len(sets) > 1 else {})
    print(*(describe(part, name) for name, part in shown.items()), sep="\n")
    print(f"{output / 'metrics.json'}\n{output / 'gallery.html'}: {len(cases)} clips, real beside imagined")


if __name__ == "__main__":
    main()
