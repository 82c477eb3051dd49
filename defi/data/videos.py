"""Videos: any folder of them, or one; an episode each. What they show in words a file of captions may say."""

import csv
import hashlib
import io
import json
import os
import warnings
from collections.abc import Sequence
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
        named = self.held_out if part == "held_out" else None
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
            said = [
                (file, "") for file in ([place] if place.is_file() else find_files(place, VIDEO_SUFFIXES))
            ]
        if not said:
            what = (
                f"no videos here ({', '.join(VIDEO_SUFFIXES)})"
                if place.exists()
                else "no such file or folder"
            )
            raise UserError(f"{place}: {what}; give a folder of videos")
        files = list(dict.fromkeys(file for file, _ in said))
        kept = set(of_part(files, part if captions and not self.held_out else "all"))
        return Videos(place, folder, [each for each in said if each[0] in kept], list(self.places()))


class Videos(Dataset):
    """An episode per video, or per caption: those of one video share its frames. Its camera: `rgb`."""

    def __init__(
        self, root: Path, folder: Path, said: Sequence[tuple[Path, str | None]], cameras: list[str]
    ) -> None:
        """said: a video below `folder`, and what it shows; "" without captions, None where one is blank."""
        if len(cameras) > 1:
            raise UserError(f"data.cameras={cameras}: videos have one camera; name one, or null")
        self.root, self.cameras, self.scope = root, tuple(cameras or ["rgb"]), str(root)
        files = list(dict.fromkeys(file for file, _ in said))
        numbered = dict(zip(files, number_videos(folder, files)))
        damaged = [each for each in numbered.values() if isinstance(each, UserError)]
        counts = [0 if isinstance(each, UserError) else each.frames for each in numbered.values()]
        starts = dict(zip(files, np.cumsum([0, *counts]).tolist()))
        names = distinct(file_name(str(file.relative_to(folder).with_suffix(""))) for file, _ in said)
        self._episodes, self._videos, self.faults, lines = [], {}, {}, []
        for name, (file, text) in zip(names, said):
            numbering = numbered[file]
            if text != "":  # said of a damaged video too, which may be mended
                lines.append(f"{file.name} {text}\n")
            if isinstance(numbering, UserError) or text is None:
                self.faults[name] = f"{file}: its caption is blank" if text is None else str(numbering)
                continue
            if text == "":
                lines.append(f"{file.name} {numbering.frames}\n")
            self._episodes.append(Episode(name, starts[file], numbering.frames, (text,)))
            self._videos[starts[file]] = file, numbering
        count = f"{len(damaged)} of {len(files)} videos"
        if not self._episodes:
            raise UserError(f"{root}: {count} cannot be read; the first: {next(iter(self.faults.values()))}")
        if damaged:
            warnings.warn(f"{count} left out; the first: {damaged[0]}", stacklevel=2)
            self.left_out = [f"videos that cannot be opened ({len(damaged):,})"]
        self.fingerprint = hashlib.sha256(os.fsencode("".join(lines))).hexdigest()[:16]
        self.starts = np.array([each.start for each in self._episodes], np.int64)
        self.lengths = np.array([each.length for each in self._episodes], np.int64)

    def episode(self, number: int) -> Episode:
        return self._episodes[number]

    def read(self, episode: Episode, positions: Sequence[int], cameras: Sequence[str]) -> dict[str, Frames]:
        file, numbering = self._videos[episode.start]
        return {camera: read_frames(file, positions, numbering) for camera in cameras}

    def rate(self, episode: Episode) -> float:
        file, numbering = self._videos[episode.start]
        return numbering.fps(file)


def read_captions(file: Path) -> list[tuple[str, str | None]]:
    """Name of a video, and what it shows; several for some. None where the caption is blank.

    captions.jsonl   a line per video: {"video": "kitchen/1.mp4", "text": "open it"}, or "texts": [...]
    captions.csv     the columns `video` and `text`
    labels.json      Something-Something's: [{"id": "78687", "label": "holding potato next to vicks"}, ...]
    """
    kind, found = file.suffix.lower(), []
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
