"""A model's shape from headers: folders, presets, and a hub of our own whose weights stay where they are."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from tiny_models import make_checkpoint

from service.errors import CheckpointError, SystemProblem
from service.model.checkpoint import Checkpoint
from service.plan.shape import Shape, find_shape, read_folder, read_header

WIDE = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512}  # megabytes of weights


def nothing(*_: object) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shape") / "model"
    make_checkpoint(folder, "qwen3", torch.float16, **WIDE)
    return folder


def found(model: str | Path, cache: Path) -> Shape:
    return find_shape(str(model), "main", cache, nothing)


def test_a_folder(folder: Path, tmp_path: Path) -> None:
    shape = found(folder, tmp_path)
    opened = Checkpoint(folder)
    assert (shape.config, shape.num_parameters, shape.quantization) == (
        opened.config,
        opened.num_parameters,
        None,
    )
    assert (shape.dtype, shape.full_precision) == ("fp16", "fp16")


def test_headers_say_what_a_checkpoint_says(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    opened = Checkpoint(folder)
    header = read_header(file)
    assert set(header) == set(opened.names)
    assert all(tensor.shape == opened.info(name).shape for name, tensor in header.items())


def test_a_preset(tmp_path: Path) -> None:
    shape = found("preset:llama-3.1-8b", tmp_path)
    assert (shape.num_parameters, shape.full_precision) == (8_030_261_248, "bf16")


def test_other_weights_than_config_json_says(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"layers\.3\..*nothing"):
        read_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{}", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_folder(tmp_path)


class Hub(BaseHTTPRequestHandler):
    """One model, with ranges."""

    folder: Path
    sent: dict[str, int]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        names = [file.name for file in self.folder.iterdir()]
        if path == "/api/models/org/model/revision/main":
            siblings = [{"rfilename": name} for name in names]
            self.answer(json.dumps({"id": "org/model", "sha": "0" * 40, "siblings": siblings}).encode(), "")
        elif path.startswith("/api/models/org/model/tree/"):
            sizes = [(file.name, file.stat().st_size) for file in self.folder.iterdir()]
            listed = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes]
            self.answer(json.dumps(listed).encode(), "")
        elif (name := path.rpartition("/")[2]) in names:
            self.answer((self.folder / name).read_bytes(), name)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET  # noqa: N815  (the name that http.server calls)

    def answer(self, body: bytes, name: str) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        etag = hashlib.sha1(body).hexdigest()
        if asked:
            body = body[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206 if asked else 200)
        for header, value in {"ETag": f'"{etag}"', "X-Repo-Commit": "0" * 40}.items():
            self.send_header(header, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.sent[name] = self.sent.get(name, 0) + len(body)  # before whoever asked can go on
            self.wfile.write(body)


@pytest.fixture
def sent(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Bytes of each file that the hub has sent."""
    Hub.folder, Hub.sent = folder, {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield Hub.sent
    server.shutdown()
    server.server_close()
    thread.join()


def test_of_a_hub_model_only_headers_are_read(folder: Path, tmp_path: Path, sent: dict[str, int]) -> None:
    assert found("org/model", tmp_path) == read_folder(folder)
    size = (folder / "model.safetensors").stat().st_size
    assert sent["model.safetensors"] <= 100_001 < size / 10
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


def test_a_hub_model_that_does_not_exist(tmp_path: Path, sent: dict[str, int]) -> None:
    with pytest.raises((CheckpointError, SystemProblem), match="org/other"):
        found("org/other", tmp_path)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        found("./nowhere", tmp_path)
