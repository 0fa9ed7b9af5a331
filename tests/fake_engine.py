"""An engine child without torch: speaks service/messages.py, computes nothing, fails when it is told to.

    python tests/fake_engine.py --fd N --config JSON
    python tests/fake_engine.py --check --config JSON

Becomes ready after a short script, then emits one Step for all open requests; a request's tokens follow from
(prompt, sample index, token index) alone. `reply()` computes the same tokens in a test.

Environment (each empty or absent: off):

FAKE_STEP_MS          milliseconds a step; absent or 0: as fast as the front reads
FAKE_STEP_SPREAD      share by which steps are shorter and longer than that, evenly and in no order (0)
FAKE_QUEUE_MS         milliseconds a request waits before its first step, spread likewise (0)
FAKE_SLOWER           `precision:factor`: an engine in that precision takes so many times as long for a step
FAKE_HEARTBEAT_S      seconds between the messages of an idle engine (1)
FAKE_VOCAB            size of the vocabulary, where the model folder has no config.json (1000)
FAKE_EOS              the end-of-text id (2); never a part of a computed reply
FAKE_CONTEXT          longest prompt + answer (4096)
FAKE_REPLY            ids separated by commas: each answer is these, then the end-of-text id (finish `stop`)
FAKE_LOGPROB          of each sampled token (-0.25)
FAKE_ERROR_TOKEN      a prompt with this id ends with finish reason `error` at its first step
FAKE_FATAL            `code:message`: Fatal at load; FAKE_RETRYABLE=1 says that another try may work
FAKE_QUANTIZE         an `awq` engine makes its checkpoint while it loads: 1.75 s, and 900 MB at the peak
FAKE_DIE_AT_LOAD      kills itself before it is ready
FAKE_HANG_AT_LOAD     never becomes ready
FAKE_DIE_AT_STEP      kills itself instead of the k-th step (counted from 1)
FAKE_HANG_AT_STEP     stops for ever instead of the k-th step
FAKE_ONLY             a precision: failpoints fire only in an engine of this one
FAKE_REFUSE           `code:message`: what `--check` finds
FAKE_ONCE             a path: a failpoint fires only where this file does not exist, and creates it
"""

import argparse
import json
import os
import select
import signal
import socket
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec

from service.messages import (
    HEADER,
    MODEL_ERROR,
    Abort,
    EngineConfig,
    EngineInfo,
    EngineMessage,
    Evaluate,
    Evaluated,
    Fatal,
    FinishReason,
    Loading,
    Output,
    Paired,
    Ready,
    Step,
    StepStats,
    Submit,
    TokenLogprobs,
    frame,
    front_decoder,
)

CANARY: dict[str, float | str] = {
    "reference": "bf16", "tokens": 80, "prefill_kl_nats": 0.01, "decode_kl_nats": 0.005, "bound_nats": 1.0,
    "layer_error": 0.4, "layer": 7, "bound_layer_error": 0.8,
}  # fmt: skip
GOLDEN_RATIO = 0.6180339887498949  # its multiples fill 0 to 1 evenly, from any one on
FIRST_ORDINARY_ID = 3  # below are the ids that vocabularies give to special tokens


def first_offset(prompt: list[int], sample_index: int) -> int:
    return zlib.crc32(msgspec.msgpack.encode([prompt, sample_index]))


def reply(prompt: list[int], num_tokens: int, vocab_size: int = 1000, sample_index: int = 0) -> list[int]:
    """The first `num_tokens` tokens of the answer to `prompt`, in [FIRST_ORDINARY_ID, vocab_size)."""
    start = first_offset(prompt, sample_index)
    span = vocab_size - FIRST_ORDINARY_ID
    return [FIRST_ORDINARY_ID + (start + 7919 * index) % span for index in range(num_tokens)]


