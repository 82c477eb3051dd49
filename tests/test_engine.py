"""The training loop on a toy model: what it learns, writes, refuses and stops at."""

import ast
import json
import sys
from dataclasses import fields, replace
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_toy import Points, Toy, ToyConfig, toy, trainer
from omegaconf import OmegaConf
from safetensors.torch import load_file

from defi.config import CONFIG_DIR
from defi.engine import checkpoint, plot
from defi.engine.config import TrainerConfig
from defi.engine.data import StepOrder
from defi.engine.log import read_metrics
from defi.engine.loop import train
from defi.engine.optimizer import EMA, learning_rate
from defi.engine.output import prepare_output
from defi.errors import UserError

CONFIG = {"preset_name": "toy", "trainer": {"lr": 1e-2}}


def records(run: Path, kind: str) -> list[dict]:
    return [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == kind]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_weights(a: Path, b: Path, **tolerance: float) -> None:
    for name, tensor in weights(a).items():
        torch.testing.assert_close(tensor, weights(b)[name], **(tolerance or {"rtol": 0, "atol": 0}))


def test_the_loop_learns_and_leaves_a_readable_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    final = train(
        toy(dropout=0.0), Points(), trainer(max_steps=150, log_every=10, lr=0.02), output=run, config=CONFIG
    )
    losses = [record["loss"] for record in records(run, "train")]
    assert [record["step"] for record in records(run, "train")] == list(range(10, 151, 10))
    assert losses[-1] < 0.6 * losses[0]
    assert {"lr", "grad_norm", "samples_per_s", "data_wait", "level", "epoch"} <= records(run, "train")[
        0
    ].keys()
    manifest = checkpoint.read_manifest(run, "gidm")
    assert (manifest["step"], manifest["preset"]) == (150, "toy")
    assert manifest["data"] == {"size": 22, "fingerprint": "points"}
    assert checkpoint.read_run_config(run) == CONFIG
    assert final == checkpoint.find_checkpoint(run)
    loaded, averaged = Toy.from_pretrained(final), Toy.from_pretrained(checkpoint.find_weights(run))
    assert not torch.equal(loaded.net[0].weight, averaged.net[0].weight)
    assert not list(run.rglob("*.pt")) and not list(run.rglob("*.pkl"))


def test_no_steps_leave_the_initial_weights(tmp_path: Path) -> None:
    """To compare with what was trained; like any run it goes on, here from nothing learned."""
    model, run = toy(), tmp_path / "run"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for resume in (False, True):
        settings = {"output": run, "config": CONFIG, "resume": resume}
        final = train(model, Points(), trainer(max_steps=0, epochs=2), **settings)
        assert final.name == "step_00000000" and checkpoint.read_manifest(run)["step"] == 0
        for file in (final, checkpoint.find_weights(run)):
            assert all(torch.equal(tensor, before[name]) for name, tensor in weights(file).items())


def test_epochs_end_on_every_pass_and_the_frozen_network_stays(tmp_path: Path) -> None:
    model = toy()
    before = {name: t.clone() for name, t in model.teacher.state_dict().items()}
    train(model, Points(size=10), trainer(max_steps=10), output=tmp_path / "run", config=CONFIG)
    ends = records(tmp_path / "run", "epoch")
    assert [(record["step"], record["seen"]) for record in ends] == [(3, 1), (5, 2), (8, 3), (10, 4)]
    for name, tensor in model.teacher.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not model.teacher.training
    assert not any(
        name.startswith("teacher.") for name in weights(checkpoint.find_checkpoint(tmp_path / "run"))
    )


