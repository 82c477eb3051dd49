"""A folder of videos and a file that says what each shows.

captions.jsonl   a line per video: {"video": "kitchen/1.mp4", "text": "open the drawer"}, or "texts": [...]
captions.csv     the columns `video` and `text`
labels.json      Something-Something's: [{"id": "78687", "label": "holding potato next to vicks"}, ...]
"""

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from defi.errors import UserError
from defi.instructions import read_instructions
from defi.video import frame_count, read_video
from Step1_GFDM.data import as_list, inside
from Step1_GFDM.sources.recordings import Recording, Scene, distinct, file_name, part

SOMETHING_SUFFIX = ".webm"
ENCODING = "utf-8-sig"  # spreadsheets begin their files with a mark, others do not


class CaptionedVideos:
    """One recording per caption; its only camera is `rgb`.

    Args:
        captions: the file with the captions.
        videos: the folder that its names of videos start from.
        held_out: None: all captions; True: those of every 20th video, False: the others.
        longest: frames; longer videos are left out when they are read.
    """

    cameras = ["rgb"]

    def __init__(
        self, captions: Path, videos: Path, *, held_out: bool | None = None, longest: int | None = None
    ) -> None:
        if not videos.is_dir():
            raise UserError(f"{videos}: no such folder; give the folder of the videos as data.videos")
        self.longest = longest
        said = list(read_captions(captions))
        files = list(dict.fromkeys(inside(videos, name) for name, _ in said))
        kept = set(part(files, held_out))
        said = [(name, texts) for name, texts in said if inside(videos, name) in kept]
        recordings = [
            Recording(file_name(name.rpartition(".")[0] or name), (videos / inside(videos, name), texts))
            for name, texts in said
        ]
        self.recordings = distinct(recordings)
        if not self.recordings:
            raise UserError(f"{captions}: no captions in it; one line per video is expected")
        self.fingerprint = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
        self.captions = captions

    def read(self, recording: Recording, every: int) -> Scene:
        path, texts = recording.place
        if not texts:
            raise UserError(f"{self.captions}: the caption of {path.name} is blank")
        if self.longest is not None and (frames := frame_count(path)) > self.longest:
            raise UserError(f"{path}: has {frames} frames, data.longest={self.longest} leaves it out")
        frames, rate = read_video(path, every)
        return Scene({"rgb": frames}, texts, rate / every)


def read_captions(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Name of each video, and its texts: none where they are blank.

    Raises:
        UserError: the file or a caption is missing or of another kind, or all are blank; the line is named.
    """
    blank: UserError | None = None
    worded = False
    readers = {".jsonl": _lines, ".csv": _table, ".json": _something}
    if file.suffix.lower() not in readers:
        raise UserError(
            f"{file}: captions are read from {', '.join(readers)}; give such a file as data.splits"
        )
    try:
        for place, video, texts in readers[file.suffix.lower()](file):
            missing = UserError(f"{file}: {place}: a video or its caption is missing")
            if not video or not texts or None in texts:
                raise missing
            found = [text.strip() for text in read_instructions(texts, f"{file}: {place}: the caption")]
            worded, blank = worded or bool(found), blank or (None if found else missing)
            yield video, found
        if blank and not worded:
            raise blank
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give the captions of the videos as data.splits") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not captions as expected ({error!r})") from None


def _lines(file: Path) -> Iterator[tuple[str, str, list[str]]]:
    with file.open(encoding=ENCODING) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    values = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{file}: line {number}: not JSON ({error})") from None
                texts = values.get("texts", values.get("text"))
                yield f"line {number}", values.get("video"), as_list(texts)


def _table(file: Path) -> Iterator[tuple[str, str, list[str]]]:
    with file.open(encoding=ENCODING, newline="") as lines:
        for row in (table := csv.DictReader(lines)):
            if not {"video", "text"} <= row.keys():
                raise UserError(f"{file}: its first line must name the columns video and text")
            yield f"line {table.line_num}", row["video"], [row["text"]]


def _something(file: Path) -> Iterator[tuple[str, str, list[str]]]:
    for number, entry in enumerate(as_list(json.loads(file.read_text(encoding=ENCODING)))):
        yield f"entry {number}", f"{entry['id']}{SOMETHING_SUFFIX}", [entry["label"]]
