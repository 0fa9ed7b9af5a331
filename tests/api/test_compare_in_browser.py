"""The compare page in a real browser, between two fronts: what a reader sees, and what it may not do.

Without Chromium these are skipped on a machine of one's own, and fail in CI, which installs it.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from api_rig import Server, serving
from browser import Chromium, Page, chromium

# "éab" and "écab": the first character is two tokens
LEFT_REPLY, RIGHT_REPLY = "130,105,67,68", "130,105,69,67,68"
LEFT, RIGHT = "#left", "#right"


@dataclass
class Pair:
    """Two servers that allow each other's pages, and a browser."""

    left: Server
    right: Server
    browser: Chromium

    def page(self, **options: int) -> Page:
        page = self.browser.open(f"{self.left.url}/compare", **options)
        page.wait("document.body.dataset.ready")
        return page


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    if not chromium():
        assert not os.environ.get("CI"), "no Chromium: .ci/run installs Debian's"
        pytest.skip("no Chromium: apt install chromium")
    ports = free_port(), free_port()
    folders = [tmp_path_factory.mktemp(name) for name in ("left", "right", "profile")]
    engines = (
        {"FAKE_REPLY": LEFT_REPLY, "FAKE_LOGPROB": "-0.105"},  # 90 %
        {"FAKE_REPLY": RIGHT_REPLY, "FAKE_LOGPROB": "-0.693"},  # 50 %
    )
    with contextlib.ExitStack() as stack:
        left, right = (
            stack.enter_context(
                serving(
                    folder,
                    engine,
                    port=port,
                    precision=precision,
                    allowed_origins=f"http://127.0.0.1:{other}",
                )
            )
            for folder, engine, port, other, precision in zip(
                folders, engines, ports, reversed(ports), ("bf16", "nf4"), strict=False
            )
        )
        yield Pair(left, right, stack.enter_context(Chromium(folders[2])))


def texts(page: Page, selector: str) -> list[str]:
    found: list[str] = page.evaluate(
        f"[...document.querySelectorAll({selector!r})].map((found) => found.textContent)"
    )
    return found


def compare(page: Page, *, chat: bool = False) -> None:
    before = page.evaluate("Number(document.body.dataset.compared ?? 0)")
    page.evaluate(f"document.getElementById('chat').checked = {str(chat).lower()}")
    page.evaluate("document.getElementById('run').click()")
    page.wait(f"Number(document.body.dataset.compared ?? 0) > {before}")


@pytest.fixture(scope="module")
def compared(pair: Pair) -> Page:
    page = pair.page()
    compare(page)
    return page


def test_both_servers_are_offered_and_each_is_a_side(compared: Page) -> None:
    offered = texts(compared, "#choose-left option")
    assert offered[0] == "bf16"
    assert offered[1].startswith("nf4 at 127.0.0.1:")
    assert [texts(compared, f"{side} .name") for side in (LEFT, RIGHT)] == [["bf16"], ["nf4"]]


def test_the_first_difference_is_marked_and_told(compared: Page) -> None:
    marked = "[...document.querySelectorAll('{} .token')].findIndex((t) => t.classList.contains('parts'))"
    assert [compared.evaluate(marked.format(side)) for side in (LEFT, RIGHT)] == [2, 2]
    assert texts(compared, "#verdict-line") == [
        "The answers part at token 3: bf16 writes “a”, nf4 writes “c”."
    ]
    assert texts(compared, "#candidates caption") == ["bf16 at token 3", "nf4 at token 3"]
    assert texts(compared, "#candidates .written td:last-child") == ["90.0 %", "50.0 %"]


def test_the_text_is_that_of_the_answers_with_their_ends(compared: Page) -> None:
    assert texts(compared, f"{LEFT} .token") == ["", "é", "a", "b", "<|im_end|>"]
    assert texts(compared, f"{RIGHT} .token") == ["", "é", "c", "a", "b", "<|im_end|>"]


def test_a_chat_is_compared_likewise(pair: Pair) -> None:
    page = pair.page()
    compare(page, chat=True)
    assert texts(page, "#verdict-line") == ["The answers part at token 3: bf16 writes “a”, nf4 writes “c”."]
    assert texts(page, f"{LEFT} .token") == ["", "é", "a", "b", "<|im_end|>"]
    page.evaluate("document.querySelector('#left .token').click()")
    assert texts(page, "#candidates .written td:first-child") == ["“bytes:\\xc3”"] * 2


