"""The result for people: tables at the terminal, videos, and report.html (`report.html.j2`) with both."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.box import SIMPLE
from rich.table import Table

from defi import html
from defi.benchmarks.benchmark import About
from defi.video import draw_text, write_mp4
from Step3_DeFI.rollout.results import HOWEVER_DONE, Results
from Step3_DeFI.rollout.simulator import Clip

CLIP_HEIGHT = 200  # pixels of all pictures
MOST_VIDEOS = 12  # of each outcome
AGENTS = {"policy": "DeFI"}  # others are the benchmark's


def rows(results: Results) -> list[dict[str, Any]]:
    """The lines of the table, as text: the headline's score last, the baseline below."""
    about, found = results.about, [(results.policy["kind"], results.scores)]
    if results.baseline:
        found.append((results.baseline["agent"], results.baseline["scores"]))
    lines = []
    for agent, scores in found:
        for score, summary in scores.items():
            average, low, high = (
                about.number(value, score) for value in (summary["average"], *summary["interval"])
            )
            lines.append(
                {
                    "who": who(about, agent),
                    "own": scores is results.scores,
                    "score": score,
                    "average": f"{average} [{low}, {high}]",
                    "success": summary["success"],
                }
            )
    return lines


def who(about: About, agent: str) -> str:
    """An agent in words."""
    return (AGENTS | about.agents).get(agent, agent)


def text_table(title: str, columns: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    """A table for the terminal, its first column at the left."""
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1), pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def result_table(results: Results) -> Table:
    """The average, and the rates beside it."""
    about = results.about
    lines = [
        (row["who"], row["score"], row["average"], *(f"{success['rate']:.0%}" for success in row["success"]))
        for row in rows(results)
    ]
    return text_table(about.title, ("", about.score, about.figure, *about.columns), lines)


def task_rates(results: Results) -> list[tuple[str, int, int, float]]:
    """Task, solved, tried and success rate by the headline's score, the best first."""
    tasks = results.scores[results.headline]["tasks"]
    found = [(task, n["solved"], n["tried"], n["solved"] / n["tried"]) for task, n in tasks.items()]
    return sorted(found, key=lambda entry: (-entry[3], entry[0]))


def task_table(results: Results) -> Table:
    """The same for the terminal."""
    lines = [(task, f"{n}", f"{tried}", f"{rate:.0%}") for task, n, tried, rate in task_rates(results)]
    return text_table(results.about.tasks_title, ("task", "solved", "tried", "rate"), lines)


def write_report(path: Path, results: Results, videos: Path) -> Path:
    """The page, with videos from the folder `videos` embedded."""
    template = "Step3_DeFI/rollout/report.html.j2"
    return html.write_page(path, template, title="Rollout", **report_values(results, videos))


def report_values(results: Results, videos: Path) -> dict[str, Any]:
    """What the template shows, also for templates that extend it."""
    about, run, score = results.about, results.run, results.headline
    own = [row for row in rows(results) if row["own"]]
    figures = {about.headline: about.number(results.scores[score]["average"], score)}
    if results.baseline:
        beside = results.baseline["scores"][score]["average"]
        figures[who(about, results.baseline["agent"])] = about.number(beside, score)
    if about.first:
        figures[about.first] = f"{100 * own[-1]['success'][0]['rate']:.0f} %"
    if not run[f"earlier_{about.episodes}"]:
        figures["time"] = str(timedelta(seconds=round(run["seconds"])))
    published = [(each.method, each.figure, each.score, each.source, False) for each in about.published]
    for row in own:
        source = f"this run, {len(results.episodes)} {about.episodes}, {row['average']}"
        published.append((row["who"], results.scores[row["score"]]["average"], row["score"], source, True))
    published.sort(key=lambda entry: -entry[1])
    return {
        "about": about,
        "subtitle": about.title,
        "figures": figures,
        "rows": rows(results),
        "not_comparable": about.incomparable or run.get("caveat"),
        "published": [(method, about.number(figure, score), *other) for method, figure, *other in published],
        "tasks": task_rates(results),
        "videos": {
            "Solved": choose_videos(videos, "solved", MOST_VIDEOS, about.episode),
            "Not solved": choose_videos(videos, "failed", MOST_VIDEOS, about.episode),
        },
        "record": record(results),
    }


def record(results: Results) -> dict[str, str]:
    """What is needed to repeat or to doubt the numbers."""
    run = results.run
    facts = {**results.policy, **results.protocol}
    settings = run["settings"].items()
    facts |= {key: value for key, value in settings if key not in HOWEVER_DONE | facts.keys()}
    facts |= {key: run.get(key) for key in ("started", "renderer", "control_steps", "observations")}
    for key, value in facts.items():
        if isinstance(value, Mapping):
            facts[key] = ", ".join(f"{name} {part}" for name, part in value.items())
        elif isinstance(value, (list, tuple)):
            facts[key] = ", ".join(map(str, value))
    return {key.replace("_", " "): str(value) for key, value in (facts | run["versions"]).items()}


def write_clip(folder: Path, clip: Clip, fps: float) -> None:
    """Write a clip, all cameras side by side and the instruction below, `fps` pictures per second.

    Its name is `<episode>_<position>_<solved|failed>_<task>.mp4`.
    """
    outcome = "solved" if clip.solved else "failed"
    path = folder / f"{clip.episode:04d}_{clip.position + 1}_{outcome}_{clip.task}.mp4"
    captioned = []
    for images in zip(*clip.images.values()):
        sizes = [(round(each.shape[1] * CLIP_HEIGHT / each.shape[0]), CLIP_HEIGHT) for each in images]
        scaled = [Image.fromarray(each).resize(size, Image.BILINEAR) for each, size in zip(images, sizes)]
        captioned.append(draw_text(np.concatenate(scaled, axis=1), clip.instruction))
    write_mp4(path, np.stack(captioned), fps)


def choose_videos(folder: Path, outcome: str, most: int, noun: str) -> dict[Path, str]:
    """Up to `most` videos of an outcome, with captions: one of each task, then second ones, and so on."""
    seen, ranked = Counter(), []
    for path in sorted(folder.glob(f"*_{outcome}_*.mp4")):
        episode, position, _, task = path.stem.split("_", 3)
        seen[task] += 1
        ranked.append((seen[task], task, path, f"{task}: {noun} {int(episode)}, task {position}"))
    return {path: caption for _, _, path, caption in sorted(ranked)[:most]}
