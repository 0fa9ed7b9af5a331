"""The life of one client request: every prompt's answers, from the first submit to the one end.

api/ --Plan--> Generation --open, abort--> engine_client
api/ <--on_delta, on_end-- Generation <--Output-- engine_client

A generation ends exactly once: with `on_end(None)` after the last answer's finish reason, with
`on_end(error)` at the first failure (the other answers are aborted), or silently by `cancel`. All of it runs
on the event loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from service.errors import EngineUnavailableError, HalftoneError
from service.front.detokenizer import Detokenizer, StopMatcher
from service.front.engine_client import EngineClient
from service.messages import ENGINE_DIED, SHUTTING_DOWN, FinishReason, Output, Sampling, TokenLogprobs
from service.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Plan:
    """What one client request asks of the engine; every bound has been checked."""

    prompts: list[list[int]]
    num_answers: int  # to each prompt
    sampling: Sampling  # of sample 0
    stop_strings: tuple[str, ...]
    cache_salt: bytes
    arrived_at: float  # time.monotonic() seconds


@dataclass(slots=True)
class Delta:
    """What one step added to one answer."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None


class Answer:
    """One answer: its place in the request and how far it has come."""

    __slots__ = (
        "_detokenizer",
        "_generation",
        "_stop_matcher",
        "cached_tokens",
        "finish_reason",
        "id",
        "index",
        "num_tokens",
        "prompt",
        "prompt_logprobs",
    )

    def __init__(self, generation: "Generation", index: int, prompt: list[int]) -> None:
        self.index = index
        self.prompt = prompt
        self.id = 0  # of the engine's request
        self.num_tokens = 0  # up to the one that completed a stop
        self.cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.finish_reason: FinishReason | None = None
        self._generation = generation
        self._detokenizer = Detokenizer(generation.pieces)
        stops = generation.plan.stop_strings
        self._stop_matcher = StopMatcher(stops) if stops else None

    def receive(self, output: Output, received_at: float) -> None:
        """The engine client's sink."""
        generation = self._generation
        reason = output.finish_reason
        if reason == "error" or reason == "abort":
            self.finish_reason = reason
            generation.fail(failure_of(output))
            return
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.cached_tokens:
            self.cached_tokens = output.cached_tokens
        ids = output.token_ids
        logprobs = output.logprobs
        text, num_used = self._read(ids, reason)
        if num_used < len(ids):
            generation.metrics.tokens("discarded", len(ids) - num_used)
            ids = ids[:num_used]
            logprobs = logprobs[:num_used] if logprobs is not None else None
        self.num_tokens += num_used
        if self.finish_reason is not None:  # a stop string is complete
            if reason is None:
                generation.client.abort(self.id, "stop")
            reason = self.finish_reason
        elif reason is not None:
            text += self._rest()
            self.finish_reason = reason
        generation.on_delta(self, Delta(text, ids, logprobs))
        if reason is not None:
            generation.answered()

    def _read(self, ids: Sequence[int], reason: FinishReason | None) -> tuple[str, int]:
        """New ids -> (text that may be sent, ids used). Sets the finish reason at a complete stop string."""
        feed = self._detokenizer.feed
        matcher = self._stop_matcher
        last = len(ids) - 1
        text = ""
        for position, id in enumerate(ids):
            if reason == "stop" and position == last:
                break  # the stop token ends the answer and is not a part of its text
            piece = feed(id)
            if matcher is not None:
                piece, complete = matcher.feed(piece)
                if complete:
                    self.finish_reason = "stop"
                    return text + piece, position + 1
            text += piece
        return text, len(ids)

    def _rest(self) -> str:
        """What was waiting for more text."""
        rest = self._detokenizer.finish()
        if self._stop_matcher is not None:
            rest, complete = self._stop_matcher.feed(rest)
            if not complete:
                rest += self._stop_matcher.finish()
        return rest


class Generation:
    """Opens a plan's requests and reports what comes, until its one end."""

    def __init__(
        self,
        plan: Plan,
        client: EngineClient,
        pieces: Sequence[bytes],
        metrics: Metrics,
        on_delta: Callable[[Answer, Delta], None],
        on_end: Callable[[HalftoneError | None], None],
    ) -> None:
        self.plan = plan
        self.client = client
        self.pieces = pieces
        self.metrics = metrics
        self.on_delta = on_delta
        self.on_end = on_end
        self.ended = False
        self.answers = [
            Answer(self, prompt_index * plan.num_answers + sample_index, prompt)
            for prompt_index, prompt in enumerate(plan.prompts)
            for sample_index in range(plan.num_answers)
        ]
        self._unanswered = len(self.answers)

    def start(self) -> None:
        """Submits every answer, all or none. Raises OverloadedError or EngineUnavailableError."""
        self.client.admit(len(self.answers))
        sampling = self.plan.sampling
        for answer in self.answers:
            sample_index = answer.index % self.plan.num_answers
            answer.id = self.client.open(
                answer.prompt,
                msgspec.structs.replace(sampling, sample_index=sample_index) if sample_index else sampling,
                self.plan.cache_salt,
                answer.receive,
                arrived_at=self.plan.arrived_at,
            )

    def cancel(self) -> None:
        """The client is gone: frees the engine's slots. Nothing is reported afterwards."""
        if not self.ended:
            self.ended = True
            self._abort_open()

    def fail(self, error: HalftoneError) -> None:
        """One answer failed, and with it the request."""
        if not self.ended:
            self.ended = True
            self._abort_open()
            self.on_end(error)

    def answered(self) -> None:
        """One answer has its finish reason."""
        self._unanswered -= 1
        if not self._unanswered and not self.ended:
            self.ended = True
            self.on_end(None)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once whatever the number of answers."""
        return sum(len(prompt) for prompt in self.plan.prompts)

    @property
    def num_completion_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self.answers)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache by the first answers; the others find the first one's."""
        return sum(answer.cached_tokens for answer in self.answers[:: self.plan.num_answers])

    def _abort_open(self) -> None:
        for answer in self.answers:
            if answer.finish_reason is None:
                answer.finish_reason = "abort"
                self.client.abort(answer.id)


def failure_of(output: Output) -> HalftoneError:
    """The error a client sees for an answer that the engine did not finish."""
    if output.error in (ENGINE_DIED, SHUTTING_DOWN) or output.finish_reason == "abort":
        return EngineUnavailableError(
            f"the {output.error or 'engine gave the request up'}", hint="send the request again"
        )
    return HalftoneError(f"the model failed on this request: {output.error}", code="model_error")
