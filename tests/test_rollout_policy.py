"""A DeFI checkpoint rolled out: the same actions whatever shares the batch, and the whole command."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from inspect import unwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from policy_fakes import build_policy, policy_config, write_stages
from rollout_fakes import fake_evaluation

from defi.config import CONFIG_DIR
from defi.engine import checkpoint
from defi.engine.data import seed_of
from defi.errors import UserError
from Step3_DeFI.acting import Policy, identify, policy_threads, trained_precision
from Step3_DeFI.policy import DeFI
from Step3_DeFI.preview import rollouts
from Step3_DeFI.rollout.config import CommandConfig, read_settings
from Step3_DeFI.rollout.evaluate import Evaluation, evaluate_policy, main, run_episodes
from Step3_DeFI.rollout.results import EpisodeLog, read_results

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["open it", "please slide the door over to the left side", "press"]


@pytest.fixture(scope="module")
def model() -> DeFI:
    return build_policy().eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage-3 run with its stage-1 and stage-2 runs beside it."""
    folder = tmp_path_factory.mktemp("runs")
    gfdm, gidm = write_stages(folder)
    sizes = {"codes": 8, "code_width": 8}
    policy = DeFI.from_stages(build_policy().config, gfdm=gfdm, gidm=gidm)
    assert policy.config.stages.latent_action.codes == sizes["codes"]
    checkpoint.save(policy, folder / "policy", step=3, config={"preset_name": "test"})
    return folder / "policy"


def observation(chain: int) -> dict[str, Any]:
    rng = np.random.default_rng(chain)
    images = {name: rng.integers(0, 256, (20, 20, 3), np.uint8) for name in ("static", "gripper")}
    return {"images": images, "instruction": WORDS[chain % 3]}


def test_actions_are_bitwise_equal_whatever_shares_the_batch(model: DeFI):
    wanted = observation(0)
    for row in range(4):
        answers = []
        for others in (range(1, 5), range(7, 11)):
            policy = Policy(build_policy())  # its text towers have seen nothing yet
            batch, seeds = [observation(chain) for chain in others], list(others)
            batch[row], seeds[row] = wanted, 5
            answers.append(policy.infer_batch(batch, seeds)[row])
        np.testing.assert_array_equal(answers[0], answers[1])
    alone = Policy(model).infer(wanted, 5)
    np.testing.assert_allclose(alone, answers[0], rtol=1e-4, atol=1e-5)


def test_noise_is_a_function_of_seed_chain_and_observation(model: DeFI):
    seeds = {seed_of("rollout", s, c, k) for s in range(3) for c in range(20) for k in range(20)}
    assert len(seeds) == 3 * 20 * 20 and all(0 <= seed < 2**63 for seed in seeds)
    policy, first, again = Policy(model), observation(1), observation(1)
    np.testing.assert_array_equal(policy.infer(first, 7), policy.infer(again, 7))
    assert not np.allclose(policy.infer(first, 7), policy.infer(first, 8))


def test_result_is_the_same_for_any_number_of_processes(model: DeFI):
    outcomes = []
    for processes in (1, 2, 5):
        evaluation = fake_evaluation(chains=6, max_steps=[20], batch=3, processes=processes)
        chains = run_episodes(evaluation, "policy", Policy(model), show=False)
        outcomes.append([(chain.index, chain.outcome["steps"], chain.observations) for chain in chains])
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_sampler_steps_and_precision_can_be_chosen():
    policy = build_policy()
    base = Policy(policy).infer(observation(0))
    bf16 = Policy(policy, precision="bf16").infer(observation(0))
    assert bf16.dtype == np.float32 and 0 < np.abs(bf16 - base).max() < 0.3
    assert not np.allclose(Policy(policy, steps=2).infer(observation(0)), base)


def test_sampler_and_guidance_can_be_chosen():
    policy = build_policy(diffusion={"text_dropout": 0.1})
    answers = {}
    for sampler, guidance in (("ddim", 1.0), ("dpmpp_2m", 1.0), ("heun", 1.0), ("ddim", 3.0)):
        chosen = Policy(policy, sampler=sampler, guidance=guidance)
        assert (policy.config.diffusion.sampler, policy.config.diffusion.guidance) == (sampler, guidance)
        answers[sampler, guidance] = chosen.infer(observation(0))
    assert len({answer.tobytes() for answer in answers.values()}) == 4
    with pytest.raises(UserError, match="never saw a dropped text"):
        Policy(build_policy(), guidance=2.0)


