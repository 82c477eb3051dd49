"""A training step of each stage and one look of the policy, beside the published code, by turns in one run.

    python -m benchmarks.training_step --published <clone of the published DeFI code> [--size small]

Both sides get the same sizes (those of preset=released, smaller in the ways that the published code allows),
random weights, batch, instructions, threads and gradient checkpointing. A training step is forward, backward
and AdamW on made-up inputs in memory: ours as this project's training builds it, on the published side
PyTorch's AdamW with its defaults over all that learns; the published optimizer set-up is not used. A look is
one observation → a chunk of actions. Printed are medians of processor time (of the clock on a GPU) and
memory: weights and, of a training step, AdamW's moments, plus the most that it takes beyond them. Not in it,
on either side: reading data, averaged weights, clipping.

The published modules are imported from the folder and run as they are, with stand-ins where they load weights
from disk: this project's random towers, with T5 and CLIP encoding each text at each step, as there. A stage
whose imports fail is named and left out. Nothing of the folder is copied or written to.
"""

import argparse
import copy
import ctypes
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import StableVideoDiffusionPipeline
from torch import Tensor, nn
from torch.optim import AdamW

from defi.config import compose_preset, one_line_errors
from defi.data.calvin import calvin_robot
from defi.engine.config import TrainerConfig
from defi.engine.model import StageModel
from defi.engine.optimizer import build_optimizer
from defi.errors import UserError
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.model import GFDM
from Step2_GIDM.model import GIDM, GIDMConfig
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.policy import DeFI
from Step3_DeFI.stages import language_of

TEXTS = ["open the drawer", "push the red block to the left", "turn on the led light", "slide the door"]
SMALL = ["gfdm.image_size=128", "gfdm.unet.block_out_channels=[32,64,64,64]", "text.clip.layers=2"]
SMALL += ["gfdm.unet.num_attention_heads=[1,2,2,2]", "gfdm.unet.layers_per_block=1", "text.t5.layers=2"]
SMALL += ["gfdm.vae.block_out_channels=[32,32,64]", "gfdm.vae.layers_per_block=1", "gidm.dino.layers=2"]
SMALL += ["gidm.dino.image_size=112", "gidm.encoder_blocks=2", "gidm.decoder_blocks=2"]
SMALL += ["policy.video_former.depth=2"]
MIDDLE = ["gfdm.image_size=128", "gfdm.unet.block_out_channels=[64,128,256,256]", "text.clip.layers=4"]
MIDDLE += ["gfdm.unet.num_attention_heads=[1,2,4,4]", "gfdm.unet.layers_per_block=1", "text.t5.layers=4"]
MIDDLE += ["gfdm.vae.block_out_channels=[32,64,128]", "gfdm.vae.layers_per_block=1", "gidm.dino.layers=4"]
MIDDLE += ["gidm.dino.image_size=168", "gidm.encoder_blocks=6", "gidm.decoder_blocks=6"]
SIZES = {"small": SMALL, "middle": MIDDLE, "full": []}  # widths that the published code fixes stay
BATCHES = {"small": (1, 4, 1), "middle": (2, 8, 4), "full": (1, 32, 8)}  # of stages 1, 2, 3


@dataclass
class Side:
    """run: one step, or look. held: bytes of weights and, of a step, optimizer state."""

    run: Callable[[], Any]
    held: int


Pair = tuple[str, Side, Side]  # what it is; the published, ours


def size_of(*modules: nn.Module, learning: bool = True) -> int:
    """Bytes of weights, and of AdamW's two moments of those that learn; what several share counts once."""
    weights = {id(each): each for module in modules for each in (*module.parameters(), *module.buffers())}
    moments = sum(2 * 4 * each.numel() for each in weights.values() if learning and each.requires_grad)
    return sum(each.numel() * each.element_size() for each in weights.values()) + moments


def training(module: nn.Module, loss: Callable[[], Tensor], optimizer: Any, device: str) -> Side:
    def run() -> None:
        with torch.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext():
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Side(run, size_of(module))


def ours(model: StageModel, batch: dict[str, Any], device: str) -> Side:
    trainer, accelerator = TrainerConfig(global_batch=1, max_steps=1, lr=1e-5), Accelerator()
    optimizer = build_optimizer(model.train(), trainer, accelerator)
    return training(model, lambda: model(batch)["loss"], optimizer, device)


