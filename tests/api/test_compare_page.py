"""What is around the compare page: its policy, who may open it, and which other origins may use the API."""

import hashlib
import re
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from api_rig import Server, serving

from service.config import load_settings
from service.errors import SettingError

PEER = "http://127.0.0.1:8001"
ASKING = {"origin": PEER, "access-control-request-method": "POST"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    with serving(folder, {}, api_key="k1", allowed_origins=f"{PEER}, https://other.example") as running:
        yield running


@pytest.fixture(scope="module")
def page(server: Server) -> httpx2.Response:
    with server.http() as http:
        return http.get("/compare")


def test_the_page_opens_without_a_key_and_names_the_other_servers(page: httpx2.Response) -> None:
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert f'name="halftone-peers" content="{PEER} https://other.example"' in page.text
    assert "k1" not in page.text


def rules(page: httpx2.Response) -> dict[str, list[str]]:
    policy = page.headers["content-security-policy"]
    return {name: values for name, *values in (rule.split() for rule in policy.split(";"))}


@pytest.mark.parametrize(("tag", "rule"), [("script", "script-src"), ("style", "style-src")])
def test_the_policy_allows_what_stands_in_the_page_and_nothing_else(
    page: httpx2.Response, tag: str, rule: str
) -> None:
    (content,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page.text, re.DOTALL)
    assert len(content) > 1000
    digest = b64encode(hashlib.sha256(content.encode()).digest()).decode()
    assert rules(page)[rule] == [f"'sha256-{digest}'"]


def test_the_page_may_ask_its_own_server_and_those_of_the_setting(page: httpx2.Response) -> None:
    assert rules(page)["connect-src"] == ["'self'", PEER, "https://other.example"]
    assert rules(page)["default-src"] == ["'none'"]
    assert rules(page)["frame-ancestors"] == ["'none'"]
    # no handler, no style and no address of somebody else's in the markup itself
    markup = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page.text, flags=re.DOTALL)
    assert not re.search(r"\son[a-z]+=|\sstyle=|\ssrc=|url\(|https?://(?!127|other)", markup)


def test_an_allowed_origin_may_ask_and_read(server: Server) -> None:
    with server.http() as http:
        asked = http.request("OPTIONS", "/v1/completions", headers=ASKING)
        assert asked.status_code == 204
        assert asked.headers["access-control-allow-origin"] == PEER
        assert "authorization" in asked.headers["access-control-allow-headers"]
        key = {"authorization": "Bearer k1"}
        answers = [
            http.get("/v1/models", headers={"origin": PEER, **key}),
            http.get("/v1/models", headers={"origin": PEER}),  # and learns that it lacks a key
            http.post(
                "/v1/completions",
                json={"model": "tiny", "prompt": [5], "max_tokens": 1, "stream": True},
                headers={"origin": PEER, **key},
            ),
        ]
    assert [answer.status_code for answer in answers] == [200, 401, 200]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == PEER
        assert answer.headers["vary"] == "origin"


@pytest.mark.parametrize("origin", ["http://127.0.0.1:8002", "https://127.0.0.1:8001", "null", f"{PEER}/"])
def test_no_other_origin_may(server: Server, origin: str) -> None:
    with server.http() as http:
        asked = http.request("OPTIONS", "/v1/completions", headers=ASKING | {"origin": origin})
        assert asked.status_code == 401
        read = http.get("/v1/models", headers={"origin": origin, "authorization": "Bearer k1"})
    for answer in (asked, read):
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("text", ["*", "127.0.0.1:8001", f"{PEER}/", f"{PEER},http://x/y", "http://a;b"])
def test_what_is_no_origin_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="no origin"):
        load_settings(allowed_origins=text)


def test_without_the_setting_no_browser_is_told_anything(tmp_path: Path) -> None:
    with serving(tmp_path, {}) as server, server.http() as http:
        answer = http.get("/v1/models", headers={"origin": PEER})
        assert not {"vary", "access-control-allow-origin"} & set(answer.headers)
        assert http.request("OPTIONS", "/v1/completions", headers=ASKING).status_code == 405
        assert rules(http.get("/compare"))["connect-src"] == ["'self'"]
