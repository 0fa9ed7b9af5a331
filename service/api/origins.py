"""Which other pages a browser may let use this API: CORS, for the origins of the settings and no others.

Guard --Origin header--> headers of the response, or the whole answer to a browser's preflight request

A browser asks before it sends JSON for a page of another origin. Without an origin in the settings nothing
answers here, and a browser keeps every such page away.
"""

from collections.abc import Sequence

from starlette.responses import Response

Headers = list[tuple[bytes, bytes]]
MAX_AGE_S = 600  # how long a browser remembers the answer to a preflight


class AllowedOrigins:
    """The origins of `allowed_origins`, such as `http://127.0.0.1:8001`."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(origin.encode("ascii") for origin in origins)

    def response_headers(self, request_headers: Headers) -> Headers:
        """What a response gets besides its own headers; nothing where the page is of no allowed origin."""
        if not self._origins:
            return []
        vary = (b"vary", b"origin")
        origin = dict(request_headers).get(b"origin", b"")
        if origin not in self._origins:
            return [vary]
        exposed = (b"access-control-expose-headers", b"x-request-id, retry-after")
        return [vary, (b"access-control-allow-origin", origin), exposed]

    def preflight(self, method: str, request_headers: Headers) -> Response | None:
        """The answer to a browser that asks for an allowed page; None for every other request."""
        fields = dict(request_headers)
        asks = method == "OPTIONS" and b"access-control-request-method" in fields
        if not asks or fields.get(b"origin", b"") not in self._origins:
            return None
        return Response(
            status_code=204,
            headers={
                "access-control-allow-methods": "GET, POST",
                "access-control-allow-headers": "authorization, content-type, x-api-key, x-request-id",
                "access-control-max-age": str(MAX_AGE_S),
            },
        )
