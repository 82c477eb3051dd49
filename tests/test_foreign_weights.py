"""Weights as other programs save them: in several files, below wrappers, with NumPy's numbers beside them."""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from defi.checkpoints.files import NumPyValue, read_foreign
from defi.checkpoints.inspect import open_checkpoint
from defi.errors import UserError
from Step1_GFDM import pipeline
from Step1_GFDM.config import VAESizes
from Step1_GFDM.pipeline import build_vae

TENSORS = {"conv.weight": torch.arange(4.0), "conv.bias": torch.ones(2), "norm.weight": torch.zeros(3)}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def write_parts(
    folder: Path, tensors: dict[str, torch.Tensor], stem: str = "model", kind: str = "safetensors"
) -> Path:
    """One file per tensor, and the index."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {name: f"{stem}-{i:05d}-of-{len(tensors):05d}.{kind}" for i, name in enumerate(tensors, 1)}
    for name, file in places.items():
        part = {name: tensors[name].contiguous()}
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_several_files(tmp_path: Path, kind: str) -> None:
    index = write_parts(tmp_path / "w", TENSORS, kind=kind)
    (tmp_path / "w" / "._model-00001-of-00003.safetensors").write_bytes(b"\0\5\x16\7")
    assert (
        same(read_foreign(index))
        and same(read_foreign(tmp_path / "w"))
        and same(open_checkpoint(tmp_path / "w").tensors)
    )
    (tmp_path / "w" / "config.json").write_text('{"model_type": "t5"}')
    assert same(open_checkpoint(tmp_path / "w").tensors)


def test_an_index_whose_files_were_not_asked_for(tmp_path: Path) -> None:
    write_parts(tmp_path, TENSORS, stem="pytorch_model", kind="bin")
    for part in tmp_path.glob("*.bin"):
        part.unlink()
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert same(open_checkpoint(tmp_path).tensors)


def test_another_protocol_of_pickle_is_named(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "a.pt", pickle_protocol=4)
    with pytest.raises(UserError, match=r"a.pt: cannot be read \(damaged, or pickled by another protocol"):
        read_foreign(tmp_path / "a.pt")


def test_a_file_that_lies_in_itself(tmp_path: Path) -> None:
    content: dict = {}
    content["model"] = content
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match="a.pt: model is a dict, not a tensor"):
        read_foreign(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["", "../b.safetensors"])
def test_an_index_that_names_no_file_beside_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="index.json: names '.*', outside the folder"):
        read_foreign(tmp_path)


def test_parts_that_are_not_there(tmp_path: Path) -> None:
    index = write_parts(tmp_path, TENSORS)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    for place in (index, tmp_path):
        with pytest.raises(
            UserError, match=r"00002-of-00003\.safetensors: missing, 1 of the 3 files in model\."
        ):
            read_foreign(place)
    said = json.loads(index.read_text())["weight_map"]
    for places, message in (
        (said | {"conv.bias": "../other.safetensors"}, "outside the folder"),
        (said | {"conv.bias": said["conv.weight"]}, "conv.bias is in none of its files"),
        (["a"], "no index of weights"),
        ({"a": 1}, "no index of weights"),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(UserError, match=rf"index\.json: .*{message}"):
            read_foreign(index)


@pytest.mark.parametrize(
    "index",
    [
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
    ],
)
def test_a_network_of_a_diffusers_folder(tmp_path: Path, index: str) -> None:
    vae = build_vae(VAESizes([32, 32], 1), 16)
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / pipeline.WEIGHTS).unlink()
    write_parts(tmp_path / "vae", vae.state_dict(), "part").rename(tmp_path / "vae" / index)
    loaded = pipeline.load_part(type(vae), tmp_path / "vae").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in vae.state_dict().items())


@pytest.mark.parametrize(
    "before",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.",
        "model._orig_mod.",
        "module.module.",
    ]
    + ["_forward_module.", "_fsdp_wrapped_module.", "_fsdp_wrapped_module._checkpoint_wrapped_module."],
)
def test_names_come_without_what_wrappers_put_before_them(tmp_path: Path, before: str) -> None:
    wrapped = {before + name: tensor for name, tensor in TENSORS.items()}
    save_file(wrapped, tmp_path / "a.safetensors")
    torch.save({"state_dict": wrapped}, tmp_path / "a.pt")
    torch.save({"module": OrderedDict(wrapped), "epoch": 3}, tmp_path / "b.pt")
    torch.save({"model": {"state_dict": wrapped}}, tmp_path / "c.pt")
    assert all(same(read_foreign(tmp_path / name)) for name in ("a.safetensors", "a.pt", "b.pt", "c.pt"))
    assert same(read_foreign(write_parts(tmp_path / "parts", wrapped)))


def test_parts_that_were_wrapped_by_themselves(tmp_path: Path) -> None:
    inner = {name.replace("conv.", "conv._orig_mod."): tensor for name, tensor in TENSORS.items()}
    torch.save(inner, tmp_path / "a.pt")
    assert same(read_foreign(tmp_path / "a.pt"))
    average = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 1))
    torch.save(average.state_dict(), tmp_path / "b.pt")
    assert sorted(read_foreign(tmp_path / "b.pt")) == ["bias", "weight"]


def test_names_that_only_some_tensors_begin_with_stay(tmp_path: Path) -> None:
    some = {"model.inner.weight": torch.ones(1), "former.weight": torch.ones(1)}
    torch.save({"model": some}, tmp_path / "a.pt")
    assert read_foreign(tmp_path / "a.pt").keys() == some.keys()
    both = {"conv.weight": torch.ones(1), "_orig_mod.conv.weight": torch.zeros(1)}
    torch.save(both, tmp_path / "b.pt")
    assert read_foreign(tmp_path / "b.pt").keys() == both.keys(), "none is lost"


def test_numbers_of_numpy_beside_the_weights(tmp_path: Path) -> None:
    """As training scripts leave them: best scores, random states, histories. Nothing of NumPy's is called."""
    beside = {
        "best": np.float64(0.5),
        "epoch": np.int64(3),
        "done": np.bool_(True),
        "history": np.arange(3),
        "numpy_rng": np.random.RandomState(0).get_state(),
        "args": {"name": np.str_("a")},
        "dtype": np.dtype("f4"),
    }
    torch.save({"state_dict": TENSORS, **beside}, tmp_path / "a.pt")
    assert same(read_foreign(tmp_path / "a.pt"))
    torch.save({"state_dict": TENSORS, **beside}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    older = (tmp_path / "b.pt").read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "b.pt").write_bytes(older)
    assert same(read_foreign(tmp_path / "b.pt"))
    torch.save({**TENSORS, "epoch": np.int64(3)}, tmp_path / "c.pt")
    with pytest.raises(UserError, match=rf"c\.pt: epoch is a {NumPyValue.__name__}, not a tensor"):
        read_foreign(tmp_path / "c.pt")
