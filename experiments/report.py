"""What a suite has found so far: results.json and report.html, beside the paper's figures."""

import json
import math
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from defi import html
from defi.engine.log import METRICS, read_metrics
from defi.engine.output import write_file
from defi.errors import UserError
from experiments.plan import ArmConfig, Run
from experiments.statistics import difference, summarise
from experiments.work import Workshop
from Step3_DeFI.rollout.results import Results, read_results

FORMAT = 1
COLOURS = html.CHART_STYLE["axes.prop_cycle"].by_key()["color"]
SMOKE = "size=smoke: this only shows that everything runs; it learns nothing, so expect 0.00."
TEMPLATE = "experiments/report.html.j2"
HELD_OUT = "held_out_action_error"  # of a policy's previews


def read_runs(workshop: Workshop, runs: list[Run]) -> dict[str, dict[int, Results]]:
    """Arm → seed → its rollout, of those that are done. UserError if their protocols differ."""
    found: dict[str, dict[int, Results]] = {}
    protocol = None
    for run in runs:
        if not workshop.is_done(run.last.key):
            continue
        results = read_results(workshop.place(run.last.key))
        protocol = protocol or results.protocol
        if results.protocol != protocol:
            raise UserError(f"{workshop.place(run.last.key)}: another protocol than the other arms'")
        found.setdefault(run.arm, {})[run.seed] = results
    return found


def summary(arms: Mapping[str, ArmConfig], found: Mapping[str, Mapping[int, Results]]) -> dict[str, Any]:
    """Arm → limit → mean, interval, seeds, and the difference to the arm that it is compared with."""
    first, values = next(iter(arms)), {}
    for name, arm in arms.items():
        if name not in found:
            continue
        against, limits = arm.against or first, next(iter(found[name].values())).protocol["max_steps"]
        values[name] = {"title": arm.title, "published": arm.published, "limits": {}}
        for limit in limits:
            values[name]["limits"][str(limit)] = summarise(found[name], limit)
            if name != against and against in found:
                other = difference(found[against], found[name], limit)
                values[name]["limits"][str(limit)]["against"] = other and {"arm": against, **other}
    return values


def losses(workshop: Workshop, runs: list[Run]) -> dict[str, dict[int, list[dict[str, float]]]]:
    """Arm → seed → what the policy's training measured: its loss, and errors on demonstrations, by step."""
    found: dict[str, dict[int, list[dict[str, float]]]] = {}
    for run in runs:
        for step in (each for each in run.last.inputs if each.name == "policy"):
            if workshop.is_done(step.key):
                lines = read_metrics(workshop.place(step.key) / METRICS)
                kept = [each for each in lines if each["kind"] == "preview"]
                kept.append({"step": lines[-1]["step"], "loss": last(lines, "loss")})
                found.setdefault(run.arm, {})[run.seed] = kept
    return found


def last(lines: list[dict[str, Any]], name: str) -> float:
    return next((each[name] for each in reversed(lines) if name in each), math.nan)


def verdict(values: Mapping[str, Any], limit: str) -> list[str]:
    """What the comparisons say, in sentences: the largest loss first."""
    said, beyond = [], []
    for arm in values.values():
        found = arm["limits"][limit].get("against")
        if found:
            low, high = found["interval"]
            text = f"{arm['title']}: {found['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"
            text += f" against “{values[found['arm']]['title']}”"
            (beyond if low > 0 or high < 0 else said).append((found["difference"], text))
    lines = [f"Beyond chance: {text}." for _, text in sorted(beyond)]
    within = [text for _, text in sorted(said)]
    return lines + ([f"Within chance: {'; '.join(within)}."] if within else [])


@rc_context(html.CHART_STYLE)
def bars(values: Mapping[str, Any], limit: str, length: int) -> Figure:
    """A bar per arm with its interval, a dot per seed, a diamond where the paper has a figure."""
    figure = Figure((7.2, 0.8 + 0.42 * len(values)), layout="constrained")
    axis = figure.subplots()
    for row, arm in enumerate(values.values()):
        found = arm["limits"][limit]
        low, high = found["interval"]
        axis.barh(row, found["mean"], height=0.6, color=COLOURS[0], alpha=0.75)
        axis.plot([low, high], [row, row], color=html.GREY, linewidth=2.5)
        axis.plot(list(found["seeds"].values()), [row] * len(found["seeds"]), ".", color=COLOURS[1])
        if arm["published"] is not None:
            axis.plot(arm["published"], row, "D", color=COLOURS[2], markersize=5)
    axis.set_yticks(range(len(values)), [arm["title"] for arm in values.values()])
    axis.invert_yaxis()
    axis.set_xlim(0, length)
    axis.set_xlabel(f"average length of {length} (bar: mean, line: 95 %, dots: seeds, diamond: the paper)")
    return figure


