"""A policy's checkpoint → one folder with all that acting needs, and from there to the hub.

    python -m defi.checkpoints.export checkpoint=ckpts/policy output=exported/policy [push=user/name]
    … format=lerobot    as one of LeRobot's policies (`export_lerobot.py`)
    … format=starvla    as a run of starVLA's (`export_starvla.py`)

It is a checkpoint that stands on no others: rollout and inspect take the folder, `Policy.load` and
`DeFI.from_pretrained` also its name on the hub. Not in it: DINO, stage 2's decoder, what resuming needs.
Settings: configs/export.yaml.
"""

from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from huggingface_hub import HfApi
from jinja2 import Environment, StrictUndefined
from omegaconf import DictConfig, OmegaConf

from defi.config import entry
from defi.engine.checkpoint import (
    MANIFEST,
    NESTED,
    RUN_CONFIG,
    find_checkpoint,
    find_weights,
    read_manifest,
    read_run_config,
    write_manifest,
)
from defi.engine.output import check_output, new_folder
from defi.errors import UserError, one_line
from defi.files import read_json
from defi.hub import REPOSITORY

CARD, TEMPLATE = "README.md", Path(__file__).parents[1] / "assets" / "model_card.md.j2"


def export(cfg: DictConfig) -> Path:
    """Write the folder, complete or not at all.

    Raises:
        UserError: no complete policy there, the output exists, or a disk is full.
    """
    if cfg.format not in (known := formats()):
        raise UserError(f"format={cfg.format}: choose from {', '.join(known)}")
    output, checkpoint = check_output(cfg.output, overwrite=cfg.overwrite), Path(cfg.checkpoint)
    checkpoint = find_checkpoint(checkpoint, "policy")
    places = {stage: cfg[stage] for stage in ("gfdm", "gidm")}
    # By name, since this package imports no stage.
    policy = import_module("Step3_DeFI.policy").DeFI.from_pretrained(find_weights(checkpoint), **places)
    with new_folder(output) as folder:
        own = folder if cfg.format == "folder" else folder / NESTED
        import_module("Step3_DeFI.stages").write_whole(policy, own)
        run = read_run_config(checkpoint)
        (own / RUN_CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create(without_places(run))))
        write_manifest(own, manifest := read_manifest(checkpoint))
        text = model_card(cfg.push or output.name, policy.config, manifest, run)
        (folder / CARD).write_text(text)
        if cfg.format != "folder":
            import_module(f"defi.checkpoints.export_{cfg.format}").write(policy, folder, run)
    return output


def formats() -> list[str]:
    """What can be written: the exported folder, and what a module here makes of it for another framework."""
    names = (module.name for module in iter_modules([str(Path(__file__).parent)]))
    return ["folder", *sorted(name.removeprefix("export_") for name in names if name.startswith("export_"))]


def model_card(name: str, policy: Any, manifest: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """Data, robot, training and figures of a policy (its `PolicyConfig`), and how to load it, in Markdown."""
    made = manifest["data"]
    facts = {
        "data set": f"{data_names(run.get('data') or {})}, fingerprint {made.get('fingerprint')}",
        "samples": made.get("size"),
        "preset": manifest.get("preset"),
        "steps": manifest["step"],
        "code": f"{manifest.get('version')}, commit {manifest.get('git_commit')}",
    }
    figures = {key: value for key, value in manifest["metrics"].items() if isinstance(value, (int, float))}
    pages = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters["cell"] = lambda value: " ".join(str(value).replace("|", "\\|").split())
    template = pages.from_string(TEMPLATE.read_text())
    return template.render(name=name, policy=policy, robot=policy.robot, facts=facts, figures=figures)


def data_names(section: Mapping[str, Any]) -> str:
    """What a section `data` was trained on, without where it lies; of a store, what it was made from."""
    names = []
    for own in (section.get("sets") or {"": section}).values():
        place = own.get("root") or own.get("store") or "not recorded"
        if own.get("store"):
            with suppress(UserError):  # it may be gone by now
                place = read_json(Path(place) / MANIFEST, "").get("source", place)
        names.append(Path(str(place)).name or place)
    return ", ".join(names)


def without_places(value: Any) -> Any:
    """A configuration whose absolute paths are their last parts: where things lay is nobody's business."""
    if isinstance(value, dict):
        return {key: without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_places(each) for each in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def push(folder: Path, name: str, *, private: bool) -> None:
    """Upload the folder as the repository `name`, which is made if there is none."""
    hub = HfApi()
    try:
        hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # each version of the hub's client has its own errors
        fix = "log in with `hf auth login`, then repeat the command with overwrite=true"
        raise UserError(f"{name}: cannot be uploaded ({one_line(error)}); {fix}") from None


@entry("export")
def main(cfg: DictConfig) -> None:
    if cfg.push is not None and not REPOSITORY.fullmatch(cfg.push):
        raise UserError(f"push={cfg.push}: give the name of a repository, user/name")
    folder = export(cfg)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: complete, {size / 1e6:,.1f} MB")
    if cfg.push is not None:
        push(folder, cfg.push, private=cfg.private)
        print(f"on the hub   {cfg.push}")


if __name__ == "__main__":
    main()
