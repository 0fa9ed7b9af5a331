"""What the engine makes without HTTP: tokens/s, milliseconds a step, the host's part, the GPU's busy share.

    python tests/benchmarks/engine_steps.py --model preset:llama-3.1-8b

On a GPU: random weights, 512 random prompt tokens in, 256 out, greedy, end tokens ignored, closed loop.
`--host-only` takes a model that computes nothing, on a CPU: what remains is the host's work of a step.
"""

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from loadtest.statistics import percentile
from service import device as devices
from service.cli.display import Display
from service.cli.model import find_model
from service.config import load_settings
from service.engine.engine import Engine, Limits
from service.engine.startup import start
from service.messages import Sampling, Submit
from service.model.batch import BLOCK_TOKENS, PagedKV, StepBatch

WARM_STEPS = 20
TRACED_STEPS = 60
COLUMNS = (
    "streams", "tokens a step while few decode", "tokens/s", "decode step, ms (CPU)",
    "step with prompts, ms (CPU)", "ITL p50 / p99 / p99.9 / most, ms", "GPU busy",
)  # fmt: skip


@dataclass
class Measured:
    """Of one run; seconds by step, elapsed and of the engine's thread on a CPU."""

    num_tokens: int = 0
    wall_s: float = 0.0
    decode_s: list[float] = field(default_factory=list)
    decode_host_s: list[float] = field(default_factory=list)
    mixed_s: list[float] = field(default_factory=list)
    mixed_host_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)  # one of each token that follows another


def run(engine: Engine, num_streams: int, num_requests: int, lengths: tuple[int, int]) -> Measured:
    """A closed loop: whoever ends is followed by a new request, until all have been sent."""
    measured = Measured()
    generator = random.Random(num_streams)
    prompt_tokens, new_tokens = lengths
    sampling = Sampling(new_tokens, temperature=0, ignore_eos=True)
    num_sent = 0

    def send() -> None:
        nonlocal num_sent
        prompt = generator.choices(range(engine.limits.vocab_size), k=prompt_tokens)
        engine.add(Submit(num_sent, prompt, sampling))
        num_sent += 1

    for _ in range(num_streams):
        send()
    started = ended = time.perf_counter()
    while engine.has_work:
        worked = time.thread_time()
        step = engine.step()
        host = time.thread_time() - worked
        now = time.perf_counter()
        is_decode = not step.stats.num_prefill_tokens
        measured.itl_s += [now - ended] * step.stats.num_decode_tokens
        (measured.decode_s if is_decode else measured.mixed_s).append(now - ended)
        (measured.decode_host_s if is_decode else measured.mixed_host_s).append(host)
        for output in step.outputs:
            assert not output.error, output.error
            measured.num_tokens += len(output.token_ids)
            if output.finish_reason and num_sent < num_requests:
                send()
        ended = time.perf_counter()
    measured.wall_s = ended - started
    return measured


def prepare(engine: Engine) -> None:
    """All that an idle engine would."""
    pauses_s: list[float] = []
    while engine.may_prepare:
        started = time.perf_counter()
        engine.prepare()
        pauses_s.append(time.perf_counter() - started)
    if pauses_s and engine.runner.graphs:
        longest = f"{max(pauses_s) * 1e3:.0f} ms at most"
        print(f"{len(pauses_s)} steps with prompts captured in {sum(pauses_s):.1f} s, {longest}")
        print(engine.runner.graphs.memory)


def busy_share(engine: Engine, num_streams: int, prompt_tokens: int) -> float:
    """Of a traced stretch of decode steps, the share of time in which some kernel or copy ran."""
    generator = random.Random(7)
    for index in range(num_streams):
        prompt = generator.choices(range(engine.limits.vocab_size), k=prompt_tokens)
        engine.add(Submit(index, prompt, Sampling(10_000, temperature=0, ignore_eos=True)))
    while engine.step().stats.num_prefill_tokens or engine.scheduler.waiting:
        pass
    for _ in range(WARM_STEPS):
        engine.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(TRACED_STEPS):
            engine.step()
        torch.cuda.synchronize()
    engine.abort(list(range(num_streams)))
    while engine.has_work:
        engine.step()
    kineto = trace.profiler.kineto_results.events()  # type: ignore[union-attr]
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in kineto
        if event.device_type() == torch.autograd.DeviceType.CUDA
    )
    busy, until = 0, spans[0][0]
    for begin, end in spans:
        busy += max(0, end - max(begin, until))
        until = max(until, end)
    return busy / (until - spans[0][0])


