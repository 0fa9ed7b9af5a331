"""Answers Evaluate: the quality of the served weights, computed by the kernels and the cache that serve.

child --Evaluate--> Evaluation --Evaluated (progress, then the figures)--> front

`prefill` scores each window in one forward pass. `decode1` and `decode8` feed the true tokens one by one
through the paged cache, one or eight sequences a step; both score the same positions: of the first eight
windows equal beginnings, then of the next eight, until there are `decode_tokens`. KL and agreement come with
the prefill pass, against another precision of the same checkpoint, loaded beside this one for the time.
Where both were scored, decode is also paired with prefill token by token: rounding differs at random, and
only the spread of the pairs, by windows, says what a difference of the means is worth.
"""

import logging
import math
from collections.abc import Callable, Iterator
from itertools import chain

import msgspec
import torch
from torch import Tensor

from service import device as devices
from service.engine.link import Throttle
from service.engine.startup import Serving, load_model
from service.errors import HalftoneError, RequestError
from service.messages import EngineConfig, Evaluate, Evaluated, Paired
from service.model.batch import BLOCK_TOKENS, PagedKV, StepBatch
from service.model.instance import ModelInstance
from service.quality.divergence import (
    agrees_on_top,
    grouped_mean,
    kl_divergence,
    negative_log_likelihood,
)

logger = logging.getLogger(__name__)

SIGN_OF_LIFE_S = 1.0
LOGIT_ROWS = 128  # rows of logits at once: float64 copies of a large vocabulary are big
MAX_LANES = 8
DECODE_LANES = {"decode1": 1, "decode8": MAX_LANES}
FAILED = "the engine failed on this evaluation"