def test_threads_are_limited_and_put_back():
    before = torch.get_num_threads()
    with policy_threads(3) as threads:
        assert threads == torch.get_num_threads() == 3
    with pytest.raises(ZeroDivisionError), policy_threads() as threads:
        assert threads == max(1, len(os.sched_getaffinity(0)) - 1)
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_rollouts_in_training_give_numbers_and_start_anew(model: DeFI, tmp_path: Path):
    evaluation = fake_evaluation(chains=2, max_steps=[20], processes=1)
    numbers = evaluate_policy(model, evaluation, output=tmp_path)
    assert set(numbers) == {"average_length", *(f"success_{i}" for i in range(1, 6))}
    assert numbers["average_length"] == pytest.approx(sum(numbers[f"success_{i}"] for i in range(1, 6)))
    with torch.no_grad():
        model.action_head.predict.weight.zero_()
    evaluate_policy(model, evaluation, output=tmp_path)
    assert (tmp_path / "chains.jsonl").read_text().count("\n") == 2  # not those of the first call


def train_step(policy: DeFI, dtype: torch.dtype) -> torch.Tensor:
    """The loss of one step on pictures of `WORDS`, as training under autocast computes it."""
    batch = {
        "images": torch.arange(3 * 2 * 3 * 16 * 16, dtype=torch.uint8).view(3, 2, 3, 16, 16),
        "text": WORDS,
        "actions": torch.zeros(3, 10, 7),
        "seed": torch.arange(3),
    }
    with torch.autocast("cpu", dtype):
        loss = policy.train()(batch)["loss"]
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_low_precision_and_rollouts_with_its_instructions(precision: str, dtype: torch.dtype):
    """Neither disturbs the other: what the text towers remember does not depend on who asked first."""

    def finetuned() -> DeFI:
        return build_policy(finetune={"mode": "full"})

    seen = [observation(chain) for chain in range(3)]
    loss, seeds = train_step(finetuned(), dtype), [0, 1, 2]
    acted = Policy(finetuned(), precision=precision).infer_batch(seen, seeds)
    trained = finetuned()
    assert torch.equal(train_step(trained, dtype), loss)
    np.testing.assert_array_equal(Policy(trained, precision=precision).infer_batch(seen, seeds), acted)
    assert torch.equal(train_step(trained, dtype), loss)


def test_rollouts_take_the_precision_of_the_training(run: Path, tmp_path: Path, monkeypatch):
    policy, evaluation = Policy.load(run).model, fake_evaluation(chains=1, processes=1)
    for precision in ("no", "bf16"):
        checkpoint.save(policy, tmp_path / precision, step=3, config={"trainer": {"precision": precision}})
        assert trained_precision(tmp_path / precision) == precision
    assert trained_precision(run) == "no"  # nothing known
    checkpoint.save(policy, tmp_path / "fp8", step=3, config={"trainer": {"precision": "fp8"}})
    with pytest.raises(UserError, match="fp8: was trained with trainer.precision=fp8; give precision="):
        trained_precision(tmp_path / "fp8")
    monkeypatch.setattr(Evaluation, "prepare", lambda _, config, rank: replace(evaluation, config=config))
    for given, recorded in (([], "bf16"), (["precision=no"], "no")):
        output = tmp_path / f"rollout_{recorded}"
        settings = [f"checkpoint={tmp_path / 'bf16'}", f"output={output}", "processes=1", "max_steps=[20]"]
        unwrap(main)(composed([*settings, *given]))
        assert json.loads((output / "rollout.json").read_text())["precision"] == recorded


def test_rollouts_in_training_take_its_precision(monkeypatch):
    used = {}
    monkeypatch.setattr(Evaluation, "prepare", lambda *_: None)
    monkeypatch.setattr("Step3_DeFI.rollout.evaluate.evaluate_policy", lambda *_, **how: used.update(how))
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = compose("step3_train", ["output=x", "trainer.precision=bf16"])
    rollouts(cfg, policy_config())(None, 1, Path())
    assert used["precision"] == "bf16"


# ---------------------------------------------------------------- the command


def composed(settings: list[str]) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        return compose("step3_rollout", settings)


def command(*settings: str, launch: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *launch, "-m", "Step3_DeFI.rollout", *settings],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )


