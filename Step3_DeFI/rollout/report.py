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
WORLDS = {"fresh": "a newly loaded world per chain", "persistent": "one world per process"}
MOST_VIDEOS = 12  # of each outcome
NOT_CALVIN = "This is not CALVIN's protocol (its scene D, its sequences): published numbers do not compare."
LEADERBOARD = "MINT-SJTU/Evo-SOTA.io, 14 July 2026, self-reported"
PUBLISHED = (  # average length on CALVIN, ABC→D, 1000 sequences; steps per task; source
    ("MMaDA-VLA", 4.78, "not stated", LEADERBOARD),
    ("Xiaomi-Robotics-0", 4.75, "not stated", LEADERBOARD),
    ("π-RL (with reinforcement learning)", 4.71, "not stated", LEADERBOARD),
    ("AVA-VLA", 4.65, "not stated", LEADERBOARD),
    ("FLOWER", 4.53, "not stated", LEADERBOARD),
    ("DeFI", 4.51, "not stated", "arXiv 2604.16391; the released settings have 720 steps"),
    ("VLA-Adapter-Pro", 4.50, "not stated", LEADERBOARD),
    ("HARP-VLA", 4.48, "not stated", LEADERBOARD),
    ("DreamVLA", 4.44, "not stated", LEADERBOARD),
    ("X-VLA", 4.43, "720", LEADERBOARD),
    ("UnifiedVLA", 4.41, "not stated", LEADERBOARD),
    ("VPP", 4.33, "360", LEADERBOARD),
    ("Seer", 4.28, "not stated", LEADERBOARD),
    ("UP-VLA", 4.08, "not stated", LEADERBOARD),
    ("MoDE", 4.01, "not stated", LEADERBOARD),
    ("Moto", 3.10, "not stated", LEADERBOARD),
    ("GR-1", 3.06, "not stated", LEADERBOARD),
)


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


def result_table(results: Results) -> Table:
    """Average length and success at each position, for the terminal."""
    table = Table(title=conditions(results), title_justify="left", box=SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column(no_wrap=True)
    for title in ("steps", "average length", *(f"{i + 1}" for i in range(results.protocol["length"]))):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows(results):
        rates = (f"{100 * success['rate']:.0f}%" for success in row["success"])
        table.add_row(row["who"], row["limit"], row["average"], *rates)
    return table


def task_rates(results: Results) -> list[tuple[str, int, int, float]]:
    """Task, solved, tried and success rate at the largest limit, the best first."""
    tasks = results.limits[max(results.limits, key=int)]["tasks"]
    found = [(task, n["solved"], n["tried"], n["solved"] / n["tried"]) for task, n in tasks.items()]
    return sorted(found, key=lambda entry: (-entry[3], entry[0]))


def task_table(results: Results) -> Table:
    """The same for the terminal."""
    title = f"Per task, within {max(results.limits, key=int)} steps"
    table = Table("task", title=title, title_justify="left", box=SIMPLE)
    for column in ("solved", "tried", "rate"):
        table.add_column(column, justify="right")
    for task, solved, tried, rate in task_rates(results):
        table.add_row(task, str(solved), str(tried), f"{100 * rate:.0f}%")
    return table


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
    published = [(*entry, False) for entry in PUBLISHED]
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
    return {key.replace("_", " "): _plain(value) for key, value in (facts | run["versions"]).items()}


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
