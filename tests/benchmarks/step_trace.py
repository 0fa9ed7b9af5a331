"""Where the GPU's time of a step with prompts goes: by kernel, and what lies between them.

    python -m tests.benchmarks.step_trace --model preset:llama-3.1-8b --precision fp16 --streams 1,64,240

Of each width a stretch for each of `--chunks`: steps that decode all streams and compute so many tokens of
prompts beside them. Random weights, 512 prompt tokens behind each stream. `--layer` also prints a layer of
a step, launch by launch: under dependent launch a kernel begins before the one ahead of it ends.
"""

import argparse
import random
from collections import defaultdict
from itertools import pairwise
from statistics import median

import torch

from service.engine.engine import Engine
from service.messages import Sampling, Submit
from tests.benchmarks.engine_steps import add_engine_flags, gpu_engine

WARM_STEPS = 6
STEPS = 20
PROMPT_TOKENS = 512
SHOWN = 14


def keep_busy(engine: Engine, num_steps: int, chunk: int, first_id: int) -> None:
    """Steps with `chunk` prompt tokens each: as many requests of one answer token arrive."""
    generator = random.Random(first_id)
    for step in range(num_steps):
        for index in range(chunk // PROMPT_TOKENS):
            prompt = generator.choices(range(engine.limits.vocab_size), k=PROMPT_TOKENS)
            name = first_id + step * 100 + index
            engine.add(Submit(name, prompt, Sampling(1, temperature=0, ignore_eos=True)))
        engine.step()


def print_layer(events: list[tuple[int, int, str]], num_layers: int) -> None:
    """Medians over all whole layers: how long each launch lasts, and when the next one begins."""
    names = [name for _, _, name in events]
    # the first and the last step may be traced in part
    few, many = (STEPS - 2) * num_layers, (STEPS + 2) * num_layers
    first = next((name for name in dict.fromkeys(names) if few < names.count(name) < many), None)
    if first is None:
        print("    no kernel is launched once a layer")
        return
    at = [place for place, name in enumerate(names) if name == first]
    shown = at[len(at) // 2 // num_layers * num_layers + 2 :][:2]
    layers = [(a, b) for a, b in pairwise(at) if names[a:b] == names[slice(*shown)]]
    for offset in range(shown[1] - shown[0]):
        steps = [events[a + offset + 1][0] - events[a + offset][0] for a, _ in layers]
        lasts = [events[a + offset][1] - events[a + offset][0] for a, _ in layers]
        name = names[shown[0] + offset][:60]
        print(f"    next after {median(steps) / 1e3:6.1f} us, lasts {median(lasts) / 1e3:6.1f}  {name}")


def trace(engine: Engine, chunk: int, first_id: int, num_layers: int) -> None:
    keep_busy(engine, WARM_STEPS, chunk, first_id)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as traced:
        keep_busy(engine, STEPS, chunk, first_id + 10_000)
        torch.cuda.synchronize()
    kineto = traced.profiler.kineto_results.events()
    events = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in kineto
        if event.device_type() == torch.autograd.DeviceType.CUDA
    )
    busy, until = 0, events[0][0]
    sums: dict[str, list[float]] = defaultdict(list)
    for begin, end, name in events:
        busy += max(0, end - max(begin, until))
        until = max(until, end)
        sums[name[:70]].append((end - begin) / 1e6)
    span = until - events[0][0]
    print(f"{chunk} prompt tokens: {span / 1e6 / STEPS:.2f} ms a step, busy {busy / span:.1%}")
    for name, values in sorted(sums.items(), key=lambda item: -sum(item[1]))[:SHOWN]:
        print(f"    {sum(values) / STEPS:8.3f} ms in {len(values) / STEPS:6.1f} launches  {name}")
    if num_layers:
        print_layer(events, num_layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_engine_flags(parser)
    parser.add_argument("--streams", default="1,64,240")
    parser.add_argument("--chunks", default="0,512,1024", help="prompt tokens beside them, multiples of 512")
    parser.add_argument("--layer", type=int, default=0, metavar="LAYERS", help="of the model, to print one")
    arguments = parser.parse_args()
    streams, chunks = ([int(n) for n in text.split(",")] for text in (arguments.streams, arguments.chunks))
    engine = gpu_engine(arguments)
    room = engine.limits.max_batch_requests - max(chunks) // PROMPT_TOKENS
    if max(streams) > room:
        parser.error(f"prompts of {max(chunks)} tokens a step start beside {room} streams at most")
    for num_streams in streams:
        generator = random.Random(num_streams)
        for index in range(num_streams):
            prompt = generator.choices(range(engine.limits.vocab_size), k=PROMPT_TOKENS)
            engine.add(Submit(index, prompt, Sampling(10_000, temperature=0, ignore_eos=True)))
        while engine.step().stats.num_prefill_tokens or engine.scheduler.waiting:
            pass
        print(f"\n{num_streams} streams")
        for chunk in chunks:
            trace(engine, chunk, 1_000_000 + chunk * 1000, arguments.layer)
        engine.abort(list(range(num_streams)))
        while engine.has_work:
            engine.step()


if __name__ == "__main__":
    main()
