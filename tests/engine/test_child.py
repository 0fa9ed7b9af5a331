"""The engine's process over a real socket pair, with a tiny random Llama."""

import gc
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_child import spawned
from fake_model import fake_engine
from tiny_models import greedy, load_instance, make_checkpoint

from service.engine import child
from service.messages import (
    Abort,
    EngineConfig,
    Evaluate,
    Evaluated,
    Fatal,
    Loading,
    Ready,
    Sampling,
    Shutdown,
    Step,
    Submit,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    make_checkpoint(path, "llama")
    return path


def test_a_life_from_loading_to_the_front_s_end(folder: Path) -> None:
    config = EngineConfig(model_path=str(folder), precision="fp32", device="cpu", kv_tokens=512)
    with spawned(config) as child:
        stages = []
        while isinstance(message := child.receive(), Loading):
            stages.append(message.stage)
        assert list(dict.fromkeys(stages)) == ["import", "device", "verify", "load", "check", "warm"]
        assert isinstance(message, Ready)
        info = message.info
        assert (info.precision, info.dtype, info.device, info.vocab_size) == ("fp32", "fp32", "cpu", 128)
        assert (info.kv_tokens, info.max_context_tokens) == (512, 256)
        weights = sum(size for part, size in info.memory_bytes.items() if part.startswith("weights."))
        assert info.weight_bytes == weights > 0
        assert set(stages) == set(info.load_seconds)

        heartbeat = child.receive()
        assert isinstance(heartbeat, Step)
        assert heartbeat.outputs == []

        prompt = [5, 6, 7, 8]
        child.send(
            Submit(1, prompt, Sampling(12, temperature=0, ignore_eos=True)),
            Submit(2, prompt[::-1], Sampling(200, ignore_eos=True)),
            Abort([2]),
        )
        outputs = child.outputs(until=1)
        tokens = [token for output in outputs if output.id == 1 for token in output.token_ids]
        assert tokens == greedy(load_instance(folder), prompt, 12)
        [reason] = [output.finish_reason for output in outputs if output.id == 2 and output.finish_reason]
        assert reason == "abort"

        child.send(Evaluate(9, [[1, 2, 3]], ["prefill"]))
        evaluated = Evaluated(9, 0, 1, {}, {})
        while evaluated.done < evaluated.total:
            message = child.receive()
            evaluated = message if isinstance(message, Evaluated) else evaluated
        assert evaluated.tokens == {"prefill": 2}

        child.connection.close()
        assert child.process.wait(timeout=2) == 0


def test_shutdown_ends_a_busy_engine(folder: Path) -> None:
    config = EngineConfig(model_path=str(folder), precision="auto", device="cpu", kv_tokens=512)
    with spawned(config) as child:
        while isinstance(child.receive(), Loading):
            pass
        child.send(Submit(1, [1, 2], Sampling(200, ignore_eos=True)), Shutdown())
        assert child.process.wait(timeout=2) == 0


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"model_path": "/nowhere"}, "invalid_checkpoint", "/nowhere"),
        ({"precision": "fp9"}, "invalid_precision", "fp9"),
        ({"kv_tokens": 1 << 50}, "device_memory", "kv_tokens"),
    ],
    ids=["checkpoint", "precision", "memory"],
)
def test_what_stops_a_start_is_one_fatal_with_the_fix(
    folder: Path, settings: dict[str, object], code: str, words: str
) -> None:
    config = EngineConfig(**{"model_path": str(folder), "precision": "fp32", "device": "cpu"} | settings)
    with spawned(config) as child:
        while isinstance(message := child.receive(), Loading):
            pass
        assert isinstance(message, Fatal)
        assert (message.code, message.retryable) == (code, False)
        assert words in message.message
        assert message.hint
        assert (message.needs_bytes > message.has_bytes > 0) is (code == "device_memory")
        assert child.process.wait(timeout=5) == 3