@pytest.mark.parametrize(("processes", "micro"), [(1, 6), (1, 2), (2, 3), (3, 1)])
def test_every_sample_comes_once_per_epoch_however_it_is_split(processes: int, micro: int) -> None:
    size, global_batch, steps = 9, 6, 6

    def micro_batches(rank: int, start: int, count: int) -> list[list[tuple[int, int]]]:
        order = StepOrder(
            size, seed=3, start=start, global_batch=global_batch, micro_batch=micro, process=(rank, processes)
        )
        stream = iter(order)
        return [next(stream) for _ in range(count * global_batch // processes // micro)]

    parts = [micro_batches(rank, 0, steps) for rank in range(processes)]
    draws = sorted(draw for part in parts for batch in part for draw in batch)
    assert draws == [(epoch, index) for epoch in range(4) for index in range(size)]
    assert all(len(batch) == micro for part in parts for batch in part)
    again = micro_batches(0, 2 * global_batch, steps - 2)
    assert again == parts[0][-len(again) :]


def test_accumulation_does_not_change_the_result(tmp_path: Path) -> None:
    folders = [
        train(
            toy(dropout=0.0), Points(), trainer(max_steps=8, micro_batch=micro), output=tmp_path / str(micro),
            config=CONFIG,
        )
        for micro in (4, 1)
    ]  # fmt: skip
    assert_equal_weights(*folders, rtol=1e-5, atol=1e-6)


def test_ema_follows_its_formula_and_steps_aside() -> None:
    model = toy()
    ema = EMA(model, decay=0.9)
    parameter = model.net[0].bias
    expected = parameter.detach().clone()
    for update in range(20):
        with torch.no_grad():
            parameter.add_(1.0)
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * parameter.detach()
        ema.update()
    now = parameter.detach().clone()
    with ema.applied():
        torch.testing.assert_close(parameter.detach(), expected)
    assert torch.equal(parameter, now)
    assert len(ema.average) == 4  # the teacher is not averaged


def test_constant_schedule_warms_up() -> None:
    rates = [learning_rate(step, TrainerConfig(lr=1.0, warmup=0.3, max_steps=10)) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7)


def test_a_run_may_end_after_epochs(tmp_path: Path) -> None:
    """As loaders that fill up the last batch count: ⌈N / global batch⌉ steps, of 22 samples six of four."""
    settings = trainer(max_steps=None, epochs=2, schedule="tri_stage")
    train(toy(), Points(), settings, output=tmp_path / "run", config=CONFIG)
    rates = [record["lr"] for record in records(tmp_path / "run", "train")]
    whole = replace(settings, max_steps=12)
    assert rates == pytest.approx([learning_rate(step, whole) for step in range(12)])
    assert [record["epoch"] for record in records(tmp_path / "run", "epoch")] == [1, 2]


@pytest.mark.parametrize(
    ("settings", "samples", "steps"),
    [
        ({"epochs": 36, "global_batch": 160}, 696_473, 156_708),  # stage 3 as documented
        ({"epochs": 3, "global_batch": 8, "passes": 8}, 10, 30),  # each of 8 processes walks 10 samples
        ({"epochs": 3, "global_batch": 8, "max_steps": 4}, 10, 4),  # what is reached first
        ({"max_steps": 4}, 10, 4),
    ],
)
def test_steps_of_epochs(settings: dict, samples: int, steps: int) -> None:
    assert TrainerConfig(**{"max_steps": None} | settings).for_samples(samples).max_steps == steps


def test_an_epoch_may_be_several_passes(tmp_path: Path) -> None:
    settings = trainer(max_steps=None, epochs=2, passes=2)
    train(toy(), Points(), settings, output=tmp_path / "run", config=CONFIG)
    ends = [record["step"] for record in records(tmp_path / "run", "epoch")]
    assert ends == [11, 22]  # 44 samples each


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    scores = {2: 0.1, 4: 0.9, 6: 0.3, 8: 0.2, 10: 0.5}
    run = tmp_path / "run"
    settings = trainer(max_steps=10, keep=2, save_every=1, rollout_every=2, best_metric="length")
    train(
        toy(),
        Points(),
        settings,
        output=run,
        config=CONFIG,
        evaluate=lambda model, step, folder: {"length": scores[step]},
    )
    kept = [folder.name for folder in sorted((run / "checkpoints").iterdir())]
    assert kept == ["step_00000004", "step_00000009", "step_00000010"]
    assert checkpoint.read_manifest(run / "checkpoints" / "step_00000004")["metrics"] == {"length": 0.9}
    assert [record["length"] for record in records(run, "evaluate")] == list(scores.values())


def test_the_best_by_another_metric(tmp_path: Path) -> None:
    """Resumed with another `best_metric`, a run does not compare with numbers of the old one."""
    scores = {2: 0.1, 4: 0.9, 6: 0.2, 8: 0.1}
    settings = {"output": tmp_path, "config": CONFIG}
    often = {"keep": 1, "rollout_every": 2}
    train(
        toy(), Points(), trainer(max_steps=1, keep=1, rollout_every=1, best_metric="length"), **settings,
        evaluate=lambda model, step, folder: {"length": 3.5},
    )  # fmt: skip
    train(
        toy(), Points(), trainer(max_steps=9, best_metric="success", **often), **settings, resume=True,
        evaluate=lambda model, step, folder: {"success": scores[step]},
    )  # fmt: skip
    assert [folder.name[-2:] for folder in sorted((tmp_path / "checkpoints").iterdir())] == ["04", "09"]


def test_a_best_metric_that_no_evaluation_reports(tmp_path: Path) -> None:
    settings = trainer(max_steps=9, rollout_every=3, best_metric="sucess")
    message = "best_metric=sucess: choose one .* reports: length, success, then continue from step_00000003"
    with pytest.raises(UserError, match=message):
        train(
            toy(), Points(), settings, output=tmp_path, config=CONFIG,
            evaluate=lambda model, step, folder: {"success": 1.0, "length": 2.0},
        )  # fmt: skip


def test_looking_at_the_model_does_not_disturb_the_training(tmp_path: Path) -> None:
    seen = []

    def preview(model: Toy, step: int, folder: Path) -> dict[str, float]:
        torch.manual_seed(step)
        (folder / "picture.txt").write_text("a picture")
        seen.append((step, model.training, torch.is_grad_enabled(), model.net[0].weight.clone()))
        return {"drawn": torch.rand(()).item()}

    quiet = train(toy(), Points(), trainer(), output=tmp_path / "quiet", config=CONFIG)
    watched = train(
        toy(), Points(), trainer(preview_every=5), output=tmp_path / "watched", config=CONFIG, preview=preview
    )
    assert_equal_weights(quiet, watched)
    assert [entry[:3] for entry in seen] == [(5, False, False), (10, False, False)]
    assert torch.equal(seen[-1][3], weights(watched / "ema")["net.0.weight"])
    assert (tmp_path / "watched" / "previews" / "step_00000005" / "picture.txt").is_file()
    assert len(records(tmp_path / "watched", "preview")) == 2


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(tmp_path: Path) -> None:
    class Broken(Points):
        def sample(self, index: int, rng: object) -> dict:
            sample = super().sample(index, rng)
            return {**sample, "x": sample["x"] * float("nan")} if index == 7 else sample

    order = StepOrder(22, seed=0, start=0, global_batch=1, micro_batch=1, process=(0, 1))
    position = next(p for p in range(22) if order.draw(p)[1] == 7)
    model = toy()
    with pytest.raises(UserError, match=rf"the loss is nan at step {position + 1}") as caught:
        train(
            model,
            Broken(),
            trainer(global_batch=1, save_every=1, max_steps=30),
            output=tmp_path,
            config=CONFIG,
        )
    assert "\n" not in str(caught.value) and f"step_{position:08d}" in str(caught.value)
    saved = weights(checkpoint.find_checkpoint(tmp_path))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in saved.items())


def test_an_error_of_the_data_set_stays_one_line(tmp_path: Path) -> None:
    class Vanished(Points):
        def sample(self, index: int, rng: object) -> dict:
            raise UserError("data/clip_3.mp4: missing; restore it")

    for workers in (0, 1):
        with pytest.raises(UserError) as caught:
            train(toy(), Vanished(), trainer(workers=workers), output=tmp_path / str(workers), config=CONFIG)
        assert str(caught.value) == "data/clip_3.mp4: missing; restore it"


def test_bfloat16_trains(tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # one precision per process otherwise
    try:
        model = toy(dropout=0.0)
        train(
            model, Points(), trainer(precision="bf16", max_steps=60), output=tmp_path / "run", config=CONFIG
        )
        assert model.net[0].weight.dtype == torch.float32
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    losses = [record["loss"] for record in records(tmp_path / "run", "train")]
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:20])


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(
        toy(),
        Points(),
        trainer(max_steps=2),
        output=tmp_path / "run",
        config=CONFIG,
        tracker={"name": "tensorboard"},
    )
    assert any((tmp_path / "run" / "tensorboard").iterdir())


