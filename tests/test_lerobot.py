"""LeRobot's formats: against what LeRobot itself reads, and data sets made by `defi.data.convert`."""

import pytest

from tests.preparations import write_calvin_split  # noqa: F401 -- adapted below

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")
