"""LeRobot's formats: against what LeRobot itself reads, and data sets made by `defi.data.convert`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from defi.data import Dataset, open_dataset
from defi.data.convert import write_calvin, write_lerobot
from defi.errors import UserError
from defi.npy import load_npy
from tests.preparations import write_calvin_split  # noqa: F401 -- adapted below

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")
