"""One front for all tests that only ask it things."""

from collections.abc import Iterator

import httpx2
import pytest
from api_rig import Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The fake's own replies, one token a step."""
    with serving(tmp_path_factory.mktemp("server"), {"FAKE_CONTEXT": "2048"}) as running:
        yield running


@pytest.fixture
def http(server: Server) -> Iterator[httpx2.Client]:
    with server.http() as client:
        yield client
