"""A seed -> the same requests at the same times, whatever is measured with them.

bench --Workload, as JSON--> worker --bodies--> drive --> server

Prompts are random token ids, or come from a file of texts (our own `prompts.jsonl` is one). Each text starts
with a number of its own, so that no request is answered from the prefix cache of another.
"""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

DEFAULT_PROMPTS = Path(__file__).with_name("prompts.jsonl")
Endpoint = Literal["completions", "chat"]


@dataclass(frozen=True)
class Prompts:
    """Texts by a file's lines, stamped with the hash of its bytes."""

    texts: tuple[str, ...]
    source: str
    sha256: str

    @classmethod
    def load(cls, path: Path) -> "Prompts":
        """A JSONL file with a `prompt` on each line; raises ValueError with the number of a bad line."""
        raw = path.read_bytes()
        texts = []
        for number, line in enumerate(raw.splitlines(), 1):
            if not line.strip():
                continue
            try:
                text = orjson.loads(line)["prompt"]
            except (orjson.JSONDecodeError, KeyError, TypeError):
                raise ValueError(f'`{path}` line {number}: want an object like {{"prompt": "..."}}') from None
            if not isinstance(text, str) or not text:
                raise ValueError(f"`{path}` line {number}: `prompt` is not a text")
            texts.append(text)
        if not texts:
            raise ValueError(f"`{path}` holds no prompt")
        return cls(tuple(texts), path.name, hashlib.sha256(raw).hexdigest())


@dataclass(frozen=True)
class Workload:
    """What is asked, apart from when: `request(i)` depends on the seed and `i` alone."""

    model: str
    texts: tuple[str, ...]  # empty where prompts are random ids
    output_tokens: int
    endpoint: Endpoint = "completions"
    seed: int = 0
    input_tokens: int = 0  # > 0: that many random token ids instead of a text
    vocab_size: int = 0  # ids are drawn below it
    ignore_eos: bool = True
    continuous_usage: bool = False  # the server's count on every event: exact, and work for the server

    def prompt(self, index: int) -> str | list[int]:
        """index of a request -> its prompt, as text or token ids."""
        if self.input_tokens:
            draw = random.Random(f"{self.seed}:{index}")
            return draw.choices(range(self.vocab_size), k=self.input_tokens)
        order = list(range(len(self.texts)))
        turn, place = divmod(index, len(order))
        random.Random(f"{self.seed}:order:{turn}").shuffle(order)
        return f"({self.seed}-{index}) {self.texts[order[place]]}"

    def body(self, index: int) -> bytes:
        """index of a request -> its JSON body: greedy, streamed, of fixed output length."""
        options: dict[str, Any] = {"include_usage": True}
        if self.continuous_usage:
            options["continuous_usage_stats"] = True
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": options,
        }
        if self.ignore_eos:
            fields["ignore_eos"] = True
        prompt = self.prompt(index)
        if self.endpoint == "chat":
            fields["messages"] = [{"role": "user", "content": prompt}]
        else:
            fields["prompt"] = prompt
        return orjson.dumps(fields)


def poisson_arrivals(num_requests: int, rate_per_s: float, seed: int) -> list[float]:
    """Seconds after the start at which requests are due; gaps are exponential with mean 1 / rate.

    The seed draws gaps of mean one that the rate only scales: two rates run the same pattern.
    """
    draw = random.Random(f"{seed}:arrivals")
    due_s, arrivals = 0.0, []
    for _ in range(num_requests):
        arrivals.append(due_s)
        due_s += draw.expovariate(1.0) / rate_per_s
    return arrivals
