"""Valid files, ways to damage them, and what reads them in a process of its own (`test_hostile_files.py`)."""

import io
import json
import math
import os
import random
import resource
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_toy import Points, Toy, toy, trainer
from policy_fakes import build_gfdm, build_gidm, write_demonstrations
from safetensors.torch import save_file
from torch.optim import AdamW

from defi.calvin import ANNOTATIONS, CalvinFolder, frame_name
from defi.engine import checkpoint, state
from defi.engine.loop import train
from defi.engine.plot import curves
from defi.errors import UserError
from defi.sim.tasks import INSTRUCTIONS
from defi.video import frame_count, read_frames, write_mp4
from Step1_GFDM.data import read_episodes, read_latents
from Step1_GFDM.model import GFDM
from Step2_GIDM.model import GIDM
from Step3_DeFI.data import PolicyStore, StoreManifest
from Step3_DeFI.rollout.protocol import read_phrasings
from Step3_DeFI.sources import Sources

ROOM = 2**31  # bytes of memory that a reader may take besides what the process has
PATIENCE = 5.0  # seconds

# ---------------------------------------------------------------- damage


def damage_bytes(data: bytes, chance: random.Random) -> bytes:
    """Flip, cut, zero, repeat or exchange some bytes."""
    kind = chance.randrange(8)
    at = chance.randrange(max(len(data), 1))
    if kind <= 2:  # near the start, where headers are, as often as anywhere
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 8))):
            limit = chance.choice((16, 256, len(changed)))
            changed[chance.randrange(min(limit, len(changed)))] = chance.randrange(256)
        return bytes(changed)
    if kind == 3:
        return data[:at]
    if kind == 4:
        return data[:at] + chance.choice((b"\0", b"\xff")) * min(64, len(data) - at) + data[at + 64 :]
    if kind == 5:
        return data[:at] + data[max(0, at - 100) :]
    if kind == 6:
        return data[:at] + chance.randbytes(chance.randrange(1, 100)) + data[at:]
    size = chance.choice((2, 4, 8))
    at = chance.choice((0, at))
    number = chance.choice((2**31 - 1, 2**63 - 1, 10**9, 2 ** (8 * size) - 1)) % 2 ** (8 * size)
    return data[:at] + number.to_bytes(size, "little") + data[at + size :]


EVIL: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**6, 10**12, 10**30, 1e308, math.nan, "", "x" * 10_000, "../../../../etc/passwd"),
    *("/etc/passwd", "\0", "${oc.env:HOME}", "<script>alert(1)</script>", [], {}, [[[[]]]], {"a": {"b": {}}}),
    {"_target_": "os.system", "_args_": ["touch pwned"]},
)


def damage_values(values: Any, chance: random.Random) -> Any:
    """Replace, remove or repeat a value somewhere inside containers."""
    spots = list(_spots(values))
    if not spots:
        return chance.choice(EVIL)
    container, key = chance.choice(spots)
    kind = chance.randrange(5)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container[key], (int, float)):
        container[key] *= chance.choice((-1, 1000, 10**7, 0.5))
    elif kind == 2 and isinstance(container, list):
        container += [container[key]] * chance.choice((1, 1000))
    else:
        container[key] = chance.choice(EVIL)
    return values


def _spots(values: Any) -> Iterator[tuple[Any, Any]]:
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        yield values, key
        if isinstance(value, (dict, list)):
            yield from _spots(value)


def damage(name: str, data: bytes, chance: random.Random) -> bytes:
    """A damaged version of a file: of what it means, where its format is known, or of its bytes."""
    suffix = Path(name).suffix
    if chance.random() < 0.4:
        return damage_bytes(data, chance)
    if suffix == ".json":
        if chance.random() < 0.05:
            return chance.choice(
                (b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, b"null", b'"text"', b"[1]")
            )
        return json.dumps(damage_values(json.loads(data), chance)).encode()
    if suffix == ".yaml":
        return chance.choice(YAMLS) if chance.random() < 0.3 else damage_bytes(data, chance)
    if suffix == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        header = json.dumps(damage_values(json.loads(data[8 : 8 + size]), chance)).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    if suffix in (".npz", ".pt"):
        return damage_member(data, chance)
    if suffix == ".npy":
        return damage_header(data, chance)
    return damage_bytes(data, chance)


YAMLS = (
    b"!!python/object/apply:os.system ['touch pwned']",
    b"a: !!python/name:os.system",
    b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(f"{n}: &{n} [{','.join(['*' + p] * 9)}]\n".encode() for p, n in zip("abcdefgh", "bcdefghi")),
    b"_target_: os.system\n_args_: [touch pwned]",
    b"a: ${oc.env:HOME}\nb: ${c}\nc: ${b}",
    b"[" * 3000,
    b"- 1\n- 2",
    b"just text",
    b"",
)


