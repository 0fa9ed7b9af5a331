"""Who runs in the next step, within one token budget and the KV blocks there are. No tensors.

engine --add--> waiting --admit--> running --schedule--> Plan --(runner)--> advance --(result)--> register

Decode comes first. Of what is left, the oldest unfinished prompt keeps at least half, so that nothing
starves; the rest goes to the prompts with the fewest tokens left, so that a short request need not wait
for a long one. While few decode, whose steps are short, one with prompts is held shorter too; while a crowd
waits, it may hold more tokens than the latency of decode would allow, so that the last of them waits less.
A prompt holds its blocks from admission on; an answer grows block by block, and where none is free the
newest request loses all of its own and starts again later. A deterministic request holds the blocks of its
longest answer from admission on.
"""

from bisect import insort
from dataclasses import dataclass, field

from service.engine.kv_cache import KVCache, extend_hashes, num_blocks_for
from service.engine.request import Request
from service.model.batch import BLOCK_TOKENS

# Scored prompt tokens need their whole row of logits; this bounds those rows in one step.
MAX_SCORED_TOKENS = 256
# A crowd: prompts for so many steps wait, of at least half as many requests as decode.
CROWD_STEPS = 48
FEW = 8  # a step has room for so many times those who decode


@dataclass(slots=True)
class Chunk:
    """The uncomputed tokens `start` to `stop` - 1 of a request."""

    request: Request
    start: int
    stop: int
    is_last: bool  # nothing of it is left to compute after this
    draws: bool  # a token comes of it

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def is_decode(self) -> bool:
        if self.request.deterministic and self.start < self.request.num_prompt_tokens:
            return False
        return self.draws and self.stop - self.start == 1


def next_chunk(request: Request, num_tokens: int) -> Chunk:
    start = request.num_computed_tokens
    is_last = num_tokens == request.num_uncomputed_tokens
    return Chunk(request, start, start + num_tokens, is_last, is_last and request.sampling.max_tokens > 0)


@dataclass(slots=True)
class Plan:
    """One step. Chunks that decode come first."""

    chunks: list[Chunk] = field(default_factory=list)
    num_decode_tokens: int = 0
    num_prefill_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    is_short: bool = False  # blocks are lacking, and whoever gives them up must not be on the way


