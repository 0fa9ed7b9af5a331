"""Requests over the socket: what goes in comes out once, in order, and ends once."""

import asyncio
import socket

import pytest
from engine_rig import ENDLESS, Stream, running
from fake_engine import FakeEngine, reply
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import EngineUnavailableError, HalftoneError, OverloadedError
from service.front.connection import EngineConnection
from service.front.engine_client import EngineClient
from service.messages import (
    HEADER,
    MAX_FRAME_BYTES,
    MODEL_ERROR,
    EngineConfig,
    EngineMessage,
    Evaluated,
    Loading,
    Output,
    Sampling,
    Step,
    StepStats,
    frame,
)
from service.metrics import Metrics
from tests.metric_samples import sample

pytestmark = pytest.mark.anyio


async def test_each_stream_gets_its_own_tokens() -> None:
    async with running() as rig:
        streams = [rig.open([7, number], max_tokens=1 + number % 9) for number in range(64)]
        assert len({id for id, _ in streams}) == 64
        for number, (_, stream) in enumerate(streams):
            await stream.ended.wait()
            assert stream.token_ids == reply([7, number], 1 + number % 9)
            assert stream.finish_reason == "length"
        assert rig.client.num_open == 0


async def test_the_answers_of_one_turn_share_their_steps() -> None:
    """64 requests opened together leave in one write, so the engine starts them in one step."""
    async with running() as rig:
        arrivals: list[float] = []
        ended = [asyncio.Event() for _ in range(64)]

        def open_one(end: asyncio.Event) -> None:
            def sink(output: Output, received_at: float) -> None:
                arrivals.append(received_at)
                end.set()

            rig.client.open([1], Sampling(1), b"", sink)

        for end in ended:
            open_one(end)
        await asyncio.gather(*(end.wait() for end in ended))
        assert len(set(arrivals)) == 1


async def test_nothing_follows_an_abort() -> None:
    async with running() as rig:
        id, stream = rig.open([1])
        _, other = rig.open([2], max_tokens=50)
        await stream.started.wait()
        rig.client.abort(id)
        num_outputs = len(stream.outputs)
        rig.client.abort(id)  # a second time changes nothing
        await other.ended.wait()
        assert len(stream.outputs) == num_outputs
        assert rig.client.num_open == 0
        assert sample(rig.metrics, "halftone_requests_total", finish_reason="abort") == 1
        assert sample(rig.metrics, "halftone_requests_accepted_total") == 2


async def test_a_sink_may_abort_its_own_request() -> None:
    """A stop string is found while a step is handed out."""
    async with running() as rig:
        stopped = asyncio.Event()

        def sink(output: Output, received_at: float) -> None:
            assert not stopped.is_set()
            rig.client.abort(id, "stop")
            stopped.set()

        id = rig.client.open([1], Sampling(ENDLESS), b"", sink)
        await stopped.wait()
        _, other = rig.open([2], max_tokens=20)
        await other.ended.wait()
        assert sample(rig.metrics, "halftone_requests_total", finish_reason="stop") == 1


async def test_one_more_than_the_queue_holds_is_refused() -> None:
    async with running(max_queue_requests=2) as rig:
        with pytest.raises(OverloadedError, match="0 of at most 2"):
            rig.client.admit(3)
        first, _ = rig.open([1])
        rig.open([2])
        with pytest.raises(OverloadedError, match="2 of at most 2"):
            rig.open([3])
        rig.client.abort(first)
        rig.open([3])
        assert sample(rig.metrics, "halftone_requests_rejected_total", reason="overloaded") == 2


async def test_an_engine_may_be_ready_before_connect_returns() -> None:
    """Its messages lie in the socket already: a later `starting` must not hide them."""
    client = EngineClient(1, Metrics("demo", "auto"))
    front, engine = socket.socketpair()
    with engine:
        FakeEngine(engine, EngineConfig(model_path="/nowhere", precision="bf16"), {}).load()
        await client.connect(front)
        async with asyncio.timeout(10):
            await client.wait_ready()
        client.open([1], Sampling(1), b"", Stream())
        client.disconnect()


