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
    config = EngineConfig(model_path=str(folder), precision="fp32", device="cpu", kv_tokens=CONTEXT + 16)
    return start(config, lambda _: None, 0.0), config


@pytest.fixture(scope="module")
def peer(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def nll(model: PreTrainedModel, ids: list[int], first: int) -> float:
    """Nats of the tokens from `first` on, by transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    targets = torch.tensor(ids[first:])
    return float(torch.nn.functional.cross_entropy(logits[first - 1 : -1], targets, reduction="sum"))


def gptq(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> float:
    lines = [line + "\n" if line.strip() else "" for line in TEXT.split("\n")[:-1]]
    ids = tokenizer("\n\n".join(lines)).input_ids
    losses = []
    for number in range(len(ids) // 2048):
        batch = torch.tensor([ids[number * 2048 : (number + 1) * 2048]])
        with torch.no_grad():
            losses.append(float(model(batch, labels=batch).loss) * 2048)
    return math.exp(sum(losses) / (len(losses) * 2048))


def llama_perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> float:
    ids = tokenizer(TEXT).input_ids
    total, count = 0.0, 0
    for place in range(0, len(ids) // 512 * 512, 512):
        chunk = ids[place : place + 512]
        if tokenizer("").input_ids:
            chunk[0] = tokenizer.bos_token_id
        total += nll(model, chunk, 257)
        count += 255
    return math.exp(total / count)


def lm_eval_word(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> float:
    """Each token once, behind all that fits: chunks of the context, the last one filled up from before."""
    total, words = 0.0, 0
    for article in articles(TEXT):
        words += len(article.split()) + (article[0].isspace()) + (article[-1].isspace())
        ids = tokenizer(prose(article), add_special_tokens=False).input_ids
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        done = 0
        while done < len(ids):
            new = min(CONTEXT, len(ids) - done)
            end = done + new
            before = [prefix] if end <= CONTEXT else ids[end - CONTEXT - 1 : done]
            sequence = (before if done else [prefix]) + ids[done:end]
            with torch.no_grad():
                logits = model(torch.tensor([sequence[:-1]])).logits[0].double().log_softmax(-1)
            picked = logits[-new:].gather(1, torch.tensor(ids[done:end])[:, None])
            total -= float(picked.sum())
            done = end
    return math.exp(total / words)


INDEPENDENT: dict[str, Callable[..., float]] = {
    "gptq-2048": gptq,
    "llama.cpp-512": llama_perplexity,
    "lm-eval-word": lm_eval_word,
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
    assert got == pytest.approx(INDEPENDENT[name](*peer), rel=1e-3)
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
