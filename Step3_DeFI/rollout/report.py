"""The result for people: tables at the terminal, and report.html with bars and videos."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.box import SIMPLE
from rich.table import Table

from defi import html
from Step3_DeFI.rollout.clips import choose_clips, find_clips
from Step3_DeFI.rollout.evaluate import AGENT_NAMES
from Step3_DeFI.rollout.published import CALVIN_ABC_D
from Step3_DeFI.rollout.results import Results

SEQUENCES = {"official": "official sequences", "subset": "chains"}
MOST_CLIPS = 12  # of each outcome


def rows(results: Results) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(who, limit, summary), largest limit first, the baseline below."""
    found = [(AGENT_NAMES[results.policy["kind"]], results.limits)]
    if results.baseline:
        found.append((AGENT_NAMES[results.baseline["agent"]], results.baseline["limits"]))
    return [(who, limit, limits[limit]) for who, limits in found for limit in sorted(limits, key=int)]


def average_text(summary: Mapping[str, Any]) -> str:
    low, high = summary["interval"]
    return f"{summary['average']:.2f} [{low:.2f}, {high:.2f}]"


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
    for name in ("steps", "average length", *(f"{i + 1}" for i in range(results.protocol["length"]))):
        table.add_column(name, justify="right", no_wrap=True)
    for who, limit, summary in rows(results):
        rates = (f"{100 * success['rate']:.0f}%" for success in summary["success"])
        table.add_row(who, limit, average_text(summary), *rates)
    return table


def task_table(results: Results) -> Table:
    """Solved of tried per task, at the largest limit."""
    limit = str(max(map(int, results.limits)))
    table = Table(title=f"Per task, within {limit} steps", title_justify="left", box=SIMPLE)
    table.add_column("task")
    for name in ("solved", "tried", "rate"):
        table.add_column(name, justify="right")
    for task, count in _by_rate(results.limits[limit]["tasks"]):
        table.add_row(task, f"{count['solved']}", f"{count['tried']}", f"{100 * _rate(count):.0f}%")
    return table


def _rate(count: Mapping[str, int]) -> float:
    return count["solved"] / count["tried"]


def _by_rate(tasks: Mapping[str, Mapping[str, int]]) -> list[tuple[str, Mapping[str, int]]]:
    return sorted(tasks.items(), key=lambda item: (-_rate(item[1]), item[0]))


# ---------------------------------------------------------------- report.html


def write_report(path: Path, results: Results, videos: Path) -> Path:
    """The page, with clips from `videos` embedded."""
    return html.write_page(path, "Rollout", *report_blocks(results, videos), subtitle=conditions(results))


def report_blocks(results: Results, videos: Path) -> list[html.Block]:
    """The sections of the page, also for other reports to take over."""
    return [
        result_section(results),
        published_section(results),
        task_section(results),
        video_section(videos),
        record_section(results),
    ]


def result_section(results: Results) -> Markup:
    """Key figures, and the table of all limits."""
    limit = str(max(map(int, results.limits)))
    figures = {f"average length of {results.protocol['length']}": f"{results.limits[limit]['average']:.2f}"}
    if results.baseline:
        figures[AGENT_NAMES[results.baseline["agent"]]] = (
            f"{results.baseline['limits'][limit]['average']:.2f}"
        )
    figures["solved the first task"] = f"{100 * results.limits[limit]['success'][0]['rate']:.0f} %"
    if not results.run["earlier_chains"]:
        figures["time"] = str(timedelta(seconds=round(results.run["seconds"])))
    cells = [
        [who, int(steps), average_text(summary), *(_percent(rate) for rate in summary["success"])]
        for who, steps, summary in rows(results)
    ]
    positions = [f"{i + 1} in a row" for i in range(results.protocol["length"])]
    return html.section(
        "Result",
        html.cards(figures),
        html.table(
            ["", "steps per task", "average length [95 %]", *positions],
            cells,
            strong=range(len(results.limits)),
        ),
        html.note(
            "A chain ends at its first unsolved task; its length is the number solved before. The intervals "
            "are 95 %: bootstrap over chains for the average (no width where all chains are equal), Wilson's "
            "for rates."
        ),
    )


def _percent(success: Mapping[str, Any]) -> Markup:
    low, high = success["interval"]
    return Markup('{:.0f} %<br><span class="soft">{:.0f} to {:.0f}</span>').format(
        100 * success["rate"], 100 * low, 100 * high
    )


def published_section(results: Results) -> Markup:
    """Published methods beside this run, where protocol and renderer are theirs; else a remark."""
    protocol = results.protocol
    official = protocol["assets"] == "calvin" and protocol["sequences"] == "official"
    reason = results.run.get("caveat")
    if not (official and protocol["scene"] == "D"):
        reason = (
            "This is not CALVIN's protocol (its scene D, its sequences): published numbers do not compare."
        )
    if reason:
        return html.section("Beside published methods", html.note(reason))
    entries = [(p.average, p.method, f"{p.limit or 'not stated'}", p.source) for p in CALVIN_ABC_D]
    for limit, summary in results.limits.items():
        source = f"this run, {protocol['chains']} sequences, {average_text(summary)}"
        entries.append((summary["average"], AGENT_NAMES[results.policy["kind"]], limit, source))
    entries.sort(key=lambda entry: -entry[0])
    ours = [i for i, entry in enumerate(entries) if entry[3].startswith("this run")]
    cells = [[method, f"{average:.2f}", limit, source] for average, method, limit, source in entries]
    return html.section(
        "Beside published methods",
        html.table(["method", "average length", "steps per task", "source"], cells, strong=ours),
        html.note(
            "CALVIN, trained on scenes A, B, C, tested on D, 1000 sequences. By chance alone such a figure "
            "varies by about ±0.07 to ±0.09: smaller differences say nothing."
        ),
    )


def task_section(results: Results) -> Markup:
    """A bar per task at the largest limit."""
    limit = str(max(map(int, results.limits)))
    tasks = _by_rate(results.limits[limit]["tasks"])
    return html.section(
        "Tasks",
        html.bars(
            {task: _rate(count) for task, count in tasks},
            texts={task: f"{count['solved']} of {count['tried']}" for task, count in tasks},
        ),
        html.note(f"Solved of tried within {limit} steps. A task is tried where all before it were solved."),
    )


def video_section(videos: Path) -> Markup:
    """Successes and failures, each task before any twice."""
    clips = find_clips(videos)
    parts = []
    for title, solved in (("Solved", True), ("Not solved", False)):
        chosen = choose_clips(clips, solved=solved, most=MOST_CLIPS)
        if chosen:
            figures = (
                html.video(clip.path, f"{clip.task}: chain {clip.chain}, task {clip.position}")
                for clip in chosen
            )
            parts.append(html.subsection(title, html.grid(*figures, width=300)))
    return html.section("Videos", *(parts or [html.note("No chain was filmed.")]))


def record_section(results: Results) -> Markup:
    """What is needed to repeat or to doubt the numbers."""
    run = results.run
    settings = {key: run["settings"][key] for key in ("seed", "chunk", "batch", "sim")}
    facts = {**results.policy, **results.protocol, **settings, "started": run["started"]}
    facts |= {"renderer": run["renderer"], "control steps": run["control_steps"], "looks": run["looks"]}
    cells = [[key.replace("_", " "), _fact(value)] for key, value in (facts | run["versions"]).items()]
    return html.section("Record", html.table(["what", "value"], cells))


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
