"""VPP's layout without latents: <root>/annotation/<split>/<id>.json and the videos that it names."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from defi.errors import UserError
from defi.video import read_video
from Step1_GFDM.data import annotation_files, read_episode, stored_step
from Step1_GFDM.sources.recordings import CaptionedSource, Recording, Recordings, Scene, shortened


@dataclass
class Source(CaptionedSource):
    """One recording per annotation. splits: folders below annotation.

    Cameras are the names of its videos' files without suffix; their numbers from 0, where names repeat.
    """

    known_by_names = True

    def identity(self) -> dict[str, Any]:
        """The videos may themselves lack frames of the recording: those of a folder that was prepared."""
        return super().identity() | {"every": self.every * stored_step(Path(self.root))}

    def open(self, split: str) -> Recordings:
        files, errors = annotation_files(Path(self.root), self.theirs(split)), []
        for file in files:  # the first that can be read says what the cameras are
            try:
                cameras = list(self._texts_and_videos(file)[1])
                break
            except UserError as error:
                errors.append(error)
        else:
            raise errors[0]
        recordings = [Recording(shortened(file.stem), partial(self._read, file, cameras)) for file in files]
        return Recordings.of_files(recordings, cameras)

    def _texts_and_videos(self, file: Path) -> tuple[list[str], dict[str, Path]]:
        """Of an annotation, videos by camera. Raises UserError if there are none."""
        episode = read_episode(Path(self.root), file)
        if not episode.videos:
            raise UserError(f"{file}: names no videos; list them, or remove this annotation")
        names = [Path(video).stem for video in episode.videos]
        if len(set(names)) < len(names):
            names = [str(number) for number in range(len(names))]
        return episode.texts, {name: Path(self.root, video) for name, video in zip(names, episode.videos)}

    def _read(self, file: Path, cameras: list[str]) -> Scene:
        texts, videos = self._texts_and_videos(file)
        if list(videos) != cameras:
            raise UserError(f"{file}: has the videos {list(videos)}, others {cameras}")
        found = {camera: read_video(video, self.every) for camera, video in videos.items()}
        shortest = min(len(frames) for frames, _ in found.values())
        views = {camera: frames[:shortest] for camera, (frames, _) in found.items()}
        return Scene(views, texts, found[cameras[0]][1] / self.every)
