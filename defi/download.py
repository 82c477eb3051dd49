"""Fetch from the Hugging Face hub what a preset starts from, into ckpts/.

    python -m defi.download preset=paper

Complete files stay, broken connections are resumed. Without network it says what to put where by hand.
Settings, and the repositories: configs/download.yaml.
"""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from omegaconf import DictConfig, OmegaConf

from defi.config import entry, typed
from defi.errors import UserError, one_line

PRETRAINED = ("gfdm", "text.clip", "text.t5", "gidm.dino")  # sections of a preset that name a folder


@dataclass
class Source:
    """A repository of the hub, and where its files belong. files: see configs/download.yaml.

    note: what whoever fetches it should know.
    """

    repo: str
    folder: str
    files: list[str]
    note: str = ""

    @property
    def page(self) -> str:
        return f"https://huggingface.co/{self.repo}"

    def select(self, names: Iterable[str]) -> tuple[list[str], list[str]]:
        """Which of some file names are wanted, and the patterns that none of them has."""
        found, missing = [], []
        for choices in self.files:
            matches = (sorted(fnmatch.filter(names, choice)) for choice in choices.split("|"))
            first = next(filter(None, matches), [])
            found += first
            missing += [] if first else [choices]
        return found, missing


def needed(cfg: DictConfig) -> dict[str, Source]:
    """The sources that a preset needs, or those named by `only`."""
    sources = {name: typed(Source, values, f"sources.{name}") for name, values in cfg.sources.items()}
    if unknown := [name for name in cfg.only or () if name not in sources]:
        raise UserError(f"only={unknown[0]}: no such source; choose from {', '.join(sources)}")
    if cfg.only is not None:
        return {name: sources[name] for name in cfg.only}
    folders = {OmegaConf.select(cfg, f"{section}.pretrained") for section in PRETRAINED}
    chosen = {name: source for name, source in sources.items() if source.folder in folders}
    if not chosen:
        raise UserError(f"preset={cfg.preset_name}: needs no download; train it as it is")
    return chosen


def fetch(source: Source) -> None:
    """Download the files that are not there yet."""
    hub, folder = HfApi(), Path(source.folder)
    try:
        siblings = hub.model_info(source.repo, files_metadata=True).siblings
        sizes = {each.rfilename: each.size for each in siblings}
        found, missing = source.select(sizes)
        if missing:
            raise UserError(f"{source.page}: has no {missing[0]}; change sources in configs/download.yaml")
        for name in found:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{source.page}: a file there is called {name!r}, outside {folder}")
        hub.snapshot_download(source.repo, local_dir=folder, allow_patterns=found)
        for name in found:  # the client does not see a change of the same second
            if (folder / name).stat().st_size != sizes[name]:
                raise UserError(f"{folder / name}: has another size than on the hub; delete it, then repeat")
        print(f"{folder}: complete, {len(found)} files")
    except UserError:
        raise
    except (GatedRepoError, RepositoryNotFoundError):
        raise UserError(
            f"{source.page}: not found, private, or its licence is not accepted; accept it there, then log "
            "in with `hf auth login` (or set HF_TOKEN)"
        ) from None
    except Exception as error:  # each version of the hub's client has its own errors of the network
        here = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        _, missing = source.select([name for name in here if not name.startswith(".cache/")])
        if missing:
            raise UserError(
                f"{folder}: download stopped ({one_line(error)}), missing: {', '.join(missing)}; repeat the "
                f"command to resume, or fetch these from {source.page} elsewhere and put them there"
            ) from None
        print(f"{folder}: every file is there; their sizes were not compared ({one_line(error)})")


@entry("download")
def main(cfg: DictConfig) -> None:
    for source in needed(cfg).values():
        if source.note:
            print(f"note: {source.page}: {source.note}")
        fetch(source)


if __name__ == "__main__":
    main()
