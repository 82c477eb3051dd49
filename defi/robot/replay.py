"""Before anything moves: what a policy says over recorded episodes, laid over what was done there.

`python -m defi.robot.replay checkpoint=… data=<format> data.root=… output=…` (configs/replay.yaml) prints
figures, and warnings on conventions that policy and data do not share; it writes results.json and a page.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from defi import html
from defi.config import entry
from defi.data import Dataset, open_dataset
from defi.data.motions import Statistics
from defi.engine.output import check_output, prepare_output, write_file
from defi.errors import UserError
from defi.hub import local_folder
from defi.robot.open_loop import BETTER, FEW_LOOKS, Laid, OpenLoop, better, out_of_range

SEEN = 6  # pictures of an episode on the page, per camera
MOST_POINTS = 3000  # of a dimension, predicted over recorded
LONGEST = 1000  # steps: of longer episodes the page shows the curves of the first ones
COLUMNS = {
    "rmse": "RMSE", "mae": "MAE", "rmse_of_range": "of range", "mean_action_rmse": "RMSE,\nmean",
    "last_action_rmse": "RMSE,\nlast", "correlation": "correlation", "size": "size",
}  # fmt: skip
LEGEND = (
    "RMSE, MAE: in the robot's units; of range: RMSE over the range of what was recorded; mean, last: of "
    "always the mean action, of the last one before each look; correlation: of predicted and recorded; size: "
    "how many times as much predictions vary"
)
FORMATS = {"rmse_of_range": ".1%", "correlation": ".2f", "size": ".2f"}
Chunks = dict[tuple[str, ...], np.ndarray]  # () or a pair of cameras that were exchanged → [L, K, A]


@dataclass
class Replay:
    """What was found. numbers: of the episodes in the data; exchanged: two cameras → the squared error as a
    share of what it is when they are not; judged: what was, and what could not be; facts: for people."""

    data: Dataset
    numbers: list[int]
    loop: OpenLoop
    warnings: list[str]
    exchanged: dict[str, float]
    judged: str
    facts: dict[str, Any]


def check_robots(policy: Any, data: Dataset) -> list[str]:
    """In what the policy's robot is not the data's, where one can go on.

    Raises:
        UserError: a camera is missing, or there are not as many actions, or numbers of state that it reads.
    """
    robot, reads, where = policy.robot, policy.model.config.state, f"{data.root}: has"
    if missing := [camera for camera in robot.cameras if camera not in data.cameras]:
        others = iter([camera for camera in data.cameras if camera not in robot.cameras])
        named = [f"{c}:{next(others, 'its place in the data')}" if c in missing else c for c in robot.cameras]
        fix = f"say which is which, 'data.cameras=[{','.join(named)}]' for example"
        has, sees = ", ".join(data.cameras), ", ".join(robot.cameras)
        raise UserError(f"{where} {has}, the policy sees {sees}; {fix}")
    wanted = {"actions": (data.action_names, robot.actions)}
    wanted |= {"state": (data.state_names, robot.state)} if reads else {}
    for what, (names, vector) in wanted.items():
        if len(names) != len(vector):
            its = f"the policy's are {len(vector)}: {', '.join(vector.names)}"
            raise UserError(f"{where} {len(names)} numbers of {what}, {its}; name them, data.{what}=…")
    seen = data.robot()
    seen = replace(seen, cameras=robot.cameras, state=seen.state if reads else None)
    return [f"the policy's robot is not the data's: {each}" for each in robot.differences(seen)]


def ask(
    policy: Any, data: Dataset, places: Sequence[tuple[int, int]], cfg: DictConfig
) -> tuple[Chunks, list[str]]:
    """What the policy says at places (number of the episode, step); and what is wrong with what it sees."""
    from defi.engine.data import seed_of  # needs torch

    cameras, wrong = policy.robot.cameras, Counter[str]()
    pairs = [(), *combinations(cameras, 2)] if cfg.swap_cameras else [()]
    answers: dict[tuple[str, ...], list[np.ndarray]] = {pair: [] for pair in pairs}
    sizes: dict[str, set[str]] = {camera: set() for camera in cameras}
    for first in track(range(0, len(places), cfg.batch), "looks", transient=True):
        seen, seeds = [], []
        for number, group in groupby(places[first : first + cfg.batch], key=lambda place: place[0]):
            episode, steps = data.episode(number), [step for _, step in group]
            pictures = data.read(episode, steps, cameras)
            state = data.motions.state[data.motions.rows(episode.start + np.array(steps))]
            for i, step in enumerate(steps):
                images = {camera: pictures[camera][i] for camera in cameras}
                seen.append({"images": images, "instruction": episode.text(step), "state": state[i]})
                seeds.append(seed_of("replay", cfg.seed, number, step))
                wrong["no instruction"] += not episode.text(step)
                for camera, image in images.items():
                    sizes[camera].add("{} x {}".format(*image.shape))
                    wrong[f"one colour in the picture of {camera}"] += bool((image == image[0, 0]).all())
        for pair in pairs:
            swap = dict(zip(pair, reversed(pair)))
            shown = [
                each | {"images": {name: each["images"][swap.get(name, name)] for name in cameras}}
                for each in seen
            ]
            answers[pair].append(policy.infer_batch(shown, seeds))
            if not np.isfinite(answers[pair][-1]).all():
                fix = "try another checkpoint, or precision=no"
                raise UserError(f"{cfg.checkpoint}: answers with NaN or infinite actions; {fix}")
    said = [f"{count} of {len(places)} looks have {what}" for what, count in wrong.items() if count]
    for camera, found in sizes.items():
        if len(found) > 1:
            said.append(f"camera {camera}: pictures of several sizes, {', '.join(sorted(found))}")
    return {pair: np.concatenate(found) for pair, found in answers.items()}, said


def replay(policy: Any, data: Dataset, cfg: DictConfig) -> Replay:
    """Lay a policy (`Step3_DeFI.acting.Policy`) over episodes; `cfg`: configs/replay.yaml.

    Raises:
        UserError: policy and data do not fit, data cannot be read, or an action is not finite.
    """
    robot, config, warnings = policy.robot, policy.model.config, check_robots(policy, data)
    every = robot.executed or config.chunk if cfg.every is None else cfg.every
    if not 1 <= every <= config.chunk:
        raise UserError(f"every={every}: must lie in 1 … {config.chunk}, the actions of a chunk")
    some = np.flatnonzero(data.lengths)
    some = some[np.linspace(0, len(some) - 1, min(cfg.episodes or len(some), len(some))).round().astype(int)]
    looks = {number: np.arange(0, data.lengths[number], every) for number in some.tolist()}
    places = [(number, step) for number, steps in looks.items() for step in steps.tolist()]
    chunks, wrong = ask(policy, data, places, cfg)
    laid, rows, ends = [], [], np.cumsum([len(steps) for steps in looks.values()])[:-1]
    for (number, steps), said in zip(looks.items(), np.split(chunks[()], ends)):
        episode = data.episode(number)
        rows.append(data.motions.rows(np.arange(episode.start, episode.start + episode.length)))
        laid.append(Laid(episode.name, data.motions.actions[rows[-1]], steps, said))
    loop = OpenLoop(robot, laid, Statistics.of(data.motions.actions))
    warnings += wrong + loop.warnings()
    if config.state:
        warnings += out_of_range("state", robot.state, data.motions.state[np.concatenate(rows)])
    squares = {
        pair: np.square((said - loop.targets) / loop.span)[..., loop.arm] for pair, said in chunks.items()
    }
    exchanged = {}
    for pair in list(chunks)[1:]:
        share, sure = better(squares[()], squares[pair])
        exchanged[" and ".join(pair)] = share
        if sure and share < BETTER:
            what = f"with {' and '.join(pair)} exchanged, {share:.0%} of the squared error is left"
            warnings.append(f"cameras: {what}: are their names swapped?")
    advice = "episodes=null" if len(laid) < np.count_nonzero(data.lengths) else "more episodes"
    advice += " or every=2" if every > 2 else ""
    parts = [f"{key}: {', '.join(names)}" for key, names in loop.judged().items() if names]
    parts = [f"{p} ({len(places):,} looks; try {advice})" if p.startswith(FEW_LOOKS) else p for p in parts]
    if robot.fps and not data.robot().fps:
        parts.append("the data do not say their rate" + "; give data.fps=" * ("fps" in cfg.get("data", ())))
    facts = {"data": data.scope, "episodes": f"{len(laid)} of {len(data)}"}
    facts |= {"steps": f"{len(loop.recorded):,}", "looks": f"{len(places):,}, every {every} steps"}
    facts["the policy's robot"] = robot.summary(config.chunk)
    return Replay(data, list(looks), loop, warnings, exchanged, "; ".join(parts), facts)


# ---------------------------------------------------------------- for people


def summary(errors: dict[str, Any]) -> dict[str, str]:
    """The most important figures."""
    share, gripper = errors["of_range"], errors["gripper"]
    found = {
        "RMSE, of the range": f"{share['policy']:.1%}",
        "always the mean action": f"{share['mean_action']:.1%}",
        "the last action repeated": f"{share['last_action']:.1%}",
    }
    if gripper and not gripper["switches"]["recorded"]:
        found["gripper"] = f"never switched; {gripper['switches']['predicted']} switches predicted"
    elif gripper:
        found["gripper as recorded"] = f"{gripper['agreement']:.0%}"
        found["its switches found"] = "{found} of {recorded} ({predicted} predicted)".format(
            **gripper["switches"]
        )
    if gripper and gripper["late"] is not None:
        found["steps late; off"] = f"{gripper['late']:+g}; {gripper['off']:.1f}"
    return found


def table(errors: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows under a name and `COLUMNS`; a dash where something never changes."""
    rows = []
    for each in errors["dimensions"]:
        texts = [format(each[key], FORMATS.get(key, ".3g")) for key in COLUMNS]
        rows.append((each["name"], *("–" if "nan" in text else text for text in texts)))
    return rows


