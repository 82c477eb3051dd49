"""Stopping cleanly when a cluster asks for the machine back, or a person presses Ctrl-C."""

import os
import signal
import sys
import threading
from types import FrameType

EXIT_PREEMPTED = 75  # "temporary failure, try again": start the same command with resume=true
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption:
    """Remembers that one of `SIGNALS` was received; a second one has its usual effect."""

    def __init__(self) -> None:
        self.received = False
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self.close()
        if os.environ.get("RANK", "0") == "0":  # one of the processes
            print(
                f"{signal.Signals(number).name} received: saving after this step, then exiting. "
                "Send again to exit immediately.",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Give the signals back to their previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
