"""A published checkpoint → a checkpoint folder of ours, every tensor accounted for.

    python -m defi.checkpoints.convert stage=gfdm source=<diffusers folder> output=ckpts/gfdm
    python -m defi.checkpoints.convert stage=gidm source=lam_idm.ckpt output=ckpts/gidm
    python -m defi.checkpoints.convert stage=policy source=<file>.pt output=ckpts/policy
    python -m defi.checkpoints.convert stage=clip source=ViT-B-32.pt tokenizer=<folder> output=ckpts/clip

The next stage, rollouts and `from_pretrained` load what it writes. Settings: configs/convert.yaml.
"""

import importlib
from types import ModuleType

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from defi.checkpoints.matching import DoesNotFit
from defi.config import entry
from defi.engine import checkpoint
from defi.engine.model import StageModel
from defi.engine.output import check_output, new_folder, prepare_output
from defi.errors import UserError

# By name, since this package imports no stage: each stage knows the published names of its own weights.
ADAPTERS = {
    "gfdm": "Step1_GFDM.adapter",
    "gidm": "Step2_GIDM.adapter",
    "policy": "Step3_DeFI.adapter",
    "clip": "defi.checkpoints.clip",
}


def adapter(stage: str) -> ModuleType:
    """The module that knows a stage's published checkpoints.

    It has `TITLE`, `MARK`, a tensor that only they have, `convert(cfg)` → (model, report), and for the stages
    `build(cfg)`, a new model of a preset, and `publish(model)`, its trained part under the published names.
    """
    if stage not in ADAPTERS:
        raise UserError(f"stage={stage}: choose one of {', '.join(ADAPTERS)}")
    return importlib.import_module(ADAPTERS[stage])


@entry("convert")
def main(cfg: DictConfig) -> None:
    output = check_output(cfg.output, overwrite=cfg.overwrite)
    console = Console(highlight=False)
    try:
        model, report = adapter(cfg.stage).convert(cfg)
    except DoesNotFit as error:
        console.print(error.report.table())
        raise
    console.print(report.table())
    if isinstance(model, StageModel):
        prepare_output(output, overwrite=cfg.overwrite)
        output = checkpoint.save(model, output, step=0, config=OmegaConf.to_container(cfg, resolve=True))
    else:  # a text tower: a complete Hugging Face folder or none
        with new_folder(output) as folder:
            model.save(folder)
    print(f"written      {output}")


if __name__ == "__main__":
    main()
