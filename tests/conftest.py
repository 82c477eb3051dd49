"""Fixtures shared by all tests."""

import os
import tempfile
from pathlib import Path

import pytest

# Indices of data go here: not into the recorded data, nor between runs.
INDICES = tempfile.TemporaryDirectory(prefix="defi_index_")
os.environ["DEFI_INDEX"] = INDICES.name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


# Files that take longest, in order: begun first, so that no processor waits for the last of them.
LONGEST = ("scripts", "experiments", "evaluation", "collect", "rollout_policy", "processes")
LONGEST += ("step2_commands", "sharding", "simpler_physics")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes: give --slow"))


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of recorded data: `DEFI_REFERENCE_DIR`, or `../shared/reference` beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "reference"
    folder = Path(os.environ.get("DEFI_REFERENCE_DIR", default))
    if not folder.is_dir():
        pytest.skip(f"no recorded data at {folder}: set DEFI_REFERENCE_DIR")
    return folder
