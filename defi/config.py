"""Entry points: Hydra configuration from `configs/`, one clear line for a user's mistake."""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from defi.errors import UserError

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"

Settings = TypeVar("Settings")


def entry(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Decorator: make `main(cfg)` a command that reads `configs/<config_name>.yaml` and `key=value` settings.

    A `UserError` ends the command with one line on stderr and exit code 2; anything else is a bug and
    keeps its traceback. Hydra itself reports unknown keys and unknown presets, with exit code 1.
    """

    def decorate(main: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(main)
        def body(cfg: DictConfig) -> None:
            with one_line_errors():
                OmegaConf.resolve(cfg)
                main(cfg)

        @functools.wraps(main)
        def run() -> None:
            with one_line_errors():
                check_preset(sys.argv[1:])
            hydra.main(version_base=None, config_path=str(CONFIG_DIR), config_name=config_name)(body)()

        return run

    return decorate


@contextmanager
def one_line_errors() -> Iterator[None]:
    """A user's mistake ends the program with one line on stderr and exit code 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def check_preset(arguments: Sequence[str]) -> None:
    """Raises UserError if `preset=` names none; Hydra would complain of a recipe that depends on it."""
    known = presets()
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "preset" and not set(value.split(",")) <= set(known):
            raise UserError(f"preset={value}: no such preset; choose from {', '.join(known)}")


def presets() -> list[str]:
    """Names of the presets."""
    return sorted(file.stem for file in (CONFIG_DIR / "preset").glob("*.yaml"))


def compose_preset(name: str, *settings: str) -> DictConfig:
    """A preset's sections, every network at random weights: for its sizes, without anything downloaded."""
    random = [f"++{section}.pretrained=null" for section in ("text.clip", "text.t5", "gfdm", "gidm.dino")]
    started = GlobalHydra.instance().is_initialized()  # inside a command
    with nullcontext() if started else hydra.initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = hydra.compose(overrides=[f"+preset={name}", *random, *settings])
    OmegaConf.resolve(cfg)
    return cfg


def typed(cls: type[Settings], values: Mapping[str, Any], where: str) -> Settings:
    """Settings from YAML or JSON as the (nested) dataclass `cls`; `where` names the section in errors.

    Raises UserError for a key the dataclass does not have and for a value of another type.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{where}.{error.full_key}: {reason}; see {cls.__name__} in {cls.__module__}"
        ) from error
