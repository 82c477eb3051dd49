"""Imagine held-out episodes and measure how close they come: `python -m Step1_GFDM.eval checkpoint=<run>`.

Writes clips/ (the real future beside the imagined one, and beside that of an instruction of yours),
gallery.html with them, and metrics.json: per frame PSNR, SSIM, LPIPS where its weights are given, and the
one-step error (`Step1_GFDM.one_step`), each beside that of a future which repeats the first frame.
"""

import json
from collections.abc import Callable
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

from defi import html
from defi.config import entry, typed
from defi.engine.checkpoint import find_weights
from defi.engine.data import SampleNoise
from defi.engine.output import check_output, prepare_output, write_file
from defi.processes import processes
from defi.video import draw_text, prepare_frames, read_frames, to_uint8, write_mp4
from Step1_GFDM.data import Clips, ClipsConfig, Episode, read_latents
from Step1_GFDM.lpips import LPIPS
from Step1_GFDM.model import GFDM
from Step1_GFDM.one_step import one_step_error, one_step_figures

Metric = Callable[[Tensor, Tensor], Tensor]
"""Imagined and real frames [F, 3, H, W] in [-1, 1] -> a figure per frame [F]."""
LOWEST_FILM = 160  # pixels: smaller pictures are enlarged, so that the words fit
TITLES = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS"}


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
    """Imagined frames in [-1, 1] from scaled latents of the first ones; clip i draws noise from seed + i."""
    device = model.unet.device
    size = model.noise(1).shape[1:]
    noise = SampleNoise(torch.arange(len(first)) + seed, device).normal(*size)
    latents = model.generate(first.to(device), model.encode_text(texts), noise=noise, steps=steps)
    return model.decode_latents(latents).cpu()


def choose(clips: Clips, count: int) -> list[Episode]:
    """Episodes spread evenly over the data set."""
    spread = np.linspace(0, len(clips.episodes) - 1, min(count, len(clips.episodes)))
    return [clips.episodes[i] for i in spread.round().astype(int)]


def score(
    metrics: dict[str, Metric], imagined: Float[Tensor, "F 3 H W"], real: Float[Tensor, "F 3 H W"]
) -> dict[str, Float[Tensor, " F"]]:
    """Each metric of the imagined future, and of one that repeats the first frame (`…_still`)."""
    still = real[:1].expand_as(real)
    found = {name: metric(imagined, real) for name, metric in metrics.items()}
    return found | {f"{name}_still": metric(still, real) for name, metric in metrics.items()}


def report(scores: dict[str, Any]) -> None:
    """Print the figures per frame."""
    table = Table("frame", *(str(i) for i in range(len(scores["psnr"]))))
    for name, title in TITLES.items():
        if name in scores:
            for key, label in ((name, title), (f"{name}_still", f"{title}, standing still")):
                table.add_row(label, *(f"{v:.3f}" if abs(v) < 10 else f"{v:.1f}" for v in scores[key]))
    for key, label in (("latents", "one-step error"), ("latents_still", "one-step error, standing still")):
        table.add_row(label, *(f"{v:.3f}" for v in scores["one_step"][key]))
    Console().print(table)


@dataclass
class Judged:
    """An episode: its film (the real future beside what each instruction leads to) and its figures."""

    number: int
    name: str
    clip: Path
    texts: list[str]
    scores: dict[str, Float[Tensor, " F"]]
    one_step: dict[str, Tensor]


