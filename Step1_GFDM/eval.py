"""Imagine held-out episodes and measure how close they come: `python -m Step1_GFDM.eval checkpoint=<run>`.

Writes metrics.json (PSNR and SSIM per frame) and clips/: the real future beside the imagined one.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from defi.config import entry, typed
from defi.engine.checkpoint import find_weights
from defi.engine.data import SampleNoise
from defi.engine.output import check_output, prepare_output, write_file
from defi.video import draw_text, prepare_frames, read_frames, to_uint8, write_mp4
from Step1_GFDM.data import Clips, ClipsConfig, Episode, read_latents
from Step1_GFDM.model import GFDM


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


def report(scores: dict[str, list[float]]) -> None:
    """Print the scores per frame."""
    table = Table("frame", *(str(i) for i in range(len(scores["psnr"]))))
    table.add_row("PSNR, dB", *(f"{v:.1f}" for v in scores["psnr"]))
    table.add_row("SSIM", *(f"{v:.3f}" for v in scores["ssim"]))
    table.add_row("PSNR of standing still", *(f"{v:.1f}" for v in scores["psnr_still"]))
    Console().print(table)


@entry("step1_eval")
def main(cfg: DictConfig) -> None:
    output = check_output(cfg.output, overwrite=cfg.overwrite)
    model = GFDM.from_pretrained(find_weights(cfg.checkpoint, "gfdm")).eval()
    section = next(iter(cfg.data.sets.values()))
    clips = Clips(typed(ClipsConfig, section, "data.sets"), frames=model.config.frames, split=cfg.split)
    episodes = choose(clips, cfg.episodes)
    prepare_output(output, overwrite=cfg.overwrite)

    scores: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "psnr_still": []}
    for number, episode in enumerate(track(episodes, "imagine")):
        indices = clips.indices(episode, 0)
        text = cfg.instruction or episode.texts[0]
        first = read_latents(clips.root / episode.latents[cfg.camera], indices[:1])
        imagined = imagine(model, first, [text], steps=cfg.steps, seed=cfg.seed + number)[0]
        frames = read_frames(clips.root / episode.videos[cfg.camera], indices)
        real = prepare_frames(frames, model.config.image_size)
        for name, value in (
            ("psnr", psnr(imagined, real)),
            ("ssim", ssim(imagined, real)),
            ("psnr_still", psnr(real[:1].expand_as(real), real)),
        ):
            scores[name].append(value)
        beside = np.concatenate([to_uint8(real), to_uint8(imagined)], axis=2)
        frames = np.stack([draw_text(frame, f"real | imagined: {text}") for frame in beside])
        write_mp4(output / "clips" / f"{episode.id}.mp4", frames, fps=cfg.fps)
    means = {name: torch.stack(values).mean(0).tolist() for name, values in scores.items()}
    write_file(output / "metrics.json", json.dumps({"episodes": len(episodes), **means}, indent=1))
    report(means)
    print(f"{output / 'metrics.json'}\n{output / 'clips'}: {len(episodes)} clips, real beside imagined")


if __name__ == "__main__":
    main()
