"""The harness's two questions, asked of the engine over its socket: how likely is this, and what comes next.

harness thread --ids--> EngineScorer --Generation--> engine_client --> engine
harness thread <--log-probabilities, texts-- EngineScorer

The harness is synchronous and has a thread of its own; the engine's client lives on the event loop. What the
engine is sent is what /v1/completions would send it for the harness's own request, so that what differs
between the two ways is HTTP and JSON alone.
"""

import asyncio
import concurrent.futures
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from service.api.answers import LOWEST_LOGPROB
from service.errors import HalftoneError
from service.front.engine_client import EngineClient
from service.front.generation import Answer, Delta, Generation, Plan
from service.front.text import TextCodec
from service.messages import Sampling
from service.metrics import Metrics

T = TypeVar("T")

# the harness asks the endpoint so: one token, which it drops, and the prompt's log-probabilities
SCORING = Sampling(max_tokens=1, temperature=0, logprobs=1, prompt_logprobs=1)


@dataclass
class Answered:
    """What came of one prompt."""

    texts: list[str] = field(default_factory=list)
    prompt: Answer | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class EngineScorer:
    """Safe to ask from one thread at a time that is not the event loop's."""

    def __init__(
        self, client: EngineClient, codec: TextCodec, metrics: Metrics, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._client, self._codec, self._metrics, self._loop = client, codec, metrics, loop

    def loglikelihoods(
        self, prompts: Sequence[list[int]], context_lengths: Sequence[int]
    ) -> list[tuple[float, bool]]:
        """By prompt: the summed log-probability of what is behind its context, and whether greedy would say
        the same. Raises HalftoneError."""
        answers = self._wait(self._answers(list(prompts), SCORING, ()))
        return [
            summed(answer.prompt, length) for answer, length in zip(answers, context_lengths, strict=True)
        ]

    def texts(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int,
        temperature: float,
        stops: Sequence[str],
        seed: int,
    ) -> list[str]:
        """What the model goes on with after each prompt, up to a stop string. Raises HalftoneError."""
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
        return [answer.text for answer in self._wait(self._answers(list(prompts), sampling, tuple(stops)))]

    async def _answers(
        self, prompts: list[list[int]], sampling: Sampling, stops: tuple[str, ...]
    ) -> list[Answered]:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        found = [Answered() for _ in prompts]

        def on_delta(answer: Answer, delta: Delta) -> None:
            found[answer.index].texts.append(delta.text)
            found[answer.index].prompt = answer

        def on_end(error: HalftoneError | None) -> None:
            if error is None:
                ended.set_result(None)
            else:
                ended.set_exception(error)

        plan = Plan(prompts, 1, sampling, stops, b"", time.monotonic())
        generation = Generation(plan, self._client, self._codec.pieces, self._metrics, on_delta, on_end)
        generation.start()
        try:
            await ended
        finally:
            generation.cancel()
        return found

    def _wait(self, asked: Coroutine[Any, Any, T]) -> T:
        answer: concurrent.futures.Future[T] = asyncio.run_coroutine_threadsafe(asked, self._loop)
        return answer.result()


def summed(answer: Answer | None, context_length: int) -> tuple[float, bool]:
    """Of the prompt's tokens from place `context_length` on: their log-probabilities in order, added up as
    the harness adds up those of a response; and whether each is the likeliest."""
    assert answer is not None, "an answer that has ended has begun"
    rows = (answer.prompt_logprobs or [])[context_length:]
    logprobs = [max(row.logprob, LOWEST_LOGPROB) for row in rows if row is not None]
    assert len(logprobs) == len(answer.prompt) - context_length, "every token behind the first has one"
    likeliest = all(row is not None and row.logprob >= row.top_logprobs[0] for row in rows)
    return sum(logprobs), likeliest
