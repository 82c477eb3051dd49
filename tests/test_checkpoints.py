"""Published checkpoints: read without running anything, converted strictly, identical on the way back."""

import functools
import os
import pickle
import re
import shutil
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import torch
from checkpoint_fakes import (
    OpenAICLIP,
    preset,
    small_clip,
    write_gidm,
    write_policy,
    write_towers,
    write_video_model,
)
from policy_fakes import build_gfdm
from safetensors.torch import save_file
from torch import Tensor, nn

from defi.checkpoints import clip as clip_adapter
from defi.checkpoints import inspect
from defi.checkpoints.convert import adapter
from defi.checkpoints.files import SETTINGS, read_foreign
from defi.checkpoints.matching import Names, compare, in_common
from defi.checkpoints.torchscript import read_torchscript
from defi.config import compose_preset
from defi.engine import checkpoint
from defi.errors import UserError
from defi.text import CLIPText, TextConfig
from Step1_GFDM import adapter as gfdm_adapter
from Step1_GFDM.model import GFDM
from Step2_GIDM import adapter as gidm_adapter
from Step2_GIDM.model import GIDM
from Step3_DeFI import adapter as policy_adapter
from Step3_DeFI.policy import DeFI


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_towers(tmp_path_factory.mktemp("towers"))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, towers: Path) -> Path:
    """A folder as a user would have it: video model, GIDM, policy, in their published formats."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(5)
    policy = policy_adapter.build(preset(towers)).eval()
    gidm = gidm_adapter.build(preset(towers))
    write_video_model(policy.gfdm, folder / "video", text=False)
    write_gidm(gidm, folder / "lam_idm.ckpt")
    write_policy(policy, folder / "policy.pt")
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, released: Path, towers: Path) -> Path:
    """Runs of ours made of them, one after the other, as the commands do it."""
    folder = tmp_path_factory.mktemp("converted")
    stages = {"gfdm": "video", "gidm": "lam_idm.ckpt", "policy": "policy.pt"}
    places = {f"{stage}_checkpoint": str(folder / stage) for stage in ("gfdm", "gidm")}
    for stage, source in stages.items():
        cfg = preset(towers, source=str(released / source), **places)
        model, _ = adapter(stage).convert(cfg)
        checkpoint.save(model, folder / stage, step=0, config={"preset_name": "test"})
    return folder


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


# ---------------------------------------------------------------- conversion


def test_gidm_there_and_back(released: Path, converted: Path) -> None:
    published = read_foreign(released / "lam_idm.ckpt")
    model = GIDM.from_pretrained(checkpoint.find_weights(converted / "gidm", "gidm"))
    assert_same(gidm_adapter.publish(model) | gidm_adapter.publish_towers(model), published)


def test_policy_there_and_back(released: Path, converted: Path) -> None:
    published = read_foreign(released / "policy.pt")
    policy = DeFI.from_pretrained(checkpoint.find_weights(converted / "policy", "policy"))
    ours = policy_adapter.publish(policy) | policy_adapter.publish_towers(policy)
    assert set(published) - set(ours) == {
        n for n in published if n.startswith(tuple(policy_adapter.UNNEEDED))
    }
    assert_same(ours, {name: published[name] for name in ours})


def test_video_model_there_and_back(released: Path, converted: Path) -> None:
    model = GFDM.from_pretrained(checkpoint.find_weights(converted / "gfdm", "gfdm"))
    published = gfdm_adapter.read(released / "video")
    ours = {n: t for n, t in model.state_dict().items() if n.startswith(("unet.", "vae."))}
    assert_same(ours, published)
    assert model.config.pretrained is None and model.config.clip.pretrained is None


def test_converted_stages_act_like_the_original(converted: Path, towers: Path) -> None:
    torch.manual_seed(5)
    original = policy_adapter.build(preset(towers)).eval()
    policy = DeFI.from_pretrained(checkpoint.find_weights(converted / "policy", "policy")).eval()
    images = torch.randint(0, 256, (1, 2, 3, 16, 16), dtype=torch.uint8)
    chunks = []
    for model in (original, policy):
        noise = model.noise(torch.tensor([3]))
        chunks.append(model.act(images, ["open the drawer"], noise=noise))
    torch.testing.assert_close(chunks[0], chunks[1])


def test_the_report_says_what_was_left_over(released: Path, converted: Path, towers: Path) -> None:
    places = {f"{stage}_checkpoint": str(converted / stage) for stage in ("gfdm", "gidm")}
    cfg = preset(towers, source=str(released / "policy.pt"), **places)
    _, report = policy_adapter.convert(cfg)
    reasons = {name: reason for reason, names in report.left_over.items() for name in names}
    assert reasons["model.inner_model.pos_emb"] == "published, but never read in the forward pass"
    assert "image tower" in reasons[f"{policy_adapter.SENTENCE}visual.conv1.weight"]
    assert "stage 1" in reasons[f"{policy_adapter.CLIP}text_projection.weight"]
    assert not report.faults and "Video_Former.latents" in report.loaded
    cells = [cell for column in report.table().columns for cell in column.cells]
    assert "loaded" in cells and "left over" in cells


@pytest.mark.parametrize("text", [False, True])
def test_a_folder_may_bring_its_text_tower(text: bool, towers: Path, tmp_path: Path) -> None:
    model = build_gfdm(seed=7)
    model.clip = CLIPText.from_config(
        TextConfig(tokens=12, width=16, layers=1, heads=2, projection=16, seed=9)
    )
    write_video_model(model, tmp_path / "video", text=text)
    back, report = gfdm_adapter.convert(preset(towers, source=str(tmp_path / "video")))
    same = torch.equal(back.encode_text(["a"]), model.encode_text(["a"]))
    assert same == text
    assert [why for why in report.left_over if "image tower" in why]


def test_half_precision_and_pickled_folders_are_read(towers: Path, tmp_path: Path) -> None:
    model = build_gfdm(seed=7)
    write_video_model(model, tmp_path / "video", text=False)
    file = tmp_path / "video" / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in model.unet.state_dict().items()}
    save_file(half, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    file.unlink()
    vae = tmp_path / "video" / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(model.vae.state_dict(), vae.with_suffix(".bin"))
    vae.unlink()
    back, _ = gfdm_adapter.convert(preset(towers, source=str(tmp_path / "video")))
    assert back.unet.dtype == torch.float32
    torch.testing.assert_close(back.unet.conv_in.weight, half["conv_in.weight"].float())
    torch.testing.assert_close(back.vae.encoder.conv_in.weight, model.vae.encoder.conv_in.weight)


# ---------------------------------------------------------------- OpenAI's CLIP


@pytest.mark.parametrize("kind", ["archive", "state_dict"])
def test_openai_clip(kind: str, tmp_path: Path) -> None:
    tower = small_clip()
    theirs = OpenAICLIP(tower, clip_adapter.to_openai(tower))
    file = tmp_path / "ViT-B-32.pt"
    if kind == "archive":
        torch.jit.save(torch.jit.script(theirs), file)
    else:
        torch.save(theirs.state_dict(), file)
    tensors = read_foreign(file)
    assert tensors.keys() == theirs.state_dict().keys()
    back = small_clip().half().float()
    nn.init.zeros_(back.text_projection.weight)
    report = clip_adapter.from_openai(back, tensors, source=file)
    assert_same(back.state_dict(), tower.half().float().state_dict())
    assert {name for names in report.left_over.values() for name in names} == {
        "visual.weight", "visual.bias", "logit_scale", "context_length"
    }  # fmt: skip
    sizes = clip_adapter.text_sizes(tensors, source=file)
    assert (sizes.hidden_size, sizes.num_hidden_layers, sizes.projection_dim) == (64, 2, 48)
    assert (sizes.num_attention_heads, sizes.max_position_embeddings, sizes.eos_token_id) == (1, 12, 39)


def test_openai_clip_becomes_a_text_tower(towers: Path, tmp_path: Path) -> None:
    known = CLIPText.load(towers / "clip", TextConfig(tokens=12))
    torch.save(clip_adapter.to_openai(known.model), tmp_path / "clip.pt")
    cfg = preset(source=str(tmp_path / "clip.pt"), tokenizer=str(towers / "clip"))
    tower, _ = clip_adapter.convert(cfg)
    tower.save(tmp_path / "tower")
    again = CLIPText.load(tmp_path / "tower", TextConfig(tokens=12))
    assert_same(again.model.state_dict(), known.model.state_dict())
    cfg.tokenizer = None
    with pytest.raises(UserError, match="tokenizer=: missing"):
        clip_adapter.convert(cfg)


def test_an_archive_is_not_run(tmp_path: Path) -> None:
    """`torch.jit.load` would run __setstate__ of the archive; reading its tensors does not."""

    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3).T)

        @torch.jit.export
        def __getstate__(self) -> tuple[Tensor, bool]:
            return self.weight, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[Tensor, bool]) -> None:
            assert False, "ran"  # noqa: B011
            self.weight = state[0]

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    torch.jit.save(torch.jit.script(Stateful()), tmp_path / "stateful.pt")
    with pytest.raises(UserError, match="without tensors"):
        read_torchscript(tmp_path / "stateful.pt")
    linear = nn.Linear(2, 3)
    torch.jit.save(torch.jit.script(linear), tmp_path / "linear.pt")
    assert_same(read_torchscript(tmp_path / "linear.pt"), linear.state_dict())


# ---------------------------------------------------------------- bad input


class Attack:
    def __reduce__(self):
        return os.mkdir, (os.environ["ATTACK"],)


def changed(source: Path, target: Path, key: str, change) -> Path:
    with torch.serialization.safe_globals(SETTINGS):
        content = torch.load(source, weights_only=True)
    change(content[key])
    torch.save(content, target)
    return target


@pytest.mark.parametrize("suffix", [".ckpt", ".pt"])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_not_run(suffix: str, legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTACK", str(tmp_path / "attacked"))
    file = tmp_path / f"bad{suffix}"
    content = {"state_dict": {"a": torch.zeros(1)}, "hyper_parameters": Attack()}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        UserError, match=rf"bad{suffix}: cannot be read \(refers to \S*mkdir, which could run code"
    ):
        read_foreign(file)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("callee", ["os.system", "builtins.eval", "builtins.getattr", "torch.save"])
def test_settings_open_no_way_to_code(callee: str, tmp_path: Path) -> None:
    """functools.partial may be named, but neither holds nor calls what is not allowed itself."""
    module, name = callee.split(".")
    file = tmp_path / "bad.ckpt"
    torch.save({"state_dict": {}, "x": functools.partial(getattr(import_module(module), name), "1")}, file)
    with pytest.raises(UserError, match=r"bad.ckpt: cannot be read \(refers to .* which could run code"):
        read_foreign(file)


def test_code_in_an_archive_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTACK", str(tmp_path / "attacked"))
    torch.jit.save(torch.jit.script(nn.Linear(2, 3)), tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for name in good.namelist():
            content = pickle.dumps(Attack()) if name.endswith("data.pkl") else good.read(name)
            bad.writestr(name, content)
    with pytest.raises(UserError, match=r"bad.pt: cannot be read \(refers to \S*mkdir, which could run code"):
        read_foreign(tmp_path / "bad.pt")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("stage", ["gidm", "policy"])
@pytest.mark.parametrize("fault", ["missing", "extra", "extra tower", "misshapen", "truncated"])
def test_files_that_do_not_fit(
    stage: str, fault: str, released: Path, converted: Path, towers: Path, tmp_path: Path
) -> None:
    source, key = {"gidm": ("lam_idm.ckpt", "state_dict"), "policy": ("policy.pt", "model")}[stage]
    name = "lam.vq.codebook.weight"
    changes = {
        "missing": lambda tensors: tensors.pop(name),
        "extra": lambda tensors: tensors.update({"lam.more.weight": torch.zeros(2)}),
        "extra tower": lambda tensors: tensors.update({"lam.text_encoder.more": torch.zeros(2)}),
        "misshapen": lambda tensors: tensors.update({name: torch.zeros(3, 8)}),
    }
    messages = {
        "missing": r"lam.vq.codebook.weight of shape \(8, 8\) is missing \(1 such\)",
        "extra": r"lam.more.weight is not of this model",
        "extra tower": r"lam.text_encoder.more is not of",
        "misshapen": r"lam.vq.codebook.weight has shape \(3, 8\), expected \(8, 8\)",
        "truncated": "cannot be read",
    }
    file = tmp_path / source
    if fault == "truncated":
        content = (released / source).read_bytes()
        file.write_bytes(content[: len(content) // 2])
    else:
        changed(released / source, file, key, changes[fault])
    places = {f"{stage}_checkpoint": str(converted / stage) for stage in ("gfdm", "gidm")}
    with pytest.raises(UserError, match=f"{source}: {messages[fault]}"):
        adapter(stage).convert(preset(towers, source=str(file), **places))


@pytest.mark.parametrize(
    "stage, source, message",
    [
        ("gidm", "policy.pt", "no published GIDM"),
        ("policy", "lam_idm.ckpt", "no published policy"),
        ("gfdm", "lam_idm.ckpt", "has no unet/"),
        ("gidm", "video", "a folder"),
        ("clip", "policy.pt", "no OpenAI CLIP"),
        ("policy", "nowhere.pt", "no such file"),
    ],
)
def test_checkpoints_of_another_stage(
    stage: str, source: str, message: str, released: Path, converted: Path, towers: Path
) -> None:
    places = {f"{stage}_checkpoint": str(converted / stage) for stage in ("gfdm", "gidm")}
    cfg = preset(towers, source=str(released / source), tokenizer=None, **places)
    with pytest.raises(UserError, match=message):
        adapter(stage).convert(cfg)


@pytest.mark.parametrize("tower", [policy_adapter.T5, policy_adapter.CLIP, policy_adapter.SENTENCE])
def test_a_policy_of_other_text_towers(
    tower: str, released: Path, converted: Path, towers: Path, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        name = next(n for n in tensors if n.startswith(tower) and "norm" in n or "ln_" in n and tower in n)
        tensors[name] += 1

    file = changed(released / "policy.pt", tmp_path / "policy.pt", "model", change)
    places = {f"{stage}_checkpoint": str(converted / stage) for stage in ("gfdm", "gidm")}
    stage = "gidm_checkpoint" if tower == policy_adapter.T5 else "gfdm_checkpoint"
    with pytest.raises(UserError, match=f"differs from the text tower of {stage}"):
        policy_adapter.convert(preset(towers, source=str(file), **places))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: shutil.rmtree(folder / "vae"), "has no vae/"),
        (lambda folder: os.truncate(next((folder / "unet").glob("*.safetensors")), 1000), "cannot be read"),
        (lambda folder: next((folder / "unet").glob("*.safetensors")).unlink(), "safetensors: no such file"),
    ],
)
def test_damaged_video_models(change, message: str, released: Path, towers: Path, tmp_path: Path) -> None:
    shutil.copytree(released / "video", tmp_path / "video")
    change(tmp_path / "video")
    with pytest.raises(UserError, match=message):
        gfdm_adapter.convert(preset(towers, source=str(tmp_path / "video")))


def test_a_video_model_of_other_sizes(released: Path, towers: Path) -> None:
    cfg = preset(towers, source=str(released / "video"))
    cfg.gfdm.unet.block_out_channels = [32, 32, 32, 64]
    with pytest.raises(UserError, match=r"video: unet\.\S+ has shape \(.*\), expected \(.*inspect"):
        gfdm_adapter.convert(cfg)


def test_files_without_tensors(tmp_path: Path) -> None:
    for content, message in ({"a": 1}, "a is a int"), ([1, 2], "holds a list"), ({}, "holds a dict"):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match=message):
            read_foreign(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_text("not a checkpoint")
    with pytest.raises(UserError, match="cannot be read"):
        read_foreign(tmp_path / "x.pt")
    with pytest.raises(UserError, match="choose one of"):
        adapter("stage9")


def test_accounting() -> None:
    tensors = {"a.x": torch.zeros(2), "b.y": torch.zeros(3), "c": torch.zeros(1), "d.1": torch.zeros(1)}
    expected = {"a.x": torch.zeros(2), "b.y": torch.zeros(4), "e": torch.zeros(5)}
    report = compare(tensors, expected, source="f", unneeded={"d.": "not used"})
    assert report.loaded == {"a.x": (2,)}
    assert sorted(report.faults) == [
        ("missing", "e", None, (5,)), ("unknown", "c", (1,), None), ("wrong shape", "b.y", (3,), (4,))
    ]  # fmt: skip
    assert report.left_over == {"not used": ["d.1"]}
    assert in_common(["a.b.c", "a.b.d"]) == "a.b.…" and in_common(["a"]) == "a"


def test_one_table_of_names_for_both_directions() -> None:
    names = Names({"out": "last", "layers.*.qkv": ("h.*.q", "h.*.k", "h.*.v")})
    parts = {f"h.{i}.{part}.weight": torch.randn(2, 3) for i in (0, 10) for part in "qkv"}
    joined = names.join(parts | {"last.bias": torch.ones(1), "lasting": torch.ones(1)})
    assert joined.keys() == {"layers.0.qkv.weight", "layers.10.qkv.weight", "out.bias"}
    assert torch.equal(joined["layers.10.qkv.weight"][2:4], parts["h.10.k.weight"])
    assert_same(names.split(joined), parts | {"last.bias": torch.ones(1)})
    del parts["h.10.k.weight"]
    assert "layers.10.qkv.weight" not in names.join(parts), "a fused tensor without all its parts is none"


# ---------------------------------------------------------------- commands


def run(module: str, monkeypatch: pytest.MonkeyPatch, *settings: str) -> None:
    monkeypatch.setattr(sys, "argv", [module, *settings])
    import_module(module).main()


def tiny_gidm(tmp_path: Path) -> Path:
    """The preset `tiny` in the published format, and T5 as a folder."""
    model = gidm_adapter.build(compose_preset("tiny"))
    model.text.save(tmp_path / "t5")
    write_gidm(model, tmp_path / "lam_idm.ckpt")
    return tmp_path / "lam_idm.ckpt"


def test_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    file = tiny_gidm(tmp_path)
    output = tmp_path / "gidm"
    settings = ["stage=gidm", "preset=tiny", f"source={file}", f"output={output}"]
    settings.append(f"+text.t5.pretrained={tmp_path / 't5'}")
    run("defi.checkpoints.convert", monkeypatch, *settings)
    said = capsys.readouterr().out
    assert "loaded" in said and "lam.encoder" in said and "written" in said
    assert checkpoint.read_manifest(output, "gidm")["preset"] == "tiny"
    for path in (file, output):
        run("defi.checkpoints.inspect", monkeypatch, f"path={path}")
        said = capsys.readouterr().out
        assert "fits preset  tiny" in said and "float32" in said and "total" in said
    run("defi.checkpoints.inspect", monkeypatch, f"path={tmp_path / 't5'}", "tensors=true")
    assert "encoder.final_layer_norm.weight" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        run("defi.checkpoints.convert", monkeypatch, *settings)
    assert refused.value.code == 2 and "exists and is not empty" in capsys.readouterr().err
    changed(file, tmp_path / "less.ckpt", "state_dict", lambda tensors: tensors.pop("lam.lang_proj.bias"))
    with pytest.raises(SystemExit):
        run(
            "defi.checkpoints.convert",
            monkeypatch,
            *settings,
            f"source={tmp_path / 'less.ckpt'}",
            "overwrite=true",
        )
    said = capsys.readouterr()
    assert "lam.lang_proj.bias of shape (64,) is missing" in said.err
    assert re.search(r"missing +1 +64 +lam.lang_proj.bias", said.out)
    assert checkpoint.read_manifest(output, "gidm")


def test_inspect_names_what_it_sees(released: Path, converted: Path, tmp_path: Path) -> None:
    titles = {
        released / "video": ("video model", "gfdm"),
        released / "lam_idm.ckpt": ("GIDM", "gidm"),
        released / "policy.pt": ("policy", "policy"),
        converted / "policy": ("policy of this project, preset test", "policy"),
        converted / "gfdm": ("gfdm of this project", "gfdm"),
    }
    for path, (title, stage) in titles.items():
        found = inspect.open_checkpoint(path)
        assert title in found.title and found.stage == stage, path
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match=str(path)):
            inspect.open_checkpoint(path)
