"""The processes of `accelerate launch`, for work that they share without training."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

Task = TypeVar("Task")

LONGEST = timedelta(days=7)  # that one process may wait for the others


def processes() -> PartialState:
    """This process among them: its number, how many there are, its device. Without a GPU they run on CPUs."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return PartialState(cpu=cpu, timeout=LONGEST)


def print_once(line: str) -> None:
    """Print a line once for all processes, unless it is empty; does not make them join each other."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else os.environ.get("RANK", 0)
    if line and int(rank) == 0:
        print(line)


def share(tasks: Sequence[Task]) -> list[Task]:
    """This process's part of tasks that are the same list in all processes.

    Returns when every process has its list: what one of them finishes from here on is not missing from the
    list of another that still looks for what is left.
    """
    state = processes()
    state.wait_for_everyone()
    return list(tasks[state.process_index :: state.num_processes])
