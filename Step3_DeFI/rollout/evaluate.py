"""A rollout from its settings to its results: `python -m Step3_DeFI.rollout checkpoint=<run>`."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from omegaconf import DictConfig
from rich.console import Console

from defi.benchmarks.benchmark import About, Benchmark, Episode, Outcome, Simulation, name_of
from defi.benchmarks.find import FIRST, offer
from defi.benchmarks.statistics import Summary
from defi.config import entry
from defi.engine.log import ProgressDisplay
from defi.engine.output import check_output, is_leftover, prepare_output, write_file
from defi.errors import UserError, reading, writing
from defi.files import read_json
from defi.processes import print_once, processes
from Step3_DeFI.acting import Policy, identify, policy_threads, trained_precision
from Step3_DeFI.policy import DeFI
from Step3_DeFI.rollout.config import (
    CommandConfig,
    RolloutConfig,
    check_robot,
    compare_robots,
    read_settings,
    settle_adapters,
)
from Step3_DeFI.rollout.fleet import Fleet, PatientBatcher
from Step3_DeFI.rollout.remote import ServedPolicy
from Step3_DeFI.rollout.report import result_table, task_table, who, write_clip, write_report
from Step3_DeFI.rollout.results import (
    HOWEVER_DONE,
    IDENTITY,
    RESULTS,
    EpisodeLog,
    Results,
    running_average,
    to_json,
    versions,
)
from Step3_DeFI.rollout.simulator import Clip, EpisodeResult, Setup

FIX_OUTCOME = "give all that the benchmark's value() and attempts() take from it"
CLIP_RATE = 10  # control steps per second of clips, where the benchmark's robot does not say


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that is set up and checked: the episodes, and what runs them. Nothing has run yet."""

    benchmark: Benchmark
    config: RolloutConfig
    protocol: Mapping[str, Any]
    episodes: Sequence[Episode]
    simulation: Simulation

    @classmethod
    def prepare(cls, benchmark: Benchmark, config: RolloutConfig, rank: int = 0) -> "Evaluation":
        """For the process `rank` of `accelerate launch`.

        Raises:
            UserError: a setting of the benchmark that does not fit, or something that it needs is not there.
        """
        episodes = benchmark.episodes(config.seed)
        protocol = benchmark.protocol(episodes, config.seed)
        return cls(benchmark, config, protocol, episodes, benchmark.prepare(rank))

    @cached_property
    def about(self) -> About:
        """What the results say about it."""
        return self.benchmark.about(self.protocol, self.config.seed)

    @property
    def settings(self) -> dict[str, Any]:
        """All of them, for the record."""
        return asdict(self.benchmark) | asdict(self.config)

    def setup(self, agent: str, filmed: int = 0) -> Setup:
        """What simulator processes get to run an agent; the policy's actions come from here."""
        return Setup(
            self.simulation.make,
            self.config.seed,
            self.benchmark.robot,
            name=agent,
            agent=None if agent == "policy" else self.benchmark.agent(agent),
            adapters=(self.config.adapters or ()) if agent == "policy" else (),
            filmed=filmed,
            film_every=self.config.videos.every,
            variables=self.simulation.variables,
        )

    def check(self, outcome: Outcome) -> None:
        """Raises an error for what is no outcome of an episode."""
        benchmark = self.benchmark
        for score in benchmark.scores:
            float(benchmark.value(outcome, score))
            dict(benchmark.attempts(outcome, score))
            if len(benchmark.reached(outcome, score)) != len(self.about.columns):
                raise ValueError("no outcome of this benchmark")


