"""Answers Evaluate: the quality of the served weights, computed by the kernels and the cache that serve.

child --Evaluate--> Evaluation --Evaluated (progress, then the figures)--> front

`prefill` scores each window in one forward pass. `decode1` and `decode8` feed the true tokens one by one
through the steps that serve (forced_decode), one or eight sequences each; both score the same positions: of
the first eight windows equal beginnings, then of the next eight, until there are `decode_tokens`. KL and
agreement come with the prefill pass, against another precision, which goes through all windows a layer at a
time (streamed). Where both were scored, decode is also paired with prefill token by token: rounding differs
at random, and only the spread of the pairs, by windows, says what a difference of the means is worth.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from service import device as devices
from service.engine.forced_decode import ForcedDecode
from service.engine.greedy_answers import agreed_tokens, answer_greedily
from service.engine.link import Throttle
from service.engine.sources import open_model
from service.engine.startup import Serving
from service.engine.streamed import StreamedModel, in_groups, row_slices
from service.engine.window_scores import Scored, paired, tell
from service.errors import HalftoneError, RequestError
from service.messages import EngineConfig, Evaluate, Evaluated, GreedyAgreement
from service.model.batch import BLOCK_TOKENS, sequence_batch
from service.model.verify import verify
from service.quality.divergence import negative_log_likelihood

logger = logging.getLogger(__name__)

SIGN_OF_LIFE_S = 1.0
STREAMED_TOKENS = 1 << 16  # that wait in host memory between a reference's layers: 1 GiB at 4,096 features
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
        windows = message.windows
        self._spans = decode_spans([len(window) for window in windows], message.decode_tokens)
        self._scored_from = message.scored_from or [1] * len(windows)
        num_scored = sum(len(window) - 1 for window in windows)
        self._answer = Evaluated(message.id, 0, 1, {}, {})
        self._scores_prefill = bool(windows) and ("prefill" in message.modes or bool(message.reference))
        self._prefill: list[Scored] = []  # by window
        self._decodes = [mode for mode in message.modes if mode in DECODE_LANES]
        num_spoken = len(message.prompts) * message.greedy_tokens
        num_read = sum(map(len, [*windows, *message.prompts])) + num_spoken  # by the reference
        self._answer.total = max(
            1,
            self._scores_prefill * num_scored
            + bool(message.reference) * num_read
            + num_spoken
            + len(self._decodes) * sum(self._spans),
        )

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
        limits, message = self.serving.engine.limits, self.message
        windows, prompts = message.windows, message.prompts
        if not (windows or prompts) or min(map(len, windows), default=2) < 2:
            raise RequestError("an evaluation needs windows of two tokens or more")
        if prompts and not message.reference:
            raise RequestError("greedy answers are compared with those of a `reference`: none was named")
        if prompts and (not all(prompts) or message.greedy_tokens < 1):
            raise RequestError("greedy answers need prompts and an answer of one token or more each")
        longest = max(map(len, windows), default=0)
        if longest > limits.max_context_tokens + 1:  # the last token is predicted and need not be fed
            raise RequestError(
                f"a window has {longest} tokens, the context window {limits.max_context_tokens}",
                hint="cut shorter windows, or raise `max_context_tokens` or `kv_tokens`",
            )
        longest = max(map(len, prompts), default=0) + message.greedy_tokens
        if prompts and longest > limits.max_context_tokens:
            raise RequestError(
                f"a prompt and its answer have {longest} tokens, the context window "
                f"{limits.max_context_tokens}",
                hint="give shorter prompts or ask for shorter answers, or raise `max_context_tokens` or "
                "`kv_tokens`",
            )
        texts = [*windows, *prompts]
        if min(map(min, texts)) < 0 or max(map(max, texts)) >= limits.vocab_size:
            raise RequestError(f"a window or prompt holds a token id outside 0..{limits.vocab_size - 1}")
        if len(self._scored_from) != len(windows) or not all(
            1 <= first < len(window) for first, window in zip(self._scored_from, windows, strict=True)
        ):
            raise RequestError("`scored_from` needs a place in each window, from its second token on")

    @torch.inference_mode()
    def _evaluate(self) -> None:
        message = self.message
        answers: list[list[int]] = []
        if message.prompts:
            engine = self.serving.engine
            answers = answer_greedily(engine, message.prompts, message.greedy_tokens, self._tick)
        if message.reference:
            self._score_against(self._open_reference(), answers)
            devices.release_cached(self.serving.model.device)
        elif self._scores_prefill:
            for number in range(len(message.windows)):
                self._score_window(number, None)
        if self._prefill:
            of_prefill = "prefill" in message.modes
            tell(self._prefill, self._answer, of_prefill=of_prefill, of_reference=bool(message.reference))
        for mode in self._decodes:
            self._score_decode(mode, DECODE_LANES[mode])

    def _open_reference(self) -> StreamedModel:
        def progress(*_: object) -> None:
            self._tick(0)

        model, path = self.serving.model, self.message.reference_path
        config = msgspec.structs.replace(self.config, model_path=path) if path else self.config
        source, backend = open_model(config, self.message.reference, model.device, progress)
        verify(source, Path(config.tokenizer) if config.tokenizer else None)
        if source.config.vocab_size != model.config.vocab_size:
            raise RequestError(
                f"the reference `{source.path}` has {source.config.vocab_size} tokens, `{model.path}` "
                f"{model.config.vocab_size}: there is no divergence between two vocabularies",
                hint="name the checkpoint that the served one was made from",
            )
        return StreamedModel(source, backend, model.device)

    def _score_against(self, reference: StreamedModel, answers: list[list[int]]) -> None:
        """All windows and all greedy answers, which the reference reads in one pass or a few."""
        windows, prompts = self.message.windows, self.message.prompts
        told = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
        sequences = [*map(self._fed, windows), *told]
        agreed = []
        for group in in_groups(sequences, STREAMED_TOKENS):
            passed = reference.through([sequences[number] for number in group], self._tick)
            for place, number in enumerate(group):
                if number < len(windows):
                    rows = row_slices(self._first_row(number), len(windows[number]) - 1)
                    self._score_window(number, passed.logits(place, rows))
                else:
                    answer, first = answers[number - len(windows)], len(prompts[number - len(windows)]) - 1
                    rows = row_slices(first, first + len(answer))
                    agreed.append(agreed_tokens(answer, passed.logits(place, rows)))
            del passed
        if answers:
            self._answer.greedy = GreedyAgreement([len(answer) for answer in answers], agreed)

    def _fed(self, window: list[int]) -> list[int]:
        """What of a window is computed: its last token too, whose row predicts nothing, if there is room.

        Where a mode looks at a whole batch of activations, it shall see what an independent computation sees.
        """
        return window[: self.serving.engine.limits.max_context_tokens]

    def _first_row(self, number: int) -> int:
        """Of the logits that are computed: what counts, and what decode is paired with."""
        return 0 if self._decodes else self._scored_from[number] - 1

    def _score_window(self, number: int, reference: Iterator[Tensor] | None) -> None:
        """One window in one forward pass; `reference`: its logits, slice by slice."""
        model, window = self.serving.model, self.message.windows[number]
        first = self._first_row(number)
        slices = row_slices(first, len(window) - 1)
        scored = Scored(skipped=self._scored_from[number] - 1 - first)
        self._prefill.append(scored)
        targets = torch.tensor(window[1:], device=model.device)
        fed = self._fed(window)
        [blocks] = self._borrow([-(-len(fed) // BLOCK_TOKENS)])
        try:
            ours = self._logits(fed, blocks, slices)
            for (start, stop), logits in zip(slices, ours, strict=True):
                other = None if reference is None else next(reference)
                scored.add(logits, targets[start:stop], other)
                self._tick(stop - start)
        finally:
            self.serving.engine.cache.release(blocks)
        self._tick(first)

    def _logits(
        self, token_ids: list[int], blocks: list[int], slices: Sequence[tuple[int, int]]
    ) -> Iterator[Tensor]:
        """One forward pass over a window -> logits [rows, vocab] for each (first, last + 1) of `slices`."""
        model = self.serving.model
        decoder = model.decoder
        batch = sequence_batch(token_ids, blocks, model.device)
        step = decoder.prepare(batch, self.serving.kv)
        hidden = decoder.embed(batch.token_ids)
        delta: Tensor | None = None
        for layer in model.layers():
            hidden, delta = layer(hidden, delta, step)
            self._tick(0)
        for start, stop in slices:
            yield decoder.logits(hidden, delta, torch.arange(start, stop, device=model.device))

    def _score_decode(self, mode: str, num_lanes: int) -> None:
        """Beginnings of windows, as many at once as there are lanes."""
        spans, answer = self._spans, self._answer
        nats: list[list[float]] = [[] for _ in spans]  # window, scored token
        scored = [window for window, span in enumerate(spans) if span]
        for first in range(0, len(scored), num_lanes):
            group = sorted(scored[first : first + num_lanes], key=spans.__getitem__, reverse=True)
            blocks = self._borrow([-(-spans[window] // BLOCK_TOKENS) for window in group])
            try:
                decode = ForcedDecode(self.serving, [self.message.windows[index] for index in group], blocks)
                for position in range(spans[group[0]]):
                    group = [window for window in group if spans[window] > position]
                    for window, value in zip(group, self._decode_step(decode, group, position), strict=True):
                        nats[window].append(value)
            finally:
                for borrowed in blocks:
                    self.serving.engine.cache.release(borrowed)
        answer.nll[mode] = math.fsum(chain.from_iterable(nats))
        answer.tokens[mode] = sum(map(len, nats))
        if self._prefill and scored:
            targets = [window[1:] for window in self.message.windows]
            answer.paired[mode] = paired(nats, [window.nats for window in self._prefill], targets)

    def _decode_step(self, decode: ForcedDecode, group: list[int], position: int) -> list[float]:
        """Feeds the token at `position` of each window -> nats of the tokens after it."""
        windows = [self.message.windows[window] for window in group]
        targets = torch.tensor([window[position + 1] for window in windows], device=self.serving.model.device)
        logits = decode.logits(len(group), position)
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
