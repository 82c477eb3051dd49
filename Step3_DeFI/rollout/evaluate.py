"""A rollout from its settings to its results: `python -m Step3_DeFI.rollout checkpoint=<run>`."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from omegaconf import DictConfig
from rich.console import Console

from defi.config import entry, typed
from defi.engine.log import ProgressDisplay
from defi.engine.output import check_output, is_leftover, prepare_output, write_file
from defi.errors import UserError, writing
from defi.files import read_json
from defi.processes import print_once, processes
from defi.sim.judge import solved
from defi.sim.renderers import Renderer, default_kind, find_renderer
from Step3_DeFI.acting import Policy, identify, policy_threads, trained_precision
from Step3_DeFI.config import PRECISIONS
from Step3_DeFI.diffusion import SAMPLERS
from Step3_DeFI.policy import DeFI
from Step3_DeFI.rollout.fleet import Batcher, Fleet
from Step3_DeFI.rollout.protocol import (
    RolloutConfig,
    build_chains,
    build_scene,
    check_robot,
    choose,
    world_maker,
)
from Step3_DeFI.rollout.remote import ServedPolicy
from Step3_DeFI.rollout.report import result_table, task_table, write_clip, write_report
from Step3_DeFI.rollout.results import RESULTS, ChainLog, Results, running_average, versions
from Step3_DeFI.rollout.simulator import AGENTS, ChainResult, ChainSpec, Clip, Setup

IDENTITY = "rollout.json"
# Settings that finished chains do not depend on.
HOWEVER_DONE = {"processes", "videos", "baseline", "output", "resume", "overwrite"}
HOWEVER_DONE |= {"checkpoint", "gfdm", "gidm", "threads"}  # hashes and threads as resolved are in `known`
OTHER_PICTURES = (
    "This number does not compare with published ones: it was drawn on the CPU, CALVIN's data and the "
    "published evaluations with EGL. The pictures differ: in scene D the static view by 21 of 255 in the "
    "mean (45 % of its pixels by more than 20), the gripper view by 18."
)


@dataclass
class CommandConfig(RolloutConfig):
    """A rollout as a command: who acts, and where the result goes."""

    agent: str = "policy"
    checkpoint: str | None = None
    server: str | None = None
    server_keys: Any = "calvin"
    gfdm: str | None = None
    gidm: str | None = None
    sampler: str | None = None
    sampler_steps: int | None = None
    guidance: float | None = None
    precision: str | None = None
    threads: int | None = None
    output: str = "outputs/rollout"
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("agent", self.agent, AGENTS)
        choose("sampler", self.sampler, (None, *SAMPLERS))
        choose("precision", self.precision, (None, *PRECISIONS))
        if self.agent == "policy" and self.checkpoint is None and self.server is None:
            raise UserError("checkpoint=: not given; name a stage-3 run's output folder, or agent=random")
        its_own = ("checkpoint", "gfdm", "gidm", "sampler", "sampler_steps", "guidance", "precision")
        if self.server and (given := [key for key in its_own if getattr(self, key) is not None]):
            raise UserError(f"server={self.server}: leave {given[0]}= to the server")
        if "scripted" in (self.agent, self.baseline) and self.sim.calvin_root is not None:
            raise UserError("scripted: knows the built-in tables only; use sim=builtin, or another agent")
        if self.baseline == self.agent:
            raise UserError(f"baseline={self.baseline}: the same as agent; leave one of them out")


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that is set up and checked: the chains, and what runs them. Nothing has run yet."""

    config: RolloutConfig
    protocol: Mapping[str, Any]
    chains: Sequence[ChainSpec]
    setup: Setup
    renderer: Renderer

    @classmethod
    def prepare(cls, config: RolloutConfig, rank: int = 0) -> "Evaluation":
        """For the process `rank` of `accelerate launch`.

        Raises:
            UserError: an unknown task or scene, a wrong clone, an impossible chain, no such renderer here.
        """
        scene = build_scene(config.sim, config.scene)
        protocol, chains = build_chains(config, scene)
        kind = config.sim.renderer or default_kind(config.sim.calvin_root)
        renderer = find_renderer(kind, fallback=config.sim.renderer_fallback, share=rank)
        setup = Setup(
            world_maker(config.sim, scene, renderer.backend),
            judge=solved,
            seed=config.seed,
            limit=max(config.max_steps),
            fresh=config.sim.world == "fresh",
            film_every=config.videos.every,
            environment=renderer.environment,
        )
        return cls(config, protocol, chains, setup, renderer)

    @property
    def caveat(self) -> str | None:
        """What keeps the number from being compared with published ones, as far as pictures go."""
        return OTHER_PICTURES if self.protocol["assets"] == "calvin" and self.renderer.kind == "cpu" else None


