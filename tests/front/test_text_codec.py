"""Text to ids: what transformers makes of the same checkpoint, control tokens apart."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, Kind, byte_level, write_checkpoint
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from service.errors import CheckpointError, RequestError
from service.front import chat_template
from service.front.text import TextCodec


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind: Kind = request.param
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / kind, kind)


@pytest.fixture(scope="module")
def codec(folder: Path) -> TextCodec:
    return TextCodec.load(folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Tokenizer:
    """The tokenizer as it lies in the folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def chat(*contents: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [
        {"role": ("user", "assistant")[number % 2], "content": content}
        for number, content in enumerate(contents)
    ]


TEXTS = st.text(
    alphabet=st.one_of(
        st.sampled_from("abcdefgh  \n\t.,<|>[]/INST_▁"),
        st.sampled_from("日本語🙂🙃👍ßéï\u200d"),
        st.characters(codec="utf-8"),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(contents=st.lists(TEXTS, min_size=1, max_size=4))
def test_chat_ids_equal_transformers(codec: TextCodec, theirs: Any, contents: list[str]) -> None:
    messages = chat(*contents)
    if any(token in content for content in contents for token in theirs.all_special_tokens):
        return  # ours is text then, theirs a control token: the next test's business
    expected = theirs.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert codec.encode_chat(messages) == expected


def test_template_writes_the_control_tokens(codec: TextCodec, plain: Tokenizer) -> None:
    ids = codec.encode_chat(chat("hello", "world", "again"))
    specials = [plain.id_to_token(id) for id in ids if id in codec.special_ids]
    assert specials in (
        ["<|im_start|>", "<|im_end|>"] * 3 + ["<|im_start|>"],
        ["<s>", "</s>"],
    )


@settings(deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from(
            [
                "<|im_end|>",
                "<|im_start|>",
                "<|endoftext|>",
                "<s>",
                "</s>",
                "<unk>",
                "system\n",
                " ",
                "hi",
                "🙂",
            ]
        ),
        min_size=1,
        max_size=6,
    )
)
def test_control_tokens_spelled_in_a_message_are_text(
    codec: TextCodec, plain: Tokenizer, pieces: list[str]
) -> None:
    """A client could otherwise write a system turn into its own message."""
    ids = codec.encode_chat(chat("x" + "".join(pieces) + "x"))
    harmless = codec.encode_chat(chat("hello"))
    assert [id for id in ids if id in codec.special_ids] == [id for id in harmless if id in codec.special_ids]
    assert "".join(pieces) in plain.decode(ids, skip_special_tokens=False)
    assert max(ids) < codec.num_tokens


def test_escaped_message_is_tokenized_as_one_text(tmp_path: Path) -> None:
    """The letters of a control token merge with their neighbours as any others do."""
    folder = write_checkpoint(tmp_path, "byte_level")
    codec = TextCodec.load(folder)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.encode_special_tokens = True
    content = "the quick<|im_end|>the quick"
    start, end = codec.encode("<|im_start|>"), codec.encode("<|im_end|>")
    assert codec.encode_chat(chat(content)) == [
        *start,
        *plain.encode(f"user\n{content}").ids,
        *end,
        *plain.encode("\n").ids,
        *start,
        *plain.encode("assistant\n").ids,
    ]


@settings(deadline=None)
@given(
    pieces=st.lists(st.one_of(TEXTS, st.sampled_from(["<|im_end|>", "<s>", "</s>", "<think>"])), max_size=6),
    add_special_tokens=st.booleans(),
)
def test_raw_prompts_are_tokenized_as_the_library_does(
    codec: TextCodec, plain: Tokenizer, pieces: list[str], add_special_tokens: bool
) -> None:
    text = "".join(pieces)
    assert (
        codec.encode(text, add_special_tokens)
        == plain.encode(text, add_special_tokens=add_special_tokens).ids
    )


def test_bos_stands_before_raw_prompts_where_the_tokenizer_says_so(tmp_path: Path) -> None:
    with_bos = TextCodec.load(write_checkpoint(tmp_path / "with", "sentencepiece"))
    without = TextCodec.load(write_checkpoint(tmp_path / "without", "byte_level"))
    assert with_bos.encode("hello")[0] == 1
    assert with_bos.encode("hello", add_special_tokens=False)[0] != 1
    assert without.encode("hello")[0] not in without.special_ids


def test_a_template_that_refuses_is_a_request_error(tmp_path: Path) -> None:
    codec = TextCodec.load(write_checkpoint(tmp_path, "sentencepiece"))
    with pytest.raises(RequestError, match="system is not taken") as caught:
        codec.encode_chat([{"role": "system", "content": "x"}])
    assert caught.value.code == "invalid_messages"


@pytest.mark.parametrize(
    "source",
    ["{{ messages[7]['content'] + 'x' }}", "{{ messages + 1 }}", "{{ 1 / 0 }}", "{{ ''.__class__.x }}"],
)
def test_a_template_that_fails_is_a_request_error(tmp_path: Path, source: str) -> None:
    codec = TextCodec.load(write_checkpoint(tmp_path, "byte_level", template=source))
    with pytest.raises(RequestError, match="cannot be rendered"):
        codec.encode_chat(chat("x"))


def test_rendered_length_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARACTERS", 1000)
    source = "{% for _ in range(99999) %}{{ messages[0]['content'] }}{% endfor %}"
    codec = TextCodec.load(write_checkpoint(tmp_path, "byte_level", template=source))
    with pytest.raises(RequestError, match="more than 1000 characters"):
        codec.encode_chat(chat("x"))


@pytest.mark.parametrize(
    "source",
    [
        "{% if true %}\nx\n{% endif %}\ny\n  {% if true %}\n  z{% endif %}\n",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
        "{%- for m in messages -%}\n  {% generation %}{{ m.content }}{% endgeneration %}\n{%- endfor -%}\n",
        "{{ strftime_now('%Y') | length }}{{ tools is none }}{{ messages | tojson(indent=2) }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ add_generation_prompt }}{{ eos_token }}{{ bos_token | default('none') }}",
    ],
)
def test_templates_render_as_transformers_renders_them(tmp_path: Path, source: str) -> None:
    folder = write_checkpoint(tmp_path, "sentencepiece", template=source)
    messages = chat("<b>größe</b> & 'quotes'", "two")
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    template = TextCodec.load(folder).template
    assert template is not None
    assert template.render(messages) == expected


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "byte_level", template="config")
    assert rendered(TextCodec.load(folder)) == "config"
    (folder / "chat_template.jinja").write_text("file")
    assert rendered(TextCodec.load(folder)) == "file"
    (tmp_path / "own.jinja").write_text("own")
    assert rendered(TextCodec.load(folder, str(tmp_path / "own.jinja"))) == "own"
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert rendered(TextCodec.load(folder)) == "named"
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(RequestError, match="no chat template") as caught:
        TextCodec.load(folder).encode_chat(chat("x"))
    assert caught.value.code == "no_chat_template"


def rendered(codec: TextCodec) -> str:
    assert codec.template is not None
    return codec.template.render(chat("x"))


@pytest.mark.parametrize("source", ["{% for %}", "{{ unclosed"])
def test_a_broken_template_is_told_at_load(tmp_path: Path, source: str) -> None:
    with pytest.raises(CheckpointError, match="chat template, line 1"):
        TextCodec.load(write_checkpoint(tmp_path, "byte_level", template=source))


def test_unreadable_files_are_told_at_load(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        TextCodec.load(tmp_path)
    folder = write_checkpoint(tmp_path, "byte_level")
    with pytest.raises(CheckpointError, match="cannot be read"):
        TextCodec.load(folder, str(tmp_path / "missing.jinja"))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        TextCodec.load(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_damaged_tokenizer_config_is_told_at_load(tmp_path: Path, content: str) -> None:
    """It was told as a fault of the server."""
    write_checkpoint(tmp_path, "byte_level")
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        TextCodec.load(tmp_path)


def test_unknown_decoders_are_refused() -> None:
    tokenizer = byte_level()
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(CheckpointError, match="WordPiece"):
        TextCodec(tokenizer, None)
