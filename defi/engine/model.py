"""What the loop trains: a module that turns a batch into a loss and knows its own file format."""

import copy
import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from defi.engine.weights import COPY_AGAIN, load_strict, read_tensors
from defi.errors import reading
from defi.files import check_sizes, read_json

Model = TypeVar("Model", bound="StageModel")
Part = TypeVar("Part")  # a module, parameter or tensor

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class StageModel(nn.Module):
    """Base of the models of all stages.

    A subclass names its `stage` ("vae", "gfdm", "gidm" or "policy"), its `config_class` (a dataclass, kept as
    `self.config`) and the sub-networks that stay as they are (`frozen`, dotted names): those are never
    trained, averaged or saved, and stay in eval mode; call `freeze()` once they exist. All that training
    changes are parameters and buffers: checkpoints are written from a copy of those (`copied_to`).
    `blocks` are the classes of the large modules, called through `forward` alone and not inside each other,
    which a sharded run puts together one at a time (`shard`).

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

    def unfrozen(self, named: Iterable[tuple[str, Part]]) -> dict[str, Part]:
        """Of named modules, parameters or buffers those outside the frozen sub-networks."""
        frozen = tuple(f"{part}." for part in self.frozen)
        return {name: part for name, part in named if not f"{name}.".startswith(frozen)}

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that the optimizer moves, in a fixed order."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def mutable_tensors(self) -> dict[str, Tensor]:
        """Parameters and all buffers outside the frozen sub-networks: everything that training changes."""
        return self.unfrozen([*self.named_parameters(), *self.named_buffers()])

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
        return self.unfrozen(self.state_dict().items())

    def shard(self, device: torch.device) -> None:
        """Shard the model by FSDP2, in place, over all processes; frozen networks stay complete in each.

        While the model computes, each of its `blocks` is put together and released again; what is in no block
        stays together for a forward and backward pass. Weights travel in float32 and autocast does the rest:
        the numbers are those of an unsharded model in any precision.
        """
        from torch.distributed.device_mesh import init_device_mesh  # these take a second to import
        from torch.distributed.fsdp import fully_shard

        # Stable Video Diffusion's blocks return views; nothing after them works in place.
        warnings.filterwarnings("ignore", message=r".*returned a view tensor", category=UserWarning)
        blocks = [m for m in self.unfrozen(self.named_modules()).values() if isinstance(m, self.blocks)]
        frozen = {*self.parameters()} - {*self.unfrozen(self.named_parameters()).values()}
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for module in (*blocks, self):
            fully_shard(module, mesh=mesh, ignored_params=frozen)

    def save_pretrained(self, folder: Path) -> None:
        """Write `model.safetensors` and `config.json`; stages with a format of their own override this."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous() for name, t in self.own_state().items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(asdict(self.config), indent=1))

    @classmethod
    def from_pretrained(cls: type[Model], folder: Path) -> Model:
        """Build the model from its stored config and load its weights; UserError where anything misfits."""
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
