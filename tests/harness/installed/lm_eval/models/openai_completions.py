"""The harness's client of /v1/completions: token ids out, summed log-probabilities back."""

import json
import urllib.request
from typing import Any

from tokenizers import Tokenizer


class LocalCompletionsAPI:
    def __init__(
        self,
        *,
        model: str,
        base_url: str,
        tokenizer: str,
        max_length: int,
        batch_size: int,
        seed: int,
        **_: Any,
    ) -> None:
        self.model, self.base_url, self.max_length = model, base_url, max_length - 1
        self.batch_size, self._seed, self.eos_string = batch_size, seed, "<|im_end|>"
        self.tokenizer = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _create_payload(
        self,
        messages: Any,
        generate: bool = False,
        gen_kwargs: Any = None,
        seed: int = 0,
        eos: str = "",
        **_: Any,
    ) -> dict[str, Any]:
        if not generate:
            body = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
            return {"model": self.model, "prompt": messages, "seed": seed, **body}
        kwargs = dict(gen_kwargs)
        return {
            "prompt": messages,
            "model": self.model,
            "max_tokens": kwargs.pop("max_gen_toks"),
            "temperature": kwargs.pop("temperature", 0),
            "stop": [*kwargs.pop("until"), eos],
            "seed": seed,
            **kwargs,
        }

    def model_call(self, messages: Any, *, generate: bool = True, gen_kwargs: Any = None, **_: Any) -> Any:
        body = self._create_payload(messages, generate, gen_kwargs, self._seed, self.eos_string)
        request = urllib.request.Request(
            self.base_url, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    @staticmethod
    def parse_logprobs(outputs: Any, tokens: Any = None, ctxlens: Any = None, **_: Any) -> Any:
        found = []
        for choice, length in zip(outputs[0]["choices"], ctxlens, strict=True):
            logprobs = choice["logprobs"]["token_logprobs"][length:-1]
            likeliest = choice["logprobs"]["top_logprobs"][length:-1]
            is_greedy = all(one == max(top.values()) for one, top in zip(logprobs, likeliest, strict=True))
            found.append((sum(logprobs), is_greedy))
        return found

    @staticmethod
    def parse_generations(outputs: Any, **_: Any) -> list[str]:
        return [choice["text"] for choice in outputs["choices"]]

    def score(self, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
        found = []
        for place in range(0, len(pairs), self.batch_size):
            contexts = [self.encode(context) for context, _ in pairs[place : place + self.batch_size]]
            wholes = [self.encode(a + b) for a, b in pairs[place : place + self.batch_size]]
            outputs = self.model_call(wholes, generate=False)
            outputs = [outputs] if isinstance(outputs, dict) else outputs
            found += self.parse_logprobs(outputs, tokens=wholes, ctxlens=list(map(len, contexts)))
        return found

    def generate(self, context: str, until: list[str], max_tokens: int, **more: Any) -> str:
        outputs = self.model_call(
            [self.encode(context)], gen_kwargs={"until": until, "max_gen_toks": max_tokens, **more}
        )
        return self.parse_generations(outputs)[0]
