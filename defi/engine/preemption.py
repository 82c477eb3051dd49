"""Leaving in good order when a cluster asks for the machine back, or a person presses Ctrl-C."""

import os
import signal
import sys
import threading
from types import FrameType

import torch
from accelerate import Accelerator

EXIT_PREEMPTED = 75  # "temporary failure, try again": start the same command with resume=true
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption:
    """Remembers that one of `SIGNALS` came; a second one has its usual effect."""

    def __init__(self) -> None:
        self.noticed = False
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._notice) for number in SIGNALS}

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.noticed = True
        self.close()
        if os.environ.get("RANK", "0") == "0":  # one of the processes
            name = signal.Signals(number).name
            print(
                f"{name}: saves and leaves after the present step; once more: ends at once", file=sys.stderr
            )

    def requested(self, accelerator: Accelerator) -> bool:
        """Whether a signal came to any process; every process must ask at the same step."""
        if accelerator.num_processes == 1:
            return self.noticed
        flag = torch.tensor(float(self.noticed), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum") > 0)

    def close(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
