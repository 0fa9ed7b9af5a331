"""Streams through the whole front: characters and stops across tokens, hang-ups, and an engine that dies."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from api_rig import Server, serving
from tiny_tokenizers import byte_level

from service.front.engine_client import EngineClient

TEXT = "Assistant: 🙂🦊👍🏽 漢字語 stop here. the end"


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Each answer is TEXT, one token a step, most of its characters split over tokens."""
    ids = byte_level().encode(TEXT).ids
    env = {"FAKE_REPLY": ",".join(map(str, ids))}
    with serving(tmp_path_factory.mktemp("fixed"), env) as server:
        yield server


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Answers that go on until they are ended, a token every 2 ms."""
    env = {"FAKE_CONTEXT": str(10**9), "FAKE_STEP_MS": "2"}
    with serving(tmp_path_factory.mktemp("endless"), env) as server:
        yield server


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hello", "max_tokens": 500, **fields}


def events(response: httpx2.Response) -> Iterator[Any]:
    """The data of a stream's events; `[DONE]` as it stands."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])


def streamed(server: Server, **fields: Any) -> tuple[str, str, int]:
    """-> (text, finish reason, completion tokens) of one streamed completion."""
    text, reason, num_tokens = "", "", 0
    body = completion(stream=True, stream_options={"include_usage": True}, **fields)
    with server.http() as http, http.stream("POST", "/v1/completions", json=body) as response:
        *chunks, done = events(response)
    assert done == "[DONE]"
    for chunk in chunks:
        for choice in chunk["choices"]:
            text += choice["text"]
            reason = choice["finish_reason"] or reason
        if chunk["usage"]:
            num_tokens = chunk["usage"]["completion_tokens"]
    return text, reason, num_tokens


def whole(server: Server, **fields: Any) -> tuple[str, str, int]:
    with server.http() as http:
        body = http.post("/v1/completions", json=completion(**fields)).raise_for_status().json()
    (choice,) = body["choices"]
    return choice["text"], choice["finish_reason"], body["usage"]["completion_tokens"]


def test_the_text_survives_its_tokens(fixed: Server) -> None:
    num_tokens = len(byte_level().encode(TEXT).ids)
    assert num_tokens > len(TEXT) / 2
    assert streamed(fixed) == whole(fixed) == (TEXT, "stop", num_tokens + 1)


def test_each_token_has_its_event(fixed: Server) -> None:
    """With empty text where a character is not whole yet, so that a client can time every token."""
    num_tokens = 12
    body = completion(stream=True, max_tokens=num_tokens)
    with fixed.http() as http, http.stream("POST", "/v1/completions", json=body) as response:
        *chunks, done = events(response)
    assert done == "[DONE]"
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert len(choices) == num_tokens + 1  # the last tells the finish reason
    assert any(not choice["text"] for choice in choices[:-1])


@pytest.mark.parametrize("num_tokens", [1, 7, 15, 23])
def test_a_cut_answer_is_a_prefix(fixed: Server, num_tokens: int) -> None:
    """Where the limit falls inside a character, that character alone is replaced."""
    text, reason, counted = streamed(fixed, max_tokens=num_tokens)
    assert (reason, counted) == ("length", num_tokens)
    assert TEXT.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert whole(fixed, max_tokens=num_tokens) == (text, reason, counted)


@pytest.mark.parametrize(
    ("stop", "before"),
    [
        ("stop here", "Assistant: 🙂🦊👍🏽 漢字語 "),
        ("🦊👍", "Assistant: 🙂"),
        (["never", "字語 s", "the end"], "Assistant: 🙂🦊👍🏽 漢"),
        (": ", "Assistant"),
        ("the end of it", TEXT),
    ],
)
def test_stop_strings(fixed: Server, stop: Any, before: str) -> None:
    text, reason, num_tokens = streamed(fixed, stop=stop)
    assert (text, reason) == (before, "stop")
    assert whole(fixed, stop=stop) == (text, reason, num_tokens)
    # up to the token that completed the stop: its last piece lies in that token
    stops = [stop] if isinstance(stop, str) else stop
    ids = byte_level().encode(TEXT).ids
    pieces = [fixed.codec.piece(id) for id in ids]
    if before != TEXT:
        up_to, without_last = b"".join(pieces[:num_tokens]), b"".join(pieces[: num_tokens - 1])
        assert any(stop.encode() in up_to and stop.encode() not in without_last for stop in stops)


def test_a_stop_frees_the_slot(fixed: Server) -> None:
    streamed(fixed, stop=": ")
    assert fixed.call(lambda: fixed.host.client.num_open) == 0


def test_the_sdks_stream_helper(fixed: Server) -> None:
    with (
        openai.OpenAI(base_url=f"{fixed.url}/v1", api_key="none", _strict_response_validation=True) as client,
        client.chat.completions.stream(
            model="tiny", messages=[{"role": "user", "content": "hello"}]
        ) as stream,
    ):
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == TEXT


