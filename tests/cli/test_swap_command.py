"""`halftone swap` against a running server: what it prints, and its exit code."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from front_thread import running
from tiny_tokenizers import write_checkpoint

from service.__main__ import run
from service.api.app import create_app
from service.config import Settings
from service.front.host import Host

FAKE_ENGINE = str(Path(__file__).resolve().parent.parent / "fake_engine.py")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server whose engine has no room for int8."""
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, "byte_level")
    failing = ("env", "FAKE_ONLY=int8", "FAKE_FATAL=device_unusable:no room for the weights")
    command = (*failing, sys.executable, FAKE_ENGINE)
    settings = Settings(model=str(folder), port=0, admin_key="root")
    with running(lambda: Host(settings, folder, create_app, command=command), 30) as (host, _):
        yield host.url


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFTONE_ADMIN_KEY", "root")


def test_stages_and_a_last_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["swap", "nf4", "--url", url]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("nf4 is served in the place of bf16, after ")
    assert told.out.endswith("canary 0.010 nats a token, at most 1\n")
    for line in ("Ending the engine ...", "Loading (268 MB) ..."):
        assert line in told.err
    assert run(["swap", "nf4", "--url", url]) == 0
    assert capsys.readouterr().out == "nf4 was served already\n"


def test_a_swap_that_fails_fails(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["swap", "int8", "--url", f"{url}/"]) == 1
    told = capsys.readouterr()
    assert "rolled back, `" in told.err
    assert "is served: no room for the weights\n  hint: change it" in told.err
    assert told.out == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nf5"], 1, "precision `nf5` does not exist"),
        (["nf4", "--admin-key", "other"], 1, "the admin key is not known here"),
        (["nf4", "--url", "ftp://x"], 2, "`ftp://x` is no address of a server"),
        (["nf4", "--url", "http://127.0.0.1:1"], 4, "`http://127.0.0.1:1` does not answer"),
    ],
)
def test_what_is_refused_is_told(
    url: str, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert run(["swap", "--url", url, *arguments]) == code
    assert words in capsys.readouterr().err


def test_no_key_no_question(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("HALFTONE_ADMIN_KEY")
    assert run(["swap", "nf4"]) == 2
    assert "a swap needs the server's admin key" in capsys.readouterr().err
