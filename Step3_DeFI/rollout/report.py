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
from defi.video import draw_text, write_mp4
from Step3_DeFI.rollout.results import Results
from Step3_DeFI.rollout.simulator import AGENTS, Clip

SEQUENCES = {"official": "official sequences", "subset": "chains"}
WORLDS = {"fresh": "a newly loaded world per chain", "persistent": "one world per process"}
CLIP_HEIGHT = 200  # pixels of both pictures
STEPS_PER_SECOND = 30
MOST_VIDEOS = 12  # of each outcome
NOT_CALVIN = "This is not CALVIN's protocol (its scene D, its sequences): published numbers do not compare."
LEADERBOARD = "MINT-SJTU/Evo-SOTA.io, 14 July 2026, self-reported"
PUBLISHED = {  # average length on CALVIN, ABC→D, 1000 sequences
    "MMaDA-VLA": 4.78, "Xiaomi-Robotics-0": 4.75, "π-RL (with reinforcement learning)": 4.71,
    "AVA-VLA": 4.65, "FLOWER": 4.53, "DeFI": 4.51, "VLA-Adapter-Pro": 4.50, "HARP-VLA": 4.48,
    "DreamVLA": 4.44, "X-VLA": 4.43, "UnifiedVLA": 4.41, "VPP": 4.33, "Seer": 4.28, "UP-VLA": 4.08,
    "MoDE": 4.01, "Moto": 3.10, "GR-1": 3.06,
}  # fmt: skip
STEPS = {"X-VLA": "720", "VPP": "360"}  # per task, where stated
SOURCES = {"DeFI": "arXiv 2604.16391; the released settings have 720 steps"}


def rows(results: Results) -> list[dict[str, Any]]:
    """The lines of the table, as text: the smallest limit first, the baseline below."""
    found = [(results.policy["kind"], results.limits)]
    if results.baseline:
        found.append((results.baseline["agent"], results.baseline["limits"]))
    return [
        {
            "who": AGENTS.get(agent, agent),
            "own": limits is results.limits,
            "limit": limit,
            "average": "{average:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]".format(**limits[limit]),
            "success": limits[limit]["success"],
        }
        for agent, limits in found
        for limit in sorted(limits, key=int)
    ]


def conditions(results: Results) -> str:
    """One line that says what was measured."""
    protocol = results.protocol
    return (
        f"{protocol['chains']} {SEQUENCES[protocol['sequences']]} of {protocol['length']} tasks, "
        f"scene {protocol['scene']}, {protocol['assets']} assets, {WORLDS[protocol['world']]}, "
        f"seed {results.run['settings']['seed']}"
    )


def text_table(title: str, columns: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    """A table for the terminal, its first column at the left."""
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1), pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def result_table(results: Results) -> Table:
    """Average length and success at each position."""
    positions = (str(i + 1) for i in range(results.protocol["length"]))
    lines = [
        (row["who"], row["limit"], row["average"], *(f"{success['rate']:.0%}" for success in row["success"]))
        for row in rows(results)
    ]
    return text_table(conditions(results), ("", "steps", "average length", *positions), lines)


def task_rates(results: Results) -> list[tuple[str, int, int, float]]:
    """Task, solved, tried and success rate at the largest limit, the best first."""
    tasks = results.limits[max(results.limits, key=int)]["tasks"]
    found = [(task, n["solved"], n["tried"], n["solved"] / n["tried"]) for task, n in tasks.items()]
    return sorted(found, key=lambda entry: (-entry[3], entry[0]))


def task_table(results: Results) -> Table:
    """The same for the terminal."""
    title = f"Per task, within {max(results.limits, key=int)} steps"
    lines = [(task, f"{n}", f"{tried}", f"{rate:.0%}") for task, n, tried, rate in task_rates(results)]
    return text_table(title, ("task", "solved", "tried", "rate"), lines)


def write_report(path: Path, results: Results, videos: Path) -> Path:
    """The page, with videos from the folder `videos` embedded."""
    template = "Step3_DeFI/rollout/report.html.j2"
    return html.write_page(path, template, title="Rollout", **report_values(results, videos))


