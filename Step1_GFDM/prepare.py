"""Recordings with instructions → latents, annotations, videos in VPP's layout (`Step1_GFDM.data` reads them).

    python -m Step1_GFDM.prepare data=lerobot data.root=<folder> vae=<run> output=<folder>

Of any data set of `defi.data`, one of these for each episode, or for each part of it with an instruction of
its own (`<episode>-1`, `<episode>-2`, …). An episode's annotation is written last, and makes it count: a
killed run continues with `resume=true`. Processes of `accelerate launch` share the episodes. What is damaged
or has no instruction is reported, noted in `skipped/` and left out; `resume=true` tries it again.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder
from omegaconf import DictConfig
from rich.progress import track
from safetensors.torch import save
from torch import Tensor

from defi.config import entry
from defi.data import Dataset, DataSettings, Episode, read_settings
from defi.data.episode import Frames, distinct, file_name
from defi.data.vpp import MANIFEST
from defi.engine.checkpoint import MANIFEST as CHECKPOINT
from defi.engine.checkpoint import find_weights
from defi.engine.output import check_output, prepare_output, write_file
from defi.engine.weights import fingerprint
from defi.errors import UserError, writing
from defi.files import read_json
from defi.instructions import read_instruction
from defi.processes import processes, share
from defi.video import VIDEO_CODEC, film, prepare_frames
from Step1_GFDM import pipeline
from Step1_GFDM.config import check_counts
from Step1_GFDM.data import LATENTS, SPLITS

SKIPPED = "skipped"
# Pixels a side that an autoencoder alone may ask for: SVD's says 768, and no preset works at that.
LARGEST = 512
BLOCK = 32  # frames of each camera that are in the memory at a time; twice, as the next ones are read
Part = dict[str, Frames] | UserError
Encode = Callable[[Frames], Tensor]


@dataclass
class TakeSettings:
    """What the section `data` says beside its format.

    every: take every n-th frame. Clips are made of what is taken: `Step1_GFDM.data` finds it in the manifest.
    longest: frames; what is longer is left out.
    """

    every: int = 1
    longest: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and value < 1:
                raise UserError(f"data.{name}={value}: must be at least 1")


@dataclass(frozen=True)
class Recording:
    """Frames of an episode, by their positions, and what is said of them; or (`fault`) why there are none.

    texts: name of each of stage 1's episodes → its instruction. fps: of the frames taken.
    """

    split: str
    data: Dataset
    episode: Episode | None = None
    positions: range = range(0)
    fps: float = 0.0
    fault: str = ""
    texts: dict[str, str] = field(default_factory=dict)

    def read(self, size: int) -> Iterator[Part]:
        """Frames of each camera, so many at a time; a fault is the last."""
        try:
            if self.episode is None:
                raise UserError(self.fault)
            shapes = None
            for _, views in self.data.blocks(self.episode, size, self.positions):
                found = [frames.shape[1:] for frames in views.values()]
                if (shapes := shapes or found) != found:
                    where = f"{self.data.root}: episode {self.episode.name}"
                    raise UserError(f"{where}: its pictures change their size; split it where they do")
                yield views
        except UserError as error:
            yield error


def find_recordings(split: str, data: Dataset, take: TakeSettings) -> list[Recording]:
    """Of a data set, damaged ones too; one for all that is said of the same frames.

    Raises:
        UserError: none can be used.
    """

    def recording(episode: Episode, span: range, text: str) -> Recording:
        where = f"{data.root}: episode {episode.name}"
        try:
            if not text:
                raise UserError(f"{where} has no instruction")
            if take.longest is not None and len(span) > take.longest:
                raise UserError(f"{where} has {len(span)} frames, data.longest={take.longest} leaves it out")
            return Recording(split, data, episode, span[:: take.every], data.rate(episode) / take.every)
        except UserError as error:
            return Recording(split, data, fault=str(error))

    found = [(name, "", Recording(split, data, fault=fault)) for name, fault in data.faults.items()]
    for episode in map(data.episode, range(len(data))):
        said = [(span, read_instruction(text, episode.name)) for span, text in episode.sentences()]
        said = [(span, text) for span, text in said if text] or [(range(0), "")]
        for number, (span, text) in enumerate(said, 1):
            name = f"{episode.name}-{number}" if len(said) > 1 else episode.name
            found.append((name, text, recording(episode, span, text)))
    if all(each.fault for *_, each in found):
        raise UserError(f"{data.scope}: nothing can be used for {split}; for instance, {found[-1][2].fault}")
    together: dict[Any, Recording] = {}
    for name, (_, text, each) in zip(distinct(name for name, *_ in found), found):
        frames = name if each.episode is None else (each.episode.start, each.positions)
        together.setdefault(frames, each).texts[name] = text
    return list(together.values())


def identity(section: Mapping[str, Any], settings: DataSettings, take: TakeSettings, data: Dataset) -> dict:
    """What decides how episodes look, for JSON; the place only where the fingerprint may not tell."""
    given = {"format": section["format"], **asdict(settings), **asdict(take)}
    given |= {"every": take.every * data.stored_step, "root": str(Path(settings.root).resolve())}
    left_out = {"index"} | (set() if data.known_by_names else {"root"})
    return {key: value for key, value in given.items() if key not in left_out}


def check_same(file: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UserError if the folder of a manifest was begun with something else."""
    fix = "choose another output="
    before, now = (  # settings first, as the command line names them
        {f"data.{key}": value for key, value in made.pop("data", {}).items()} | made
        for made in (read_json(file, fix), json.loads(json.dumps(manifest)))  # as it comes back from a file
    )
    for key, value in now.items():
        if before.get(key) != value:
            raise UserError(f"{file}: begun with {key}={before.get(key)}, now {value}; {fix}")


