"""Look at a data set of any format: what there is, what an episode looks like, and what looks wrong.

`python -m defi.data.look data=<format> data.root=… output=…` (configs/look.yaml) prints and writes a page.
"""

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float32
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table

from defi import html
from defi.config import entry
from defi.data import Dataset, Episode, open_dataset
from defi.data.episode import file_name
from defi.data.motions import Motions, Statistics
from defi.engine.output import check_output, prepare_output
from defi.errors import UserError, reading
from defi.video import write_mp4

FEW, MANY = 5, 30  # of what looks wrong, so many are named; of instructions, so many are shown
SHORT = 10  # frames: a chunk of stage 3
FAR = 10  # times the range from 1 % to 99 %: what lies so far beyond it is no usual value
LONGEST_CLIP, HIGHEST_CLIP = 120, 320  # frames and pixels: of longer and larger ones every so many is shown
COLUMNS = ("", "smallest", "1 %", "mean", "std", "99 %", "largest")


@dataclass
class Look:
    """What was found. facts: label → value. wrong: a line for each thing. texts: instruction → episodes."""

    data: Dataset
    facts: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    texts: Counter[str] = field(default_factory=Counter)

    @cached_property
    def episodes(self) -> list[Episode]:
        return [self.data.episode(number) for number in range(len(self.data))]

    @cached_property
    def motions(self) -> Motions | None:
        try:
            return self.data.motions if self.data.action_names else None
        except UserError as error:
            self.wrong.append(str(error))
            return None

    @cached_property
    def statistics(self) -> dict[str, tuple[tuple[str, ...], Float32[np.ndarray, "N A"], Statistics]]:
        """Of actions, and of the state if there is one: names, values, and what they are like."""
        found = {"actions": (self.data.action_names, self.motions.actions)} if self.motions else {}
        if found and self.data.state_names:
            found["state"] = (self.data.state_names, self.motions.state)
        return {what: (*each, Statistics.of(each[1])) for what, each in found.items()}

    def note(self, what: str, names: Sequence[str]) -> None:
        """That something is wrong with some, if there are any."""
        if names:
            more = f", … ({len(names):,} in all)" if len(names) > FEW else ""
            self.wrong.append(f"{what}: {', '.join(names[:FEW])}{more}")

    @cached_property
    def rates(self) -> list[float | None]:
        """Frames per second of each episode, None where nobody knows."""
        try:
            return [self.data.rate(each) for each in self.episodes]
        except UserError as error:
            self.wrong.append(str(error))
            return [None] * len(self.episodes)

    def rows(self, episode: Episode) -> slice:
        """Where an episode lies in the motions."""
        first = int(self.motions.rows(np.array(episode.start)))
        return slice(first, first + episode.length)

    def spread(self, count: int) -> list[int]:
        """Numbers of so many episodes, or of all, that have frames."""
        some = np.flatnonzero(self.data.lengths)
        return some[np.linspace(0, len(some) - 1, min(count, len(some))).round().astype(int)].tolist()

    def table(self, what: str) -> list[tuple[str, ...]]:
        """Rows under `COLUMNS`."""
        names, _, stats = self.statistics[what]
        columns = (stats.minimum, stats.low, stats.mean, stats.std, stats.high, stats.maximum)
        return [(name, *(f"{column[i]:.4g}" for column in columns)) for i, name in enumerate(names)]


def look(data: Dataset, cfg: DictConfig) -> Look:
    """Examine a data set; `cfg` is that of configs/look.yaml."""
    found, lengths = Look(data), data.lengths
    found.note("cannot be read", [f"{name} ({fault})" for name, fault in data.faults.items()])
    found.facts |= {"data": data.scope, "episodes": f"{len(data):,}", "frames": f"{lengths.sum():,}"}
    if None not in found.rates:
        found.facts["frames per second"] = ", ".join(
            f"{r:g}" for r in sorted(set(filter(None, found.rates)))[:FEW]
        )
        seconds = float((lengths / np.array(found.rates)).sum())
        found.facts["time"] = str(timedelta(seconds=round(seconds)))
    found.facts["lengths"] = f"{lengths.min()} to {lengths.max()} frames, median {np.median(lengths):g}"
    check_pictures(found, cfg.checked)
    found.note(f"shorter than {SHORT} frames", [e.name for e in found.episodes if e.length < SHORT])
    check_texts(found, cfg.tokens, Path(cfg.tokenizer) if cfg.tokenizer else None)
    for what, (names, values, stats) in found.statistics.items():
        found.facts[what] = f"{len(names)}: {', '.join(names)}"
        check_numbers(found, what, names, values, stats)
    if found.motions:
        check_idle(found, cfg.idle)
    else:
        found.facts["actions"] = "none that can be read" if data.action_names else "none"
    found.facts |= {"left out": "; ".join(data.left_out)} if data.left_out else {}
    return found