def damage_header(data: bytes, chance: random.Random) -> bytes:
    """A `.npy` file with another type or shape in its header."""
    shape = chance.choice(
        ("(10**9,)", "(1000000000000,)", "(-1,)", "()", "(2, 3)", "(0, 2)", "'x'", "(1.5,)")
    )
    dtype = chance.choice(("'<f8'", "'|O'", "'<U1000000000'", "'|V0'", "[('a', '<i8')]", "'<i8'", "None"))
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    start = 10 + int.from_bytes(data[8:10], "little") if len(data) > 10 else len(data)
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data[start:]


def damage_member(data: bytes, chance: random.Random) -> bytes:
    """A zip archive with one member damaged, and checksums that fit it; or one that grows when it is read."""
    out, bomb = io.BytesIO(), chance.random() < 0.02
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        names = old.namelist()
        target = chance.choice(names)
        for name in names:
            content = old.read(name)
            if name == target:
                content = (
                    damage_header(content, chance) if name.endswith(".npy") else damage_bytes(content, chance)
                )
                if bomb:
                    content = content[:128] + bytes(2**28)
            new.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED if bomb else zipfile.ZIP_STORED)
    return out.getvalue()


# ---------------------------------------------------------------- readers


@dataclass(frozen=True)
class Reader:
    """What makes a folder of valid files, which of them are damaged (patterns), and what reads the folder."""

    make: Callable[[Path], None]
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    share: float = 1.0  # of the cases that the fastest readers get


def make_run(folder: Path) -> None:
    train(
        toy(), Points(), trainer(max_steps=2), output=folder, config={"preset_name": "toy", "a": [1.5, "b"]}
    )


def read_run(folder: Path) -> None:
    checkpoint.read_run_config(folder)
    manifest = checkpoint.read_manifest(folder, "gidm")
    assert isinstance(manifest["step"], int)
    Toy.from_pretrained(checkpoint.find_weights(folder, "gidm"))
    curves(folder)


def read_state(folder: Path) -> None:
    model = toy()
    optimizer = AdamW([p for _, p in model.trainable()])
    state.load_optimizer(folder, optimizer, [name for name, _ in model.trainable()])
    _, generators = state.load_progress(folder)
    with state.preserved_rng():
        state.set_rng_state(generators[0])
        torch.rand(3), np.random.rand(3), random.random()


def make_state(folder: Path) -> None:
    model = toy()
    optimizer = AdamW([p for _, p in model.trainable()])
    model({"x": torch.ones(2, 3), "seed": torch.arange(2)})["loss"].backward()
    optimizer.step()
    names = [name for name, _ in model.trainable()]
    state.save_optimizer(folder, state.optimizer_tensors(optimizer, names))
    state.save_progress(folder, state.Progress(step=2, samples=8), [state.rng_state()])


def make_calvin(folder: Path) -> None:
    write_demonstrations(folder, lengths=(3, 3))


def read_calvin(folder: Path) -> None:
    data = CalvinFolder(folder / "training")
    assert all(span.start <= span.end for span in data.spans)
    assert data.scenes is not None
    data.frame(100)


def make_latents(folder: Path) -> None:
    annotation = {
        "episode_id": "0", "texts": ["open the drawer"], "video_length": 5,
        "videos": [{"video_path": "videos/0.mp4"}],
        "latent_videos": [{"latent_video_path": f"0.{suffix}"} for suffix in ("safetensors", "pt")],
    }  # fmt: skip
    (folder / "annotation" / "train").mkdir(parents=True)
    (folder / "annotation" / "train" / "0.json").write_text(json.dumps(annotation))
    latents = torch.rand(5, 4, 4, 4)
    save_file({"latents": latents}, folder / "0.safetensors")
    torch.save(latents, folder / "0.pt")


def read_all_latents(folder: Path) -> None:
    for episode in read_episodes(folder, "train"):
        for file in episode.latents + episode.videos:
            assert (folder / file).resolve().is_relative_to(folder.resolve())
        for file in episode.latents:
            assert read_latents(folder / file, np.arange(5)).shape[0] == 5


def make_store(folder: Path) -> None:
    manifest = StoreManifest(
        kind="latents", samples=2, rows=2, draws=1, look=[2, 4, 2, 2], chunk=10, image_size=16, source="x",
        texts=["open the drawer"], fingerprint="0", tail=9, stride=1, seed=0,
    )  # fmt: skip
    np.save(folder / "inputs.npy", np.zeros((2, 2, 4, 2, 2), np.float16))
    np.save(folder / "actions.npy", np.zeros((2, 10, 7), np.float32))
    np.save(folder / "index.npy", np.array([[0, 0], [1, 0]]))
    (folder / "manifest.json").write_text(manifest.to_json())


def read_store(folder: Path) -> None:
    store = PolicyStore(folder)
    for i in range(min(len(store), 100)):
        assert isinstance(store[i]["text"], str)


