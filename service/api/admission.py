"""A typed request to a Plan: prompts as ids, one Sampling, and the checks that need the engine's figures.

schema --CompletionRequest, ChatRequest--> admission --Plan--> front/generation
"""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from service.api.answers import Wanted
from service.api.guard import RequestContext
from service.api.schema import ChatMessage, ChatRequest, CompletionRequest, GenerationRequest
from service.config import Settings
from service.errors import ContextLengthError, RequestError
from service.front.generation import Plan
from service.front.text import TextCodec
from service.messages import EngineInfo, Sampling

DEFAULT_MAX_TOKENS = 16  # of completions, as OpenAI's
MAX_LOOP_CHARACTERS = 32 << 10  # longer texts are tokenized beside the event loop


@dataclass(frozen=True, slots=True)
class Admission:
    """What a request becomes."""

    plan: Plan
    wanted: Wanted


async def admit_completion(
    request: CompletionRequest,
    context: RequestContext,
    codec: TextCodec,
    info: EngineInfo,
    settings: Settings,
) -> Admission:
    """Raises RequestError for what this model or server cannot do."""
    given = request.prompt
    batch = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    check_counts(request.n, len(batch), settings)
    texts = [prompt for prompt in batch if isinstance(prompt, str)]
    prompts = (
        await encoded(codec, texts)
        if texts
        else [checked_ids(prompt, info) for prompt in batch if isinstance(prompt, list)]
    )
    if not request.return_token_ids:
        codec.require_text("text")
    echo = bool(request.echo)
    max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    if not max_tokens and not echo:
        raise RequestError(
            "`max_tokens` is 0, accepted with `echo` only",
            hint="ask for 1 token, or for the prompt's log-probabilities with `echo`",
            param="max_tokens",
            code="integer_below_min_value",
        )
    top = -1 if request.logprobs is None else request.logprobs
    sampling = sampling_of(request, max_tokens, top, prompt_logprobs=top if echo else -1, info=info)
    echoes = tuple(
        prompt if isinstance(prompt, str) else codec.decode(prompt) for prompt in (batch if echo else ())
    )
    return Admission(
        plan_of(request, context, prompts, sampling, info), wanted_of(request, codec, top, echoes)
    )


async def admit_chat(
    request: ChatRequest, context: RequestContext, codec: TextCodec, info: EngineInfo, settings: Settings
) -> Admission:
    """Raises RequestError for what this model or server cannot do."""
    check_counts(request.n, 1, settings)
    messages = messages_of(request.messages)
    prompt = await encoded_chat(codec, messages)
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise RequestError(
            "`max_tokens` and `max_completion_tokens` are the same; send one",
            param="max_tokens",
            code="invalid_value",
        )
    limit = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
    room = info.max_context_tokens - len(prompt)
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError(
            "`top_logprobs` needs `logprobs`: true", param="top_logprobs", code="invalid_value"
        )
    top = (request.top_logprobs or 0) if request.logprobs else -1
    sampling = sampling_of(request, max(room, 1) if limit is None else limit, top, -1, info)
    return Admission(plan_of(request, context, [prompt], sampling, info), wanted_of(request, codec, top, ()))


def plan_of(
    request: GenerationRequest,
    context: RequestContext,
    prompts: list[list[int]],
    sampling: Sampling,
    info: EngineInfo,
) -> Plan:
    n = 1 if request.n is None else request.n
    for prompt in prompts:
        if not prompt:
            raise RequestError("`prompt` has no tokens", param="prompt", code="empty_prompt")
        if len(prompt) + sampling.max_tokens > info.max_context_tokens:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens and `max_tokens` is {sampling.max_tokens}; together "
                f"they may be at most {info.max_context_tokens}",
                hint="shorten the prompt or ask for fewer tokens",
                param="messages" if isinstance(request, ChatRequest) else "prompt",
            )
    return Plan(prompts, n, sampling, tuple(request.stop or ()), context.cache_salt, context.arrived_at)


