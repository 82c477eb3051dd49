"""Stopping cleanly when a cluster asks for the machine back, or a person presses Ctrl-C."""

import os
import signal
import sys
import threading
from types import FrameType

from accelerate import Accelerator

from defi.engine.distributed import in_any_process

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
            print(
                f"{signal.Signals(number).name} received: saving after this step, then exiting. "
                "Send again to exit immediately.",
                file=sys.stderr,
            )

    def requested(self, accelerator: Accelerator) -> bool:
        """Whether a signal came to any process; every process must ask at the same step."""
        return in_any_process(self.noticed, accelerator)

    def close(self) -> None:
        """Give the signals back to their previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
