"""The download against a stand-in for the hub: a folder with the hub's layout."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir

from defi import download
from defi.config import CONFIG_DIR
from defi.errors import UserError

REPOS = {
    "stabilityai/stable-video-diffusion-img2vid": [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "svd.safetensors",
    ],
    "openai/clip-vit-base-patch32": [
        "config.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "pytorch_model.bin",
        "flax_model.msgpack",
    ],
    "google-t5/t5-base": ["config.json", "spiece.model", "tokenizer.json", "model.safetensors"],
    "facebook/dinov2-with-registers-base": ["config.json", "model.safetensors", "pytorch_model.bin"],
    "zbzzbz/DeFI": ["README.md", "lam_idm.ckpt", "svd/unet/config.json"],
}


class Hub:
    """What the two functions of the hub's client answer, from files on the disk."""

    def __init__(self, root: Path) -> None:
        self.root, self.reachable, self.fetched = root, True, []
        for repo, names in REPOS.items():
            for name in names:
                (root / repo / name).parent.mkdir(parents=True, exist_ok=True)
                (root / repo / name).write_bytes(f"{repo}/{name}".encode() * 10)

    def model_info(self, repo: str, *, files_metadata: bool) -> SimpleNamespace:
        assert files_metadata
        if not self.reachable:
            raise ConnectionError("name resolution failed")
        files = [path for path in (self.root / repo).rglob("*") if path.is_file()]
        names = [
            SimpleNamespace(rfilename=str(path.relative_to(self.root / repo)), size=path.stat().st_size)
            for path in files
        ]
        return SimpleNamespace(siblings=names)

    def hf_hub_download(self, repo: str, name: str, *, local_dir: str) -> None:
        if not self.reachable:
            raise ConnectionError("connection reset")
        target = Path(local_dir) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.root / repo / name, target)
        self.fetched.append(f"{repo}/{name}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(download, "HfApi", lambda: hub)
    monkeypatch.setattr(download, "hf_hub_download", hub.hf_hub_download)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("COLUMNS", "200")
    return hub


def run(monkeypatch: pytest.MonkeyPatch, *settings: str) -> None:
    monkeypatch.setattr(sys, "argv", ["defi.download", *settings])
    download.main()


def config(*settings: str):
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        return compose("download", list(settings))


def test_fetches_what_the_preset_names(hub: Hub, monkeypatch, capsys) -> None:
    run(monkeypatch, "preset=paper")
    assert (
        Path("ckpts/clip/pytorch_model.bin").is_file() and not Path("ckpts/dinov2/pytorch_model.bin").exists()
    )
    assert Path("ckpts/svd/unet/diffusion_pytorch_model.safetensors").is_file()
    assert not Path("ckpts/svd/svd.safetensors").exists() and not Path("ckpts/published").exists()
    said = capsys.readouterr().out
    assert "0 of 18 files are there" in said and "complete" in said


def test_goes_on_where_it_stopped(hub: Hub, monkeypatch, capsys) -> None:
    run(monkeypatch, "preset=paper")
    hub.fetched.clear()
    file = Path("ckpts/t5/model.safetensors")
    file.write_bytes(file.read_bytes()[:7])
    Path("ckpts/clip/vocab.json").unlink()
    run(monkeypatch, "preset=paper")
    assert sorted(hub.fetched) == [
        "google-t5/t5-base/model.safetensors",
        "openai/clip-vit-base-patch32/vocab.json",
    ]
    hub.fetched.clear()
    run(monkeypatch, "preset=paper")
    assert not hub.fetched and "18 of 18" in capsys.readouterr().out


def test_without_network(hub: Hub, monkeypatch, capsys) -> None:
    hub.reachable = False
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "preset=paper")
    said = capsys.readouterr()
    assert stopped.value.code == 2 and "cannot be reached" in said.err
    for text in ("ckpts/dinov2/config.json", "https://huggingface.co/google-t5/t5-base", "missing"):
        assert text in said.out
    hub.reachable = True
    run(monkeypatch, "preset=paper")
    hub.reachable = False
    run(monkeypatch, "preset=paper")
    assert "every file is there" in capsys.readouterr().out


def test_a_broken_connection_says_to_go_on(hub: Hub) -> None:
    source = download.needed(config("preset=paper"))["t5"]
    file = download.on_the_hub(source)[0]
    hub.reachable = False
    with pytest.raises(
        UserError, match=r"ckpts/t5/config.json: download stopped \(connection reset\); repeat"
    ):
        download.fetch(file)


def test_what_is_needed() -> None:
    assert set(download.needed(config("preset=paper"))) == {"svd", "clip", "t5", "dinov2"}
    elsewhere = config("preset=paper", "gfdm.pretrained=/data/svd")
    assert set(download.needed(elsewhere)) == {"clip", "t5", "dinov2"}
    assert set(download.needed(config("only=[video]"))) == {"video"}
    for settings, message in ((["preset=tiny"], "needs no download"), (["only=[gpt]"], "no such source")):
        with pytest.raises(UserError, match=message):
            download.needed(config(*settings))


def test_a_repository_without_a_file(hub: Hub) -> None:
    source = download.needed(config("preset=paper"))["t5"]
    (hub.root / source.repo / "spiece.model").unlink()
    with pytest.raises(UserError, match="google-t5/t5-base: has no spiece.model"):
        download.on_the_hub(source)


def test_everything_of_a_repository(hub: Hub, monkeypatch, capsys) -> None:
    run(monkeypatch, "only=[defi]")
    found = {str(path) for path in Path("ckpts/published/defi").rglob("*") if path.is_file()}
    assert found == {f"ckpts/published/defi/{name}" for name in REPOS["zbzzbz/DeFI"]}
    hub.reachable = False
    Path("ckpts/published/defi/.cache").mkdir()
    Path("ckpts/published/defi/.cache/lock").touch()
    run(monkeypatch, "only=[defi]")
    said = capsys.readouterr().out
    assert "every file is there" in said and "lock" not in said
    shutil.rmtree("ckpts")
    with pytest.raises(SystemExit):
        run(monkeypatch, "only=[defi]")
    assert "ckpts/published/defi/*" in capsys.readouterr().out


def test_a_file_that_wants_to_lie_elsewhere(hub: Hub, monkeypatch) -> None:
    source = download.needed(config("only=[defi]"))["defi"]
    hub.model_info = lambda repo, **_: SimpleNamespace(
        siblings=[SimpleNamespace(rfilename="../../.ssh/authorized_keys", size=1)]
    )
    with pytest.raises(UserError, match="zbzzbz/DeFI: a file there is called .*authorized_keys"):
        download.on_the_hub(source)


def test_the_pairing_that_nobody_has_confirmed_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    notes = {
        name for name, source in download.needed(config("only=[svd,clip,video,defi]")).items() if source.note
    }
    assert notes == {"video"}
    monkeypatch.setattr(download, "on_the_hub", lambda source: [])
    run(monkeypatch, "only=[video]")
    assert "Prefer DeFI's own" in capsys.readouterr().out
