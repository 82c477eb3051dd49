"""The `data` section of a configuration → data set of pairs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from defi.data import DataSettings, Part, read_sets, read_settings
from defi.data.mixture import Mixture
from defi.errors import UserError
from Step2_GIDM.data.images import Augmentation
from Step2_GIDM.data.pairs import PairDataset

FARTHEST = 10**6  # frames between the two of a pair: hours of video


@dataclass(kw_only=True)
class PairSettings:
    """What a section says of its pairs; see configs/step2_train.yaml.

    distance: [low, high], frames between the two of a pair; None: the data set's own, `pair_distance`.
    stride: frames between the starts of pairs. words: whether pairs keep their instructions. weight: in a
    mixture.
    """

    distance: list[int] | None = None
    stride: int = 1
    words: bool = True
    augmentation: Augmentation | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        apart = [1, 1] if self.distance is None else self.distance
        if len(apart) != 2 or not 1 <= apart[0] <= apart[1] <= FARTHEST:
            must = f"must be [low, high] with 1 <= low <= high <= {FARTHEST:,}, [15,15] say"
            raise UserError(f"data.distance={self.distance}: {must}")
        if self.stride < 1:
            raise UserError(f"data.stride={self.stride}: must be at least 1")


def build_pairs(
    section: Mapping[str, Any], image_size: int, part: Part = "training", *, augment: bool = True
) -> PairDataset | Mixture[PairDataset]:
    """Pairs of the section's training episodes, augmented as it says, or of another part, as they are.

    Where `data.cameras` names none, they show the first camera only.
    """

    def pairs_of(settings: DataSettings, pairs: PairSettings) -> PairDataset:
        data = (settings.wordless() if part == "all" else settings).open(part)  # to label: words need not be
        return PairDataset(
            data,
            data.cameras if settings.cameras else data.cameras[:1],
            image_size=image_size,
            distance=pairs.distance or list(data.pair_distance),
            stride=pairs.stride,
            words=pairs.words,
            augmentation=pairs.augmentation if augment and part == "training" else None,
        )

    if "sets" not in section:
        return pairs_of(*read_settings(section, PairSettings))
    chosen = read_sets(section, PairSettings)
    sets = {name: pairs_of(*settings) for name, settings in chosen.items()}
    weights = {name: pairs.weight for name, (_, pairs) in chosen.items()}
    sizes = {}
    if part == "training":  # a share counts what is not trained on, too
        for name, pairs in sets.items():
            sizes[name] = len(pairs) * pairs.data.size() // int(pairs.data.lengths.sum())
    return Mixture(sets, weights, sizes)
