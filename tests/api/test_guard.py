"""Keys, request ids and deadlines: what is settled before a route is reached."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from api_rig import Server, serving

from service.api import guard
from service.api.guard import Guard
from service.metrics import Metrics

KEYS = "first-key,zweiter-schlüssel"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("locked"), {}, api_key=KEYS, admin_key="root") as server:
        yield server


def test_every_route_but_the_probes_needs_a_key(locked: Server) -> None:
    with locked.http() as http:
        document = http.get("/openapi.json", headers={"authorization": "Bearer first-key"}).json()
        paths = [*document["paths"], "/openapi.json", "/docs", "/compare", "/nothing", "/health/", "/READY"]
        assert {"/v1/completions", "/metrics", "/version"} < set(paths)
        open_paths = set()
        for path in paths:
            for method in ("GET", "POST", "HEAD", "OPTIONS"):
                response = http.request(method, path.replace("{name}", "tiny"))
                if response.status_code == 401:
                    assert response.headers["www-authenticate"] == "Bearer"
                else:
                    open_paths.add(path)
        assert open_paths == {"/health", "/ready", "/compare"}


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first-key"},
        {"authorization": "bearer first-key"},
        {"x-api-key": "first-key"},
        {"authorization": "Bearer zweiter-schlüssel".encode()},
    ],
)
def test_keys_that_open(locked: Server, headers: Any) -> None:
    with locked.http() as http:
        assert http.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "Bearer")],
        [("authorization", "Bearer first-ke")],
        [("authorization", "Bearer first-key,")],
        [("authorization", f"Bearer {KEYS}".encode())],
        [("authorization", "first-key")],
        [("authorization", "Basic first-key")],
        [("authorization", b"Bearer \xff\xfe")],
        [("authorization", "Bearer first-key"), ("authorization", "Bearer first-key")],
        [("authorization", "Bearer first-key"), ("x-api-key", "first-key")],
        [("x-api-key", "")],
    ],
)
def test_keys_that_do_not(locked: Server, headers: Any) -> None:
    with locked.http() as http:
        response = http.get("/v1/models", headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_two_keys_share_no_prefix_blocks(locked: Server) -> None:
    """The engine shares blocks under one salt alone, and each key has its own."""
    seen = []
    client = locked.host.client
    original = client.open

    def spy(prompt: Any, sampling: Any, salt: bytes, *args: Any, **options: Any) -> int:
        seen.append(salt)
        return original(prompt, sampling, salt, *args, **options)

    client.open = spy  # type: ignore[method-assign]
    try:
        with locked.http() as http:
            for key in ("first-key", "zweiter-schlüssel", "first-key"):
                http.post(
                    "/v1/completions",
                    json={"model": "tiny", "prompt": "x", "max_tokens": 1},
                    headers={"authorization": f"Bearer {key}".encode()},
                ).raise_for_status()
    finally:
        client.open = original  # type: ignore[method-assign]
    assert seen[0] == seen[2] != seen[1]
    assert all(len(salt) == 32 for salt in seen)


def test_a_key_serves_any_host_name(locked: Server) -> None:
    with locked.http() as http:
        assert http.get("/health", headers={"host": "service.example"}).status_code == 200


def test_request_ids(http: httpx2.Client) -> None:
    assert http.get("/health", headers={"x-request-id": "job-7.a"}).headers["x-request-id"] == "job-7.a"
    made = http.get("/health", headers={"x-request-id": "no spaces\tplease"}).headers["x-request-id"]
    assert len(made) == 32
    assert http.get("/health").headers["x-request-id"] != made


def test_responses_are_not_stored(http: httpx2.Client) -> None:
    for path in ("/v1/models", "/version", "/ready", "/nothing"):
        assert http.get(path).headers["cache-control"] == "no-store"
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1, "stream": True}
    headers = http.post("/v1/completions", json=body).headers
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-store", "no")
    assert headers["content-type"].startswith("text/event-stream")


def test_durations_are_counted_by_route(server: Server, http: httpx2.Client) -> None:
    name = "halftone_request_duration_seconds_count"
    before = server.metric(name, endpoint="/v1/completions", status="200")
    unknown = server.metric(name, endpoint="other", status="404")
    http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1})
    http.get("/a/path/of/the/client")
    assert server.metric(name, endpoint="/v1/completions", status="200") == before + 1
    assert server.metric(name, endpoint="other", status="404") == unknown + 1


# --- the guard alone, over a scripted connection


def call(messages: list[Any]) -> list[dict[str, Any]]:
    """One POST whose body comes as `messages`; an endless wait where they end -> what was sent back."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": repr(scope["halftone"].body).encode()})

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        return await asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/post",
        "raw_path": b"/post",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json; charset=utf-8")],
    }
    made = Guard(
        app,
        Metrics("m", "p"),
        paths=["/post"],
        json_paths=["/post"],
        api_keys=[],
        admin_keys=[],
        max_body_bytes=100_000,
        loopback_only=True,
    )
    asyncio.run(made(scope, receive, send))
    return sent


def part(body: bytes, more_body: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more_body}


def test_a_body_in_pieces() -> None:
    sent = call([part(b'{"a"'), part(b""), part(b": 1}", more_body=False)])
    assert sent[1]["body"] == b"{'a': 1}"


def test_a_slow_body_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_TIMEOUT_S", 0.01)
    sent = call([part(b'{"a"')])
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]


def test_a_body_in_too_many_pieces_is_ended() -> None:
    sent = call([part(b" ")] * 10_001)
    assert (sent[0]["status"], b"too_many_chunks" in sent[1]["body"]) == (400, True)


def test_a_body_beyond_the_limit_is_ended_while_it_comes() -> None:
    sent = call([part(b" " * 60_000)] * 2)
    assert sent[0]["status"] == 413


def test_a_client_that_hangs_up_is_not_answered() -> None:
    assert call([part(b"{"), {"type": "http.disconnect"}]) == []
