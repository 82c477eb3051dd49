"""A folder of videos and a file that says what each shows.

captions.jsonl   a line per video: {"video": "kitchen/1.mp4", "text": "open the drawer"}, or "texts": [...]
captions.csv     the columns `video` and `text`
labels.json      Something-Something's: [{"id": "78687", "label": "holding potato next to vicks"}, ...]
"""

import csv
import io
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from defi.errors import UserError, reading
from defi.instructions import read_instructions
from defi.video import frame_count, read_video
from Step1_GFDM.data import as_list, inside
from Step1_GFDM.sources.recordings import CaptionedSource, Recording, Recordings, Scene, file_name, part

SOMETHING_SUFFIX = ".webm"
ENCODING = "utf-8-sig"  # spreadsheets begin their files with a mark, others do not


@dataclass
class Source(CaptionedSource):
    """One recording per caption; its only camera is `rgb`.

    splits: files with captions below root; where `val` is None, those of every 20th video are held out.
    videos: folder below root that the captions' names of videos start from.
    longest: frames; longer videos are left out when they are read.
    """

    known_by_names = True

    videos: str = "."
    longest: int | None = None

    def open(self, split: str) -> Recordings:
        (captions, held_out), videos = self.place_and_part(split), Path(self.root, self.videos)
        if not videos.is_dir():
            raise UserError(f"{videos}: no such folder; give the folder of the videos as data.videos")
        said = [(name, inside(videos, name), texts) for name, texts in read_captions(captions)]
        kept = set(part(list(dict.fromkeys(file for _, file, _ in said)), held_out))
        said = [each for each in said if each[1] in kept]
        recordings = [
            Recording(file_name(name.rpartition(".")[0] or name), partial(self._read, videos / file, texts))
            for name, file, texts in said
        ]
        known = json.dumps([(name, texts) for name, _, texts in said])
        return Recordings.of_files(recordings, ["rgb"], known)

    def _read(self, path: Path, texts: list[str]) -> Scene:
        if not texts:
            raise UserError(f"{path}: its caption is blank")
        if self.longest is not None and (frames := frame_count(path)) > self.longest:
            raise UserError(f"{path}: has {frames} frames, data.longest={self.longest} leaves it out")
        frames, rate = read_video(path, self.every)
        return Scene({"rgb": frames}, texts, rate / self.every)


def read_captions(file: Path) -> list[tuple[str, list[str]]]:
    """Name of each video, and its texts: none where they are blank.

    Raises UserError that names the entry where the file or a caption is missing or of another kind.
    """
    found = []
    with reading(file, "give the captions of the videos, in UTF-8, as data.splits"):
        for number, entry in enumerate(_entries(file), 1):
            place, video = f"{file}: entry {number}", entry.get("video")
            texts = as_list(entry.get("texts", entry.get("text")))
            if not isinstance(video, str) or not video or not texts or None in texts:
                raise UserError(f"{place}: a video or its caption is missing; give each as video and text")
            found.append(
                (video, [text.strip() for text in read_instructions(texts, f"{place}: the caption")])
            )
    if not any(texts for _, texts in found):
        raise UserError(f"{file}: no captions in it; one line per video is expected")
    return found


def _entries(file: Path) -> list[dict[str, Any]]:
    """With `video` and `text`, or `texts`."""
    kind = file.suffix.lower()
    if kind not in (".jsonl", ".csv", ".json"):
        raise UserError(
            f"{file}: captions are read from .jsonl, .csv, .json; give such a file as data.splits"
        )
    content = file.read_text(ENCODING)
    if kind == ".csv":
        return list(csv.DictReader(io.StringIO(content)))
    if kind == ".json":
        labels = as_list(json.loads(content))
        return [{"video": f"{each['id']}{SOMETHING_SUFFIX}", "text": each["label"]} for each in labels]
    entries = []
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            with reading(f"{file}: line {number}", 'it must be JSON, {"video": …, "text": …}'):
                entries.append(json.loads(line))
    return entries
