"""The server as a command: `python -m Step3_DeFI.serve checkpoint=<run>`."""

import asyncio
import ipaddress
import os
import signal
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig

from defi.config import entry, typed
from defi.errors import UserError, one_line
from defi.hub import local_folder
from Step3_DeFI.acting import Policy, PolicySettings, identify, policy_threads, trained_precision
from Step3_DeFI.serve.server import ServeConfig, Server

API_KEY = "DEFI_API_KEY"


@dataclass
class CommandConfig(PolicySettings):
    """configs/step3_serve.yaml says what each setting is for."""

    checkpoint: str = ""  # which the command's configuration asks for
    fade: int | None = None
    device: str | None = None
    threads: int | None = None
    seed: int = 0
    host: str = "127.0.0.1"
    port: int = 8000
    serve: ServeConfig = field(default_factory=ServeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port < 2**16:
            raise UserError(f"port={self.port}: must lie in 0 … 65535")
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.zeros(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            raise UserError(f"device={self.device}: not here ({one_line(error)})") from None


@entry("step3_serve")
def main(cfg: DictConfig) -> None:
    config = typed(CommandConfig, cfg, "step3_serve")
    policy = config.load(config.device, **({} if config.fade is None else {"fade": config.fade}))
    print(f"{config.checkpoint}: {policy.robot.summary(policy.model.config.chunk)}")
    if not policy.robot.actions.low:
        print("the checkpoint does not know the range of its training data: actions are not clipped")
    api_key = os.environ.get(API_KEY)
    if not api_key and not _loopback(config.host):
        print(f"host={config.host}: whoever reaches this port can use the policy; set {API_KEY}")
    with policy_threads(config.threads):
        asyncio.run(_serve(Server(policy, config.serve, api_key, _identity(policy, config)), config))


def _identity(policy: Policy, config: CommandConfig) -> dict[str, Any]:
    """What the answers depend on, but for where the weights lie, which is no client's business."""
    local = local_folder(config.checkpoint)
    found = identify(local) | {"precision": config.precision or trained_precision(local)}
    found |= {"device": config.device, "diffusion": asdict(policy.model.config.diffusion)}
    return {key: value for key, value in found.items() if key != "checkpoint"}


async def _serve(server: Server, config: CommandConfig) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await server.run(
        config.host, config.port, stop, lambda address: print(f"serving on {address}", flush=True)
    )


def _loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