def check_pictures(found: Look, count: int) -> None:
    """Size of each camera, from a few pictures of some episodes; also whether their last frame is there."""
    sizes: dict[str, Counter] = {camera: Counter() for camera in found.data.cameras}
    plain, unread = defaultdict(list), []
    for number in track(found.spread(count), "pictures", transient=True):
        each = found.episodes[number]
        for camera in found.data.cameras:
            try:
                frames = found.data.read(each, [0, each.length // 2, each.length - 1], [camera])[camera]
            except UserError as error:
                unread.append(str(error))
                continue
            sizes[camera]["{} x {}".format(*frames.shape[1:3])] += 1
            if (frames == frames[:, :1, :1]).all():
                plain[camera].append(each.name)
    found.note("pictures cannot be read", unread)
    for camera, sizes_ in sizes.items():
        found.facts[f"camera {camera}"] = f"{', '.join(sizes_) or '?'} (height x width)"
        if len(sizes_) > 1:
            found.wrong.append(f"camera {camera}: pictures of several sizes, {dict(sizes_)}")
        found.note(f"camera {camera}: pictures of one colour", plain[camera])


def check_texts(found: Look, tokens: int, tokenizer: Path | None) -> None:
    """Instructions that are missing, or longer than CLIP reads."""
    found.texts.update(text for each in found.episodes for text in dict.fromkeys(each.texts))
    count, how = estimate_tokens, f"by an estimate; tokenizer={tokenizer} is no folder"
    if tokenizer and tokenizer.is_dir():
        from transformers import AutoTokenizer  # takes seconds

        with reading(tokenizer, "give CLIP's folder, or tokenizer=null"):
            known = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        count, how = (lambda text: len(known(text)["input_ids"])), f"counted with {tokenizer}"
    found.note("without an instruction", [e.name for e in found.episodes if "" in e.texts])
    lengths = {text: count(text) for text in found.texts if text}
    longest = max(lengths.values(), default=0)
    found.facts["instructions"] = f"{len(lengths):,} different, the longest of {longest} tokens ({how})"
    long = sorted((text for text in lengths if lengths[text] > tokens), key=lengths.__getitem__, reverse=True)
    found.note(f"CLIP reads {tokens} tokens, these have more ({how})", [repr(text) for text in long])


def estimate_tokens(text: str) -> int:
    """Of CLIP, roughly: one a word, more of long ones, two of a letter without ASCII, a mark at each end."""
    parts = re.findall(r"[A-Za-z]+|\S", text)
    return 2 + sum(1 + max(0, len(part) - 9) // 5 if part.isascii() else 2 for part in parts)


def check_numbers(
    found: Look, what: str, names: Sequence[str], values: Float32[np.ndarray, "N A"], stats: Statistics
) -> None:
    """Dimensions that do not move, or jump, and episodes that are the same."""
    still, rare = stats.minimum == stats.maximum, stats.low == stats.high
    found.note(f"{what} never change", [n for n, s in zip(names, still) if s])
    found.note(f"{what} are the same in 49 of 50 frames", [n for n, s in zip(names, rare & ~still) if s])
    reach = np.where(rare, np.inf, FAR * (stats.high - stats.low))
    far = (values < stats.low - reach) | (values > stats.high + reach)
    for column in np.flatnonzero(far.any(axis=0)).tolist():
        row = int(far[:, column].argmax())
        frame, usual = int(found.motions.frames[row]), f"{stats.low[column]:.4g} to {stats.high[column]:.4g}"
        there = next(each for each in found.episodes if each.start <= frame < each.start + each.length)
        said = f"{values[row, column]:.4g} in frame {frame - there.start} of {there.name}, usual is {usual}"
        found.wrong.append(f"{what}: {names[column]} lies far out in {far[:, column].sum():,} frames: {said}")
    same = defaultdict(list)
    for each in {(e.start, e.length): e for e in found.episodes if e.length}.values():  # of a span once
        same[hashlib.sha256(values[found.rows(each)].tobytes()).digest()].append(each.name)
    found.note(f"the same {what}", [" = ".join(group[:FEW]) for group in same.values() if len(group) > 1])


def check_idle(found: Look, share: float) -> None:
    """Frames at starts and ends of episodes in which nothing moves: by the state, or else by the actions."""
    what, (_, values, stats) = list(found.statistics.items())[-1]
    limit = share * np.where(stats.high > stats.low, stats.high - stats.low, np.inf)
    starts = ends = 0
    long = []
    for each in found.episodes:
        rows = values[found.rows(each)]
        moves = (np.abs(np.diff(rows, axis=0, append=rows[-1:])) > limit).any(axis=1)
        moving = np.flatnonzero(moves)
        before, after = (moving[0], max(0, each.length - 2 - moving[-1])) if len(moving) else (each.length, 0)
        starts, ends = starts + int(before), ends + int(after)
        if before + after > each.length / 4:
            long.append(f"{each.name} ({before} + {after} of {each.length} frames)")
    part = (starts + ends) / int(found.data.lengths.sum())
    found.facts["idle"] = f"{starts:,} frames at starts, {ends:,} at ends ({part:.1%}), by the {what}"
    found.note("idle for more than a quarter, at start + end", long)


# ---------------------------------------------------------------- the page


@matplotlib.rc_context(html.CHART_STYLE)
def curves(
    names: Sequence[str], values: np.ndarray, rows: slice, stats: Statistics, rate: float | None
) -> Figure:
    """Each number over the time of an episode, before the band of usual values; how often there are which."""
    figure = Figure((9.6, 0.5 * len(names) + 0.5), layout="constrained")
    axes = figure.subplots(len(names), 2, sharex="col", sharey="row", squeeze=False, width_ratios=(8, 1))
    for (axis, beside), name, column, low, high in zip(axes, names, values.T, stats.low, stats.high):
        own = column[rows]
        axis.axhspan(low, high, color=html.GREY, alpha=0.12, linewidth=0)
        axis.plot(np.arange(len(own)) / (rate or 1), own, drawstyle="steps-post")
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(2))
        axis.tick_params(labelsize=7)
        ends = min(low, own.min()), max(high, own.max())
        counts, edges = np.histogram(column, bins=20, range=ends)
        beside.stairs(
            counts / counts.max(), edges, orientation="horizontal", fill=True, color="C0", alpha=0.6
        )
        beside.set_axis_off()
    axes[-1, 0].set_xlabel("seconds" if rate else "frames")
    figure.align_ylabels(axes[:, 0])
    return figure


def show(found: Look, number: int, output: Path) -> dict[str, Any]:
    """Clips of an episode, and its actions."""
    episode, rate, films = found.episodes[number], found.rates[number], []
    text = " → ".join(filter(None, dict.fromkeys(episode.texts))) or "no instruction"
    every = math.ceil(episode.length / LONGEST_CLIP)
    try:
        for camera in found.data.cameras:
            frames = found.data.read(episode, range(0, episode.length, every), [camera])[camera]
            step = math.ceil(frames.shape[1] / HIGHEST_CLIP)
            film = output / "clips" / f"{episode.name}-{file_name(camera)}.mp4"
            write_mp4(film, frames[:, ::step, ::step], fps=(rate or 10) / every)
            films.append((film, camera))
    except UserError as error:
        text += f" ({error})"
    chart = None
    if found.motions:
        names, values, stats = found.statistics["actions"]
        chart = curves(names, values, found.rows(episode), stats, rate)
    title = f"{episode.name}, {episode.length} frames"
    return {"title": title, "text": text, "films": films, "curves": chart}


def write_page(found: Look, output: Path, clips: int) -> Path:
    cards = {key: value for key, value in found.facts.items() if key in ("episodes", "frames", "time")}
    cards |= {"actions": str(len(found.data.action_names)), "cameras": str(len(found.data.cameras))}
    shown = [show(found, each, output) for each in track(found.spread(clips), "clips", transient=True)]
    vectors = {what: found.table(what) for what in found.statistics}
    values: dict[str, Any] = {"facts": found.facts, "cards": cards, "wrong": found.wrong}
    values |= {"episodes": shown, "vectors": vectors, "columns": COLUMNS}
    values["instructions"] = [(text or "(none)", f"{n:,}") for text, n in found.texts.most_common(MANY)]
    title, page = "A look at the data", output / "index.html"
    return html.write_page(page, "defi/data/look.html.j2", title=title, subtitle=found.data.scope, **values)


def report(found: Look) -> None:
    """Print what was found."""
    console = Console(markup=False, highlight=False)  # instructions may have brackets
    facts = Table(show_header=False, box=None)
    for label, value in found.facts.items():
        facts.add_row(label, value)
    console.print(facts)
    texts = [(text or "(none)", f"{count:,}") for text, count in found.texts.most_common(FEW)]
    tables = [("most frequent", ("instruction", "episodes"), texts)]
    tables += [(what, COLUMNS, found.table(what)) for what in found.statistics]
    for title, head, rows in tables:
        table = Table(*head, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in found.wrong:
        console.print(f"wrong: {line}", style="yellow", soft_wrap=True)


@entry("look")
def main(cfg: DictConfig) -> None:
    if cfg.part not in ("training", "held_out", "all"):
        raise UserError(f"part={cfg.part}: choose training, held_out or all")
    if min(cfg.clips, cfg.checked) < 1:
        raise UserError(f"clips={cfg.clips}, checked={cfg.checked}: must be at least 1")
    if "sets" in cfg.data or "format" not in cfg.data:
        raise UserError("data: several data sets; look at one of them, data=<format> data.root=…")
    output = check_output(cfg.output, overwrite=cfg.overwrite)
    found = look(open_dataset(OmegaConf.to_container(cfg.data), cfg.part), cfg)
    report(found)
    print(write_page(found, prepare_output(output, overwrite=cfg.overwrite), cfg.clips))


if __name__ == "__main__":
    main()