def run_chains(
    evaluation: Evaluation,
    agent: str,
    policy: Policy | None = None,
    *,
    name: str = "chains",
    output: Path | None = None,
    state: PartialState | None = None,
    show: bool = True,
) -> tuple[ChainResult, ...]:
    """Run all chains that `output` does not hold yet.

    Args:
        policy: answers the observations of the agent `policy`; the others need none.
        output: folder for `<name>.jsonl` and clips (of `chains` only); None keeps nothing on disk.
        state: the processes of `accelerate launch`, each of which takes a contiguous part of the chains and
            returns all of them; None: this process alone.
    """
    config = evaluation.config
    rank, ranks = (state.process_index, state.num_processes) if state else (0, 1)
    log = ChainLog(output, name, rank) if output else None
    found = log.read() if log else {}
    if state:
        state.wait_for_everyone()  # until all have read: from here on the files grow
    missing = [chain for chain in evaluation.chains if chain.index not in found]
    mine = missing[len(missing) * rank // ranks : len(missing) * (rank + 1) // ranks]
    size = min(len(mine), config.processes or max(1, len(os.sched_getaffinity(0)) // ranks))
    filmed = config.videos.chains if output and name == "chains" else 0
    setup = replace(evaluation.setup, agent=agent, filmed=filmed)
    batcher = Batcher(policy, config.batch, config.chunk or policy.robot.executed) if policy else None
    total = len(found) + len(mine)
    progress = ProgressDisplay(AGENTS[agent], total, len(found), enabled=show and rank == 0)
    with Fleet(setup, size, batcher) as fleet, closing(progress):
        for event in fleet.run(mine):
            if isinstance(event, Clip):
                with writing(output, "a clip"):
                    write_clip(output / "videos", event, config.videos.every)
                continue
            found[event.index] = event
            if log:
                with writing(output, log.path.name):
                    log.append(event)
            progress.show(len(found), running_average(found.values(), setup.limit))
    if state:
        state.wait_for_everyone()
    found = log.read() if log else found
    return tuple(found[chain.index] for chain in evaluation.chains)


def evaluate(
    evaluation: Evaluation,
    agent: str,
    policy: Policy | None = None,
    *,
    identity: Mapping[str, Any] | None = None,
    output: Path | None = None,
    **how: Any,
) -> Results:
    """Run an agent, and the baseline beside it on the same chains: arguments as for `run_chains`.

    `identity` is what is known about the policy, for the record.
    """
    config = evaluation.config
    earlier = len(ChainLog(output).read()) if output else 0
    began, started = time.monotonic(), datetime.now(timezone.utc)
    chains = run_chains(evaluation, agent, policy, output=output, **how)
    run = {
        "started": started.isoformat(timespec="seconds"),
        "seconds": time.monotonic() - began,  # of this start
        "earlier_chains": earlier,  # finished before it
        "control_steps": sum(chain.control_steps for chain in chains),
        "observations": sum(chain.observations for chain in chains),
        "renderer": str(evaluation.renderer),
        "caveat": evaluation.caveat,
        "settings": asdict(config),
        "versions": versions(),
    }
    results = Results({"kind": agent, **(identity or {})}, evaluation.protocol, run, chains)
    if config.baseline:
        name = f"baseline_{config.baseline}"  # a resumed run may have another one
        chains = run_chains(evaluation, config.baseline, name=name, output=output, **how)
        limits = replace(results, chains=chains).limits
        baseline = {"agent": config.baseline, "limits": limits, "chains": list(map(asdict, chains))}
        results = replace(results, baseline=baseline)
    return results


def evaluate_policy(
    model: DeFI, evaluation: Evaluation, *, precision: str = "no", output: Path | None = None
) -> dict[str, float]:
    """A small rollout during training: averages and success rates under names for a log.

    `output` is for chains and clips, replacing what an earlier call left there; None keeps nothing.
    """
    if output is not None:
        for earlier in output.glob("chains*.jsonl"):
            earlier.unlink()
    if evaluation.caveat:
        print(evaluation.caveat)
    check_robot(model.config, "the policy")
    policy = Policy(model, precision=precision)
    with policy_threads():
        results = evaluate(evaluation, "policy", policy, output=output, show=False)
    summary = results.limits[str(max(evaluation.config.max_steps))]
    rates = {f"success_{i + 1}": success["rate"] for i, success in enumerate(summary["success"])}
    return {"average_length": summary["average"], **rates}


@entry("step3_rollout")
def main(cfg: DictConfig) -> None:
    config = typed(CommandConfig, cfg, "step3_rollout")
    output, state = Path(config.output), processes()
    if state.is_main_process:
        check_output(output, resume=config.resume, overwrite=config.overwrite)
    evaluation = Evaluation.prepare(config, state.process_index)
    kinds = sorted(set(gather_object([evaluation.renderer.kind])))
    if len(kinds) > 1:
        found = f"the processes of this run would draw with different ones ({', '.join(kinds)})"
        raise UserError(f"sim.renderer: {found}; name one that works for all, such as sim.renderer=mesa")
    print_once(f"renderer: {evaluation.renderer}")
    print_once(evaluation.caveat or "")
    policy, known = None, {"server": config.server} if config.server else {}
    if config.agent == "policy" and config.server:
        policy = ServedPolicy(config.server, config.server_keys)
    elif config.agent == "policy":
        config.precision = config.precision or trained_precision(config.checkpoint)
        known = identify(config.checkpoint) | {"device": state.device.type}
        wanted = {"gfdm": config.gfdm, "gidm": config.gidm, "sampler": config.sampler}
        wanted |= {"steps": config.sampler_steps, "guidance": config.guidance}
        chosen = {key: value for key, value in wanted.items() if value is not None}
        policy = Policy.load(config.checkpoint, device=state.device, precision=config.precision, **chosen)
        check_robot(policy.model.config, config.checkpoint)
    with policy_threads(config.threads, ranks=state.num_processes) as threads:
        if known.get("device") == "cpu":
            known["threads"] = threads  # rounding depends on it
        if state.is_main_process:
            settings = {key: value for key, value in asdict(config).items() if key not in HOWEVER_DONE}
            seen = {"renderer": str(evaluation.renderer), "checkpoint": None}  # which may have moved
            open_output(output, config, {**evaluation.protocol} | settings | known | seen)
        state.wait_for_everyone()
        results = evaluate(evaluation, config.agent, policy, identity=known, output=output, state=state)
    if state.is_main_process:
        with writing(output, f"{RESULTS} and the report"):
            results.save(output / RESULTS)
            report = write_report(output / "report.html", results, output / "videos")
        console = Console(highlight=False)
        console.print(result_table(results))
        console.print(task_table(results))
        if evaluation.caveat:
            console.print(evaluation.caveat, style="bold red")
        console.print(f"  {output / RESULTS}\n  {report}", markup=False, soft_wrap=True)


def open_output(output: Path, config: CommandConfig, identity: Mapping[str, Any]) -> None:
    """Make the output folder, or check that what is in it is an earlier part of this same run.

    identity: everything that finished chains depend on; a continued run must agree in all of it.
    """
    if not config.resume or not output.is_dir() or all(map(is_leftover, output.iterdir())):
        prepare_output(output, resume=config.resume, overwrite=config.overwrite)
        with writing(output, IDENTITY):
            write_file(output / IDENTITY, json.dumps(identity, indent=1))
    before = read_json(output / IDENTITY, "not the output of a rollout; choose another output=")
    for key, value in json.loads(json.dumps(identity)).items():
        if before.get(key) != value:
            begun = f"{output}: was begun with {key}={before.get(key)}, now it is {value}"
            raise UserError(f"{begun}; continue with the same settings, or choose another output=")
