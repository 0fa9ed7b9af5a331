"""What int8's two rules for outliers find and cost on this CPU: the tables in docs/quality.md.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.int8_outliers MODEL_DIR TEXT [--windows 8]

Counted on each linear's input while int8 by row serves the windows, 1,024 tokens a forward: features that
reach 6 in any row of the forward, and the share of all products that either rule takes in 16 bits. Then both
rules compute the same steps in turns: tokens a second of the whole model, least time of the rounds.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from service.model.batch import PagedKV, StepBatch
from service.model.instance import ModelInstance
from service.precision import load_backend
from service.quality.texts import Text, read_text, token_windows
from tests.benchmarks.awq_quality import detokenized
from tests.tiny_models import decode_batch, one_sequence

THRESHOLD = 6.0
WINDOW = 1_024
CONTEXT = 128  # of the sequences that decode
BLOCK = 16
DECODING = (1, 4, 16)
ROUNDS = 9
RULES = ("row", "batch")
FIRST_OF_GROUP = {"q_proj": "qkv", "o_proj": "o", "gate_proj": "gate_up", "down_proj": "down"}


class Counts:
    """Of one layer class: a number for each layer and window."""

    def __init__(self) -> None:
        self.columns: list[int] = []  # that any row of the forward has
        self.by_batch: list[float] = []  # share of the products that are 16-bit
        self.by_row: list[float] = []
        self.rows: list[float] = []  # share of the rows that have outliers

    def add(self, x: Tensor) -> None:
        found = x.half().abs() >= THRESHOLD
        self.columns.append(int(found.any(0).sum()))
        self.by_batch.append(self.columns[-1] / x.shape[1])
        self.by_row.append(float(found.float().mean()))
        self.rows.append(float(found.any(1).float().mean()))


def mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values)


def count(model: ModelInstance, windows: list[list[int]]) -> None:
    counts: dict[str, Counts] = defaultdict(Counts)

    def observe(path: str, x: Tensor) -> None:
        if group := FIRST_OF_GROUP.get(path.rpartition(".")[2]):
            counts[group].add(x)

    kv = model.new_kv(WINDOW // BLOCK + 2)
    for window in windows:
        model.decoder(one_sequence(window, 0, kv, every_row=False), kv, observe)
    print("layer class | columns, mean (most) | rows that have some | 16-bit by batch | by row")
    for group, found in counts.items():
        columns = f"{mean(found.columns):.1f} ({max(found.columns)})"
        shares = f"{mean(found.rows):.1%} | {mean(found.by_batch):.2%} | {mean(found.by_row):.3%}"
        print(f"{group} | {columns} | {shares}")


def steps(window: list[int], kv: PagedKV) -> dict[str, tuple[StepBatch, int]]:
    """Name -> a step and its tokens."""
    found = {f"prompt of {WINDOW}": (one_sequence(window, 0, kv, every_row=False), WINDOW)}
    pages = CONTEXT // BLOCK
    for lanes in DECODING:
        tables = [[1 + lane * pages + page for page in range(pages)] for lane in range(lanes)]
        sequences = [window[lane : lane + CONTEXT] for lane in range(lanes)]
        found[f"decode of {lanes}"] = decode_batch(sequences, tables), lanes
    return found


def time_steps(models: dict[str, ModelInstance], window: list[int]) -> None:
    print(f"step | {' | '.join(f'{rule}, tok/s' for rule in models)}")
    kv = {rule: model.new_kv(max(DECODING) * CONTEXT // BLOCK + 2) for rule, model in models.items()}
    for name, (step, tokens) in steps(window, kv["row"]).items():
        least = dict.fromkeys(models, float("inf"))
        for _ in range(ROUNDS):
            for rule, model in models.items():
                started = time.process_time()
                model.forward(step, kv[rule])
                least[rule] = min(least[rule], time.process_time() - started)
        print(f"{name} | {' | '.join(f'{tokens / least[rule]:,.0f}' for rule in models)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, help="a split of WikiText in its tokenized form")
    parser.add_argument("--windows", type=int, default=8)
    arguments = parser.parse_args()
    text = read_text(arguments.text, "text")
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    windows = token_windows(Text(text.name, detokenized(text.content)), tokenizer, WINDOW)
    models = {
        rule: ModelInstance.load(
            arguments.model,
            load_backend(f"int8:outliers={rule}"),
            torch.device("cpu"),
            max_context_tokens=2_048,
        )
        for rule in RULES
    }
    print(models["row"].kernels()["qkv_proj"], f"{torch.get_num_threads()} threads")
    count(models["row"], windows[: arguments.windows])
    time_steps(models, windows[0])


if __name__ == "__main__":
    main()
