"""What clients may send, typed and bounded; every other field, type or number is an error that names it.

guard (JSON) --parse--> CompletionRequest, ChatRequest, ... --> admission

Strict: `"1"`, `true` and `1.5` are no integers, `null` is the same as leaving an optional field out. Fields
that OpenAI knows and this server does not act on are accepted only with a value that asks for nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from typing_extensions import TypeAliasType

from service.api.fields import (
    MAX_TOKEN_ID,
    MAX_TOKENS,
    Content,
    LogitBias,
    ModelName,
    Prompt,
    Stop,
    StopTokenIds,
    TokenId,
)
from service.errors import RequestError

MAX_MESSAGES = 1024
MAX_TOP_LOGPROBS = 20
MAX_REPETITION_PENALTY = 10


class Body(BaseModel):
    """Base of every request body."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    # OpenAI's fields that this server does not act on -> the values that ask for nothing
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="A last chunk with the usage and no choices.")
    continuous_usage_stats: bool | None = Field(None, description="The usage so far on each chunk.")


class GenerationRequest(Body):
    """What completions and chat completions share."""

    model: ModelName
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; default 1.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKEN_ID, description="0 and -1 are off.")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="Subtracted once from each token that the answer has already."
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="Subtracted for each time that the answer has the token already."
    )
    repetition_penalty: float | None = Field(
        None,
        gt=0,
        le=MAX_REPETITION_PENALTY,
        description="Divides positive, multiplies negative logits of tokens in prompt or answer; 1 is off.",
    )
    logit_bias: LogitBias = Field(None, description="Added to the logits of these token ids.")
    n: int | None = Field(None, ge=1, le=128, description="Answers to each prompt; default 1.")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stop = None
    stop_token_ids: StopTokenIds | None = None
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS, description="No stop token before this many.")
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = Field(None, description="Adds `prompt_token_ids` and `token_ids`.")
    user: str | None = Field(None, max_length=256, description="Not used; accepted because clients send it.")


NO_OP: dict[str, tuple[Any, ...]] = {
    "priority": (None, 0),
    "prompt_logprobs": (None,),
}


class CompletionRequest(GenerationRequest):
    prompt: Prompt
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS, description="Default 16; 0 only with `echo`.")
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = Field(None, description="The prompt stands before the answer.")

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **NO_OP,
        "best_of": (None, 1),
        "suffix": (None, ""),
    }


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = Field(None, max_length=64)

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "refusal": (None,),
        "audio": (None,),
        "annotations": (None, []),
        "function_call": (None,),
        "tool_calls": (None, []),
        "tool_call_id": (None,),
    }


Messages = TypeAliasType(
    "Messages", Annotated[list[ChatMessage], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
)


class ChatRequest(GenerationRequest):
    messages: Messages
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="Default: the rest of the window.")
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="As `max_tokens`.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **NO_OP,
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "parallel_tool_calls": (None, True, False),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "response_format": (None, {"type": "text"}),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "reasoning_effort": (None,),
        "verbosity": (None,),
        "store": (None, False),
        "metadata": (None, {}),
        "service_tier": (None, "auto", "default"),
        "web_search_options": (None,),
        "chat_template": (None,),
        "chat_template_kwargs": (None, {}),
        "add_generation_prompt": (None, True),
        "continue_final_message": (None, False),
    }


class TokenizeRequest(Body):
    """One of `prompt` and `messages`."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="Of a `prompt`; default true.")


class DetokenizeRequest(Body):
    model: ModelName | None = None
    tokens: Annotated[list[TokenId], FailFast()]


B = TypeVar("B", bound=Body)


def parse(body_type: type[B], body: Any) -> B:
    """Parsed JSON -> a typed request, or a RequestError for the first thing that is wrong."""
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object", hint="send `{...}`", code="invalid_json")
    body = without_no_ops(body_type, body)
    messages = body.get("messages")
    if isinstance(messages, list):
        if len(messages) > MAX_MESSAGES:
            raise RequestError(
                f"`messages` holds {len(messages)} messages, at most {MAX_MESSAGES} are accepted",
                param="messages",
                code="array_above_max_length",
            )
        body["messages"] = [
            without_no_ops(ChatMessage, item, f"messages[{number}].") if isinstance(item, dict) else item
            for number, item in enumerate(messages)
        ]
    try:
        return body_type.model_validate(body)
    except ValidationError as error:
        raise request_error(error) from None


def without_no_ops(body_type: type[Body], body: dict[str, Any], path: str = "") -> dict[str, Any]:
    """The fields to validate: unsupported ones that ask for nothing are dropped, others raise."""
    kept = {}
    for name, value in body.items():
        if name in body_type.model_fields:
            kept[name] = value
            continue
        param = f"{path}{name[:64]}"
        if name not in body_type.unsupported:
            raise RequestError(
                f"`{param}` is not a parameter of this request",
                hint="accepted are " + ", ".join(body_type.model_fields),
                param=param,
                code="unknown_parameter",
            )
        accepted = body_type.unsupported[name]
        asks_for_nothing = any(type(value) is type(other) and value == other for other in accepted)
        if name == "best_of" and type(value) is int and value == body.get("n"):
            asks_for_nothing = True  # the best n of n are all
        if not asks_for_nothing:
            raise RequestError(
                f"`{param}` is not supported, got {described(value)}",
                hint="leave it out",
                param=param,
                code="unsupported_parameter",
            )
    return kept


def body_schema(body_type: type[Body]) -> dict[str, Any]:
    """The request body's place in /openapi.json; `app` adds the schemas it refers to."""
    reference = {"$ref": f"#/components/schemas/{body_type.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "greater_than": "below_min_value",
    "greater_than_equal": "below_min_value",
    "less_than": "above_max_value",
    "less_than_equal": "above_max_value",
    "too_long": "array_above_max_length",
    "too_short": "array_below_min_length",
    "string_too_long": "string_above_max_length",
    "string_too_short": "string_below_min_length",
    "literal_error": "invalid_value",
    "finite_number": "invalid_number",
}


def request_error(error: ValidationError) -> RequestError:
    """Pydantic's first complaint in OpenAI's words."""
    first = error.errors(include_url=False)[0]
    param = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"] if part != "list"
    )[1:]
    kind = first["type"]
    code = CODES.get(kind, "invalid_type" if kind.endswith(("_type", "_from_float")) else kind)
    if code.endswith(("above_max_value", "below_min_value")):
        code = f"{'integer' if type(first['input']) is int else 'decimal'}_{code}"
    if param == "messages" and kind in ("too_short", "missing"):
        code = "empty_prompt" if kind == "too_short" else code
    message = first["msg"][:1].lower() + first["msg"][1:]
    if kind == "missing":
        return RequestError(f"`{param}` is required", param=param, code=code)
    return RequestError(f"`{param}`: {message}, got {described(first['input'])}", param=param, code=code)


def described(value: Any) -> str:
    """A client's value in at most about 80 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"the string `{value[:64]}`" if len(value) <= 64 else f"a string of {len(value)} characters"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {len(value)} fields"
    return repr(value)[:64]
