"""Answers in OpenAI's shapes: whole bodies, and chunks of a stream as bytes.

front/generation --Delta--> CompletionFormat | ChatFormat --bytes--> sse, or a JSON body

A streamed token costs one `orjson.dumps` of its text between two precomputed byte strings; only what a client
asks for besides the text (log-probabilities, token ids) is built as a dict.
"""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import orjson

from service.front.generation import Answer, Delta, Generation
from service.front.text import TextCodec
from service.messages import TokenLogprobs

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot say
DONE = b"data: [DONE]\n\n"
USAGE = b'"usage":'
PLACE = "\x00"  # a text that JSON writes in a way of its own, replaced by each token's


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a client asked for besides the text."""

    num_top_logprobs: int = -1  # -1: no log-probabilities
    echoes: tuple[str, ...] = ()  # by prompt, the text that stands before its answers; empty: no echo
    token_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False


class AnswerFormat(ABC):
    """What the endpoints share; one instance a client request, over one Generation."""

    whole_name: str
    chunk_name: str

    def __init__(
        self, id: str, model: str, fingerprint: str, wanted: Wanted, codec: TextCodec, generation: Generation
    ) -> None:
        self.id = id
        self.wanted = wanted
        self.codec = codec
        self.generation = generation
        self.common = {"created": int(time.time()), "model": model, "system_fingerprint": fingerprint}
        self.text_only = wanted.num_top_logprobs < 0 and not wanted.token_ids and not wanted.echoes
        self._begun = [False] * len(generation.answers)
        self._frames = [self._frame(answer) for answer in generation.answers] if self.text_only else []

    @abstractmethod
    def opening(self, answer: Answer) -> bytes:
        """Events before an answer's first delta."""

    @abstractmethod
    def streamed(self, text: str | None) -> dict[str, Any]:
        """The field of a streamed choice that holds `text`; None: of its last chunk, which has none."""

    @abstractmethod
    def whole(self, text: str) -> dict[str, Any]:
        """The field of a whole choice that holds `text`."""

    @abstractmethod
    def logprobs(self, answer: Answer, delta: Delta, first: bool) -> dict[str, Any]:
        """The field `logprobs` for a delta's tokens; `first`: the answer's first delta."""

    # --- whole bodies --------------------------------------------------------------------------

    def body(self, deltas: list[Delta]) -> bytes:
        """Each answer's deltas joined into one -> the response."""
        choices = []
        for answer, delta in zip(self.generation.answers, deltas, strict=True):
            choice = {
                "index": answer.index,
                **self.whole(self.echo(answer) + delta.text),
                "logprobs": None if self.wanted.num_top_logprobs < 0 else self.logprobs(answer, delta, True),
                "finish_reason": answer.finish_reason,
            }
            if self.wanted.token_ids:
                choice |= {"prompt_token_ids": answer.prompt, "token_ids": delta.token_ids}
            choices.append(choice)
        head = {"id": self.id, "object": self.whole_name, **self.common}
        return orjson.dumps({**head, "choices": choices, "usage": self.usage()})

    def usage(self) -> dict[str, Any]:
        prompt, completion = self.generation.num_prompt_tokens, self.generation.num_completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.generation.num_cached_tokens},
        }

    def echo(self, answer: Answer) -> str:
        """The prompt's text where the client wants it before the answer."""
        echoes = self.wanted.echoes
        return echoes[answer.index // self.generation.plan.num_answers] if echoes else ""

    # --- streams -------------------------------------------------------------------------------

    def events(self, answer: Answer, delta: Delta) -> bytes:
        """What one step added to one answer -> its events; nothing where it added nothing.

        A token whose text is not certain yet (half a character, what may become a stop string) has an event
        with empty text: a client that measures the time between tokens sees each of them.
        """
        first = not self._begun[answer.index]
        grew = bool(delta.text or delta.token_ids)
        if first:
            self._begun[answer.index] = True
        if self.text_only:
            if first:
                events = self.opening(answer)
            elif grew and answer.finish_reason is None and not self.wanted.continuous_usage:
                before, after = self._frames[answer.index]
                return before + orjson.dumps(delta.text) + after
            else:
                events = b""
            if self.wanted.continuous_usage and delta.token_ids:
                before, after = self._frames[answer.index]
                events += before + orjson.dumps(delta.text) + after + orjson.dumps(self.usage()) + b"}\n\n"
            elif grew:
                before, after = self._frames[answer.index]
                events += before + orjson.dumps(delta.text) + after
        else:
            events = self.opening(answer) if first else b""
            if first or grew:
                events += self._rich_event(answer, delta, first)
        if answer.finish_reason is not None:
            last = {"index": answer.index, **self.streamed(None), "logprobs": None}
            events += self._event({**last, "finish_reason": answer.finish_reason})
        return events

    def closing(self) -> bytes:
        """The end of a stream that went well."""
        if not self.wanted.include_usage:
            return DONE
        head = {"id": self.id, "object": self.chunk_name, **self.common}
        return b"data: " + orjson.dumps({**head, "choices": [], "usage": self.usage()}) + b"\n\n" + DONE

    def _rich_event(self, answer: Answer, delta: Delta, first: bool) -> bytes:
        """One chunk with all that was asked for."""
        text = self.echo(answer) + delta.text if first else delta.text
        with_logprobs = self.wanted.num_top_logprobs >= 0
        choice = {
            "index": answer.index,
            **self.streamed(text),
            "logprobs": self.logprobs(answer, delta, first) if with_logprobs else None,
            "finish_reason": None,
        }
        if self.wanted.token_ids:
            choice["token_ids"] = delta.token_ids
            if first:
                choice["prompt_token_ids"] = answer.prompt
        return self._event(choice)

    def _event(self, choice: dict[str, Any]) -> bytes:
        chunk = {"id": self.id, "object": self.chunk_name, **self.common, "choices": [choice]}
        if self.wanted.continuous_usage:
            chunk["usage"] = self.usage()
        elif self.wanted.include_usage:
            chunk["usage"] = None
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    def _frame(self, answer: Answer) -> tuple[bytes, bytes]:
        """The bytes before and after the text of a chunk that holds nothing else."""
        choice = {"index": answer.index, **self.streamed(PLACE), "logprobs": None, "finish_reason": None}
        before, _, after = self._event(choice).partition(orjson.dumps(PLACE))
        if self.wanted.continuous_usage:  # which each chunk puts behind it anew
            after = after[: after.rindex(USAGE) + len(USAGE)]
        return before, after


class CompletionFormat(AnswerFormat):
    whole_name = "text_completion"
    chunk_name = "text_completion"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._offsets = [0] * len(self.generation.answers)

    def opening(self, answer: Answer) -> bytes:
        return b""

    def streamed(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}

    def whole(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def logprobs(self, answer: Answer, delta: Delta, first: bool) -> dict[str, Any]:
        rows: list[tuple[int, TokenLogprobs | None]] = []
        if first and self.wanted.echoes:
            rows += zip(answer.prompt, answer.prompt_logprobs or [None] * len(answer.prompt), strict=True)
        rows += zip(delta.token_ids, delta.logprobs or [], strict=True)
        offsets = []
        for id, _ in rows:
            offsets.append(self._offsets[answer.index])
            self._offsets[answer.index] += num_characters(self.codec.piece(id))
        return {
            "tokens": [self.token(id) for id, _ in rows],
            "token_logprobs": [row and max(row.logprob, LOWEST_LOGPROB) for _, row in rows],
            "top_logprobs": [self.likeliest(row) for _, row in rows]
            if self.wanted.num_top_logprobs
            else None,
            "text_offset": offsets,
        }

    def likeliest(self, row: TokenLogprobs | None) -> dict[str, float] | None:
        """The wanted number of likeliest tokens, and the sampled one; None for a first token."""
        if row is None:
            return None
        top: dict[str, float] = {}
        for id, logprob in zip(row.top_ids, row.top_logprobs, strict=True):
            top.setdefault(self.token(id), max(logprob, LOWEST_LOGPROB))
        top.setdefault(self.token(row.token_id), max(row.logprob, LOWEST_LOGPROB))
        return top

    def token(self, id: int) -> str:
        """A token's text; part of a character is written `bytes:\\xe2\\x82`, as OpenAI does."""
        spelling = self.codec.spelling(id)
        try:
            return spelling.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)


class ChatFormat(AnswerFormat):
    whole_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def opening(self, answer: Answer) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return self._event({"index": answer.index, "delta": delta, "logprobs": None, "finish_reason": None})

    def streamed(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}

    def whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, answer: Answer, delta: Delta, first: bool) -> dict[str, Any]:
        content = []
        for row in delta.logprobs or []:
            top = list(zip(row.top_ids, row.top_logprobs, strict=True))[: self.wanted.num_top_logprobs]
            entry = self.token(row.token_id, row.logprob)
            content.append({**entry, "top_logprobs": [self.token(id, logprob) for id, logprob in top]})
        return {"content": content, "refusal": None}

    def token(self, id: int, logprob: float) -> dict[str, Any]:
        spelling = self.codec.spelling(id)
        return {
            "token": spelling.decode(errors="replace"),
            "logprob": max(logprob, LOWEST_LOGPROB),
            "bytes": list(spelling),
        }


def num_characters(piece: bytes) -> int:
    """Characters that begin in these bytes of UTF-8."""
    return sum((byte & 0xC0) != 0x80 for byte in piece)
