"""Each protocol's windows, and its perplexity beside a computation that shares no code with it."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import make_checkpoint
from tiny_tokenizers import Kind, write_checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from service.engine.evaluate import Evaluation
from service.engine.startup import Serving, start
from service.errors import CheckpointError, SettingError
from service.messages import EngineConfig, Evaluate, Evaluated
from service.quality.protocols import PROTOCOLS, Limits, WordPieces, cut, parse_protocols, rolling
from service.quality.texts import Text
from service.quality.wikitext import articles, num_words, prose, rows
from tests.quality.transformers_protocols import gptq, llama_perplexity, lm_eval_word

CONTEXT = 2304  # of the tiny model: less than its longest article
ARTICLE = """
 = {title} =

 The quick brown fox @-@ like animal {body} and says " hello world " to 1 @,@ 000 dogs in the street .

 = = Heading of the {title} = =

 stop here . User : what is the end ? It is near ( the street ) 's end .
"""
TEXT = "".join(
    ARTICLE.format(
        title=f"Title {n}", body=" ".join(f"jumps {i * n % 97} times" for i in range(40 + 170 * n))
    )
    for n in range(3)
)


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    kind: Kind = request.param
    write_checkpoint(path, kind)
    make_checkpoint(path, "llama", vocab_size=720, max_position_embeddings=CONTEXT, num_hidden_layers=2)
    return path


@pytest.fixture(scope="module")
def serving(folder: Path) -> tuple[Serving, EngineConfig]:
    config = EngineConfig(model_path=str(folder), precision="fp32", device="cpu", kv_tokens=CONTEXT)
    return start(config, lambda _: None, 0.0), config


@pytest.fixture(scope="module")
def peer(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


INDEPENDENT: dict[str, tuple[Callable[..., float], int]] = {
    "gptq-2048": (gptq, 2048),
    "llama.cpp-512": (llama_perplexity, 512),
    "lm-eval-word": (lm_eval_word, CONTEXT),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_perplexity_is_that_of_an_independent_computation(
    folder: Path,
    serving: tuple[Serving, EngineConfig],
    peer: tuple[PreTrainedModel, PreTrainedTokenizerFast],
    name: str,
) -> None:
    made = cut(name, Text("t", TEXT), WordPieces.load(folder, [2]), Limits(CONTEXT))
    sent: list[Evaluated] = []
    asked = Evaluate(1, made.windows, ["prefill"], scored_from=made.scored_from)
    Evaluation(asked, *serving, sent.append).run()
    assert sent[-1].error == ""
    got = math.exp(sent[-1].nll["prefill"] / made.num_units)
    compute, size = INDEPENDENT[name]
    assert got == pytest.approx(compute(*peer, TEXT, size, 0), rel=1e-3)
    if made.unit == "token":
        assert sent[-1].tokens["prefill"] == made.num_units
    else:
        assert max(map(len, made.windows)) == CONTEXT + 1, "an article is longer than the context"


def test_windows_say_what_they_are(folder: Path) -> None:
    pieces, text = WordPieces.load(folder, [2]), Text("t", TEXT)
    assert len(pieces.sha256) == 64
    short = cut("gptq-2048", text, pieces, Limits(CONTEXT, windows=1))
    assert (len(short.windows), short.num_units) == (1, 2047)
    assert "first 1 disjoint windows of 2048 tokens of the lines, joined by blank lines" in short.words
    assert "cut at the context window of 2304" in cut("lm-eval-word", text, pieces, Limits(CONTEXT)).words
    assert "none cut" in cut("lm-eval-word", text, pieces, Limits(CONTEXT, windows=1)).words
    ours = cut("halftone", text, pieces, Limits(CONTEXT, 3, 65))
    assert [len(window) for window in ours.windows] == [65] * 3
    with pytest.raises(SettingError, match=r"windows of 65 tokens; 1000 are asked for"):
        cut("halftone", text, pieces, Limits(CONTEXT, 1000, 65))
    with pytest.raises(SettingError, match="holds 2000"):
        cut("gptq-2048", text, pieces, Limits(2000))
    with pytest.raises(SettingError, match="one window takes 8192"):
        cut("aqlm-8192", Text("t", "short"), pieces, Limits(CONTEXT))


def test_documents_are_joined_as_their_data_set_is_read(folder: Path) -> None:
    pieces = WordPieces.load(folder, [2])
    text = Text.of_documents("c4", [f"hello world {n} " * 300 for n in range(20)], " ", most_windows=3)
    assert text.content.startswith("hello world 0 ")
    made = cut("gptq-2048", text, pieces, Limits(CONTEXT))
    assert len(made.windows) == 3
    assert made.windows[0] == pieces.encode(text.content, special=True)[:2048]
    assert len(cut("lm-eval-word", text, pieces, Limits(10**6)).windows) == 20


def test_every_token_counts_once_however_a_document_is_cut() -> None:
    ids = list(range(100, 124))  # the first is context
    for context in (1, 5, 22, 23, 40):
        counted = [id for window, first in rolling(ids, context) for id in window[first:]]
        assert counted == ids[1:]
        assert all(len(window) <= context + 1 for window, _ in rolling(ids, context))
    assert list(rolling(ids[:8], 5)) == [(ids[:6], 1), (ids[2:8], 4)]


def test_wikitext_is_read_as_its_loaders_read_it() -> None:
    assert rows(" a \n \n\n b") == [" a \n", "", "", " b"]
    assert [article.split("\n")[0] for article in articles(TEXT)] == [
        f" = Title {n} = "[:-1] for n in range(3)
    ]
    assert articles("no heading\n = = deep = = \n") == ["no heading\n = = deep = = \n"]
    assert prose('He said " yes " , 1 @,@ 000 @-@ fold ( or so ) .\n = = H = = \n') == (
        'He said "yes", 1,000-fold (or so) .\n== H ==\n'
    )
    assert num_words(" a b\n") == 4


def test_the_first_context_is_bos_or_eos(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "bos", "sentencepiece")
    write_checkpoint(tmp_path / "eos", "byte_level")
    assert WordPieces.load(tmp_path / "bos", [7]).prefix_id == 1
    assert WordPieces.load(tmp_path / "eos", [7]).prefix_id == 2
    (tmp_path / "eos" / "tokenizer_config.json").write_text(json.dumps({}))
    assert WordPieces.load(tmp_path / "eos", [7]).prefix_id == 7
    (tmp_path / "eos" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        WordPieces.load(tmp_path / "eos", [7])


def test_names() -> None:
    assert parse_protocols("halftone, gptq-2048,halftone") == ["halftone", "gptq-2048"]
    with pytest.raises(SettingError, match="protocol `ptb` does not exist"):
        parse_protocols("ptb")
    assert len(PROTOCOLS) == 6
