"""The scheduler's chunks -> a launched step -> one result a chunk.

engine --chunks--> Runner.launch --> Pending --collect--> StepResult

`launch` gives the device its work and waits for nothing. A step in which every request decodes is a
DecodeStep on what lies on the device already; one with parts of prompts in it is told by MixedInputs, its
decoding rows first, whose tokens the host may not know yet.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from service import device as devices
from service.engine.alone import draw_alone, logprobs_alone
from service.engine.decode_step import DecodeStep, Model, sampling_rows
from service.engine.graphs import Graph, Graphs
from service.engine.mixed_step import MixedInputs, MixedSteps
from service.engine.penalties import Penalties
from service.engine.request import Request
from service.engine.results import Asked, Pending, Scored
from service.engine.sampler import Variant, draw, logprobs
from service.engine.scheduler import Chunk
from service.engine.state import DeviceState, Ints
from service.kernels.kv_codes import is_coded
from service.messages import Sampling
from service.model.batch import PagedKV

VARIANTS: tuple[Variant, ...] = ("greedy", "temperature", "full")


class Runner:
    """Runs steps of a model over one KV cache; `max_context_tokens` bounds a request's block table,
    `max_step_tokens` is what a step has at most."""

    def __init__(
        self,
        model: Model,
        kv: PagedKV,
        device: torch.device,
        max_batch_requests: int,
        max_context_tokens: int,
        vocab_size: int,
        max_step_tokens: int,
        deterministic: bool = False,
    ) -> None:
        self.model = model
        self.kv = kv
        self.device = device
        self.state = DeviceState(max_batch_requests, max_context_tokens, device)
        self.penalties = Penalties(max_batch_requests + 1, vocab_size, device)  # as the state, with padding
        self.deterministic = deterministic
        # a GPU's kernels look at each row alone anyhow
        self._draw = draw_alone if deterministic and not devices.runs_behind(device) else draw
        self.decode_step = DecodeStep(model, kv, self.state, self.penalties, self._draw)
        self.mixed_steps: MixedSteps | None = None
        if not (deterministic and is_coded(kv.keys[0].dtype)):  # which reads codes in place: it has no copies
            self.mixed_steps = MixedSteps(model, kv, self.state, max_step_tokens, max_batch_requests)
        self.graphs: Graphs | None = None
        # by row, what decides which variant of a step serves it
        self._variants = np.zeros(max_batch_requests, np.int64)
        self._num_logprobs = np.zeros(max_batch_requests, np.int64)
        self._min_lengths = np.zeros(max_batch_requests, np.int64)

    @property
    def kept_bytes(self) -> int:
        """Of what it keeps from step to step: the KV cache and the requests' rows."""
        return self.kv.bytes + self.state.bytes + self.penalties.bytes

    @torch.inference_mode()
    def rehearse(self) -> None:
        """The largest steps that are captured, on padding: what their buffers take."""
        self.state.select(np.empty(0, np.int64), self.state.padding)
        self.state.flush()
        self.decode_step(self.state.padding, "full")
        if self.mixed_steps:
            self.mixed_steps.make(self.mixed_steps.largest)().float()

    def capture(self, progress: Callable[[int, int], None] = lambda *_: None) -> None:
        """From now on a step is replayed if it has a graph.

        Raises DeviceError where the model's kernels cannot be captured.
        """
        self.graphs = Graphs(self.decode_step, self.state, progress, self.mixed_steps)

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> Pending:
        """One forward pass over all chunks; those that decode come first."""
        num_decode = 0
        for chunk in chunks:
            request = chunk.request
            if len(request.blocks) != request.num_tabled_blocks:
                self._table(request)
            if chunk.is_decode:
                num_decode += 1
                if not request.on_device:
                    self.state.resume(request.row, chunk.start, request.tokens[chunk.start])
        rows = np.array([chunk.request.row for chunk in chunks], np.int64)
        stops = np.array([chunk.stop for chunk in chunks], np.int64)
        if num_decode == len(chunks):
            return self._launch_decode(chunks, rows, stops)
        return self._launch_mixed(chunks, rows, stops, num_decode)

    def _launch_decode(self, chunks: list[Chunk], rows: Ints, stops: Ints) -> Pending:
        count = len(rows)
        places = list(range(count))
        variant = self._variant(rows)
        suppressed = self._suppressed(chunks, rows, stops)
        shapes_logits = bool(self.penalties.asking[rows].any())
        whole: Graph | None = None
        forward: Graph | None = None
        if self.graphs and suppressed is None and self._num_logprobs[rows].max() < 0:
            whole = self.graphs.step(count, variant)
        if self.graphs and whole is None:
            forward = self.graphs.forward(count)
        graph = whole or forward
        self.state.select(rows, graph.num_rows if graph else count)
        self.state.flush()
        if whole:
            return Pending(self.device, count, places, whole.replay()[:count])
        step = self.decode_step
        logits = forward.replay()[:count] if forward else step.logits(count, stops.tolist()).float()
        token_ids = step.draw(logits, variant, suppressed, shapes_logits=shapes_logits)
        return Pending(self.device, count, places, token_ids, self._asked(logits, token_ids, rows))

    def _launch_mixed(self, chunks: list[Chunk], rows: Ints, stops: Ints, num_decode: int) -> Pending:
        self.state.flush()
        wanted = wanted_logits(chunks)
        drawn_rows = rows[wanted.drawn]
        inputs = MixedInputs.of(chunks, rows, stops, num_decode, wanted.rows, self.state)
        graph = self.graphs.mixed(inputs) if self.graphs and not wanted.scored else None
        logits = graph.replay(inputs) if graph else self.model.forward(inputs.batch(self.state), self.kv)
        if not wanted.rows:
            return Pending(self.device, len(chunks), [], None)
        logits = logits.float()
        scored = [self._score(logits[start:stop], chunks[i], i) for i, start, stop in wanted.scored]
        if not wanted.drawn:
            return Pending(self.device, len(chunks), [], None, None, scored)
        columns = drawn_rows, stops[wanted.drawn], np.array(wanted.drawn_rows, np.int64)
        drawing, drawn_stops, picked = devices.upload(np.stack(columns), self.device)
        if scored:
            logits = logits.index_select(0, picked)
        suppressed = self._suppressed([chunks[i] for i in wanted.drawn], drawn_rows, stops[wanted.drawn])
        shapes_logits = bool(self.penalties.asking[drawn_rows].any())
        shaped, shaped_rows = logits, drawing.to(torch.int32)
        if shapes_logits:
            shaped = logits.clone()
            self.penalties.shape(shaped, shaped_rows)
        token_ids_drawn = self._draw(
            shaped,
            sampling_rows(self.state.fields, drawing, drawn_stops, self._variant(drawn_rows)),
            suppressed,
        )
        self.state.advance(drawing, drawn_stops, token_ids_drawn)
        if shapes_logits:
            self.penalties.record(shaped_rows, token_ids_drawn)
        asked = self._asked(logits, token_ids_drawn, drawn_rows)
        return Pending(self.device, len(chunks), wanted.drawn, token_ids_drawn, asked, scored)

    def _table(self, request: Request) -> None:
        """Brings the request's row up to date."""
        row, known = request.row, request.num_tabled_blocks
        if known == 0:
            sampling = request.sampling
            self.state.seat(row, sampling)
            self.penalties.seat(request)
            self._variants[row] = VARIANTS.index(variant_of(sampling))
            self._num_logprobs[row] = sampling.logprobs
            self._min_lengths[row] = request.num_prompt_tokens + sampling.min_tokens
        self.state.extend(row, known, request.blocks[known:])
        request.num_tabled_blocks = len(request.blocks)

    def _variant(self, rows: Ints) -> Variant:
        variant = VARIANTS[self._variants[rows].max()]
        # one kernel for whoever draws, whatever the others ask for
        return "full" if self.deterministic and variant != "greedy" else variant

    def _suppressed(self, chunks: list[Chunk], rows: Ints, stops: Ints) -> tuple[Tensor, Tensor] | None:
        """(place, token id) of each stop id that may not be drawn yet."""
        places: list[int] = []
        token_ids: list[int] = []
        for place in np.flatnonzero(stops < self._min_lengths[rows]).tolist():
            stop_ids = chunks[place].request.stop_token_ids
            places += [place] * len(stop_ids)
            token_ids += stop_ids
        if not places:
            return None
        where, which = devices.upload(np.array((places, token_ids), np.int64), self.device)
        return where, which

    def _asked(self, logits: Tensor, token_ids: Tensor, rows: Ints) -> Asked | None:
        counts = self._num_logprobs[rows]
        places = np.flatnonzero(counts >= 0)
        if not len(places):
            return None
        index = devices.upload(places, self.device)
        # a broken row has no token; what is computed for it instead is not told
        targets, asked = token_ids[index].clamp(min=0), counts[places].tolist()
        if self.deterministic:
            found = logprobs_alone(logits[index], targets, asked)
        else:
            found = logprobs(logits[index], targets, max(asked))
        return Asked(places.tolist(), asked, found)

    def _score(self, logits: Tensor, chunk: Chunk, index: int) -> Scored:
        request = chunk.request
        token_ids = request.tokens[chunk.start + 1 : chunk.start + 1 + len(logits)]
        num_top = request.sampling.prompt_logprobs
        targets = devices.upload(np.array(token_ids, np.int64), self.device)
        if self.deterministic:
            found = logprobs_alone(logits, targets, [num_top] * len(token_ids))
        else:
            found = logprobs(logits, targets, num_top)
        return Scored(index, token_ids, num_top, found)


