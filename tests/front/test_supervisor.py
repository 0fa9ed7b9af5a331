"""The engine's lives and deaths, with a real child process."""

import asyncio
import os
import signal
import socket
import subprocess
from pathlib import Path

import msgspec
import pytest
from engine_rig import FAKE_ENGINE, running
from fake_engine import reply

from service.cores import physical_cores
from service.errors import (
    CheckpointError,
    EngineUnavailableError,
    HalftoneError,
    ShortageError,
    SystemProblem,
)
from service.front import supervisor
from service.front.engine_client import EngineClient
from service.front.supervisor import Supervisor, describe_exit, engine_environment, error_of
from service.messages import EngineConfig, Fatal, StepStats
from service.metrics import Metrics

pytestmark = pytest.mark.anyio

# they differ in how they read sockets and reap children
both_loops = pytest.mark.parametrize(
    "anyio_backend", [("asyncio", {"use_uvloop": True}), "asyncio"], ids=["uvloop", "asyncio"]
)


@both_loops
async def test_kill_in_mid_stream() -> None:
    """Each open request gets one error, the state goes down, and another engine comes by itself."""
    async with running() as rig:
        streams = [rig.open([number])[1] for number in range(20)]
        evaluation = asyncio.create_task(rig.client.evaluate([[1, 2]] * 10**6, ["prefill"]))
        await asyncio.gather(*(stream.started.wait() for stream in streams))
        first_process = rig.process_id
        down = asyncio.create_task(rig.client.wait_for("down"))
        await asyncio.sleep(0)
        os.kill(first_process, signal.SIGKILL)
        for stream in streams:
            await stream.ended.wait()
            assert stream.finish_reason == "error"
            assert stream.outputs[-1].error == "engine died"
        with pytest.raises(EngineUnavailableError, match="engine died"):
            await evaluation
        await down
        with pytest.raises(EngineUnavailableError, match="is being started again"):
            rig.open([1])
        await rig.client.wait_ready()
        assert rig.process_id != first_process
        _, stream = rig.open([5], max_tokens=3)
        await stream.ended.wait()
        assert stream.token_ids == reply([5], 3)
        assert 'engine_restarts_total{model="demo",precision="bf16"} 1.0' in rig.metrics.render().decode()


@both_loops
async def test_a_fatal_error_is_kept_and_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FATAL", "invalid_checkpoint:`a.safetensors` ends early")
    async with running(ready=False) as rig:
        with pytest.raises(CheckpointError, match="ends early") as caught:
            await rig.client.wait_ready()
        assert (caught.value.exit_code, caught.value.hint) == (3, "change it")
        assert rig.client.state == "failed"
        with pytest.raises(EngineUnavailableError, match=r"cannot run: `a\.safetensors` ends early"):
            rig.open([1])
        assert 'engine_restarts_total{model="demo",precision="auto"} 0.0' in rig.metrics.render().decode()


def test_a_shortage_is_known_with_its_bytes_on_this_side_too() -> None:
    error = error_of(Fatal("device_memory", "no room", "free some", needs_bytes=3, has_bytes=2))
    assert isinstance(error, ShortageError)
    assert (error.needs_bytes, error.has_bytes, error.hint) == (3, 2, "free some")


async def test_a_fatal_error_that_may_pass_is_retried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_FATAL", "device_unusable:the device is busy")
    monkeypatch.setenv("FAKE_RETRYABLE", "1")
    monkeypatch.setenv("FAKE_ONCE", str(tmp_path / "fired"))
    async with running() as rig:
        assert rig.client.state == "ready"
        assert (tmp_path / "fired").exists()


@pytest.mark.parametrize("busy", [True, False])
async def test_a_silent_engine_is_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, busy: bool
) -> None:
    """It hangs in a step, or its heartbeat stops while it is idle."""
    monkeypatch.setenv("FAKE_HANG_AT_STEP", "3")
    monkeypatch.setenv("FAKE_ONCE", str(tmp_path / "fired"))
    if not busy:
        monkeypatch.setenv("FAKE_HEARTBEAT_S", "1000")
    async with running(step_timeout_s=0.5) as rig:
        first_process = rig.process_id
        if busy:
            _, stream = rig.open([1])
            await stream.ended.wait()
            assert stream.outputs[-1].error == "engine died"
            assert stream.token_ids == reply([1], 2)
        monkeypatch.setenv("FAKE_HEARTBEAT_S", "0.1")  # of the next engine
        await rig.client.wait_for("down")
        await rig.client.wait_ready()
        assert rig.process_id != first_process
        with pytest.raises(ProcessLookupError):
            os.kill(first_process, 0)


async def test_an_idle_engine_that_beats_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_HEARTBEAT_S", "0.3")
    beats: asyncio.Queue[StepStats] = asyncio.Queue()
    monkeypatch.setattr(Metrics, "step", lambda self, stats: beats.put_nowait(stats))
    async with running(step_timeout_s=1.5) as rig:
        first_process = rig.process_id
        for _ in range(6):
            assert (await beats.get()).step_seconds == 0
        assert rig.process_id == first_process


async def test_a_load_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_HANG_AT_LOAD", "1")
    async with running(ready=False, load_timeout_s=0.5) as rig:
        with pytest.raises(EngineUnavailableError, match=r"not ready after 0.5 s \(`load_timeout_s`\)"):
            await rig.client.wait_ready()


