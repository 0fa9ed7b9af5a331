"""The loop of the engine: schedule -> run -> emit. Every accepted request ends exactly once.

child --add, abort--> Engine --step--> one Step message

The loop may run one step ahead of the results (`Engine.step`). It works on anything with
`forward(batch, kv)`; messages in, messages out, no socket.
"""

import logging
import time
from collections import deque
from dataclasses import dataclass

import torch

from service.engine.decode_step import Model
from service.engine.kv_cache import KVCache
from service.engine.request import Request
from service.engine.results import Pending
from service.engine.runner import Runner
from service.engine.sampler import BAD_ROW
from service.engine.scheduler import Chunk, Plan, Scheduler
from service.messages import (
    BAD_TOKEN,
    EMPTY_PROMPT,
    MODEL_ERROR,
    NO_MEMORY,
    STEP_ERROR,
    TOO_LONG,
    FinishReason,
    Output,
    Step,
    StepStats,
    Submit,
)
from service.model.batch import BLOCK_TOKENS, PagedKV

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one engine can hold; `max_context_tokens` never exceeds what the KV cache can."""

    max_context_tokens: int
    max_batch_tokens: int
    max_batch_requests: int
    vocab_size: int
    few_batch_tokens: int = 0  # of a step while few decode; 0: as ever
    crowd_batch_tokens: int = 0  # of a step while a crowd waits; 0: as ever


@dataclass(frozen=True, slots=True)
class Launched:
    plan: Plan
    pending: Pending
    at: float  # seconds of the monotonic clock


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
        depth: int = 0,
        deterministic: bool = False,
    ) -> None:
        """`depth`: steps that are launched before the oldest of them is collected, 0 or 1. `deterministic`:
        an answer is the same, bit for bit, in every company, if the model is made so."""
        assert limits.max_context_tokens <= (kv.num_blocks - 1) * BLOCK_TOKENS
        self.limits = limits
        self.depth = depth
        self.deterministic = deterministic
        self.eos_token_ids = eos_token_ids
        self.cache = KVCache(kv.num_blocks)
        self.scheduler = Scheduler(
            self.cache,
            limits.max_batch_tokens,
            limits.max_batch_requests,
            prefix_cache,
            limits.few_batch_tokens,
            limits.crowd_batch_tokens,
        )
        self.runner = Runner(
            model,
            kv,
            device,
            limits.max_batch_requests,
            limits.max_context_tokens,
            limits.vocab_size,
            max(limits.max_batch_tokens, limits.crowd_batch_tokens),
            deterministic,
        )
        self._requests: dict[int, Request] = {}
        self._launched: deque[Launched] = deque()
        self._collected_at = 0.0
        self._outputs: list[Output] = []  # these two since the last Step
        self._stats = StepStats()
        self.num_surplus_chunks = 0  # computed for requests that had ended
        self._num_arrived = 0

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._outputs or self._launched)

    def add(self, submit: Submit) -> None:
        """Accepts a request, or refuses it with an error in the next Step."""
        assert submit.id not in self._requests, f"request id {submit.id} is in use"
        if error := self._refusal(submit):
            self._outputs.append(Output(submit.id, [], "error", error=error))
            return
        request = Request(
            submit, self._num_arrived, self.eos_token_ids, self.limits.max_context_tokens, self.deterministic
        )
        self._num_arrived += 1
        self._requests[request.id] = request
        self.scheduler.add(request)

    def abort(self, ids: list[int]) -> None:
        """Ends these requests now; an id that has ended already, or was never known, is passed over."""
        for request_id in ids:
            if request := self._requests.get(request_id):
                self._end(request, Output(request_id, []), "abort")

    def step(self) -> Step:
        """One forward pass for whoever can run, and everything that came of it.

        With `depth` 1 that is the pass launched before: the next is launched first, so that the device has
        work while the host reads, emits and schedules. A request's next token is on the device by then; one
        that turns out to have ended has a surplus row in the next pass, which is passed over.
        """
        while len(self._launched) <= self.depth:
            # who is preempted starts again from tokens that the host knows, so no step of his may be pending
            plan = self.scheduler.schedule(may_preempt=not self._launched)
            self._stats.num_cached_tokens += plan.num_cached_tokens
            self._stats.num_preemptions += plan.num_preemptions
            if not plan.chunks:
                break
            self._launch(plan)
        if self._launched:
            self._collect()
        return self._told()

    @property
    def may_prepare(self) -> bool:
        """Whether `prepare` would do something."""
        return self.runner.graphs is not None and not self.runner.graphs.is_complete

    def prepare(self) -> None:
        """A little of what would otherwise be done when a step first needs it, some 20 ms."""
        assert self.runner.graphs is not None
        self.runner.graphs.capture_one()

    def heartbeat(self) -> Step:
        """The sign of life of an idle engine."""
        return self._told()

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

    def _launch(self, plan: Plan) -> None:
        chunks = plan.chunks
        launched_at = time.perf_counter()
        try:
            pending = self.runner.launch(chunks)
        except torch.AcceleratorError:
            raise  # the device's context is lost: no later step could be right
        except Exception as error:
            logger.exception("step of %d requests failed", len(chunks))
            self._isolate(chunks, error)
            return
        self.scheduler.advance(chunks)
        self._launched.append(Launched(plan, pending, launched_at))

    def _isolate(self, chunks: list[Chunk], error: Exception) -> None:
        """Gives each request of a failed step one of its own, so that the guilty one alone ends.

        K and V that the failed step wrote are written again with the same values.
        """
        while self._launched:
            self._collect()
        alive = [chunk for chunk in chunks if not chunk.request.ended]
        if len(chunks) == 1 and alive:
            told = NO_MEMORY if isinstance(error, torch.OutOfMemoryError) else STEP_ERROR
            self._fail(chunks[0].request, told)
            return
        for chunk in alive:
            # the failed step may have drawn already: length, last token and counts come from the host again
            chunk.request.on_device = False
            chunk.request.num_tabled_blocks = 0
            is_decode = chunk.is_last and chunk.num_tokens == 1
            self._launch(Plan([chunk], is_decode, 0 if is_decode else chunk.num_tokens))
            while self._launched:
                self._collect()

    def _collect(self) -> None:
        """The oldest launched step's results -> outputs."""
        launched = self._launched.popleft()
        result = launched.pending.collect()
        now = time.perf_counter()
        plan, stats = launched.plan, self._stats
        stats.step_seconds += now - max(launched.at, self._collected_at)
        self._collected_at = now
        stats.num_prefill_tokens += plan.num_prefill_tokens
        stats.num_decode_tokens += plan.num_decode_tokens
        for index, (chunk, token_id) in enumerate(zip(plan.chunks, result.token_ids, strict=True)):
            request = chunk.request
            if request.ended:
                self.num_surplus_chunks += 1
                continue
            if token_id == BAD_ROW:
                self._fail(request, MODEL_ERROR)
                continue
            if scored := result.prompt_logprobs.get(index):
                request.prompt_logprobs += scored
            if not chunk.is_last:
                continue
            output = Output(request.id, [])
            finish_reason: FinishReason | None = None
            if token_id is None:  # max_tokens = 0: scoring only
                finish_reason = "length"
            else:
                tokens = request.tokens
                tokens.append(token_id)
                request.num_pending_tokens -= 1
                output.token_ids.append(token_id)
                if token_id in request.stop_token_ids:
                    finish_reason = "stop"
                elif len(tokens) >= request.max_length:
                    finish_reason = "length"
                if index in result.logprobs:
                    output.logprobs = [result.logprobs[index]]
                if len(tokens) % BLOCK_TOKENS <= 1:  # a border has been passed, by this token or the last
                    self.scheduler.register(request)
            if not request.started:
                self._start(request, output, finish_reason)
            if finish_reason:
                self._end(request, output, finish_reason)
            else:
                self._outputs.append(output)

    def _start(self, request: Request, output: Output, finish_reason: FinishReason | None) -> None:
        """Its first output."""
        output.cached_tokens = request.num_cached_tokens
        if request.scores_prompt:
            output.prompt_logprobs = [None, *request.prompt_logprobs]
        request.started = True
        if finish_reason is None:  # else it never decodes
            request.end_phase()

    def _fail(self, request: Request, error: str) -> None:
        self.cache.forget(request.blocks)  # K and V may be as broken as the logits
        self._end(request, Output(request.id, [], error=error), "error")

    def _end(self, request: Request, output: Output, finish_reason: FinishReason) -> None:
        """Its blocks and its row are free at once: whoever takes them writes in a step launched later, and
        the device works in order, so a surplus row of this request has been there before."""
        del self._requests[request.id]
        self.scheduler.release(request)
        request.ended = True
        request.end_phase()
        self._stats.ended_phase_seconds.append(request.phase_seconds)
        output.finish_reason = finish_reason
        self._outputs.append(output)

    def _told(self) -> Step:
        """Everything since the last Step."""
        outputs, self._outputs = self._outputs, []
        stats, self._stats = self._stats, StepStats()
        stats.num_running = len(self.scheduler.running)
        stats.num_waiting = len(self.scheduler.waiting)
        stats.kv_used_tokens = self.cache.num_held * BLOCK_TOKENS
        stats.kv_cached_tokens = self.cache.num_idle * BLOCK_TOKENS
        return Step(outputs, stats)
