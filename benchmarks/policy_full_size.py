"""The full-size policy on a CPU: `python -m benchmarks.policy_full_size [--preset paper] [--looks 2]`.

One observation (both views, an instruction) → a chunk of actions, with random weights, the UNet in bf16, the
rest in float32 under autocast, as a rollout with precision=bf16. Prints parameters, seconds per look and
the largest memory of the process. Weights are drawn in the type they are used in and never exist twice.
"""

import argparse
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from defi.config import compose_preset
from defi.data.calvin import calvin_robot
from defi.text import CLIPText
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.model import GFDM
from Step1_GFDM.pipeline import build_scheduler, build_unet, build_vae
from Step2_GIDM.model import GIDM, GIDMConfig
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.policy import DeFI
from Step3_DeFI.stages import language_of

LIMIT_GB = 16


@contextmanager
def weights_in(dtype: torch.dtype) -> Iterator[None]:
    """New networks get weights of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(preset: str, *, unet_dtype: torch.dtype) -> DeFI:
    """The policy of a preset at random weights: what acting needs of each stage."""
    cfg = compose_preset(preset)
    config = GFDMConfig.from_preset(cfg)
    clip = CLIPText.from_config(config.clip)
    with weights_in(unet_dtype):
        unet = build_unet(config, clip.width)
    vae = build_vae(config.vae, config.image_size)
    gfdm = GFDM(config, unet=unet, vae=vae, scheduler=build_scheduler(), clip=clip)
    gidm = GIDM(GIDMConfig.from_preset(cfg))
    return DeFI(PolicyConfig.from_preset(cfg, calvin_robot()), gfdm=gfdm, **language_of(gidm)).eval()


def parameters(policy: DeFI) -> dict[str, int]:
    """By part."""
    parts = {
        "UNet": policy.gfdm.unet,
        "VAE": policy.gfdm.vae,
        "CLIP": policy.gfdm.clip,
        "T5": policy.t5,
        "VideoFormer": policy.video_former,
        "GIDM branch": policy.gidm_branch,
        "action head": policy.action_head,
    }
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def look(policy: DeFI, seed: int) -> tuple[torch.Tensor, float]:
    """A chunk [1, K, A] for made-up pictures, and the seconds it took."""
    views, size = policy.config.views, policy.image_size
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (1, views, 3, size, size), generator=random, dtype=torch.uint8)
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        chunk = policy.act(images, ["open the drawer"], noise=policy.noise(torch.tensor([seed])))
    return chunk, time.perf_counter() - began


def peak_gb() -> float:
    """The largest memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--looks", type=int, default=2, help="the first one includes what is done once")
    given = parser.parse_args()

    began = time.perf_counter()
    policy = build(given.preset, unet_dtype=torch.bfloat16)
    built = time.perf_counter() - began
    counts = parameters(policy)
    listed = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in counts.items())
    print(f"parameters   {sum(counts.values()) / 1e6:,.1f} M: {listed}")
    print(f"built        in {built:.0f} s, {peak_gb():.1f} GB at most so far")
    threads = torch.get_num_threads()
    for number in range(given.looks):
        chunk, seconds = look(policy, seed=number)
        assert chunk.isfinite().all()
        print(f"look {number + 1}       {list(chunk.shape)} in {seconds:.1f} s on {threads} threads")
    verdict = "below" if peak_gb() < LIMIT_GB else "NOT below"
    print(f"memory       {peak_gb():.1f} GB at most, {verdict} {LIMIT_GB} GB")


if __name__ == "__main__":
    main()
