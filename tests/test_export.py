"""A policy exported whole: the same actions without its other checkpoints, from the disk and from the hub."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from policy_fakes import policy_config, write_stages
from safetensors.torch import load_file, save_file

from defi import hub
from defi.checkpoints import export as command
from defi.checkpoints import inspect
from defi.engine import checkpoint
from defi.errors import UserError
from Step3_DeFI.acting import Policy, identify
from Step3_DeFI.policy import DeFI

RUN = {"preset_name": "test", "data": {"root": "/home/somebody/pushes"}, "trainer": {"precision": "bf16"}}


def seen() -> dict[str, object]:
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (20, 20, 3), np.uint8) for name in ("static", "gripper")}
    return {"images": images, "instruction": "push the block"}


def write_run(folder: Path, config: dict = RUN, **changes: object) -> Path:
    """A run whose averaged weights are others, with stage 1 and 2 beside it."""
    gfdm, gidm = write_stages(folder)
    policy = DeFI.from_stages(policy_config(**changes), gfdm=gfdm, gidm=gidm)
    for name, tensor in policy.own_state().items():
        if name.startswith("gfdm."):
            tensor.add_(1e-3)  # as training would change it
    data = {"size": 12, "fingerprint": "abc"}
    place = checkpoint.save(policy, folder / "run", step=7, config=config, data=data)
    (place / "ema").mkdir()
    policy.action_head.predict.weight.data.mul_(0.5)
    policy.save_pretrained(place / "ema")
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["metrics"] = {"held_out|action_error": 0.0125}
    manifest["files"] |= {f"ema/{f.name}": f.stat().st_size for f in (place / "ema").iterdir()}
    (place / "manifest.json").write_text(json.dumps(manifest))
    return folder / "run"


def export(monkeypatch: pytest.MonkeyPatch, *settings: object) -> None:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, settings)])
    command.main()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gfdm_precision": "fp16"},
        {"finetune": {"mode": "lora"}},
        {"finetune": {"mode": "full", "video_loss": 0.1}},
        {"state": True},
    ],
    ids=["plain", "half", "lora", "full", "state"],
)
def test_an_exported_folder_acts_alone(
    changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, output = write_run(tmp_path / "runs", **changes), tmp_path / "whole"
    observation = seen() | {"state": np.arange(15) / 10}
    wanted = Policy.load(run).infer(observation, 3)
    original = DeFI.from_pretrained(checkpoint.find_weights(run)).own_state()
    export(monkeypatch, f"checkpoint={run}", f"output={output}")
    shutil.rmtree(tmp_path / "runs")
    (moved := tmp_path / "elsewhere").mkdir()
    shutil.move(output, moved / "policy")
    loaded = Policy.load(moved / "policy")
    np.testing.assert_array_equal(loaded.infer(observation, 3), wanted)
    found = DeFI.from_pretrained(moved / "policy").own_state()
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in original.items())
    assert identify(moved / "policy")["step"] == 7
    names = {path.name for path in (moved / "policy").iterdir()} - {"README.md"}
    assert names == {
        "config.json",
        "config.yaml",
        "gfdm",
        "manifest.json",
        "model.safetensors",
        "t5",
    }
    if changes.get("gfdm_precision") == "fp16":
        unet = load_file(moved / "policy" / "gfdm" / "unet" / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in unet.values()} == {torch.float16}


def test_the_card_and_inspect_tell_what_it_is(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    export(monkeypatch, f"checkpoint={run}", f"output={tmp_path / 'whole'}")
    text = (tmp_path / "whole" / "README.md").read_text()
    for part in (
        "license: unknown",
        'Policy.load("whole")',
        '{"static": image_1, "gripper": image_2}',
        "| action | dx | change in 0.02 m | none |",
        "| data set | pushes, fingerprint abc |",
        "| steps | 7 |",
        "| held_out\\|action_error | 0.0125 |",
        "30 steps per second; 10 of 10 actions are carried out before the next look",
    ):
        assert part in text, part
    assert "/home" not in text and "| state |" not in text
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["inspect", f"path={tmp_path / 'whole'}"])
    inspect.main()
    said = capsys.readouterr().out
    assert "policy of this project, preset test, step 7" in said
    for part in ("camera", "gripper", "change in 0.05 rad", "1 (opens) above 0"):
        assert part in said, part


def test_the_card_names_all_data_and_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a mixture, and what a store was made from, or its name where it is gone."""
    (store := tmp_path / "store").mkdir()
    (store / "manifest.json").write_text(json.dumps({"source": "/home/somebody/cups"}))
    sets = {
        "one": {"format": "hdf5", "root": "/home/somebody/pushes", "cameras": ["top"], "weight": 0.5},
        "two": {"store": str(store)},
        "gone": {"store": "/home/somebody/features"},
    }
    data = {"store": None, "root": None, "sets": sets}
    config = RUN | {"data": data, "output": "runs/one", "pretrained": ["/home/somebody/dino", 3]}
    run, output = write_run(tmp_path / "runs", config), tmp_path / "whole"
    export(monkeypatch, f"checkpoint={run}", f"output={output}")
    assert "| data set | pushes, cups, features, fingerprint abc |" in (output / "README.md").read_text()
    for file in output.rglob("*"):
        if file.suffix in (".json", ".yaml", ".md"):
            assert "somebody" not in file.read_text() and str(tmp_path) not in file.read_text(), file
    sets["one"]["root"], sets["gone"]["store"], sets["two"]["store"] = "pushes", "features", "store"
    assert checkpoint.read_run_config(output) == config | {"pretrained": ["dino", 3]}


