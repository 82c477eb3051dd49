"""The official SIMPLER, for benchmarks/simpler.py: started by it, with a Python that imports simpler_env.

Arguments: control steps, task. Prints seconds of the processor for a reset and a step, and MB of memory.
"""

import json
import resource
import sys
import time

import numpy as np
import simpler_env


def main() -> None:
    steps, task = int(sys.argv[1]), sys.argv[2]
    environment = simpler_env.make(task)
    environment.reset(seed=0)
    environment.step(np.zeros(7))
    random = np.random.default_rng(0)
    began = time.process_time()
    environment.reset(seed=1)
    reset = time.process_time() - began
    began = time.process_time()
    for _ in range(steps):
        environment.step(np.append(random.uniform(-0.01, 0.01, 6), 1.0))
    step = (time.process_time() - began) / steps
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"reset": reset, "step": step, "memory": memory}))


if __name__ == "__main__":
    main()
