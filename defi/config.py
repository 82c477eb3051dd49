"""Entry points: Hydra configuration from `configs/`, one clear line for a user's mistake."""

import difflib
import functools
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import CompactHydraException, MissingConfigException, OverrideParseException
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from defi.errors import Fault, UserError, one_line

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"

# Settings that are texts, whatever they look like.
TEXTS = {"instruction", "data.instruction", "output", "data.root", "data.store", "path", "source"}
TEXTS |= {"checkpoint", "gfdm_checkpoint", "gidm_checkpoint", "first_stage", "vae", "tokenizer"}
TEXTS |= {"push", "data.split", "data.held_out"}
# What Hydra says of a text that it takes for several values of a sweep.
SEVERAL = re.compile(r"(?:Ambiguous value for argument|Sweep parameters) '(.*)'")
# Of a choice that is left open, `data: ???`.
OPEN = re.compile(r"(?s)You must specify '(\S+)',.*options:(.*)")
REFERENCE = re.compile(r"\$\{[^'\"]*")  # OmegaConf's; those of configurations are resolved by Hydra
Settings = TypeVar("Settings")

RETIRED = {  # settings that there were once, and what to do instead
    "policy.action_head.action_positions": "positions come with policy.action_head.cross_attention=full",
    "trainer.sample_every": "write trainer.preview_every",
    "data.video_stride": "frames are as far apart as the video model's (gfdm.frame_step); leave this out",
    "data.shown": "write shown=",
    "data.tail": "use data.min_remaining instead",
    "data.image": "use data.cameras=[…]",
    "data.language": "of CALVIN write data.spans=annotated or recordings",
    "data.source": "use data.format, as data=… gives it",
    **dict.fromkeys(("data.splits", "data.splits.train", "data.splits.val"), "use data.split, data.held_out"),
    "data.text": "use data.language",
    "data.cameras.static": "name cameras as data.cameras=[…], shares of the VAE's clips as data.shares=[…]",
    **dict.fromkeys(("data=frames", "data=samples"), "write data=calvin, or another format"),
    "data=pairs_mixture": "write data=mixture",
    "data=captioned_videos": "write data=videos data.captions=<file>",
    **{f"data=captioned_{name}": f"write data={name}" for name in ("calvin", "hdf5", "rlds", "vpp")},
    **{f"data=pairs_{name}": f"write data={name}" for name in ("calvin", "rlds", "videos")},
    "demos_per_unit": "use demos_per_session instead",
    **dict.fromkeys(("policy.views", "policy.action_dim"), "the data say (policy.robot); leave this out"),
    **dict.fromkeys(
        (f"policy.{size}" for size in ("frames", "feature_tokens", "feature_channels", "sentence_width")),
        "it is read from the stage-1 checkpoint; leave this out",
    ),
    "policy.latent_action": "its sizes are read from the stage-2 checkpoint; leave this out",
    "store.video_stride": "replaced by store.videos=true; frames are as far apart as the video model's",
}


