"""Which benchmarks there are: this project's, those of installed packages, and any class by its name.

A package registers its own by an entry point of the group `defi.benchmarks`, name → `package.module:Class`.
"""

import importlib
from collections.abc import Iterable
from importlib.metadata import entry_points

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from defi.benchmarks.benchmark import Benchmark
from defi.config import CONFIG_DIR
from defi.errors import UserError, one_line

KNOWN = {
    "table": "defi.benchmarks.calvin.benchmark:Calvin",
    "calvin": "defi.benchmarks.calvin.benchmark:Calvin",
    "gym": "defi.benchmarks.gym:Gym",
    "simpler_widowx": "defi.benchmarks.simpler.benchmark:WidowX",
    "simpler_google": "defi.benchmarks.simpler.benchmark:Google",
}
GROUP = "defi.benchmarks"
FIRST = KNOWN["table"]  # of results that do not say which


def find_benchmark(name: str) -> type[Benchmark]:
    """The class of a benchmark: a registered name, or package.module:Class.

    Raises:
        UserError: there is none of that name, or it cannot be imported.
    """
    registered = {point.name: point.value for point in entry_points(group=GROUP)} | KNOWN
    place = registered.get(name, name)
    module, found, cls = place.partition(":")
    if not found:
        raise UserError(f"benchmark={name}: none of {', '.join(sorted(registered))}, or package.module:Class")
    try:
        benchmark = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError) as error:
        raise UserError(f"benchmark={name}: cannot be imported ({one_line(error)})") from error
    if not (isinstance(benchmark, type) and issubclass(benchmark, Benchmark)):
        raise UserError(f"benchmark={name}: is no subclass of {Benchmark.__module__}.Benchmark")
    if "__dataclass_fields__" not in vars(benchmark):
        raise UserError(
            f"benchmark={name}: is no dataclass, so it has no settings; write @dataclass before it"
        )
    return benchmark


def offer(arguments: Iterable[str]) -> None:
    """Make `benchmark=<name>` of a command line a choice that Hydra knows, with the class's own defaults.

    Those of configs/benchmark are choices already.
    """
    for argument in arguments:
        key, _, name = argument.partition("=")
        ready = (CONFIG_DIR / "benchmark" / f"{name}.yaml").is_file()
        if key.partition("@")[0] == "benchmark" and not ready:
            try:
                settings = OmegaConf.to_container(OmegaConf.structured(find_benchmark(name)))
            except OmegaConfBaseException as error:
                raise UserError(f"benchmark={name}: its settings: {one_line(error)}") from error
            node = settings | {"benchmark": name}
            ConfigStore.instance().store(name, node, "benchmark", package="_global_")
