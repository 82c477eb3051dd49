"""What a suite has found so far: results.json and report.html, beside the paper's figures."""

import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from defi import html
from defi.engine.log import METRICS, read_metrics
from defi.engine.output import write_file
from defi.errors import UserError
from experiments.plan import ArmConfig, Run
from experiments.statistics import difference, summarise
from experiments.work import Workshop
from Step3_DeFI.rollout.results import Results, read_results

FORMAT, TEMPLATE = 1, "experiments/report.html.j2"
COLOURS = html.CHART_STYLE["axes.prop_cycle"].by_key()["color"]
SMOKE = "size=smoke: this only shows that everything runs; it learns nothing, so expect 0.00."
ENDS = {"loss": "last loss", "held_out_action_error": "held-out error"}  # of the policy's training
Training = dict[str, dict[int, dict[str, dict[int, float]]]]
"""Arm → seed → name of a number (`ENDS`) → step → its value."""


def read_runs(workshop: Workshop, runs: list[Run]) -> dict[str, dict[int, Results]]:
    """Arm → seed → its rollout, of those that are done. UserError if their protocols differ."""
    found: dict[str, dict[int, Results]] = {}
    protocol = None
    for run in runs:
        if workshop.is_done(run.last.key):
            results = read_results(workshop.place(run.last.key))
            protocol = protocol or results.protocol
            if results.protocol != protocol:
                raise UserError(f"{workshop.place(run.last.key)}: another protocol than the other arms'")
            found.setdefault(run.arm, {})[run.seed] = results
    return found


def read_training(workshop: Workshop, runs: list[Run]) -> Training:
    """What the trainings of the policy measured."""
    found: Training = {}
    for run in runs:
        for step in (each for each in run.last.inputs if workshop.is_done(each.key)):
            lines = read_metrics(workshop.place(step.key) / METRICS)
            values = {name: {line["step"]: line[name] for line in lines if name in line} for name in ENDS}
            found.setdefault(run.arm, {})[run.seed] = values
    return found


def summary(
    arms: Mapping[str, ArmConfig],
    found: Mapping[str, Mapping[int, Results]],
    made: Mapping[str, Mapping[str, list[str]]],
) -> dict[str, Any]:
    """Arm → limit → mean, interval, seeds, and the difference to the arm that it is compared with.

    made: as from `made_by`.
    """
    first, values = next(iter(arms)), {}
    for name, arm in arms.items():
        if name not in found:
            continue
        against, limits = arm.against or first, next(iter(found[name].values())).protocol["max_steps"]
        values[name] = {"title": arm.title, "published": arm.published, "made_by": made.get(name, {})}
        values[name]["limits"] = {}
        for limit in limits:
            values[name]["limits"][str(limit)] = here = summarise(found[name], limit)
            if name != against and against in found:
                other = difference(found[against], found[name], limit)
                here["against"] = other and {"arm": against, **other}
    return values


def made_by(workshop: Workshop, runs: list[Run]) -> dict[str, dict[str, list[str]]]:
    """Arm → kind of step → the code and packages that made those that are done."""
    found: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        for step in run.last.all():
            if (record := workshop.record(step.key)).get("done"):
                kinds = found.setdefault(run.arm, {})
                kinds[step.name] = sorted({*kinds.get(step.name, ()), *record.get("made_by", ())})
    return found


