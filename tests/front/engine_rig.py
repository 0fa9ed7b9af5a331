"""A supervised fake engine for the tests of the front."""

import asyncio
import contextlib
import itertools
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from service.front.engine_client import EngineClient
from service.front.supervisor import Supervisor
from service.messages import EngineConfig, Output, Sampling
from service.metrics import Metrics

FAKE_ENGINE = (sys.executable, str(Path(__file__).resolve().parent.parent / "fake_engine.py"))
ENDLESS = 10**9


@dataclass
class Stream:
    """A sink that keeps what it was given."""

    outputs: list[Output] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, output: Output, received_at: float) -> None:
        assert not self.ended.is_set(), "an output after the last"
        self.outputs.append(output)
        self.started.set()
        if output.finish_reason is not None:
            self.ended.set()

    @property
    def token_ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[-1].finish_reason


@dataclass
class Rig:
    client: EngineClient
    supervisor: Supervisor
    metrics: Metrics

    def open(self, prompt: list[int], max_tokens: int = ENDLESS) -> tuple[int, Stream]:
        stream = Stream()
        return self.client.open(prompt, Sampling(max_tokens), b"", stream), stream

    @property
    def process_id(self) -> int:
        assert self.supervisor.process is not None
        return self.supervisor.process.pid


def write_tokenizer(folder: Path, vocab_size: int = 1000) -> None:
    """A byte-level tokenizer.json for the fake engine's ids: 3 special tokens, the bytes, longer pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id for id, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    merges = []
    for first, second in itertools.product("etaoinshrdlucm" + "ĠETAOINSHRDLUCM", repeat=2):
        if len(vocabulary) < vocab_size:
            merges.append((first, second))
            vocabulary[first + second] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


@contextlib.asynccontextmanager
async def running(
    *,
    max_queue_requests: int = 512,
    load_timeout_s: float = 30,
    step_timeout_s: float = 30,
    command: tuple[str, ...] = FAKE_ENGINE,
    ready: bool = True,
) -> AsyncIterator[Rig]:
    """A started engine; failpoints come from the environment (see fake_engine). `ready`: waits for it."""
    metrics = Metrics("demo", "auto")
    client = EngineClient(max_queue_requests, metrics)
    supervisor = Supervisor(
        EngineConfig(model_path="/nowhere", precision="auto"),
        client,
        metrics,
        load_timeout_s=load_timeout_s,
        step_timeout_s=step_timeout_s,
        command=command,
    )
    supervisor.start()
    try:
        async with asyncio.timeout(60):
            if ready:
                await client.wait_ready()
            yield Rig(client, supervisor, metrics)
    finally:
        await supervisor.stop()
