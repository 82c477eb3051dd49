"""Videos: any folder of them, or one; an episode each. What they show in words a file of captions may say."""

import csv
import hashlib
import io
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from defi.data.episode import Dataset, DataSettings, Episode, Frames, Part, distinct, file_name, of_part
from defi.errors import UserError, reading
from defi.files import as_list, find_files, inside
from defi.instructions import read_instructions
from defi.video import VIDEO_SUFFIXES, read_frames
from defi.video_index import number_videos

CAPTIONS = (".jsonl", ".csv", ".json")


@dataclass(kw_only=True)
class Settings(DataSettings):
    """`split`, `held_out`: folders below root, or files of captions; None: root, and every 20th captioned
    video of it. Without captions nothing is held out of one folder.

    captions: file below root that says what the videos show, if `split` is none.
    videos: folder below root that the captions' names of videos start from.
    """

    captions: str | None = None
    videos: str = "."

    def open(self, part: Part) -> "Videos":
        place, folder, said = self._listed(self.held_out if part == "held_out" else None)
        found = len(said)
        if part == "training" and self.held_out and not self.split:
            apart = {file for file, _ in self._listed(self.held_out)[2]}
            said = [each for each in said if each[0] not in apart] or said
        files = list(dict.fromkeys(file for file, _ in said))
        captioned = any(text != "" for _, text in said)
        kept = set(of_part(files, part if captioned and not self.held_out else "all"))
        chosen = [each for each in said if each[0] in kept]
        data = Videos(place, folder, chosen, list(self.places()))
        if others := found - len(chosen):
            note = f"{others:,} episodes of the other part (data.split, data.held_out)"
            data.left_out = [*data.left_out, note]
        return data

    def _listed(self, named: str | None) -> tuple[Path, Path, list[tuple[Path, str | None]]]:
        """What was opened, the folder of its videos, and each of them with what it shows."""
        place, folder = Path(self.root, named or self.split or ""), Path(self.root, self.videos)
        captions = Path(self.root, self.captions) if self.captions else None
        if place.suffix.lower() in CAPTIONS:
            captions, place = place, folder
        if captions:
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder; give the folder of the videos as data.videos")
            said = [(folder / inside(folder, name), text) for name, text in read_captions(captions)]
            said = [each for each in said if each[0].is_relative_to(place)]
        else:
            folder = place.parent if place.is_file() else place
            found = [place] if place.is_file() else find_files(place, VIDEO_SUFFIXES)
            said = [(file, "") for file in found]
        if not said:
            kinds = ", ".join(VIDEO_SUFFIXES)
            what = f"no videos here ({kinds})" if place.exists() else "no such file or folder"
            raise UserError(f"{place}: {what}; give a folder of videos")
        return place, folder, said


class VideoData(Dataset):
    """Episodes that are videos, a file per camera, as long as the shortest; those of the same files share
    their frames."""

    def take(self, folder: Path, found: Mapping[str, tuple[str, Sequence[Path] | str]]) -> None:
        """found: episode → its text, and its video of each camera below `folder`, or why there is none."""
        listed = [videos for _, videos in found.values() if not isinstance(videos, str)]
        files = list(dict.fromkeys(file for videos in listed for file in videos))
        numbered = dict(zip(files, number_videos(folder, files)))
        self._episodes, self._videos, self.faults = [], {}, {}
        starts, end = dict[tuple[Path, ...], int](), 0
        for name, (text, videos) in found.items():
            numberings = [] if isinstance(videos, str) else [numbered[file] for file in videos]
            fault = next((each for each in numberings if isinstance(each, UserError)), None)
            if fault or isinstance(videos, str):
                self.faults[name] = str(fault or videos)
                continue
            start, length = starts.setdefault(tuple(videos), end), min(each.frames for each in numberings)
            end = max(end, start + length)
            self._episodes.append(Episode(name, start, length, (text,)))
            self._videos[start] = dict(zip(self.cameras, zip(videos, numberings)))
        first = next(iter(self.faults.values()), "")
        if not self._episodes:
            raise UserError(f"{self.root}: none of {len(found)} videos can be read; the first: {first}")
        if count := len(self.faults):
            warnings.warn(f"{count} of {len(found)} videos left out; the first: {first}", stacklevel=2)
            self.left_out = [*self.left_out, f"videos that cannot be opened ({count:,})"]
        self.starts = np.array([each.start for each in self._episodes], np.int64)
        self.lengths = np.array([each.length for each in self._episodes], np.int64)

    def episode(self, number: int) -> Episode:
        return self._episodes[number]

    def read(self, episode: Episode, positions: Sequence[int], cameras: Sequence[str]) -> dict[str, Frames]:
        videos = self._videos[episode.start]
        return {camera: read_frames(videos[camera][0], positions, videos[camera][1]) for camera in cameras}

    def rate(self, episode: Episode) -> float:
        file, numbering = self._videos[episode.start][self.cameras[0]]
        return numbering.fps(file)