def theirs(module: nn.Module, loss: Callable[[], Tensor], device: str, *frozen: nn.Module) -> Side:
    """frozen: what it works with besides its own weights."""
    optimizer = AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-5)
    return replace(training(module, loss, optimizer, device), held=size_of(module, *frozen))


@contextmanager
def importable(folder: Path) -> Iterator[Path]:
    """Modules of a folder, which it gives; afterwards they are forgotten, for their names are too general."""
    folder, before = folder.resolve(), set(sys.modules)
    if not folder.is_dir():
        raise UserError(f"{folder}: missing; give a clone of the published code as --published")
    sys.path.insert(0, str(folder))
    try:
        yield folder
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            module = sys.modules[name]
            places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
            if any(place and Path(place).is_relative_to(folder) for place in places):
                del sys.modules[name]


# ---------------------------------------------------------------- the stages


def stage_1(folder: Path, cfg: Any, batch: int, device: str) -> Iterator[Pair]:
    """UNet from stored latents."""
    model = GFDM.from_config(GFDMConfig.from_preset(cfg)).to(device)
    unet = copy.deepcopy(model.unet).train()
    for each in (model.unet, unet):  # in both
        each.enable_gradient_checkpointing()
    file = folder / "scripts" / "train_svd.py"
    # What draws pictures stays out: a step needs none of it, and imports what newer diffusers lack.
    pictures = sys.modules["video_models.pipeline"] = ModuleType("video_models.pipeline")
    vars(pictures).update(MaskStableVideoDiffusionPipeline=None, __file__=str(file))  # as if of the folder
    spec: Any = importlib.util.spec_from_file_location("train_svd", file)
    spec.loader.exec_module(script := importlib.util.module_from_spec(spec))
    sizes, edm = model.config, model.config.diffusion
    latents = torch.randn(batch, sizes.frames, 4, sizes.latent_size, sizes.latent_size, device=device)
    texts = (TEXTS * batch)[:batch]
    args = SimpleNamespace(use_img_cond=False, position_encode=False, clip_model_path="clip")
    args.clip_token_length, args.motion_bucket_id, args.fps = sizes.clip.tokens, edm.motion_bucket, edm.fps
    rest = (SimpleNamespace(wait_for_everyone=lambda: None), video_pipeline(model, unet), unet)
    rest += (model.clip.tokenizer, model.clip.model, None, args)
    given = {"video": latents, "text": texts}
    seeds = torch.arange(batch)
    own = {"latents": latents, "text": texts, "seed": seeds}
    yield (
        f"stage 1, {batch} clips of {sizes.frames} latents",
        theirs(unet, lambda: script.finetune_unet(given, *rest), device, model.vae, model.clip),
        ours(model, own, device),
    )


def video_pipeline(model: GFDM, unet: nn.Module) -> StableVideoDiffusionPipeline:
    parts = {"vae": model.vae, "image_encoder": nn.Identity(), "unet": unet, "scheduler": model.scheduler}
    return StableVideoDiffusionPipeline(**parts, feature_extractor=None)


class Patches(nn.Module):
    """The frozen DINO under the name of torch.hub's method."""

    def __init__(self, gidm: GIDM) -> None:
        super().__init__()
        self.model, self.first = gidm.dino.model, 1 + gidm.config.dino.registers

    def forward_features(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"x_norm_patchtokens": self.model(pixel_values=pixels).last_hidden_state[:, self.first :]}


def tokenizer_of(module: ModuleType, gidm: GIDM, **sizes: Any) -> nn.Module:
    """The published latent action model of a module, with random towers of the same size."""
    tower, hub = copy.deepcopy(gidm.text.model), torch.hub.load
    vars(module)["T5EncoderModel"] = SimpleNamespace(from_pretrained=lambda _: tower)
    vars(module)["T5Tokenizer"] = SimpleNamespace(from_pretrained=lambda _: gidm.text.tokenizer)
    torch.hub.load = lambda *_: Patches(gidm)
    config = gidm.config
    sizes |= {"model_dim": config.width, "latent_dim": config.code_width, "num_latents": config.codes}
    sizes |= {"enc_blocks": config.encoder_blocks, "dec_blocks": config.decoder_blocks}
    try:
        return module.UncontrolledDINOLatentActionModel(
            in_dim=3, patch_size=14, num_heads=config.heads, **sizes
        )
    finally:
        torch.hub.load = hub