def test_command_from_checkpoint_to_report(run: Path, tmp_path: Path):
    pytest.importorskip("pybullet", reason="the simulation needs pybullet")
    output = tmp_path / "out"
    settings = [
        f"checkpoint={run}",
        f"output={output}",
        "tasks=[open_drawer,close_drawer,turn_on_led,turn_off_led]",
        "length=2",
    ]
    settings += ["chains=2", "max_steps=[10,20]", "baseline=random", "processes=1", "videos.chains=1"]
    settings += ["threads=1"]
    done = command(*settings)
    assert done.returncode == 0, done.stderr
    assert "DeFI" in done.stdout and "random actions" in done.stdout and str(output) in done.stdout
    results = read_results(output)
    assert len(results.episodes) == 2 and set(results.scores) == {"10", "20"}
    assert results.policy["fingerprint"] == identify(run)["fingerprint"] and results.policy["step"] == 3
    assert "video/mp4" in (output / "report.html").read_text()
    assert results.policy["device"] == "cpu" and results.policy["threads"] == 1

    shared = tmp_path / "shared"
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1")
    launch += ("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0")
    done = command(*settings, f"output={shared}", "baseline=null", launch=launch)
    assert done.returncode == 0, done.stderr
    assert [(shared / name).read_text().count("\n") for name in ("chains.jsonl", "chains.1.jsonl")] == [1, 1]
    alike = [
        [(c.index, c.outcome, c.observations) for c in read_results(o).episodes] for o in (output, shared)
    ]
    assert alike[0] == alike[1]

    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for changed, message in (
        ([], "resume=true continues it"),
        (["resume=true", "max_steps=[10]"], "was begun with max_steps=.10, 20., now it is .10."),
        (["resume=true", "sampler=heun"], "was begun with sampler=None, now it is heun"),
    ):
        with pytest.raises(UserError, match=message):
            unwrap(main)(composed([*settings, *changed]))
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "settings, message",
    [
        ([], "checkpoint=: not given"),
        (["policy=ws://a:1", "checkpoint=b"], "policy=ws://a:1: leave checkpoint= to the server"),
        (["agent=magic"], "agent=magic: must be one of policy, random, scripted"),
        (["agent=random", "baseline=random"], "baseline=random: the same as agent"),
        (
            ["agent=random", "benchmark=calvin", "baseline=scripted"],
            "scripted: knows the built-in tables only",
        ),
        (["agent=random", "baseline=expert"], "baseline=expert: must be one of null, random, scripted"),
        (["agent=random", "sampler=euler"], "sampler=euler: must be one of null, ddim, dpmpp_2m, heun"),
        (["agent=random", "precision=half"], "precision=half: must be one of"),
        (["agent=random", "sim.world=old"], "sim.world=old: must be one of fresh, persistent"),
        (["agent=random", "videos.every=0"], "videos.every=0"),
        (["agent=random", "sim.backend=other"], "sim.backend=other: must be one of native, calvin_env"),
        (["agent=random", "sim.backend=calvin_env"], "name the clone of CALVIN too"),
        (["agent=scripted", "sim=calvin"], "scripted: knows the built-in tables only"),
        (["agent=random", "chains=some"], "chains"),
    ],
)
def test_wrong_settings_are_one_line(settings: list[str], message: str):
    with pytest.raises(UserError, match=message) as caught:
        read_settings(CommandConfig, composed(settings), "step3_rollout")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("Step3_DeFI.rollout.evaluate.write_file", "rollout.json"),
        ("Step3_DeFI.rollout.evaluate.write_clip", "a clip"),
        ("Step3_DeFI.rollout.evaluate.EpisodeLog.append", "chains.jsonl"),
        ("Step3_DeFI.rollout.results.Results.save", "results.json and the report"),
        ("Step3_DeFI.rollout.evaluate.write_report", "results.json and the report"),
    ],
)
def test_a_full_disk_is_one_line_and_resume_goes_on(
    place: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    evaluation = fake_evaluation(chains=2, processes=1)
    monkeypatch.setattr(Evaluation, "prepare", lambda *_: evaluation)
    settings = ["agent=random", f"output={tmp_path}"]
    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(place, full)
        unwrap(main)(composed(settings))
    assert str(caught.value).startswith(f"{tmp_path}: cannot write {what} (No space left on device); ")
    unwrap(main)(composed([*settings, "resume=true"]))
    assert len(read_results(tmp_path).episodes) == 2


def test_wrong_checkpoints_are_one_line(run: Path, tmp_path: Path):
    with pytest.raises(UserError, match=f"{tmp_path}: no checkpoint here"):
        Policy.load(tmp_path)
    with pytest.raises(UserError, match="holds a gfdm checkpoint, not policy"):
        Policy.load(run.parent / "gfdm")
    assert json.loads(json.dumps(identify(run)))["preset"] == "test"
    assert EpisodeLog(tmp_path, "chains").read() == {}


def test_the_video_model_is_kept_in_the_precision_of_the_rollout(run: Path):
    whole, half = Policy.load(run), Policy.load(run, precision="bf16")
    assert {p.dtype for p in whole.model.gfdm.unet.parameters()} == {torch.float32}
    assert {p.dtype for p in half.model.gfdm.unet.parameters()} == {torch.bfloat16}
    assert half.model.dtype == torch.float32
    base, found = whole.infer(observation(0)), half.infer(observation(0))
    assert 0 < np.abs(found - base).max() < 0.3