async def test_five_crashes_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DIE_AT_LOAD", "1")
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.001)
    async with running(ready=False) as rig:
        with pytest.raises(
            EngineUnavailableError, match="died 5 times in 10 minutes, at last: killed by SIGKILL"
        ):
            await rig.client.wait_ready()
        assert 'engine_restarts_total{model="demo",precision="auto"} 4.0' in rig.metrics.render().decode()


async def test_old_crashes_are_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(supervisor, "CRASH_WINDOW_S", 0.0)
    async with running() as rig:
        for _ in range(6):
            os.kill(rig.process_id, signal.SIGKILL)
            await rig.client.wait_for("down")
            await rig.client.wait_ready()


async def test_a_missing_program_is_told() -> None:
    async with running(ready=False, command=("/nowhere/python",)) as rig:
        with pytest.raises(SystemProblem, match="`/nowhere/python` cannot be run: No such file"):
            await rig.client.wait_ready()


@both_loops
async def test_stop_ends_process_and_requests() -> None:
    async with running() as rig:
        _, stream = rig.open([1])
        await stream.started.wait()
        process_id = rig.process_id
        await rig.supervisor.stop()
        assert stream.finish_reason == "error"
        assert rig.supervisor.process is not None
        assert rig.supervisor.process.returncode == 0, "it was asked before it was told by a signal"
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)
        with pytest.raises(EngineUnavailableError):
            await rig.client.wait_ready()


@both_loops
@pytest.mark.parametrize("failpoint", ["FAKE_HANG_AT_LOAD", "FAKE_HANG_AT_STEP"])
async def test_stop_ends_an_engine_that_does_not_listen(
    monkeypatch: pytest.MonkeyPatch, failpoint: str
) -> None:
    monkeypatch.setenv(failpoint, "2")
    monkeypatch.setattr(supervisor, "EXIT_GRACE_S", 0.1)
    async with running(ready=False) as rig:
        if failpoint == "FAKE_HANG_AT_STEP":
            await rig.client.wait_ready()
            _, stream = rig.open([1])
            await stream.started.wait()
        else:  # nobody reads its socket yet: asking would only cost the time to wait for an answer
            monkeypatch.setattr(rig.client, "shut_down_engine", lambda: pytest.fail("asked"))
            while rig.client.loading is None:
                await asyncio.sleep(0.01)
        await rig.supervisor.stop()
        assert rig.supervisor.process is not None
        # 0: it was asked just before the step in which it hangs
        accepted = {-signal.SIGTERM, 0} if failpoint == "FAKE_HANG_AT_STEP" else {-signal.SIGTERM}
        assert rig.supervisor.process.returncode in accepted


async def test_an_engine_that_no_signal_moves_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "EXIT_GRACE_S", 0.1)
    async with running() as rig:
        os.kill(rig.process_id, signal.SIGSTOP)
        await rig.supervisor.stop()
        assert rig.supervisor.process is not None
        assert rig.supervisor.process.returncode == -signal.SIGKILL


async def test_the_engine_leads_a_session_of_its_own() -> None:
    """A terminal's Ctrl-C goes to the front alone, signals to the engine's group to all it spawned."""
    async with running() as rig:
        assert os.getsid(rig.process_id) == os.getpgid(rig.process_id) == rig.process_id


def test_each_crash_in_the_window_doubles_the_wait() -> None:
    metrics = Metrics("demo", "auto")
    client = EngineClient(1, metrics)
    config = EngineConfig(model_path="/nowhere", precision="auto")
    lives = Supervisor(config, client, metrics, load_timeout_s=1, step_timeout_s=1)
    assert [lives._delay_after_crash() for _ in range(5)] == [0.25, 0.5, 1.0, 2.0, None]


def test_the_engine_exits_when_the_front_is_gone() -> None:
    front, engine = socket.socketpair()
    config = msgspec.json.encode(EngineConfig(model_path="/nowhere", precision="auto")).decode()
    command = [*FAKE_ENGINE, "--fd", str(engine.fileno()), "--config", config]
    with subprocess.Popen(command, pass_fds=(engine.fileno(),)) as process:
        engine.close()
        assert front.recv(1)  # it runs
        front.close()
        assert process.wait(timeout=10) == 0


def test_an_error_crosses_the_socket_as_what_it_was() -> None:
    error = error_of(Fatal("invalid_precision", "no", "hint"))
    assert (type(error).__name__, error.exit_code, error.hint) == ("PrecisionError", 3, "hint")
    assert type(error_of(Fatal("new_code", "no"))) is HalftoneError


def test_how_a_process_ended() -> None:
    assert describe_exit(1) == "exit code 1"
    assert describe_exit(-11) == "killed by SIGSEGV"
    assert describe_exit(-9).startswith("killed by SIGKILL (")


def test_openmp_is_kept_from_spinning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    environment = engine_environment(threads=0)
    assert environment["OMP_NUM_THREADS"] == str(physical_cores())
    assert environment["GOMP_SPINCOUNT"] == "1000"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert engine_environment(threads=0)["OMP_NUM_THREADS"] == "3"
    assert engine_environment(threads=7)["OMP_NUM_THREADS"] == "7"