def stage_2(folder: Path, cfg: Any, batch: int, device: str) -> Iterator[Pair]:
    model = GIDM(GIDMConfig.from_preset(cfg)).to(device)
    module = import_module("genie.modules.lam")
    lam = tokenizer_of(module, model).to(device).train()
    own = model.config.fake_batch(batch)
    own["frames"] = own["frames"].to(device)
    own["text"] = (TEXTS * batch)[:batch]

    def loss() -> Tensor:
        out = lam({"videos": own["frames"], "task_instruction": own["text"]})
        codebook, commitment = out["emb"] - out["z"].detach(), out["emb"].detach() - out["z"]
        beta = model.config.commitment
        return (out["recon"] - out["target"]).square().mean() + (
            codebook.square().mean() + beta * commitment.square().mean()
        )

    pairs = f"stage 2, {batch} pairs of {model.config.dino.image_size}²"
    yield pairs, theirs(lam, loss, device), ours(model, own, device)


class Sentence(nn.Module):
    """CLIP's sentence embedding, of all its 77 tokens, encoded at each call."""

    def __init__(self, gfdm: GFDM) -> None:
        super().__init__()
        self.clip, self.device = gfdm.clip, gfdm.unet.device

    def forward(self, texts: list[str] | str) -> Tensor:
        how = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
        texts = [texts] if isinstance(texts, str) else texts
        with torch.no_grad():
            return self.clip.model(**self.clip.tokenizer(texts, **how).to(self.device)).text_embeds[:, None]


def published_policy(module: ModuleType, policy: DeFI, gidm: GIDM) -> Any:
    """Their policy, put together from its parts: its constructor reads all of them from disk."""
    theirs = module.VPP_Policy.__new__(module.VPP_Policy)
    module.pl.LightningModule.__init__(theirs)
    gfdm, config, stages = policy.gfdm, policy.config, policy.config.stages
    former, channels = config.video_former, stages.feature_channels
    unet = gfdm.unet  # frozen in both; theirs works out the size of its pictures from `sample_size`
    unet.register_to_config(sample_size=3 * gfdm.config.latent_size)
    theirs.TVP_encoder = module.Diffusion_feature_extractor(
        pipeline=video_pipeline(gfdm, unet),
        tokenizer=gfdm.clip.tokenizer,
        text_encoder=gfdm.clip.model,
        position_encoding=False,
    )
    theirs.Video_Former = module.Video_Former_3D(
        dim=former.dim,
        depth=former.depth,
        dim_head=former.head_dim,
        heads=former.heads,
        num_time_embeds=stages.frames,
        num_latents=stages.frames * former.queries,
        condition_dim=channels,
        use_temporal=True,
    )
    theirs.language_goal = Sentence(gfdm)
    width = stages.latent_action.width
    theirs.goal_emb = nn.Sequential(nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width))
    theirs.time_pos_emb = nn.Parameter(torch.randn(2, 1, width))
    theirs.model = module.GCDenoiser(
        action_dim=config.action_dim,
        obs_dim=former.dim,
        goal_dim=stages.sentence_width,
        num_tokens=stages.frames * former.queries,
        goal_window_size=1,
        obs_seq_len=1,
        act_seq_len=config.chunk,
        device=policy.device,
        use_original_diffusion_policy=False,
        sigma_data=config.diffusion.sigma_data,
    )
    theirs.lam = tokenizer_of(sys.modules[module.UncontrolledDINOLatentActionModel.__module__], gidm)
    theirs.use_univla = theirs.use_gripper = theirs.use_text_not_embedding = theirs.use_all_layer = True
    theirs.use_Former, theirs.extract_layer_idx, theirs.timestep = "3d", 1, gfdm.config.features.steps
    theirs.Former_num_time_embeds, theirs.max_length = stages.frames, gfdm.config.clip.tokens
    theirs.sampler_type, theirs.noise_scheduler = "ddim", "exponential"
    theirs.sigma_sample_density_type = "loglogistic"
    theirs.sigma_data, theirs.sigma_min = config.diffusion.sigma_data, config.diffusion.last_sigma
    theirs.sigma_max, theirs.num_sampling_steps = config.diffusion.sigma_max, config.diffusion.steps
    theirs.act_window_size, theirs.action_dim = config.chunk, config.action_dim
    theirs.log = lambda *_, **__: None
    for part in (theirs.model.inner_model.proprio_emb, theirs.model.inner_model.goal_emb):
        part.requires_grad_(False)  # as its constructor does
    return theirs.to(policy.device)