def mismatch(arm: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """A sentence if other code or packages made some steps of one arm than of the other."""
    kinds = arm["made_by"].keys() & other["made_by"].keys()
    differ = {kind: set(arm["made_by"][kind]) ^ set(other["made_by"][kind]) for kind in sorted(kinds)}
    if not any(differ.values()):
        return []
    what = ", ".join(kind for kind, found in differ.items() if found)
    found = " | ".join(sorted(set[str]().union(*differ.values())))
    return [f"Not made by the same code: “{arm['title']}” and “{other['title']}” ({what}: {found})."]


def verdict(values: Mapping[str, Any], limit: str) -> list[str]:
    """What the comparisons say, in sentences, the largest loss first; how far seeds alone go; and what else
    than the arms themselves differs."""
    beyond, within, apart, mixed = [], [], [], []
    for arm in values.values():
        seeds = arm["limits"][limit]["seeds"].values()
        apart += [(max(seeds) - min(seeds), arm["title"])] if len(seeds) > 1 else []
        if found := arm["limits"][limit].get("against"):
            low, high = found["interval"]
            mixed += mismatch(arm, values[found["arm"]])
            text = f"“{arm['title']}” against “{values[found['arm']]['title']}”: {change(found)}"
            text += "" if len(found["seeds"]) > 1 else " (one seed: without the chance of training)"
            (beyond if low > 0 or high < 0 else within).append((found["difference"], text))
    said = [f"Beyond chance: {text}." for _, text in sorted(beyond)]
    said += [f"Within chance: {'; '.join(text for _, text in sorted(within))}."] if within else []
    seeds = "One seed: the intervals hold the chance of the chains, not that of training."
    if apart:
        seeds = "Seeds alone move an arm by up to {:.2f} (“{}”).".format(*max(apart))
    return [*said, seeds, *mixed]


def change(found: Mapping[str, Any]) -> str:
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(found["difference"], *found["interval"])


@rc_context(html.CHART_STYLE)
def bars(values: Mapping[str, Any], limit: str, length: int) -> Figure:
    """A bar per arm with its interval, a dot per seed, a diamond where the paper has a figure."""
    figure = Figure((7.2, 0.8 + 0.42 * len(values)), layout="constrained")
    axis = figure.subplots()
    for row, arm in enumerate(values.values()):
        found = arm["limits"][limit]
        axis.barh(row, found["mean"], height=0.6, color=COLOURS[0], alpha=0.75)
        axis.plot(found["interval"], [row, row], color=html.GREY, linewidth=2.5)
        axis.plot(list(found["seeds"].values()), [row] * len(found["seeds"]), ".", color=COLOURS[1])
        if arm["published"] is not None:
            axis.plot(arm["published"], row, "D", color=COLOURS[2], markersize=5)
    axis.set_yticks(range(len(values)), [arm["title"] for arm in values.values()])
    axis.invert_yaxis()
    axis.set_xlim(0, length)
    axis.set_xlabel(f"average length of {length}")
    return figure


@rc_context(html.CHART_STYLE)
def curves(
    values: Mapping[str, Any], arms: Mapping[str, ArmConfig], suite: Mapping[str, Any], limit: str
) -> Figure:
    """Average length along the suite's axis, with intervals, a curve per line."""
    figure = Figure((7.2, 3.6), layout="constrained")
    axis = figure.subplots()
    for number, (line, title) in enumerate(suite["lines"].items()):
        names = sorted((n for n in values if line in arms[n].lines), key=lambda name: arms[name].at)
        x, found = [arms[name].at for name in names], [values[name]["limits"][limit] for name in names]
        low, high = ([each["interval"][end] for each in found] for end in (0, 1))
        axis.plot(x, [each["mean"] for each in found], marker="o", color=COLOURS[number], label=title)
        axis.fill_between(x, low, high, color=COLOURS[number], alpha=0.2, linewidth=0)
    axis.set_xscale("log" if suite["axis"]["log"] else "linear")
    ticks = sorted({arm.at for arm in arms.values() if arm.at is not None})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    return finish(figure, axis, suite["axis"]["label"], "average length", "outside upper left")


@rc_context(html.CHART_STYLE)
def errors(training: Training, arms: Mapping[str, ArmConfig]) -> Figure | None:
    """Error on held-out demonstrations over training, the mean over seeds; None where none was measured."""
    figure = Figure((7.2, 3.6), layout="constrained")
    axis = figure.subplots()
    for number, (name, seeds) in enumerate(training.items()):
        measured = [values["held_out_action_error"] for values in seeds.values()]
        steps = sorted(set.intersection(*map(set, measured)))
        means = [sum(one[step] for one in measured) / len(measured) for step in steps]
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": ("-", "--")[number // len(COLOURS) % 2],
        }
        if steps:
            axis.plot(steps, means, marker=".", label=arms[name].title, **style)
    html.log_scale(axis)
    x, y = "step of the policy's training", "mean square"
    return finish(figure, axis, x, y, "outside right upper") if axis.lines else None


def finish(figure: Figure, axis: Axes, x: str, y: str, legend: str) -> Figure:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    figure.legend(loc=legend, ncols=2 if "left" in legend else 1)
    return figure


def table(values: Mapping[str, Any], training: Training, limits: list[int]) -> list[list[str]]:
    """The lines of the table."""
    lines = []
    for name, arm in values.items():
        top, found = arm["limits"][str(max(limits))], [arm["limits"][str(limit)] for limit in limits]
        against = top.get("against")
        ends = []
        for number in ENDS:
            last = [
                list(seed[number].values())[-1] for seed in training.get(name, {}).values() if seed[number]
            ]
            ends.append(f"{sum(last) / len(last):.3f}" if last else "—")
        lines.append(
            [
                arm["title"],
                *("{:.2f} [{:.2f}, {:.2f}]".format(each["mean"], *each["interval"]) for each in found),
                " ".join(f"{mean:.2f}" for mean in top["seeds"].values()),
                change(against) if against else "—",
                f"{against['p']:.2g}" if against else "—",
                "—" if arm["published"] is None else f"{arm['published']:.2f}",
                *ends,
            ]
        )
    return lines


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
    record |= {"done": f"{sum(map(len, found.values()))} of {len(runs)}", "protocol": results.protocol}
    record |= {"versions": results.run["versions"], "arms": summary(arms, found, made_by(workshop, runs))}
    record |= {"training": read_training(workshop, runs)}
    record["steps"] = {key: workshop.record(key) for key in workshop.steps}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "results.json", json.dumps(record, indent=1))
    return write_page(folder / "report.html", suite, arms, record)


def write_page(
    path: Path, suite: Mapping[str, Any], arms: Mapping[str, ArmConfig], record: Mapping[str, Any]
) -> Path:
    """The page about what results.json holds."""
    values, protocol, training = record["arms"], record["protocol"], record["training"]
    limit, length, limits = str(max(protocol["max_steps"])), protocol["length"], protocol["max_steps"]
    work = timedelta(seconds=round(sum(each.get("seconds", 0) for each in record["steps"].values())))
    columns = ["arm", *(f"average length, {each} steps [95 %]" for each in limits), "seeds"]
    return html.write_page(
        path,
        TEMPLATE,
        title=suite["title"],
        claim=suite["claim"],
        remark=SMOKE if suite["size_name"] == "smoke" else "",
        overview={"rollouts done": record["done"], f"chains of {length}": protocol["chains"], "work": work},
        verdict=verdict(values, limit),
        chart=curves(values, arms, suite, limit) if "lines" in suite else bars(values, limit, length),
        columns=[*columns, "difference [95 %]", "p", "the paper", *ENDS.values()],
        rows=table(values, training, limits),
        published=suite["published"],
        errors=errors(training, arms),
        steps=record["steps"],
        facts={**protocol, **record["versions"]},
    )
