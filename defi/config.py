"""Entry points: Hydra configuration from `configs/`, one clear line for a user's mistake."""

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import hydra
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
        @hydra.main(version_base=None, config_path=str(CONFIG_DIR), config_name=config_name)
        @functools.wraps(main)
        def run(cfg: DictConfig) -> None:
            try:
                OmegaConf.resolve(cfg)
                main(cfg)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(2)

        return run

    return decorate


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