@rc_context(html.CHART_STYLE)
def lines_chart(
    values: Mapping[str, Any], arms: Mapping[str, ArmConfig], suite: Mapping[str, Any], limit: str
) -> Figure:
    """Average length along the suite's axis, a curve with intervals per line."""
    figure = Figure((7.2, 3.6), layout="constrained")
    axis = figure.subplots()
    for number, (line, title) in enumerate(suite["lines"].items()):
        points = [
            (arms[name].at, values[name]["limits"][limit]) for name in values if line in arms[name].lines
        ]
        points.sort(key=lambda point: point[0])
        x, means = [at for at, _ in points], [found["mean"] for _, found in points]
        low, high = ([found["interval"][end] for _, found in points] for end in (0, 1))
        axis.plot(x, means, marker="o", color=COLOURS[number], label=title)
        axis.fill_between(x, low, high, color=COLOURS[number], alpha=0.2, linewidth=0)
    if suite["axis"]["log"]:
        axis.set_xscale("log")
    ticks = sorted({arm.at for arm in arms.values() if arm.at is not None})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axis.minorticks_off()
    axis.set_xlabel(suite["axis"]["label"])
    axis.set_ylabel("average length")
    axis.set_ylim(bottom=0)
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def error_curves(found: Mapping[str, Mapping[int, list[dict[str, float]]]], arms: Mapping) -> Figure | None:
    """Error on held-out demonstrations over training, the mean over seeds; None where none was measured."""
    curves = {}
    for name, seeds in found.items():
        measured = [
            {each["step"]: each[HELD_OUT] for each in one if HELD_OUT in each} for one in seeds.values()
        ]
        steps = sorted(set.intersection(*map(set, measured)))
        if steps:
            curves[arms[name].title] = (steps, [sum(m[s] for m in measured) / len(measured) for s in steps])
    if not curves:
        return None
    figure = html.line_chart(curves, x_label="step of the policy's training", log_y=True)
    figure.set_size_inches(7.2, 3.2 + 0.2 * len(curves))
    figure.legends[0].set_ncols(1)
    return figure


def write(
    folder: Path, suite: Mapping[str, Any], arms: Mapping[str, ArmConfig], runs: list[Run], workshop: Workshop
) -> Path | None:
    """results.json and report.html from the rollouts that are done; None while there is none.

    suite: the resolved configuration. workshop: with the steps of all runs.
    """
    found = read_runs(workshop, runs)
    if not found:
        return None
    results = next(iter(next(iter(found.values())).values()))
    record = {"format": FORMAT, "suite": suite["name"], "size": suite["size_name"]}
    record |= {"protocol": results.protocol, "versions": results.run["versions"]}
    record |= {"arms": summary(arms, found), "training": losses(workshop, runs)}
    record["steps"] = {key: workshop.record(key) for key in workshop.steps}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "results.json", json.dumps(record, indent=1))
    done = f"{sum(map(len, found.values()))} of {len(runs)}"
    return html.write_page(
        folder / "report.html", TEMPLATE, **page(suite, arms, record), rollouts_done=done, record=record
    )


def page(
    suite: Mapping[str, Any], arms: Mapping[str, ArmConfig], record: Mapping[str, Any]
) -> dict[str, Any]:
    """What the template shows of the `record` in results.json, but for the record itself."""
    values, protocol = record["arms"], record["protocol"]
    limit, length = str(max(protocol["max_steps"])), protocol["length"]
    chart = lines_chart(values, arms, suite, limit) if "lines" in suite else bars(values, limit, length)
    return {
        "title": suite["title"],
        "claim": suite["claim"],
        "remark": SMOKE if suite["size_name"] == "smoke" else "",
        "verdict": [*verdict(values, limit), seeds_spread(values, limit)],
        "chart": chart,
        "rows": table(values, record["training"], protocol["max_steps"]),
        "published": suite["published"],
        "errors": error_curves(record["training"], arms),
        "work": timedelta(seconds=round(sum(each.get("seconds", 0) for each in record["steps"].values()))),
    }


def seeds_spread(values: Mapping[str, Any], limit: str) -> str:
    """How far training's seed alone moves an arm: the largest distance between two seeds."""
    apart = {}
    for arm in values.values():
        means = arm["limits"][limit]["seeds"].values()
        apart[arm["title"]] = max(means) - min(means)
    if not any(len(arm["limits"][limit]["seeds"]) > 1 for arm in values.values()):
        return (
            "One seed of training: the intervals hold the chance of the chains alone, not that of training."
        )
    widest = max(apart, key=apart.__getitem__)
    return f"Seeds alone move an arm by up to {apart[widest]:.2f} ({widest})."


def table(values: Mapping[str, Any], learned: Mapping[str, Any], limits: list[int]) -> list[dict[str, Any]]:
    """The lines of the table, as text."""
    rows = []
    for name, arm in values.items():
        top, seeds = arm["limits"][str(max(limits))], learned.get(name, {}).values()
        against, change, p = top.get("against"), "—", "—"
        if against:
            change = "{:+.2f} [{:+.2f}, {:+.2f}]".format(against["difference"], *against["interval"])
            p = "< 0.001" if against["p"] < 0.001 else f"{against['p']:.2g}"
        means = (arm["limits"][str(limit)] for limit in limits)
        ends = ([last(one, key) for one in seeds] for key in ("loss", HELD_OUT))
        rows.append(
            {
                "title": arm["title"],
                "means": ["{:.2f} [{:.2f}, {:.2f}]".format(m["mean"], *m["interval"]) for m in means],
                "seeds": " ".join(f"{mean:.2f}" for mean in top["seeds"].values()),
                "change": change,
                "p": p,
                "published": "—" if arm["published"] is None else f"{arm['published']:.2f}",
                "ends": [f"{sum(each) / len(each):.3f}" if each else "—" for each in ends],
            }
        )
    return rows
