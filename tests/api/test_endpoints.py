"""What the server says of itself, and text to ids and back over HTTP."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from api_rig import Server, serving
from prometheus_client.parser import text_string_to_metric_families

from service import __version__
from service.api.admission import check_counts
from service.config import Settings
from service.errors import CheckpointError, RequestError


def test_the_front_never_imports_torch() -> None:
    """It would cost seconds of start and hundreds of megabytes, twice."""
    code = (
        "import sys, service.api.app, service.front.host\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'jinja2') if name in sys.modules])"
    )
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['jinja2']", done.stderr


def test_health_and_ready(http: httpx2.Client) -> None:
    assert http.get("/health").json() == {"status": "alive"}
    ready = http.get("/ready")
    assert (ready.status_code, ready.json()) == (
        200,
        {"state": "ready", "precision": "bf16", "loading": None},
    )


def test_version_is_the_engines_account(server: Server, http: httpx2.Client) -> None:
    body = http.get("/version").json()
    assert (body["version"], body["model"], body["state"]) == (__version__, "tiny", "ready")
    assert body["engine"]["model_path"] == str(server.folder)
    assert body["engine"]["precision"] == "bf16"
    assert body["engine"]["weight_bytes"] == 268_000_000
    assert body["engine"]["kernels"]["attention"] == "fake_attention"


def test_an_8_bit_cache_is_told(tmp_path: Path) -> None:
    """By /version, /metrics, and every answer: its logits are others."""
    with serving(tmp_path, {}, kv_dtype="int8") as server, server.http() as http:
        assert http.get("/version").json()["engine"]["kv_dtype"] == "int8"
        answer = http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1}).json()
        assert answer["system_fingerprint"] == f"halftone-{__version__}-bf16-kv-int8"
        assert 'kv_dtype="int8"' in http.get("/metrics").text


def test_metrics_on_the_apis_port(http: httpx2.Client) -> None:
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = {family.name for family in text_string_to_metric_families(response.text)}
    assert "halftone_time_to_first_token_seconds" in names


def test_metrics_on_a_port_of_their_own(tmp_path: Path) -> None:
    with serving(tmp_path, {}, metrics_port=free_port()) as server:
        with server.http() as http:
            assert http.get("/metrics").status_code == 404
        assert httpx2.get(f"{server.host.metrics_url}/metrics", verify=False).status_code == 200


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_while_the_engine_loads(tmp_path: Path) -> None:
    """Probes and text work; what needs the engine is told when to come back."""
    with serving(tmp_path, {"FAKE_HANG_AT_LOAD": "1"}, wait_ready=False) as server, server.http() as http:
        assert http.get("/health").status_code == 200
        while (ready := http.get("/ready")).json()["loading"] is None:
            pass
        assert ready.status_code == 503
        assert ready.json() == {
            "state": "starting",
            "precision": "auto",
            "loading": {"stage": "import", "done": 1, "total": 1, "unit": "layers"},
        }
        told = {
            family.name: [(sample.labels["stage"], sample.labels["unit"], sample.value)]
            for family in text_string_to_metric_families(http.get("/metrics").text)
            for sample in family.samples
            if family.name.startswith("halftone_loading")
        }
        at = [("import", "layers", 1.0)]
        assert told == {"halftone_loading_done": at, "halftone_loading_expected": at}
        assert http.get("/version").json()["engine"] is None
        assert http.post("/tokenize", json={"prompt": "x"}).json()["max_model_len"] is None
        refused = http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "stream": True})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        assert refused.json()["error"]["code"] == "engine_unavailable"
        wrong = http.post("/v1/completions", json={"model": "tiny", "prompt": ""})
        assert wrong.status_code == 400, "a retry would not mend it"


def test_an_engine_that_stays_down_is_a_server_to_restart(tmp_path: Path) -> None:
    """`/health` said alive for ever, and whoever watches it restarted nothing."""
    env = {"FAKE_FATAL": "invalid_checkpoint:ends early"}
    with serving(tmp_path, env, wait_ready=False) as server, server.http() as http:
        with pytest.raises(CheckpointError):
            server.wait(server.host.ready)
        health, ready = http.get("/health"), http.get("/ready")
        assert (health.status_code, health.json()) == (503, {"status": "failed", "error": "ends early"})
        assert (ready.status_code, ready.json()["state"]) == (503, "failed")


def test_tokenize_and_back(server: Server, http: httpx2.Client) -> None:
    text = "größe <|im_end|> 🦊"
    got = http.post("/tokenize", json={"model": "tiny", "prompt": text}).json()
    assert got == {"tokens": server.codec.encode(text), "count": len(got["tokens"]), "max_model_len": 2048}
    assert http.post("/detokenize", json={"tokens": got["tokens"]}).json() == {"prompt": text}
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    messages = [{"role": "user", "content": text}]
    got = http.post("/tokenize", json={"messages": messages}).json()
    assert got["tokens"] == server.codec.encode_chat(messages)


def test_long_texts_are_tokenized_whole(server: Server, http: httpx2.Client) -> None:
    """Beside the event loop, from 32 KiB on."""
    text = "the quick brown fox " * 5000
    got = http.post("/tokenize", json={"prompt": text}).json()
    assert got["tokens"] == server.codec.encode(text)


def test_a_long_list_of_prompts_is_scored_in_one_request(server: Server, http: httpx2.Client) -> None:
    """As scoring clients send it: one answer to each prompt, in their order, none of them generated."""
    prompts = [[5 + number, 6, 7] for number in range(server.settings.max_prompts)]
    asked = {"model": "tiny", "prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 0}
    body = http.post("/v1/completions", json=asked).raise_for_status().json()
    assert [choice["index"] for choice in body["choices"]] == list(range(len(prompts)))
    assert [choice["text"] for choice in body["choices"]] == list(map(server.codec.decode, prompts))
    assert [len(choice["logprobs"]["token_logprobs"]) for choice in body["choices"]] == [3] * len(prompts)
    assert body["usage"]["total_tokens"] == 3 * len(prompts)


@pytest.mark.parametrize(
    ("num_prompts", "n", "setting"),
    [
        (1, 4, "max_n"),
        (4, 4, "max_n"),
        (3, 3, "max_prompts"),
        (9, None, "max_prompts"),
        (7, 1, "max_queue_requests"),
    ],
)
def test_too_many_answers_name_the_setting(num_prompts: int, n: int | None, setting: str) -> None:
    """The last request of each size that fits is (2, 3) and (6, 1)."""
    limits = Settings(max_n=3, max_prompts=8, max_queue_requests=8 if setting == "max_prompts" else 6)
    check_counts(3, 2, limits)
    check_counts(None, 6, limits)
    with pytest.raises(RequestError, match="at most") as caught:
        check_counts(n, num_prompts, limits)
    assert f"`{setting}`" in caught.value.hint
    assert caught.value.param == ("n" if setting == "max_n" else "prompt")


def test_openapi_describes_the_bodies(http: httpx2.Client) -> None:
    document = http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    text = json.dumps(document)
    for reference in set(part.split('"')[0] for part in text.split("#/components/schemas/")[1:]):
        assert reference in schemas
    assert schemas["CompletionRequest"]["additionalProperties"] is False
    assert {"prompt", "echo", "logprobs"} <= schemas["CompletionRequest"]["properties"].keys()