def load_vae(path: Path) -> tuple[AutoencoderKLTemporalDecoder, Path]:
    """A VAE and its folder: of a run of `Step1_GFDM.train_vae`, of a diffusers pipeline, or `path` itself."""
    folders = [] if (path / CHECKPOINT).is_file() else [path, path / "vae"]
    folder = next((each for each in folders if (each / "config.json").is_file()), None)
    folder = folder or find_weights(path, "vae")
    return pipeline.load_part(AutoencoderKLTemporalDecoder, folder).requires_grad_(False), folder


def view_files(job: Recording, name: str) -> list[tuple[str, str]]:
    """Latents and video of each camera in stage 1's episode of this name, below the output."""
    cameras = [f"{job.split}/{name}/{camera}" for camera in distinct(map(file_name, job.data.cameras))]
    return [(f"latent_videos/{each}.safetensors", f"videos/{each}.mp4") for each in cameras]


def write_views(
    output: Path, files: list[tuple[str, str]], parts: Iterator[Part], encode: Encode, fps: float
) -> int | UserError:
    """Latents and videos (`files`) of all cameras: the number of frames, or why they cannot be read."""
    coded: list[list[Tensor]] = [[] for _ in files]
    films: list[Callable[[Frames], None]] = []
    try:
        with ExitStack() as stack:
            for views in parts:
                if isinstance(views, UserError):
                    raise views
                films = films or [stack.enter_context(film(output / video, fps)) for _, video in files]
                for frames, write, latents in zip(views.values(), films, coded):
                    latents.append(encode(frames))
                    write(frames)
    except UserError as fault:
        return fault
    for (file, _), latents in zip(files, coded):
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        write_file(output / file, save({LATENTS: torch.cat(latents).contiguous()}))
    return sum(map(len, coded[0]))


def write_episode(output: Path, name: str, job: Recording, made: str, frames: int) -> None:
    """Copies of latents and videos, where they were made for another (`made`) of the same frames; then the
    annotation that makes them count."""
    files = view_files(job, name)
    for file, other in zip(chain(*files), chain(*view_files(job, made))) if made != name else ():
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        write_file(output / file, (output / other).read_bytes())
    annotation = {
        "episode_id": name,
        "texts": [job.texts[name]],
        "videos": [{"video_path": video} for _, video in files],
        "latent_videos": [{"latent_video_path": latents} for latents, _ in files],
        "video_length": frames,
        "fps": job.fps,
    }
    write_file(output / "annotation" / job.split / f"{name}.json", json.dumps(annotation))