def film(path: Path, real: Float[Tensor, "F 3 H W"], imagined: dict[str, Tensor], fps: float) -> None:
    """Real and imagined frames side by side, with the instructions below."""
    beside = np.concatenate([to_uint8(frames) for frames in (real, *imagined.values())], axis=2)
    enlarged = -(-LOWEST_FILM // beside.shape[1])
    beside = beside.repeat(enlarged, axis=1).repeat(enlarged, axis=2)
    words = " | ".join(["real", *(f"imagined: {text}" for text in imagined)])
    write_mp4(path, np.stack([draw_text(frame, words) for frame in beside]), fps=fps)


def write_gallery(path: Path, judged: list[Judged], metrics: dict[str, Any], *, subtitle: str) -> None:
    """The clips with their instructions, and the curves of the figures over the frames."""
    charts = []
    curves = {title: (metrics, name) for name, title in TITLES.items() if name in metrics}
    curves["One-step error of the latents"] = (metrics["one_step"], "latents")
    for title, (figures, name) in curves.items():
        lines = {"imagined": figures[name], "standing still": figures[f"{name}_still"]}
        points = {label: (range(1, len(values)), values[1:]) for label, values in lines.items()}
        charts.append(html.line_chart(points, title=title, x_label="frame"))
    ratio = metrics["one_step"]["features"]
    films = (html.video(each.clip, f"{each.name}: {' | '.join(each.texts)}", width=380) for each in judged)
    html.write_page(
        path,
        "Imagined futures",
        html.section(
            "Real beside imagined",
            html.note("Left the real future, then what the first frame and each instruction lead to."),
            html.grid(*films, width=380),
        ),
        html.section(
            "Figures per frame after the given one",
            html.grid(*charts, width=380),
            html.note(
                "One-step error: root mean square, of the clean latents that stage 3's single pass predicts."
                + ("" if ratio is None else f" Influence of the noise on its features: {ratio:.2f} (best 0).")
            ),
        ),
        subtitle=subtitle,
    )


def columns(rows: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Of one dictionary per episode, one of lists."""
    return {name: [row[name] for row in rows] for name in rows[0]}


@entry("step1_eval")
def main(cfg: DictConfig) -> None:
    output, state = check_output(cfg.output, overwrite=cfg.overwrite), processes()
    weights = find_weights(cfg.checkpoint, "gfdm")
    model = GFDM.from_pretrained(weights).to(state.device).eval()
    metrics: dict[str, Metric] = {"psnr": psnr, "ssim": ssim}
    if cfg.lpips is not None:
        metrics["lpips"] = LPIPS.from_folder(cfg.lpips)
    section = next(iter(cfg.data.sets.values()))
    data = Clips(typed(ClipsConfig, section, "data.sets"), frames=model.config.frames, split=cfg.split)
    episodes = choose(data, cfg.episodes)
    state.wait_for_everyone()
    if state.is_main_process:
        prepare_output(output, overwrite=cfg.overwrite)
    state.wait_for_everyone()

    def look(episode: Episode) -> tuple[Tensor, str]:
        """Latents of its clip, and its instruction."""
        file = data.root / episode.latents[cfg.camera]
        return read_latents(file, data.indices(episode, 0)), episode.texts[0]

    def judge(number: int) -> Judged:
        episode, seed = episodes[number], cfg.seed + number
        latents, own = look(episode)
        frames = read_frames(data.root / episode.videos[cfg.camera], data.indices(episode, 0))
        real = prepare_frames(frames, model.config.image_size)
        imagined = {  # under each instruction from the same noise: only the words differ
            text: imagine(model, latents[:1], [text], steps=cfg.steps, seed=seed)[0]
            for text in (own, *([cfg.instruction] if cfg.instruction is not None else []))
        }
        clip = output / "clips" / f"{number:04d}.mp4"
        film(clip, real, imagined, cfg.fps)
        other, words = look(episodes[number - 1])
        one_step = one_step_error(model, latents, own, other=(other[:1], words), seed=seed)
        scores = score(metrics, imagined[own], real)
        cpu = {name: value.cpu() for name, value in one_step.items()}
        return Judged(number, episode.id, clip, list(imagined), scores, cpu)

    share = range(state.process_index, len(episodes), state.num_processes)
    mine = [judge(number) for number in track(share, "imagine", disable=not state.is_main_process)]
    judged = sorted(gather_object(mine), key=lambda each: each.number)
    if not state.is_main_process:
        return
    scores = columns([each.scores for each in judged])
    found = {
        "episodes": len(episodes),
        "instruction": cfg.instruction,
        **{name: torch.stack(values).mean(0).tolist() for name, values in scores.items()},
        "one_step": one_step_figures(columns([each.one_step for each in judged])),
    }
    write_file(output / "metrics.json", json.dumps(found, indent=1))
    write_gallery(output / "gallery.html", judged, found, subtitle=f"{weights} on {data.root}, {cfg.split}")
    report(found)
    print(f"{output / 'metrics.json'}\n{output / 'gallery.html'}: {len(judged)} clips, real beside imagined")


if __name__ == "__main__":
    main()