async def test_no_engine_no_request() -> None:
    client = EngineClient(1, Metrics("demo", "auto"))
    with pytest.raises(EngineUnavailableError, match="is loading"):
        client.open([1], Sampling(1), b"", Stream())
    with pytest.raises(EngineUnavailableError, match="is loading"):
        await client.evaluate([[1, 2]], ["prefill"])


async def test_only_the_guilty_request_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ERROR_TOKEN", "666")
    async with running() as rig:
        _, guilty = rig.open([1, 666])
        _, innocent = rig.open([1, 2], max_tokens=5)
        await guilty.ended.wait()
        await innocent.ended.wait()
        assert guilty.outputs == [Output(guilty.outputs[0].id, [], "error", error=MODEL_ERROR)]
        assert innocent.token_ids == reply([1, 2], 5)


async def test_a_sink_that_raises_ends_its_own_request_only(caplog: pytest.LogCaptureFixture) -> None:
    outputs: list[Output] = []

    def broken(output: Output, received_at: float) -> None:
        outputs.append(output)
        raise RuntimeError("planted")

    async with running() as rig:
        rig.client.open([1], Sampling(ENDLESS), b"", broken)
        _, stream = rig.open([2], max_tokens=5)
        await stream.ended.wait()
        assert rig.client.num_open == 0
        assert "planted" in caplog.text
        assert [output.error for output in outputs] == ["", "internal error"]
        assert sample(rig.metrics, "halftone_requests_total", finish_reason="error") == 1


async def test_fixed_replies_end_with_the_end_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_REPLY", "11,12,13")
    async with running() as rig:
        _, stream = rig.open([1])
        await stream.ended.wait()
        assert stream.token_ids == [11, 12, 13, 2]
        assert stream.finish_reason == "stop"


async def test_evaluate_tells_its_progress() -> None:
    seen: list[Evaluated] = []
    async with running() as rig:
        answer = await rig.client.evaluate(
            [[1, 2, 3], [4, 5, 6]], ["prefill", "decode1"], reference="bf16", progress=seen.append
        )
    assert [message.done for message in seen] == [1, 2, 3, 4]
    assert answer is seen[-1]
    assert answer.tokens == {"prefill": 4, "decode1": 4}
    assert answer.kl_mean > 0


async def test_an_evaluation_that_fails_says_why() -> None:
    async with running() as rig:
        asked = asyncio.create_task(rig.client.evaluate([[1, 2]] * 1000, ["prefill"]))
        await asyncio.sleep(0)
        rig.client.receive(Evaluated(1, 0, 1, {}, {}, error="no memory for the reference"))
        with pytest.raises(HalftoneError, match="no memory for the reference"):
            await asked


messages = st.lists(
    st.one_of(
        st.builds(Loading, st.text(max_size=9), st.integers(0, 9), st.integers(0, 9), st.just("bytes")),
        st.builds(
            Step,
            st.lists(st.builds(Output, st.integers(0, 9), st.lists(st.integers(0, 99999))), max_size=9),
            st.builds(StepStats),
        ),
    )
)


@settings(max_examples=40)
@given(messages, st.data())
def test_messages_survive_any_cut(sent: list[EngineMessage], data: st.DataObject) -> None:
    stream = b"".join(frame(message) for message in sent)
    pieces = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        pieces.append(stream[:size])
        stream = stream[size:]
    received: list[EngineMessage] = []
    connection = EngineConnection(received.append)
    for piece in pieces:
        connection.data_received(piece)
    assert received == sent


@pytest.mark.parametrize(
    "rubbish",
    [HEADER.pack(MAX_FRAME_BYTES + 1), HEADER.pack(3) + b"\xc1\xc1\xc1", HEADER.pack(1) + b"\x90"],
    ids=["too long", "not msgpack", "not a message"],
)
async def test_what_cannot_be_read_ends_the_connection(rubbish: bytes) -> None:
    front, engine = socket.socketpair()
    received: list[EngineMessage] = []
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_unix_connection(lambda: EngineConnection(received.append), sock=front)
    with engine:
        engine.sendall(frame(Loading("load", 0, 1, "bytes")) + rubbish)
        async with asyncio.timeout(10):
            await connection.closed
    assert received == [Loading("load", 0, 1, "bytes")]
