"""Evaluate a policy: `python -m Step3_DeFI.rollout checkpoint=<run>` (configs/step3_rollout.yaml)."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from omegaconf import DictConfig
from rich.console import Console

from defi.config import entry, typed
from defi.engine.output import check_output, is_leftover, prepare_output, write_file
from defi.errors import UserError, writing
from defi.files import read_json
from defi.processes import processes
from Step3_DeFI.diffusion import SAMPLERS
from Step3_DeFI.rollout.config import RolloutConfig
from Step3_DeFI.rollout.evaluate import Evaluation, Shard, evaluate
from Step3_DeFI.rollout.messages import AGENTS
from Step3_DeFI.rollout.policy import (
    PRECISIONS,
    ModelPolicy,
    identify,
    load_policy,
    policy_threads,
    trained_precision,
)
from Step3_DeFI.rollout.report import result_table, task_table, write_report
from Step3_DeFI.rollout.results import RESULTS

IDENTITY = "rollout.json"
# Settings that finished chains do not depend on.
HOWEVER_DONE = (
    "processes",
    "videos",
    "baseline",
    "output",
    "resume",
    "overwrite",
    "checkpoint",
    "gfdm",
    "gidm",
)


@dataclass
class CommandConfig(RolloutConfig):
    """A rollout as a command: who acts, and where the result goes."""

    agent: str = "policy"
    checkpoint: str | None = None
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
        for key, choices in (("agent", AGENTS), ("sampler", SAMPLERS), ("precision", PRECISIONS)):
            value = getattr(self, key)
            if value is not None and value not in choices:
                raise UserError(f"{key}={value}: must be one of {', '.join(choices)}")
        if self.agent == "policy" and self.checkpoint is None:
            raise UserError(
                "checkpoint=: not given; name the output folder of a stage-3 run, or agent=random"
            )
        if "expert" in (self.agent, self.baseline) and self.sim.calvin_root is not None:
            raise UserError("expert: knows the built-in tables only; use sim=builtin, or another agent")
        if self.baseline == self.agent:
            raise UserError(f"baseline={self.baseline}: the same as agent; leave one of them out")


@entry("step3_rollout")
def main(cfg: DictConfig) -> None:
    config = typed(CommandConfig, cfg, "step3_rollout")
    if config.agent == "policy":
        config.precision = config.precision or trained_precision(config.checkpoint)
    state = processes()
    shard = Shard(state.process_index, state.num_processes, state.wait_for_everyone)
    if state.is_main_process:
        check_output(config.output, resume=config.resume, overwrite=config.overwrite)
    evaluation = Evaluation.prepare(config, state.process_index)
    kinds = sorted(set(gather_object([evaluation.renderer.kind])))
    if len(kinds) > 1:
        raise UserError(
            f"sim.renderer: the processes of this run would draw with different ones ({', '.join(kinds)}); "
            "name one that works for all of them, such as sim.renderer=mesa"
        )
    if state.is_main_process:
        print(evaluation.drawing)
    policy, known = None, {}
    if config.agent == "policy":
        precision = {"precision": config.precision}
        sources = {"gfdm": config.gfdm, "gidm": config.gidm}
        model = load_policy(config.checkpoint, device=state.device, **precision, **sources)
        policy = ModelPolicy(
            model,
            sampler=config.sampler,
            sampler_steps=config.sampler_steps,
            guidance=config.guidance,
            **precision,
        )
        known = identify(config.checkpoint) | {"device": state.device.type}
    output = Path(config.output)
    with policy_threads(config.threads, ranks=state.num_processes) as threads:
        if known.get("device") == "cpu":
            known["threads"] = threads  # rounding depends on it
        if state.is_main_process:
            open_output(output, config, identity_of(evaluation, known))
        shard.wait()
        results = evaluate(evaluation, config.agent, policy, identity=known, output=output, shard=shard)
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


def identity_of(evaluation: Evaluation, known: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that finished chains depend on: a continued run must agree in all of it."""
    settings = {key: value for key, value in asdict(evaluation.config).items() if key not in HOWEVER_DONE}
    settings.pop("threads", None)  # as resolved, in `known`
    policy = {key: value for key, value in known.items() if key != "checkpoint"}
    renderer = {"renderer": str(evaluation.renderer)}
    return json.loads(json.dumps(asdict(evaluation.protocol) | settings | policy | renderer))


def open_output(output: Path, config: CommandConfig, identity: Mapping[str, Any]) -> None:
    """Make the output folder, or check that what is in it is an earlier part of this same run."""
    file = output / IDENTITY
    if config.resume and output.is_dir() and not all(map(is_leftover, output.iterdir())):
        if not file.is_file():
            raise UserError(f"{output}: not the output of a rollout; choose another output=")
        before = read_json(file, "choose another output=")
        for key in identity:
            if before.get(key) != identity[key]:
                raise UserError(
                    f"{output}: was begun with {key}={before.get(key)}, now it is {identity[key]}; "
                    "continue with the same settings, or choose another output="
                )
        return
    prepare_output(output, resume=config.resume, overwrite=config.overwrite)
    with writing(output, IDENTITY):
        write_file(file, json.dumps(identity, indent=1))


if __name__ == "__main__":
    main()
