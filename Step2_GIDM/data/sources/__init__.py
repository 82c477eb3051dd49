"""Data sets that pairs are made from: `data.source=videos` is the module `videos` here.

To add one takes two files: a module here with a `Settings(PairsSettings)` that opens a `Source`, and its
defaults, configs/data/pairs_<module>.yaml.
"""

from importlib import import_module
from pkgutil import iter_modules

NAMES = [module.name for module in iter_modules(__path__)]
SOURCES = {name: import_module(f"{__name__}.{name}").Settings for name in NAMES}
