"""What exactly a perplexity is of: four protocols that others publish by, and our own short one, by name.

Text, tokenizer --Protocol.cut--> Cut (windows, what counts in them, by what is divided) --> Evaluate, a stamp

The same model and text have perplexities that differ by half between protocols, so every figure carries its
protocol's name, the hash of the tokenizer and the hash of the text. No torch here.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from service.errors import CheckpointError, SettingError
from service.quality.texts import Text, spread, token_windows
from service.quality.wikitext import articles, num_words, prose, rows

LLAMA_CPP_TOKENS = 512


@dataclass(frozen=True)
class Limits:
    """What a command and a model allow; 0 windows: all that the text has."""

    max_context_tokens: int
    windows: int = 0
    window_tokens: int = 513  # of `halftone`; the others have their own


@dataclass(frozen=True)
class Cut:
    """A text as one protocol sees it."""

    windows: list[list[int]]
    scored_from: list[int]  # of each window, the place of the first token that counts
    unit: Literal["token", "word"]
    num_units: int  # perplexity is exp(nats of all that counts / this)
    words: str  # the protocol in a sentence


@dataclass(frozen=True)
class WordPieces:
    """A checkpoint's tokenizer as transformers uses it, with what it puts before a text."""

    tokenizer: Tokenizer
    sha256: str  # of tokenizer.json
    prefix_id: int  # lm-eval's first context: the BOS token, where there is none the EOS token

    @classmethod
    def load(cls, folder: Path, eos_token_ids: list[int]) -> "WordPieces":
        """Raises CheckpointError for a folder without one that can be read."""
        path = folder / "tokenizer.json"
        try:
            raw = path.read_bytes()
            tokenizer = Tokenizer.from_str(raw.decode())
        except Exception as error:  # the library raises bare Exceptions
            raise CheckpointError(
                f"`{path}` cannot be read as a tokenizer: {error}",
                hint="name a folder with one by `--tokenizer`",
            ) from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        special = special_ids(folder, tokenizer)
        prefix_id = special.get("bos_token", special.get("eos_token", min(eos_token_ids, default=0)))
        return cls(tokenizer, hashlib.sha256(raw).hexdigest(), prefix_id)

    def encode(self, text: str, *, special: bool) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        return ids


