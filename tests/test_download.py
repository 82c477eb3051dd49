"""The download against a server on this machine that answers as the hub does, with the hub's own client."""

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import file_download
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
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """The hub's answers, from memory.

    stop_after: bytes of a file after which the connection breaks.
    last: a file with which the hub goes away.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {
            repo: {name: f"{repo}/{name}".encode() * 10 for name in names} for repo, names in REPOS.items()
        }
        self.fetched: list[str] = []
        self.ranges: list[str] = []
        self.reachable, self.stop_after, self.last = True, None, None

    def handle_error(self, request, client_address) -> None:
        """Broken connections are meant here."""


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if not self.server.reachable:
            self.connection.close()
            return
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.startswith("api/models/"):
            self._describe(path.removeprefix("api/models/"))
        else:
            repo, _, rest = path.partition("/resolve/")
            self._send(repo, rest.partition("/")[2])

    def _describe(self, path: str) -> None:
        repo = "/".join(path.split("/")[:2])
        files = self.server.files[repo]
        if "/tree/" in path:
            answer = [
                {"type": "file", "path": name, "size": len(data), "oid": etag(data)}
                for name, data in files.items()
            ]
        else:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            answer = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send(self, repo: str, name: str) -> None:
        data, start = self.server.files[repo][name], 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{etag(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.server.ranges.append(asked)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if name == self.server.last:
            self.server.reachable = False
        if name == self.server.last or (self.server.stop_after and not start):
            self.wfile.write(data[: self.server.stop_after or 1])
            self.connection.close()
            return
        self.server.fetched.append(f"{repo}/{name}")
        self.wfile.write(data[start:])


def etag(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{hub.server_port}"
        monkeypatch.setattr(download, "HfApi", lambda: huggingface_hub.HfApi(endpoint=endpoint, token=False))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield hub
        hub.shutdown()


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
    assert "ckpts/clip: complete, 6 files" in capsys.readouterr().out and len(hub.fetched) == 18


def test_files_that_are_there_stay(hub: Hub, monkeypatch, capsys) -> None:
    run(monkeypatch, "preset=paper")
    hub.fetched.clear()
    file = Path("ckpts/t5/model.safetensors")
    file.write_bytes(file.read_bytes()[:7])
    with pytest.raises(SystemExit):  # the client does not see a change of the same second
        run(monkeypatch, "preset=paper")
    assert "model.safetensors: has another size than on the hub" in capsys.readouterr().err
    os.utime(file, (time.time() + 10,) * 2)
    Path("ckpts/clip/vocab.json").unlink()
    run(monkeypatch, "preset=paper")
    assert sorted(hub.fetched) == [
        "google-t5/t5-base/model.safetensors",
        "openai/clip-vit-base-patch32/vocab.json",
    ]
    assert file.read_bytes() == hub.files["google-t5/t5-base"]["model.safetensors"]
    hub.fetched.clear()
    run(monkeypatch, "preset=paper")
    assert not hub.fetched


def test_a_broken_connection_is_resumed(hub: Hub) -> None:
    source = download.needed(config("preset=paper"))["t5"]
    source.files = source.files[:2]
    hub.files[source.repo] = dict.fromkeys(source.files, bytes(range(256)) * 100_000)
    hub.stop_after = 20_000_000
    download.fetch(source)
    assert all(Path("ckpts/t5", name).stat().st_size == 25_600_000 for name in source.files)
    assert all(int(asked.removeprefix("bytes=").split("-")[0]) > 10**6 for asked in hub.ranges) and hub.ranges


def test_a_server_that_goes_away(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    source = download.needed(config("only=[defi]"))["defi"]
    source.files = ["README.md", "lam_idm.ckpt"]
    hub.last = "lam_idm.ckpt"
    with pytest.raises(UserError, match=r"^ckpts/published/defi: download stopped .*missing: .*; repeat"):
        download.fetch(source)
    hub.reachable, hub.last = True, None
    download.fetch(source)
    assert (
        sorted(path.name for path in Path("ckpts/published/defi").iterdir() if path.is_file()) == source.files
    )


def test_without_network(hub: Hub, monkeypatch, capsys) -> None:
    hub.reachable = False
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "only=[dinov2]")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and len(said.strip().splitlines()) == 1
    for text in ("ckpts/dinov2: download stopped", "config.json", "https://huggingface.co/facebook/dinov2"):
        assert text in said
    hub.reachable = True
    run(monkeypatch, "only=[dinov2]")
    hub.reachable = False
    run(monkeypatch, "only=[dinov2]")
    assert "every file is there" in capsys.readouterr().out


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
    del hub.files[source.repo]["spiece.model"]
    with pytest.raises(UserError, match="google-t5/t5-base: has no spiece.model"):
        download.fetch(source)


def test_everything_of_a_repository(hub: Hub, monkeypatch, capsys) -> None:
    run(monkeypatch, "only=[defi]")
    found = {path.as_posix() for path in Path("ckpts/published/defi").rglob("*") if path.is_file()}
    assert {name for name in found if "/.cache/" not in name} == {
        f"ckpts/published/defi/{name}" for name in REPOS["zbzzbz/DeFI"]
    }
    hub.reachable = False
    run(monkeypatch, "only=[defi]")
    assert "every file is there" in capsys.readouterr().out
    for path in Path("ckpts/published/defi").rglob("*"):
        if path.is_file() and ".cache" not in path.parts:
            path.unlink()
    with pytest.raises(SystemExit):
        run(monkeypatch, "only=[defi]")
    assert "missing: *;" in capsys.readouterr().err, "the client's own files do not count"


def test_a_file_that_wants_to_lie_elsewhere(hub: Hub) -> None:
    source = download.needed(config("only=[defi]"))["defi"]
    hub.files[source.repo]["../../.ssh/authorized_keys"] = b"x"
    with pytest.raises(UserError, match="zbzzbz/DeFI: a file there is called .*authorized_keys"):
        download.fetch(source)


def test_a_repository_that_is_not_there(hub: Hub) -> None:
    hub.files.clear()
    source = download.needed(config("only=[defi]"))["defi"]
    with pytest.raises(UserError, match=r"^ckpts/published/defi: download stopped"):
        download.fetch(source)


def test_the_pairing_that_nobody_has_confirmed_is_noted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    notes = {
        name for name, source in download.needed(config("only=[svd,clip,video,defi]")).items() if source.note
    }
    assert notes == {"video"}
    monkeypatch.setattr(download, "fetch", lambda source: None)
    run(monkeypatch, "only=[video]")
    assert "Prefer DeFI's own" in capsys.readouterr().out
