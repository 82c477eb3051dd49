"""Faults around a run: disk, files, loader workers, tracker, clock, memory, numbers. Nothing is lost."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker
from engine_toy import Points, Toy, toy, trainer
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import get_worker_info

from defi.engine import checkpoint, faults, log, output, run
from defi.engine.data import Feed, StepOrder
from defi.engine.log import SpikeDetector, read_metrics
from defi.engine.loop import train
from defi.errors import UserError

CONFIG = {"preset_name": "toy"}


def records(run: Path, kind: str) -> list[dict]:
    return [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == kind]


def equal(a: Path, b: Path) -> bool:
    first, second = (load_file(checkpoint.find_checkpoint(run) / "model.safetensors") for run in (a, b))
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# ---------------------------------------------------------------- numbers


class OneBad(Points):
    """Sample 7 is not a number."""

    def sample(self, index: int, rng: np.random.Generator) -> dict:
        sample = super().sample(index, rng)
        return {**sample, "x": sample["x"] * float("nan")} if index == 7 else sample


def step_of(sample: int, global_batch: int, *, epoch: int = 0) -> int:
    """The step that takes a sample in an epoch."""
    order = StepOrder(22, seed=0, start=0, global_batch=1, micro_batch=1, process=(0, 1))
    return next(p for p in range(100) if order.draw(p) == (epoch, sample)) // global_batch + 1


def test_a_loss_that_is_not_finite_leaves_its_batch(tmp_path: Path) -> None:
    step = step_of(7, 2)
    with pytest.raises(UserError, match=rf"loss is nan at step {step}, first in 'x' of the batch") as caught:
        train(toy(), OneBad(), trainer(global_batch=2, save_every=1), output=tmp_path, config=CONFIG)
    report = tmp_path / "nonfinite" / f"step_{step:08d}_process_0.json"
    assert str(report) in str(caught.value) and "\n" not in str(caught.value)
    written = json.loads(report.read_text())
    assert 7 in written["samples"] and len(written["samples"]) == 2 and written["step"] == step
    texts = written["batches"][0]["text"]
    batch = load_file(report.with_suffix(".safetensors"))
    assert batch["0.x"][texts.index("point 7")].isnan().all() and batch["0.seed"].shape == (2,)


def test_steps_may_be_left_out(tmp_path: Path) -> None:
    """The weights go on as if the step had not been; one more than allowed is an error, over resumes too."""
    settings = trainer(global_batch=2, max_steps=11, skip_nonfinite=1)
    train(toy(), OneBad(), settings, output=tmp_path, config=CONFIG)
    bad = step_of(7, 2)
    assert [record["step"] for record in records(tmp_path, "left_out")] == [bad]
    assert 7 in records(tmp_path, "left_out")[0]["samples"]
    assert [r["step"] for r in records(tmp_path, "train")] == [s for s in range(1, 12) if s != bad]
    assert torch.isfinite(
        load_file(checkpoint.find_checkpoint(tmp_path) / "model.safetensors")["net.0.bias"]
    ).all()
    before = step_of(7, 2, epoch=1) - 1
    message = f"or allow trainer.skip_nonfinite, then continue from step_{before:08d}"
    with pytest.raises(UserError, match=message):
        train(
            toy(), OneBad(), trainer(global_batch=2, max_steps=22, skip_nonfinite=1), output=tmp_path,
            config=CONFIG, resume=True,
        )  # fmt: skip


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_checkpoint_from_before_is_left(dropout: float, tmp_path: Path) -> None:
    """Though none was due: continued without the bad sample, the run is as if nothing had happened."""
    bad = step_of(7, 2)

    class Counting(Toy):
        """Counts samples in its forward pass, as the quantizer does."""

        def __init__(self) -> None:
            super().__init__(toy(dropout=dropout).config)
            self.load_state_dict(toy().state_dict(), strict=False)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, batch: dict) -> dict[str, Tensor]:
            self.count += batch["x"].sum()
            return super().forward(batch)

    settings = {"output": tmp_path / "run", "config": CONFIG}
    assert bad > 2
    with pytest.raises(UserError, match=f"then continue from step_{bad - 1:08d} with resume=true"):
        train(Counting(), OneBad(), trainer(global_batch=2), **settings)
    train(Counting(), Points(), trainer(global_batch=2), **settings, resume=True)
    train(Counting(), Points(), trainer(global_batch=2), output=tmp_path / "whole", config=CONFIG)
    assert equal(tmp_path / "run", tmp_path / "whole")


def test_a_report_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full: the checkpoint comes first, the report is told to be missing."""
    monkeypatch.setattr(faults, "write_file", lambda file, content: full())
    bad = step_of(7, 2)
    message = f"its batch could not be written .*No space left.*; .*then continue from step_{bad - 1:08d}"
    with pytest.raises(UserError, match=message):
        train(toy(), OneBad(), trainer(global_batch=2), output=tmp_path, config=CONFIG)


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


