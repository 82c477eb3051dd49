"""The page about a finished quickstart: `python -m Step3_DeFI.quickstart output=outputs/quickstart`.

Reads what `scripts/quickstart.sh` left in its folder and fills in `quickstart.html.j2`: what ran and for how
long, the rollout with its videos, imagined beside real futures, which latent action moves what, losses.
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
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
SMOKE = "size=smoke: this run only shows that everything runs; it learns nothing, so expect no success."


def remark(folder: Path) -> str:
    """What to know of the run's size before its numbers; the script wrote it to `size`."""
    file = folder / "size"
    return SMOKE if file.is_file() and file.read_text().strip().endswith("smoke") else ""


def loss_chart(run: Path) -> Figure:
    """The training loss of a run, and what was held out."""
    found = curves(run)
    held_out = {name: line for name, line in found.items() if "held_out" in name}
    named = {name.partition("/")[2].replace("_", " "): line for name, line in held_out.items()}
    return html.line_chart({"training": found["train/loss"], **named}, x_label="step", log_y=True)


def probe_scores(health: Mapping[str, Any]) -> dict[str, str]:
    """How well each input of stage 2's linear probe tells the robot's actions: R² on held-out pairs."""
    scores = {name: found["all"] for name, found in health["probe"].items()}
    return {name: "—" if score is None else f"{score:.3g}" for name, score in scores.items()}


@entry("quickstart")
def main(cfg: DictConfig) -> None:
    """Write report.html from everything in the folder of a quickstart."""
    folder = Path(cfg.output)
    if not (folder / "rollout" / RESULTS).is_file():
        raise UserError(f"{folder}: no finished quickstart; run scripts/quickstart.sh output={folder}")
    # `done/<name>` of each step, in their order, holds seconds, title and command, separated by tabs.
    lines = [file.read_text().rstrip("\n").split("\t", 2) for file in sorted((folder / "done").glob("*"))]
    steps = [(timedelta(seconds=int(seconds)), title, command) for seconds, title, command in lines]
    health = read_json(folder / "codes" / "health.json", "run scripts/quickstart.sh again")
    results = read_results(folder / "rollout")
    values = report_values(results, folder / "rollout" / "videos")
    report = html.write_page(
        folder / "report.html",
        "Step3_DeFI/quickstart.html.j2",
        title="DeFI quickstart",
        remark=remark(folder),
        overview={**values["figures"], "time": sum((time for time, _, _ in steps), timedelta())},
        steps=steps,
        futures=sorted((folder / "imagined").rglob("*.mp4"))[:MOST_FUTURES],
        losses={title: loss_chart(folder / "ckpts" / name) for name, title in LOSSES.items()},
        health=health,
        scores=probe_scores(health),
        codes_picture=folder / "codes" / "gallery.png",
        **values,
    )
    console = Console(highlight=False)
    console.print(result_table(results))
    for line in filter(None, (remark(folder), f"Report: {report}")):
        console.print(line, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
