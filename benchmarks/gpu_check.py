"""What a CPU cannot show, on one GPU in less than ten minutes: `python -m benchmarks.gpu_check`.

  peak      bf16 matrix product, the fastest this device does
  parity    each network in bf16 against itself in float32
  training  steps of all stages at the preset's batch: samples/s, memory, share of the measured peak
  latency   of the policy, one observation → one chunk: p50 and p99, without and with torch.compile

Weights are random, at the sizes of the preset. Prints a table and writes JSON. scripts/gpu_check.sh calls it.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from defi.config import compose_preset
from defi.engine.checkpoint import environment
from defi.engine.config import TrainerConfig
from defi.engine.model import StageModel
from defi.engine.output import write_file
from Step1_GFDM import adapter as gfdm_adapter
from Step1_GFDM.model import GFDM
from Step2_GIDM import adapter as gidm_adapter
from Step2_GIDM.model import GIDM
from Step3_DeFI import adapter as policy_adapter
from Step3_DeFI.features import merge_tokens
from Step3_DeFI.policy import DeFI

STAGES = {"gfdm": gfdm_adapter, "gidm": gidm_adapter, "policy": policy_adapter}
TEXTS = ["open the drawer", "push the red block to the left", "turn on the light bulb"]


@dataclass
class Check:
    """What is measured where, and what was found."""

    preset: str
    device: torch.device
    repeats: int
    batch: int | None  # None: the recipe's share of one GPU
    deadline: float
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def config(self, stage: str) -> DictConfig:
        bf16 = "++policy.gfdm_precision=no"  # not released's fp16: what is measured is bf16, under autocast
        return compose_preset(self.preset, f"+trainer={self.preset}/{stage}", bf16)

    def build(self, stage: str) -> Any:
        """A new model of a stage, drawn on the device."""
        torch.manual_seed(0)
        with self.device:
            model = STAGES[stage].build(self.config(stage))
        return model.to(self.device)  # parts of diffusers' networks do not heed the line above

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def forget(self) -> None:
        """Give back memory, and measure its peak anew."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float:
        """Largest memory since `forget` (on a CPU: of the process)."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def seconds(self, work: Callable[[], Any], times: int = 1) -> list[float]:
        """Of each of `times` · `repeats` calls, after one to warm up."""
        work()
        taken = []
        for _ in range(times * self.repeats):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - began)
        return taken


# ---------------------------------------------------------------- the four checks


def peak(check: Check) -> dict[str, float]:
    """TFLOP/s of a square bf16 matrix product."""
    size = 8192 if check.cuda else 256
    a, b = (torch.randn(size, size, device=check.device, dtype=torch.bfloat16) for _ in range(2))
    fastest = min(check.seconds(lambda: a @ b))
    return {"matrix_size": size, "tflops": 2 * size**3 / fastest / 1e12}


@torch.no_grad()
def parity(check: Check) -> dict[str, float]:
    """Relative error ‖bf16 − float32‖ / ‖float32‖ of each network's output, under autocast."""
    policy: DeFI = check.build("policy").eval()
    (images, texts), noise = _look(check, policy)
    latents = policy.gfdm.encode_images(images[0] / 127.5 - 1)  # the views as clips of their own
    noisy = torch.randn(1, policy.config.chunk, policy.config.action_dim, device=check.device)
    sigma = torch.ones(1, device=check.device)
    features = policy.gfdm.features(latents, texts * len(latents), noise=noise.video[0])[None]
    static = merge_tokens(policy.standardise(features), policy.config.merge)[:, 0]
    states = policy.t5(texts, full_length=True)
    context = policy.context(features, texts)

    modules: dict[str, Callable[[], Tensor]] = {
        "VAE encoder": lambda: policy.gfdm.encode_images(images[0] / 127.5 - 1),
        "GFDM features": lambda: policy.gfdm.features(latents, texts * len(latents), noise=noise.video[0]),
        "VideoFormer": lambda: policy.context(features, texts).video_tokens,
        "GIDM branch": lambda: policy.gidm_branch(static, *states).vectors,
        "action denoiser": lambda: policy.action_head.decode(
            policy.encode(context), noisy, policy.action_head.noise_levels(sigma)
        ),
        "policy": lambda: policy.act(images, texts, noise=noise),
    }
    errors = {}
    for name, module in modules.items():
        exact = module().float()
        with check.autocast():
            rounded = module().float()
        errors[name] = ((rounded - exact).norm() / exact.norm()).item()
    return errors


def training(check: Check) -> dict[str, dict[str, float]]:
    """Full training steps: forward, backward, clipping, AdamW, in bf16 with float32 weights."""
    found = {}
    for stage in STAGES:
        if time.monotonic() > check.deadline:
            break
        check.forget()
        model: StageModel = check.build(stage).train()
        trainer = TrainerConfig.from_config(check.config(stage).trainer)
        if stage == "gfdm" and model.config.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()
        count = check.batch or trainer.micro_batch or trainer.global_batch
        batch = FAKES[stage](check, model, count)
        weights = [parameter for _, parameter in model.trainable()]
        optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=check.cuda)

        def step(model=model, batch=batch, weights=weights, optimizer=optimizer) -> None:
            with check.autocast():
                loss = model(batch)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        with FlopCounterMode(display=False) as counter:
            step()
        seconds = min(check.seconds(step))
        tflops = counter.get_total_flops() / seconds / 1e12
        found[stage] = {
            "trained_parameters": sum(parameter.numel() for parameter in weights),
            "batch": count,
            "samples_per_s": count / seconds,
            "tflop_per_sample": counter.get_total_flops() / count / 1e12,
            "share_of_peak": tflops / check.results["peak"]["tflops"],
            "memory_gb": check.peak_gb(),
        }
        del model, batch, weights, optimizer, step
    return found


