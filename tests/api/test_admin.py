"""/admin over HTTP: who may, what is streamed, and what other clients see meanwhile."""

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest
from api_rig import Server, serving

ADMIN = {"authorization": "Bearer root"}
CLIENT = {"authorization": "Bearer client"}
COMPLETION = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 5, "temperature": 0}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    env = {"FAKE_STEP_MS": "5", "FAKE_CONTEXT": "100000"}
    with serving(tmp_path, env, api_key="client", admin_key="root") as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx2.Client]:
    with server.http() as client:
        yield client


def swap(http: httpx2.Client, precision: str, **fields: Any) -> list[dict[str, Any]]:
    response = http.post("/admin/precision", json={"precision": precision, **fields}, headers=ADMIN)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [orjson.loads(line) for line in response.text.splitlines()]


def complete(http: httpx2.Client, **fields: Any) -> httpx2.Response:
    return http.post("/v1/completions", json=COMPLETION | fields, headers=CLIENT)


def test_a_swap_from_request_to_every_place_that_tells_the_precision(http: httpx2.Client) -> None:
    before = complete(http).json()
    events = swap(http, "nf4")
    assert [event["stage"] for event in events] == ["drain", "stop", "import", "load", "done"]
    assert (events[-1]["outcome"], events[-1]["precision"]) == ("swapped", "nf4")
    assert http.get("/ready").json() == {"state": "ready", "precision": "nf4", "loading": None}
    assert http.get("/version", headers=CLIENT).json()["engine"]["precision"] == "nf4"
    (card,) = http.get("/v1/models", headers=CLIENT).json()["data"]
    assert (card["id"], card["precision"]) == ("tiny", "nf4")
    metrics = http.get("/metrics", headers=CLIENT).text
    assert 'halftone_engine_up{model="tiny",precision="nf4"} 1.0' in metrics
    assert 'halftone_engine_up{model="tiny",precision="bf16"}' not in metrics, (
        "nobody misses what was swapped"
    )
    assert 'swaps_total{model="tiny",precision="nf4",outcome="swapped"} 1.0' in metrics
    after = complete(http).json()
    assert after["system_fingerprint"].endswith("-nf4")
    assert swap(http, "bf16")[-1]["outcome"] == "swapped"
    assert complete(http).json()["choices"] == before["choices"]


def test_a_precision_that_was_named_is_a_promise(http: httpx2.Client) -> None:
    assert complete(http, model="tiny@bf16").json()["model"] == "tiny@bf16"
    swap(http, "nf4")
    refused = complete(http, model="tiny@bf16")
    assert refused.status_code == 404
    assert "`tiny@bf16` is not served here; served is `tiny`" in refused.json()["error"]["message"]
    assert complete(http, model="tiny@nf4").status_code == 200
    assert complete(http, model="tiny").status_code == 200


def test_admin_is_off_without_a_key_of_its_own(tmp_path: Path) -> None:
    with serving(tmp_path, {}) as server, server.http() as http:
        refused = http.post("/admin/precision", json={"precision": "nf4"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_off")
        assert "--admin-key" in refused.json()["error"]["message"]


@pytest.mark.parametrize("headers", [{}, CLIENT, {"x-api-key": "client"}, {"authorization": "root"}])
def test_a_clients_key_opens_nothing_here(http: httpx2.Client, headers: dict[str, str]) -> None:
    refused = http.post("/admin/precision", json={"precision": "nf4"}, headers=headers)
    assert refused.status_code == 401
    assert http.get("/v1/models", headers=ADMIN).status_code == 401, "nor an admin's the API"


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({"precision": "nf5"}, "invalid_precision", "accepted are auto, fp32, bf16, fp16, int8, nf4"),
        ({"precision": ""}, "string_below_min_length", "`precision`"),
        ({}, "missing_required_parameter", "`precision` is required"),
        ({"precision": "nf4", "force": True}, "unknown_parameter", "`force`"),
        ({"precision": "nf4", "drain_timeout_s": -1}, "integer_below_min_value", "`drain_timeout_s`"),
    ],
)
def test_what_is_wrong_is_named(http: httpx2.Client, body: dict[str, Any], code: str, words: str) -> None:
    refused = http.post("/admin/precision", json=body, headers=ADMIN)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == code
    assert words in refused.json()["error"]["message"]


