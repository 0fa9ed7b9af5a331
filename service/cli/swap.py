"""`halftone swap`: asks a running server for another precision, and shows how it comes about."""

import http.client
import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import typer

from service.cli.display import Display
from service.errors import HalftoneError, SettingError, SystemProblem

LINE_TIMEOUT_S = 600  # between two lines of the answer; a stage of a load tells more often


def swap(url: str, admin_key: str, precision: str, drain_timeout_s: float | None) -> None:
    """Returns when the precision is served. Raises HalftoneError with the server's reason where it is not,
    SystemProblem where the server cannot be asked."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise SettingError(f"`{url}` is no address of a server", hint="such as http://127.0.0.1:8000")
    if not admin_key:
        raise SettingError(
            "a swap needs the server's admin key",
            hint="give `--admin-key`, or HALFTONE_ADMIN_KEY, which the server was started with",
        )
    body: dict[str, Any] = {"precision": precision}
    if drain_timeout_s is not None:
        body["drain_timeout_s"] = drain_timeout_s
    request = urllib.request.Request(
        url.rstrip("/") + "/admin/precision",
        json.dumps(body).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {admin_key}"},
    )
    last: dict[str, Any] = {}
    try:
        with urllib.request.urlopen(request, timeout=LINE_TIMEOUT_S) as answer, Display() as display:
            for line in answer:
                last = json.loads(line)
                if last["stage"] != "done":
                    display(last["stage"], last["done"], last["total"], last["unit"])
    except urllib.error.HTTPError as error:
        raise refusal(error) from None
    except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
        raise SystemProblem(
            f"`{url}` does not answer: {error}", hint="is the server up, and is this its address?"
        ) from None
    if last.get("stage") != "done":
        raise SystemProblem(f"`{url}` broke off; what it serves now is in its `/version`")
    if last["outcome"] not in ("swapped", "unchanged"):
        reason = last["error"] or {
            "code": "internal_error",
            "message": "the server's log says why",
            "hint": "",
        }
        told = f"{last['outcome'].replace('_', ' ')}, `{last['precision']}` is served: {reason['message']}"
        raise HalftoneError(told, hint=reason["hint"], code=reason["code"])
    typer.echo(summary(last))


def summary(done: dict[str, Any]) -> str:
    """`nf4 is served, after bf16, 12.3 s without an answer; canary 0.32 nats of at most 1`."""
    if done["outcome"] == "unchanged":
        return f"{done['precision']} was served already"
    canary = done["canary"]
    heard = ""
    if "bound_nats" in canary:
        nats = max(canary["prefill_kl_nats"], canary["decode_kl_nats"])
        heard = f"; canary {nats:.3f} nats a token, at most {canary['bound_nats']:g}"
    elif canary:
        heard = f"; canary: reference {canary['reference']}"
    took = f"{done['seconds']:.1f} s"
    return f"{done['precision']} is served in the place of {done['previous']}, after {took}{heard}"


def refusal(error: urllib.error.HTTPError) -> HalftoneError:
    """The server's own words where it has some."""
    try:
        told = json.loads(error.read())["error"]
        return HalftoneError(told["message"], code=told["code"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return SystemProblem(f"`{error.url}` answers {error.code}, which no Halftone server does")
