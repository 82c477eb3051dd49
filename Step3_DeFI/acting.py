"""Acting: what a robot sees and is told → its next actions. Rollout and scripts act through this.

policy = Policy.load("ckpts/policy")
actions = policy.infer({"images": {"static": image, "gripper": image}, "instruction": "open the drawer"})
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from defi.config import flatten
from defi.engine.checkpoint import find_weights, read_manifest, read_run_config
from defi.engine.weights import fingerprint
from defi.errors import UserError, choose
from defi.hub import local_folder
from defi.robot.chunk import UnderWay
from defi.robot.spec import Robot
from Step3_DeFI.config import PRECISIONS
from Step3_DeFI.diffusion import SAMPLERS
from Step3_DeFI.observation import observe
from Step3_DeFI.policy import DeFI

Observation = Mapping[str, Any]
"""images: camera → uint8 [H, W, 3]; instruction: a sentence; state: [S], where the policy reads it.

Cameras are those of `Policy.robot`, and so are the state's numbers and their units.
"""


class Policy:
    """A DeFI model that acts, on the model's device.

    Args:
        precision: of the computation: no (the weights' own), fp16 or bf16.
        diffusion: what to change of the checkpoint's `ActionDiffusionConfig`: sampler, steps, guidance.
    """

    def __init__(self, model: DeFI, *, precision: str = "no", **diffusion: Any) -> None:
        self.model = model.eval()
        model.config.diffusion = replace(model.config.diffusion, **diffusion)
        self._autocast = {"dtype": PRECISIONS[precision], "enabled": precision != "no"}

    @classmethod
    def load(
        cls,
        checkpoint: Path | str,
        *,
        device: torch.device | str = "cpu",
        precision: str | None = None,
        gfdm: str | None = None,
        gidm: str | None = None,
        **diffusion: Any,
    ) -> "Policy":
        """The policy of a stage-3 run, one of its checkpoints, an exported folder, or one on the hub.

        Args:
            precision: None: that of its training. The UNet's weights are kept in it: half the memory, and 1.5
                billion numbers need not be converted for every observation.
            gfdm, gidm: where the checkpoints that it stands on lie now, if elsewhere.
            diffusion: see the class.

        Raises:
            UserError: no complete stage-3 checkpoint there.
        """
        checkpoint = local_folder(checkpoint)
        model = DeFI.from_pretrained(find_weights(checkpoint, DeFI.stage), gfdm=gfdm, gidm=gidm)
        precision = precision or trained_precision(checkpoint)
        if precision != "no":
            nn.Module.to(model.gfdm.unet, PRECISIONS[precision])  # diffusers' own `to` prints a warning
        return cls(model.to(device), precision=precision, **diffusion)

    @property
    def robot(self) -> Robot:
        """What it sees and does."""
        return self.model.config.robot

    def infer(
        self, observation: Observation, seed: int = 0, under_way: UnderWay | None = None
    ) -> Float[np.ndarray, "K A"]:
        """The next K actions in the robot's units, the gripper's at one of its two values.

        `robot.executed` says how many of them to carry out before looking again (None: all). The same
        observation and seed give the same actions; give each observation of a run a seed of its own.

        under_way: what the robot carries out meanwhile, for motion that goes on from it: the first `delay`
            actions of the answer are exactly those (`defi.robot.client.Runner` does all of this).

        Raises:
            UserError: the observation lacks a camera, or something in it has another type or size.
        """
        return self.infer_batch([observation], [seed], [under_way])[0]

    def infer_batch(
        self,
        observations: Sequence[Observation],
        seeds: Sequence[int],
        under_way: Sequence[UnderWay | None] | None = None,
    ) -> Float[np.ndarray, "B K A"]:
        """As `infer`, for several at once: what stands beside an observation changes nothing about its
        actions, the size of the batch their rounding only.

        Raises:
            UserError: as `infer`; or there are more or fewer seeds, or chunks under way, than observations.
        """
        for name, given in (("seeds", seeds), ("under_way", under_way)):
            if given is not None and len(given) != len(observations):
                raise UserError(
                    f"{name}: {len(given)} for {len(observations)} observations; give one for each"
                )
        for observation in observations:
            self.check(observation)
        under_way = [each if each and len(each.actions) else None for each in under_way or ()]
        for each in filter(None, under_way):
            each.check(self.model.config.chunk, self.model.config.action_dim)
        robot, size = self.robot, self.model.image_size
        images = torch.stack([observe(each["images"], robot.cameras, size) for each in observations])
        noise, state = self.model.noise(torch.tensor(list(seeds))), None
        if self.model.config.state:
            states = [np.asarray(each["state"], np.float32) for each in observations]
            state = torch.from_numpy(np.stack(states))
        texts = [each["instruction"] for each in observations]
        with torch.autocast(self.model.device.type, **self._autocast):
            acted = self.model.act(images, texts, noise=noise, state=state, under_way=under_way)
        actions = acted.float().cpu().numpy()
        if robot.gripper is not None:
            actions = robot.gripper.snap(actions)
        for row, ahead in enumerate(under_way):
            if ahead is not None:  # to the last bit
                actions[row, : ahead.delay] = ahead.actions[: ahead.delay]
        return actions

    def check(self, observation: Observation) -> None:
        """Raises UserError as `infer` does."""
        self.robot.check(observation, state=self.model.config.state)


@dataclass
class PolicySettings:
    """Which checkpoint acts, and how: settings of every command that acts. None: as the checkpoint has it."""

    checkpoint: str | None = None
    gfdm: str | None = None
    gidm: str | None = None
    sampler: str | None = None
    sampler_steps: int | None = None
    guidance: float | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        choose("sampler", self.sampler, (None, *SAMPLERS))
        choose("precision", self.precision, (None, *PRECISIONS))

    def given(self) -> dict[str, Any]:
        """Those that are not left to the checkpoint."""
        names = (field.name for field in fields(PolicySettings))
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def load(self, device: torch.device | str, **more: Any) -> Policy:
        """The policy; `more`, and what it raises: as `Policy.load`."""
        given = {{"sampler_steps": "steps"}.get(name, name): value for name, value in self.given().items()}
        return Policy.load(device=device, **given, **more)


def trained_precision(checkpoint: Path | str) -> str:
    """The precision that a checkpoint was trained with; `no` where nothing is known of its training."""
    precision = flatten(read_run_config(checkpoint)).get("trainer.precision", "no")
    if precision not in PRECISIONS:
        trained = f"{checkpoint}: was trained with trainer.precision={precision}"
        raise UserError(f"{trained}; give precision= no, fp16 or bf16")
    return precision


def identify(checkpoint: Path | str) -> dict[str, Any]:
    """What the record says about a checkpoint: where, which weights, which step."""
    known = {"checkpoint": str(checkpoint), "fingerprint": fingerprint(find_weights(checkpoint))}
    manifest = read_manifest(checkpoint, DeFI.stage)
    return known | {key: manifest[key] for key in ("step", "preset", "version")}


@contextmanager
def policy_threads(threads: int | None = None, *, ranks: int = 1) -> Iterator[int]:
    """Let PyTorch use `threads` threads, by default one processor less than there are, and put it back after.

    With a thread on every processor, PyTorch's threads wait for each other while the simulators run: measured
    on two busy cores, a policy with two threads was several times slower than with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // ranks - 1))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
