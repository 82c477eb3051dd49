"""Imagined futures to look at: films of the real future beside imagined ones, and a page with them."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from markupsafe import Markup
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
    """Data set by data set its films, then the curves of the figures over the frames.

    films: of each data set, film -> its caption. metrics: those in metrics.json.
    """
    html.write_page(
        path,
        "Imagined futures",
        html.note("Left the real future, then what the first frame and each instruction lead to."),
        *(html.section(name, _films(shown), _curves(metrics["sets"][name])) for name, shown in films.items()),
        *([html.section("All data sets", _curves(metrics))] if len(films) > 1 else []),
        subtitle=f"{metrics['checkpoint']}, split {metrics['split']}",
    )


def _films(films: dict[Path, str]) -> Markup:
    """Evenly spread ones, where there are many."""
    spread = np.linspace(0, len(films) - 1, min(MOST_FILMS, len(films))).round().astype(int)
    chosen = [list(films.items())[i] for i in spread]
    shown = html.grid(*(html.video(path, caption, width=380) for path, caption in chosen), width=380)
    if len(chosen) == len(films):
        return shown
    return html.join([shown, html.note(f"{len(chosen)} of {len(films)} films; all lie in clips/.")])


def _curves(figures: dict[str, Any]) -> Markup:
    """Of each figure per frame after the given one, and what there is besides."""
    curves = {title: (figures, name) for name, title in TITLES.items() if name in figures}
    curves["One-step error of the latents"] = (figures["one_step"], "latents")
    charts = []
    for title, (part, name) in curves.items():
        lines = {"imagined": part[name], "standing still": part[f"{name}_still"]}
        points = {label: (range(1, len(values)), values[1:]) for label, values in lines.items()}
        charts.append(html.line_chart(points, title=title, x_label="frame after the given one"))
    ratio = figures["one_step"]["features"]
    notes = ["One-step error: root mean square, of the clean latents that stage 3's single pass predicts."]
    if ratio is not None:
        notes.append(f"Influence of the noise on its features: {ratio:.2f} (best 0).")
    if figures.get("fvd"):
        notes.append(describe_fvd(figures["fvd"]))
    return html.join([html.grid(*charts, width=380), html.note(" ".join(notes))])


def describe_fvd(fvd: dict[str, Any]) -> str:
    """FVD with all that must stand beside it, in one line."""
    words = (
        f"FVD {fvd['imagined']:.1f} (standing still {fvd['still']:.1f}), "
        f"{fvd['clips']} imagined and as many real clips"
    )
    return words + (f": {fvd['warning']}." if fvd["warning"] else ".")
