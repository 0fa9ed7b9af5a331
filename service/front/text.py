"""Text to token ids and back, by `tokenizer.json` and the operator's chat template.

messages --render--> text --encode--> ids (to the engine) ... ids --pieces--> bytes (front/detokenizer)

Control tokens (the tokenizer's special ones) come from the template, or from a raw prompt; their spelling
inside a chat message is only text. The tokenizer cannot tell the two apart in one string, so it never looks
for special tokens by their spelling: each has a twin, an added token whose text is a random string drawn at
load, and `encode` writes the twin where a control token is meant. Twin ids are mapped back afterwards.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import AddedToken, Tokenizer

from service.errors import CheckpointError, RequestError
from service.front.chat_template import ChatTemplate
from service.front.detokenizer import token_bytes

Message = Mapping[str, str]


class TextCodec:
    """One checkpoint's tokenizer and chat template; safe to use from several threads."""

    pieces: list[bytes]  # by token id, the bytes it adds to an answer; special tokens add none
    spellings: list[bytes]  # the same, with special tokens spelled out

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self.tokenizer = tokenizer
        self.template = template
        added = tokenizer.get_added_tokens_decoder()
        special = {token.content: id for id, token in added.items() if token.special}
        self.special_ids = frozenset(special.values())
        self.spellings = token_bytes(tokenizer)
        self.pieces = [b"" if id in self.special_ids else piece for id, piece in enumerate(self.spellings)]
        self.num_tokens = len(self.spellings)
        # private-use characters are left alone by normalizers; eight drawn ones cannot be guessed by a client
        secret = "".join(chr(0xF0000 + secrets.randbelow(0xFFFD)) for _ in range(8))
        self._twins = {text: f"{secret}\U00100000{chr(0x100010 + n)}" for n, text in enumerate(special)}
        self._shields = {text: f"{secret}\U00100001{chr(0x100010 + n)}" for n, text in enumerate(special)}
        self._special_pattern = any_of(special)
        self._shield_pattern = any_of(self._shields.values())
        self._unshielded = {shield: text for text, shield in self._shields.items()}
        tokenizer.add_tokens([twin_of(added[id], self._twins[text]) for text, id in special.items()])
        tokenizer.encode_special_tokens = True  # by their spelling they are text
        self._originals = {tokenizer.token_to_id(self._twins[text]): id for text, id in special.items()}

    @classmethod
    def load(cls, model_path: Path, chat_template: str = "") -> Self:
        """A checkpoint folder, and the file of another template (empty: the checkpoint's own).

        Raises CheckpointError where either cannot be read.
        """
        path = model_path / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise CheckpointError(
                f"`{path}` cannot be read as a tokenizer: {error}",
                hint="halftone reads the `tokenizers` format, which transformers converts others to; name a "
                "folder with one by `--tokenizer`, or serve token ids alone with `--tokenizer none`",
            ) from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, ChatTemplate.load(model_path, chat_template))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """A raw prompt -> ids; special tokens are recognised by their spelling."""
        return self._encode(self._special_pattern.sub(self._twin, text), add_special_tokens)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Messages -> ids, as transformers' `apply_chat_template` with a generation prompt.

        Raises RequestError where the template refuses the messages, or there is none.
        """
        if self.template is None:
            raise RequestError(
                "this model has no chat template",
                hint="use /v1/completions, or start the server with --chat-template FILE",
                code="no_chat_template",
            )
        hidden = [
            {key: self._special_pattern.sub(self._shield, value) for key, value in message.items()}
            for message in messages
        ]
        text = self._special_pattern.sub(self._twin, self.template.render(hidden))
        return self._encode(self._shield_pattern.sub(self._unshield, text), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text with special tokens spelled out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def piece(self, id: int) -> bytes:
        """What one token adds to an answer's text; ids beyond the tokenizer's add nothing."""
        return self.pieces[id] if id < len(self.pieces) else b""

    def spelling(self, id: int) -> bytes:
        """The same, with special tokens spelled out."""
        return self.spellings[id] if id < len(self.spellings) else b""

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        originals = self._originals
        return [originals.get(id, id) for id in ids]

    def require_text(self, param: str) -> None:
        """Returns: `param` of a request can be read or answered as text."""

    def _twin(self, match: re.Match[str]) -> str:
        return self._twins[match[0]]

    def _shield(self, match: re.Match[str]) -> str:
        return self._shields[match[0]]

    def _unshield(self, match: re.Match[str]) -> str:
        return self._unshielded[match[0]]


class IdsOnly(TextCodec):
    """Where there is no tokenizer: prompts and answers are token ids, and all that needs text is refused."""

    def __init__(self) -> None:
        self.template = None
        self.special_ids = frozenset()
        self.pieces = self.spellings = []
        self.num_tokens = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        raise no_tokenizer("prompt")

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        raise no_tokenizer("messages")

    def decode(self, ids: Sequence[int]) -> str:
        raise no_tokenizer("echo")

    def require_text(self, param: str) -> None:
        raise no_tokenizer(param)


def no_tokenizer(param: str) -> RequestError:
    return RequestError(
        f"this server has no tokenizer, and `{param}` needs one",
        hint="send token ids and `return_token_ids`: true, or start the server with `--tokenizer FOLDER`",
        param=param,
        code="no_tokenizer",
    )


def any_of(texts: Any) -> re.Pattern[str]:
    """The leftmost longest of `texts`, as the tokenizer itself would match; none of none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def twin_of(token: AddedToken, text: str) -> AddedToken:
    return AddedToken(
        text,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=False,
    )
