"""Fetch from the Hugging Face hub what a preset starts from, into ckpts/.

    python -m defi.download preset=paper

Files that are there in full stay, others are resumed. Without network it says what to put where by hand.
Settings, and the repositories: configs/download.yaml.
"""

import fnmatch
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from defi.config import entry, typed
from defi.errors import UserError, one_line

PRETRAINED = ("gfdm", "text.clip", "text.t5", "gidm.dino")  # sections of a preset that name a folder
PAGE = "https://huggingface.co"


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
        return f"{PAGE}/{self.repo}"


@dataclass
class File:
    """One file of a source. size: in bytes on the hub; None while the hub is unknown."""

    source: Source
    name: str
    size: int | None = None

    @property
    def path(self) -> Path:
        return Path(self.source.folder) / self.name

    @property
    def present(self) -> int | None:
        """Bytes on the disk; None where there is no file."""
        return self.path.stat().st_size if self.path.is_file() else None

    @property
    def complete(self) -> bool:
        """Whether nothing needs to be done; without the hub's size any file counts."""
        return self.present is not None and self.size in (None, self.present)

    @property
    def state(self) -> str:
        if self.complete:
            return "there"
        return "missing" if self.present is None else f"wrong size ({megabytes(self.present)})"


class Unreachable(Exception):
    """The hub does not answer."""


def needed(cfg: DictConfig) -> dict[str, Source]:
    """The sources that a preset needs, or those named by `only`.

    Raises:
        UserError: `only` names none, or the preset needs nothing.
    """
    sources = {name: typed(Source, values, f"sources.{name}") for name, values in cfg.sources.items()}
    if cfg.only is not None:
        for name in cfg.only:
            if name not in sources:
                raise UserError(f"only={name}: no such source; choose from {', '.join(sources)}")
        return {name: sources[name] for name in cfg.only}
    folders = {OmegaConf.select(cfg, f"{section}.pretrained") for section in PRETRAINED}
    chosen = {name: source for name, source in sources.items() if source.folder in folders}
    if not chosen:
        raise UserError(f"preset={cfg.preset_name}: needs no download; train it as it is")
    return chosen


def on_the_hub(source: Source) -> list[File]:
    """The source's files with their sizes.

    Raises:
        Unreachable: no network.
        UserError: the repository is gone, wants a login, or lacks a file.
    """
    try:
        info = HfApi().model_info(source.repo, files_metadata=True)
    except GatedRepoError:
        raise UserError(
            f"{source.page}: accept its licence there, then log in with `hf auth login` (or set HF_TOKEN)"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"{source.page}: not found, or private; log in with `hf auth login`") from None
    except HfHubHTTPError as error:
        raise UserError(f"{source.page}: {one_line(error)}; try again later") from None
    except Exception as error:  # each version of the hub's client has its own errors of the network
        raise Unreachable(one_line(error)) from error
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings}
    return [file for entry in source.files for file in _found(source, entry, sizes)]


def _found(source: Source, entry: str, sizes: dict[str, int]) -> list[File]:
    for choice in entry.split("|"):
        if names := sorted(fnmatch.filter(sizes, choice)):
            for name in names:
                if ".." in Path(name).parts or Path(name).is_absolute():
                    raise UserError(
                        f"{source.page}: a file there is called {name!r}, outside {source.folder}"
                    )
            return [File(source, name, sizes[name]) for name in names]
    raise UserError(f"{source.page}: has no {entry}; change sources in configs/download.yaml")


def on_the_disk(source: Source) -> list[File]:
    """The source's files as far as they can be known without the hub."""
    folder = Path(source.folder)
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.as_posix() for path in paths if path.parts[0] != ".cache"]  # the hub client's own
    files = []
    for wanted in source.files:
        choices = wanted.split("|")
        found = next(filter(None, (fnmatch.filter(names, choice) for choice in choices)), choices[:1])
        files += [File(source, name) for name in found]
    return files


def fetch(file: File) -> None:
    """Download one file, going on where an earlier download stopped.

    Raises:
        UserError: the connection broke, or the file is not what the hub announced.
    """
    try:
        hf_hub_download(file.source.repo, file.name, local_dir=file.source.folder)
    except GatedRepoError:
        raise UserError(
            f"{file.source.page}: accept its licence there, then log in with `hf auth login`"
        ) from None
    except Exception as error:  # as above
        raise UserError(
            f"{file.path}: download stopped ({one_line(error)}); repeat the command to go on"
        ) from None
    if not file.complete:
        raise UserError(
            f"{file.path}: {file.state} after the download, expected {megabytes(file.size)}; delete it"
        )


def megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.1f} MB"


def table(files: list[File]) -> Table:
    """Every file below its repository: its size on the hub, and whether it is there."""
    view = Table(box=None, pad_edge=False)
    for column in ("file", "size", ""):
        view.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    page = None
    for file in files:
        if file.source.page != page:
            page = file.source.page
            view.add_row(f"[bold]{page}[/]")
        size = megabytes(file.size if file.size is not None else file.present)
        view.add_row(f"  {file.path}", size, file.state)
    return view


@entry("download")
def main(cfg: DictConfig) -> None:
    sources, console = needed(cfg).values(), Console(highlight=False)
    for source in sources:
        if source.note:
            print(f"note: {source.page}: {source.note}")
    try:
        files = [file for source in sources for file in on_the_hub(source)]
    except Unreachable as error:
        files = [file for source in sources for file in on_the_disk(source)]
        console.print(table(files))
        if all(file.complete for file in files):
            print(f"the hub cannot be reached ({error}); every file is there, their sizes were not compared")
            return
        raise UserError(
            f"the hub cannot be reached ({error}); from a machine with network, fetch the missing "
            "files above from the pages named and put them there"
        ) from None
    console.print(table(files))
    todo = [file for file in files if not file.complete]
    there, rest = len(files) - len(todo), megabytes(sum(file.size for file in todo))
    print(f"{there} of {len(files)} files are there, {rest} to fetch")
    for file in todo:
        fetch(file)
    print(f"complete: {', '.join(source.folder for source in sources)}")


if __name__ == "__main__":
    main()