def latency(check: Check, compiled: bool) -> dict[str, float]:
    """Milliseconds from one observation to one chunk, in bf16."""
    check.forget()
    policy: DeFI = check.build("policy").eval()
    torch.nn.Module.to(policy.gfdm.unet, torch.bfloat16)  # else they are converted at every look
    if compiled:
        compile_policy(policy)
    (images, texts), noise = _look(check, policy)

    def act() -> None:
        with check.autocast():
            policy.act(images, texts, noise=noise)

    taken = torch.tensor(check.seconds(act, times=5)) * 1e3  # a 99th percentile needs more than a mean
    return {
        "p50_ms": taken.quantile(0.5).item(),
        "p99_ms": taken.quantile(0.99).item(),
        "memory_gb": check.peak_gb(),
    }


def compile_policy(policy: DeFI, backend: str = "inductor") -> None:
    """torch.compile what a look runs through; the UNet block by block, which takes minutes, not more."""
    unet = policy.gfdm.unet
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks[:2]):
        block.compile(backend=backend)
    policy.video_former.compile(fullgraph=True, backend=backend)
    policy.gidm_branch.tokenizer.encoder.compile(fullgraph=True, backend=backend)
    policy.action_head.decode = torch.compile(policy.action_head.decode, fullgraph=True, backend=backend)


# ---------------------------------------------------------------- made-up input


def _look(check: Check, policy: DeFI) -> tuple[tuple[Tensor, list[str]], Any]:
    size = policy.image_size
    images = torch.randint(0, 256, (1, policy.config.views, 3, size, size), dtype=torch.uint8)
    return (images.to(check.device), TEXTS[:1]), policy.noise(torch.tensor([1]))


def _gfdm_batch(check: Check, model: GFDM, count: int) -> dict[str, Any]:
    batch = model.config.fake_batch(count)
    return batch | {"latents": batch["latents"].to(check.device)}


def _gidm_batch(check: Check, model: GIDM, count: int) -> dict[str, Any]:
    batch = model.config.fake_batch(count)
    return batch | {"frames": batch["frames"].to(check.device)}


def _policy_batch(check: Check, model: DeFI, count: int) -> dict[str, Any]:
    """From latents, so that the UNet runs in every step, as in the published recipe."""
    config, video = model.config, model.gfdm.config
    size = (count, config.views, video.vae.latent_channels, video.latent_size, video.latent_size)
    return {
        "latents": torch.randn(size, device=check.device),
        "actions": torch.rand(count, config.chunk, config.action_dim, device=check.device) * 2 - 1,
        "text": [TEXTS[i % len(TEXTS)] for i in range(count)],
        "seed": torch.arange(count),
    }


FAKES = {"gfdm": _gfdm_batch, "gidm": _gidm_batch, "policy": _policy_batch}


# ---------------------------------------------------------------- report


def rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What is printed: a name and a sentence each."""
    lines = [("matrix peak, bf16", f"{results['peak']['tflops']:.1f} TFLOP/s")]
    for name, error in results.get("parity", {}).items():
        lines.append((f"bf16 error, {name}", f"{error:.2e}"))
    for stage, found in results.get("training", {}).items():
        lines.append(
            (
                f"training, {stage}",
                f"{found['samples_per_s']:.1f} samples/s at batch {found['batch']}, "
                f"{found['tflop_per_sample']:.3g} TFLOP each, {found['share_of_peak']:.0%} of the peak, "
                f"{found['memory_gb']:.1f} GB",
            )
        )
    for kind in ("latency", "latency, compiled"):
        if found := results.get(kind):
            times = f"p50 {found['p50_ms']:.1f} ms, p99 {found['p99_ms']:.1f} ms"
            lines.append((f"policy {kind}", f"{times}, {found['memory_gb']:.1f} GB"))
    lines.append(("seconds", ", ".join(f"{name} {took:.0f}" for name, took in results["seconds"].items())))
    return [*lines, *(("skipped, no time left", name) for name in results["skipped"])]


def run(check: Check, output: Path, *, compiled: bool) -> dict[str, Any]:
    """All checks that begin before the deadline; `output` is written after each: one may last too long."""
    checks = {
        "peak": lambda: peak(check),
        "parity": lambda: parity(check),
        "training": lambda: training(check),
        "latency": lambda: latency(check, False),
    }
    if compiled:
        checks["latency, compiled"] = lambda: latency(check, True)
    check.results |= {"preset": check.preset, "seconds": {}, "skipped": [], **environment()}
    for name, measure in checks.items():
        if time.monotonic() > check.deadline:
            check.results["skipped"].append(name)
            continue
        began = time.monotonic()
        check.results[name] = measure()
        check.results["seconds"][name] = time.monotonic() - began
        check.forget()
        write_file(output, json.dumps(check.results, indent=1))
    return check.results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu_check.json"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="samples per training step; default: the recipe's per GPU")
    parser.add_argument("--repeats", type=int, default=30, help="measured calls, after one to warm up")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing new after that")
    parser.add_argument("--no-compile", action="store_true", help="leave out the latency with torch.compile")
    given = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # parity is against true float32
    deadline = time.monotonic() + 60 * given.minutes
    check = Check(given.preset, torch.device(given.device), given.repeats, given.batch, deadline)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    results = run(check, given.output, compiled=not given.no_compile)
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows(results):
        table.add_row(*row)
    Console(highlight=False, width=120).print(table)
    print(f"written {given.output}")


if __name__ == "__main__":
    main()
