"""The page about a whole recipe: `python -m Step3_DeFI.quickstart output=outputs/quickstart`.

Reads what `scripts/quickstart.sh` left in its folder and writes report.html: what ran and for how long, loss
curves, imagined beside real futures, which latent action moves what, and the rollout with its videos.
"""

import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from markupsafe import Markup
from omegaconf import DictConfig
from rich.console import Console

from defi import html
from defi.config import entry
from defi.engine.plot import curves
from defi.errors import UserError
from Step3_DeFI.rollout.report import report_blocks, result_table
from Step3_DeFI.rollout.results import RESULTS, Results, read_results

LOSSES = {"vae": "Video autoencoder", "gfdm": "GFDM", "gidm": "GIDM", "policy": "DeFI policy"}
MOST_FUTURES = 8
SMOKE = "size=smoke: this run only shows that everything runs; it learns nothing, so expect 0.00."


@dataclass(frozen=True)
class FinishedStep:
    """One line of the recipe: `done/<name>` holds seconds, title and command, separated by tabs."""

    name: str
    seconds: int
    title: str
    command: str


def finished_steps(folder: Path) -> list[FinishedStep]:
    """The recipe's steps in the order in which they ran."""
    files = sorted((folder / "done").glob("*"))
    return [
        FinishedStep(file.name, int(seconds), title, command)
        for file in files
        for seconds, title, command in [file.read_text().rstrip("\n").split("\t", 2)]
    ]


def remark(folder: Path) -> str:
    """What to know of the recipe's size before its numbers; the recipe noted it in `size`."""
    file = folder / "size"
    return SMOKE if file.is_file() and file.read_text().strip() == "smoke" else ""


def summary(steps: list[FinishedStep], results: Results) -> Markup:
    """Key figures, and each step with its time and command."""
    total = timedelta(seconds=sum(step.seconds for step in steps))
    limits = results.limits
    limit = max(limits, key=int)
    figures = {"average length of 5 in the unseen scene D": f"{limits[limit]['average']:.2f}"}
    if results.baseline:
        figures["random actions"] = f"{results.baseline['limits'][limit]['average']:.2f}"
    figures["all steps together"] = str(total)
    rows = [[step.title, str(timedelta(seconds=step.seconds))] for step in steps]
    commands = html.code("\n".join(step.command for step in steps))
    return html.section("What ran", html.cards(figures), html.table(["step", "time"], rows), commands)


def loss_curves(ckpts: Path) -> Markup:
    """The training loss of each job."""
    charts = []
    for name, title in LOSSES.items():
        found = curves(ckpts / name)
        lines = {"training": found["train/loss"]}
        lines |= {
            key.split("/", 1)[1].replace("_", " "): line for key, line in found.items() if "held_out" in key
        }
        charts.append(html.line_chart(lines, title=title, x_label="step", y_label="loss", log_y=True))
    return html.section("Training", html.grid(*charts, width=380))


def futures(folder: Path) -> Markup:
    """Stage 1: imagined futures beside the real ones."""
    clips = sorted(folder.rglob("*.mp4"))[:MOST_FUTURES]
    return html.section(
        "Imagined futures",
        html.paragraph(
            "Held-out episodes of scene D, which no training saw: the real future, and the one GFDM "
            "imagines from the first picture and the instruction alone."
        ),
        html.grid(*(html.video(clip) for clip in clips), width=280),
    )


def latent_actions(folder: Path) -> Markup:
    """Stage 2: which code moves what, and whether the codes mean anything."""
    health = json.loads((folder / "health.json").read_text())
    scores = {name: found["all"] for name, found in health["probe"].items()}
    rows = [[name, "—" if score is None else score] for name, score in scores.items()]
    return html.section(
        "Latent actions",
        html.paragraph("What moved in the picture where GIDM, trained on video alone, chose the same code."),
        html.picture(folder / "gallery.png"),
        html.table(["robot actions read linearly from", "R², held-out"], rows),
        html.note(
            f"Perplexity {health['perplexity']:.1f}, {int(health['dead_codes'])} codes never used. "
            "R² 1: the robot's motion follows exactly; 0: no better than its mean."
        ),
    )


def write(folder: Path) -> Path:
    """Write report.html from everything in the recipe's folder.

    Raises:
        UserError: the recipe has not come to its end there.
    """
    if not (folder / "rollout" / RESULTS).is_file():
        raise UserError(f"{folder}: no finished quickstart; run scripts/quickstart.sh output={folder}")
    results = read_results(folder / "rollout" / RESULTS)
    told = remark(folder)
    return html.write_page(
        folder / "report.html",
        "DeFI quickstart",
        *([html.paragraph(told)] if told else []),
        summary(finished_steps(folder), results),
        *report_blocks(results, folder / "rollout" / "videos"),
        futures(folder / "imagined"),
        latent_actions(folder / "codes"),
        loss_curves(folder / "ckpts"),
        subtitle="Imagine the future, name the motion, act: all three stages trained on demonstrations "
        "from scenes A, B and C of the built-in play table, rolled out in scene D.",
    )


@entry("quickstart")
def main(cfg: DictConfig) -> None:
    folder = Path(cfg.output)
    report = write(folder)
    results = read_results(folder / "rollout" / RESULTS)
    console = Console(highlight=False)
    console.print(result_table(results))
    if told := remark(folder):
        console.print(told, soft_wrap=True)
    console.print(f"Report: {report}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
