"""How a server fares, as Prometheus reads it."""

from collections import Counter, deque
from collections.abc import Iterator

import numpy as np

RECENT = 1000  # requests that the quantiles are of
COUNTED = {
    "requests": "Messages that were answered.",
    "errors": "Messages that were refused, or could not be answered.",
    "actions_clipped": "Numbers of actions that were clipped to the range of the training data.",
    "actions_refused": "Chunks that were not sent, for numbers that are not finite or beyond that range.",
}


class Seconds:
    """Durations: sum and number of all, quantiles of the recent ones."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.total, self.count = 0.0, 0

    def add(self, seconds: float) -> None:
        self.recent.append(seconds)
        self.total, self.count = self.total + seconds, self.count + 1

    def lines(self, name: str) -> Iterator[str]:
        for quantile in (0.5, 0.99) if self.recent else ():
            yield f'{name}{{quantile="{quantile}"}} {np.quantile(self.recent, quantile):.6f}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {self.count}"


class Metrics:
    """What was counted and timed since the start."""

    def __init__(self) -> None:
        self.counts = Counter(dict.fromkeys(COUNTED, 0))
        self.batches: Counter[int] = Counter()  # by their number of questions
        self.request, self.inference = Seconds(), Seconds()
        self.clients = 0

    def text(self) -> str:
        """Prometheus' text format, version 0.0.4."""
        lines = []
        for name, about in COUNTED.items():
            lines += [f"# HELP defi_{name}_total {about}", f"# TYPE defi_{name}_total counter"]
            lines += [f"defi_{name}_total {self.counts[name]}"]
        lines += ["# HELP defi_clients Connections now.", "# TYPE defi_clients gauge"]
        lines += [f"defi_clients {self.clients}"]
        lines += ["# HELP defi_batches_total Calls of the policy, by the observations that they answered."]
        lines += ["# TYPE defi_batches_total counter"]
        lines += [
            f'defi_batches_total{{size="{size}"}} {self.batches[size]}' for size in sorted(self.batches)
        ]
        for name, about, seconds in (
            ("defi_request_seconds", "From a message to its answer.", self.request),
            ("defi_inference_seconds", "A call of the policy.", self.inference),
        ):
            lines += [f"# HELP {name} {about}", f"# TYPE {name} summary", *seconds.lines(name)]
        return "\n".join(lines) + "\n"
