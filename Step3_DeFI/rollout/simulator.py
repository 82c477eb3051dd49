"""A simulator process: one world, chains in, looks and results out, over one connection.

Started by `fleet.Simulator` as `python -m Step3_DeFI.rollout.simulator <file descriptor>`. It ends when the
other side of the connection is closed, so none is left behind when the evaluation is killed.
"""

import signal
import sys
import traceback
from multiprocessing.connection import Connection

from defi.errors import UserError
from Step3_DeFI.rollout.chain import Agent, ExpertAgent, PolicyAgent, RandomAgent, run_chain
from Step3_DeFI.rollout.messages import Actions, Failure, Look, Setup, Trial

# Ctrl-C and what Slurm sends reach every process of a run. The evaluation, or the training around it, decides
# what becomes of them; this process ends with the connection, or is killed.
LEFT_TO_THE_EVALUATION = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def serve(connection: Connection) -> None:
    """Run the chains that arrive until the connection is closed."""
    setup: Setup = connection.recv()
    world = setup.make_world()
    agent = make_agent(setup, connection)
    used = False
    try:
        while True:
            trial: Trial = connection.recv()
            if used and setup.fresh:
                world.reload()
            used = True
            recorded = setup.record_every if trial.index in setup.recorded else None
            result = run_chain(
                world,
                setup.judge,
                agent,
                trial,
                limit=setup.limit,
                record_every=recorded,
                keep=connection.send,
            )
            connection.send(result)
    finally:
        world.close()


def make_agent(setup: Setup, connection: Connection) -> Agent:
    """The agent that `setup` names."""

    def ask(look: Look) -> Actions:
        connection.send(look)
        return connection.recv()

    if setup.agent == "policy":
        return PolicyAgent(ask, setup.seed)
    return RandomAgent(setup.seed) if setup.agent == "random" else ExpertAgent()


def main() -> None:
    for number in LEFT_TO_THE_EVALUATION:
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    try:
        serve(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        user = isinstance(error, UserError)
        connection.send(Failure(str(error) if user else traceback.format_exc(), user))


if __name__ == "__main__":
    main()
