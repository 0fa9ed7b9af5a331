"""What goes wrong before a server runs is one line, its fix and an exit code, and never a traceback."""

import errno
import json
import logging
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.__main__ import main, run
from service.compare.report import Mode, Row
from service.disk import told_disk_errors
from service.errors import SystemProblem
from service.precision import CALIBRATED, TABLE, backend_class

Fails = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Commands set up logging for a process of their own."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    logging.getLogger("service").setLevel(logging.NOTSET)


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that must fail -> (exit code, its message, its hint)."""

    def run_failing(*arguments: str) -> tuple[int, str, str]:
        code = run(list(arguments))
        printed = capfd.readouterr().err
        assert "Traceback" not in printed
        found = re.search(r"^error: (.*)(?:\n  hint: (.*))?\n\Z", printed, re.MULTILINE)
        assert found, printed
        assert printed.count(found[1]) == 1, "said twice"
        return code, found[1], found[2] or ""

    return run_failing


def write_folder(folder: Path, *names: str) -> str:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    return str(folder)


def test_port_taken(fails: Fails) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        code, message, hint = fails("serve", "/nowhere", "--port", port)
    assert code == 4
    assert f"port `{port}`" in message
    assert "--port" in hint


def test_host_of_another_machine(fails: Fails) -> None:
    code, message, hint = fails("serve", "/nowhere", "--host", "192.0.2.1")
    assert code == 2
    assert "`192.0.2.1`" in message
    assert hint


@pytest.mark.parametrize("command", ["serve", "eval"])
def test_unknown_precision(fails: Fails, command: str) -> None:
    code, message, hint = fails(
        command, "--precision", "int5", "--port" if command == "serve" else "--threads", "0"
    )
    assert code == 3
    assert "`int5`" in message
    assert "awq" in message
    assert hint


def test_unreadable_precision(fails: Fails) -> None:
    code, message, _ = fails("serve", "--port", "0", "--precision", "nf4:double_quant")
    assert code == 3
    assert "`double_quant`" in message


CALIBRATING = {
    "serve": ("--precision", "{}"),
    "eval": ("--precision", "{}"),
    "quantize": ("--precision", "{}", "--out", "/nowhere/out"),
    "compare": ("--precisions", "bf16,{}", "--out", "/nowhere/out"),
}


@pytest.mark.parametrize("command", CALIBRATING)
def test_a_calibration_text_that_is_not_there(fails: Fails, command: str) -> None:
    """Told before weights are looked for, whatever the precision."""
    for precision in ("awq", "nf4"):
        given = [argument.format(precision) for argument in CALIBRATING[command]]
        code, message, hint = fails(command, "/nowhere", *given, "--calibration", "/nowhere/text")
        assert (code, "`calibration` = `/nowhere/text` cannot be read" in message) == (2, True)
        assert hint


@pytest.mark.parametrize("command", CALIBRATING)
def test_a_calibration_text_that_no_mode_uses(fails: Fails, command: str, tmp_path: Path) -> None:
    """It was accepted and ignored; `awq` comes as far as the weights."""
    text = tmp_path / "text"
    text.write_text("prose")
    for precision, exit_code in (("nf4", 2), ("awq:bits=3", 3)):
        given = [argument.format(precision) for argument in CALIBRATING[command]]
        code, message, _ = fails(command, "/nowhere", *given, "--calibration", str(text))
        assert (code, str(text) in message and precision in message) == (exit_code, exit_code == 2)
    if command in ("serve", "eval"):
        assert fails(command, "/nowhere", "--calibration", str(text))[0] == 2, "auto calibrates nothing"


def test_calibrated_modes_are_those_with_a_quantizer() -> None:
    assert [name for name in TABLE if backend_class(name).quantizer] == list(CALIBRATED)


def test_no_such_folder(fails: Fails) -> None:
    code, message, hint = fails("serve", "./no/such/folder", "--port", "0")
    assert (code, "does not exist" in message) == (3, True)
    assert "hub id" in hint


def test_only_pickled_weights(fails: Fails, tmp_path: Path) -> None:
    model = write_folder(tmp_path / "model", "config.json", "pytorch_model.bin")
    code, message, hint = fails("serve", model, "--port", "0")
    assert code == 3
    assert ".bin" in message
    assert "save_pretrained" in hint


def test_only_gguf_weights(fails: Fails, tmp_path: Path) -> None:
    code, message, _ = fails("serve", write_folder(tmp_path / "model", "model.gguf"), "--port", "0")
    assert (code, "GGUF" in message) == (3, True)


def test_full_disk(fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5_000_000})())
    code, message, hint = fails("serve", "demo", "--port", "0", "--cache-dir", str(tmp_path / "cache"))
    assert code == 4
    assert "5 MB free" in message
    assert "--cache-dir" in hint


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "is full"), (errno.EACCES, "cannot be written"), (errno.EROFS, "cannot be")],
)
def test_a_disk_that_refuses_while_writing(tmp_path: Path, number: int, words: str) -> None:
    with pytest.raises(SystemProblem, match=words), told_disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))


def test_other_errors_of_the_system_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), told_disk_errors(tmp_path):
        (tmp_path / "missing").read_bytes()


def test_out_that_exists(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    code, message, _ = fails("eval", "--out", str(tmp_path / "result.json"))
    assert (code, "exists" in message) == (4, True)
    model = write_folder(tmp_path / "model", "config.json", "model.safetensors")
    code, message, hint = fails("quantize", model, "--out", str(tmp_path))
    assert (code, "--out" in hint) == (4, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--limit", "3"), "need `--tasks`"),
        (("--through", "http"), "need `--tasks`"),
        (("--tasks", "say", "--reference", "bf16"), "both were given"),
        (("--tasks", "say", "--protocol", "gptq-2048"), "both were given"),
    ],
)
def test_tasks_and_texts_are_asked_for_apart(fails: Fails, arguments: tuple[str, ...], words: str) -> None:
    code, message, hint = fails("eval", "/nowhere", *arguments)
    assert (code, words in message) == (2, True)
    assert hint


def test_a_mode_that_failed_is_a_failed_command(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row could fail and the exit code was 0."""
    rows = [
        Row(mode=Mode(name="bf16", precision="bf16"), status="ok"),
        Row(mode=Mode(name="nf4", precision="nf4"), status="failed", error="no room"),
    ]
    monkeypatch.setattr("service.cli.compare.run_compare", lambda *_, **__: SimpleNamespace(rows=rows))
    model = write_folder(tmp_path / "model", "config.json", "model.safetensors")
    code, message, hint = fails("compare", model, "--precisions", "bf16,nf4", "--out", str(tmp_path / "out"))
    assert (code, message) == (1, "1 of 2 modes failed: nf4")
    assert "same command" in hint


