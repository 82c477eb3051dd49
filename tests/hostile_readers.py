"""Folders of valid files, and what reads them once they are damaged (`test_hostile_files.py`)."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from checkpoint_fakes import PLAIN_HEAD, OpenAICLIP, small_clip, write_gidm, write_policy
from diffusers import AutoencoderKLTemporalDecoder
from engine_toy import Points, Toy, toy, trainer
from policy_fakes import (
    PRESET,
    build_gfdm,
    build_gidm,
    build_policy,
    policy_config,
    write_demonstrations,
    write_stages,
)
from rollout_fakes import fake_evaluation
from safetensors.torch import save_file
from stages import build_vae

from benchmarks.rlds_writer import write_videos
from defi import doctor
from defi.benchmarks.calvin.benchmark import SimConfig, read_instructions
from defi.checkpoints.inspect import open_checkpoint
from defi.data import open_dataset
from defi.data.calvin import ANNOTATIONS, CalvinFolder, calvin_robot, frame_name
from defi.data.rlds import RLDSDataset, default_splits
from defi.engine import checkpoint, state
from defi.engine.loop import train
from defi.engine.optimizer import build_optimizer, optimizer_tensors
from defi.engine.plot import curves
from defi.engine.weights import load_strict, read_tensors
from defi.picture import encode_picture
from defi.sim.tasks import INSTRUCTIONS
from defi.video import frame_count, read_frames, write_mp4
from Step1_GFDM.data import read_episodes, read_latents
from Step1_GFDM.model import GFDM
from Step1_GFDM.pipeline import load_part
from Step2_GIDM.model import GIDM
from Step3_DeFI import stages
from Step3_DeFI.compare import comparison_table
from Step3_DeFI.policy import DeFI
from Step3_DeFI.rollout.report import result_table, task_table
from Step3_DeFI.rollout.results import EpisodeLog, Results, read_results
from Step3_DeFI.rollout.simulator import EpisodeResult
from Step3_DeFI.store import PolicyStore, StoreManifest


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
    doctor.report(list(doctor.examine("checkpoint", doctor.check_checkpoint, str(folder))))


def read_state(folder: Path) -> None:
    model = toy()
    optimizer = build_optimizer(model, trainer(), Accelerator())
    file = folder / state.OPTIMIZER
    load_strict(optimizer_tensors(optimizer, model), read_tensors(file), source=file)
    _, generators = state.read_progress(folder)
    with state.preserved_rng():
        state.set_rng_state(generators[0])
        torch.rand(3), np.random.rand(3), random.random()


def make_state(folder: Path) -> None:
    model = toy()
    optimizer = build_optimizer(model, trainer(), Accelerator())
    model({"x": torch.ones(2, 3), "seed": torch.arange(2)})["loss"].backward()
    optimizer.step()
    tensors = optimizer_tensors(optimizer, model)
    progress = state.Progress(step=2, samples=8)
    state.TrainingState(model, None, tensors, progress, [state.rng_state()]).write(folder)


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
        kind="latents", samples=2, rows=2, draws=1, chunk=10, image_size=16, source="x",
        texts=["open the drawer"], fingerprint="0", min_remaining=9, stride=1, seed=0,
        frames=11, robot=calvin_robot(), normalisation="none",
    )  # fmt: skip
    np.save(folder / "inputs.npy", np.zeros((2, 2, 4, 2, 2), np.float16))
    np.save(folder / "actions.npy", np.zeros((11, 7), np.float32))
    np.save(folder / "state.npy", np.zeros((11, 15), np.float32))
    np.save(folder / "index.npy", np.array([[0, 0, 0], [1, 0, 1]]))
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest)))


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
            isinstance(text, str)
            for texts in read_instructions(SimConfig(instructions=str(folder / name)))[1].values()
            for text in texts
        )


def make_sources(folder: Path) -> None:
    for name in ("gfdm", "gidm"):
        (folder / name).mkdir()
    (folder / "policy").mkdir()
    stages.write_sources(folder / "policy", {stage: folder / stage for stage in ("gfdm", "gidm")})


def read_sources(folder: Path) -> None:
    stages.read_sources(folder / "policy", gfdm=None, gidm=None)


def make_lerobot(folder: Path, pictures: str = "h264") -> None:
    from lerobot_fakes import write

    write(folder / "data set", pictures)


def make_lerobot_images(folder: Path) -> None:
    make_lerobot(folder, "images")


def make_lerobot_v21(folder: Path) -> None:
    from lerobot_fakes import as_v21

    make_lerobot(folder.parent)
    as_v21(folder.parent / "data set", folder / "data set")


def read_lerobot(folder: Path) -> None:
    os.environ["DEFI_INDEX"] = str(folder.parent / "index")
    data = open_dataset({"format": "lerobot", "root": str(folder / "data set")}, "all")
    assert len(data.motions.actions) == data.lengths.sum()
    for number in range(len(data)):
        episode = data.episode(number)
        assert isinstance(episode.text(episode.length - 1), str)
        for pictures in data.read(episode, [episode.length - 1, 0], data.cameras).values():
            assert pictures.dtype == np.uint8 and len(pictures) == 2


def make_rlds(folder: Path) -> None:
    write_videos(folder, {"train": [[3, 2], [2]], "val": [[2]]}, size=8)
    read_rlds(folder)  # which makes the index


def read_rlds(folder: Path) -> None:
    """Every picture and value of both splits."""
    for split in (*default_splits(folder / "toy"), "train[1:]"):
        data = RLDSDataset(folder / "toy", split, index=folder / "index")
        picture, language = data.picture("image"), data.language(None)
        for episode in range(min(len(data), 20)):
            length = int(data.lengths[episode])
            frames = data.frames(episode, range(min(length, 20)), picture) if length else ()
            assert all(frame.shape == (8, 8, 3) for frame in frames)
            assert isinstance(data.text(episode, language), str)
            for name in ("action", "is_last", "language_instruction"):
                assert len(data.values(episode, name)) == length


def make_zip(folder: Path) -> None:
    demonstrations = write_demonstrations(folder / "unpacked", lengths=(3, 3))
    shutil.make_archive(str(folder / "demos"), "zip", demonstrations)
    shutil.rmtree(demonstrations)


def read_zip(folder: Path) -> None:
    read_calvin(folder / "demos.zip")


def make_captions(folder: Path) -> None:
    (folder / "videos").mkdir()
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    texts = {"one": "open the drawer", "two": "lift the red block", "three": "turn on the light"}
    for name in texts:
        write_mp4(folder / "videos" / f"{name}.mp4", frames, 10)
        shutil.copy(folder / "videos" / f"{name}.mp4", folder / "videos" / f"{name}.webm")  # of labels.json
    lines = [{"video": f"{name}.mp4", "text": text} for name, text in texts.items()]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "captions.csv").write_text(
        "video,text\n" + "".join(f"{name}.mp4,{text}\n" for name, text in texts.items())
    )
    labels = [{"id": name, "label": text} for name, text in texts.items()]
    (folder / "labels.json").write_text(json.dumps(labels))


def read_all_captions(folder: Path) -> None:
    for name in ("captions.jsonl", "captions.csv", "labels.json"):
        given = {"format": "videos", "root": str(folder), "videos": "videos", "captions": name}
        data = open_dataset(given, "all")
        for episode in map(data.episode, range(min(len(data), 5))):
            assert all(episode.texts) and Path(episode.name).name == episode.name
            data.read(episode, range(0, episode.length, 2), data.cameras)


def make_hdf5(folder: Path) -> None:
    import h5py  # needed by this source alone

    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    coded = [np.frombuffer(encode_picture(frame, "JPEG"), np.uint8) for frame in frames]
    with h5py.File(folder / "episode.hdf5", "w") as file:
        file.create_dataset("data/demo/raw", data=frames, compression="gzip")
        rows = file.create_dataset("data/demo/jpeg", (3,), h5py.vlen_dtype(np.uint8))
        for i, code in enumerate(coded):
            rows[i] = code
        file["data/demo"].attrs["language_instruction"] = "fold the towel"
        file["data/demo/action"], file["data/demo/joints"] = np.ones((3, 4)), np.ones(3, np.int16)


def read_hdf5(folder: Path) -> None:
    given = {"format": "hdf5", "root": str(folder), "groups": "data", "fps": 10}
    given |= {"cameras": ["a:raw", "b:jpeg"], "actions": ["action"], "state": ["joints"]}
    data = open_dataset(given, "all")
    for number in range(min(len(data), 5)):
        episode = data.episode(number)
        frames = range(min(episode.length, 20))
        views = data.read(episode, frames, data.cameras)
        assert {view.shape[-1] for view in views.values()} == {3} and isinstance(episode.text(0), str)
        assert len(data.read_motions(range(episode.start, episode.start + len(frames)))) == len(frames)
    assert len(data.motions.actions) == data.lengths.sum()


def make_foreign(folder: Path) -> None:
    write_gidm(build_gidm(), folder / "lam_idm.ckpt")
    head = PRESET["policy"]["action_head"] | PLAIN_HEAD
    write_policy(build_policy(standardise=False, merge=1, action_head=head), folder / "policy.pt")
    tower = small_clip()
    clip = OpenAICLIP(tower, {"token_embedding.weight": torch.rand(40, 64), "ln_final.bias": torch.rand(64)})
    torch.jit.trace(clip, torch.rand(1, 3, 4, 4).half()).save(folder / "ViT-B-32.pt")
    torch.save(
        {"a": torch.rand(3), "b": torch.rand(2, 2)}, folder / "old.pth", _use_new_zipfile_serialization=False
    )


def read_foreigners(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        found = open_checkpoint(file)
        for tensor in found.tensors.values():
            tensor.float().sum()


def make_results(folder: Path) -> None:
    tasks = tuple(INSTRUCTIONS)[:5]
    outcome = {"tasks": list(tasks), "steps": [10, 20, None]}
    chains = tuple(EpisodeResult(i, outcome, 40, 5, 1.0) for i in range(3))
    evaluation = fake_evaluation(chains=3)
    scores = {limit: evaluation.benchmark.summarise([outcome] * 3, limit) for limit in ("30", "60")}
    run = {"seconds": 75.0, "settings": {"seed": 0}, "renderer": "none", "versions": {}, "started": "2026"}
    log = EpisodeLog(folder, "chains")
    for chain in chains:
        log.append(chain)
    policy = {"kind": "policy", "checkpoint": "x", "fingerprint": "y"}
    results = Results(evaluation.about, policy, evaluation.protocol, run, chains, scores)
    results.save(folder / "results.json")


def read_rollout(folder: Path) -> None:
    results, log = read_results(folder), EpisodeLog(folder, "chains")
    found = log.read(fake_evaluation(chains=3).check)
    assert all(isinstance(chain.index, int) for chain in found.values())
    comparison_table(results, results)
    result_table(results)
    task_table(results)


def make_policy(folder: Path) -> None:
    gfdm, gidm = write_stages(folder)
    DeFI.from_stages(policy_config(), gfdm=gfdm, gidm=gidm).save_pretrained(folder / "policy")


def read_autoencoder(folder: Path) -> None:
    load_part(AutoencoderKLTemporalDecoder, folder)
    build_vae().load_weights(folder)


READERS: dict[str, Reader] = {
    "run": Reader(
        make_run,
        ("checkpoints/*/manifest.json", "checkpoints/*/config.*", "checkpoints/*/*.safetensors",
         "checkpoints/*/ema/*", "metrics.jsonl"),
        read_run,
    ),
    "resume state": Reader(make_state, ("state/*",), read_state),
    "CALVIN": Reader(
        make_calvin,
        ("training/ep_start_end_ids.npy", f"training/{ANNOTATIONS}", "training/scene_info.npy",
         f"training/{frame_name(100)}"),
        read_calvin,
    ),
    "latents": Reader(make_latents, ("annotation/train/0.json", "0.*"), read_all_latents),
    "policy store": Reader(make_store, ("*",), read_store),
    "LeRobot": Reader(make_lerobot, ("*/meta/**/*", "*/data/**/*", "*/videos/**/*"), read_lerobot),
    "LeRobot images": Reader(make_lerobot_images, ("*/data/**/*",), read_lerobot),
    "LeRobot v2.1": Reader(make_lerobot_v21, ("*/meta/*",), read_lerobot),
    "RLDS": Reader(make_rlds, ("toy/1.0.0/*",), read_rlds),
    "RLDS index": Reader(make_rlds, ("index/*/*",), read_rlds),
    "CALVIN in a zip": Reader(make_zip, ("demos.zip",), read_zip),
    "captions": Reader(make_captions, ("captions.*", "labels.json"), read_all_captions),
    "HDF5": Reader(make_hdf5, ("*.hdf5",), read_hdf5, 0.2),  # a process starts after each fault
    "published checkpoints": Reader(make_foreign, ("*",), read_foreigners),
    "rollout": Reader(make_results, ("*",), read_rollout),
    "video": Reader(make_video, ("*.mp4",), read_video),
    "instructions": Reader(make_words, ("*",), read_words),
    "policy": Reader(
        make_policy, ("policy/*",), lambda folder: DeFI.from_pretrained(folder / "policy"), 0.3
    ),
    "autoencoder": Reader(
        lambda folder: build_vae().save_pretrained(folder),
        ("*",),
        read_autoencoder,
        0.3,
    ),
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