def entry(
    config_name: str, before: Callable[[Sequence[str]], None] = lambda _: None
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Decorator: make `main(cfg)` a command that reads `configs/<config_name>.yaml` and `key=value` settings.

    `before` sees the settings as they were written, before anything is read. The command's attribute
    `config_name` is the file's.

    A `UserError` or a setting that does not exist ends the command with one line on stderr and exit code 2,
    Ctrl-C with 130; anything else is a bug and keeps its traceback.
    """

    def decorate(main: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @hydra.main(version_base=None, config_path=str(CONFIG_DIR), config_name=config_name)
        @one_line_errors()  # before Hydra adds lines of its own
        @functools.wraps(main)
        def command(cfg: DictConfig) -> None:
            check_settings(cfg, sys.argv[1:])
            main(cfg)

        @one_line_errors()
        @functools.wraps(main)
        def run() -> None:
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors are raised, not printed by Hydra
            if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may not be UTF-8
                sys.stdout.reconfigure(errors="backslashreplace")
            before(sys.argv[1:])
            try:
                command()
            except CompactHydraException as error:
                if OPEN.match(str(error)) and {"--help", "-h"} & set(sys.argv):  # Hydra cannot help yet
                    print((CONFIG_DIR / f"{config_name}.yaml").read_text())
                    return
                raise UserError(explain(error)) from None

        vars(run)["config_name"] = config_name
        return run

    return decorate


@contextmanager
def one_line_errors() -> Iterator[None]:
    """A user's mistake ends the program with one line on stderr and exit code 2, Ctrl-C with 130, a fault in
    a user's own code with that one's traceback and 1."""
    try:
        yield
    except Fault as error:
        print(error.trace, f"error: {error.what}", sep="", file=sys.stderr)
        sys.exit(1)
    except UserError as error:
        print("error:", *str(error).splitlines(), file=sys.stderr)  # what it quotes may have several
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def explain(error: CompactHydraException) -> str:
    """What Hydra has against a command line, in one line, with the names that come close."""
    if isinstance(error, MissingConfigException) and error.options:
        choice = error.missing_cfg_file.replace("/", "=")
        if choice in RETIRED:
            return f"{choice}: no longer a choice; {RETIRED[choice]}"
        return f"{choice}: no such choice; choose from {', '.join(error.options)}"
    if choice := OPEN.match(str(error)):
        options = ", ".join(choice[2].split())
        return f"{choice[1]}=: not given; choose from {options}; --help prints all settings"
    several = SEVERAL.match(str(error))
    if several or isinstance(error, OverrideParseException):
        setting = several[1] if several else error.override
        key, given, value = setting.partition("=")
        if not given:
            return f"{setting}: not a setting; write key=value"
        if value.startswith("~/"):
            return f"{setting}: the shell leaves this ~ as it is; write {key}=$HOME{value[1:]}"
        what = "close its brackets, or quote a text with accents, brackets, commas or signs"
        return f"{setting}: cannot be read; {what}: {quoted(key, value)}"
    cause = error.__cause__
    if not isinstance(cause, (ConfigKeyError, ConfigAttributeError)) or cause.parent_node is None:
        return one_line(error)
    if cause.full_key in RETIRED:
        return f"{cause.full_key}=: no longer a setting; {RETIRED[cause.full_key]}"
    section = cause.full_key.rpartition(".")[0]
    known = sorted(str(key) for key in cause.parent_node if key != "hydra")
    close = difflib.get_close_matches(str(cause.key), known)
    names = " ".join(f"{section}.{key}=".lstrip(".") for key in close or known)
    ask = f"did you mean {names}?" if close else f"there are {names};"
    return f"{cause.full_key}=: no such setting; {ask} --cfg job prints all"


def quoted(key: str, text: str) -> str:
    """The setting as the shell takes it, with the quotes that Hydra wants around a text."""
    # Backslashes are doubled where a quote follows, and only there.
    inner = re.sub(r'(\\*)("|\Z)', lambda found: 2 * found[1] + ('\\"' if found[2] else ""), text)
    return shlex.quote('{}="{}"'.format(key, inner.replace("${", r"\${")))


def check_settings(cfg: DictConfig, arguments: Sequence[str]) -> None:
    """Resolve a composed configuration; `arguments` of the command line are as they were written.

    Raises:
        UserError: a setting without default (`???`) was not given, an interpolation leads nowhere, a place or
            an instruction was read as a list, a dict or a number, or `overwrite=true` would delete something
            that the same command reads.
    """
    unresolved = flatten(OmegaConf.to_container(cfg)).items()
    if missing := sorted(key for key, value in unresolved if value == MISSING):
        needed = ", ".join(f"{key}=" for key in missing)
        raise UserError(f"{missing[0]}=: not given; this command needs {needed}")
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise UserError(f"{one_line(error)}; a text with ${{ is written with \\${{") from None
    written = dict(argument.lstrip("+").partition("=")[::2] for argument in arguments)
    for key, value in written.items():
        read = OmegaConf.select(cfg, key, default=None) if key in TEXTS else None
        if not isinstance(read, str | None):
            kind = {ListConfig: "list", DictConfig: "dict"}.get(type(read), type(read).__name__)
            raise UserError(f"{key}={value}: is read as {kind}; quote a text: {quoted(key, value)}")
    if cfg.get("overwrite"):
        output = Path(cfg.output).resolve()
        for key, value in flatten(OmegaConf.to_container(cfg)).items():
            text = isinstance(value, str) and value and key != "output"
            if text and Path(value).resolve().is_relative_to(output):
                lost = f"overwrite=true would delete {key}={value}, which is in it"
                raise UserError(f"output={cfg.output}: {lost}; choose another output=")


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def presets() -> list[str]:
    """Names of the presets."""
    return sorted(file.stem for file in (CONFIG_DIR / "preset").glob("*.yaml"))


def compose(config_name: str | None, *settings: str) -> DictConfig:
    """What a command with these settings reads, resolved; of no command, the settings alone."""
    started = GlobalHydra.instance().is_initialized()  # inside a command
    with nullcontext() if started else hydra.initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = hydra.compose(config_name, overrides=list(settings))
    OmegaConf.resolve(cfg)
    return cfg


def compose_preset(name: str, *settings: str) -> DictConfig:
    """A preset's sections, every network at random weights: for its sizes, without anything downloaded."""
    random = [f"++{section}.pretrained=null" for section in ("text.clip", "text.t5", "gfdm", "gidm.dino")]
    return compose(None, f"+preset={name}", *random, *settings)


def typed(cls: type[Settings], values: Mapping[str, Any], where: str) -> Settings:
    """Settings from YAML or JSON as the (nested) dataclass `cls`; `where` names the section in errors.

    Raises:
        UserError: a key the dataclass does not have, a value of another type, or one that refers to something
            else, an environment variable say: files of others may not read these.
    """
    if isinstance(values, dict) and (reference := REFERENCE.search(str(values))):
        raise UserError(f"{where}: {reference[0]} refers to something outside; write the value itself")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
    except OmegaConfBaseException as error:
        reason, key = str(error).splitlines()[0].rstrip("."), f"{where}.{error.full_key}".rstrip(".")
        if "is not a ListConfig" in reason:
            reason = "must be a list"
        fault = f"{reason}; see {cls.__name__} in {cls.__module__}"
        if key in RETIRED:
            fault = f"no longer a setting; {RETIRED[key]}"
        given = flatten(values).get(error.full_key)
        raise UserError(key + ("" if given is None else f"={given}") + f": {fault}") from error
