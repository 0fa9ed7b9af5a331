"""What the server says of itself, and whether it can be measured: every complaint before a run starts.

bench --look()--> Target; bench --first_answer()--> one request that must succeed
"""

import asyncio
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from loadtest.client import NO_TOKEN, Client
from loadtest.errors import LoadTestError
from loadtest.statistics import Record
from loadtest.wire import WireError
from loadtest.workload import Workload

OK = 200
KEY_REFUSED = (401, 403)
NOT_READY = 503
BAD_REQUEST = 400
UNPROCESSABLE = 422


@dataclass(frozen=True)
class Target:
    """A server that is ready. What it does not tell is None or 0."""

    model: str
    vocab_size: int
    max_context_tokens: int
    version: Any  # /version as it came
    card: Any  # the model's entry in /v1/models


async def look(client: Client, url: str, model: str) -> Target:
    """Ask `/ready`, `/v1/models` and `/version`; `model` empty: the first that is served.

    Raises LoadTestError for a server that is not there, not ready, or does not take the key or the model.
    """
    try:
        await client.locate()
    except OSError as error:
        raise LoadTestError(
            f"`{url}` does not answer: {error}",
            hint="start a server there (`halftone serve`), or name the address of one with `--url`",
        ) from None
    status, ready = await ask(client, "/ready")
    if status == NOT_READY:
        raise LoadTestError(
            f"the server at `{url}` is not ready: {progress(ready)}",
            hint="try again when its `/ready` says 200",
        )
    status, listed = await ask(client, "/v1/models")
    if status in KEY_REFUSED:
        raise LoadTestError(
            f"the server at `{url}` refuses the key (HTTP {status})", hint="name it: `--api-key KEY`"
        )
    cards = listed.get("data") if status == OK and isinstance(listed, Mapping) else None
    if not isinstance(cards, list) or not cards or not all(isinstance(card, Mapping) for card in cards):
        raise LoadTestError(
            f"`{url}/v1/models` lists no model (HTTP {status})",
            hint="`--url` is the root of a server with OpenAI's API",
        )
    names = [str(card.get("id")) for card in cards]
    if model and model not in names:
        raise LoadTestError(f"`--model` {model} is not served there; it has {', '.join(names)}")
    card = cards[names.index(model)] if model else cards[0]
    status, version = await ask(client, "/version")
    version = version if status == OK and isinstance(version, Mapping) else {}
    for resident in version.get("residents") or ():  # a server of several precisions
        if resident["model"] == card["id"]:
            version = {**version, "engine": resident["engine"]}
    engine = version.get("engine") or {}
    meta = card.get("meta") or {}  # llama.cpp's place for it
    return Target(
        model=model or names[0],
        vocab_size=int(engine.get("vocab_size") or card.get("vocab_size") or meta.get("n_vocab") or 0),
        max_context_tokens=int(
            engine.get("max_context_tokens") or card.get("max_model_len") or meta.get("n_ctx") or 0
        ),
        version=version or None,
        card=dict(card),
    )


async def ask(client: Client, path: str) -> tuple[int, Any]:
    """-> status and the parsed body, None where it is no JSON."""
    try:
        status, body = await client.get(path)
    except (OSError, TimeoutError, WireError) as error:
        raise LoadTestError(f"`{path}` was not answered: {error or type(error).__name__}") from None
    try:
        return status, orjson.loads(body)
    except orjson.JSONDecodeError:
        return status, None


def progress(ready: Any) -> str:
    """The body of a `/ready` that says no -> how far it is."""
    if not isinstance(ready, Mapping):
        return "HTTP 503"
    loading = ready.get("loading")
    if not loading:
        return str(ready.get("error") or ready.get("state") or "HTTP 503")
    return f"{loading['stage']}, {loading['done']} of {loading['total']} {loading['unit']}"


async def first_answer(
    client: Client, workload: Workload, *, needs_ignore_eos: bool
) -> tuple[Record, Workload, list[str]]:
    """One whole request of the kind that will be measured -> its record, the workload as the server takes it,
    and the fields that it does not know and that were left out.

    Raises LoadTestError with what the server says to the request as it was meant.
    """
    complaint: LoadTestError | None = None
    for without in fields_to_leave_out(workload, needs_ignore_eos):
        reduced = workload.without(without)
        # no run has a negative seed: what is asked here is in no run's prefix cache
        probe = dataclasses.replace(reduced, seed=-1 - workload.seed)
        record = Record(0, asyncio.get_running_loop().time(), asked_tokens=probe.asked_tokens(0))
        status = await client.send(probe.body(0), record)
        if record.ok:
            return record, reduced, without
        complaint = complaint or refusal(status, record)
        if status not in (BAD_REQUEST, UNPROCESSABLE):
            break
    assert complaint is not None
    raise complaint


def fields_to_leave_out(workload: Workload, needs_ignore_eos: bool) -> list[list[str]]:
    """What to try without, in turn: nothing first, then what a server of OpenAI's own fields may refuse."""
    tries: list[list[str]] = [[]]
    if workload.ignore_eos and not needs_ignore_eos:
        tries.append(["ignore_eos"])
    if workload.usage and not workload.continuous_usage:
        tries += [[*names, "stream_options"] for names in list(tries)]
    return tries


def refusal(status: int, record: Record) -> LoadTestError:
    """What the server said to the first request, and what may help."""
    hint = ""
    if status in KEY_REFUSED:
        hint = "name the key: `--api-key KEY`"
    elif "ignore_eos" in record.error:
        hint = "`--no-ignore-eos`, and answers may be shorter than asked"
    elif "continuous_usage" in record.error:
        hint = "leave out `--continuous-usage`"
    elif record.error == NO_TOKEN:
        hint = (
            "the model ended its answer at once, and the server let it; `--endpoint chat` asks it a question"
        )
    elif status in (BAD_REQUEST, 413, UNPROCESSABLE):
        hint = (
            "the server's window, vocabulary or body limit may be smaller than the requests; one that takes "
            "texts alone needs `--prompts`"
        )
    return LoadTestError(f"the first request failed: {record.error}", hint=hint)
