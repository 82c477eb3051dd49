"""VPP's layout without latents: <root>/annotation/<split>/<id>.json and the videos that it names."""

import hashlib
from pathlib import Path

from defi.errors import UserError
from defi.video import frame_count, frame_rate, read_frames
from Step1_GFDM.data import Episode, read_episode
from Step1_GFDM.sources.recordings import Recording, Scene


class AnnotatedVideos:
    """One recording per annotation; cameras are the names of its videos' files."""

    def __init__(self, root: Path, split: str) -> None:
        self.root = root
        files = sorted((root / "annotation" / split).glob("*.json"))
        if not files:
            raise UserError(f"{root}/annotation/{split}: no annotations; give a data set in VPP's layout")
        self.recordings = [Recording(file.stem, file) for file in files]
        self.cameras = list(self._videos(read_episode(root, files[0])))

    @property
    def fingerprint(self) -> str:
        """Hash of the annotations' names."""
        return hashlib.sha256("\n".join(r.id for r in self.recordings).encode()).hexdigest()[:16]

    def _videos(self, episode: Episode) -> dict[str, Path]:
        return {Path(video).stem: self.root / video for video in episode.videos}

    def read(self, recording: Recording, every: int) -> Scene:
        episode = read_episode(self.root, recording.place)
        videos = self._videos(episode)
        if list(videos) != self.cameras:
            raise UserError(f"{recording.place}: has the videos {list(videos)}, others {self.cameras}")
        frames = min(map(frame_count, videos.values()))
        views = {camera: read_frames(video, range(0, frames, every)) for camera, video in videos.items()}
        return Scene(views, episode.texts, frame_rate(next(iter(videos.values()))) / every)