class Layer(torch.nn.Module):
    """Grows without bounds forwards, or backwards."""

    def __init__(self, forwards: bool) -> None:
        super().__init__()
        self.forwards = forwards

    def forward(self, x: Tensor) -> Tensor:
        return x * float("inf") if self.forwards else BadGradient.apply(x)


@pytest.mark.parametrize(
    ("forwards", "message"),
    [(True, "loss is nan at step 1, first in the output of net.2"),
     (False, r"gradient norm is nan.* at step 1, first in the gradient that net.1 receives")],
)  # fmt: skip
def test_the_first_offending_module_is_named(forwards: bool, message: str, tmp_path: Path) -> None:
    model = toy()
    model.net[2] = Layer(forwards)
    before = model.net[0].weight.clone()
    with pytest.raises(UserError, match=message):
        train(model, Points(), trainer(), output=tmp_path, config=CONFIG)
    assert torch.equal(model.net[0].weight, before)


def test_spikes_are_noted_with_their_samples(tmp_path: Path) -> None:
    order = StepOrder(80, seed=0, start=0, global_batch=1, micro_batch=1, process=(0, 1))
    _, huge = order.draw(75)

    class Huge(Points):
        def sample(self, index: int, rng: np.random.Generator) -> dict:
            sample = super().sample(index, rng)
            return {**sample, "x": sample["x"] + 100} if index == huge else sample

    train(
        toy(dropout=0.0), Huge(size=80), trainer(global_batch=1, max_steps=80, lr=1e-5), output=tmp_path,
        config=CONFIG,
    )  # fmt: skip
    (spike,) = records(tmp_path, "spike")
    assert (spike["step"], spike["samples"]) == (76, [huge]) and spike["loss"] > 10 * spike["usual"]


def test_no_spike_where_losses_scatter_as_ever() -> None:
    watch, random = SpikeDetector(), np.random.default_rng(0)
    assert not any(watch.is_spike(loss) for loss in random.normal(1, 0.25, 2000))
    assert not any(watch.is_spike(1.0 + 1e-12 * i) for i in range(300))
    assert watch.is_spike(50.0)


# ---------------------------------------------------------------- disk


def full(*args, **settings):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(toy(), Points(), trainer(max_steps=9), output=tmp_path / "whole", config=CONFIG)
    settings = {"output": tmp_path / "run", "config": CONFIG}
    sync = checkpoint.sync

    def fills_up(path: Path) -> None:
        return full() if "step_00000006" in str(path) else sync(path)

    monkeypatch.setattr(checkpoint, "sync", fills_up)
    with pytest.raises(UserError, match=r"cannot write step_00000006 \(.*No space left") as caught:
        train(toy(), Points(), trainer(max_steps=9, save_every=3), **settings)
    assert "resume=true" in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000003"]
    monkeypatch.setattr(checkpoint, "sync", sync)
    train(toy(), Points(), trainer(max_steps=9, save_every=3), **settings, resume=True)
    assert equal(tmp_path / "whole", tmp_path / "run")


