"""RLDS data sets (Open X-Embodiment): one recording per episode."""

from dataclasses import dataclass
from functools import partial

from defi.errors import UserError
from defi.instructions import read_instruction
from defi.rlds import RLDSDataset, default_splits
from Step1_GFDM.config import check_rate
from Step1_GFDM.sources.recordings import CaptionedSource, Recording, Recordings, Scene


@dataclass
class Source(CaptionedSource):
    """splits: as TFDS names them; None: `default_splits`.

    cameras: our name of each camera -> its key under `steps/observation`; None: the only picture, `static`.
    language: instruction, a path under `steps`; None: where data sets usually keep it.
    fps: of the recordings, which do not say. index: where the places of pictures are kept.
    """

    cameras: dict[str, str | None] | None = None
    language: str | None = None
    fps: float = 30
    index: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate("data.fps", self.fps)

    def open(self, split: str) -> Recordings:
        theirs = self.splits.get(split) or default_splits(self.root)[split == "val"]
        data = RLDSDataset(self.root, theirs, index=self.index)
        cameras = self.cameras or {"static": None}
        pictures = {camera: data.picture(key) for camera, key in cameras.items()}
        language = data.language(self.language)
        if language is None:
            raise UserError(f"{data.folder}: its steps hold no instruction; stage 1 needs captions")
        read = partial(self._read, data, pictures, language)
        episodes = [Recording(f"{data.first + i:06d}", partial(read, i)) for i in range(len(data))]
        return Recordings(episodes, list(pictures), data.fingerprint)

    def _read(self, data: RLDSDataset, pictures: dict[str, str], language: str, episode: int) -> Scene:
        where = f"{data.shard(episode)}: episode {data.first + episode:06d}"
        text = read_instruction(data.text(episode, language), where)
        if not text:
            raise UserError(f"{where} has no instruction")
        steps = range(0, int(data.lengths[episode]), self.every)
        views = {camera: data.frames(episode, steps, picture) for camera, picture in pictures.items()}
        return Scene(views, [text], self.fps / self.every)