def decode_spans(window_tokens: list[int], decode_tokens: int) -> list[int]:
    """Lengths of the windows -> scored tokens of each in the decode modes, `decode_tokens` together."""
    spans: list[int] = []
    left = decode_tokens
    for start in range(0, len(window_tokens), MAX_LANES):
        group = window_tokens[start : start + MAX_LANES]
        for index, length in enumerate(group):
            share = -(-left // (len(group) - index))  # what short windows leave is for those after them
            spans.append(min(share, length - 1))
            left -= spans[-1]
    return spans


class Evaluation:
    """One Evaluate from start to end; the engine must be idle, its KV cache lends the blocks."""

    def __init__(
        self, message: Evaluate, serving: Serving, config: EngineConfig, send: Callable[[Evaluated], None]
    ) -> None:
        self.message = message
        self.serving = serving
        self.config = config
        self._send = send
        self._throttle = Throttle(SIGN_OF_LIFE_S)
        self._spans = decode_spans([len(window) for window in message.windows], message.decode_tokens)
        scored = sum(len(window) - 1 for window in message.windows)
        decoded = sum(self._spans)
        self._answer = Evaluated(message.id, 0, 1, {}, {})
        self._scores_prefill = "prefill" in message.modes or bool(message.reference)
        self._prefill: list[list[float]] = []  # window, scored token -> nats
        num_decodes = sum(mode in DECODE_LANES for mode in message.modes)
        self._answer.total = max(1, self._scores_prefill * scored + num_decodes * decoded)

    def run(self) -> None:
        """Sends progress, then one Evaluated with `done` = `total`, or with an error."""
        answer = self._answer
        try:
            self._check()
            self._evaluate()
        except HalftoneError as error:
            answer.error = str(error)
        except torch.AcceleratorError:
            raise  # the device's context is lost
        except Exception:
            logger.exception("evaluation %d failed", self.message.id)
            answer.error = FAILED
        answer.done = answer.total
        self._send(answer)

    def _check(self) -> None:
        limits, windows = self.serving.engine.limits, self.message.windows
        if not windows or min(map(len, windows)) < 2:
            raise RequestError("an evaluation needs windows of two tokens or more")
        longest = max(map(len, windows))
        if longest > limits.max_context_tokens:
            raise RequestError(
                f"a window has {longest} tokens, the context window {limits.max_context_tokens}",
                hint="cut shorter windows, or raise `max_context_tokens` or `kv_tokens`",
            )
        if min(map(min, windows)) < 0 or max(map(max, windows)) >= limits.vocab_size:
            raise RequestError(f"a window holds a token id outside 0..{limits.vocab_size - 1}")

    @torch.inference_mode()
    def _evaluate(self) -> None:
        message = self.message
        if self._scores_prefill:
            reference = self._load_reference() if message.reference else None
            self._score_prefill(reference)
            del reference
            if message.reference:
                devices.release_cached(self.serving.model.device)
        for mode in message.modes:
            if mode in DECODE_LANES:
                self._score_decode(mode, DECODE_LANES[mode])

    def _load_reference(self) -> ModelInstance:
        def progress(*_: object) -> None:
            self._tick(0)

        # it runs alone, in any precision, and with the cache of that precision: what ours costs shall be seen
        config = msgspec.structs.replace(self.config, deterministic=False, kv_dtype="auto")
        return load_model(config, self.message.reference, self.serving.model.device, progress)

    def _score_prefill(self, reference: ModelInstance | None) -> None:
        """Whole windows, each in one forward pass; the reference sees the same."""
        model, windows, answer = self.serving.model, self.message.windows, self._answer
        num_blocks = -(-max(map(len, windows)) // BLOCK_TOKENS)
        kl, num_agreeing = 0.0, 0
        [blocks] = self._borrow([num_blocks])
        reference_kv = reference.new_kv(num_blocks + 1) if reference else None
        try:
            for window in windows:
                targets = torch.tensor(window[1:], device=model.device)
                nats: list[float] = []
                self._prefill.append(nats)
                slices = self._logits(model, window, blocks, self.serving.kv)
                if reference is None or reference_kv is None:
                    for start, logits in slices:
                        nats += negative_log_likelihood(logits, targets[start:][: len(logits)]).tolist()
                        self._tick(len(logits))
                else:
                    others = self._logits(reference, window, list(range(1, num_blocks + 1)), reference_kv)
                    for (start, logits), (_, other) in zip(slices, others, strict=True):
                        nats += negative_log_likelihood(logits, targets[start:][: len(logits)]).tolist()
                        kl += float(kl_divergence(other, logits).sum())
                        num_agreeing += int(agrees_on_top(other, logits).sum())
                        self._tick(len(logits))
        finally:
            self.serving.engine.cache.release(blocks)
        num_tokens = sum(map(len, self._prefill))
        if "prefill" in self.message.modes:
            answer.nll["prefill"] = math.fsum(chain.from_iterable(self._prefill))
            answer.tokens["prefill"] = num_tokens
        if reference is not None:
            answer.kl_mean, answer.kl_tokens = kl / num_tokens, num_tokens
            answer.top1_agreement = num_agreeing / num_tokens

    def _logits(
        self, model: ModelInstance, token_ids: list[int], blocks: list[int], kv: PagedKV
    ) -> Iterator[tuple[int, Tensor]]:
        """One forward pass over a window -> (first row, float32 logits [rows, vocab]), slice by slice.

        The last token, whose row has nothing to predict, is computed too: where a mode looks at a whole batch
        of activations, it shall see what an independent computation of this window sees.
        """
        decoder = model.decoder
        batch = sequence_batch(token_ids, blocks, model.device)
        step = decoder.prepare(batch, kv)
        hidden = decoder.embed(batch.token_ids)
        delta: Tensor | None = None
        for layer in model.layers():
            hidden, delta = layer(hidden, delta, step)
            self._tick(0)
        num_scored = len(token_ids) - 1
        for start in range(0, num_scored, LOGIT_ROWS):
            rows = torch.arange(start, min(start + LOGIT_ROWS, num_scored), device=model.device)
            yield start, decoder.logits(hidden, delta, rows)

    def _score_decode(self, mode: str, num_lanes: int) -> None:
        """Beginnings of windows, as many at once as there are lanes."""
        spans, answer = self._spans, self._answer
        nats: list[list[float]] = [[] for _ in spans]  # window, scored token
        scored = [window for window, span in enumerate(spans) if span]
        for first in range(0, len(scored), num_lanes):
            group = sorted(scored[first : first + num_lanes], key=spans.__getitem__, reverse=True)
            blocks = self._borrow([-(-(spans[window] + 1) // BLOCK_TOKENS) for window in group])
            try:
                for position in range(spans[group[0]]):
                    group = [window for window in group if spans[window] > position]
                    for window, value in zip(group, self._decode_step(group, blocks, position), strict=True):
                        nats[window].append(value)
            finally:
                for borrowed in blocks:
                    self.serving.engine.cache.release(borrowed)
        answer.nll[mode] = math.fsum(chain.from_iterable(nats))
        answer.tokens[mode] = sum(map(len, nats))
        if self._scores_prefill and scored:
            answer.paired[mode] = paired(nats, self._prefill)

    def _decode_step(self, group: list[int], blocks: list[list[int]], position: int) -> list[float]:
        """Feeds the token at `position` of each window -> nats of the tokens after it."""
        model = self.serving.model
        lanes = [self.message.windows[window] for window in group]
        batch = position_batch(lanes, blocks, position, model.device)
        targets = torch.tensor([lane[position + 1] for lane in lanes], device=model.device)
        logits = model.forward(batch, self.serving.kv)
        self._tick(len(group))
        nats: list[float] = negative_log_likelihood(logits, targets).tolist()
        return nats

    def _borrow(self, counts: list[int]) -> list[list[int]]:
        """Blocks of the idle engine's cache, for sequences that need these many."""
        cache = self.serving.engine.cache
        blocks = cache.allocate((), sum(counts))
        if blocks is None:
            raise RequestError(
                f"the KV cache holds {cache.num_free * BLOCK_TOKENS} tokens, "
                f"{len(counts)} windows at once need {sum(counts) * BLOCK_TOKENS}",
                hint="raise `kv_tokens`, or cut shorter windows",
            )
        parts = iter(blocks)
        return [[next(parts) for _ in range(count)] for count in counts]

    def _tick(self, num_scored: int) -> None:
        answer = self._answer
        answer.done += num_scored
        if self._throttle.ready():
            self._send(Evaluated(answer.id, min(answer.done, answer.total - 1), answer.total, {}, {}))


def paired(decode: list[list[float]], prefill: list[list[float]]) -> Paired:
    """Nats by window and scored token, from its beginning on; what only one has scored is left out."""
    differences = [
        [ours - base for ours, base in zip(*window, strict=False)]
        for window in zip(decode, prefill, strict=True)
    ]
    return Paired(sum(map(len, differences)), *grouped_mean(differences))


def sequence_batch(token_ids: list[int], blocks: list[int], device: torch.device) -> StepBatch:
    """A prefill step over one whole sequence; no rows of logits."""
    positions = torch.arange(len(token_ids), device=device)
    table = torch.tensor([blocks], dtype=torch.int32, device=device)
    return StepBatch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=positions,
        slots=table[0].long()[positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS,
        query_starts=[0, len(token_ids)],
        context_lengths=[len(token_ids)],
        block_tables=table[:, : -(-len(token_ids) // BLOCK_TOKENS)],
        num_decode=0,
        logit_rows=torch.empty(0, dtype=torch.int64, device=device),
    )


def position_batch(
    lanes: list[list[int]], blocks: list[list[int]], position: int, device: torch.device
) -> StepBatch:
    """A decode step of all lanes, each with its token at `position`."""
    num_lanes = len(lanes)
    num_blocks = position // BLOCK_TOKENS + 1
    tables = torch.tensor(
        [blocks[i][:num_blocks] for i in range(num_lanes)], dtype=torch.int32, device=device
    )
    return StepBatch(
        token_ids=torch.tensor([lane[position] for lane in lanes], device=device),
        positions=torch.full((num_lanes,), position, device=device),
        slots=tables[:, -1].long() * BLOCK_TOKENS + position % BLOCK_TOKENS,
        query_starts=list(range(num_lanes + 1)),
        context_lengths=[position + 1] * num_lanes,
        block_tables=tables,
        num_decode=num_lanes,
        logit_rows=torch.arange(num_lanes, device=device),
    )
