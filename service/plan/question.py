"""What a plan is asked: the flags of `halftone plan` and the query parameters of `GET /plan`, one parser.

text by name --read_question--> Question; a wrong value is one SettingError, whose `param` is its name
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from service.errors import SettingError
from service.precision import parse_precision
from service.precision.spec import split_list

KV_DTYPES = ("auto", "int8", "fp8")
DEFAULT_CONTEXT_TOKENS, DEFAULT_CONCURRENCY = 8192, 32
MAX_TOKENS, MAX_REQUESTS, MAX_MODES, MAX_CHARACTERS = 1 << 24, 1024, 32, 512
COUNT = re.compile(r"(\d+)(k|m)?", re.IGNORECASE)
TIMES = {"": 1, "k": 1 << 10, "m": 1 << 20}


@dataclass(frozen=True)
class Parameter:
    """One thing that can be asked, as text."""

    name: str
    help: str


PARAMETERS = (
    Parameter("gpu", "A GPU by name (h100-80gb, a100-80gb, rtx4090, ...) or its memory: 24GiB, 80GB."),
    Parameter("bandwidth", "Of that memory, where only its size is given: 1008GB/s."),
    Parameter(
        "context",
        "Tokens of a request, prompt and answer. (default 8k: 8192, or a shorter window)",
    ),
    Parameter("concurrency", "Requests at once. (default 32)"),
    Parameter("precisions", "Modes, each as for `serve --precision`; empty: all of the model."),
    Parameter("kv_dtype", "Type of the KV cache: auto, int8, fp8; empty: auto, or the server's."),
)
NAMES = tuple(parameter.name for parameter in PARAMETERS)


@dataclass(frozen=True)
class Question:
    gpu: str  # name or size, empty: the server's own
    bandwidth: str
    context_tokens: int  # 0: DEFAULT_CONTEXT_TOKENS, or all of a shorter window
    concurrency: int
    precisions: tuple[str, ...]  # canonical; empty: all
    kv_dtype: str  # empty: the server's own


def read_question(given: Mapping[str, str]) -> Question:
    """Raises SettingError or PrecisionError for the first value that cannot be, with `param`."""
    for name in given:
        if name not in NAMES:
            raise SettingError(
                f"`{name[:64]}` is no parameter of a plan",
                hint=f"there are {', '.join(NAMES)}",
                param=name[:64],
            )
        if len(given[name]) > MAX_CHARACTERS:
            raise wrong(name, given[name], f"at most {MAX_CHARACTERS} characters are read")
    values = {name: given.get(name, "") for name in NAMES}
    kv_dtype = values["kv_dtype"]
    if kv_dtype and kv_dtype not in KV_DTYPES:
        raise wrong("kv_dtype", kv_dtype, f"accepted are {', '.join(KV_DTYPES)}")
    modes = split_list(values["precisions"])
    if len(modes) > MAX_MODES:
        raise wrong("precisions", f"{len(modes)} modes", f"at most {MAX_MODES} are planned at once")
    return Question(
        values["gpu"],
        values["bandwidth"],
        read_count("context", values["context"], MAX_TOKENS, 0),
        read_count("concurrency", values["concurrency"], MAX_REQUESTS, DEFAULT_CONCURRENCY),
        tuple(dict.fromkeys(parse_precision(mode).canonical for mode in modes)),
        kv_dtype,
    )


def read_count(name: str, text: str, most: int, default: int) -> int:
    """`8192`, `8k` -> 8192; at least 1. Nothing: `default`."""
    if not text:
        return default
    found = COUNT.fullmatch(text.strip()) if len(text) <= 20 else None
    count = int(found[1]) * TIMES[(found[2] or "").lower()] if found else 0
    if not 1 <= count <= most:
        raise wrong(name, text, f"accepted is a whole number from 1 to {most}, such as 32 or 8k")
    return count


def wrong(name: str, value: str, accepted: str) -> SettingError:
    return SettingError(f"`{name}` = `{value[:64]}` cannot be planned for", hint=accepted, param=name)