def test_requests_during_a_swap_get_an_answer_or_the_time_to_come_back(
    server: Server, http: httpx2.Client
) -> None:
    """A stream keeps the swap waiting; four requests wait with it, and the rest of the line is told when."""
    wanted = complete(http).json()["choices"]
    server.call(lambda: setattr(server.host.client.engine_state, "max_held_requests", 4))
    endless = COMPLETION | {"stream": True, "max_tokens": 90000, "ignore_eos": True}
    with ThreadPoolExecutor(24) as pool:
        with http.stream("POST", "/v1/completions", headers=CLIENT, json=endless) as stream:
            chunks = stream.iter_lines()
            next(chunks)
            swapped = pool.submit(swap, http, "nf4")
            server.wait(lambda: server.host.client.wait_for("swapping"))
            assert http.get("/ready").status_code == 503
            assert http.get("/health").status_code == 200
            second = http.post("/admin/precision", json={"precision": "int8"}, headers=ADMIN)
            assert (second.status_code, second.json()["error"]["code"]) == (409, "swap_in_progress")
            answers = [pool.submit(complete, http) for _ in range(20)]
            refused = [answer.result() for answer in itertools.islice(as_completed(answers), 16)]
            next(chunks)
        for response in refused:
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "engine_unavailable"
            assert int(response.headers["retry-after"]) >= 1
        assert swapped.result()[-1]["outcome"] == "swapped"
        waited = [response for answer in answers if (response := answer.result()).status_code == 200]
    assert [response.json()["choices"] for response in waited] == [wanted] * 4


def test_a_swap_goes_on_when_who_asked_has_hung_up(server: Server, http: httpx2.Client) -> None:
    with http.stream(
        "POST", "/admin/precision", json={"precision": "nf4"}, headers=ADMIN, timeout=30
    ) as response:
        next(response.iter_lines())
    server.wait(lambda: server.host.client.wait_for("ready"))
    assert complete(http, model="tiny@nf4").status_code == 200


def test_no_thread_is_left(server: Server, http: httpx2.Client) -> None:
    before = threading.active_count()
    swap(http, "nf4")
    assert threading.active_count() == before


def test_two_precisions_in_one_server(tmp_path: Path) -> None:
    with serving(tmp_path, {}, admin_key="root", resident="bf16,nf4") as server, server.http() as http:
        cards = http.get("/v1/models").json()["data"]
        assert [(card["id"], card["precision"]) for card in cards] == [
            ("tiny@bf16", "bf16"),
            ("tiny@nf4", "nf4"),
        ]
        for name, precision in (("tiny", "bf16"), ("tiny@bf16", "bf16"), ("tiny@nf4", "nf4")):
            answer = http.post("/v1/completions", json=COMPLETION | {"model": name}).json()
            assert answer["model"] == name
            assert answer["system_fingerprint"].endswith(f"-{precision}")
        assert http.get("/v1/models/tiny@nf4").json()["precision"] == "nf4"
        assert http.get("/v1/models/tiny@int8").status_code == 404
        version = http.get("/version").json()
        assert version["engine"]["precision"] == "bf16"
        told = [(account["model"], account["engine"]["precision"]) for account in version["residents"]]
        assert told == [("tiny@bf16", "bf16"), ("tiny@nf4", "nf4")]
        page = http.get("/metrics").text
        for precision, accepted in (("bf16", 2.0), ("nf4", 1.0)):
            labels = f'model="tiny",precision="{precision}"'
            assert f"halftone_requests_accepted_total{{{labels}}} {accepted}" in page
            assert f'{{{labels},endpoint="/v1/completions",status="200",le="+Inf"}} {accepted:.0f}' in page
        refused = http.post("/admin/precision", json={"precision": "int8"}, headers=ADMIN)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "several_residents")
        assert "tiny@bf16, tiny@nf4" in refused.json()["error"]["message"]
