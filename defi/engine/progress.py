"""What a person at the terminal sees while a run is going: a bar, or occasional lines in a log."""

import time
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class ProgressDisplay:
    """A bar on a terminal, a line now and then in a log file or pipe; silent where `enabled` is false."""

    def __init__(self, title: str, total: int, done: int, *, enabled: bool) -> None:
        self.title, self.total, self.enabled = title, total, enabled
        self.console = Console(highlight=False, soft_wrap=True)
        self._started, self._first, self._last_line = time.monotonic(), done, 0.0
        self._bar: Progress | None = None
        if enabled and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=12),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self.console,
                refresh_per_second=2,
            )
            self._task = self._bar.add_task(title, total=total, completed=done, numbers="")
            self._bar.start()

    def update(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show the averages of the latest steps."""
        text = f"loss {numbers['loss']:.4g}  {numbers['samples_per_s']:.4g} samples/s"
        text += f"  data wait {numbers['data_wait']:.0%}"
        self.show(step, text)

    def show(self, step: int, text: str) -> None:
        """Move the bar to `step`, with `text` beside it."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=text)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES or step == self.total:
            self._last_line = now
            left = (now - self._started) / max(step - self._first, 1) * (self.total - step)
            self.say(f"{self.title} {step}/{self.total}  {text}  {timedelta(seconds=round(left))} left")

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.enabled:
            self.console.print(text, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
