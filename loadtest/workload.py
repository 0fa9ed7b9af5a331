"""A seed -> the same requests, whatever is measured with them.

bench --Workload, as JSON--> worker --bodies--> drive --> server

Prompts are random token ids, come from a file (our own `prompts.jsonl` is one), or from a trace. Each text of
a file starts with a number of its own, so that no request is answered from the prefix cache of another.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import orjson

from loadtest.prompts import Prompt
from loadtest.trace import HASH_BLOCK_TOKENS, Traced

Endpoint = Literal["completions", "chat"]


@dataclass(frozen=True)
class Workload:
    """What is asked, apart from when: `body(i)` depends on the seed and `i` alone."""

    model: str
    prompts: tuple[Prompt, ...]  # empty where prompts are random ids
    output_tokens: int
    endpoint: Endpoint = "completions"
    seed: int = 0
    input_tokens: int = 0  # > 0: that many random token ids instead of a prompt
    vocab_size: int = 0  # ids are drawn below it
    ignore_eos: bool = True
    usage: bool = True  # the server's count at the end of an answer
    continuous_usage: bool = False  # its count on every event: exact, and work for the server
    trace: tuple[Traced, ...] = ()  # request i has the lengths of the i-th

    def without(self, fields: Sequence[str]) -> "Workload":
        """The same for a server that does not take these fields of a request."""
        return replace(
            self,
            ignore_eos=self.ignore_eos and "ignore_eos" not in fields,
            usage=self.usage and "stream_options" not in fields,
        )

    def prompt(self, index: int) -> str | list[int]:
        """index of a request -> its prompt, as text or token ids."""
        if self.prompts:
            chosen = self.chosen(index)
            return f"({self.seed}-{index}) {chosen.text}" if chosen.text else list(chosen.token_ids)
        if self.trace:
            return self.recorded(index)
        draw = random.Random(f"{self.seed}:{index}")
        return draw.choices(range(self.vocab_size), k=self.input_tokens)

    def chosen(self, index: int) -> Prompt:
        """Which of the file's prompts: all of them once, in an order by the seed, before any comes again."""
        turn, place = divmod(index, len(self.prompts))
        return self.prompts[order(self.seed, turn, len(self.prompts))[place]]

    def recorded(self, index: int) -> str | list[int]:
        """The prompt of the trace's request, or as many random ids. Ids that the trace says are shared are
        the same in every request of a run, and in no other run."""
        request = self.trace[index]
        if request.text:
            return request.text
        ids = list(request.token_ids)
        for hash_id in request.hash_ids:
            block = random.Random(f"{self.seed}:block:{hash_id}")
            ids += block.choices(range(self.vocab_size), k=HASH_BLOCK_TOKENS)
        if len(ids) < request.input_tokens:
            rest = random.Random(f"{self.seed}:{index}")
            ids += rest.choices(range(self.vocab_size), k=request.input_tokens - len(ids))
        return ids[: request.input_tokens] if request.input_tokens else ids

    def asked_tokens(self, index: int) -> int:
        """index of a request -> the length of answer that it asks for."""
        if self.trace:
            return self.trace[index].output_tokens
        own = self.chosen(index).output_tokens if self.prompts else 0
        return own or self.output_tokens

    def body(self, index: int) -> bytes:
        """index of a request -> its JSON body: greedy, streamed, of fixed output length."""
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.asked_tokens(index),
            "temperature": 0,
            "stream": True,
        }
        if self.usage:
            fields["stream_options"] = {"include_usage": True}
            if self.continuous_usage:
                fields["stream_options"]["continuous_usage_stats"] = True
        if self.ignore_eos:
            fields["ignore_eos"] = True
        prompt = self.prompt(index)
        if self.endpoint == "chat":
            fields["messages"] = [{"role": "user", "content": prompt}]
        else:
            fields["prompt"] = prompt
        return orjson.dumps(fields)


@lru_cache(maxsize=4)
def order(seed: int, turn: int, count: int) -> list[int]:
    """0 to count - 1, shuffled."""
    places = list(range(count))
    random.Random(f"{seed}:order:{turn}").shuffle(places)
    return places


def workload_of(message: Mapping[str, Any]) -> Workload:
    """The JSON of a Workload -> the Workload."""
    fields = dict(message)
    fields["prompts"] = tuple(
        Prompt(**{**prompt, "token_ids": tuple(prompt["token_ids"])}) for prompt in fields["prompts"]
    )
    fields["trace"] = tuple(
        Traced(**{**item, "hash_ids": tuple(item["hash_ids"]), "token_ids": tuple(item["token_ids"])})
        for item in fields["trace"]
    )
    return Workload(**fields)