def stage_3(folder: Path, cfg: Any, batch: int, device: str) -> Iterator[Pair]:
    gfdm, gidm = GFDM.from_config(GFDMConfig.from_preset(cfg)), GIDM(GIDMConfig.from_preset(cfg))
    policy = DeFI(PolicyConfig.from_preset(cfg, calvin_robot()), gfdm=gfdm, **language_of(gidm)).to(device)
    module = import_module("policy_models.VPP_policy")
    other, side = published_policy(module, policy, gidm), policy.image_size
    pictures = torch.rand(batch, 2, 3, side, side, device=device) * 2 - 1
    texts, actions = (TEXTS * batch)[:batch], torch.rand(batch, 10, 7, device=device) * 2 - 1
    given = {"rgb_static": pictures[:, :1], "rgb_gripper": pictures[:, 1:]}
    step = {"rgb_obs": given, "lang_text": texts, "actions": actions}
    seeds = torch.arange(batch)
    own = {"images": pictures, "text": texts, "actions": actions, "seed": seeds}
    yield (
        f"stage 3, {batch} samples of two views of {side}²",
        theirs(other.train(), lambda: other(step), device, gfdm.unet, gfdm.vae),
        ours(policy, own, device),
    )
    one = {"rgb_obs": {name: each[:1] for name, each in given.items()}}
    other.eval(), policy.eval()

    def look() -> Tensor:
        with torch.no_grad():
            return other.eval_forward(one, {"lang_text": texts[0]})

    def own_look() -> Tensor:
        return policy.act(pictures[:1], texts[:1], noise=policy.noise(seeds[:1]))

    held = size_of(other, gfdm.unet, gfdm.vae, learning=False), size_of(policy, learning=False)
    yield "one look", Side(look, held[0]), Side(own_look, held[1])


STAGES = ((stage_1, "Step1_GFDM"), (stage_2, "Step2_GIDM"), (stage_3, "Step3_DeFI"))  # and their folders


# ---------------------------------------------------------------- measuring


def extra_memory(run: Callable[[], Any], device: str) -> int:
    """The most bytes that a step takes beyond what the process held before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def seconds(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time
    began = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def measure(pair: Pair, repeats: int, device: str) -> str:
    """A line of the table; the sides take turns, so that other work on the machine strikes both alike."""
    name, *sides = pair
    for side in sides:
        side.run()  # what is done once
    taken = [[seconds(side.run, device) for side in sides] for _ in range(repeats)]
    first, second = (1000 * statistics.median(times) for times in zip(*taken))
    memory = [(side.held + extra_memory(side.run, device)) / 1e6 for side in sides]
    line = f"{name:44} {first:9.1f} {second:9.1f} ms {first / second:6.2f} ×"
    return f"{line} {memory[0]:9.0f} {memory[1]:9.0f} MB {memory[0] / memory[1]:6.2f} ×"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--published", type=Path, required=True, help="a clone of the published DeFI code")
    parser.add_argument("--size", choices=SIZES, nargs="+", default=["small", "middle"])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], choices=[1, 2, 3])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.device == "cpu":  # the published modules move some tensors themselves
        torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    print(f"{given.device}, {given.threads} thread(s), median of {given.repeats}; published, ours, ratio")
    with one_line_errors():
        for size in given.size:
            precision = "fp16" if given.device == "cuda" else "no"  # of the frozen video model in stage 3
            cfg = compose_preset("released", *SIZES[size], f"policy.gfdm_precision={precision}")
            for number in given.stages:
                (stage, name), batch = STAGES[number - 1], BATCHES[size][number - 1]
                torch.manual_seed(0)
                try:
                    with redirect_stdout(StringIO()), importable(given.published / name) as folder:
                        pairs = stage(folder, cfg, batch, given.device)
                        found = [measure(pair, given.repeats, given.device) for pair in pairs]
                except ImportError as error:
                    print(f"{size}: stage {number}: left out, its code cannot be imported: {error}")
                    continue
                for line in found:
                    print(f"{size:7} {line}", flush=True)


if __name__ == "__main__":
    main()