def make_video(folder: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    write_mp4(folder / "video.mp4", frames, 10)


def read_video(folder: Path) -> None:
    count = frame_count(folder / "video.mp4")
    read_frames(folder / "video.mp4", range(min(count, 12)))


def make_words(folder: Path) -> None:
    text = "".join(f"{task}:\n  - {json.dumps(texts[0])}\n" for task, texts in INSTRUCTIONS.items())
    (folder / "words.yaml").write_text(text)
    np.save(folder / "words.npy", {task: {"ann": list(texts)} for task, texts in INSTRUCTIONS.items()})


def read_words(folder: Path) -> None:
    for name in ("words.yaml", "words.npy"):
        assert all(
            isinstance(text, str) for texts in read_phrasings(folder / name).values() for text in texts
        )


def make_sources(folder: Path) -> None:
    for name in ("gfdm", "gidm"):
        (folder / name).mkdir()
    (folder / "policy").mkdir()
    Sources.at(gfdm=folder / "gfdm", gidm=folder / "gidm").write(folder / "policy")


def read_sources(folder: Path) -> None:
    Sources.read(folder / "policy", gfdm=None, gidm=None)


READERS: dict[str, Reader] = {
    "run": Reader(
        make_run,
        ("checkpoints/*/manifest.json", "checkpoints/*/config.*", "checkpoints/*/*.safetensors",
         "checkpoints/*/ema/*", "metrics.jsonl"),
        read_run,
    ),
    "resume state": Reader(make_state, ("*",), read_state),
    "CALVIN": Reader(
        make_calvin,
        ("training/ep_start_end_ids.npy", f"training/{ANNOTATIONS}", "training/scene_info.npy",
         f"training/{frame_name(100)}"),
        read_calvin,
    ),
    "latents": Reader(make_latents, ("annotation/train/0.json", "0.*"), read_all_latents),
    "policy store": Reader(make_store, ("*",), read_store),
    "video": Reader(make_video, ("*.mp4",), read_video),
    "instructions": Reader(make_words, ("*",), read_words),
    "sources": Reader(make_sources, ("policy/sources.json",), read_sources, 0.3),
    "gfdm": Reader(
        lambda folder: build_gfdm().save_pretrained(folder),
        ("gfdm.json", "*/config.json", "*/*_config.json", "*/*.json", "unet/*.safetensors", "text/*"),
        lambda folder: GFDM.from_pretrained(folder),
        0.3,
    ),
    "gidm": Reader(
        lambda folder: build_gidm().save_pretrained(folder),
        ("config.json", "*.safetensors", "*/*"),
        lambda folder: GIDM.from_pretrained(folder),
        0.3,
    ),
}  # fmt: skip


# ---------------------------------------------------------------- running them


def run_cases(name: str, place: Path, first: int, last: int) -> None:
    """Read damaged files number `first` … `last` - 1 of a reader; a line per case goes to `place`/log."""
    reader, valid, folder = READERS[name], place / "valid", place / "case"
    torch.set_num_threads(1)
    if not valid.exists():
        valid.mkdir(parents=True)
        reader.make(valid)
        reader.read(valid)  # also: what is read for the first time takes its time and memory now
    else:
        reader.read(valid)
    files = sorted({p for pattern in reader.files for p in valid.glob(pattern) if p.is_file()})
    watch_acts(place)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + ROOM, hard))
    os.chdir(place)
    with (place / "log").open("a") as log:
        for number in range(first, last):
            chance = random.Random(f"{name} {number}")
            target = chance.choice(files)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(valid, folder)
            relative = target.relative_to(valid)
            (folder / relative).write_bytes(damage(target.name, target.read_bytes(), chance))
            log.write(json.dumps({"case": number, "file": str(relative)}) + "\n")
            log.flush()
            start = time.monotonic()
            outcome = attempt(reader, folder)
            seconds = time.monotonic() - start
            log.write(json.dumps({"case": number, "outcome": outcome, "seconds": seconds}) + "\n")
            log.flush()


def attempt(reader: Reader, folder: Path) -> str:
    """ "read", "refused", or what is wrong with how the reader took it."""
    try:
        reader.read(folder)
    except UserError as error:
        message = str(error)
        if "\n" in message.strip():
            return f"more than one line: {message!r}"
        return "refused" if {"/", "="} & set(message.split(": ")[0]) else f"names no file: {message}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def watch_acts(place: Path) -> None:
    """Note in `place`/acts every program that is started and every file that is written elsewhere."""
    acts = (place / "acts").open("a")

    def hook(event: str, arguments: tuple) -> None:
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork"):
            acts.write(f"{event} {arguments[:2]}\n")
        elif event == "open" and isinstance(arguments[0], str) and isinstance(arguments[1], str):
            written = any(letter in arguments[1] for letter in "wax+")
            if written and not Path(arguments[0]).resolve().is_relative_to(place.resolve()):
                acts.write(f"writes {arguments[0]}\n")
        else:
            return
        acts.flush()

    sys.addaudithook(hook)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