def test_the_limits_of_a_cache_are_told_as_settings(folder: Path) -> None:
    """In this process, for speed: contradictions between settings name both."""
    from service.engine.startup import start
    from service.errors import SettingError

    for settings, words in [
        ({"max_batch_tokens": 8, "max_batch_requests": 9}, "max_batch_requests"),
        ({"kv_tokens": 64, "max_context_tokens": 65}, "KV cache holds 64"),
        ({"max_context_tokens": 257}, "model allows 256"),
    ]:
        config = EngineConfig(**{"model_path": str(folder), "precision": "fp32", "device": "cpu"} | settings)
        with pytest.raises(SettingError, match=words):
            start(config, lambda _: None, 0.0)


def test_auto_is_what_the_checkpoint_is(folder: Path, tmp_path: Path) -> None:
    from service.engine.sources import choose_backend
    from service.model.checkpoint import Checkpoint

    half = tmp_path / "half"
    make_checkpoint(half, "llama", torch.float16)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_backend("auto", Checkpoint(folder), cpu).canonical == "bf16"
    assert choose_backend("auto", Checkpoint(half), cpu).canonical == "bf16"
    assert choose_backend("auto", Checkpoint(half), cuda).canonical == "fp16"
    assert choose_backend("fp32", Checkpoint(half), cuda).canonical == "fp32"


@pytest.mark.parametrize(
    ("quantization", "precision"),
    [
        ({"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 64}, "awq"),
        ({"quant_method": "awq", "version": "gemm", "bits": 3, "group_size": 64}, "awq:bits=3"),
    ],
)
def test_auto_of_a_quantized_checkpoint(
    folder: Path, tmp_path: Path, quantization: dict[str, object], precision: str
) -> None:
    from service.engine.sources import choose_backend
    from service.model.checkpoint import Checkpoint

    quantized = shutil.copytree(folder, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_bytes())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    backend = choose_backend("auto", Checkpoint(quantized), torch.device("cpu"))
    assert backend.canonical == precision
    assert backend.accepts(quantization)


class FrontGoneError(Exception):
    """Ends `serve`, which else goes on until the front is gone."""


class ScriptedLink:
    """Says what comes by turns: None where nothing does; keeps how long each was waited for."""

    def __init__(self, turns: list[Submit | None]) -> None:
        self.turns = turns
        self.waits: list[float] = []

    def receive(self, timeout_s: float) -> list[Submit]:
        self.waits.append(timeout_s)
        if not self.turns:
            raise FrontGoneError
        message = self.turns.pop(0)
        return [] if message is None else [message]

    def send(self, message: object) -> None:
        pass


def test_an_engine_that_rests_prepares_until_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "freeze", lambda: None)  # other tests live in this process
    engine = fake_engine(captured=True, max_batch_tokens=128)  # 64 and 128 rows, alone and beside decodes
    graphs = engine.runner.graphs
    assert graphs is not None
    known = [len(graphs._mixed)]
    monkeypatch.setattr(engine, "prepare", lambda: (graphs.capture_one(), known.append(len(graphs._mixed))))
    model = SimpleNamespace(device=torch.device("cpu"), outlier_counts=dict)
    info = SimpleNamespace(peak_load_bytes=0, memory_bytes={})
    ledger = SimpleNamespace(parts=lambda is_idle: {"kv.used": 0})  # asked where all this takes a second
    serving = SimpleNamespace(engine=engine, model=model, info=info, ledger=ledger)
    asking = Submit(1, [3] * 100, Sampling(1, temperature=0, ignore_eos=True))
    # a shape is prepared after a rest, another at once; then somebody asks, and it rests again
    link = ScriptedLink([None, None, asking, None, None, None, None])
    with pytest.raises(FrontGoneError):
        child.serve(serving, EngineConfig(model_path="", precision="fp32"), link)  # type: ignore[arg-type]
    rest, beat = child.REST_S, child.HEARTBEAT_S
    assert link.waits == [rest, 0, 0, rest, 0, beat, beat, beat]
    assert known[0] < known[-1] == 4