class Nothing:
    """A model whose logits are always the same."""

    def __init__(self, num_rows: int, vocab_size: int) -> None:
        self._logits = torch.randn(num_rows, vocab_size)

    def forward(self, batch: StepBatch, kv: PagedKV) -> Tensor:
        return self._logits[: len(batch.logit_rows)]


class ReplayNothing:
    """Stands for the GPU's graphs: a replay costs the host one call."""

    def capture(self, run: Callable[[], Tensor], **_: bool) -> "Replayed":
        return Replayed(run())


@dataclass
class Replayed:
    result: Tensor

    def replay(self) -> Tensor:
        return self.result


def host_only_engine(max_requests: int, context_tokens: int) -> Engine:
    vocab_size = 512
    num_blocks = max_requests * (-(-context_tokens // BLOCK_TOKENS) + 1) + 1
    kv = PagedKV(1, num_blocks, 1, 1, torch.float16, torch.device("cpu"))
    limits = Limits(context_tokens, 1024, max_requests, vocab_size)
    engine = Engine(Nothing(max_requests, vocab_size), kv, limits, torch.device("cpu"), depth=1)
    devices.GraphPool = ReplayNothing  # type: ignore[misc, assignment]
    engine.runner.capture()
    return engine


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """What `gpu_engine` reads."""
    parser.add_argument("--model", default="preset:llama-3.1-8b")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--cuda-graphs", default="on")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--deterministic", action="store_true", help="once with, once without: what it costs")
    parser.add_argument("--random-outliers", type=int, default=0)
    parser.add_argument("--random-std", type=float, default=0.0)


def gpu_engine(arguments: argparse.Namespace) -> Engine:
    asked = load_settings(
        model=arguments.model,
        precision=arguments.precision,
        load_format=arguments.load_format,
        cuda_graphs=arguments.cuda_graphs,
        kv_dtype=arguments.kv_dtype,
        random_outliers=arguments.random_outliers,
        random_std=arguments.random_std,
        prefix_cache=False,
        deterministic=arguments.deterministic,
    )
    settings, path = find_model(asked, Display())
    started = time.monotonic()
    serving = start(settings.engine_config(path), lambda _: None, started)
    print(f"ready in {time.monotonic() - started:.1f} s: ", end="")
    print(", ".join(f"{stage} {seconds:.1f}" for stage, seconds in serving.info.load_seconds.items()))
    held = devices.memory_used_bytes(serving.model.device) / 2**30
    print(f"KV cache of {serving.info.kv_tokens} tokens, {held:.1f} GiB held")
    return serving.engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_engine_flags(parser)
    parser.add_argument("--streams", default="1,16,64,256")
    parser.add_argument("--tokens", default="512,256", help="in, out")
    parser.add_argument("--rounds", type=int, default=3, help="requests of each stream")
    parser.add_argument("--few-tokens", default="", help="of a step while few decode: each in turn, thrice")
    parser.add_argument("--host-only", action="store_true")
    arguments = parser.parse_args()
    streams = [int(count) for count in arguments.streams.split(",")]
    tokens_in, tokens_out = (int(count) for count in arguments.tokens.split(","))
    if arguments.host_only:
        engine = host_only_engine(max(streams), tokens_in + tokens_out)
    else:
        engine = gpu_engine(arguments)
    run(engine, 1, 1, (tokens_in, 8))
    prepare(engine)
    scheduler = engine.scheduler
    few_tokens = [int(few) for few in arguments.few_tokens.split(",") if few] * 3
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for num_streams in streams:
        for most_tokens in few_tokens or [scheduler.few_batch_tokens]:
            scheduler.few_batch_tokens = most_tokens
            measured = run(engine, num_streams, arguments.rounds * num_streams, (tokens_in, tokens_out))
            on_gpu = engine.runner.device.type == "cuda" and not few_tokens
            busy = f"{busy_share(engine, num_streams, tokens_in):.1%}" if on_gpu else "-"
            print(f"| {num_streams} | {most_tokens} | {cells(measured)} | {busy} |", flush=True)


def cells(measured: Measured) -> str:
    """COLUMNS of one run, but the first two and the last."""
    decode, decode_host, mixed, mixed_host = (
        f"{median(values) * 1e3:.3f}" if values else "-"
        for values in (measured.decode_s, measured.decode_host_s, measured.mixed_s, measured.mixed_host_s)
    )
    itl = " / ".join(f"{percentile(measured.itl_s, percent) * 1e3:.1f}" for percent in (50, 99, 99.9, 100))
    tokens_per_s = f"{measured.num_tokens / measured.wall_s:.0f}"
    return f"{tokens_per_s} | {decode} ({decode_host}) | {mixed} ({mixed_host}) | {itl}"


if __name__ == "__main__":
    main()
