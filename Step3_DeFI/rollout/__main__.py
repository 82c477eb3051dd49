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
from defi.processes import print_once, processes
from Step3_DeFI.config import PRECISIONS
from Step3_DeFI.diffusion import SAMPLERS
from Step3_DeFI.rollout.evaluate import Evaluation, evaluate
from Step3_DeFI.rollout.policy import ModelPolicy, identify, load_policy, policy_threads, trained_precision
from Step3_DeFI.rollout.protocol import AGENTS, RolloutConfig, choose
from Step3_DeFI.rollout.report import result_table, task_table, write_report
from Step3_DeFI.rollout.results import RESULTS

IDENTITY = "rollout.json"
# Settings that finished chains do not depend on.
HOWEVER_DONE = {"processes", "videos", "baseline", "output", "resume", "overwrite"}
HOWEVER_DONE |= {"checkpoint", "gfdm", "gidm", "threads"}  # hashes and threads as resolved are in `known`


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
        choose("agent", self.agent, AGENTS)
        choose("sampler", self.sampler, (None, *SAMPLERS))
        choose("precision", self.precision, (None, *PRECISIONS))
        if self.agent == "policy" and self.checkpoint is None:
            raise UserError("checkpoint=: not given; name a stage-3 run's output folder, or agent=random")
        if "scripted" in (self.agent, self.baseline) and self.sim.calvin_root is not None:
            raise UserError("scripted: knows the built-in tables only; use sim=builtin, or another agent")
        if self.baseline == self.agent:
            raise UserError(f"baseline={self.baseline}: the same as agent; leave one of them out")


@entry("step3_rollout")
def main(cfg: DictConfig) -> None:
    config = typed(CommandConfig, cfg, "step3_rollout")
    output, state = Path(config.output), processes()
    if state.is_main_process:
        check_output(output, resume=config.resume, overwrite=config.overwrite)
    evaluation = Evaluation.prepare(config, state.process_index)
    kinds = sorted(set(gather_object([evaluation.renderer.kind])))
    if len(kinds) > 1:
        raise UserError(
            f"sim.renderer: the processes of this run would draw with different ones ({', '.join(kinds)}); "
            "name one that works for all of them, such as sim.renderer=mesa"
        )
    print_once(f"renderer: {evaluation.renderer}")
    print_once(evaluation.caveat or "")
    policy, known = None, {}
    if config.agent == "policy":
        config.precision = config.precision or trained_precision(config.checkpoint)
        known = identify(config.checkpoint) | {"device": state.device.type}
        sources = {"gfdm": config.gfdm, "gidm": config.gidm}
        model = load_policy(config.checkpoint, device=state.device, precision=config.precision, **sources)
        wanted = {"sampler": config.sampler, "steps": config.sampler_steps, "guidance": config.guidance}
        chosen = {key: value for key, value in wanted.items() if value is not None}
        policy = ModelPolicy(model, precision=config.precision, **chosen)
    with policy_threads(config.threads, ranks=state.num_processes) as threads:
        if known.get("device") == "cpu":
            known["threads"] = threads  # rounding depends on it
        if state.is_main_process:
            settings = {key: value for key, value in asdict(config).items() if key not in HOWEVER_DONE}
            seen = {"renderer": str(evaluation.renderer), "checkpoint": None}  # which may have moved
            open_output(output, config, asdict(evaluation.protocol) | settings | known | seen)
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
    identity = json.loads(json.dumps(identity))  # as it will be read
    if config.resume and output.is_dir() and not all(map(is_leftover, output.iterdir())):
        before = read_json(output / IDENTITY, "not the output of a rollout; choose another output=")
        for key in identity:
            if before.get(key) != identity[key]:
                raise UserError(
                    f"{output}: was begun with {key}={before.get(key)}, now it is {identity[key]}; "
                    "continue with the same settings, or choose another output="
                )
        return
    prepare_output(output, resume=config.resume, overwrite=config.overwrite)
    with writing(output, IDENTITY):
        write_file(output / IDENTITY, json.dumps(identity, indent=1))


if __name__ == "__main__":
    main()