class Request:
    """An open Submit and how far its answer has come."""

    def __init__(self, submit: Submit, engine: "FakeEngine") -> None:
        self.id = submit.id
        self.prompt = submit.prompt
        self.sampling = submit.sampling
        self.sent = 0
        self.vocab_size = engine.vocab_size
        self.eos = engine.eos
        self.start = first_offset(submit.prompt, submit.sampling.sample_index)
        self.fixed = engine.fixed_reply
        self.logprob = engine.logprob
        self.failing = engine.error_token in submit.prompt
        self.room = engine.max_context_tokens - len(submit.prompt)
        self.due_at = time.monotonic() + engine.queue_s * engine.spread(submit.id)

    def next_token(self) -> int:
        if self.fixed is not None:
            if self.sent < len(self.fixed):
                return self.fixed[self.sent]
            if not self.sampling.ignore_eos and self.sent >= self.sampling.min_tokens:
                return self.eos
        span = self.vocab_size - FIRST_ORDINARY_ID
        return FIRST_ORDINARY_ID + (self.start + 7919 * self.sent) % span

    def step(self) -> Output:
        if self.failing:
            return Output(self.id, [], "error", error=MODEL_ERROR)
        sampling = self.sampling
        output = Output(self.id, [])
        if self.sent == 0 and sampling.prompt_logprobs >= 0:
            rest = [self.logprobs(token, sampling.prompt_logprobs) for token in self.prompt[1:]]
            output.prompt_logprobs = [None, *rest]
        if sampling.max_tokens == 0:
            output.finish_reason = "length"
            return output
        token = self.next_token()
        self.sent += 1
        output.token_ids.append(token)
        if sampling.logprobs >= 0:
            output.logprobs = [self.logprobs(token, sampling.logprobs)]
        output.finish_reason = self.finish(token)
        return output

    def finish(self, token: int) -> FinishReason | None:
        sampling = self.sampling
        if self.sent > sampling.min_tokens and (
            (token == self.eos and not sampling.ignore_eos) or token in sampling.stop_token_ids
        ):
            return "stop"
        return "length" if self.sent >= min(sampling.max_tokens, self.room) else None

    def logprobs(self, token: int, num_top: int) -> TokenLogprobs:
        others = [(token + 1 + k) % self.vocab_size for k in range(num_top - 1)]
        top = [token, *others] if num_top else []
        likeliest = self.logprob
        return TokenLogprobs(token, likeliest, 1, top, [likeliest - k for k in range(num_top)])


