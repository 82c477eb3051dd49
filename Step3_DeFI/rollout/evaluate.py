"""A rollout from its settings to its results: chains, simulator processes, a policy's answers, results."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from accelerate import PartialState

from defi.engine.log import ProgressDisplay
from defi.errors import writing
from defi.sim.judge import solved
from defi.sim.renderers import Renderer, default_kind, find_renderer
from Step3_DeFI.policy import DeFI
from Step3_DeFI.rollout.fleet import Fleet
from Step3_DeFI.rollout.policy import Batcher, ModelPolicy, policy_threads
from Step3_DeFI.rollout.protocol import (
    AGENTS,
    Protocol,
    RolloutConfig,
    build_chains,
    build_scene,
    world_maker,
)
from Step3_DeFI.rollout.report import write_clip
from Step3_DeFI.rollout.results import ChainLog, Results, lengths, running_average, summaries, versions
from Step3_DeFI.rollout.simulator import ChainResult, ChainSpec, Clip, Judge, Setup

OTHER_PICTURES = (
    "This number does not compare with published ones: it was drawn on the CPU, CALVIN's data and the "
    "published evaluations with EGL. The pictures differ: in scene D the static view by 21 of 255 in the "
    "mean (45 % of its pixels by more than 20), the gripper view by 18."
)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that is set up: nothing has run yet, everything has been checked."""

    config: RolloutConfig
    protocol: Protocol
    chains: Sequence[ChainSpec]
    make_world: Callable[[], Any]
    judge: Judge
    renderer: Renderer

    @classmethod
    def prepare(cls, config: RolloutConfig, rank: int = 0) -> "Evaluation":
        """Chains, scene, judge and renderer of `config`, for the process `rank` of `accelerate launch`.

        Raises:
            UserError: an unknown task or scene, a wrong clone, an impossible chain, a renderer that does not
                work here.
        """
        scene = build_scene(config.sim, config.scene)
        protocol, chains = build_chains(config, scene)
        kind = config.sim.renderer or default_kind(config.sim.calvin_root)
        renderer = find_renderer(kind, fallback=config.sim.renderer_fallback, share=rank)
        make_world = world_maker(config.sim, scene, renderer.backend)
        return cls(config, protocol, chains, make_world, solved, renderer)

    @property
    def caveat(self) -> str | None:
        """What keeps the number from being compared with published ones, as far as pictures go."""
        return OTHER_PICTURES if self.protocol.assets == "calvin" and self.renderer.kind == "cpu" else None

    def setup(self, agent: str, *, filmed: bool) -> Setup:
        """What each simulator process gets."""
        return Setup(
            make_world=self.make_world,
            judge=self.judge,
            agent=agent,
            seed=self.config.seed,
            limit=max(self.config.max_steps),
            fresh=self.config.sim.world == "fresh",
            filmed=self.config.videos.chains if filmed else 0,
            film_every=self.config.videos.every,
            environment=self.renderer.environment,
        )


def run_chains(
    evaluation: Evaluation,
    agent: str,
    policy: ModelPolicy | None = None,
    *,
    name: str = "chains",
    output: Path | None = None,
    state: PartialState | None = None,
    show: bool = True,
) -> tuple[ChainResult, ...]:
    """Run all chains that `output` does not hold yet.

    Args:
        policy: answers the observations of the agent `policy` (with `act`); the others need none.
        output: folder for `<name>.jsonl` and clips (of `chains` only); None keeps nothing on disk.
        state: the processes of `accelerate launch`, each of which takes a contiguous part of the chains and
            returns all of them; None: this process alone.

    Raises:
        UserError: a simulator process cannot run a chain, or `output` cannot be written to.
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
    setup = evaluation.setup(agent, filmed=output is not None and name == "chains")
    batcher = Batcher(policy, config.batch, config.chunk) if policy else None
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
            progress.show(len(found), running_average(lengths(found.values(), setup.limit)))
    if state:
        state.wait_for_everyone()
    found = log.read() if log else found
    return tuple(found[chain.index] for chain in evaluation.chains)


def evaluate(
    evaluation: Evaluation,
    agent: str,
    policy: ModelPolicy | None = None,
    *,
    identity: Mapping[str, Any] | None = None,
    output: Path | None = None,
    **how: Any,
) -> Results:
    """Run an agent, and the baseline beside it on the same chains.

    Args:
        identity: what is known about the policy, for the record.
        policy, output, how: as for `run_chains`.
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
    baseline = None
    if config.baseline:
        beside = run_chains(evaluation, config.baseline, name="baseline", output=output, **how)
        limits = summaries(beside, config.max_steps)
        baseline = {"agent": config.baseline, "limits": limits, "chains": list(map(asdict, beside))}
    who, limits = {"kind": agent, **(identity or {})}, summaries(chains, config.max_steps)
    return Results(who, asdict(evaluation.protocol), run, limits, chains, baseline)


def evaluate_policy(
    model: DeFI, evaluation: Evaluation, *, precision: str = "no", output: Path | None = None
) -> dict[str, float]:
    """A rollout during training: averages and success rates under names for a log.

    Args:
        evaluation: a small one (`Evaluation.prepare`); its simulator processes are started for this call.
        precision: the training's.
        output: folder for chains and clips, replacing what an earlier call left there; None keeps nothing.
    """
    if output is not None:
        for earlier in output.glob("chains*.jsonl"):
            earlier.unlink()
    if evaluation.caveat:
        print(evaluation.caveat)
    policy = ModelPolicy(model, precision=precision)
    with policy_threads():
        results = evaluate(evaluation, "policy", policy, output=output, show=False)
    summary = results.limits[str(max(evaluation.config.max_steps))]
    rates = {f"success_{i + 1}": success["rate"] for i, success in enumerate(summary["success"])}
    return {"average_length": summary["average"], **rates}
