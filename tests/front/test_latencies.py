"""What the engine client observes of each step, on a clock that the test holds and without an engine."""

import contextlib
import socket
from collections.abc import Iterator

import pytest
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st

from service.errors import EngineUnavailableError
from service.front import engine_client
from service.front.engine_client import EngineClient, Sink
from service.messages import EngineConfig, Output, Ready, Sampling, Step, StepStats
from service.metrics import Metrics
from service.metrics.catalogue import FIRST_TOKEN_SECONDS, TOKEN_SECONDS
from service.metrics.counts import Histogram


class Clock:
    """Stands for the module `time`."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


class Engine:
    """A client whose engine is ready, and the steps that the test makes it do."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.metrics = Metrics("demo", "auto")
        self.client = EngineClient(64, self.metrics)
        config = EngineConfig(model_path="/nowhere", precision="bf16")
        with socket.socket() as unused:
            self.client.receive(Ready(FakeEngine(unused, config, {}).info()))

    def open(self, sink: Sink = lambda output, received_at: None) -> int:
        return self.client.open([1], Sampling(10**9), b"", sink)

    def step(self, after_s: float, num_tokens: dict[int, int], ends: bool = False) -> None:
        """One Step, `after_s` behind the last, that gives each request so many tokens."""
        self.clock.now += after_s
        reason = "length" if ends else None
        outputs = [Output(id, [7] * count, reason) for id, count in num_tokens.items()]
        self.client.receive(Step(outputs, StepStats()))

    def observed(self, name: str) -> tuple[list[float], float]:
        """A histogram's buckets and sum, as they are exported."""
        found = self.metrics.counts()[0].histograms[f"halftone_{name}_seconds"][()]
        return [count for _, count in found.cumulative()], found.sum


@contextlib.contextmanager
def stepped() -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(engine_client, "time", clock)
        yield Engine(clock)


def histogram(bounds: tuple[float, ...], observations: list[float]) -> tuple[list[float], float]:
    """What these observations, one by one, would be exported as."""
    counts = Histogram(bounds)
    for seconds in observations:
        counts.observe(seconds)
    return [count for _, count in counts.cumulative()], pytest.approx(sum(observations))


def test_several_tokens_in_one_step_share_the_time_since_the_last() -> None:
    with stepped() as engine:
        id = engine.open()
        engine.step(0.5, {id: 1})
        engine.step(1.0, {id: 4})
        engine.step(0.125, {id: 1}, ends=True)
        assert engine.observed("time_to_first_token") == histogram(FIRST_TOKEN_SECONDS, [0.5])
        assert engine.observed("inter_token_latency") == histogram(TOKEN_SECONDS, [0.25] * 4 + [0.125])
        assert engine.observed("time_per_output_token") == histogram(TOKEN_SECONDS, [1.125 / 5])


def test_streams_with_different_last_steps_are_observed_apart() -> None:
    """`slow` sat the second step out, between two that did not."""
    with stepped() as engine:
        first, slow, last = engine.open(), engine.open(), engine.open()
        engine.step(0.5, {first: 1, slow: 1, last: 1})
        engine.step(0.25, {first: 1, last: 1})
        engine.step(0.5, {first: 1, slow: 1, last: 1})
        latencies = [0.25, 0.25, 0.5, 0.75, 0.5]
        assert engine.observed("inter_token_latency") == histogram(TOKEN_SECONDS, latencies)


times = st.integers(1, 200).map(lambda ticks: ticks / 128)


@given(st.lists(st.tuples(times, st.lists(st.integers(0, 3), min_size=5, max_size=5)), max_size=12))
def test_any_steps_are_observed_token_by_token(steps: list[tuple[float, list[int]]]) -> None:
    """Against the definition: each token after a request's first Output, one at a time."""
    with stepped() as engine:
        ids = [engine.open() for _ in range(5)]
        first_s: list[float] = []
        between_s: list[float] = []
        opened_at = engine.clock.now
        last_at: dict[int, float] = {}
        for after_s, counts in steps:
            engine.step(after_s, dict(zip(ids, counts, strict=True)))
            now = engine.clock.now
            for id, count in zip(ids, counts, strict=True):
                if count and id in last_at:
                    between_s += [(now - last_at[id]) / count] * count
                elif count:
                    first_s.append(now - opened_at)
                if count:
                    last_at[id] = now
        assert engine.observed("time_to_first_token") == histogram(FIRST_TOKEN_SECONDS, first_s)
        assert engine.observed("inter_token_latency") == histogram(TOKEN_SECONDS, between_s)


def test_the_state_is_down_before_any_stream_hears_of_it() -> None:
    """A sink that tries again at once must be told to wait, not be promised a dead engine."""
    with stepped() as engine:
        heard: list[tuple[str, str, int]] = []

        def sink(output: Output, received_at: float) -> None:
            heard.append((output.error, engine.client.state, engine.client.num_open))
            with pytest.raises(EngineUnavailableError, match="is being started again"):
                engine.open()

        engine.open(sink)
        engine.open(sink)
        engine.client.disconnect()
        assert heard == [("engine died", "down", 0)] * 2