def run_episodes(
    evaluation: Evaluation,
    agent: str,
    policy: Policy | None = None,
    *,
    name: str | None = None,
    output: Path | None = None,
    state: PartialState | None = None,
    show: bool = True,
) -> tuple[EpisodeResult, ...]:
    """Run all episodes that `output` does not hold yet.

    Args:
        policy: answers the observations of the agent `policy`; the others need none.
        name: of the log, `<name>.jsonl`; None: as the benchmark calls its episodes.
        output: folder for the log, and of the policy's run for clips; None keeps nothing on disk.
        state: the processes of `accelerate launch`, each of which takes a contiguous part of the episodes and
            returns all of them; None: this process alone.
    """
    config, about, benchmark = evaluation.config, evaluation.about, evaluation.benchmark
    rank, ranks = (state.process_index, state.num_processes) if state else (0, 1)
    log = EpisodeLog(output, name or about.episodes, rank) if output else None
    found = log.read(evaluation.check) if log else {}
    if state:
        state.wait_for_everyone()  # until all have read: from here on the files grow
    missing = [episode for episode in evaluation.episodes if episode.index not in found]
    mine = missing[len(missing) * rank // ranks : len(missing) * (rank + 1) // ranks]
    size = min(len(mine), config.processes or max(1, len(os.sched_getaffinity(0)) // ranks))
    setup = evaluation.setup(agent, config.videos.chains if output and name is None else 0)
    batcher = PatientBatcher(policy, config.batch) if policy else None
    chunk = config.chunk or policy.robot.executed if policy else None
    words = {"actions": len(benchmark.robot.actions), "noun": about.episode}
    total = len(found) + len(mine)
    progress = ProgressDisplay(who(about, agent), total, len(found), enabled=show and rank == 0)
    with Fleet(setup, size, batcher, chunk=chunk, **words) as fleet, closing(progress):
        for event in fleet.run(mine):
            if isinstance(event, Clip):
                with writing(output, "a clip"):
                    write_clip(output / "videos", event, (about.fps or CLIP_RATE) / config.videos.every)
                continue
            with reading(f"{name_of(type(benchmark))}: the outcome {event.outcome}", FIX_OUTCOME):
                evaluation.check(event.outcome)
            found[event.index] = event
            if log:
                with writing(output, log.path.name):
                    log.append(event)
            values = [benchmark.value(each.outcome, benchmark.scores[-1]) for each in found.values()]
            progress.show(len(found), running_average(values, about))
    if state:
        state.wait_for_everyone()
    found = log.read(evaluation.check) if log else found
    return tuple(found[episode.index] for episode in evaluation.episodes)


def evaluate(
    evaluation: Evaluation,
    agent: str,
    policy: Policy | None = None,
    *,
    identity: Mapping[str, Any] | None = None,
    output: Path | None = None,
    **how: Any,
) -> Results:
    """Run an agent, and the baseline beside it on the same episodes: arguments as for `run_episodes`.

    `identity` is what is known about the policy, for the record.
    """
    benchmark, config, about = evaluation.benchmark, evaluation.config, evaluation.about
    earlier = len(EpisodeLog(output, about.episodes).read()) if output else 0
    began, started = time.monotonic(), datetime.now(timezone.utc)
    episodes = run_episodes(evaluation, agent, policy, output=output, **how)
    run = {
        "started": started.isoformat(timespec="seconds"),
        "seconds": time.monotonic() - began,  # of this start
        f"earlier_{about.episodes}": earlier,  # finished before it
        "control_steps": sum(episode.control_steps for episode in episodes),
        "observations": sum(episode.observations for episode in episodes),
        "renderer": evaluation.simulation.renderer,
        "caveat": evaluation.simulation.caveat,
        "settings": evaluation.settings,
        "versions": versions(),
    }

    def scores(episodes: Sequence[EpisodeResult]) -> dict[str, Summary]:
        outcomes = [episode.outcome for episode in episodes]
        return {score: benchmark.summarise(outcomes, score) for score in benchmark.scores}

    policy = {"kind": agent, **(identity or {})}
    results = Results(about, policy, evaluation.protocol, run, episodes, scores(episodes))
    if config.baseline:
        name = f"baseline_{config.baseline}"  # a resumed run may have another one
        beside = run_episodes(evaluation, config.baseline, name=name, output=output, **how)
        lists = {"scores": scores(beside), "episodes": list(map(to_json, beside))}
        results = replace(results, baseline={"agent": config.baseline, **lists})
    return results


def evaluate_policy(
    model: DeFI, evaluation: Evaluation, *, precision: str = "no", output: Path | None = None
) -> dict[str, float]:
    """A small rollout during training: averages and success rates under names for a log.

    `output` is for chains and clips, replacing what an earlier call left there; None keeps nothing.
    """
    if output is not None:
        for earlier in output.glob(f"{evaluation.about.episodes}*.jsonl"):
            earlier.unlink()
    if evaluation.simulation.caveat:
        print(evaluation.simulation.caveat)
    simulated = evaluation.benchmark.robot
    adapters = settle_adapters(evaluation.config, model.config.robot, simulated)
    check_robot(model.config, simulated, "the policy", adapters)
    policy = Policy(model, precision=precision)
    with policy_threads():
        results = evaluate(evaluation, "policy", policy, output=output, show=False)
    summary, name = results.scores[results.headline], results.about.figure.replace(" ", "_")
    rates = {f"success_{i + 1}": success["rate"] for i, success in enumerate(summary["success"])}
    return {name: summary["average"], **rates}


@entry("step3_rollout", offer)
def main(cfg: DictConfig) -> None:
    benchmark, config = read_settings(CommandConfig, cfg, "step3_rollout")
    output, state = Path(config.output), processes()
    if state.is_main_process:
        check_output(output, resume=config.resume, overwrite=config.overwrite)
    evaluation = Evaluation.prepare(benchmark, config, state.process_index)
    simulation = evaluation.simulation
    kinds = sorted(set(gather_object([simulation.kind])))
    if len(kinds) > 1:
        found = f"the processes of this run would draw with different ones ({', '.join(kinds)})"
        raise UserError(f"renderer: {found}; choose one that works for all")
    print_once(f"renderer: {simulation.renderer}" if simulation.renderer else "")
    print_once(simulation.caveat or "")
    policy, known = None, {"server": config.policy} if config.policy else {}
    if config.agent == "policy" and config.policy:
        policy = ServedPolicy(config.policy, config.policy_keys, benchmark.robot)
        known["served"] = policy.identity
        adapters = settle_adapters(config, policy.robot, benchmark.robot)
        differ = compare_robots(policy.robot, benchmark.robot, config.policy, adapters)
    elif config.agent == "policy":
        config.precision = config.precision or trained_precision(config.checkpoint)
        known = identify(config.checkpoint) | {"device": state.device.type}
        policy = config.load(state.device)
        adapters = settle_adapters(config, policy.robot, benchmark.robot)
        differ = check_robot(policy.model.config, benchmark.robot, config.checkpoint, adapters)
    else:
        config.adapters, differ = config.adapters or [], []
    known |= {"robot_differs": differ} if differ else {}
    with policy_threads(config.threads, ranks=state.num_processes) as threads:
        if known.get("device") == "cpu":
            known["threads"] = threads  # rounding depends on it
        if state.is_main_process:
            settings = {key: value for key, value in evaluation.settings.items() if key not in HOWEVER_DONE}
            seen = {"renderer": simulation.renderer, "checkpoint": None}  # which may have moved
            identity = {**evaluation.protocol} | settings | known | seen
            open_output(output, config, identity | {"benchmark": evaluation.about.benchmark})
        state.wait_for_everyone()
        results = evaluate(evaluation, config.agent, policy, identity=known, output=output, state=state)
    if state.is_main_process:
        with writing(output, f"{RESULTS} and the report"):
            results.save(output / RESULTS)
            report = write_report(output / "report.html", results, output / "videos")
        console = Console(highlight=False)
        console.print(result_table(results))
        console.print(task_table(results))
        if simulation.caveat:
            console.print(simulation.caveat, style="bold red")
        console.print(f"  {output / RESULTS}\n  {report}", markup=False, soft_wrap=True)


def open_output(output: Path, config: CommandConfig, identity: Mapping[str, Any]) -> None:
    """Make the output folder, or check that what is in it is an earlier part of this same run.

    identity: everything that finished episodes depend on; a continued run must agree in all of it.
    """
    if not config.resume or not output.is_dir() or all(map(is_leftover, output.iterdir())):
        prepare_output(output, resume=config.resume, overwrite=config.overwrite)
        with writing(output, IDENTITY):
            write_file(output / IDENTITY, json.dumps(identity, indent=1))
    before = {"benchmark": FIRST, "adapters": []}  # of the first version
    before |= read_json(output / IDENTITY, "not the output of a rollout; choose another output=")
    for key, value in json.loads(json.dumps(identity)).items():
        if before.get(key) != value:
            begun = f"{output}: was begun with {key}={before.get(key)}, now it is {value}"
            raise UserError(f"{begun}; continue with the same settings, or choose another output=")
