"""A world that keeps account of where its process spends its time."""

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from defi.sim.world import World

EVERY = 0.2  # seconds of the clock: a simulator process is killed when its last chain has ended


class TimedWorld(World):
    """Writes seconds of physics, rendering, judging, loading to `<folder>/<process>.json`, now and then."""

    def __init__(self, folder: Path, *args: Any, **options: Any) -> None:
        self._folder, self._written, self.seconds = folder, 0.0, Counter()
        super().__init__(*args, **options)

    def _timed(self, what: str, function: Any, *args: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args)
        finally:
            self.seconds[what] += time.process_time() - start
            if time.monotonic() > self._written + EVERY:
                part = self._folder / f"{os.getpid()}.part"
                part.write_text(json.dumps(self.seconds))
                part.replace(part.with_suffix(".json"))  # whole, whenever the process is killed
                self._written = time.monotonic()

    def reload(self) -> None:
        self._timed("loading", super().reload)

    def step(self, action: Any) -> None:
        self._timed("physics", super().step, action)

    def state(self) -> Any:
        return self._timed("judging", super().state)

    def render(self) -> Any:
        return self._timed("rendering", super().render)