@pytest.mark.parametrize("fields", [{"stream": True, "n": 3}, {"n": 2}, {"prompt": ["a", "b"], "n": 2}])
def test_a_hang_up_frees_the_slots(endless: Server, fields: dict[str, Any]) -> None:
    client: EngineClient = endless.host.client
    body = completion(max_tokens=10**6, **fields)
    accepted = endless.metric("halftone_requests_accepted_total")
    aborted = endless.metric("halftone_requests_total", finish_reason="abort")
    with endless.http() as http:
        if "stream" in fields:
            with http.stream("POST", "/v1/completions", json=body) as response:
                stream = events(response)
                next(stream)
                assert client.num_open == 3
        else:
            with pytest.raises(httpx2.ReadTimeout):
                http.post("/v1/completions", json=body, timeout=0.2)
    endless.wait(client.wait_idle)
    num_answers = fields["n"] * len(fields.get("prompt", "x"))
    assert endless.metric("halftone_requests_accepted_total") == accepted + num_answers
    assert endless.metric("halftone_requests_total", finish_reason="abort") == aborted + num_answers


def test_an_engine_killed_in_mid_stream(endless: Server) -> None:
    """Each open stream ends with an error event and no [DONE]; /ready says 503, then the engine is back."""
    client: EngineClient = endless.host.client
    with endless.http() as http:
        responses = [
            http.stream("POST", path, json=body)
            for path, body in (
                ("/v1/completions", completion(stream=True, max_tokens=10**6)),
                ("/v1/completions", completion(stream=True, max_tokens=10**6, n=3)),
                (
                    "/v1/chat/completions",
                    {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True},
                ),
            )
        ]
        streams = [(opened, events(opened.__enter__())) for opened in responses]
        for _, stream in streams:
            next(stream)
        assert client.num_open == 5
        process = endless.host.supervisor.process
        assert process is not None
        endless.call(process.kill)
        for opened, stream in streams:
            *_, last = stream
            assert last["error"]["code"] == "engine_unavailable"
            assert last["error"]["type"] == "server_error"
            opened.__exit__(None, None, None)
        assert client.num_open == 0
        while (ready := http.get("/ready")).status_code != 200:
            assert ready.status_code == 503
            assert ready.json()["state"] in ("down", "starting")
            refused = http.post("/v1/completions", json=completion(max_tokens=1))
            assert refused.status_code in (503, 200)
            if refused.status_code == 503:
                assert refused.headers["retry-after"]
                assert refused.json()["error"]["code"] == "engine_unavailable"
        assert http.post("/v1/completions", json=completion(max_tokens=3)).status_code == 200
    assert endless.metric("halftone_engine_restarts_total") == 1


def test_the_sdk_raises_on_an_error_event(endless: Server) -> None:
    process = endless.host.supervisor.process
    assert process is not None
    with openai.OpenAI(base_url=f"{endless.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="tiny", prompt="x", max_tokens=10**6, stream=True)
        next(stream)
        endless.call(process.kill)
        with pytest.raises(openai.APIError, match="engine"):
            list(stream)


def test_a_full_queue_is_answered_429(tmp_path: Path) -> None:
    env = {"FAKE_CONTEXT": str(10**9), "FAKE_STEP_MS": "2"}
    with serving(tmp_path, env, max_queue_requests=2) as server, server.http() as http:
        body = completion(stream=True, max_tokens=10**6, n=2)
        with http.stream("POST", "/v1/completions", json=body) as response:
            stream = events(response)
            next(stream)
            refused = http.post("/v1/completions", json=completion())
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "overloaded"
        server.wait(server.host.client.wait_idle)
        assert http.post("/v1/completions", json=completion(max_tokens=2)).status_code == 200
        impossible = http.post("/v1/completions", json=completion(n=3))
        assert impossible.status_code == 400, "no retry would make room for three"


def test_one_failing_request_leaves_the_others(tmp_path: Path) -> None:
    with serving(tmp_path, {"FAKE_ERROR_TOKEN": "77"}) as server, server.http() as http:
        failed = http.post("/v1/completions", json=completion(prompt=[5, 77]))
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "model_error")
        assert failed.headers["x-should-retry"] == "false"
        with http.stream("POST", "/v1/completions", json=completion(prompt=[77], stream=True)) as response:
            (event,) = events(response)
            assert event["error"]["code"] == "model_error"
        mixed = http.post("/v1/completions", json=completion(prompt=[[5], [77]]))
        assert mixed.status_code == 500
        assert server.host.client.num_open == 0
        assert http.post("/v1/completions", json=completion(max_tokens=2)).status_code == 200