@pytest.mark.parametrize("command", ["serve", "eval"])
def test_a_precision_that_the_checkpoint_is_not(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The engine's own refusal, through the socket and the supervisor, and the supervisor's not besides."""
    from tiny_models import make_checkpoint
    from tiny_tokenizers import write_checkpoint

    write_checkpoint(tmp_path, "byte_level")
    make_checkpoint(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("HALFTONE_PORT", "0")
    code, message, hint = fails(command, str(tmp_path), "--precision", "nf4")
    assert code == 3
    assert "awq" in message
    assert hint


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serv"], "serv"),
        (["serve", "--prot", "1"], "--prot"),
        (["serve", "a", "b"], "b"),
        (["eval", "--windows", "0"], "--windows"),
        (["serve", "--port", "x"], "from --port"),
    ],
)
def test_a_wrong_command_line(fails: Fails, arguments: list[str], words: str) -> None:
    code, message, hint = fails(*arguments)
    assert code == 2
    assert words in message
    assert hint


@pytest.mark.parametrize("command", ["compare", "eval"])
@pytest.mark.parametrize(
    "flags",
    [("--metrics-compat", "vllm"), ("--allowed-origins", "http://127.0.0.1:8001"), ("--time-kernels",)],
    ids=lambda flags: flags[0],
)
def test_what_only_a_server_does_is_no_flag_of(fails: Fails, command: str, flags: tuple[str, ...]) -> None:
    code, message, _ = fails(command, "demo", *flags)
    assert code == 2
    assert f"No such option: {flags[0]}" in message


def test_a_fault_of_ours_is_one_line_too(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("the impossible")

    monkeypatch.setattr("service.cli.app.load_settings", broken)
    code, message, hint = fails("serve")
    assert (code, message) == (1, "RuntimeError: the impossible")
    assert "HALFTONE_LOG_LEVEL=debug" in hint
    monkeypatch.setenv("HALFTONE_LOG_LEVEL", "debug")
    with pytest.raises(RuntimeError):
        run(["serve"])


def test_terminated(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM unwinds, so that half-written folders are removed."""

    def terminated(**_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("service.cli.app.load_settings", terminated)
    monkeypatch.setattr("sys.argv", ["halftone", "serve"])
    try:
        with pytest.raises(SystemExit) as left:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 143


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("service.cli.app.load_settings", interrupted)
    assert run(["serve"]) == 130
