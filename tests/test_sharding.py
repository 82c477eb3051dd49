"""A model sharded over two processes trains, saves and resumes as a whole one does, at every stage."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from engine_toy import Points, toy, trainer
from launcher import SHARDED, launch
from safetensors.torch import load_file
from stages import STAGES, assert_same_training, build_lora_policy, train_stage
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from defi import processes
from defi.config import compose_preset
from defi.engine.checkpoint import find_checkpoint
from defi.engine.log import METRICS, read_metrics
from defi.engine.loop import train
from defi.errors import UserError
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.model import GFDM
from Step1_GFDM.pipeline import build_scheduler, build_unet

CONFIG = {"config": {"preset_name": "test"}}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all stages in two processes, `begun` of them in one; `printed` is what they said."""
    output = tmp_path_factory.mktemp("sharded")
    train(toy(dropout=0.0), Points(), trainer(max_steps=3), output=output / "begun", **CONFIG)
    (output / "printed").write_text(launch("sharded.py", str(output), how=SHARDED))
    return output


@pytest.mark.parametrize("stage", STAGES)
def test_sharded_training_equals_one_process(stage: str, sharded: Path, tmp_path: Path) -> None:
    """Losses, weights, averages and codes; each process accumulates two samples of a step."""
    train_stage(stage, tmp_path, steps=3, micro_batch=1)
    assert_same_training(tmp_path, sharded / "whole" / stage)


def test_adapters_in_a_frozen_unet(sharded: Path, tmp_path: Path) -> None:
    """Blocks of which a part learns; what does not is not cut."""
    train_stage("policy", tmp_path, steps=2, micro_batch=1, build=build_lora_policy)
    assert_same_training(tmp_path, sharded / "lora")


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_exact(stage: str, sharded: Path) -> None:
    whole, parts = (find_checkpoint(sharded / name / stage) for name in ("whole", "parts"))
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert sum(file.suffix == ".safetensors" for file in files) >= 3, "weights, averages, optimizer"
    for file in files:
        if file.name not in ("manifest.json", "progress.json"):
            assert (whole / file).read_bytes() == (parts / file).read_bytes(), file


def test_a_checkpoint_does_not_show_how_it_was_made(sharded: Path, tmp_path: Path) -> None:
    """One process goes on with what two began sharded, and the other way round."""
    run = sharded / "whole" / "toy"
    train(toy(dropout=0.0), Points(), trainer(max_steps=6), resume=True, output=run, **CONFIG)
    train(toy(dropout=0.0), Points(), trainer(max_steps=6), output=tmp_path, **CONFIG)
    expected = find_checkpoint(tmp_path)
    for file in ("model.safetensors", "ema/model.safetensors", "state/optimizer.safetensors"):
        for other in (run, sharded / "begun"):
            found = load_file(find_checkpoint(other) / file)
            for name, tensor in load_file(expected / file).items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_main_process_looks_at_the_averaged_whole(sharded: Path) -> None:
    run = sharded / "whole" / "toy"
    saved = toy(dropout=0.0).eval()
    saved.load_weights(run / "checkpoints" / "step_00000003" / "ema")
    batch = {"x": torch.ones(2, 3), "seed": torch.arange(2)}
    (seen,) = (record for record in read_metrics(run / METRICS) if record["kind"] == "preview")
    assert seen["held_out_loss"] == pytest.approx(saved(batch)["loss"].item(), rel=1e-6)


@pytest.mark.parametrize("stage", ["gidm", "policy"])
def test_bf16(stage: str, sharded: Path, tmp_path: Path) -> None:
    AcceleratorState._reset_state()  # it remembers the precision
    train_stage(stage, tmp_path, steps=3, precision="bf16")
    AcceleratorState._reset_state()
    for one, two in zip(read_metrics(tmp_path / METRICS), read_metrics(sharded / "bf16" / stage / METRICS)):
        for name in {"loss", "grad_norm"} & one.keys():
            assert two[name] == pytest.approx(one[name], rel=0.05), name


def test_numbers_that_are_not_finite_in_one_process(sharded: Path) -> None:
    """Both write their report; the step ends the run in both, or is left out."""
    printed = (sharded / "printed").read_text()
    assert "sharded over 2 processes" in printed
    for name in ("stopped", "left_out"):
        origins = {
            json.loads(report.read_text())["origin"]
            for report in (sharded / name / "nonfinite").glob("step_*_process_*.json")
        }
        assert "'x' of the batch" in origins and len(origins) == 2, name
    assert printed.count("the loss is nan at step") == 3, "one process says what is left out"
    final = load_file(find_checkpoint(sharded / "left_out") / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in final.values())


@pytest.mark.parametrize("rank", [0, 7])
def test_the_full_size_unet_is_sharded_by_eight(rank: int) -> None:
    """What configs/accelerate/fsdp.yaml says of memory, counted without any."""
    config = GFDMConfig.from_preset(compose_preset("paper"))
    with torch.device("meta"):
        unet = build_unet(config, config.clip.width).to("meta")  # some parts ignore the context
    frozen = {"vae": nn.Linear(3, 3), "clip": nn.Linear(3, 3)}
    model = GFDM(config, unet=unet, scheduler=build_scheduler(), **frozen)
    trained = sum(parameter.numel() for _, parameter in model.trainable())
    blocks = [m for m in model.unfrozen(model.named_modules()).values() if isinstance(m, model.blocks)]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
    try:
        model.shard(torch.device("cpu"))
        kept = [p for part in model.frozen for p in model.get_submodule(part).parameters()]
        shares = [parameter.to_local().numel() for _, parameter in model.trainable()]
    finally:
        dist.destroy_process_group()
    assert trained / 1e6 == pytest.approx(1524.6, abs=0.1)
    assert sum(shares) == pytest.approx(trained / 8, rel=1e-4)
    assert kept and not any(map(processes.is_sharded, kept))
    bytes_per_weight = 4 * (1 + 1 + 2 + 1)  # weight, gradient, two moments, average
    assert bytes_per_weight * trained / 1e9 == pytest.approx(30.5, abs=0.05)
    assert bytes_per_weight * sum(shares) / 1e9 == pytest.approx(3.8, abs=0.05)
    # In use: what is in no block, and its gradient; a block, the next one as it travels and as it arrives,
    # the gradient of one, and that of another as it travels.
    in_use = 4 * (2 * (trained - sum(sizes)) + 5 * max(sizes))
    assert in_use < 3e9


@pytest.mark.parametrize(
    ("environment", "settings", "told"),
    [
        ({processes.FSDP: "true"}, {"precision": "fp16"}, "fp16: .*trainer.precision=bf16"),
        (
            {processes.FSDP: "true", "FSDP_VERSION": "1"},
            {},
            "FSDP_VERSION=1: only fsdp_version: 2 .*configs/accelerate/fsdp.yaml",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            {},
            "DEEPSPEED=true: only accelerate_use_deepspeed: false is supported; .*fsdp.yaml",
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "MEGATRON_LM=true: only .*false is supported"),
    ],
)
def test_other_ways_to_shard_are_refused(
    environment: dict, settings: dict, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        train(toy(), Points(), trainer(**settings), output=tmp_path, config={})
    assert not any(tmp_path.iterdir())
