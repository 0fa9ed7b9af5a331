"""Hub ids against a small hub of our own: what is fetched, what is refused, what is said."""

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from service.errors import CheckpointError, SettingError, SystemProblem
from service.model.hub import is_wanted, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Files of `org/model`, and what was asked for."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    refusal: str = ""  # the hub's X-Error-Code
    fetched: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        if hub.refusal:
            status = {"RevisionNotFound": 404, "GatedRepo": 403}.get(hub.refusal, 401)
            self.answer(status, b"{}", X_Error_Code=hub.refusal)
        elif path == "/api/models/org/model/revision/main":
            siblings = [{"rfilename": name} for name in hub.files]
            self.answer_json({"id": "org/model", "sha": COMMIT, "siblings": siblings})
        elif path.startswith("/api/models/org/model/tree/"):
            self.answer_json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in hub.files.items()
                ]
            )
        elif path.startswith("/org/model/resolve/"):
            name = path.split("/", 5)[5]
            data = hub.files[name]
            if self.command == "GET":
                hub.fetched.append(name)
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            self.answer(200, data, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        else:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815  (the name that http.server calls)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


class Seen(list[tuple[str, int, int, str]]):
    def __call__(self, *progress: Any) -> None:
        self.append(progress)


def fetch(model: str = "org/model", progress: Any = lambda *_: None) -> Path:
    return resolve(model, "main", Path("/unused"), progress)


def test_safetensors_and_their_companions_are_fetched_once(hub: Hub) -> None:
    hub.files = {
        "config.json": b"{}",
        "tokenizer.json": b"[]",
        "chat_template.jinja": b"x",
        "model.safetensors": b"w" * 50_000,
        "pytorch_model.bin": b"b" * 50_000,
        "original/model.safetensors": b"o",
        "README.md": b"r",
    }
    seen = Seen()
    folder = fetch(progress=seen)
    wanted = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == wanted == set(hub.fetched)
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    total = sum(len(hub.files[name]) for name in wanted)
    assert seen[0] == ("download", 0, total, "bytes")
    assert seen[-1] == ("download", total, total, "bytes")
    assert fetch() == folder
    assert len(hub.fetched) == len(wanted)


def test_what_is_cached_serves_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {"config.json": b"{}", "model.safetensors": b"w"}
    folder = fetch()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch() == folder
    with pytest.raises(SystemProblem, match="HF_HUB_OFFLINE") as error:
        fetch("org/other")
    assert "demo" in error.value.hint


def test_pickled_weights_are_refused_before_anything_is_fetched(hub: Hub) -> None:
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"b"}
    with pytest.raises(CheckpointError, match=r"pickled weights \(\.bin\)") as error:
        fetch()
    assert "save_pretrained" in error.value.hint
    assert hub.fetched == []


@pytest.mark.parametrize(
    ("refusal", "message", "hint"),
    [
        ("RepoNotFound", "does not exist, or it is private", "spelling"),
        ("GatedRepo", "is gated", "HF_TOKEN"),
        ("RevisionNotFound", "has no revision `main`", "/tree/main"),
    ],
)
def test_what_the_hub_refuses(hub: Hub, refusal: str, message: str, hint: str) -> None:
    hub.refusal = refusal
    with pytest.raises(CheckpointError, match=message) as error:
        fetch()
    assert hint in error.value.hint
    assert "\n" not in error.value.message


def test_a_hub_that_is_out_of_reach(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemProblem, match="cannot be reached") as error:
        fetch()
    assert "HF_ENDPOINT" in error.value.hint


def test_no_room_for_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {"config.json": b"{}", "model.safetensors": b"w" * 2_000_000}
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000})())
    with pytest.raises(SystemProblem, match="has 1 MB free; model `org/model` needs 2 MB"):
        fetch()
    assert hub.fetched == []


@pytest.mark.parametrize("model", ["bad id!", "a b/c"])
def test_what_is_no_hub_id(hub: Hub, model: str) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        fetch(model)


@pytest.mark.parametrize("model", ["./model", "/no/model", "~/no-model", "a/b/c"])
def test_a_folder_that_is_not_there(model: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        fetch(model)


@pytest.mark.parametrize("model", ["demo", "folder"])
def test_a_revision_of_what_has_none(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was ignored, and another version served than the one that was asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(SettingError, match=f"`revision` = `v2` is of no use to `{model}`"):
        resolve(model, "v2", tmp_path, lambda *_: None)


def test_a_local_folder_is_used_where_it_lies(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert fetch(str(tmp_path)) == tmp_path
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        fetch(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("consolidated.safetensors", False),
        ("onnx/config.json", False),
        ("pytorch_model.bin.index.json", True),
        ("model.gguf", False),
    ],
)
def test_which_files_are_fetched(name: str, wanted: bool) -> None:
    assert is_wanted(name) == wanted


def test_random_weights_fetch_no_weights(hub: Hub) -> None:
    hub.files = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": b"w" * 50_000}
    folder = resolve("org/model", "main", Path("/unused"), lambda *_: None, needs_weights=False)
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json"} == set(hub.fetched)
