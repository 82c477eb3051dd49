"""A world that keeps account of where its process spends its time."""

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from defi.sim.world import World


class TimedWorld(World):
    """Writes seconds of physics, rendering and judging to `<folder>/<process>.json` at each reset."""

    def __init__(self, folder: Path, *args: Any, **options: Any) -> None:
        self._folder, self.seconds = folder, Counter()
        super().__init__(*args, **options)

    def _timed(self, what: str, function: Any, *args: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args)
        finally:
            self.seconds[what] += time.process_time() - start

    def reload(self) -> None:
        self._timed("loading", super().reload)

    def reset(self, *args: Any) -> None:
        super().reset(*args)
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / f"{os.getpid()}.json").write_text(json.dumps(self.seconds))

    def step(self, action: Any) -> None:
        self._timed("physics", super().step, action)

    def state(self) -> Any:
        return self._timed("judging", super().state)

    def render(self) -> Any:
        return self._timed("rendering", super().render)
