"""Milliseconds per chunk of actions: `python -m benchmarks.action_sampling`.

The published action head (random weights, batch 1, DDIM with 10 steps) from the same context and noise,
side by side in one run:
  each step  context and noise level encoded again at every denoising step, as the published code does
  once       both encoded once per chunk, the cross-attention's keys and values with the context
  guided     as `once`, with classifier-free guidance: twice the rows
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from defi.data.calvin import calvin_robot
from Step2_GIDM.latent_action import LatentActionSizes
from Step3_DeFI.action_head import ActionDenoiser
from Step3_DeFI.config import PolicyConfig, StageSizes
from Step3_DeFI.diffusion import Denoiser, ddim, guide, precondition

PUBLISHED = PolicyConfig(
    robot=calvin_robot(),
    stages=StageSizes(
        frames=16,
        feature_tokens=256,
        feature_channels=2560,
        sentence_width=512,
        latent_action=LatentActionSizes(),
    ),
)


def build_head(config: PolicyConfig) -> ActionDenoiser:
    """The head with random weights whose every part has a say."""
    torch.manual_seed(0)
    return ActionDenoiser(
        config.action_head,
        sentence_dim=config.stages.sentence_width,
        video_dim=config.video_former.dim,
        latent_action_dim=config.stages.latent_action.width,
        action_dim=config.action_dim,
        chunk=config.chunk,
    ).eval()


def fake_context(config: PolicyConfig, rows: int, device: str) -> dict[str, Tensor]:
    """What the head encodes: 1 + 224 + 4 tokens at the published sizes."""
    former, action = config.video_former, config.stages.latent_action
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "sentence": (config.stages.sentence_width,),
        "video_tokens": (config.stages.frames * former.queries, former.dim),
        "latent_actions": (action.queries, action.width),
    }
    return {
        name: torch.randn(1, *shape, generator=generator).repeat(rows, *(1 for _ in shape)).to(device)
        for name, shape in shapes.items()
    }


def samplers(config: PolicyConfig, device: str) -> dict[str, Callable[[], Tensor]]:
    """The ways to make one chunk of actions, by name."""
    head = build_head(config).to(device)
    one, two = (fake_context(config, rows, device) for rows in (1, 2))
    sigmas = config.diffusion.schedule(device)
    start = torch.randn(1, config.chunk, config.action_dim, generator=torch.Generator().manual_seed(1))
    start = start.to(device) * sigmas[0]

    def denoiser(network: Denoiser) -> Denoiser:
        return precondition(network, sigmas, sigma_data=config.diffusion.sigma_data)

    def from_memory(context: dict[str, Tensor]) -> Denoiser:
        memory, levels = head.encode(**context), head.noise_levels(sigmas[:-1])
        return denoiser(lambda x, i: head.decode(memory, x, [level[i] for level in levels]))

    def each_step() -> Tensor:
        def network(x: Tensor, i: int) -> Tensor:
            return head.decode(head.encode(**one), x, head.noise_levels(sigmas[i]))

        return ddim(denoiser(network), start, sigmas)

    def once() -> Tensor:
        return ddim(from_memory(one), start, sigmas)

    def guided() -> Tensor:
        return ddim(guide(from_memory(two), 2.0), start, sigmas)

    return {"each step": each_step, "once": once, "guided": guided}


@torch.no_grad()
def measure(ways: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each; taken in turns, so that other work on the machine strikes all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):  # the first one warms up
        for name, make in ways.items():
            began = time.perf_counter()
            make().cpu()  # waits for the device
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    ways = samplers(PUBLISHED, given.device)
    with torch.no_grad():
        torch.testing.assert_close(ways["once"](), ways["each step"]())
    found = measure(ways, given.repeats)
    print(f"{given.device}, {given.threads} thread(s), batch 1, median of {given.repeats}")
    for name, milliseconds in found.items():
        print(f"{name:10} {milliseconds:8.1f} ms per chunk, {found['each step'] / milliseconds:5.1f} ×")


if __name__ == "__main__":
    main()