def special_ids(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """`bos_token`, `eos_token` -> id, of those that tokenizer_config.json names."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    found = {}
    for name in ("bos_token", "eos_token"):
        token = config.get(name)
        id = tokenizer.token_to_id(str(token["content"] if isinstance(token, dict) else token))
        if token is not None and id is not None:
            found[name] = id
    return found


def halftone(text: Text, pieces: WordPieces, limits: Limits) -> Cut:
    """A few windows from all over the text: minutes matter more than anybody's table."""
    windows = token_windows(text, pieces.tokenizer, limits.window_tokens)
    wanted = limits.windows or len(windows)
    if len(windows) < wanted:
        raise SettingError(
            f"text `{text.name}` has {len(windows)} windows of {limits.window_tokens} tokens; "
            f"{wanted} are asked for",
            hint="name a longer file with `--text`",
        )
    windows = spread(windows, wanted)
    return whole_windows(
        windows,
        f"token perplexity over {len(windows)} disjoint windows of {limits.window_tokens} tokens, evenly "
        "spaced in the text, each scored on its own from its second token",
    )


def whole_windows(windows: list[list[int]], words: str) -> Cut:
    """All tokens of each window count but the first."""
    num_tokens = sum(len(window) - 1 for window in windows)
    return Cut(windows, [1] * len(windows), "token", num_tokens, words)


def joined(window_tokens: int) -> "Cutter":
    """The protocol of GPTQ, AWQ and OmniQuant with 2,048 tokens, of AQLM and QuIP# with 4,096 or 8,192."""

    def cut(text: Text, pieces: WordPieces, limits: Limits) -> Cut:
        content = text.content if text.documents else "\n\n".join(rows(text.content))
        ids = pieces.encode(content, special=True)
        windows = disjoint(ids, window_tokens, text)
        windows = windows[: min(limits.windows or len(windows), text.most_windows or len(windows))]
        return whole_windows(
            windows,
            f"token perplexity over the first {len(windows)} disjoint windows of {window_tokens} tokens of "
            f"{'the documents' if text.documents else 'the lines, joined by blank lines'}, tokenized as one "
            "text, each scored on its own from its second token",
        )

    return cut


def llama_cpp(text: Text, pieces: WordPieces, limits: Limits) -> Cut:
    """As llama.cpp's `llama-perplexity -c 512` scores a file."""
    prefix = pieces.encode("", special=True)
    ids = pieces.encode(text.content, special=True)
    windows = disjoint(ids, LLAMA_CPP_TOKENS, text)
    windows = [prefix[:1] + window[len(prefix[:1]) :] for window in windows[: limits.windows or len(windows)]]
    first = LLAMA_CPP_TOKENS // 2 + 1  # row 256 predicts token 257
    num_tokens = len(windows) * (LLAMA_CPP_TOKENS - first)
    return Cut(
        windows,
        [first] * len(windows),
        "token",
        num_tokens,
        f"token perplexity over the second halves of the first {len(windows)} disjoint windows of "
        f"{LLAMA_CPP_TOKENS} tokens of the text as it is"
        + (", a BOS token in each one's first place" if prefix else ""),
    )


def lm_eval_words(text: Text, pieces: WordPieces, limits: Limits) -> Cut:
    """As lm-evaluation-harness's task `wikitext` scores documents."""
    documents = list(text.documents or articles(text.content))[: limits.windows or None]
    context = limits.max_context_tokens
    windows: list[list[int]] = []
    scored_from: list[int] = []
    for document in documents:
        ids = pieces.encode(prose(document), special=False)
        for window, first in rolling([pieces.prefix_id, *ids], context):
            windows.append(window)
            scored_from.append(first)
    longest = max(map(len, windows))
    return Cut(
        windows,
        scored_from,
        "word",
        sum(map(num_words, documents)),
        f"word perplexity over {len(documents)} detokenized documents, each whole behind one token "
        f"(id {pieces.prefix_id}), "
        + (f"cut at the context window of {context}" if longest > context else "none cut")
        + "; words are counted before detokenizing",
    )


def rolling(ids: list[int], context: int) -> Iterator[tuple[list[int], int]]:
    """-> windows of at most `context` + 1 ids, and from where they count: every id but the first, once.

    A window's first token is the one before its first that counts; the last window, where it is not the only
    one, is as long as the others and has as much context as that leaves.
    """
    for start in range(1, len(ids), context):
        stop = min(start + context, len(ids))
        begin = max(0, stop - context - 1)
        yield ids[begin:stop], start - begin


def disjoint(ids: list[int], window_tokens: int, text: Text) -> list[list[int]]:
    """Whole windows in the order of the text; SettingError where it is shorter than one."""
    if len(ids) < window_tokens:
        raise SettingError(
            f"text `{text.name}` has {len(ids)} tokens; one window takes {window_tokens}",
            hint="name a longer text with `--text`, or take another protocol",
        )
    return [
        ids[start : start + window_tokens] for start in range(0, len(ids) - window_tokens + 1, window_tokens)
    ]


Cutter = Callable[[Text, WordPieces, Limits], Cut]
PROTOCOLS: dict[str, Cutter] = {
    "halftone": halftone,
    "gptq-2048": joined(2048),
    "aqlm-4096": joined(4096),
    "aqlm-8192": joined(8192),
    "lm-eval-word": lm_eval_words,
    "llama.cpp-512": llama_cpp,
}


def parse_protocols(names: str) -> list[str]:
    """`NAME[,NAME...]` -> names, each once; SettingError for one that does not exist."""
    found = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in found:
        if name not in PROTOCOLS:
            raise SettingError(
                f"protocol `{name}` does not exist; there are {', '.join(PROTOCOLS)}",
                hint="docs/quality.md says what each of them is",
            )
    return found


def cut(name: str, text: Text, pieces: WordPieces, limits: Limits) -> Cut:
    """One protocol's windows. Raises SettingError where the text is too short, or the engine's context is."""
    made = PROTOCOLS[name](text, pieces, limits)
    longest = max(map(len, made.windows)) - (name == "lm-eval-word")
    if longest > limits.max_context_tokens:
        raise SettingError(
            f"protocol `{name}` has windows of {longest} tokens, the engine's context window holds "
            f"{limits.max_context_tokens}",
            hint="raise `--kv-tokens` or `--max-context-tokens` as far as the model allows, or take a "
            "protocol with shorter windows",
        )
    return made
