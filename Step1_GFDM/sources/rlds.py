"""RLDS data sets (Open X-Embodiment): one recording per episode."""

from collections.abc import Mapping

from defi.errors import UserError
from defi.instructions import read_instruction
from defi.rlds import RLDSDataset
from Step1_GFDM.sources.recordings import Recording, Scene


class RLDSEpisodes:
    """Args:
    cameras: our name of each camera -> its key under `steps/observation`; the key None: the only picture.
    language: instruction, a path under `steps`; None: where data sets usually keep it.
    fps: frames per second; RLDS does not say.
    """

    def __init__(
        self, data: RLDSDataset, *, cameras: Mapping[str, str | None], language: str | None, fps: float
    ) -> None:
        self.data, self.fps = data, fps
        self.pictures = {camera: data.picture(key) for camera, key in cameras.items()}
        self.cameras = list(self.pictures)
        self.language = data.language(language)
        if self.language is None:
            raise UserError(f"{data.folder}: its steps hold no instruction; stage 1 needs captions")
        self.recordings = [Recording(f"{data.first + i:06d}", i) for i in range(len(data))]

    @property
    def fingerprint(self) -> str:
        return self.data.fingerprint

    def read(self, recording: Recording, every: int) -> Scene:
        episode: int = recording.place
        steps = range(0, int(self.data.lengths[episode]), every)
        where = f"{self.data.shard(episode)}: episode {recording.id}"
        text = read_instruction(self.data.text(episode, self.language), where)
        if not text:
            raise UserError(f"{where} has no instruction")
        views = {c: self.data.frames(episode, steps, picture) for c, picture in self.pictures.items()}
        return Scene(views, [text], self.fps / every)