def test_curves_are_drawn_from_the_numbers(tmp_path: Path) -> None:
    train(toy(), Points(), trainer(log_every=2), output=tmp_path / "run", config=CONFIG)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 11, "lo')  # cut off by a crash
    steps, losses = plot.curves(tmp_path / "run")["train/loss"]
    assert steps.tolist() == [2, 4, 6, 8, 10] and (losses > 0).all()
    drawn = plot.draw([tmp_path / "run", tmp_path / "run" / "metrics.jsonl"])
    drawn.savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_every_number_of_the_log_is_in_the_picture(tmp_path: Path) -> None:
    """From metrics.jsonl alone: lines of training, points of the rest, steps that were left out."""
    lines = [{"kind": "train", "step": s, "loss": 1 / s, "lr": 1e-4, "mse": 2 / s} for s in range(1, 301)]
    lines.insert(100, {"kind": "spike", "step": 100, "loss": 9.0, "usual": 0.1, "samples": [7]})
    lines.insert(150, {"kind": "left_out", "step": 150, "reason": "the loss is nan", "samples": [8]})
    lines.append({"kind": "preview", "step": 200, "mse": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    panels = {axis.get_title(loc="left"): axis for axis in plot.draw([tmp_path]).axes}
    assert list(panels) == ["loss", "mse", "learning rate"]
    loss, mse, rate = panels.values()
    raw, smooth, spike, left_out = loss.lines
    np.testing.assert_allclose(raw.get_ydata(), 1 / np.arange(1, 301))
    assert smooth.get_ydata()[150] == pytest.approx(np.mean(1 / np.arange(145, 158)), rel=1e-6)
    assert spike.get_xydata().tolist() == [[100, 9]] and set(left_out.get_xdata()) == {150}
    assert loss.get_yscale() == "log" and rate.get_ylim()[0] == 0
    assert [text.get_text() for text in mse.get_legend().get_texts()] == ["preview"]
    assert all(axis.get_xlim() == (0, 300) for axis in panels.values())


def test_the_command_that_draws_tells_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 0.5}\n')
    (tmp_path / "full.png").symlink_to("/dev/full")
    for run, told in (
        (tmp_path / "none", "missing; give"),
        (tmp_path, "full.png: cannot be written (No space"),
    ):
        monkeypatch.setattr(sys, "argv", ["plot", str(run), "--out", str(tmp_path / "full.png")])
        with pytest.raises(SystemExit) as left:
            plot.main()
        printed = capsys.readouterr().err
        assert left.value.code == 2 and printed.count("\n") == 1
        assert printed.startswith("error: ") and told in printed


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_same_weights_with_any_number_of_loader_workers(tmp_path: Path) -> None:
    def run(name: str, *, workers: int = 0, seed: int = 5) -> Path:
        settings = trainer(workers=workers, micro_batch=2)
        return train(toy(), Points(), settings, output=tmp_path / name, config=CONFIG, seed=seed)

    none = run("none")
    for workers in (1, 3):
        assert_equal_weights(none, run(str(workers), workers=workers))
    with pytest.raises(AssertionError):
        assert_equal_weights(none, run("other", seed=6))


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph: dict[str, set[str]] = {}
    for file in Path(checkpoint.__file__).parent.glob("*.py"):
        imports = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        graph[file.stem] = {node.module.removeprefix("defi.engine.") for node in imports}
        graph[file.stem] |= {a.name for node in imports if node.module == "defi.engine" for a in node.names}
    assert {"loop", "run", "model"} <= graph.keys()
    TopologicalSorter(graph).prepare()  # raises CycleError


# ---------------------------------------------------------------- refusals


def test_an_existing_output_is_not_touched(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("work of weeks")
    with pytest.raises(UserError, match="not empty; overwrite=true"):
        train(toy(), Points(), trainer(), output=tmp_path, config=CONFIG)
    with pytest.raises(UserError, match="no complete checkpoint"):
        train(toy(), Points(), trainer(), output=tmp_path, config=CONFIG, resume=True)
    with pytest.raises(UserError, match="exclude each other"):
        prepare_output(tmp_path, resume=True, overwrite=True)
    with pytest.raises(UserError, match="a file, not a folder"):
        prepare_output(precious)
    with pytest.raises(UserError, match="no training samples"):
        train(toy(), Points(size=0), trainer(), output=tmp_path, config=CONFIG, overwrite=True)
    with pytest.raises(UserError, match="no such tracker|choose none"):
        train(
            toy(), Points(), trainer(), output=tmp_path, config=CONFIG, overwrite=True, tracker={"name": "tb"}
        )
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    prepare_output(tmp_path, overwrite=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_step": 5}, "trainer.max_step=5: .*TrainerConfig"),
        ({"schedule": "cosine"}, "choose one of constant, tri_stage"),
        ({"max_steps": -1}, "trainer.max_steps=-1"),
        ({"max_steps": None}, "trainer.max_steps=None: give it or trainer.epochs"),
        ({"matmul": "low"}, "choose one of highest, high, medium"),
        ({"lr": "fast"}, "trainer.lr=fast: .*fast"),
        ({"workers": 1.5}, "trainer.workers"),
        ({"phases": [0.5, 0.2, 0.1]}, "trainer.phases"),
    ],
)
def test_impossible_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainerConfig.from_config(settings)


def test_the_base_recipe_states_the_defaults() -> None:
    base = OmegaConf.load(CONFIG_DIR / "trainer" / "base.yaml")
    assert set(base) == {field.name for field in fields(TrainerConfig)}
    assert TrainerConfig.from_config(base) == TrainerConfig()


def test_the_batch_must_divide() -> None:
    settings = TrainerConfig(global_batch=12, micro_batch=3)
    assert settings.split_batch(processes=2) == (3, 2)
    with pytest.raises(UserError, match="not divisible by 5 processes"):
        settings.split_batch(processes=5)
    with pytest.raises(UserError, match="choose a divisor of 4"):
        settings.split_batch(processes=3)


def test_checkpoints_that_are_missing_damaged_or_of_another_stage(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint here; give the output folder of a gfdm run"):
        checkpoint.find_checkpoint(tmp_path / "nowhere", "gfdm")
    run = tmp_path / "run"
    for step in (1, 2):
        checkpoint.save(toy(), run, step=step, config=CONFIG)
    with pytest.raises(UserError, match="holds a gidm checkpoint, not policy"):
        checkpoint.find_weights(run, "policy")
    newest = checkpoint.find_checkpoint(run)
    file = newest / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert checkpoint.find_checkpoint(run).name == "step_00000001"
    with pytest.raises(UserError, match="damaged or half-copied"):
        checkpoint.find_checkpoint(newest)
    with pytest.raises(UserError, match="cannot be read"):
        Toy.from_pretrained(newest)


def test_weights_are_loaded_strictly(tmp_path: Path) -> None:
    folder = checkpoint.save(toy(), tmp_path, step=1, config=CONFIG)
    wider = Toy(ToyConfig(width=9))
    before = {name: t.clone() for name, t in wider.state_dict().items()}
    with pytest.raises(UserError, match=r"net\.0\.weight has shape \(8, 3\)") as caught:
        wider.load_weights(folder)
    assert str(folder) in str(caught.value) and "preset" in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in wider.state_dict().items())
    (folder / "config.json").write_text(json.dumps({"width": 8, "depth": 2}))
    with pytest.raises(UserError, match="'depth'"):
        Toy.from_pretrained(folder)
