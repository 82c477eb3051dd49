"""Diffusion of action chunks: EDM preconditioning, noise levels of training, samplers.

EDM: Karras et al. 2022 (arXiv 2206.00364, table 1 and algorithm 1); DPM-Solver++ (arXiv 2211.01095, algorithm
2); classifier-free guidance: Ho and Salimans 2022 (arXiv 2207.12598); chunks that go on from others: Black,
Galliker and Levine 2025 (arXiv 2506.07339).
Actions are normalised (`defi.robot.spec.Vector`), σ in the same units.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from defi.robot.chunk import UnderWay

Actions = Float[Tensor, "*B K A"]
Denoiser = Callable[[Actions, int], Actions]
"""x, i → D(x, σᵢ): actions of the i-th noise level of a schedule → the clean actions seen in them."""


def scalings(sigma: Float[Tensor, "..."], sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in of EDM, shaped to multiply [..., K, A]."""
    sigma = sigma[..., None, None]
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt()


def precondition(network: Denoiser, sigmas: Float[Tensor, "S ..."], *, sigma_data: float) -> Denoiser:
    """D(x, σᵢ) = c_skip·x + c_out·network(c_in·x, i); `network` knows the levels `sigmas` by their number."""
    c_skip, c_out, c_in = scalings(sigmas, sigma_data)

    def denoise(x: Tensor, i: int) -> Tensor:
        return c_skip[i] * x + c_out[i] * network(c_in[i] * x, i)

    return denoise


def guide(denoise: Denoiser, scale: float) -> Denoiser:
    """Classifier-free guidance, D = D_without + scale·(D_with − D_without), from one pass over 2B rows.

    `denoise` answers [2B, K, A]: the first B rows with the condition, the last B without.
    """

    def guided(x: Tensor, i: int) -> Tensor:
        conditioned, without = denoise(torch.cat([x, x]), i).chunk(2)
        return without + scale * (conditioned - without)

    return guided


@dataclass(frozen=True)
class Ahead:
    """What chunks are held to: B rows of actions, and how firmly, from 0 (not at all) to 1."""

    actions: Float[Tensor, "B K A"]
    weights: Float[Tensor, "B K 1"]

    @classmethod
    def of(
        cls,
        under_way: Sequence[UnderWay | None],
        normalise: Callable[[Tensor], Tensor],
        *,
        shape: tuple[int, ...],
        fade: int,
    ) -> "Ahead":
        """From what is under way, per row: chunks of `shape` (K, A) that go on from it (`soft_weights`)."""
        actions, weights = torch.zeros(len(under_way), *shape), torch.zeros(len(under_way), shape[0], 1)
        for row, each in enumerate(under_way):
            if each is not None:
                n, known = len(each.actions), normalise(torch.from_numpy(each.actions))
                actions[row] = torch.cat([known, known[-1:].expand(shape[0] - n, -1)])
                weights[row, :, 0] = soft_weights(shape[0], under_way=n, delay=each.delay, fade=fade)
        return cls(actions, weights)

    def to(self, device: torch.device) -> "Ahead":
        return Ahead(self.actions.to(device), self.weights.to(device))


def soft_weights(chunk: int, *, under_way: int, delay: int, fade: int) -> Float[Tensor, " K"]:
    """How firmly a chunk of K actions is held to the n that are under way.

    1 for the first `delay`, which will have been carried out; from there it falls exponentially, as equation
    5 of real-time chunking has it, to 0 at n, or over `fade` actions where n is closer.
    """
    i, end = torch.arange(chunk), max(under_way, delay + fade)
    rest = ((end - i) / (end - delay + 1)).clamp(0, 1)
    return torch.where(i < delay, 1.0, rest * torch.expm1(rest) / math.expm1(1))


def hold(denoise: Denoiser, ahead: Ahead) -> Denoiser:
    """Inpainting: what is seen in noisy actions is drawn to those ahead, and replaced by them at weight 1.

    At weight 0 it stays as it is, to the last bit. The paper adds a gradient through the network instead
    (ΠGDM); this project's head attends to earlier actions alone, so the gradient never reaches the later ones
    and, measured, leaves rougher seams.
    """

    def held(x: Tensor, i: int) -> Tensor:
        return ahead.weights * ahead.actions + (1 - ahead.weights) * denoise(x, i)

    return held


def denoising_loss(
    network: Callable[[Tensor, Tensor], Tensor],
    actions: Tensor,
    *,
    noise: Tensor,
    sigma: Tensor,
    sigma_data: float,
) -> Float[Tensor, ""]:
    """Mean squared error of the network's raw output, i.e. of D(x, σ) weighted by 1/c_out²."""
    c_skip, c_out, c_in = scalings(sigma, sigma_data)
    noisy = actions + noise * sigma[..., None, None]
    target = (actions - c_skip * noisy) / c_out
    return (network(c_in * noisy, sigma) - target).square().mean()


def log_logistic(
    u: Float[Tensor, "..."], *, loc: float, scale: float, minimum: float, maximum: float
) -> Float[Tensor, "..."]:
    """Quantile function of the log-logistic density on [minimum, maximum]: u in [0, 1] → σ (float32)."""
    low, high = (1 / (1 + math.exp((loc - math.log(sigma)) / scale)) for sigma in (minimum, maximum))
    return (u.double() * (high - low) + low).logit().mul(scale).add(loc).exp().float()


def exponential_schedule(
    steps: int, *, sigma_max: float, sigma_min: float, device: torch.device | str = "cpu"
) -> Float[Tensor, " S1"]:
    """`steps` levels, evenly spaced in ln σ from sigma_max to sigma_min, then 0."""
    levels = torch.linspace(math.log(sigma_max), math.log(sigma_min), steps, device=device).exp()
    return torch.cat([levels, levels.new_zeros(1)])


def ddim(denoise: Denoiser, x: Actions, sigmas: Float[Tensor, " S1"]) -> Actions:
    """First-order deterministic sampling: x ← (σ'/σ)·x + (1 − σ'/σ)·D(x, σ)."""
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        ratio = following / sigma
        x = ratio * x + (1 - ratio) * denoise(x, i)
    return x


def dpmpp_2m(denoise: Denoiser, x: Actions, sigmas: Float[Tensor, " S1"]) -> Actions:
    """DPM-Solver++(2M): as `ddim`, with D extrapolated from the step before; first order at both ends."""
    earlier: tuple[Tensor, Tensor] | None = None  # (D, step length in ln σ) of the step before
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        clean = denoise(x, i)
        ratio, length = following / sigma, sigma.log() - following.log()
        estimate = clean
        if earlier is not None and following > 0:
            estimate = clean + (clean - earlier[0]) * length / (2 * earlier[1])
        x = ratio * x + (1 - ratio) * estimate
        earlier = clean, length
    return x


def heun(denoise: Denoiser, x: Actions, sigmas: Float[Tensor, " S1"]) -> Actions:
    """EDM's algorithm 1: Euler step and trapezoidal correction; two evaluations per step but the last."""
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        slope = (x - denoise(x, i)) / sigma
        ahead = x + (following - sigma) * slope
        if following > 0:
            slope_ahead = (ahead - denoise(ahead, i + 1)) / following
            ahead = x + (following - sigma) * (slope + slope_ahead) / 2
        x = ahead
    return x


SAMPLERS = {"ddim": ddim, "dpmpp_2m": dpmpp_2m, "heun": heun}
