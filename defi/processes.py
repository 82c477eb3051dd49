"""The processes of `accelerate launch`, for work that they share without training."""

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

LONGEST = timedelta(days=7)  # that one process may wait for the others


def processes() -> PartialState:
    """This process among them: its number, how many there are, its device. Without a GPU they run on CPUs."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return PartialState(cpu=cpu, timeout=LONGEST)
