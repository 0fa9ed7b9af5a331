"""Decode and prefill on the CPU: Halftone through its whole server, transformers' `generate`, llama.cpp.

All in one run and in turns, so that what else the machine does falls on everybody alike. Every stream has a
prompt of 64 random tokens and 64 new ones, greedy; tokens/s counts new tokens over the whole time. Prefill is
one prompt of 512 tokens and one new token.

    python tests/benchmarks/cpu_peers.py --model FOLDER --gguf FILE --llama-python PYTHON --json OUT

`--llama-python` is an interpreter that has llama-cpp-python; without it llama.cpp is left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

PROMPT_TOKENS, NEW_TOKENS, PREFILL_TOKENS, STREAMS = 64, 64, 512, 8
VOCAB_SIZE = 49152
CASES = ("1 stream", "8 streams", "prefill")


def transformers_part(options: argparse.Namespace) -> None:
    """A line `case` in, seconds out."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)

    def answer(case: str) -> float:
        rows = STREAMS if case == "8 streams" else 1
        length, new = (PREFILL_TOKENS, 1) if case == "prefill" else (PROMPT_TOKENS, NEW_TOKENS)
        ids = torch.randint(100, VOCAB_SIZE, (rows, length), generator=generator)
        start = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        return time.perf_counter() - start

    serve_lines(answer)


def llama_part(options: argparse.Namespace) -> None:
    """The same over llama.cpp's C API: all streams in one llama_decode a step."""
    import random

    import llama_cpp as llama
    import numpy as np

    llama.llama_backend_init()
    quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(quiet, None)
    model = llama.llama_model_load_from_file(options.gguf.encode(), llama.llama_model_default_params())
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = 8192, 512, 512, STREAMS
    settings.n_threads = settings.n_threads_batch = options.threads
    context = llama.llama_init_from_model(model, settings)
    batch = llama.llama_batch_init(1024, 0, 1)
    draw = random.Random(0)

    def put(tokens: list[tuple[int, int, int, bool]]) -> None:
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        batch.n_tokens = len(tokens)
        if llama.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def best(row: int) -> int:
        return int(
            np.ctypeslib.as_array(llama.llama_get_logits_ith(context, row), shape=(VOCAB_SIZE,)).argmax()
        )

    def answer(case: str) -> float:
        rows = STREAMS if case == "8 streams" else 1
        length, new = (PREFILL_TOKENS, 1) if case == "prefill" else (PROMPT_TOKENS, NEW_TOKENS)
        prompts = [[draw.randrange(100, VOCAB_SIZE) for _ in range(length)] for _ in range(rows)]
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        start = time.perf_counter()
        put([(t, i, s, i == length - 1) for s, prompt in enumerate(prompts) for i, t in enumerate(prompt)])
        tokens = [best((s + 1) * length - 1) for s in range(rows)]
        for step in range(1, new):
            put([(token, length + step - 1, s, True) for s, token in enumerate(tokens)])
            tokens = [best(s) for s in range(rows)]
        return time.perf_counter() - start

    serve_lines(answer)


def serve_lines(answer: Any) -> None:
    answer("1 stream")
    print("ready", flush=True)
    for line in sys.stdin:
        print(answer(line.strip()), flush=True)


class Peer:
    """One competitor in a process of its own; `measure` returns tokens/s of a case."""

    def __init__(self, exits: ExitStack, python: str, part: str, options: argparse.Namespace) -> None:
        command = [python, __file__, "--part", part, "--model", options.model, "--gguf", options.gguf,
                   "--threads", str(options.threads)]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "GOMP_SPINCOUNT": "1000"}
        self.process = exits.enter_context(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        )
        exits.callback(self.process.kill)
        self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended")
        return line

    def measure(self, case: str, seed: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        return tokens(case) / float(self._line())


class Server:
    """Halftone in one precision, asked over HTTP by the load generator."""

    def __init__(self, exits: ExitStack, precision: str, options: argparse.Namespace) -> None:
        self.url, self.options = exits.enter_context(serving(precision, options)), options

    def measure(self, case: str, seed: int) -> float:
        length, new = (PREFILL_TOKENS, 1) if case == "prefill" else (PROMPT_TOKENS, NEW_TOKENS)
        streams, requests = (STREAMS, 2 * STREAMS) if case == "8 streams" else (1, 3)
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, "-m", "loadtest", "--url", self.url, "--model", "bench",
                       "--concurrency", str(streams), "--requests", str(requests), "--warmup", "1",
                       "--output-tokens", str(new), "--input-tokens", str(length), "--seed", str(seed),
                       "--vocab-size", str(VOCAB_SIZE), "--json", file.name]  # fmt: skip
            subprocess.run(command, check=True, capture_output=True)
            summary = json.loads(Path(file.name).read_text())["levels"][0]["runs"][0]["summary"]
        if case == "prefill":
            return float(PREFILL_TOKENS / summary["ttft_s"]["p50"])
        return float(summary["output_tokens_per_s"])


@contextmanager
def serving(precision: str, options: argparse.Namespace) -> Iterator[str]:
    port = options.port
    options.port += 1
    command = [sys.executable, "-m", "service", "serve", options.model, "--precision", precision,
               "--port", str(port), "--served-model-name", "bench", "--device", "cpu",
               "--threads", str(options.threads),
               "--kv-tokens", "16384", "--log-level", "warning"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            while process.poll() is None and not answers(url):
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def tokens(case: str) -> int:
    return PREFILL_TOKENS if case == "prefill" else NEW_TOKENS * (STREAMS if case == "8 streams" else 1)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as exits:
        contestants: dict[str, Peer | Server] = {
            f"halftone {p}": Server(exits, p, options) for p in options.precisions.split("+")
        }
        contestants["transformers bf16"] = Peer(exits, sys.executable, "transformers", options)
        if options.llama_python:
            contestants["llama.cpp"] = Peer(exits, options.llama_python, "llama", options)
        for turn in range(options.rounds):
            for case in CASES:
                for name, contestant in contestants.items():
                    rate = contestant.measure(case, seed=1000 * turn + CASES.index(case))
                    results.setdefault(name, {}).setdefault(case, []).append(rate)
                    print(f"{turn + 1}/{options.rounds} {case:10} {name:28} {rate:8.1f} tok/s", flush=True)
    return results


def cell(rates: list[float], base: float) -> str:
    middle = statistics.median(rates)
    return f"{middle:7.1f} ({min(rates):.1f} to {max(rates):.1f}) {middle / base:4.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", default="")
    parser.add_argument("--model", required=True, help="folder of the 16-bit checkpoint")
    parser.add_argument("--gguf", default="")
    parser.add_argument("--llama-python", default="")
    parser.add_argument("--precisions", default="bf16+int8+nf4+awq", help="joined by +")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8140)
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    if options.part:
        parts = {"transformers": transformers_part, "llama": llama_part}
        parts[options.part](options)
        return
    results = compare(options)
    base = {case: statistics.median(rates) for case, rates in results["transformers bf16"].items()}
    print(
        f"\ntok/s, median of {options.rounds} (min to max), ratio to transformers bf16; "
        f"{options.threads} threads"
    )
    for name, cases in results.items():
        cells = [cell(rates, base[case]) for case, rates in cases.items()]
        print(f"| {name} | {' | '.join(cells)} |")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