class Videos(VideoData):
    """An episode per video, or per caption. Its camera: `rgb`."""

    def __init__(
        self, root: Path, folder: Path, said: Sequence[tuple[Path, str | None]], cameras: list[str]
    ) -> None:
        """said: a video below `folder`, and what it shows; "" without captions, None where one is blank."""
        if len(cameras) > 1:
            raise UserError(f"data.cameras={cameras}: videos have one camera; name one, or null")
        self.root, self.cameras, self.scope = root, tuple(cameras or ["rgb"]), str(root)
        names = distinct(file_name(str(file.relative_to(folder).with_suffix(""))) for file, _ in said)
        found = (f"{file}: its caption is blank" if text is None else [file] for file, text in said)
        self.take(folder, dict(zip(names, zip((text or "" for _, text in said), found))))
        # Damaged videos that have a caption count too: they may be mended.
        lines = [f"{file.name} {text}\n" for file, text in said if text != ""]
        for each in () if lines else self._episodes:
            lines.append(f"{self._videos[each.start][self.cameras[0]][0].name} {each.length}\n")
        self.fingerprint = hashlib.sha256(os.fsencode("".join(lines))).hexdigest()[:16]


def read_captions(file: Path) -> list[tuple[str, str | None]]:
    """Name of a video, and what it shows; several for some. None where the caption is blank.

    captions.jsonl   a line per video: {"video": "kitchen/1.mp4", "text": "open it"}, or "texts": [...]
    captions.csv     the columns `video` and `text`
    labels.json      Something-Something's: [{"id": "78687", "label": "holding potato next to vicks"}, ...]
    """
    kind, found = file.suffix.lower(), list[tuple[str, str | None]]()
    if kind not in CAPTIONS:
        raise UserError(f"{file}: captions are read from {', '.join(CAPTIONS)}; give such a file")
    with reading(file, "give the captions of the videos, in UTF-8, as data.captions"):
        content = file.read_text("utf-8-sig")  # spreadsheets begin their files with a mark, others do not
        if kind == ".csv":
            entries = list(csv.DictReader(io.StringIO(content)))
        elif kind == ".json":
            labels = as_list(json.loads(content))
            entries = [{"video": f"{each['id']}.webm", "text": each["label"]} for each in labels]
        else:
            entries = []
            for number, line in enumerate(content.split("\n"), 1):
                with reading(f"{file}: line {number}", 'it must be JSON, {"video": …, "text": …}'):
                    entries += [json.loads(line)] if line.strip() else []
        for number, entry in enumerate(entries, 1):
            place, video = f"{file}: entry {number}", entry.get("video")
            texts = as_list(entry.get("texts", entry.get("text")))
            if not isinstance(video, str) or not video or not texts or None in texts:
                raise UserError(f"{place}: a video or its caption is missing; give each as video and text")
            texts = read_instructions(texts, f"{place}: the caption")
            found += [(video, text.strip()) for text in texts] or [(video, None)]
    if not any(text for _, text in found):
        raise UserError(f"{file}: no captions in it; one line per video is expected")
    return found
