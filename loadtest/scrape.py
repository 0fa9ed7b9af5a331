"""A server's own counts: its /metrics -> totals of one model, whatever kind of server it is.

runs --before and after a run--> Scraper.totals() --Totals--> check

Names are those that the servers' own sources and documentation give. A colon counts as an underscore, because
some releases of SGLang write one and some the other.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loadtest.client import Client
from loadtest.wire import WireError

OK = 200
SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?\s*")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
MODEL_LABELS = ("model", "model_name")
QUANTITIES = ("requests", "output_tokens", "prompt_tokens", "ttft_s", "e2e_s", "preemptions")


@dataclass(frozen=True)
class Series:
    """A counter, or a histogram's sum, and which of its series count; `sign` -1 takes away."""

    name: str
    labels: Mapping[str, tuple[str, ...]]
    sign: int = 1


def series(name: str, sign: int = 1, **labels: tuple[str, ...]) -> Series:
    return Series(name, labels, sign)


ENDED = ("stop", "length")
ANSWERS = ("/v1/completions", "/v1/chat/completions")
# where each kind of server has what; the first kind of which a series is there is the server's
KINDS: dict[str, dict[str, tuple[Series, ...]]] = {
    "halftone": {
        "requests": (series("halftone_requests_total", finish_reason=ENDED),),
        "output_tokens": (
            series("halftone_tokens_total", kind=("generated",)),
            series("halftone_tokens_total", sign=-1, kind=("discarded",)),
        ),
        "prompt_tokens": (series("halftone_tokens_total", kind=("prompt", "cached")),),
        "ttft_s": (series("halftone_time_to_first_token_seconds_sum"),),
        "e2e_s": (series("halftone_request_duration_seconds_sum", endpoint=ANSWERS, status=("200",)),),
        "preemptions": (series("halftone_preemptions_total"),),
    },
    "vllm": {
        "requests": (series("vllm_request_success_total", finished_reason=ENDED),),
        "output_tokens": (series("vllm_generation_tokens_total"),),
        "prompt_tokens": (series("vllm_prompt_tokens_total"),),
        "ttft_s": (series("vllm_time_to_first_token_seconds_sum"),),
        "e2e_s": (series("vllm_e2e_request_latency_seconds_sum"),),
        "preemptions": (series("vllm_num_preemptions_total"),),
    },
    "sglang": {
        "requests": (series("sglang_num_requests_total"),),
        "output_tokens": (series("sglang_generation_tokens_total"),),
        "prompt_tokens": (series("sglang_prompt_tokens_total"),),
        "ttft_s": (series("sglang_time_to_first_token_seconds_sum"),),
        "e2e_s": (series("sglang_e2e_request_latency_seconds_sum"),),
    },
    "llama.cpp": {
        "output_tokens": (series("llamacpp_tokens_predicted_total"),),
        "prompt_tokens": (series("llamacpp_prompt_tokens_total"),),
    },
    "text-generation-inference": {
        "requests": (series("tgi_request_success"), series("tgi_request_success_total")),
        "output_tokens": (series("tgi_request_generated_tokens_sum"),),
        "prompt_tokens": (series("tgi_request_input_length_sum"),),
        "e2e_s": (series("tgi_request_duration_sum"),),
    },
}


class ScrapeError(Exception):
    """Why there are no counts, as half a sentence."""


@dataclass(frozen=True)
class Totals:
    """What a server has counted since it started; a quantity that its kind does not count is absent."""

    kind: str
    counts: Mapping[str, float]

    def since(self, before: "Totals") -> dict[str, float]:
        """Counted since then. A quantity whose series came with its first event counts from 0."""
        return {name: count - before.counts.get(name, 0.0) for name, count in self.counts.items()}


class Scraper:
    """Reads one model's totals, where `client` finds the server of the metrics."""

    def __init__(self, client: Client, path: str, model: str) -> None:
        self._client, self._path = client, path
        name, _, precision = model.partition("@")  # a server of several precisions tells them so apart
        self._models = {model, name}
        self._precision = precision

    async def totals(self) -> Totals:
        """Raises ScrapeError."""
        try:
            status, body = await self._client.get(self._path)
        except (OSError, TimeoutError, WireError) as error:
            raise ScrapeError(f"`{self._path}` was not answered: {error or type(error).__name__}") from None
        if status != OK:
            raise ScrapeError(f"`{self._path}` says HTTP {status}")
        return self.read(body.decode("utf-8", "replace"))

    def read(self, text: str) -> Totals:
        """The text of /metrics -> totals. Raises ScrapeError where it is of no kind that is known."""
        found = list(samples(text))
        for kind, quantities in KINDS.items():
            names = {part.name for parts in quantities.values() for part in parts}
            of_kind = [sample for sample in found if sample[0] in names]
            if of_kind:
                ours = [sample for sample in of_kind if self._is_ours(sample[1])]
                if not ours:
                    raise ScrapeError(f"`{self._path}` counts other models")
                return Totals(kind, totals_of(quantities, ours))
        raise ScrapeError(f"`{self._path}` is of no kind of server that is known")

    def _is_ours(self, labels: Mapping[str, str]) -> bool:
        named = [labels[label] for label in MODEL_LABELS if label in labels]
        if named and named[0] not in self._models:
            return False
        return not self._precision or labels.get("precision", self._precision) == self._precision


def totals_of(
    quantities: Mapping[str, tuple[Series, ...]], found: list[tuple[str, dict[str, str], float]]
) -> dict[str, float]:
    """One model's samples -> each quantity of which there is a series."""
    counts: dict[str, float] = {}
    for quantity, parts in quantities.items():
        values = [
            part.sign * value
            for part in parts
            for name, labels, value in found
            if name == part.name and all(labels.get(key) in allowed for key, allowed in part.labels.items())
        ]
        known = {name for name, _, _ in found}
        if any(part.name in known for part in parts):
            counts[quantity] = sum(values)
    return counts


def samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Prometheus' text format -> name, labels, value of each sample; colons in names as underscores."""
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        found = SAMPLE.fullmatch(line)
        if found is None:
            continue
        try:
            value = float(found[3])
        except ValueError:
            continue
        yield found[1].replace(":", "_"), dict(LABEL.findall(found[2] or "")), value
