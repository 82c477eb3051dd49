"""The policy's samples, and how they come straight from demonstrations in CALVIN's format."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch.utils.data import Dataset, default_collate

from defi.calvin import CalvinFolder
from defi.engine.data import readable, sample_seeds
from Step3_DeFI.observation import CAMERAS, observe
from Step3_DeFI.plan import READERS, SampleRules, plan_samples


class Pictures:
    """Both cameras' pictures of R observations, as the policy sees them: an array that reads when indexed."""

    def __init__(self, data: CalvinFolder, frames: Int64[np.ndarray, " R"], size: int) -> None:
        self.data, self.frames, self.size = data, frames, size

    def __getitem__(self, rows: int | slice | np.ndarray) -> UInt8[np.ndarray, "*rows V 3 size size"]:
        wanted = self.frames[rows]
        frames, places = np.unique(wanted, return_inverse=True)
        with ThreadPoolExecutor(READERS) as pool:
            seen = list(pool.map(lambda frame: observe(self.data.frame(frame, CAMERAS), self.size), frames))
        return torch.stack(seen).numpy()[places.reshape(wanted.shape)]


class PolicySamples(Dataset):
    """What the policy learns from: a packed store (`PolicyStore`) or recordings (`CalvinSamples`).

    Samples are {features | latents | images, text, actions [K, A]} and, where kept, `video` [V, F, ...].
    `kind` names the first; of features there may be several `draws`, which are samples of their own.
    `inputs`, by observation, are an array or `Pictures`; index, actions, video, texts are as in `Plan`.
    """

    kind: str
    draws: int = 1
    fingerprint: str  # identifies the data, for the checkpoints' manifests
    inputs: np.ndarray | Pictures
    index: np.ndarray
    actions: np.ndarray
    video: np.ndarray | None
    texts: list[str]

    def __len__(self) -> int:
        return len(self.index) * self.draws

    def __getitem__(self, i: int) -> dict[str, Any]:
        number, draw = divmod(i, self.draws)
        row, text = self.index[number]
        seen = self.inputs[row][draw] if self.kind == "features" else self.inputs[row]
        sample = {
            self.kind: torch.from_numpy(np.array(seen)),
            "text": self.texts[text],
            "actions": torch.from_numpy(np.array(self.actions[number])),
        }
        if self.video is not None:
            sample["video"] = torch.from_numpy(self.inputs[self.video[number]]).transpose(0, 1)
        return sample

    def spread(self, count: int, seed: int = 0) -> dict[str, Any]:
        """A batch of samples from all over the data; those that cannot be read are left out."""
        picked = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        read = [sample for _, sample in readable(self.__getitem__, picked.tolist())]
        return default_collate(read) | {"seed": sample_seeds("shown", seed, len(read))}


class CalvinSamples(PolicySamples):
    """Samples straight from a folder or zip: what a store of kind `images` yields, without one.

    Each sample decompresses its frames; a store reads several times as many per second.
    """

    kind = "images"

    def __init__(
        self, folder: Path | str, rules: SampleRules, *, image_size: int, clip: range | None = None
    ) -> None:
        data = CalvinFolder(folder)
        self.plan = plan = plan_samples(data, rules, clip=clip)
        self.inputs = Pictures(data, plan.observations[:, 0], image_size)
        self.index, self.actions, self.video, self.texts = plan.index, plan.actions, plan.video, plan.texts
        self.fingerprint = f"{data.fingerprint}-images-{len(self)}"  # as of the store
