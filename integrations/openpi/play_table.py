"""openpi's client drives the built-in table: `play_table.py [ws://host:port] [chains=6] [tasks=[…]] …`.

    python -m Step3_DeFI.serve checkpoint=ckpts/policy serve.keys=calvin
    pip install --no-deps openpi-client==0.1.2 && python integrations/openpi/play_table.py ws://127.0.0.1:8000

Chains, judge, limits and seeds are those of `python -m Step3_DeFI.rollout` with the same settings
(configs/benchmark/table.yaml, and seed), so the same tasks are solved in the same steps.
"""

import sys

from omegaconf import OmegaConf
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from defi.engine.data import seed_of
from Step3_DeFI.rollout.config import RolloutConfig, read_settings
from Step3_DeFI.rollout.evaluate import Evaluation
from Step3_DeFI.rollout.simulator import run_episode


def main(address: str = "ws://127.0.0.1:8000", *settings: str) -> None:
    given = OmegaConf.from_dotlist(["benchmark=table", *settings])
    benchmark, config = read_settings(RolloutConfig, given, "play_table")
    client = WebsocketClientPolicy(address, port=None)
    executed = config.chunk or client.get_server_metadata()["executed"]

    def act(environment, seed):
        seen = environment.observe()
        pictures = {f"rgb_{camera}": picture for camera, picture in seen["images"].items()}
        message = {"rgb_obs": pictures, "robot_obs": seen["state"], "prompt": seen["instruction"]}
        return client.infer(message | {"seed": seed_of("rollout", *seed)})["actions"][:executed]

    table = Evaluation.prepare(benchmark, config)
    environment = table.simulation.make()
    for chain in table.episodes:
        (result,) = run_episode(environment, act, chain, table.setup("policy"))
        steps = result.outcome["steps"]
        solved = sum(taken is not None for taken in steps)
        print(f"chain {chain.index}: {solved} of {len(chain.tasks)} solved, in steps {steps}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
