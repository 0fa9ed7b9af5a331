"""Every answer that is not a success: OpenAI's envelope, at most 4 KB, never an exception's text."""

from collections.abc import Mapping

import orjson
from starlette.responses import Response

from service.errors import HalftoneError

MAX_MESSAGE_CHARACTERS = 600  # of up to six bytes each when escaped


def envelope(error: HalftoneError) -> bytes:
    """`{"error": {message, type, param, code}}`."""
    message = f"{error.message}; {error.hint}" if error.hint else error.message
    body = {
        "error": {
            "message": message[:MAX_MESSAGE_CHARACTERS],
            "type": error.type,
            "param": error.param[:100] if error.param else None,
            "code": error.code,
        }
    }
    return orjson.dumps(body)


def error_headers(error: HalftoneError) -> dict[str, str]:
    """What a client needs besides the envelope: when to come back, or how to authenticate."""
    headers = {"cache-control": "no-store"}
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers["retry-after"] = str(retry_after_s)
    elif error.status >= 500:
        headers["x-should-retry"] = "false"  # the same request would fail again
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def error_response(error: HalftoneError, extra: Mapping[str, str] | None = None) -> Response:
    return Response(
        envelope(error),
        status_code=error.status,
        headers={**error_headers(error), **(extra or {})},
        media_type="application/json",
    )
