"""Entry points: Hydra configuration from `configs/`, one clear line for a user's mistake."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from defi.errors import UserError

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"


def entry(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Decorator: make `main(cfg)` a command that reads `configs/<config_name>.yaml` and `key=value` overrides.

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
