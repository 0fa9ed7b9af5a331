"""Requests generated from the document that the server publishes: none may be a 5xx, whatever it is.

Runs where schemathesis is installed; the byte-level catalogue beside it does not depend on it.
"""

from typing import Any

import pytest
from api_rig import Server
from hypothesis import HealthCheck, Phase, given, settings

schemathesis = pytest.importorskip("schemathesis")

MODES = schemathesis.GenerationMode


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("mode", [MODES.POSITIVE, MODES.NEGATIVE], ids=["valid", "invalid"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_generated_requests(server: Server, document: Any, path: str, mode: Any) -> None:
    @settings(
        max_examples=12,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=document[path]["POST"].as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        name = case.body.get("model") if isinstance(case.body, dict) else None
        if isinstance(name, str) and 1 <= len(name) <= 512:
            case.body["model"] = "tiny"  # else everything ends as an unknown model
        response = case.call(base_url=server.url)
        assert response.status_code < 500, response.text
        if response.status_code != 200:
            assert len(response.content) <= 4096
            assert response.json()["error"].keys() == {"message", "type", "param", "code"}
        statuses.append(response.status_code)

    statuses: list[int] = []
    run()
    if mode is MODES.NEGATIVE:
        assert 200 not in statuses
    server.wait(server.host.client.wait_idle)
