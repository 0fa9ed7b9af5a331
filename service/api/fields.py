"""The types of single fields that Pydantic has no word for: prompts, texts, stops, biases; each bounded.

schema --raw value--> check_* --> typed value, or one error in OpenAI's words
"""

from typing import Annotated, Any, LiteralString

from pydantic import BeforeValidator, FailFast, Field, StringConstraints, WithJsonSchema
from pydantic_core import PydanticCustomError
from typing_extensions import TypeAliasType

MAX_TOKENS = 2**31 - 1
MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_TOKEN_ID = 2**31 - 1
MAX_LOGIT_BIASES = 300
MAX_LOGIT_BIAS = 100

PROMPT_KINDS: LiteralString = "must be a string, strings, token ids or lists of token ids"
Prompts = str | list[str] | list[int] | list[list[int]]


def check_prompt(value: Any) -> Prompts:
    """One pass, one error: a validator per list item would answer 99 KB of wrong items with megabytes."""
    if isinstance(value, str):
        if not value:
            raise PydanticCustomError("empty_prompt", "must not be empty")
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("invalid_type", PROMPT_KINDS)
    if not value:
        raise PydanticCustomError("empty_prompt", "must not be empty")
    kind = type(value[0])
    if kind is int:
        return check_token_ids(value)
    if kind is list:
        return [check_token_ids(item) for item in value]
    if kind is str and set(map(type, value)) == {str}:
        if not all(value):
            raise PydanticCustomError("empty_prompt", "must not contain an empty prompt")
        return value
    raise PydanticCustomError("invalid_type", PROMPT_KINDS)


def check_token_ids(value: Any) -> list[int]:
    """A non-empty list of integers; `vocab_size` is the engine's business, asked when it is known."""
    if value == []:
        raise PydanticCustomError("empty_prompt", "must not contain an empty prompt")
    if not isinstance(value, list) or set(map(type, value)) != {int}:
        raise PydanticCustomError("invalid_type", PROMPT_KINDS)
    if min(value) < 0 or max(value) > MAX_TOKEN_ID:
        raise PydanticCustomError("invalid_token_id", "must hold token ids from 0 to the vocabulary's last")
    return value


def check_content(value: Any) -> str:
    """A message's text, or its text parts joined by line ends."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("invalid_type", "must be a string or a list of text parts")
    texts = []
    for number, part in enumerate(value):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise PydanticCustomError(
                "invalid_type", "part {number} must be an object with a `type`", {"number": number}
            )
        if part["type"] != "text":
            raise PydanticCustomError(
                "unsupported_content_part",
                "part {number} is not text; accepted is `text`",
                {"number": number},
            )
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError(
                "invalid_type",
                "part {number} must have `type` and a string `text`, no more",
                {"number": number},
            )
        texts.append(part["text"])
    return "\n".join(texts)


def check_stop(value: Any) -> list[str] | None:
    """A string, or up to four, to a list."""
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not set(map(type, stops)) <= {str}:
        raise PydanticCustomError("invalid_type", "must be a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise PydanticCustomError(
            "array_above_max_length", "must hold at most {most} strings", {"most": MAX_STOP_STRINGS}
        )
    if not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise PydanticCustomError(
            "invalid_stop", "must have 1 to {most} characters each", {"most": MAX_STOP_CHARACTERS}
        )
    return stops


def check_logit_bias(value: Any) -> dict[int, float] | None:
    """`{"50256": -100}` -> by token id; JSON's keys are strings."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise PydanticCustomError("invalid_type", "must be an object of token ids and numbers")
    if len(value) > MAX_LOGIT_BIASES:
        raise PydanticCustomError(
            "object_above_max_properties", "must hold at most {most} token ids", {"most": MAX_LOGIT_BIASES}
        )
    biases = {}
    for key, bias in value.items():
        # `٣`, `+3` and `03` are numbers to Python, and would name a token twice
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and str(int(key)) == key):
            raise PydanticCustomError("invalid_token_id", "must have token ids as keys")
        if type(bias) not in (int, float) or not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
            raise PydanticCustomError(
                "invalid_logit_bias", "must have numbers from -{most} to {most}", {"most": MAX_LOGIT_BIAS}
            )
        biases[int(key)] = float(bias)
    return biases


TOKEN_ID_LIST = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
TEXT = {"type": "string", "minLength": 1}
Prompt = Annotated[
    Any,
    BeforeValidator(check_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                TEXT,
                {"type": "array", "minItems": 1, "items": TEXT},
                TOKEN_ID_LIST,
                {"type": "array", "minItems": 1, "items": TOKEN_ID_LIST},
            ]
        }
    ),
]
Content = Annotated[
    Any,
    BeforeValidator(check_content),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                        "additionalProperties": False,
                    },
                },
            ]
        }
    ),
]
STOP_STRING = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
Stop = Annotated[
    Any,
    BeforeValidator(check_stop),
    WithJsonSchema(
        {
            "anyOf": [
                STOP_STRING,
                {"type": "array", "maxItems": MAX_STOP_STRINGS, "items": STOP_STRING},
                {"type": "null"},
            ]
        }
    ),
]
LogitBias = Annotated[
    Any,
    BeforeValidator(check_logit_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "maxProperties": MAX_LOGIT_BIASES,
                    "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
                    "additionalProperties": {
                        "type": "number",
                        "minimum": -MAX_LOGIT_BIAS,
                        "maximum": MAX_LOGIT_BIAS,
                    },
                },
                {"type": "null"},
            ]
        }
    ),
]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
# named, because an annotation with FailFast cannot stand in a union
StopTokenIds = TypeAliasType(
    "StopTokenIds", Annotated[list[TokenId], FailFast(), Field(max_length=MAX_STOP_TOKEN_IDS)]
)
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=512)]