def test_an_export_is_complete_or_absent(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    output = tmp_path / "whole"
    settings = [f"checkpoint={run}", f"output={output}"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(full))
        export(monkeypatch, *settings)
    said = capsys.readouterr().err
    assert "whole: cannot write it (No space left on device); free some space, then repeat" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    export(monkeypatch, *settings)
    with pytest.raises(SystemExit):
        export(monkeypatch, *settings)
    assert "exists and is not empty; overwrite=true replaces it" in capsys.readouterr().err
    export(monkeypatch, *settings, "overwrite=true")
    for wrong, message in (
        ([f"checkpoint={output}", f"output={tmp_path / 'b'}"], "is whole already; copy its folder"),
        (
            [f"checkpoint={run.parent / 'gfdm'}", f"output={tmp_path / 'b'}"],
            "holds a gfdm checkpoint, not policy",
        ),
        ([*settings, "overwrite=true", "push=name"], "push=name: give the name of a repository, user/name"),
    ):
        with pytest.raises(SystemExit):
            export(monkeypatch, *wrong)
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("t5/text.json", "text.json: missing"),
        ("gfdm/gfdm.json", "gfdm.json: missing"),
        ("model.safetensors", "model.safetensors: missing"),
        ("t5/model.safetensors", "t5"),
    ],
)
def test_a_damaged_folder_is_one_line(
    run: Path, tmp_path: Path, monkeypatch, file: str, message: str
) -> None:
    export(monkeypatch, f"checkpoint={run}", f"output={tmp_path / 'whole'}")
    (tmp_path / "whole" / file).unlink()
    with pytest.raises(UserError, match="whole: damaged or half-copied checkpoint"):
        Policy.load(tmp_path / "whole")
    with pytest.raises(UserError, match=message) as caught:
        DeFI.from_pretrained(tmp_path / "whole")
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_refused(run: Path, tmp_path: Path, monkeypatch) -> None:
    export(monkeypatch, f"checkpoint={run}", f"output={tmp_path / 'whole'}")
    file = tmp_path / "whole" / "model.safetensors"
    save_file(load_file(file) | {"action_head.predict.bias": torch.zeros(8)}, file)
    with pytest.raises(UserError, match=r"predict.bias has shape \(8,\), the model wants \(7,\)"):
        DeFI.from_pretrained(tmp_path / "whole")


# ------------------------------------------------------------ the hub


