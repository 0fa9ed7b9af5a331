"""openai-python in strict validation against the real server: every shape it knows, it must get."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from api_rig import Server
from fake_engine import reply
from openai.types import Completion

MODEL = "tiny"
USER: Any = [{"role": "user", "content": "hello world"}]


def options(server: Server) -> dict[str, Any]:
    return {
        "base_url": f"{server.url}/v1",
        "api_key": "none",
        "max_retries": 0,
        "_strict_response_validation": True,
    }


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(**options(server)) as client:
        yield client


@pytest.fixture(scope="module")
def lax(server: Server) -> Iterator[openai.OpenAI]:
    """For what OpenAI's servers send and its own types do not allow; see `checked`."""
    with openai.OpenAI(**options(server) | {"_strict_response_validation": False}) as client:
        yield client


def checked(completion: Completion) -> Completion:
    """Validated with only the nulls filled in that the published types leave out: a streamed choice's finish
    reason before the last, and the log-probability of a prompt's first token."""
    fields = completion.model_dump()
    for choice in fields["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        logprobs = choice["logprobs"]
        if logprobs and logprobs["token_logprobs"] and logprobs["token_logprobs"][0] is None:
            logprobs["token_logprobs"][0] = 0.0
            if logprobs["top_logprobs"]:
                logprobs["top_logprobs"][0] = {}
    Completion.model_validate(fields, strict=True)
    return completion


def answer(server: Server, prompt: list[int], num_tokens: int, sample_index: int = 0) -> str:
    """The text that the fake engine gives to `prompt`."""
    vocab_size = server.host.client.info.vocab_size  # type: ignore[union-attr]
    ids = reply(prompt, num_tokens, vocab_size, sample_index)
    return b"".join(server.codec.piece(id) for id in ids).decode(errors="replace")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "halftone"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"


def test_completion(server: Server, client: openai.OpenAI) -> None:
    got = client.completions.create(model=MODEL, prompt="hello world", max_tokens=9)
    prompt = server.codec.encode("hello world")
    (choice,) = got.choices
    assert (choice.index, choice.finish_reason) == (0, "length")
    assert choice.text == answer(server, prompt, 9)
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(prompt), 9)
    assert got.usage.total_tokens == len(prompt) + 9
    assert got.system_fingerprint is not None
    assert got.system_fingerprint.endswith("-bf16")


def test_completions_default_to_16_tokens(client: openai.OpenAI) -> None:
    got = client.completions.create(model=MODEL, prompt="hello")
    assert got.usage is not None
    assert got.usage.completion_tokens == 16


def test_completion_stream(server: Server, lax: openai.OpenAI) -> None:
    stream = lax.completions.create(
        model=MODEL, prompt="hello world", max_tokens=9, stream=True, stream_options={"include_usage": True}
    )
    chunks = [checked(chunk) for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9
    assert all(chunk.usage is None for chunk in chunks[:-1])
    text = "".join(chunk.choices[0].text for chunk in chunks[:-1])
    assert text == answer(server, server.codec.encode("hello world"), 9)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert len({chunk.id for chunk in chunks}) == 1


def test_lists_of_prompts_and_answers(server: Server, client: openai.OpenAI) -> None:
    prompts = ["hello", "the quick", "日本語"]
    got = client.completions.create(model=MODEL, prompt=prompts, max_tokens=4, n=2)
    ids = [server.codec.encode(prompt) for prompt in prompts]
    assert [choice.index for choice in got.choices] == list(range(6))
    assert [choice.text for choice in got.choices] == [
        answer(server, prompt, 4, sample) for prompt in ids for sample in range(2)
    ]
    assert got.usage is not None
    assert got.usage.prompt_tokens == sum(map(len, ids))
    assert got.usage.completion_tokens == 24


def test_token_ids_as_prompts(server: Server, client: openai.OpenAI) -> None:
    one = client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=4)
    several = client.completions.create(model=MODEL, prompt=[[5, 6, 7], [8]], max_tokens=4)
    assert one.choices[0].text == several.choices[0].text == answer(server, [5, 6, 7], 4)
    assert several.choices[1].text == answer(server, [8], 4)


def test_streamed_answers_interleave_by_index(server: Server, lax: openai.OpenAI) -> None:
    stream = lax.completions.create(model=MODEL, prompt=["hello", "world"], max_tokens=5, n=2, stream=True)
    texts = [""] * 4
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    prompts = [server.codec.encode(prompt) for prompt in ("hello", "world")]
    assert texts == [answer(server, prompt, 5, sample) for prompt in prompts for sample in range(2)]


def test_chat(server: Server, client: openai.OpenAI) -> None:
    got = client.chat.completions.create(model=MODEL, messages=USER, max_completion_tokens=9, n=2)
    prompt = server.codec.encode_chat(USER)
    assert [choice.message.content for choice in got.choices] == [
        answer(server, prompt, 9, sample) for sample in range(2)
    ]
    assert {choice.message.role for choice in got.choices} == {"assistant"}
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(prompt), 18)


def test_chat_takes_the_rest_of_the_window(server: Server, client: openai.OpenAI) -> None:
    got = client.chat.completions.create(model=MODEL, messages=USER)
    assert got.usage is not None
    assert got.usage.total_tokens == 2048
    assert got.choices[0].finish_reason == "length"


