"""Text that calibrates and text that judges, kept apart: files, or halves of Python's own documentation.

`--calibration`, `--text`, or nothing --> Text --token_windows(), protocols--> token ids. No torch here.

Every CPython carries its documentation topics, so both texts exist without a network. A topic belongs to
one half by the hash of its name. Topics quote each other, so half B leaves out every paragraph that
half A has too.
"""

import gzip
import hashlib
import json
import platform
import re
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

from tokenizers import Tokenizer

from service.errors import SettingError

OVERLAP_CHARACTERS = 80
WORD = re.compile(r"[^\W_]+")
START = re.compile(r"\S+")
GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Text:
    """A text and where it came from."""

    name: str
    content: str
    python: str = ""  # version whose documentation this is; empty for a file
    # of a data set of documents, these, which `content` has joined by what stands between them; else none
    documents: tuple[str, ...] = ()
    most_windows: int = 0  # that published figures of this data set are of; 0: all

    @classmethod
    def of_documents(
        cls, name: str, documents: Iterable[str], between: str = "\n\n", most_windows: int = 0
    ) -> "Text":
        kept = tuple(documents)
        return cls(name, between.join(kept), documents=kept, most_windows=most_windows)

    @cached_property
    def sha256(self) -> str:
        """Of the UTF-8 bytes."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    @property
    def provenance(self) -> dict[str, str]:
        """What a report says of it."""
        python = {"python": self.python} if self.python else {}
        return {"text": self.name, "sha256": self.sha256, **python}


def calibration_text(path: str) -> Text:
    """The file that `--calibration` names, or half A of the documentation where it names none."""
    return read_text(path, "calibration") if path else documentation("A")


def evaluation_text(path: str) -> Text:
    """What `--text` names, a file or a text of the hub; half B of the documentation where it names none."""
    from service.quality.hub_texts import HUB_TEXTS  # which makes texts of this module's kind

    if path in HUB_TEXTS:
        return HUB_TEXTS[path]()
    return read_text(path, "text") if path else documentation("B")


def read_text(path: str | Path, setting: str) -> Text:
    """A file of UTF-8 text, or of JSON lines with a field `text`, one a document; either may be gzipped.

    SettingError naming `setting` when it cannot be one.
    """
    name = Path(path).name.removesuffix(".gz")
    try:
        raw = Path(path).read_bytes()
        content = (gzip.decompress(raw) if raw.startswith(GZIP) else raw).decode()
    except OSError as error:
        raise SettingError(
            f"`{setting}` = `{path}` cannot be read: {(error.strerror or 'unknown reason').lower()}",
            hint="give a text file",
        ) from None
    except UnicodeDecodeError as error:
        raise SettingError(
            f"`{setting}` = `{path}` is not UTF-8 at byte {error.start}", hint="give a text file in UTF-8"
        ) from None
    except (EOFError, zlib.error) as error:
        raise SettingError(
            f"`{setting}` = `{path}` is no whole gzip file: {error}", hint="fetch or compress the file again"
        ) from None
    text = Text(Path(path).name, content)
    if name.endswith((".jsonl", ".json")):
        text = Text.of_documents(text.name, json_documents(content, f"`{setting}` = `{path}`"))
    if not text.content.strip():
        raise SettingError(f"`{setting}` = `{path}` is empty", hint="give a text file with some prose in it")
    return text


def json_documents(content: str, told: str) -> Iterator[str]:
    """The field `text` of each line; SettingError that begins with `told` for a line without one."""
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                yield str(json.loads(line)["text"])
            except (ValueError, TypeError, KeyError):
                raise SettingError(
                    f"{told}: line {number} is no JSON object with a field `text`",
                    hint='each line reads {"text": "..."}; plain text has another suffix, such as .txt',
                ) from None


def documentation(half: Literal["A", "B"]) -> Text:
    """Half of the topics that this interpreter carries, sorted by name and joined by blank lines."""
    chosen: list[list[str]] = [[], []]
    for name in sorted(topics):
        odd = hashlib.sha256(name.encode()).digest()[0] % 2
        chosen[odd].append(topics[name].strip("\n"))
    content = "\n\n".join(chosen[0])
    if half == "B":
        content = without_shared(content, "\n\n".join(chosen[1]).split("\n\n"))
    return Text(f"python-documentation-{half.lower()}", content, platform.python_version())


def normalized(content: str) -> str:
    """Letters and digits only, in lower case, words one space apart: layout does not hide a copy."""
    return " ".join(WORD.findall(content.lower()))


def shared_runs(first: str, second: str) -> list[int]:
    """Normalized texts -> where in `second` a word begins that starts 80 characters `first` has too."""

    def runs(content: str) -> Iterable[tuple[int, int]]:
        for match in START.finditer(content):
            start = match.start()
            if start + OVERLAP_CHARACTERS <= len(content):
                yield start, hash(content[start : start + OVERLAP_CHARACTERS])

    known = {run for _, run in runs(first)}
    return [start for start, run in runs(second) if run in known]


def without_shared(first: str, paragraphs: list[str]) -> str:
    """`paragraphs` joined by blank lines, without those that share a run with `first`."""
    known = normalized(first)
    while True:
        pieces = [normalized(paragraph) + " " for paragraph in paragraphs]
        ends = list(accumulate(map(len, pieces)))
        shared = shared_runs(known, "".join(pieces).rstrip())
        if not shared:
            return "\n\n".join(paragraphs)
        kept = []
        for paragraph, piece, end in zip(paragraphs, pieces, ends, strict=True):
            # the first run that ends behind this paragraph's start
            at = bisect_left(shared, end - len(piece) - OVERLAP_CHARACTERS + 1)
            if at == len(shared) or shared[at] >= end:
                kept.append(paragraph)
        paragraphs = kept


def refuse_overlap(calibration: Text, evaluation: Text) -> None:
    """SettingError if the two share 80 characters of running words: such a figure would flatter the mode."""
    mine, theirs = normalized(calibration.content), normalized(evaluation.content)
    if calibration.sha256 == evaluation.sha256:
        shared = theirs
    else:
        starts = shared_runs(mine, theirs)
        if not starts:
            return
        shared = theirs[starts[0] : starts[0] + OVERLAP_CHARACTERS]
    raise SettingError(
        f"calibration text `{calibration.name}` and evaluation text `{evaluation.name}` overlap: "
        f"both have `{shared[:OVERLAP_CHARACTERS]}`",
        hint="calibrate and evaluate on different texts (`--calibration FILE`, `--text FILE`)",
    )


def token_windows(text: Text, tokenizer: Tokenizer, window_tokens: int) -> list[list[int]]:
    """Disjoint runs of `window_tokens` ids in the text's order; a shorter tail is left out.

    What the tokenizer puts before every text (a BOS token, or nothing) begins each window and counts in it.
    """
    prefix = tokenizer.encode("").ids
    size = window_tokens - len(prefix)
    ids = tokenizer.encode(text.content, add_special_tokens=False).ids
    if len(ids) < size:
        raise SettingError(
            f"text `{text.name}` has {len(ids)} tokens; one window takes {size}", hint="give a longer text"
        )
    return [prefix + ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]


def spread(windows: list[list[int]], count: int) -> list[list[int]]:
    """At most `count` of the windows, evenly spaced over all of them."""
    count = min(count, len(windows))
    return [windows[number * len(windows) // count] for number in range(count)]