def _write_with_limit(folder: Path, told: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    try:
        train(toy(width=4000), Points(), trainer(max_steps=2), output=folder, config=CONFIG)
    except UserError as error:
        told.write_text(str(error))


def test_a_disk_that_is_full_for_the_kernel_too(tmp_path: Path) -> None:
    """The libraries' own ways of failing, by a real limit on the size of files."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_write_with_limit, args=(tmp_path / "run", tmp_path / "told"))
    process.start()
    process.join()
    assert "cannot write step_00000002" in (tmp_path / "told").read_text()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_numbers_that_cannot_be_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"output": tmp_path, "config": CONFIG}
    write = log.Journal.write
    monkeypatch.setattr(log.Journal, "write", lambda self, *a: full() if a[1] == 5 else write(self, *a))
    with pytest.raises(
        UserError, match="No space left on device; fix that, then continue from step_00000004"
    ):
        train(toy(), Points(), trainer(save_every=2), **settings)


def test_an_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*args, **settings):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(output.Path, "write_text", read_only)
    with pytest.raises(UserError, match=r"run: cannot be written to \(Read-only file system\); .*output="):
        train(toy(), Points(), trainer(), output=tmp_path / "run", config=CONFIG)


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("workers", [0, 2])
def test_a_vanished_file_is_named(workers: int, tmp_path: Path) -> None:
    class Vanished(Points):
        def sample(self, index: int, rng: object) -> dict:
            return {"x": torch.from_numpy(np.load(tmp_path / "gone.npy"))}

    with pytest.raises(UserError, match=r"^data: .*No such file.*gone\.npy'; restore it") as caught:
        train(toy(), Vanished(), trainer(workers=workers), output=tmp_path / "run", config=CONFIG)
    assert "\n" not in str(caught.value)


class SomeDamaged(Points):
    """Samples 3 and 9 cannot be read."""

    def sample(self, index: int, rng: np.random.Generator) -> dict:
        if index in (3, 9):
            raise UserError(f"data/clip_{index}.mp4: damaged; copy it again")
        return super().sample(index, rng)


def test_samples_that_cannot_be_read_are_replaced(tmp_path: Path) -> None:
    """Up to the allowed share, the same ones however many workers read."""
    for workers in (0, 2):
        settings = trainer(max_steps=11, bad_samples=0.25, workers=workers)
        train(toy(), SomeDamaged(), settings, output=tmp_path / str(workers), config=CONFIG)
        told = {record["reason"] for record in records(tmp_path / str(workers), "bad_sample")}
        assert told == {f"sample {i}: data/clip_{i}.mp4: damaged; copy it again" for i in (3, 9)}
    assert equal(tmp_path / "0", tmp_path / "2")
    with pytest.raises(
        UserError, match=r"^data: 2 samples could not be read, more than .*=0.05.*clip_[39].mp4"
    ):
        settings = trainer(max_steps=11, bad_samples=0.05)
        train(toy(), SomeDamaged(), settings, output=tmp_path / "strict", config=CONFIG)


def test_a_loader_worker_that_dies(tmp_path: Path) -> None:
    class Deadly(Points):
        def sample(self, index: int, rng: np.random.Generator) -> dict:
            if get_worker_info() is not None and index == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().sample(index, rng)

    settings = {"output": tmp_path / "run", "config": CONFIG}
    with pytest.raises(UserError, match=r"^trainer.workers=1: a loader worker died .*lower trainer.workers"):
        train(toy(), Deadly(), trainer(workers=1, save_every=1), **settings)
    train(toy(), Points(), trainer(), output=tmp_path / "whole", config=CONFIG)
    resume = bool(checkpoint.list_checkpoints(tmp_path / "run"))
    train(toy(), Deadly(), trainer(), **settings, resume=resume, overwrite=not resume)
    assert equal(tmp_path / "whole", tmp_path / "run")


def test_what_fails_in_a_worker_is_not_taken_for_its_death(tmp_path: Path) -> None:
    class Buggy(Points):
        def sample(self, index: int, rng: np.random.Generator) -> dict:
            raise RuntimeError("stack expects each tensor to be equal size")

    with pytest.raises(RuntimeError, match="Caught RuntimeError in DataLoader worker(.|\n)*equal size"):
        train(toy(), Buggy(), trainer(workers=1), output=tmp_path, config=CONFIG)


ENDS = """
from engine_toy import Points, toy, trainer
from defi.config import one_line_errors
from defi.engine import run
from defi.engine.loop import train
from defi.errors import UserError

def refuse(*args):
    raise UserError("place: told")

{how} = refuse
with one_line_errors():
    train(toy(), Points(), trainer(workers=2), output="run", config={{"preset_name": "toy"}})
"""


@pytest.mark.parametrize("how", ["Points.sample", "run.build_optimizer"])
def test_a_program_with_loader_workers_ends_with_its_error(how: str, tmp_path: Path) -> None:
    """In the loop, or before it has begun; the traceback of the error holds on to the loader."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    command = [sys.executable, "-c", ENDS.format(how=how)]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.endswith("place: told\n")


# ---------------------------------------------------------------- tracker, clock, memory


@pytest.mark.parametrize("fails_at", ["open", "log", "close"])
def test_a_tracker_without_its_server(fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable(TensorBoardTracker):
        def start(self) -> None:
            self.attempt("open")

        def log(self, numbers: object, step: int) -> None:
            self.attempt("log")

        def finish(self) -> None:
            self.attempt("close")

        def attempt(self, act: str) -> None:
            if act == fails_at:
                raise ConnectionError("no route to host")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Unreachable)
    with pytest.warns(
        UserWarning, match="no route to host; the run continues without it, metrics.jsonl has all"
    ):
        train(toy(), Points(), trainer(), output=tmp_path, config=CONFIG, tracker={"name": "tensorboard"})
    assert len(records(tmp_path, "train")) == 10


def test_a_clock_that_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    settings = {"output": tmp_path, "config": CONFIG}
    train(toy(), Points(), trainer(max_steps=4, save_every=2), **settings)
    os.utime(tmp_path / "checkpoints" / "step_00000004", (0, 0))  # by its date the older one
    train(toy(), Points(), trainer(), **settings, resume=True)
    assert checkpoint.read_manifest(tmp_path)["step"] == 10
    numbers = records(tmp_path, "train")
    assert [record["step"] for record in numbers] == list(range(1, 11))
    assert all(record["samples_per_s"] > 0 and record["elapsed_s"] >= 0 for record in numbers)


class Hungry(Toy):
    """Has memory for three samples."""

    def forward(self, batch: dict) -> dict[str, Tensor]:
        if len(batch["x"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(batch)


def test_out_of_memory_at_start_shrinks_the_micro_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from defi.engine.run import Run

    torch.manual_seed(0)
    hungry = Hungry(toy(dropout=0.0).config)
    hungry.load_state_dict(toy(dropout=0.0).state_dict())
    settings = trainer(global_batch=12, max_steps=5)
    with pytest.raises(UserError, match="trainer.micro_batch=12: out of memory; lower it"):
        train(hungry, Points(), settings, output=tmp_path / "later", config=CONFIG)
    # On a GPU the first batch is tried out before the first step.
    next_batches, first = Run.next_batches, iter([True])

    def try_first(run: Run) -> list[dict]:
        run.fits = not next(first, False)
        return next_batches(run)

    monkeypatch.setattr(Run, "next_batches", try_first)
    train(hungry, Points(), settings, output=tmp_path / "small", config=CONFIG)
    assert (
        "12 samples at a time: now 3, 4 times per step; the global batch stays 12" in capsys.readouterr().out
    )
    monkeypatch.undo()
    train(toy(dropout=0.0), Points(), settings, output=tmp_path / "whole", config=CONFIG)
    small, whole = (
        load_file(checkpoint.find_checkpoint(tmp_path / n) / "model.safetensors") for n in ("small", "whole")
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(small[name], tensor, rtol=1e-5, atol=1e-6)


def test_out_of_memory_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, averages and moments are there before anything is trained."""

    def too_much(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run, "build_optimizer", too_much)
    with pytest.raises(UserError, match="out of memory; .*a smaller preset .*, then start again"):
        train(toy(), Points(), trainer(), output=tmp_path / "run", config=CONFIG)
    assert not (tmp_path / "run").exists()


def test_the_trial_of_a_batch_changes_nothing() -> None:
    model, accelerator = toy(), Accelerator()
    feed = Feed(Points(), trainer(), accelerator, seed=0, start=0)
    (batch,) = feed.next_step()
    before, drawn = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    assert faults.micro_batch_fits(model, batch, accelerator)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
