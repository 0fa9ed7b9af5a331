"""GET /plan: the model that is served, on its own device or another; a wrong parameter is one 400."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from api_rig import Server, serving
from tiny_models import SHAPE

from service.plan.question import NAMES

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    **SHAPE,
    "hidden_size": 128,
    "intermediate_size": 256,
}


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """A front whose engine is made up, over a folder with the config.json of a real shape."""
    with serving(tmp_path_factory.mktemp("plan"), {}) as server:
        (server.folder / "config.json").write_text(json.dumps(CONFIG))
        with server.http() as http:
            yield http


def test_the_served_device_is_the_default(planner: httpx2.Client) -> None:
    told = planner.get("/plan", params={"context": "64", "concurrency": "4"}).json()
    assert (told["model"], told["device"]) == ("tiny", "fake")
    assert (told["context_tokens"], told["concurrency"]) == (64, 4)
    assert told["take"] == "bf16"
    assert [mode["precision"] for mode in told["modes"]][:2] == ["bf16", "int8"]


def test_another_device_and_the_modes_that_were_named(planner: httpx2.Client) -> None:
    asked = {"gpu": "rtx4090", "precisions": "nf4,bf16", "kv_dtype": "fp8", "context": "64"}
    told = planner.get("/plan", params=asked).json()
    assert told["device"] == "rtx4090"
    assert [(mode["precision"], mode["kv_dtype"]) for mode in told["modes"]] == [
        ("nf4", "fp8"),
        ("bf16", "fp8"),
    ]
    assert told["modes"][0]["tokens_per_s"] > told["modes"][1]["tokens_per_s"] > 0
    assert sum(told["modes"][0]["parts"].values()) == told["modes"][0]["total_bytes"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("gpu=h100", "gpu"), ("gpu=24GiB&bandwidth=fast", "bandwidth"), ("bandwidth=1TB/s", "bandwidth"),
        ("context=0", "context"), ("concurrency=x", "concurrency"), ("kv_dtype=int4", "kv_dtype"),
        ("precisions=nf5", "precisions"), ("precisions=nf4:size=1", "precisions"), ("colour=red", "colour"),
        ("context=1&context=2", None), ("gpu=" + "9" * 600, "gpu"),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_named(planner: httpx2.Client, query: str, param: str | None) -> None:
    answer = planner.get(f"/plan?{query}")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, "invalid_value", "invalid_request_error")
    assert len(answer.content) < 1000


def test_parameters_are_documented(planner: httpx2.Client) -> None:
    route = planner.get("/openapi.json").json()["paths"]["/plan"]["get"]
    assert [parameter["name"] for parameter in route["parameters"]] == list(NAMES)
    assert all(parameter["description"] for parameter in route["parameters"])


def test_it_needs_the_key(tmp_path: Path) -> None:
    with serving(tmp_path, {}, api_key="secret") as server, server.http() as http:
        assert http.get("/plan").status_code == 401


def test_a_model_that_has_gone(tmp_path: Path) -> None:
    """An error of the server's own, not of whoever asks."""
    server: Server
    with serving(tmp_path, {}) as server, server.http() as http:
        (server.folder / "config.json").unlink(missing_ok=True)
        answer = http.get("/plan")
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "invalid_checkpoint"