def test_colour_is_the_difference_in_probability_also_behind_the_parting(compared: Page) -> None:
    """The left side is sure of each token, the right half as much: 0.4 apart, of a scale of 0.5."""
    for side, kind in ((LEFT, "less"), (RIGHT, "more")):
        tokens = f"[...document.querySelectorAll('{side} .token')]"
        assert all(compared.evaluate(f"{tokens}.map((t) => t.classList.contains('{kind}'))"))
        strengths = compared.evaluate(f"{tokens}.map((t) => t.style.getPropertyValue('--strength'))")
        assert {round(float(strength), 1) for strength in strengths} == {0.8}
    (summary,) = texts(compared, "#summary")
    assert "40.0 points on the 5 tokens of bf16, 40.0 points on the 6 tokens of nf4" in summary


def test_a_chosen_token_shows_both_probabilities_behind_the_parting(compared: Page) -> None:
    compared.evaluate("document.querySelectorAll('#right .token')[3].click()")
    assert texts(compared, "#candidates caption") == ["nf4 at token 4"]
    (said,) = texts(compared, "#candidates p")
    assert "has 50.0 % from nf4, and 90.0 % from bf16 behind the same text" in said


def test_figures_and_bars_are_there(pair: Pair, compared: Page) -> None:
    for side in (LEFT, RIGHT):
        ttft, speed, memory = texts(compared, f"{side} .figures b")
        assert ttft.endswith(" ms")
        assert float(speed.replace(",", "")) > 0
        assert memory.endswith(" MB")
        assert compared.evaluate(f"document.querySelectorAll('{side} .bar > i').length") >= 3
    info = pair.left.host.client.info
    assert info is not None
    groups = {part.partition(".")[0] for part, size in info.memory_bytes.items() if size}
    assert len(texts(compared, f"{LEFT} .parts-line span")) == len(groups)


def test_nothing_is_asked_of_anybody_else_and_the_browser_has_no_complaint(
    pair: Pair, compared: Page
) -> None:
    servers = (f"{pair.left.url}/", f"{pair.right.url}/", "data:")
    assert all(address.startswith(servers) for address in compared.requested())
    assert compared.complaints() == []


def test_the_page_fits_a_phone_and_runs_again(pair: Pair) -> None:
    page = pair.page(width=390, height=844)
    for _ in range(2):
        compare(page)
        assert texts(page, "#notice") == [""]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_same_side_twice_agrees_to_the_last_token(pair: Pair) -> None:
    page = pair.page()
    page.evaluate(
        "document.getElementById('choose-right').value = '0';"
        "document.getElementById('choose-right').dispatchEvent(new Event('change'))"
    )
    compare(page)
    assert texts(page, "#verdict-line") == ["Both wrote the same 5 tokens."]
    assert page.evaluate("document.querySelectorAll('.token.less, .token.more, .token.parts').length") == 0


def test_what_a_server_refuses_is_shown(pair: Pair) -> None:
    page = pair.page()
    page.evaluate("document.getElementById('max-tokens').max = 99999")
    page.evaluate("document.getElementById('max-tokens').value = 99999")
    compare(page)
    (notice,) = texts(page, "#notice")
    assert "99999" in notice or "window" in notice
    assert page.evaluate("document.getElementById('notice').className") == "wrong"


def test_a_locked_server_asks_for_its_key(pair: Pair, tmp_path: Path) -> None:
    with serving(tmp_path, {}, api_key="k1") as locked:
        page = pair.browser.open(f"{locked.url}/compare")
        page.wait("document.body.dataset.ready")
        assert texts(page, "#choose-left option") == []
        assert page.evaluate("document.getElementById('key-field').hidden") is False
        page.evaluate(
            "document.getElementById('key').value = 'k1';"
            "document.getElementById('key').dispatchEvent(new Event('change'))"
        )
        page.wait("document.querySelectorAll('#choose-left option').length == 1")
        assert "halftone serve --resident fp16,nf4" in page.wait(
            "document.getElementById('notice').textContent"
        )
