"""On a device of its own nothing is left behind in main memory, and a look never waits for a number."""

from typing import Any

import pytest
import torch
from policy_fakes import build_policy
from pretended_gpu import DEVICE, pretended_gpu
from stages import STAGES
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from defi.engine.model import StageModel
from defi.engine.optimizer import EMA


def training_step(stage: str, device: torch.device) -> dict[str, Tensor]:
    """One step from the same weights and samples; what the model reports and the weights after it."""
    build, shapes = STAGES[stage]
    model: StageModel = build().train().to(device)
    ema = EMA(model, 0.9)
    parameters = [parameter for _, parameter in model.trainable()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    torch.manual_seed(0)
    batch: dict[str, Any] = {name: torch.randn(2, *shape).to(device) for name, shape in shapes.items()}
    reported = model(batch | {"text": ["open the drawer", "push"], "seed": torch.tensor([5, 6])})
    reported["loss"].backward()
    clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    ema.update()
    model.epoch_end()
    found = reported | model.mutable_tensors()
    return {name: value.detach().cpu() for name, value in found.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_training_step_leaves_nothing_behind(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = training_step(stage, torch.device("cpu"))
    with pretended_gpu(monkeypatch):
        found = training_step(stage, DEVICE)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name],
            value,
            rtol=1e-4,
            atol=1e-5,
            msg=lambda m: f"{name}: {m}",  # noqa: B023
        )


def look(device: torch.device) -> tuple[Tensor, Tensor]:
    """A chunk of actions and an imagined video, from the same pictures, words and noise."""
    policy, texts = build_policy().eval().to(device), ["open the drawer", "push"]
    gfdm = policy.gfdm
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 2, 3, 16, 16), dtype=torch.uint8)
    noise = policy.noise(torch.tensor([5, 6]))
    actions = policy.act(images, texts, noise=noise)
    latents = gfdm.encode_images(images[:, 0].to(device) / 127.5 - 1)
    video = gfdm.generate(latents, gfdm.encode_text(texts), noise=noise.video[:, 0], steps=2)
    return actions.cpu(), gfdm.decode_latents(video).cpu()


def test_acting_and_imagining_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = look(torch.device("cpu"))
    with pretended_gpu(monkeypatch):
        found = look(DEVICE)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=5e-3)  # guidance enlarges rounding


def test_a_look_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1's schedule is a few numbers: read from the device they would stop every look."""
    policy = build_policy().eval()
    with pretended_gpu(monkeypatch) as counter:
        policy.to(DEVICE)
        images = torch.zeros(2, 2, 3, 16, 16, dtype=torch.uint8)
        noise = policy.noise(torch.tensor([5, 6]))
        policy.act(images, ["open", "push"], noise=noise)  # these words are encoded once and remembered
        before = counter.waits
        actions = policy.act(images, ["open", "push"], noise=noise)
        assert counter.waits == before
        assert actions.abs().sum().item() > 0
        assert counter.waits == before + 1


def test_the_pretended_device_refuses_what_a_gpu_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(monkeypatch):
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        with pytest.raises(RuntimeError, match="aten::add: tensors on two devices"):
            there + here
        with pytest.raises(RuntimeError, match="not supported"):
            there.numpy()
        torch.testing.assert_close((there + here.to(DEVICE)).cpu(), 2 * here)
