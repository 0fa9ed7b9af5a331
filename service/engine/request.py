"""One request inside the engine: its tokens, its KV blocks, and how far it has come."""

import time

from service.messages import Sampling, Submit, TokenLogprobs


class Request:
    """Prompt and answer are one list of tokens; computing catches up with its end, sampling extends it.

    What is launched counts as computed: the device works in order, so whatever is launched later finds it
    done. Tokens that launched steps draw are pending until the host has read them.

    A request that lost its blocks starts again at token 0 with all its tokens as prompt: random numbers
    depend on (seed, sample index, position) only, so its answer goes on as if nothing had happened.

    In a deterministic engine no request loses its blocks, and it is settled which kernels compute a token:
    those of prefill a prompt's, those of decode an answer's.
    """

    __slots__ = (
        "arrival",
        "block_hashes",
        "blocks",
        "cache_salt",
        "deterministic",
        "ended",
        "id",
        "max_length",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_pending_tokens",
        "num_prompt_tokens",
        "num_registered_blocks",
        "num_tabled_blocks",
        "on_device",
        "phase_seconds",
        "phase_started_at",
        "prompt_logprobs",
        "row",
        "sampling",
        "started",
        "stop_token_ids",
        "tokens",
    )

    def __init__(
        self,
        submit: Submit,
        arrival: int,
        eos_token_ids: frozenset[int],
        max_context_tokens: int,
        deterministic: bool = False,
    ) -> None:
        sampling = submit.sampling
        self.id = submit.id
        self.arrival = arrival  # order of acceptance
        self.sampling: Sampling = sampling
        self.deterministic = deterministic
        self.cache_salt = submit.cache_salt
        self.tokens = list(submit.prompt)
        self.num_prompt_tokens = len(submit.prompt)
        self.max_length = min(self.num_prompt_tokens + sampling.max_tokens, max_context_tokens)
        own = frozenset(sampling.stop_token_ids)
        self.stop_token_ids = own if sampling.ignore_eos else own | eos_token_ids
        self.blocks: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_registered_blocks = 0
        self.num_tabled_blocks = 0  # blocks that the runner's table knows
        self.num_computed_tokens = 0
        self.num_pending_tokens = 0
        self.on_device = False  # a step has left its length and last token there
        self.ended = False
        self.num_cached_tokens = -1  # of the prompt, at first admission; -1 before it
        self.row = -1  # of the runner's tables while running
        self.started = False  # has sent an Output
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.phase_started_at = time.perf_counter()
        self.phase_seconds: list[float] = []  # in queue, prefill and decode, as far as it came

    def end_phase(self) -> None:
        """It was first admitted, gave its first token, or ended. Preemption takes no phase back."""
        now = time.perf_counter()
        self.phase_seconds.append(now - self.phase_started_at)
        self.phase_started_at = now

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.tokens) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def num_sharable_tokens(self) -> int:
        """From the start, those whose K and V another request may use, once they are computed."""
        return self.num_prompt_tokens if self.deterministic else len(self.tokens)

    @property
    def num_reserved_tokens(self) -> int:
        """From the start, those that it holds blocks for from its admission on."""
        return self.max_length if self.deterministic else len(self.tokens)

    @property
    def scores_prompt(self) -> bool:
        """Does it still owe log-probabilities of its prompt? Then every prompt token must be computed."""
        return self.sampling.prompt_logprobs >= 0 and not self.started

    def forget_computed(self) -> None:
        """Back to the start, without blocks; nothing of it may be on its way."""
        self.blocks = []
        self.num_registered_blocks = 0
        self.num_tabled_blocks = 0
        self.num_computed_tokens = 0
        self.on_device = False
        self.row = -1
        self.prompt_logprobs = []