@matplotlib.rc_context(html.CHART_STYLE)
def against(loop: OpenLoop) -> Figure:
    """Each dimension, predicted over recorded: a point for a step, and the line where they are equal."""
    columns = min(7, len(loop.names))
    rows = math.ceil(len(loop.names) / columns)
    figure = Figure((1.5 * columns + 0.3, 1.7 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    kept = np.linspace(0, len(loop.recorded) - 1, min(MOST_POINTS, len(loop.recorded))).round().astype(int)
    for axis, name, x, y in zip(axes, loop.names, loop.recorded[kept].T, loop.predicted[kept].T):
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axis.plot(ends, ends, color=html.GREY, linewidth=0.8)
        axis.plot(x, y, ".", markersize=3, alpha=0.35, rasterized=True)
        axis.set_title(name, fontsize=9, color=html.GREY)
        axis.tick_params(labelsize=6)
    for axis in axes[len(loop.names) :]:
        axis.set_axis_off()
    figure.supxlabel("recorded", fontsize=9, color=html.GREY)
    figure.supylabel("predicted", fontsize=9, color=html.GREY)
    return figure


@matplotlib.rc_context(html.CHART_STYLE)
def curves(loop: OpenLoop, laid: Laid) -> Figure:
    """Recorded and predicted over the steps of an episode, before the band of usual values; upright lines
    where the policy looked."""
    figure = Figure((9.6, 0.75 * len(loop.names) + 0.7), layout="constrained")
    axes = figure.subplots(len(loop.names), 1, sharex=True, squeeze=False)[:, 0]
    for i, (axis, name) in enumerate(zip(axes, loop.names)):
        axis.axhspan(loop.usual.low[i], loop.usual.high[i], color=html.GREY, alpha=0.12, linewidth=0)
        looks, upright = laid.positions[laid.positions < LONGEST], axis.get_xaxis_transform()
        axis.vlines(looks, 0, 1, transform=upright, color=html.GREY, alpha=0.3, linewidth=0.6)
        for label, values in {"recorded": laid.recorded, "predicted": laid.predicted}.items():
            axis.plot(values[:LONGEST, i], drawstyle="steps-post", label=label)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(2))
        axis.tick_params(labelsize=7)
    axes[-1].set_xlabel("steps")
    figure.align_ylabels(axes)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


@matplotlib.rc_context(html.CHART_STYLE)
def strip(found: Replay, number: int) -> Figure:
    """A few pictures of each camera, evenly spread over an episode, as the policy is given them."""
    cameras, episode = found.loop.robot.cameras, found.data.episode(number)
    steps = np.linspace(0, episode.length - 1, min(SEEN, episode.length)).round().astype(int).tolist()
    pictures = found.data.read(episode, steps, cameras)
    figure = Figure((9.6, 1.75 * len(cameras)), layout="constrained")
    for (row, column), axis in np.ndenumerate(figure.subplots(len(cameras), len(steps), squeeze=False)):
        axis.imshow(pictures[cameras[row]][column])
        axis.set_axis_off()
        axis.set_title(f"{cameras[row]}, step {steps[column]}", fontsize=7, color=html.GREY)
    return figure


def write_page(found: Replay, errors: dict[str, Any], file: Path, shown: int) -> Path:
    """Warnings first, then figures, then some episodes."""
    episodes, count = [], len(found.numbers)
    for i in np.linspace(0, count - 1, min(shown, count)).round().astype(int).tolist():
        laid, texts = found.loop.episodes[i], found.data.episode(found.numbers[i]).texts
        episodes.append({
            "title": f"{laid.name}, {len(laid.recorded)} steps",
            "text": " → ".join(filter(None, dict.fromkeys(texts))),
            "pictures": strip(found, found.numbers[i]),
            "curves": curves(found.loop, laid),
        })  # fmt: skip
    places = {name.replace("_", " "): (range(len(each)), each) for name, each in errors["places"].items()}
    values: dict[str, Any] = {"warnings": found.warnings, "cards": summary(errors), "facts": found.facts}
    values |= {"hints": found.loop.hints(), "judged": found.judged, "exchanged": found.exchanged}
    values |= {"head": ("action", *COLUMNS.values()), "rows": table(errors), "episodes": episodes}
    values |= {
        "against": against(found.loop),
        "places": html.line_chart(places, x_label="place in the chunk"),
    }
    values["subtitle"] = "What a policy says over recorded episodes, beside what was done. Nothing moved."
    return html.write_page(file, "defi/robot/replay.html.j2", title="Open loop", **values)


@entry("replay")
def main(cfg: DictConfig) -> None:
    if cfg.part not in ("training", "held_out", "all"):
        raise UserError(f"part={cfg.part}: choose training, held_out or all")
    for name in ("batch", "shown", "episodes"):
        if cfg[name] is not None and cfg[name] < 1:
            raise UserError(f"{name}={cfg[name]}: must be 1 or more")
    if "sets" in cfg.data or "format" not in cfg.data:
        raise UserError("data: several data sets; replay one of them, data=<format> data.root=…")
    output = check_output(cfg.output, overwrite=cfg.overwrite)
    data = open_dataset(OmegaConf.to_container(cfg.data), cfg.part)
    acting = import_module("Step3_DeFI.acting")  # by name, since this package imports no stage
    names = [field.name for field in fields(acting.PolicySettings)]
    settings = acting.PolicySettings(**{name: cfg[name] for name in names})
    settings.checkpoint = str(local_folder(cfg.checkpoint))
    found = replay(settings.load(import_module("defi.processes").processes().device), data, cfg)
    errors, known = found.loop.errors(), acting.identify(settings.checkpoint)
    found.facts |= {f"policy's {key}": value for key, value in known.items()}
    console, lines = Console(markup=False, highlight=False), Table("action", *COLUMNS.values(), box=SIMPLE)
    for row in table(errors):
        lines.add_row(*row)
    said = summary(errors) | {
        f"{pair} exchanged": f"{share:.0%} of the squared error" for pair, share in found.exchanged.items()
    }
    console.print(lines, LEGEND, "", *(f"{label}: {value}" for label, value in said.items()), sep="\n")
    print(found.judged)
    for line in found.warnings:
        console.print(f"warning: {line}", style="yellow", soft_wrap=True)
    for line in found.loop.hints():
        console.print(f"perhaps: {line}", style="yellow", soft_wrap=True)
    if not found.warnings:
        print("no warnings")
    prepare_output(output, overwrite=cfg.overwrite)
    record = {"facts": found.facts, "settings": OmegaConf.to_container(cfg), "warnings": found.warnings}
    record |= {"hints": found.loop.hints(), "judged": found.loop.judged(), "exchanged": found.exchanged}
    record = json.loads(json.dumps(record | errors), parse_constant=lambda _: None)  # JSON has no NaN
    write_file(output / "results.json", json.dumps(record, indent=1))
    print(write_page(found, errors, output / "index.html", cfg.shown))


if __name__ == "__main__":
    main()