class Scheduler:
    """Waiting and running requests, each list by arrival."""

    def __init__(
        self,
        cache: KVCache,
        max_batch_tokens: int,
        max_batch_requests: int,
        prefix_cache: bool = True,
        few_batch_tokens: int = 0,
        crowd_batch_tokens: int = 0,
    ) -> None:
        """The last two, of a step while few decode and while a crowd waits: 0 is as ever."""
        assert 1 <= max_batch_requests <= max_batch_tokens
        self.cache = cache
        self.max_batch_tokens = max_batch_tokens
        self.few_batch_tokens = few_batch_tokens or max_batch_tokens
        self.crowd_batch_tokens = max(crowd_batch_tokens, max_batch_tokens)
        self.prefix_cache = prefix_cache
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._free_rows = list(range(max_batch_requests - 1, -1, -1))

    def add(self, request: Request) -> None:
        insort(self.waiting, request, key=lambda r: r.arrival)

    def release(self, request: Request) -> None:
        """Ends a request, waiting or running; its blocks are free at once."""
        if request.row < 0:
            self.waiting.remove(request)
        else:
            self._stop(request)

    def schedule(self, may_preempt: bool = True) -> Plan:
        """The next step's work; empty where nobody can run.

        Without `may_preempt` a plan that blocks do not suffice for is empty and `is_short`.
        """
        plan = Plan()
        self._plan_decode(plan, may_preempt)
        if plan.is_short:
            return plan
        self._plan_prefill(plan)
        if plan.num_prefill_tokens or not all(chunk.is_decode for chunk in plan.chunks):
            plan.chunks.sort(key=lambda chunk: not chunk.is_decode)
        return plan

    def advance(self, chunks: list[Chunk]) -> None:
        """After a launch: what it computes counts, and a prompt's full blocks may be shared.

        Whoever shares them is launched later, and the device works in order.
        """
        for chunk in chunks:
            request = chunk.request
            request.num_computed_tokens = chunk.stop
            request.num_pending_tokens += chunk.draws
            request.on_device = chunk.draws
            if chunk.stop - chunk.start > 1:
                self.register(request)

    def register(self, request: Request) -> None:
        """Makes its full blocks findable whose tokens are known."""
        num_full = min(request.num_computed_tokens, request.num_sharable_tokens) // BLOCK_TOKENS
        if num_full > request.num_registered_blocks and self.prefix_cache:
            extend_hashes(request.block_hashes, request.tokens, request.cache_salt)
            for index in range(request.num_registered_blocks, num_full):
                self.cache.register(request.blocks[index], request.block_hashes[index])
            request.num_registered_blocks = num_full

    def _plan_decode(self, plan: Plan, may_preempt: bool) -> None:
        chunks, running = plan.chunks, self.running
        index = 0
        while index < len(running):  # preemption takes from the end of the list
            request = running[index]
            index += 1
            start, length = request.num_computed_tokens, len(request.tokens) + request.num_pending_tokens
            if length - start != 1 or (request.num_pending_tokens and length >= request.max_length):
                continue
            if start >= len(request.blocks) * BLOCK_TOKENS and not self._grow(request, plan, may_preempt):
                break
            chunks.append(Chunk(request, start, length, True, request.sampling.max_tokens > 0))
        if plan.is_short:
            chunks.clear()
        plan.num_decode_tokens = len(chunks)

    def _grow(self, request: Request, plan: Plan, may_preempt: bool) -> bool:
        """One more block; False where the request itself had to give way, or none is left to take."""
        while (blocks := self.cache.allocate((), 1)) is None:
            if not may_preempt:
                plan.is_short = True
                return False
            victim = self.running[-1]
            self._stop(victim)
            victim.forget_computed()
            self.add(victim)
            plan.num_preemptions += 1
            if victim is request:
                return False
        request.blocks += blocks
        return True

    def _plan_prefill(self, plan: Plan) -> None:
        budget = self._step_tokens(plan.num_decode_tokens) - plan.num_decode_tokens
        candidates = [request for request in self.running if request.num_uncomputed_tokens > 1]
        computing = {digest for request in candidates for digest in self._unregistered(request)}
        # A request admitted right after a preemption would take the blocks that were just fought for.
        if self._free_rows and not plan.num_preemptions:
            candidates += self.waiting
        if not candidates or budget <= 0:
            return
        oldest = min(candidates, key=lambda request: request.arrival)
        candidates.remove(oldest)
        candidates.sort(key=lambda request: (request.num_uncomputed_tokens, request.arrival))

        scored = MAX_SCORED_TOKENS
        oldest_tokens = 0
        may_admit = True
        if (
            oldest.row >= 0
            or self._is_being_computed(oldest, computing)
            or self._admit(oldest, plan, computing)
        ):
            if oldest.row >= 0:
                oldest_tokens = min(oldest.num_uncomputed_tokens, -(-budget // 2))
                if oldest.scores_prompt:
                    oldest_tokens = min(oldest_tokens, scored)
                    scored -= oldest_tokens
                budget -= oldest_tokens
        else:
            may_admit = False  # whoever came later waits until the oldest fits

        for request in candidates:
            limit = min(budget, scored) if request.scores_prompt else budget
            if budget <= 0:
                break
            if limit <= 0:
                continue
            if request.row < 0:
                if not may_admit or self._is_being_computed(request, computing):
                    continue
                if not self._admit(request, plan, computing):
                    may_admit = False  # those after it are longer
                    continue
            num_tokens = min(limit, request.num_uncomputed_tokens)
            plan.chunks.append(next_chunk(request, num_tokens))
            plan.num_prefill_tokens += num_tokens
            budget -= num_tokens
            if request.scores_prompt:
                scored -= num_tokens

        if oldest_tokens:
            more = min(budget, scored) if oldest.scores_prompt else budget
            oldest_tokens += min(more, oldest.num_uncomputed_tokens - oldest_tokens)
            plan.chunks.append(next_chunk(oldest, oldest_tokens))
            plan.num_prefill_tokens += oldest_tokens

    def _step_tokens(self, num_decoding: int) -> int:
        if self.crowd_batch_tokens > self.max_batch_tokens and 2 * len(self.waiting) >= num_decoding:
            queued = 0
            for request in self.waiting:
                queued += request.num_uncomputed_tokens
                if queued > CROWD_STEPS * self.max_batch_tokens:
                    return self.crowd_batch_tokens
        is_few = 0 < FEW * num_decoding <= self.max_batch_tokens
        return self.few_batch_tokens if is_few else self.max_batch_tokens

    def _sharable_hashes(self, request: Request) -> list[bytes]:
        """Hashes of the blocks it may take from others: at least its last token is always computed."""
        if not self.prefix_cache or request.scores_prompt:
            return []
        extend_hashes(request.block_hashes, request.tokens, request.cache_salt)
        return request.block_hashes[: (len(request.tokens) - 1) // BLOCK_TOKENS]

    def _unregistered(self, request: Request) -> list[bytes]:
        if not self.prefix_cache:
            return []
        extend_hashes(request.block_hashes, request.tokens, request.cache_salt)
        return request.block_hashes[request.num_registered_blocks :]

    def _is_being_computed(self, request: Request, computing: set[bytes]) -> bool:
        """Is the next block that it needs in a running prompt too? Then waiting a step saves the work."""
        if request.row >= 0 or not computing:
            return False
        hashes = self._sharable_hashes(request)
        num_known = len(self.cache.match(hashes))
        return num_known < len(hashes) and hashes[num_known] in computing

    def _admit(self, request: Request, plan: Plan, computing: set[bytes]) -> bool:
        """From waiting to running, with blocks for what it reserves and a spare one for each grower."""
        if not self._free_rows:
            return False
        shared = self.cache.match(self._sharable_hashes(request))
        num_new = num_blocks_for(request.num_reserved_tokens) - len(shared)
        num_spare = 0 if request.deterministic else len(self.running)
        blocks = self.cache.allocate(shared, num_new, num_spare)
        if blocks is None:
            return False
        request.blocks = blocks
        request.num_registered_blocks = len(shared)
        request.num_computed_tokens = len(shared) * BLOCK_TOKENS
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = request.num_computed_tokens
            plan.num_cached_tokens += request.num_computed_tokens
            request.end_phase()
        request.row = self._free_rows.pop()
        self.waiting.remove(request)
        insort(self.running, request, key=lambda r: r.arrival)
        computing.update(self._unregistered(request))
        return True

    def _stop(self, request: Request) -> None:
        self.running.remove(request)
        self.cache.release(request.blocks)
        self._free_rows.append(request.row)
