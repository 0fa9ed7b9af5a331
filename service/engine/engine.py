"""The loop of the engine: schedule -> run -> emit. Every accepted request ends exactly once.

child --add, abort--> Engine --step--> one Step message

It works on anything with `forward(batch, kv)`; messages in, messages out, no socket.
"""

import logging
import time
from dataclasses import dataclass

import torch

from service.engine.kv_cache import KVCache
from service.engine.request import Request
from service.engine.runner import Model, Runner, StepResult
from service.engine.sampler import BAD_ROW
from service.engine.scheduler import Chunk, Plan, Scheduler
from service.messages import FinishReason, Output, Step, StepStats, Submit
from service.model.batch import BLOCK_TOKENS, PagedKV

logger = logging.getLogger(__name__)

# What a client may read. An exception's own text can carry tokens, paths or addresses.
MODEL_ERROR = "the model produced numbers that are not finite"
STEP_ERROR = "the engine failed on this request"
NO_MEMORY = "the device ran out of memory on this request"
TOO_LONG = "the prompt leaves no room for an answer in the context window"
BAD_TOKEN = "the prompt holds a token id outside the vocabulary"
EMPTY_PROMPT = "the prompt is empty"


@dataclass(frozen=True)
class Limits:
    """What one engine can hold; `max_context_tokens` never exceeds what the KV cache can."""

    max_context_tokens: int
    max_batch_tokens: int
    max_batch_requests: int
    vocab_size: int


class Engine:
    """Requests over one model and one KV cache. One thread calls it."""

    def __init__(
        self,
        model: Model,
        kv: PagedKV,
        limits: Limits,
        device: torch.device,
        eos_token_ids: frozenset[int] = frozenset(),
        prefix_cache: bool = True,
    ) -> None:
        assert limits.max_context_tokens <= (kv.num_blocks - 1) * BLOCK_TOKENS
        self.limits = limits
        self.eos_token_ids = eos_token_ids
        self.cache = KVCache(kv.num_blocks)
        self.scheduler = Scheduler(
            self.cache, limits.max_batch_tokens, limits.max_batch_requests, prefix_cache
        )
        self.runner = Runner(model, kv, device, limits.max_batch_requests, limits.max_context_tokens)
        self._requests: dict[int, Request] = {}
        self._ended: list[Output] = []  # ends that no step brought about: refusals and aborts
        self._ended_phase_seconds: list[list[float]] = []  # since the last Step
        self._num_arrived = 0

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._ended)

    def add(self, submit: Submit) -> None:
        """Accepts a request, or refuses it with an error in the next Step."""
        assert submit.id not in self._requests, f"request id {submit.id} is in use"
        if error := self._refusal(submit):
            self._ended.append(Output(submit.id, [], "error", error=error))
            return
        request = Request(submit, self._num_arrived, self.eos_token_ids, self.limits.max_context_tokens)
        self._num_arrived += 1
        self._requests[request.id] = request
        self.scheduler.add(request)

    def abort(self, ids: list[int]) -> None:
        """Ends these requests now; an id that has ended already, or was never known, is passed over."""
        for request_id in ids:
            if request := self._requests.get(request_id):
                self._ended.append(self._end(request, Output(request_id, []), "abort"))

    def step(self) -> Step:
        """One forward pass for whoever can run, and everything that came of it."""
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        outputs, self._ended = self._ended, []
        if plan.chunks:
            outputs += self._run(plan.chunks)
        return Step(outputs, self._stats(plan, time.perf_counter() - started))

    def heartbeat(self) -> Step:
        """The sign of life of an idle engine."""
        return Step([], self._stats(Plan(), 0.0))

    def check(self) -> None:
        """Asserts that blocks and requests account for each other."""
        live = [*self.scheduler.waiting, *self.scheduler.running]
        assert {id(request) for request in live} == {id(request) for request in self._requests.values()}
        self.cache.check([(request.blocks, request.num_registered_blocks) for request in live])

    def _refusal(self, submit: Submit) -> str:
        if not submit.prompt:
            return EMPTY_PROMPT
        needed = len(submit.prompt) + (submit.sampling.max_tokens > 0)
        if needed > self.limits.max_context_tokens:
            return TOO_LONG
        if min(submit.prompt) < 0 or max(submit.prompt) >= self.limits.vocab_size:
            return BAD_TOKEN
        return ""

    def _run(self, chunks: list[Chunk]) -> list[Output]:
        try:
            result = self.runner.run(chunks)
        except torch.AcceleratorError:
            raise  # the device's context is lost: no later step could be right
        except Exception as error:
            logger.exception("step of %d requests failed", len(chunks))
            if len(chunks) == 1:
                told = NO_MEMORY if isinstance(error, torch.OutOfMemoryError) else STEP_ERROR
                return [self._fail(chunks[0].request, told)]
        else:
            return self._emit(chunks, result)
        # K and V that the failed step wrote are written again with the same values
        outputs: list[Output] = []
        for chunk in chunks:
            outputs += self._run([chunk])
        return outputs

    def _emit(self, chunks: list[Chunk], result: StepResult) -> list[Output]:
        self.scheduler.advance(chunks)
        outputs: list[Output] = []
        for index, (chunk, token_id) in enumerate(zip(chunks, result.token_ids, strict=True)):
            request = chunk.request
            if token_id == BAD_ROW:
                outputs.append(self._fail(request, MODEL_ERROR))
                continue
            if scored := result.prompt_logprobs.get(index):
                request.prompt_logprobs += scored
            tokens = request.tokens
            if request.num_computed_tokens < len(tokens):
                continue  # more of the prompt to come
            output = Output(request.id, [])
            finish_reason: FinishReason | None = None
            if token_id is None:  # max_tokens = 0: scoring only
                finish_reason = "length"
            else:
                tokens.append(token_id)
                output.token_ids.append(token_id)
                if token_id in request.stop_token_ids:
                    finish_reason = "stop"
                elif len(tokens) >= request.max_length:
                    finish_reason = "length"
                if result.logprobs and index in result.logprobs:
                    output.logprobs = [result.logprobs[index]]
            if not request.started:
                output.cached_tokens = request.num_cached_tokens
                if request.scores_prompt:
                    output.prompt_logprobs = [None, *request.prompt_logprobs]
                request.started = True
                if finish_reason is None:  # else it never decodes
                    request.end_phase()
            outputs.append(self._end(request, output, finish_reason) if finish_reason else output)
        return outputs

    def _fail(self, request: Request, error: str) -> Output:
        self.cache.forget(request.blocks)  # K and V may be as broken as the logits
        return self._end(request, Output(request.id, [], error=error), "error")

    def _end(self, request: Request, output: Output, finish_reason: FinishReason) -> Output:
        del self._requests[request.id]
        self.scheduler.release(request)
        request.end_phase()
        self._ended_phase_seconds.append(request.phase_seconds)
        output.finish_reason = finish_reason
        return output

    def _stats(self, plan: Plan, step_seconds: float) -> StepStats:
        ended, self._ended_phase_seconds = self._ended_phase_seconds, []
        return StepStats(
            step_seconds=step_seconds,
            num_prefill_tokens=plan.num_prefill_tokens,
            num_decode_tokens=plan.num_decode_tokens,
            num_cached_tokens=plan.num_cached_tokens,
            num_preemptions=plan.num_preemptions,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            kv_used_tokens=self.cache.num_held * BLOCK_TOKENS,
            kv_cached_tokens=self.cache.num_idle * BLOCK_TOKENS,
            ended_phase_seconds=ended,
        )
