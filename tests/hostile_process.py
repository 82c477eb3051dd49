"""A process that reads damaged files one after the other, and writes down what came of it."""

import json
import os
import random
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from hostile_mutations import damage
from hostile_readers import READERS, Reader

from defi.errors import UserError

ROOM = 2**31  # bytes of memory that a reader may take besides what the process has
PATIENCE = 5.0  # seconds


def run_cases(name: str, place: Path, first: int, last: int) -> None:
    """Read damaged files number `first` … `last` - 1 of a reader; a line per case goes to `place`/log."""
    reader, valid, folder = READERS[name], place / "valid", place / "case"
    torch.set_num_threads(1)
    os.environ["DEFI_INDEX"] = str(place / "index")
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
            start, worked = time.monotonic(), _worked()
            outcome = attempt(reader, folder)
            times = {"seconds": time.monotonic() - start, "work": _worked() - worked}
            log.write(json.dumps({"case": number, "outcome": outcome, **times}) + "\n")
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
            if "defi.data.hdf5" in str(arguments[1]):  # it reads in a process of its own
                return
            acts.write(f"{event} {arguments[:2]}\n")
        elif event == "open" and isinstance(arguments[0], str) and isinstance(arguments[1], str):
            written = any(letter in arguments[1] for letter in "wax+")
            if written and not Path(arguments[0]).resolve().is_relative_to(place.resolve()):
                acts.write(f"writes {arguments[0]}\n")
        else:
            return
        acts.flush()

    sys.addaudithook(hook)


def _worked() -> float:
    """Seconds that this process and those it has waited for have computed."""
    return sum(os.times()[:4])


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
