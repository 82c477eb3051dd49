"""Run all chains of an evaluation and put the result together."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from defi.errors import writing
from defi.sim.renderers import Renderer, default_kind, find_renderer
from Step3_DeFI.rollout.clips import write_clip
from Step3_DeFI.rollout.config import RolloutConfig
from Step3_DeFI.rollout.fleet import Fleet
from Step3_DeFI.rollout.messages import ChainResult, Clip, Judge, Setup, Trial
from Step3_DeFI.rollout.progress import RolloutProgress
from Step3_DeFI.rollout.protocol import Protocol, build_scene, build_trials, world_maker
from Step3_DeFI.rollout.results import ChainLog, Results, summaries, versions
from Step3_DeFI.rollout.server import Policy, PolicyServer

OTHER_PICTURES = (
    "This number does not compare with published ones: it was drawn on the CPU, CALVIN's data and the "
    "published evaluations with EGL. The pictures differ: in scene D the static view by 21 of 255 in the "
    "mean (45 % of its pixels by more than 20), the gripper view by 18."
)
AGENT_NAMES = {"policy": "DeFI", "random": "random actions", "expert": "scripted experts"}


@dataclass(frozen=True)
class Shard:
    """This process among those of `accelerate launch`: each takes a contiguous part of what is to be done.

    `wait` returns once all of them have called it.
    """

    rank: int = 0
    ranks: int = 1
    wait: Callable[[], None] = lambda: None

    def of(self, trials: Sequence[Trial]) -> Sequence[Trial]:
        low, high = (len(trials) * rank // self.ranks for rank in (self.rank, self.rank + 1))
        return trials[low:high]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that is set up: nothing has run yet, everything has been checked."""

    config: RolloutConfig
    protocol: Protocol
    trials: Sequence[Trial]
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
        from defi.sim.judge import solved

        scene = build_scene(config.sim, config.scene)
        protocol, trials = build_trials(config, scene)
        kind = config.sim.renderer or default_kind(config.sim.calvin_root)
        renderer = find_renderer(kind, fallback=config.sim.renderer_fallback, share=rank)
        make_world = world_maker(config.sim, scene, renderer.backend)
        return cls(config, protocol, trials, make_world, solved, renderer)

    @property
    def caveat(self) -> str | None:
        """What keeps the number from being compared with published ones, as far as pictures go."""
        return OTHER_PICTURES if self.protocol.assets == "calvin" and self.renderer.kind == "cpu" else None

    @property
    def drawing(self) -> str:
        """What draws, and the caveat, for the screen."""
        return "\n".join(filter(None, (f"renderer: {self.renderer}", self.caveat)))

    def setup(self, agent: str, *, filmed: bool) -> Setup:
        """What the simulator processes are told."""
        config = self.config
        return Setup(
            make_world=self.make_world,
            judge=self.judge,
            agent=agent,
            seed=config.seed,
            limit=max(config.max_steps),
            fresh=config.sim.world == "fresh",
            recorded=frozenset(range(config.videos.chains if filmed else 0)),
            record_every=config.videos.every,
            environment=self.renderer.environment,
        )

    def processes(self, shard: Shard, trials: int) -> int:
        """Simulator processes of this shard: by default one per processor, shared among the shards."""
        wanted = self.config.processes or max(1, len(os.sched_getaffinity(0)) // shard.ranks)
        return min(wanted, trials)


def run_chains(
    evaluation: Evaluation,
    agent: str,
    policy: Policy | None = None,
    *,
    name: str = "chains",
    output: Path | None = None,
    shard: Shard | None = None,
    show: bool = True,
) -> tuple[ChainResult, ...]:
    """All chains of an evaluation with one agent, in order.

    With `output`, chains are written to `<output>/<name>.jsonl` as they finish, and those found there are not
    run again; the first chains are filmed into `<output>/videos`, the baseline's are not.

    Raises:
        UserError: a simulator process cannot run a chain, or `output` cannot be written to.
    """
    shard = shard or Shard()
    config = evaluation.config
    log = ChainLog(output, name, shard.rank) if output else None
    found = log.read() if log else {}
    shard.wait()  # until all have read: from here on the files grow
    trials = shard.of([trial for trial in evaluation.trials if trial.index not in found])
    server = PolicyServer(policy, config.batch, config.chunk) if policy else None
    setup = evaluation.setup(agent, filmed=output is not None and name == "chains")
    progress = RolloutProgress(
        AGENT_NAMES[agent], len(found) + len(trials), len(found), setup.limit, enabled=show and not shard.rank
    )
    with Fleet(setup, evaluation.processes(shard, len(trials)), server) as fleet, progress:
        for event in fleet.run(trials):
            if isinstance(event, Clip):
                with writing(output, "a clip"):
                    write_clip(output / "videos", event, config.videos.every)
                continue
            found[event.index] = event
            if log:
                with writing(output, log.path.name):
                    log.append(event)
            progress.show(found.values())
    shard.wait()
    found = log.read() if log else found
    return tuple(found[trial.index] for trial in evaluation.trials)


def evaluate(
    evaluation: Evaluation,
    agent: str,
    policy: Policy | None = None,
    *,
    identity: Mapping[str, Any] | None = None,
    output: Path | None = None,
    shard: Shard | None = None,
    show: bool = True,
) -> Results:
    """Run an agent, and the baseline beside it on the same chains.

    Args:
        policy: answers the looks of the agent `policy`; the others need none.
        identity: what is known about the policy, for the record.
        output: folder for chains and clips; None keeps nothing on disk.
    """
    config = evaluation.config
    place = {"output": output, "shard": shard, "show": show}
    earlier = len(ChainLog(output, "chains").read()) if output else 0
    began, started = time.monotonic(), datetime.now(timezone.utc)
    chains = run_chains(evaluation, agent, policy, **place)
    seconds = time.monotonic() - began
    baseline = None
    if config.baseline:
        beside = run_chains(evaluation, config.baseline, name="baseline", **place)
        baseline = {
            "agent": config.baseline,
            "limits": summaries(beside, config.max_steps),
            "chains": [asdict(chain) for chain in beside],
        }
    return Results(
        policy={"kind": agent, **(identity or {})},
        protocol=asdict(evaluation.protocol),
        run={
            "started": started.isoformat(timespec="seconds"),
            "seconds": seconds,  # of this start
            "earlier_chains": earlier,  # finished before it
            "control_steps": sum(chain.control_steps for chain in chains),
            "looks": sum(chain.looks for chain in chains),
            "renderer": str(evaluation.renderer),
            "caveat": evaluation.caveat,
            "settings": asdict(config),
            "versions": versions(),
        },
        limits=summaries(chains, config.max_steps),
        chains=chains,
        baseline=baseline,
    )
