"""The pages: built strictly, their links and the settings in their commands exist."""

import logging
import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_pages_are_built_without_a_warning(tmp_path: Path) -> None:
    """What `mkdocs build --strict` does: a link or anchor that is missing is an error."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    except Abort:
        pytest.fail("; ".join(warnings))
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    assert not warnings and (tmp_path / "deviations" / "index.html").is_file()


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.name)
def test_links_outside_the_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        assert (ROOT / file).exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_files_exist(page: Path) -> None:
    text = page.read_text()
    for module in set(re.findall(r"python -m ((?:defi|benchmarks|experiments|Step\d_\w+)[\w.]*\w)", text)):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module
    for file in set(
        re.findall(r"(?<![\w/])((?:scripts|tests|configs|defi|Step\d_\w+)/[\w./*]+\w)(?![<\w])", text)
    ):
        assert list(ROOT.glob(file)), file
