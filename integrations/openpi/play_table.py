"""openpi's client drives the built-in table: `play_table.py [ws://host:port] [chains=6] [tasks=[…]] …`.

    python -m Step3_DeFI.serve checkpoint=ckpts/policy serve.keys=calvin
    pip install --no-deps openpi-client==0.1.2 && python integrations/openpi/play_table.py ws://127.0.0.1:8000

Chains, judge, limits and seeds are those of `python -m Step3_DeFI.rollout` with the same settings
(RolloutConfig), so the same tasks are solved in the same steps.
"""

import sys

from omegaconf import OmegaConf
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from defi.config import typed
from defi.engine.data import seed_of
from Step3_DeFI.rollout.evaluate import Evaluation
from Step3_DeFI.rollout.protocol import RolloutConfig
from Step3_DeFI.rollout.simulator import run_chain


def main(address: str = "ws://127.0.0.1:8000", *settings: str) -> None:
    client = WebsocketClientPolicy(address, port=None)
    executed = client.get_server_metadata()["executed"]

    def act(world, task, instruction, seed):
        seen = {"rgb_obs": world.render(), "robot_obs": world.robot_obs(), "prompt": instruction}
        return client.infer(seen | {"seed": seed_of("rollout", *seed)})["actions"][:executed]

    table = Evaluation.prepare(typed(RolloutConfig, OmegaConf.from_dotlist(list(settings)), "play_table"))
    world = table.setup.make_world()
    for chain in table.chains:
        (result,) = run_chain(world, act, chain, table.setup)
        solved = sum(steps is not None for steps in result.steps)
        print(
            f"chain {chain.index}: {solved} of {len(chain.tasks)} solved, in steps {result.steps}", flush=True
        )
        if table.setup.fresh:
            world.reload()


if __name__ == "__main__":
    main(*sys.argv[1:])