def test_chat_stream(server: Server, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=USER, max_tokens=9, stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer(server, server.codec.encode_chat(USER), 9)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_chat_log_probabilities(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=3, logprobs=True, top_logprobs=2
    )
    logprobs = got.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [len(row.top_logprobs) for row in logprobs.content] == [2, 2, 2]
    text = b"".join(bytes(row.bytes or []) for row in logprobs.content).decode(errors="replace")
    assert text == got.choices[0].message.content


def test_streamed_log_probabilities_are_the_same(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": USER, "max_tokens": 3, "logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    streamed = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        logprobs = chunk.choices[0].logprobs
        streamed += (logprobs.content or []) if logprobs else []
    assert whole is not None
    assert streamed == whole.content


def test_scoring_a_prompt(server: Server, lax: openai.OpenAI) -> None:
    got = checked(
        lax.completions.create(model=MODEL, prompt="hello world 日本", max_tokens=0, echo=True, logprobs=1)
    )
    (choice,) = got.choices
    assert choice.text == "hello world 日本"
    assert choice.logprobs is not None
    num_tokens = len(server.codec.encode("hello world 日本"))
    assert choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == num_tokens
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob == -0.25 for logprob in choice.logprobs.token_logprobs[1:])
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.text_offset is not None
    assert [choice.text[offset] for offset in choice.logprobs.text_offset[:2]] == ["h", "l"]
    assert got.usage is not None
    assert got.usage.completion_tokens == 0


def test_echo_stands_before_the_answer(server: Server, lax: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "prompt": "hello", "max_tokens": 3, "echo": True, "logprobs": 0}
    whole = checked(lax.completions.create(**asked)).choices[0]
    prompt = server.codec.encode("hello")
    assert whole.text == "hello" + answer(server, prompt, 3)
    assert whole.logprobs is not None
    assert len(whole.logprobs.tokens or []) == len(prompt) + 3
    chunks = [checked(chunk) for chunk in lax.completions.create(**asked, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    tokens = [token for chunk in chunks if (got := chunk.choices[0].logprobs) for token in got.tokens or []]
    assert tokens == whole.logprobs.tokens


def test_echo_before_each_of_several_answers(lax: openai.OpenAI) -> None:
    """Choices are numbered prompt by prompt: each has its own prompt before it."""
    got = checked(
        lax.completions.create(model=MODEL, prompt=["hello", "world"], n=2, max_tokens=1, echo=True, seed=1)
    )
    assert [choice.text[:5] for choice in got.choices] == ["hello", "hello", "world", "world"]
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]


def test_usage_so_far_on_each_chunk(lax: openai.OpenAI) -> None:
    stream = lax.completions.create(
        model=MODEL,
        prompt="hello",
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
    )
    counts = [chunk.usage.completion_tokens for chunk in stream if chunk.usage]
    assert counts[:5] == [1, 2, 3, 4, 5]
    assert counts[-1] == 5


def test_token_ids_on_request(server: Server, lax: openai.OpenAI) -> None:
    vocab_size = server.host.client.info.vocab_size  # type: ignore[union-attr]
    prompt = server.codec.encode("hello")
    asked: Any = {
        "model": MODEL, "prompt": "hello", "max_tokens": 5, "extra_body": {"return_token_ids": True}
    }  # fmt: skip
    whole = lax.completions.create(**asked).choices[0].model_dump()
    assert (whole["prompt_token_ids"], whole["token_ids"]) == (prompt, reply(prompt, 5, vocab_size))
    streamed = [chunk.choices[0].model_dump() for chunk in lax.completions.create(**asked, stream=True)]
    assert streamed[0]["prompt_token_ids"] == prompt
    assert [id for chunk in streamed for id in chunk.get("token_ids", [])] == whole["token_ids"]


def test_every_optional_field_may_be_null(client: openai.OpenAI) -> None:
    fields = (
        "max_tokens max_completion_tokens temperature top_p n stream stream_options stop seed logprobs "
        "top_logprobs user presence_penalty frequency_penalty logit_bias tools tool_choice response_format "
        "top_k min_p min_tokens ignore_eos stop_token_ids return_token_ids"
    )
    body: Any = dict.fromkeys(fields.split())
    got = client.chat.completions.create(model=MODEL, messages=USER, extra_body={**body, "max_tokens": 2})
    assert got.usage is not None
    assert got.usage.completion_tokens == 2


def test_values_that_ask_for_nothing_are_taken(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "developer", "content": [{"type": "text", "text": "be brief"}]}, *USER],
        max_tokens=2,
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        temperature=0,
        top_p=1,
        seed=-1,
        user="someone",
        store=False,
    )
    assert got.choices[0].finish_reason == "length"


def test_errors_reach_the_caller_typed(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x", temperature=2.5)
    assert (caught.value.code, caught.value.param) == ("decimal_above_max_value", "temperature")
    assert "temperature" in caught.value.message


def test_async_client(server: Server) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(**options(server)) as client:
            whole = await client.chat.completions.create(model=MODEL, messages=USER, max_tokens=5)
            stream = await client.chat.completions.create(
                model=MODEL, messages=USER, max_tokens=5, stream=True
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == whole.choices[0].message.content
            several = await asyncio.gather(
                *(
                    client.completions.create(model=MODEL, prompt=[number + 3], max_tokens=7)
                    for number in range(20)
                )
            )
            assert [got.choices[0].text for got in several] == [
                answer(server, [number + 3], 7) for number in range(20)
            ]

    asyncio.run(main())
