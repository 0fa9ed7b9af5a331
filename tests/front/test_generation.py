"""A client request's life over a scripted engine: counts, ends and aborts."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import EngineUnavailableError, HalftoneError
from service.front.engine_client import Sink
from service.front.generation import Answer, Delta, Generation, Plan
from service.messages import ENGINE_DIED, FinishReason, Output, Sampling, TokenLogprobs
from service.metrics import Metrics
from tests.metric_samples import sample

PIECES = [bytes([byte]) for byte in range(256)] + ["🙂".encode(), b""]
END = 257  # a stop token: no text


@dataclass
class ScriptedClient:
    """The part of EngineClient that a generation uses."""

    sinks: dict[int, Sink] = field(default_factory=dict)
    samplings: list[Sampling] = field(default_factory=list)
    aborted: dict[int, FinishReason] = field(default_factory=dict)

    def admit(self, num_requests: int) -> None:
        pass

    def open(
        self, prompt: list[int], sampling: Sampling, salt: bytes, sink: Sink, *, arrived_at: float
    ) -> int:
        self.samplings.append(sampling)
        self.sinks[len(self.sinks)] = sink
        return len(self.sinks) - 1

    def abort(self, id: int, finish_reason: FinishReason = "abort") -> None:
        assert id not in self.aborted
        self.aborted[id] = finish_reason
        self.sinks.pop(id, None)

    def send(self, id: int, ids: list[int], reason: FinishReason | None = None, error: str = "") -> None:
        rows = [TokenLogprobs(token, -0.5, 1, [], []) for token in ids]
        self.sinks[id](Output(id, ids, reason, logprobs=rows, error=error), 0.0)


@dataclass
class Run:
    """A started generation and what it reported."""

    client: ScriptedClient
    generation: Generation
    deltas: list[tuple[int, Delta]]
    ends: list[HalftoneError | None]
    metrics: Metrics

    def text(self, index: int = 0) -> str:
        return "".join(delta.text for which, delta in self.deltas if which == index)

    def token_ids(self, index: int = 0) -> list[int]:
        return [id for which, delta in self.deltas if which == index for id in delta.token_ids]

    def discarded(self) -> float:
        value = sample(self.metrics, "halftone_tokens_total", kind="discarded")
        assert value is not None
        return value


def start(num_answers: int = 1, stops: tuple[str, ...] = (), prompts: tuple[int, ...] = (3,)) -> Run:
    client, metrics = ScriptedClient(), Metrics("m", "p")
    deltas: list[tuple[int, Delta]] = []
    ends: list[HalftoneError | None] = []

    def on_delta(answer: Answer, delta: Delta) -> None:
        assert not ends, "a delta after the end"
        deltas.append((answer.index, delta))

    plan = Plan([[1] * length for length in prompts], num_answers, Sampling(99), stops, b"", 0.0)
    generation = Generation(plan, client, PIECES, metrics, on_delta, ends.append)  # type: ignore[arg-type]
    generation.start()
    return Run(client, generation, deltas, ends, metrics)


def test_answers_are_numbered_by_prompt_then_sample() -> None:
    run = start(num_answers=2, prompts=(3, 4))
    assert [sampling.sample_index for sampling in run.client.samplings] == [0, 1, 0, 1]
    for id, letter in enumerate(b"abcd"):
        run.client.send(id, [letter], "length")
    assert [run.text(index) for index in range(4)] == ["a", "b", "c", "d"]
    assert run.ends == [None]
    assert run.generation.num_prompt_tokens == 7
    assert run.generation.num_completion_tokens == 4


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_the_engines_end(reason: FinishReason) -> None:
    run = start()
    run.client.send(0, [*b"ab"])
    run.client.send(0, [END if reason == "stop" else ord("c")], reason)
    assert run.text() == ("ab" if reason == "stop" else "abc")
    assert run.generation.num_completion_tokens == 3
    assert run.generation.answers[0].finish_reason == reason
    assert run.ends == [None]
    assert not run.client.aborted


def test_a_stop_token_with_a_spelling_is_no_text() -> None:
    run = start()
    run.client.send(0, [*b"ab"], "stop")
    assert run.text() == "a"
    assert run.token_ids() == [*b"ab"]
    assert run.generation.num_completion_tokens == 2


def test_a_stop_string_ends_the_answer_and_frees_the_slot() -> None:
    run = start(stops=("STOP",))
    for letter in b"ab STO":
        run.client.send(0, [letter])
    assert run.text() == "ab "
    run.client.send(0, [*b"P and more"])
    assert run.text() == "ab "
    assert run.client.aborted == {0: "stop"}
    assert run.generation.num_completion_tokens == 7
    assert len(run.token_ids()) == 7
    assert run.discarded() == 9
    assert run.ends == [None]


def test_a_stop_string_in_the_last_step_needs_no_abort() -> None:
    run = start(stops=("b",))
    run.client.send(0, [*b"abc"], "length")
    assert (run.text(), run.generation.answers[0].finish_reason) == ("a", "stop")
    assert run.generation.num_completion_tokens == 2
    assert not run.client.aborted
    assert run.ends == [None]


def test_what_was_held_back_comes_with_the_end() -> None:
    run = start(stops=("abcd",))
    run.client.send(0, [*b"xabc"])
    assert run.text() == "x"
    run.client.send(0, [END], "stop")
    assert run.text() == "xabc"


def test_half_a_character_at_the_end_is_replaced() -> None:
    run = start()
    run.client.send(0, [*"🙂".encode()[:3]], "length")
    assert run.text() == "\ufffd"


def test_log_probabilities_end_where_the_tokens_do() -> None:
    run = start(stops=("b",))
    run.client.send(0, [*b"abc"])
    (_, delta) = run.deltas[0]
    assert delta.logprobs is not None
    assert [row.token_id for row in delta.logprobs] == delta.token_ids == [*b"ab"]


@pytest.mark.parametrize(
    ("reason", "error", "kind"),
    [
        ("error", "model error", HalftoneError),
        ("error", ENGINE_DIED, EngineUnavailableError),
        ("abort", "", EngineUnavailableError),
    ],
)
def test_one_failed_answer_ends_the_request_once(
    reason: FinishReason, error: str, kind: type[HalftoneError]
) -> None:
    run = start(num_answers=3)
    run.client.send(0, [*b"a"])
    run.client.send(2, [*b"c"], "length")
    run.client.send(1, [], reason, error)
    assert [type(end) for end in run.ends] == [kind]
    assert run.client.aborted == {0: "abort"}


def test_a_dying_engine_ends_every_answer_with_one_error() -> None:
    """The client calls every sink; the first already ended the request."""
    run = start(num_answers=3)
    for sink in list(run.client.sinks.values()):
        sink(Output(0, [], "error", error=ENGINE_DIED), 0.0)
    assert len(run.ends) == 1


def test_cancel_frees_every_open_slot_and_reports_nothing() -> None:
    run = start(num_answers=3)
    run.client.send(1, [*b"b"], "length")
    run.generation.cancel()
    run.generation.cancel()
    assert run.client.aborted == {0: "abort", 2: "abort"}
    assert run.ends == []


@given(
    text=st.text("ab🙂", max_size=12),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    stops=st.lists(st.text("ab🙂", min_size=1, max_size=3), max_size=2),
)
def test_usage_counts_up_to_the_token_that_completed_the_stop(
    text: str, cuts: list[int], stops: list[str]
) -> None:
    """Whatever a step holds: every token is used or discarded, and the text is that of the tokens used."""
    run = start(stops=tuple(stops))
    ids = [*text.encode()]
    steps: list[list[int]] = []
    while ids:
        size = cuts[len(steps) % len(cuts)]
        steps.append(ids[:size])
        ids = ids[size:]
    sent = 0
    for step in steps:
        if 0 in run.client.aborted:
            break
        run.client.send(0, step)
        sent += len(step)
    if 0 not in run.client.aborted:
        run.client.send(0, [END], "stop")
        sent += 1
    used = run.generation.num_completion_tokens
    assert used + run.discarded() == sent
    completed = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    expected = len(text[: completed[0]].encode()) if completed else len(text.encode()) + 1
    assert used == expected
    assert run.ends == [None]