class Hub:
    """Repositories as folders; the client's calls that are used here."""

    def __init__(self, root: Path) -> None:
        self.root, self.private = root, {}

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        self.private[name] = private
        (self.root / name).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def snapshot_download(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert revision is None
        if not (self.root / name).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such\nrepository")
        assert "*.safetensors" in allow_patterns and not {"*", "*.bin", "*.py"} & set(allow_patterns)
        return str(self.root / name)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    server = Hub(tmp_path / "server")
    monkeypatch.setattr(command, "HfApi", lambda: server)
    monkeypatch.setattr(hub, "snapshot_download", server.snapshot_download)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return server


def test_lerobots_format_holds_the_same_policy(run: Path, server: Hub, monkeypatch, capsys) -> None:
    """LeRobot's files around it; that LeRobot loads them is tested there (test_lerobot_plugin.py)."""
    wanted = Policy.load(run).infer(seen(), 3)
    export(monkeypatch, f"checkpoint={run}", "output=whole", "format=lerobot", "push=lab/pushes")
    shutil.rmtree(run.parent)
    names = {path.name for path in Path("whole").iterdir()}
    lerobots = {f"policy_{each}processor.json" for each in ("pre", "post")}
    assert names == {"README.md", "config.json", "defi", "model.safetensors", *lerobots}
    assert Path("whole/model.safetensors").samefile("whole/defi/model.safetensors")
    config = json.loads(Path("whole/config.json").read_text())
    assert (config["type"], config["chunk"], config["dtype"]) == ("defi", 10, "bfloat16")
    assert config["input_features"].keys() == {"observation.images.static", "observation.images.gripper"}
    assert "lerobot-rollout --policy.path" in Path("whole/README.md").read_text()
    assert inspect.open_checkpoint(Path("whole")).title == "policy of this project, preset test, step 7"
    for place in ("whole", "lab/pushes"):
        np.testing.assert_array_equal(Policy.load(place).infer(seen(), 3), wanted)
    Path("whole/defi/t5/text.json").unlink()
    with pytest.raises(UserError, match="whole: damaged or half-copied checkpoint"):
        Policy.load("whole")
    with pytest.raises(SystemExit):
        export(monkeypatch, f"checkpoint={server.root / 'lab/pushes'}", "output=other", "format=leros")
    assert "format=leros: choose from folder, lerobot" in capsys.readouterr().err


def test_a_policy_goes_to_the_hub_and_comes_back(run: Path, server: Hub, monkeypatch, capsys) -> None:
    wanted = Policy.load(run).infer(seen())
    export(monkeypatch, f"checkpoint={run}", "output=whole", "push=lab/pushes")
    assert "on the hub   lab/pushes" in capsys.readouterr().out and server.private == {"lab/pushes": True}
    assert 'Policy.load("lab/pushes")' in (server.root / "lab/pushes/README.md").read_text()
    shutil.rmtree(run.parent)
    np.testing.assert_array_equal(Policy.load("lab/pushes").infer(seen()), wanted)
    assert DeFI.from_pretrained("lab/pushes").config.robot.cameras == ["static", "gripper"]


def test_a_hub_that_refuses_is_one_line(run: Path, server: Hub, monkeypatch, capsys) -> None:
    def refuse(**_: object) -> None:
        raise RuntimeError("401\nnot logged in")

    monkeypatch.setattr(server, "upload_folder", refuse)
    with pytest.raises(SystemExit):
        export(monkeypatch, f"checkpoint={run}", "output=whole", "push=lab/pushes")
    assert "lab/pushes: cannot be uploaded (401 not logged in); log in" in capsys.readouterr().err
    assert Policy.load("whole")


def test_only_names_are_looked_for_on_the_hub(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lab/nothing: missing; check name and network") as caught:
        DeFI.from_pretrained("lab/nothing")
    assert "\n" not in str(caught.value)
    Path("runs").mkdir()
    for place in ("runs/typo", "ckpts/policy", "../x/policy", str(tmp_path / "nothing"), "a/b/c", "-a"):
        assert hub.local_folder(place) == Path(place)