def write_episodes(output: Path, recordings: list[Recording], encode: Encode, size: int) -> None:
    """This process's share of the episodes that are not there yet, or notes of why they are left out.

    size: frames of each camera that are read at a time.
    """

    def missing(job: Recording) -> dict[str, str]:
        folder = output / "annotation" / job.split
        return {name: text for name, text in job.texts.items() if not (folder / f"{name}.json").exists()}

    def read_ahead() -> Iterator[tuple[Recording, Part]]:
        """The next frames are read while these are encoded."""
        parts = ((job, part) for job in jobs for part in job.read(size))
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(next, parts, None)
            while part := following.result():
                following = pool.submit(next, parts, None)
                yield part

    jobs = share([replace(job, texts=texts) for job in recordings if (texts := missing(job))])
    quiet, by_job = not processes().is_local_main_process, groupby(read_ahead(), itemgetter(0))
    for job, parts in track(by_job, "latents", total=len(jobs), disable=quiet):
        first = next(iter(job.texts))
        with writing(output, f"episode {job.split}/{first}"):
            made = write_views(output, view_files(job, first), (part for _, part in parts), encode, job.fps)
        for name in job.texts:
            note = output / SKIPPED / job.split / f"{name}.txt"
            with writing(output, f"episode {job.split}/{name}"):
                if isinstance(made, UserError):
                    print(f"left out: {made}")
                    write_file(note, f"{made}\n")
                else:
                    note.unlink(missing_ok=True)  # before the annotation, after which nothing is done again
                    write_episode(output, name, job, first, made)


@entry("step1_prepare")
def main(cfg: DictConfig) -> None:
    state = processes()
    output = check_output(cfg.output, resume=cfg.resume, overwrite=cfg.overwrite)
    check_counts(cfg, batch=1, **({} if cfg.image_size is None else {"image_size": 1}))
    settings, take = read_settings(cfg.data, TakeSettings)
    sets = {split: settings.open(part) for split, part in zip(SPLITS, ("training", "held_out"))}
    recordings = [each for split, data in sets.items() for each in find_recordings(split, data, take)]
    vae, weights = load_vae(Path(cfg.vae))
    scaling, image_size = vae.config.scaling_factor, cfg.image_size or vae.config.sample_size
    if cfg.image_size is None and image_size > LARGEST:
        raise UserError(
            f"image_size=: {weights} is for pictures of {image_size} pixels a side; "
            "give that of your video model, image_size=256 for preset=paper"
        )
    manifest = {  # what the latents are made of and with; a resumed run must agree in all of it
        "data": identity(cfg.data, settings, take, sets["train"]),
        "splits": {split: data.fingerprint for split, data in sets.items()},
        "vae": fingerprint(weights),
        "scaling": scaling,
        "image_size": image_size,
        "cameras": list(sets["train"].cameras),
        "latents": "float16 safetensors, posterior's mode × scaling",
        "videos": VIDEO_CODEC,
    }
    if cfg.resume and (output / MANIFEST).is_file():
        check_same(output / MANIFEST, manifest)
    state.wait_for_everyone()  # before the folder changes, all have checked it
    if state.is_main_process:
        prepare_output(output, resume=cfg.resume, overwrite=cfg.overwrite)
        with writing(output, MANIFEST):
            for folder in (f"{kind}/{split}" for kind in ("annotation", SKIPPED) for split in SPLITS):
                (output / folder).mkdir(parents=True, exist_ok=True)
            write_file(output / MANIFEST, json.dumps(manifest, indent=1))
    state.wait_for_everyone()

    vae.to(state.device)

    @torch.inference_mode()
    def encode(frames: Frames) -> Tensor:
        """Scaled latents (mode of the posterior), float16 [F, 4, h, w]."""
        parts = prepare_frames(frames, image_size).split(cfg.batch)
        modes = [vae.encode(part.to(vae.device)).latent_dist.mode() for part in parts]
        return (torch.cat(modes).cpu() * scaling).half()

    # Whole batches: they are the same, whatever is read at a time.
    write_episodes(output, recordings, encode, max(1, BLOCK // cfg.batch) * cfg.batch)
    state.wait_for_everyone()
    for split in SPLITS if state.is_main_process else ():
        count, skipped = (len(list((output / f / split).glob("[!.]*"))) for f in ("annotation", SKIPPED))
        notes = f"see {output / SKIPPED / split}"
        print(
            f"{output}: {count} episodes in {split}" + (f"; {skipped} left out, {notes}" if skipped else "")
        )
        if not count:
            raise UserError(f"{output}: no episode of {split} could be read; {notes}")


if __name__ == "__main__":
    main()
