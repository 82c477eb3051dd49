"""The result for people: tables at the terminal, and report.html (`report.html.j2`) with bars and videos."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from defi import html
from Step3_DeFI.rollout.config import AGENTS
from Step3_DeFI.rollout.results import Results
from Step3_DeFI.rollout.videos import choose_videos

SEQUENCES = {"official": "official sequences", "subset": "chains"}
MOST_VIDEOS = 12  # of each outcome
NOT_CALVIN = "This is not CALVIN's protocol (its scene D, its sequences): published numbers do not compare."
LEADERBOARD = "MINT-SJTU/Evo-SOTA.io, 14 July 2026, self-reported"
PUBLISHED = (  # average length on CALVIN, ABC→D, 1000 sequences; steps per task, None where not stated
    ("MMaDA-VLA", 4.78, None, LEADERBOARD),
    ("Xiaomi-Robotics-0", 4.75, None, LEADERBOARD),
    ("π-RL (with reinforcement learning)", 4.71, None, LEADERBOARD),
    ("AVA-VLA", 4.65, None, LEADERBOARD),
    ("FLOWER", 4.53, None, LEADERBOARD),
    ("DeFI", 4.51, None, "arXiv 2604.16391; the released settings have 720 steps"),
    ("VLA-Adapter-Pro", 4.50, None, LEADERBOARD),
    ("HARP-VLA", 4.48, None, LEADERBOARD),
    ("DreamVLA", 4.44, None, LEADERBOARD),
    ("X-VLA", 4.43, 720, LEADERBOARD),
    ("UnifiedVLA", 4.41, None, LEADERBOARD),
    ("VPP", 4.33, 360, LEADERBOARD),
    ("Seer", 4.28, None, LEADERBOARD),
    ("UP-VLA", 4.08, None, LEADERBOARD),
    ("MoDE", 4.01, None, LEADERBOARD),
    ("Moto", 3.10, None, LEADERBOARD),
    ("GR-1", 3.06, None, LEADERBOARD),
)


def rows(results: Results) -> list[dict[str, Any]]:
    """The lines of the table: the largest limit first, the baseline below."""
    found = [(results.policy["kind"], results.limits)]
    if results.baseline:
        found.append((results.baseline["agent"], results.baseline["limits"]))
    return [
        {"who": name(agent), "limit": limit, "own": limits is results.limits, **limits[limit]}
        for agent, limits in found
        for limit in sorted(limits, key=int)
    ]


def name(agent: str) -> str:
    return AGENTS.get(agent, agent)


def average_text(summary: Mapping[str, Any]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(summary["average"], *summary["interval"])


def conditions(results: Results) -> str:
    """One line that says what was measured."""
    protocol = results.protocol
    world = "a newly loaded world per chain" if protocol["world"] == "fresh" else "one world per process"
    return (
        f"{protocol['chains']} {SEQUENCES[protocol['sequences']]} of {protocol['length']} tasks, "
        f"scene {protocol['scene']}, {protocol['assets']} assets, {world}, "
        f"seed {results.run['settings']['seed']}"
    )


def result_table(results: Results) -> Table:
    """Average length and success at each position, for the terminal."""
    table = Table(title=conditions(results), title_justify="left", box=SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column(no_wrap=True)
    for title in ("steps", "average length", *(f"{i + 1}" for i in range(results.protocol["length"]))):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows(results):
        rates = (f"{100 * success['rate']:.0f}%" for success in row["success"])
        table.add_row(row["who"], row["limit"], average_text(row), *rates)
    return table


def task_table(results: Results) -> Table:
    """Solved of tried per task, at the largest limit."""
    limit = max(results.limits, key=int)
    table = Table(title=f"Per task, within {limit} steps", title_justify="left", box=SIMPLE)
    table.add_column("task")
    for title in ("solved", "tried", "rate"):
        table.add_column(title, justify="right")
    for task, count in by_rate(results.limits[limit]["tasks"]):
        rate = count["solved"] / count["tried"]
        table.add_row(task, f"{count['solved']}", f"{count['tried']}", f"{100 * rate:.0f}%")
    return table


def by_rate(tasks: Mapping[str, Mapping[str, int]]) -> list[tuple[str, Mapping[str, int]]]:
    return sorted(tasks.items(), key=lambda item: (-item[1]["solved"] / item[1]["tried"], item[0]))


def write_report(path: Path, results: Results, videos: Path) -> Path:
    """The page, with videos from the folder `videos` embedded."""
    template = "Step3_DeFI/rollout/report.html.j2"
    return html.write_page(path, template, title="Rollout", **report_values(results, videos))


def report_values(results: Results, videos: Path) -> dict[str, Any]:
    """What the template shows, also for templates that extend it."""
    limit = max(results.limits, key=int)
    summary = results.limits[limit]
    figures = {f"average length of {results.protocol['length']}": f"{summary['average']:.2f}"}
    if results.baseline:
        beside = results.baseline["limits"][limit]
        figures[name(results.baseline["agent"])] = f"{beside['average']:.2f}"
    figures["solved the first task"] = f"{100 * summary['success'][0]['rate']:.0f} %"
    if not results.run["earlier_chains"]:
        figures["time"] = str(timedelta(seconds=round(results.run["seconds"])))
    return {
        "subtitle": conditions(results),
        "figures": figures,
        "length": results.protocol["length"],
        "rows": [row | {"average": average_text(row)} for row in rows(results)],
        "not_comparable": not_comparable(results),
        "published": published(results),
        "limit": limit,
        "tasks": by_rate(summary["tasks"]),
        "videos": {
            "Solved": choose_videos(videos, "solved", MOST_VIDEOS),
            "Not solved": choose_videos(videos, "failed", MOST_VIDEOS),
        },
        "record": record(results),
    }


def not_comparable(results: Results) -> str | None:
    """Why published numbers do not stand beside this one, if they do not."""
    protocol = results.protocol
    official = (protocol["assets"], protocol["sequences"], protocol["scene"]) == ("calvin", "official", "D")
    return results.run.get("caveat") if official else NOT_CALVIN


def published(results: Results) -> list[dict[str, Any]]:
    """Published methods and this run, the best first."""
    entries = [(*entry, False) for entry in PUBLISHED]
    for row in rows(results):
        if row["own"]:
            source = f"this run, {results.protocol['chains']} sequences, {average_text(row)}"
            entries.append((row["who"], row["average"], row["limit"], source, True))
    keys = ("method", "average", "limit", "source", "own")
    return [dict(zip(keys, entry)) for entry in sorted(entries, key=lambda entry: -entry[1])]


def record(results: Results) -> dict[str, str]:
    """What is needed to repeat or to doubt the numbers."""
    run = results.run
    settings = {key: run["settings"][key] for key in ("seed", "chunk", "batch", "sim")}
    facts = {**results.policy, **results.protocol, **settings, "started": run["started"]}
    facts |= {key: run.get(key) for key in ("renderer", "control_steps", "observations")}
    return {key.replace("_", " "): _plain(value) for key, value in (facts | run["versions"]).items()}


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
