"""The page about a finished quickstart: `python -m Step3_DeFI.quickstart output=outputs/quickstart`.

Reads what `scripts/quickstart.sh` left in its folder and fills in `quickstart.html.j2`: what ran and for how
long, the rollout with its videos, imagined beside real futures, which latent action moves what, losses.
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from defi import html
from defi.config import entry
from defi.engine.plot import curves
from defi.errors import UserError
from defi.files import read_json
from Step3_DeFI.rollout.report import report_values, result_table
from Step3_DeFI.rollout.results import RESULTS, read_results

LOSSES = {"vae": "Video autoencoder", "gfdm": "GFDM", "gidm": "GIDM", "policy": "DeFI policy"}
MOST_FUTURES = 8
SMOKE = "size=smoke: this run only shows that everything runs; it learns nothing, so expect 0.00."


def remark(folder: Path) -> str:
    """What to know of the run's size before its numbers; the script wrote it to `size`."""
    file = folder / "size"
    return SMOKE if file.is_file() and file.read_text().strip() == "smoke" else ""


def finished_steps(folder: Path) -> list[dict[str, Any]]:
    """The steps in their order: `done/<name>` holds seconds, title and command, separated by tabs."""
    lines = [file.read_text().rstrip("\n").split("\t", 2) for file in sorted((folder / "done").glob("*"))]
    return [
        {"title": title, "time": timedelta(seconds=int(seconds)), "command": command}
        for seconds, title, command in lines
    ]


def loss_chart(run: Path) -> str:
    """The training loss of a run, and what was held out."""
    found = curves(run)
    lines = {"training": found["train/loss"]}
    lines |= {
        name.partition("/")[2].replace("_", " "): line for name, line in found.items() if "held_out" in name
    }
    return html.line_chart(lines, x_label="step", log_y=True)


def probe_scores(health: Mapping[str, Any]) -> dict[str, str]:
    """How well each input of stage 2's linear probe tells the robot's actions: R² on held-out pairs."""
    scores = {name: found["all"] for name, found in health["probe"].items()}
    return {name: "—" if score is None else f"{score:.3g}" for name, score in scores.items()}


def write(folder: Path) -> Path:
    """Write report.html from everything in the folder of a quickstart.

    Raises:
        UserError: the quickstart is not finished there.
    """
    if not (folder / "rollout" / RESULTS).is_file():
        raise UserError(f"{folder}: no finished quickstart; run scripts/quickstart.sh output={folder}")
    steps = finished_steps(folder)
    health = read_json(folder / "codes" / "health.json", "run scripts/quickstart.sh again")
    values = report_values(read_results(folder / "rollout"), folder / "rollout" / "videos")
    total = sum((step["time"] for step in steps), timedelta())
    overview = {**values["figures"], "time": total}
    return html.write_page(
        folder / "report.html",
        "Step3_DeFI/quickstart.html.j2",
        title="DeFI quickstart",
        remark=remark(folder),
        overview=overview,
        steps=steps,
        futures=sorted((folder / "imagined").rglob("*.mp4"))[:MOST_FUTURES],
        losses={title: loss_chart(folder / "ckpts" / name) for name, title in LOSSES.items()},
        health=health,
        scores=probe_scores(health),
        codes_picture=folder / "codes" / "gallery.png",
        **values,
    )


@entry("quickstart")
def main(cfg: DictConfig) -> None:
    folder = Path(cfg.output)
    report = write(folder)
    console = Console(highlight=False)
    console.print(result_table(read_results(folder / "rollout")))
    if words := remark(folder):
        console.print(words, soft_wrap=True)
    console.print(f"Report: {report}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