class FakeEngine:
    """One life of the fake: load, then step until the front is gone."""

    def __init__(self, connection: socket.socket, config: EngineConfig, env: Mapping[str, str]) -> None:
        self.connection = connection
        self.config = config
        self.env = env
        self.step_s = float(env.get("FAKE_STEP_MS") or 0) / 1e3
        self.queue_s = float(env.get("FAKE_QUEUE_MS") or 0) / 1e3
        self.step_spread = float(env.get("FAKE_STEP_SPREAD") or 0)
        slower, _, factor = (env.get("FAKE_SLOWER") or "").partition(":")
        self.step_s *= float(factor) if slower == config.precision else 1.0
        self.heartbeat_s = float(env.get("FAKE_HEARTBEAT_S") or 1)
        self.eos = int(env.get("FAKE_EOS") or 2)
        self.vocab_size = int(env.get("FAKE_VOCAB") or 1000)
        model_config = Path(config.model_path) / "config.json"
        if model_config.is_file():
            fields = json.loads(model_config.read_text())
            self.vocab_size = fields.get("vocab_size", self.vocab_size)
            eos = fields.get("eos_token_id", self.eos)
            self.eos = eos[0] if isinstance(eos, list) else eos
        self.error_token = int(env.get("FAKE_ERROR_TOKEN") or -1)
        fixed = env.get("FAKE_REPLY")
        self.logprob = float(env.get("FAKE_LOGPROB") or -0.25)
        self.fixed_reply = [int(token) for token in fixed.split(",")] if fixed else None
        self.max_context_tokens = config.max_context_tokens or int(env.get("FAKE_CONTEXT") or 4096)
        self.max_batch_requests = config.max_batch_requests or 64
        self.kv_tokens = config.kv_tokens or 65536
        self.load_seconds = {"import": 0.1, "load": 0.5}
        self.peak_load_bytes = 300_000_000
        self.requests: dict[int, Request] = {}
        self.steps = 0
        self.received = bytearray()

    def send(self, message: EngineMessage) -> None:
        self.connection.sendall(frame(message))

    def spread(self, place: int) -> float:
        """1, or with FAKE_STEP_SPREAD something about it."""
        return 1 + self.step_spread * (2 * (place * GOLDEN_RATIO % 1) - 1)

    def fires(self, name: str) -> bool:
        """Is failpoint `name` set, and not spent by an earlier life?"""
        if (
            not self.env.get(name)
            or self.env.get("FAKE_ONLY", self.config.precision) != self.config.precision
        ):
            return False
        once = self.env.get("FAKE_ONCE")
        if once:
            try:
                os.close(os.open(once, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return False
        return True

    def load(self) -> None:
        self.send(Loading("import", 1, 1, "layers"))
        if self.env.get("FAKE_FATAL") and self.fires("FAKE_FATAL"):
            code, _, message = self.env["FAKE_FATAL"].partition(":")
            self.send(Fatal(code, message, "change it", bool(self.env.get("FAKE_RETRYABLE"))))
            sys.exit(3)
        if self.fires("FAKE_DIE_AT_LOAD"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fires("FAKE_HANG_AT_LOAD"):
            signal.pause()
        if self.config.precision.startswith("awq") and self.fires("FAKE_QUANTIZE"):
            self.send(Loading("calibrate", 0, 1, "steps"))
            self.send(Loading("quantize", 30, 30, "layers"))
            self.load_seconds |= {"calibrate": 0.25, "quantize": 1.5}
            self.peak_load_bytes = 900_000_000
        self.send(Loading("load", 268_000_000, 268_000_000, "bytes"))
        self.send(Ready(self.info()))

    def info(self) -> EngineInfo:
        precision = "bf16" if self.config.precision == "auto" else self.config.precision
        return EngineInfo(
            model_path=self.config.model_path,
            architecture="FakeForCausalLM",
            precision=precision,
            dtype="bf16",
            kv_dtype="bf16" if self.config.kv_dtype == "auto" else self.config.kv_dtype,
            device="cpu",
            device_name="fake",
            torch_version="none",
            num_parameters=134_000_000,
            vocab_size=self.vocab_size,
            max_context_tokens=self.max_context_tokens,
            kv_tokens=self.kv_tokens,
            kv_block_tokens=16,
            max_batch_tokens=self.config.max_batch_tokens or 512,
            max_batch_requests=self.max_batch_requests,
            eos_token_ids=[self.eos],
            kernels={"qkv_proj": "fake_linear", "attention": "fake_attention", "lm_head": "fake_linear"},
            memory_bytes={"weights.codes": 268_000_000, "kv.free": 23040 * self.kv_tokens},
            weight_bytes=268_000_000,
            load_seconds=self.load_seconds,
            peak_load_bytes=self.peak_load_bytes,
            canary=CANARY if self.config.canary else {},
            device_bytes=64 << 30,
        )

    def run(self) -> None:
        self.load()
        while True:
            busy = bool(self.requests)
            if not self.receive(0 if busy else self.heartbeat_s) and not busy:
                self.send(Step([], self.stats(0.0)))
            if self.requests:
                self.step()

    def receive(self, timeout_s: float) -> bool:
        """Handles what has arrived, waiting at most `timeout_s` for it; exits when the front is gone."""
        readable, _, _ = select.select([self.connection], [], [], timeout_s)
        if not readable:
            return False
        data = self.connection.recv(1 << 20)
        if not data:
            sys.exit(0)
        self.received += data
        while len(self.received) >= HEADER.size:
            (length,) = HEADER.unpack_from(self.received)
            if len(self.received) < HEADER.size + length:
                break
            body = bytes(self.received[HEADER.size : HEADER.size + length])
            del self.received[: HEADER.size + length]
            self.handle(body)
        return True

    def handle(self, body: bytes) -> None:
        message = front_decoder.decode(body)
        if isinstance(message, Submit):
            self.requests[message.id] = Request(message, self)
        elif isinstance(message, Abort):
            ended = [id for id in message.ids if self.requests.pop(id, None)]
            if ended:
                self.send(Step([Output(id, [], "abort") for id in ended], self.stats(0.0)))
        elif isinstance(message, Evaluate):
            self.evaluate(message)
        else:
            sys.exit(0)

    def evaluate(self, message: Evaluate) -> None:
        """Perplexity 20 in each mode, after one progress message a window."""
        total = len(message.windows) * len(message.modes)
        for done in range(1, total):
            self.send(Evaluated(message.id, done, total, {}, {}))
        scored = sum(len(window) - 1 for window in message.windows)
        tokens = {
            mode: scored if mode == "prefill" else min(scored, message.decode_tokens)
            for mode in message.modes
        }
        answer = Evaluated(message.id, total, total, {m: 2.995732 * n for m, n in tokens.items()}, tokens)
        if "prefill" in tokens:
            answer.paired = {
                mode: Paired(n, 0.0, 0.001, 8) for mode, n in tokens.items() if mode != "prefill"
            }
        if message.reference:
            answer.kl_mean, answer.kl_tokens, answer.top1_agreement = 0.0123, scored, 0.97
        self.send(answer)

    def step(self) -> None:
        self.steps += 1
        if self.steps == int(self.env.get("FAKE_DIE_AT_STEP") or 0) and self.fires("FAKE_DIE_AT_STEP"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.steps == int(self.env.get("FAKE_HANG_AT_STEP") or 0) and self.fires("FAKE_HANG_AT_STEP"):
            signal.pause()
        started = time.monotonic()
        due = [request for request in self.requests.values() if request.due_at <= started]
        running = due[: self.max_batch_requests]
        new = [request for request in running if request.sent == 0]
        outputs = [request.step() for request in running]
        for output in outputs:
            if output.finish_reason is not None:
                del self.requests[output.id]
        step_s = self.step_s * self.spread(self.steps)
        if step_s:
            time.sleep(max(0.0, started + step_s - time.monotonic()))
        stats = self.stats(max(step_s, 1e-6))
        stats.num_prefill_tokens = sum(len(request.prompt) for request in new)
        stats.num_decode_tokens = len(running) - len(new)
        self.send(Step(outputs, stats))

    def stats(self, step_s: float) -> StepStats:
        used = sum(len(request.prompt) + request.sent for request in self.requests.values())
        return StepStats(
            step_seconds=step_s,
            num_running=min(len(self.requests), self.max_batch_requests),
            num_waiting=max(0, len(self.requests) - self.max_batch_requests),
            kv_used_tokens=min(used, self.kv_tokens),
        )


def check(env: Mapping[str, str]) -> NoReturn:
    """Says on stdout what speaks against the configuration; exit code 0: nothing."""
    refused = env.get("FAKE_REFUSE", "")
    if refused:
        code, _, message = refused.partition(":")
        print(msgspec.json.encode(Fatal(code, message, "change it")).decode())
    sys.exit(3 if refused else 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--config", required=True)
    arguments = parser.parse_args()
    config = msgspec.json.decode(arguments.config, type=EngineConfig)
    if arguments.check:
        check(dict(os.environ))
    connection = socket.socket(fileno=arguments.fd)
    try:
        FakeEngine(connection, config, dict(os.environ)).run()
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)  # the front is gone


if __name__ == "__main__":
    main()
