"""Captioned video of any kind, for `Step1_GFDM.prepare`.

A source is a module here with a class `Source` (see `recordings.CaptionedSource`) and a file
configs/data/captioned_<name>.yaml with its settings: `data.source=<name>` finds it by its name.
"""

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from defi.config import typed
from defi.errors import UserError
from Step1_GFDM.sources.recordings import CaptionedSource

SOURCES = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "recordings")


def read_source(data: Mapping[str, Any]) -> CaptionedSource:
    """From the `data` section. Raises UserError for an unknown source, or a value that cannot be."""
    if data["source"] not in SOURCES:
        raise UserError(f"data.source={data['source']}: choose from {', '.join(SOURCES)}")
    return typed(import_module(f"{__name__}.{data['source']}").Source, data, "data")
