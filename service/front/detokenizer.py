"""Token ids to text as they come: what is sent never has to be taken back.

engine Output --Detokenizer--> text --StopMatcher--> text for the client

A token is a run of bytes (`token_bytes`), so a character split over tokens waits for its last byte, and the
joined deltas are the decoded whole by construction. The tokenizers library's own DecodeStream is as fast per
token, but its cost grows with the square of a run of invalid bytes, and it sends nothing meanwhile.
"""

import codecs
import json
from collections.abc import Sequence

from tokenizers import Tokenizer

from service.errors import CheckpointError


def byte_of_character() -> dict[str, int]:
    """The 256 printable characters by which byte-level vocabularies write bytes (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHARACTER = byte_of_character()


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """By id, the bytes each token stands for; ids that the vocabulary leaves out have none.

    Raises CheckpointError for a decoder that is neither byte-level nor sentencepiece's.
    """
    decoder = json.loads(tokenizer.to_str())["decoder"] or {"type": "none"}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"] for step in steps}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    if kinds == {"ByteLevel"}:
        for token, id in vocabulary.items():
            try:
                pieces[id] = bytes([BYTE_OF_CHARACTER[character] for character in token])
            except KeyError:  # an added token, spelled as itself
                pieces[id] = token.encode()
        return pieces
    if kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        replacements = [
            (step.get("replacement", "▁"), " ")
            if step["type"] == "Metaspace"
            else (step["pattern"]["String"], step["content"])
            for step in steps
            if step["type"] in ("Metaspace", "Replace")
        ]
        for token, id in vocabulary.items():
            if "ByteFallback" in kinds and len(token) == 6 and token[:3] == "<0x" and token[5] == ">":
                pieces[id] = bytes.fromhex(token[3:5])
                continue
            for old, new in replacements:
                token = token.replace(old, new)
            pieces[id] = token.encode()
        return pieces
    raise CheckpointError(
        f"tokenizer decoder `{'+'.join(sorted(kinds))}` is not supported",
        hint="supported are byte-level decoders and sentencepiece's (Replace, ByteFallback, Fuse, Strip)",
    )


class Detokenizer:
    """One answer's ids -> its text."""

    __slots__ = ("_decode", "_pieces")

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def feed(self, id: int) -> str:
        """The text that is certain after one more token; empty inside a character."""
        # a model's vocabulary may be padded beyond the tokenizer's
        return self._decode(self._pieces[id]) if id < len(self._pieces) else ""

    def finish(self) -> str:
        """A replacement character where the answer ended inside a character, else nothing."""
        return self._decode(b"", True)


class StopMatcher:
    """Cuts an answer before the first stop string to be completed, wherever the deltas are cut.

    What may still become a stop string is held back. Each stop string is matched by its prefix function
    (Knuth, Morris, Pratt), so the cost per character does not depend on the text.
    """

    __slots__ = ("_failures", "_first", "_held", "_states", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._failures = [prefix_function(stop) for stop in stops]
        self._states = [0] * len(stops)  # characters of each stop string matched so far
        self._first = frozenset(stop[0] for stop in stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """-> (text that may be sent, whether a stop string is complete)."""
        if not self._held and self._first.isdisjoint(text):
            return text, False
        states = self._states
        for position, character in enumerate(text):
            matched = 0
            for which, stop in enumerate(self._stops):
                state = states[which]
                failure = self._failures[which]
                while state and stop[state] != character:
                    state = failure[state - 1]
                if stop[state] == character:
                    state += 1
                    if state == len(stop):
                        matched = max(matched, state)
                        state = failure[state - 1]
                states[which] = state
            if matched:
                whole = self._held + text[: position + 1]
                self._held = ""
                return whole[:-matched], True
        whole = self._held + text
        certain = len(whole) - max(states)
        self._held = whole[certain:]
        return whole[:certain], False

    def finish(self) -> str:
        """What was held back, once no more can come."""
        return self._held


def prefix_function(pattern: str) -> list[int]:
    """By position, the longest proper prefix of `pattern` that ends there."""
    table = [0] * len(pattern)
    state = 0
    for position in range(1, len(pattern)):
        while state and pattern[position] != pattern[state]:
            state = table[state - 1]
        if pattern[position] == pattern[state]:
            state += 1
        table[position] = state
    return table