def sampling_of(
    request: GenerationRequest, max_tokens: int, logprobs: int, prompt_logprobs: int, info: EngineInfo
) -> Sampling:
    """Defaults are OpenAI's; without a seed each request draws its own."""
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise RequestError(
            f"`min_tokens` is {min_tokens}, more than the {max_tokens} of `max_tokens`",
            param="min_tokens",
            code="integer_above_max_value",
        )
    stop_token_ids = request.stop_token_ids or []
    if any(id >= info.vocab_size for id in stop_token_ids):
        raise out_of_vocabulary("stop_token_ids", info)
    logit_bias = request.logit_bias or {}
    if any(id >= info.vocab_size for id in logit_bias):
        raise out_of_vocabulary("logit_bias", info)
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=max(request.top_k or 0, 0),
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        seed=secrets.randbits(63) if request.seed is None else request.seed & (2**64 - 1),
        min_tokens=min_tokens,
        ignore_eos=bool(request.ignore_eos),
        stop_token_ids=tuple(stop_token_ids),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        logit_bias=logit_bias,
    )


def wanted_of(
    request: GenerationRequest, codec: TextCodec, num_top_logprobs: int, echoes: tuple[str, ...]
) -> Wanted:
    if request.stop:
        codec.require_text("stop")
    if num_top_logprobs >= 0:
        codec.require_text("logprobs")
    options = request.stream_options
    if options is not None and not request.stream:
        raise RequestError(
            "`stream_options` needs `stream`: true", param="stream_options", code="invalid_value"
        )
    return Wanted(
        num_top_logprobs=num_top_logprobs,
        echoes=echoes,
        token_ids=bool(request.return_token_ids),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
    )


def messages_of(messages: list[ChatMessage]) -> list[dict[str, str]]:
    """As chat templates know them; `developer` is OpenAI's newer word for `system`."""
    return [
        {"role": "system" if message.role == "developer" else message.role, "content": message.content}
        | ({"name": message.name} if message.name is not None else {})
        for message in messages
    ]


async def encoded(codec: TextCodec, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    def encode() -> list[list[int]]:
        return [codec.encode(text, add_special_tokens) for text in texts]

    return encode() if sum(map(len, texts)) <= MAX_LOOP_CHARACTERS else await asyncio.to_thread(encode)


async def encoded_chat(codec: TextCodec, messages: list[dict[str, str]]) -> list[int]:
    if sum(len(message["content"]) for message in messages) <= MAX_LOOP_CHARACTERS:
        return codec.encode_chat(messages)
    return await asyncio.to_thread(codec.encode_chat, messages)


def checked_ids(ids: list[int], info: EngineInfo) -> list[int]:
    if max(ids) >= info.vocab_size:
        raise out_of_vocabulary("prompt", info)
    return ids


def check_counts(n: int | None, num_prompts: int, settings: Settings) -> None:
    """Raises RequestError for more answers than one request may ask for, before anything is tokenized."""
    n = 1 if n is None else n
    num_answers = n * num_prompts
    for setting, got, most in (
        ("max_n", n, settings.max_n),
        ("max_prompts", num_answers, settings.max_prompts),
        ("max_queue_requests", num_answers, settings.max_queue_requests),
    ):
        if got > most:
            many_prompts = got > n
            param = "prompt" if many_prompts else "n"
            raise RequestError(
                f"`{param}` asks for {got} answers, at most {most} are accepted",
                hint=f"split the request, or start the server with a larger `{setting}`",
                param=param,
                code="array_above_max_length" if many_prompts else "integer_above_max_value",
            )


def out_of_vocabulary(param: str, info: EngineInfo) -> RequestError:
    return RequestError(
        f"`{param}` holds a token id beyond the vocabulary; accepted are 0 to {info.vocab_size - 1}",
        param=param,
        code="invalid_token_id",
    )
