"""Imagined futures to look at: films of the real future beside imagined ones, and a page with them."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from defi import html
from defi.video import draw_text, to_uint8, write_mp4

LOWEST_FILM = 160  # pixels: smaller pictures are enlarged, so that the words fit
MOST_FILMS = 24  # of a data set; they are embedded in the page
TITLES = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS"}


def film(path: Path, real: Float[Tensor, "F 3 H W"], imagined: dict[str, Tensor], fps: float) -> None:
    """Real and imagined frames side by side, with the instructions below."""
    beside = np.concatenate([to_uint8(frames) for frames in (real, *imagined.values())], axis=2)
    enlarged = -(-LOWEST_FILM // beside.shape[1])
    beside = beside.repeat(enlarged, axis=1).repeat(enlarged, axis=2)
    words = " | ".join(["real", *(f"imagined: {text}" for text in imagined)])
    write_mp4(path, np.stack([draw_text(frame, words) for frame in beside]), fps=fps)


def write_gallery(path: Path, films: dict[str, dict[Path, str]], metrics: dict[str, Any]) -> None:
    """Data set by data set its films (evenly spread ones of many), and its figures over the frames.

    films: of each data set, film -> its caption. metrics: those in metrics.json.
    """
    sets = {}
    for name, shown in films.items():
        spread = np.linspace(0, len(shown) - 1, min(MOST_FILMS, len(shown))).round().astype(int)
        chosen = [list(shown.items())[i] for i in spread]
        sets[name] = {"films": chosen, "total": len(shown), **_measured(metrics["sets"][name])}
    subtitle, overall = f"{metrics['checkpoint']}, split {metrics['split']}", _measured(metrics)
    values = {"title": "Imagined futures", "subtitle": subtitle, "sets": sets, "overall": overall}
    html.write_page(path, "Step1_GFDM/gallery.html.j2", **values)


def _measured(figures: dict[str, Any]) -> dict[str, Any]:
    """A chart of each figure per frame after the given one, and what there is besides."""
    curves = {title: (figures, name) for name, title in TITLES.items() if name in figures}
    curves["One-step error of the latents"] = (figures["one_step"], "latents")
    charts = {}
    for title, (part, name) in curves.items():
        lines = {"imagined": part[name], "first frame repeated": part[f"{name}_still"]}
        points = {label: (range(1, len(values)), values[1:]) for label, values in lines.items()}
        charts[title] = html.line_chart(points, x_label="frame after the given one")
    notes = ["One-step error: root mean square, of the clean latents that stage 3's single pass predicts."]
    if figures["one_step"]["features"] is not None:
        notes.append(
            f"Influence of the noise on its features: {figures['one_step']['features']:.2f} (best 0)."
        )
    if figures.get("fvd"):
        notes.append(describe_fvd(figures["fvd"]))
    return {"charts": charts, "notes": " ".join(notes)}


def describe_fvd(fvd: dict[str, Any]) -> str:
    """FVD with all that must stand beside it, in one line."""
    still, clips = f"{fvd['imagined']:.1f} (first frame repeated {fvd['still']:.1f})", fvd["clips"]
    return f"FVD {still}, {clips} imagined and as many real clips" + (
        f": {fvd['warning']}." if fvd["warning"] else "."
    )
