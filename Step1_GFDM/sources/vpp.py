"""VPP's layout without latents: <root>/annotation/<split>/<id>.json and the videos that it names."""

import hashlib
from pathlib import Path

from defi.errors import UserError
from defi.video import read_video
from Step1_GFDM.data import Episode, annotation_files, read_episode
from Step1_GFDM.sources.recordings import Recording, Scene, shortened


class AnnotatedVideos:
    """One recording per annotation.

    Cameras are the names of its videos' files without suffix; their numbers from 0, where names repeat.
    """

    def __init__(self, root: Path, split: str) -> None:
        self.root = root
        self.recordings = [Recording(shortened(file.stem), file) for file in annotation_files(root, split)]
        self.cameras = self._first_cameras()

    @property
    def fingerprint(self) -> str:
        """Hash of the annotations' names."""
        return hashlib.sha256("\n".join(r.id for r in self.recordings).encode()).hexdigest()[:16]

    def _first_cameras(self) -> list[str]:
        """Of the first annotation that can be read. Raises UserError if none can."""
        errors = []
        for recording in self.recordings:
            try:
                return list(self._videos(read_episode(self.root, recording.place), recording))
            except UserError as error:
                errors.append(error)
        raise errors[0]

    def _videos(self, episode: Episode, recording: Recording) -> dict[str, Path]:
        """Camera -> video. Raises UserError if there is none."""
        if not episode.videos:
            raise UserError(f"{recording.place}: names no videos; list them, or remove this annotation")
        names = [Path(video).stem for video in episode.videos]
        if len(set(names)) < len(names):
            names = [str(number) for number in range(len(names))]
        return {name: self.root / video for name, video in zip(names, episode.videos)}

    def read(self, recording: Recording, every: int) -> Scene:
        episode = read_episode(self.root, recording.place)
        videos = self._videos(episode, recording)
        if list(videos) != self.cameras:
            raise UserError(f"{recording.place}: has the videos {list(videos)}, others {self.cameras}")
        found = {camera: read_video(video, every) for camera, video in videos.items()}
        shortest = min(len(frames) for frames, _ in found.values())
        rate = found[self.cameras[0]][1]
        views = {camera: frames[:shortest] for camera, (frames, _) in found.items()}
        return Scene(views, episode.texts, rate / every)
