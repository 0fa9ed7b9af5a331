"""Ids back to text, token by token: joined deltas are the whole, wherever the cuts fall."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_level, sentencepiece
from tokenizers import Tokenizer

from service.front.detokenizer import Detokenizer, StopMatcher, token_bytes
from service.front.text import TextCodec

TOKENIZERS = {"byte_level": byte_level(), "sentencepiece": sentencepiece()}


@pytest.fixture(scope="module", params=TOKENIZERS)
def plain(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]


@pytest.fixture(scope="module")
def codec(plain: Tokenizer) -> TextCodec:
    return TextCodec(Tokenizer.from_str(plain.to_str()), None)


def deltas(codec: TextCodec, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(codec.pieces)
    return [detokenizer.feed(id) for id in ids] + [detokenizer.finish()]


TEXTS = st.text(
    alphabet=st.one_of(
        st.sampled_from("abc the  \n"), st.sampled_from("日本語🙂🙃👍🏽ß\u200d"), st.characters(codec="utf-8")
    )
)


@settings(deadline=None)
@given(prompt=TEXTS, text=TEXTS)
def test_joined_deltas_continue_the_prompt(
    codec: TextCodec, plain: Tokenizer, prompt: str, text: str
) -> None:
    """The library's text of prompt and answer together, less the prompt's: leading spaces are kept."""
    prompt_ids = plain.encode("a" + prompt, add_special_tokens=False).ids
    ids = plain.encode(text, add_special_tokens=False).ids
    whole = plain.decode(prompt_ids + ids)
    assert "".join(deltas(codec, ids)) == whole.removeprefix(plain.decode(prompt_ids))


@given(text=TEXTS)
@settings(deadline=None)
def test_no_delta_holds_half_a_character(codec: TextCodec, plain: Tokenizer, text: str) -> None:
    if "\N{REPLACEMENT CHARACTER}" not in text:
        ids = plain.encode(text, add_special_tokens=False).ids
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(deltas(codec, ids))


def test_special_tokens_add_no_text(codec: TextCodec) -> None:
    assert all(deltas(codec, [id]) == ["", ""] for id in codec.special_ids)
    assert all(codec.spelling(id) for id in codec.special_ids)


def test_ids_beyond_the_tokenizer_add_no_text(codec: TextCodec) -> None:
    """Models pad their vocabulary to a round number."""
    assert deltas(codec, [codec.num_tokens, codec.num_tokens + 1000]) == ["", "", ""]


def test_invalid_bytes_are_told_as_they_come() -> None:
    """A model stuck in broken bytes must not grow a buffer, nor go silent."""
    pieces = token_bytes(TOKENIZERS["byte_level"])
    lead = pieces.index(b"\xf0")
    detokenizer = Detokenizer(pieces)
    assert [detokenizer.feed(lead) for _ in range(3)] == ["", "\ufffd", "\ufffd"]
    assert detokenizer.finish() == "\ufffd"


def cut_before_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: the stop that is complete first; of those complete together, the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@settings(max_examples=400)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3),
)
@example(pieces=["aa", "ab"], stops=["aab"])
@example(pieces=["abab", "abc"], stops=["ababc"])
@example(pieces=["ab"], stops=["b", "ab"])
def test_stops_are_found_wherever_the_cuts_fall(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    sent, complete = "", False
    for piece in pieces:
        text, complete = matcher.feed(piece)
        sent += text
        if complete:
            break
    if not complete:
        sent += matcher.finish()
    assert (sent, complete) == cut_before_stop("".join(pieces), stops)


@given(pieces=st.lists(st.text("ab", min_size=1, max_size=3), max_size=12), stop=st.text("ab", min_size=1))
def test_only_what_may_become_a_stop_is_held_back(pieces: list[str], stop: str) -> None:
    matcher = StopMatcher([stop])
    sent = ""
    for number, piece in enumerate(pieces):
        text, complete = matcher.feed(piece)
        sent += text
        if complete:
            return
        held = "".join(pieces[: number + 1]).removeprefix(sent)
        assert stop.startswith(held)
