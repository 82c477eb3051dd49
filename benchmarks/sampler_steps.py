"""Denoising steps a policy needs: `python -m benchmarks.sampler_steps --checkpoint RUN --store STORE`.

Each sampler with few steps against Heun with 100, on one checkpoint, the same stored features and the same
noise. The noise levels go from σ_max to the last level and then to 0 in one step; a table per last level.
  calls      of the network per chunk (Heun: two per step)
  reference  root mean square distance of the actions (which lie in [−1, 1]) to the 100-step reference
  expert     the same to the demonstrated actions: what the difference matters
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from defi.config import one_line_errors
from defi.engine.data import SampleNoise
from Step3_DeFI.acting import Policy
from Step3_DeFI.config import ActionDiffusionConfig
from Step3_DeFI.diffusion import SAMPLERS
from Step3_DeFI.policy import Context, DeFI
from Step3_DeFI.store import PolicyStore

REFERENCE = ("heun", 100)


@dataclass
class Row:
    """One line of the table."""

    sampler: str
    steps: int
    calls: int
    to_reference: float
    to_expert: float


def sample(
    policy: DeFI, context: Context, noise: Float[Tensor, "B K A"], diffusion: ActionDiffusionConfig
) -> tuple[Float[Tensor, "B K A"], int]:
    """Chunks, and how often the denoiser was called."""
    calls = 0
    sigmas = diffusion.schedule(noise.device)
    denoise = policy.denoiser(context, sigmas)

    def counted(x: Tensor, i: int) -> Tensor:
        nonlocal calls
        calls += 1
        return denoise(x, i)

    return SAMPLERS[diffusion.sampler](counted, noise * sigmas[0], sigmas), calls


@torch.no_grad()
def measure(policy: DeFI, batch: dict[str, Any], *, steps: list[int], last_sigma: float) -> list[Row]:
    """All samplers with all numbers of steps, from the same noise; the context is computed once."""
    features = batch["features"].to(policy.device, policy.dtype)
    context = policy.context(features, batch["text"])
    expert = batch["actions"].to(policy.device)
    noise = SampleNoise(batch["seed"], policy.device).normal("actions", *expert.shape[1:])

    def chunks(sampler: str, count: int) -> tuple[Tensor, int]:
        settings = {"sampler": sampler, "steps": count, "last_sigma": last_sigma}
        return sample(policy, context, noise, replace(policy.config.diffusion, **settings))

    reference, _ = chunks(*REFERENCE)
    rows = []
    for sampler in SAMPLERS:
        for count in steps:
            actions, calls = chunks(sampler, count)
            rows.append(Row(sampler, count, calls, distance(actions, reference), distance(actions, expert)))
    return rows


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square difference."""
    return (a - b).square().mean().sqrt().item()


def draw(rows: list[Row], title: str) -> Table:
    table = Table(box=SIMPLE, title=title)
    for name in ("sampler", "steps", "calls", "reference", "expert"):
        table.add_column(name, justify="left" if name == "sampler" else "right")
    for row in rows:
        table.add_row(
            row.sampler, str(row.steps), str(row.calls), f"{row.to_reference:.5f}", f"{row.to_expert:.4f}"
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a stage-3 run or checkpoint")
    parser.add_argument("--store", type=Path, required=True, help="of features (Step3_DeFI.prepare)")
    parser.add_argument("--samples", type=int, default=128, help="evenly spread over the store")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 10, 15, 20, 40])
    parser.add_argument("--last-sigma", type=float, nargs="+", help="default: the checkpoint's")
    parser.add_argument("--guidance", type=float, default=1.0)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with one_line_errors():
        policy = Policy.load(given.checkpoint, device=device, precision="no").model
        policy.config.diffusion = replace(policy.config.diffusion, guidance=given.guidance)
        batch = PolicyStore(given.store).spread(given.samples)
    for last_sigma in given.last_sigma or [policy.config.diffusion.last_sigma]:
        rows = measure(policy, batch, steps=given.steps, last_sigma=last_sigma)
        title = f"σ {policy.config.diffusion.sigma_max:g} … {last_sigma:g}, 0; {given.samples} chunks"
        Console(highlight=False).print(draw(rows, title))


if __name__ == "__main__":
    main()
