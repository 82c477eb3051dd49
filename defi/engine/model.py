"""What the loop trains: a module that turns a batch into a loss and knows its own file format."""

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from defi.engine.weights import COPY_AGAIN, load_strict, read_tensors
from defi.errors import reading
from defi.files import check_sizes, read_json

Model = TypeVar("Model", bound="StageModel")

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class StageModel(nn.Module):
    """Base of the models of all stages.

    A subclass names its `stage` ("vae", "gfdm", "gidm" or "policy"), its `config_class` (a dataclass, kept as
    `self.config`) and the sub-networks that stay as they are (`frozen`, dotted names): those are never
    trained, averaged or saved, and stay in eval mode; call `freeze()` once they exist. All that training
    changes are parameters and buffers: checkpoints are written from a copy of those (`copied_to`).
    `blocks` are the classes of the large modules, called through `forward` alone and not inside each other,
    which a sharded run (`defi.engine.distributed`) puts together one at a time.

    Several processes: parameters get averaged gradients; buffers are *not* broadcast, so a buffer that
    accumulates over samples must be reduced over processes inside `forward`, `step_end` or `epoch_end`.
    """

    stage: ClassVar[str]
    config_class: ClassVar[type]
    frozen: ClassVar[tuple[str, ...]] = ()
    blocks: ClassVar[tuple[type[nn.Module], ...]] = ()
    config: Any

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Training loss of one batch.

        Args:
            batch: tensors with the batch first, lists of B strings, and `seed` [B] int64: one number per
                sample and epoch, whatever batch or process it lands in (see `defi.engine.data.SampleNoise`).

        Returns:
            `loss`, a scalar mean over the batch that is differentiated, and further scalars to log.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def step_end(self) -> None:
        """Called in every process after each optimizer step: here, and not between the micro-batches of a
        step, a model may change what the gradients do not move."""

    def epoch_end(self) -> dict[str, float]:
        """Called in every process after each epoch; returns numbers to log."""
        return {}

    def freeze(self) -> None:
        """Stop gradients into the frozen sub-networks and put them in eval mode."""
        for name in self.frozen:
            self.get_submodule(name).requires_grad_(False).eval()

    def train(self: Model, mode: bool = True) -> Model:
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    def is_frozen(self, name: str) -> bool:
        """Whether a module, parameter or buffer belongs to a frozen sub-network."""
        return f"{name}.".startswith(tuple(f"{part}." for part in self.frozen))

    def frozen_parameters(self) -> set[nn.Parameter]:
        """Those of the frozen sub-networks."""
        return {parameter for name, parameter in self.named_parameters() if self.is_frozen(name)}

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that the optimizer moves, in a fixed order."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def mutable_tensors(self) -> dict[str, Tensor]:
        """Parameters and all buffers outside the frozen sub-networks: everything that training changes."""
        tensors = [*self.named_parameters(), *self.named_buffers()]
        return {name: tensor for name, tensor in tensors if not self.is_frozen(name)}

    def copied_to(self: Model, device: torch.device | str) -> Model:
        """A copy, not of a sharded model, with the `mutable_tensors` on a device; frozen networks are shared.

        In main memory the copy of a GPU's tensor is page-locked, which is faster to copy to.
        """

        def copied(tensor: Tensor) -> Tensor:
            lock = tensor.is_cuda and torch.device(device).type == "cpu"
            values = torch.empty_like(tensor.detach(), device=device, pin_memory=lock).copy_(tensor.detach())
            return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values

        shared = {id(module): module for module in map(self.get_submodule, self.frozen)}
        return copy.deepcopy(self, {**shared, **{id(t): copied(t) for t in self.mutable_tensors().values()}})

    def own_state(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers outside the frozen sub-networks."""
        return {name: tensor for name, tensor in self.state_dict().items() if not self.is_frozen(name)}

    def unfrozen_blocks(self) -> list[nn.Module]:
        """The modules of the classes `blocks` outside the frozen sub-networks."""
        modules = self.named_modules()
        return [m for name, m in modules if isinstance(m, self.blocks) and not self.is_frozen(name)]

    def save_pretrained(self, folder: Path) -> None:
        """Write `model.safetensors` and `config.json`; stages with a format of their own override this."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous() for name, t in self.own_state().items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(asdict(self.config), indent=1))

    @classmethod
    def from_pretrained(cls: type[Model], folder: Path) -> Model:
        """Build the model from its stored config and load its weights, strictly.

        Raises:
            UserError: a file is missing or damaged, or a tensor's name or shape does not fit.
        """
        file = folder / CONFIG
        values = read_json(file, COPY_AGAIN)
        check_sizes(values, file)
        with reading(file, f"{COPY_AGAIN}, or take the version of this code that wrote it"):
            model = cls(cls.config_class(**values))
        model.load_weights(folder)
        return model

    @torch.no_grad()
    def load_weights(self, folder: Path) -> None:
        """Copy the weights that `save_pretrained` wrote into this model, in place and strictly."""
        file = folder / WEIGHTS
        load_strict(self.own_state(), read_tensors(file), source=file)