@dataclass(slots=True)
class Wanted:
    """Which rows of a step's logits are wanted, and for what."""

    rows: list[int] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)  # chunks that get a token
    drawn_rows: list[int] = field(default_factory=list)  # where their logits are among `rows`
    scored: list[tuple[int, int, int]] = field(default_factory=list)  # chunk, first and last + 1 of `rows`


def wanted_logits(chunks: list[Chunk]) -> Wanted:
    wanted = Wanted()
    end = 0
    for index, chunk in enumerate(chunks):
        start, end = end, end + chunk.num_tokens
        if chunk.request.scores_prompt:
            num_scored = chunk.num_tokens - chunk.is_last  # the last token's row predicts the answer
            if num_scored:
                wanted.scored.append((index, len(wanted.rows), len(wanted.rows) + num_scored))
                wanted.rows += range(start, start + num_scored)
        if chunk.draws:
            wanted.drawn.append(index)
            wanted.drawn_rows.append(len(wanted.rows))
            wanted.rows.append(end - 1)
    return wanted


def variant_of(sampling: Sampling) -> Variant:
    """The least variant that serves it; a captured greedy step shapes no logits."""
    if sampling.temperature == 0:
        return "temperature" if sampling.shapes_logits else "greedy"
    is_filtered = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    return "full" if is_filtered else "temperature"