def report_values(results: Results, videos: Path) -> dict[str, Any]:
    """What the template shows, also for templates that extend it."""
    protocol, run, limit = results.protocol, results.run, max(results.limits, key=int)
    own = [row for row in rows(results) if row["own"]]
    figures = {f"average length of {protocol['length']}": f"{results.limits[limit]['average']:.2f}"}
    if results.baseline:
        beside = results.baseline["limits"][limit]["average"]
        figures[AGENTS.get(results.baseline["agent"], "baseline")] = f"{beside:.2f}"
    figures["solved the first task"] = f"{100 * own[-1]['success'][0]['rate']:.0f} %"
    if not run["earlier_chains"]:
        figures["time"] = str(timedelta(seconds=round(run["seconds"])))
    published = [
        (name, average, STEPS.get(name, "not stated"), SOURCES.get(name, LEADERBOARD), False)
        for name, average in PUBLISHED.items()
    ]
    for row in own:
        source = f"this run, {protocol['chains']} sequences, {row['average']}"
        published.append((row["who"], results.limits[row["limit"]]["average"], row["limit"], source, True))
    calvin = (protocol["assets"], protocol["sequences"], protocol["scene"]) == ("calvin", "official", "D")
    return {
        "subtitle": conditions(results),
        "figures": figures,
        "length": protocol["length"],
        "rows": rows(results),
        "not_comparable": run.get("caveat") if calvin else NOT_CALVIN,
        "published": sorted(published, key=lambda entry: -entry[1]),
        "limit": limit,
        "tasks": task_rates(results),
        "videos": {
            "Solved": choose_videos(videos, "solved", MOST_VIDEOS),
            "Not solved": choose_videos(videos, "failed", MOST_VIDEOS),
        },
        "record": record(results),
    }


def record(results: Results) -> dict[str, str]:
    """What is needed to repeat or to doubt the numbers."""
    run = results.run
    facts = {**results.policy, **results.protocol}
    facts |= {key: run["settings"][key] for key in ("seed", "chunk", "batch", "sim")}
    facts |= {key: run.get(key) for key in ("started", "renderer", "control_steps", "observations")}
    for key, value in facts.items():
        if isinstance(value, Mapping):
            facts[key] = ", ".join(f"{name} {part}" for name, part in value.items())
        elif isinstance(value, (list, tuple)):
            facts[key] = ", ".join(map(str, value))
    return {key.replace("_", " "): str(value) for key, value in (facts | run["versions"]).items()}


def write_clip(folder: Path, clip: Clip, every: int) -> None:
    """Write a clip, both cameras side by side and the instruction below, that plays at the robot's speed.

    Its name is `<chain>_<position>_<solved|failed>_<task>.mp4`.
    """
    outcome = "solved" if clip.solved else "failed"
    path = folder / f"{clip.chain:04d}_{clip.position + 1}_{outcome}_{clip.task}.mp4"
    captioned = []
    for images in zip(*clip.images.values()):
        sizes = [(round(each.shape[1] * CLIP_HEIGHT / each.shape[0]), CLIP_HEIGHT) for each in images]
        scaled = [Image.fromarray(each).resize(size, Image.BILINEAR) for each, size in zip(images, sizes)]
        captioned.append(draw_text(np.concatenate(scaled, axis=1), clip.instruction))
    write_mp4(path, np.stack(captioned), STEPS_PER_SECOND / every)


def choose_videos(folder: Path, outcome: str, most: int) -> dict[Path, str]:
    """Up to `most` videos of an outcome, with captions: one of each task, then second ones, and so on."""
    seen, ranked = Counter(), []
    for path in sorted(folder.glob(f"*_{outcome}_*.mp4")):
        chain, position, _, task = path.stem.split("_", 3)
        seen[task] += 1
        ranked.append((seen[task], task, path, f"{task}: chain {int(chain)}, task {position}"))
    return {path: caption for _, _, path, caption in sorted(ranked)[:most]}
