"""The first thing a request meets: bounds on its bytes and time, its key, and JSON that means one thing.

uvicorn --ASGI--> Guard --(parsed body, key's salt, request id in the scope)--> FastAPI

Plain ASGI, before any framework reads a byte. A route is closed unless it is listed as open, and /admin has
keys of its own: without them it is off, however the server is reached. Each response gets a request id, and
its duration is observed under the route's own path, never one that a client chose.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.compare_page import COMPARE_PATH
from service.api.errors import error_response
from service.api.json_body import parse_json
from service.api.origins import AllowedOrigins
from service.errors import AuthenticationError, BodyTooLargeError, HalftoneError, RequestError
from service.metrics import Metrics

logger = logging.getLogger(__name__)

ADMIN_PREFIX = "/admin"
# for probes, which have no key, and for a page that holds nothing of this server's
OPEN_PATHS = frozenset({"/health", "/ready", COMPARE_PATH})
MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 << 10
MAX_URL_BYTES = 8 << 10
MAX_BODY_CHUNKS = 10_000
BODY_TIMEOUT_S = 30.0
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
# the client's fault; a full queue (429) is counted where it is found
REJECTED = frozenset(range(400, 500)) - {429, 499}
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(slots=True)
class RequestContext:
    """What the guard learnt of a request; `scope["halftone"]`."""

    send: Send  # the server's own, which no middleware has wrapped
    request_id: str
    arrived_at: float  # time.monotonic() seconds
    cache_salt: bytes  # of the key: two keys never share a prefix block
    body: Any = None  # parsed JSON of a POST
    metrics: Metrics | None = None  # of the engine that the request went to, once that is known
    status: int = 0  # of the response, once it has begun


class RefusalError(RequestError):
    """A request error with a status of its own."""

    def __init__(self, status: int, message: str, code: str, hint: str = "") -> None:
        super().__init__(message, hint=hint, code=code)
        self.status = status


class Guard:
    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        *,
        paths: Sequence[str],
        json_paths: Sequence[str],
        api_keys: list[str],
        admin_keys: list[str],
        max_body_bytes: int,
        loopback_only: bool,
        allowed_origins: Sequence[str] = (),
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.paths = frozenset(paths)
        self.json_paths = frozenset(json_paths)
        self.key_digests = digests_of(api_keys)
        self.admin_digests = digests_of(admin_keys)
        self.max_body_bytes = max_body_bytes
        self.origins = AllowedOrigins(allowed_origins)
        # a web page may resolve its own name to this machine; without a key only the name tells it apart
        self.check_host = loopback_only and not api_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # a websocket: uvicorn answers 403
        context = RequestContext(send, "", time.monotonic(), b"")
        scope["halftone"] = context
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        context.request_id = request_id(headers)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", context.request_id.encode()),
                    *self.origins.response_headers(headers),
                ]
            await send(message)

        try:
            try:
                self.check_sizes(scope, headers)
                if (preflight := self.origins.preflight(scope["method"], headers)) is not None:
                    await preflight(scope, receive, send_with_id)
                    return
                if scope["path"].startswith(ADMIN_PREFIX):
                    self.authenticate_admin(headers)
                elif scope["path"] not in OPEN_PATHS:
                    context.cache_salt = self.authenticate(headers)
                if scope["method"] == "POST" and scope["path"] in self.json_paths:
                    context.body = parse_json(await self.read_body(headers, receive))
            except HalftoneError as error:
                close = {"connection": "close"} if error.status in (408, 413, 415) else None
                await error_response(error, close)(scope, receive, send_with_id)
                return
            except ClientGoneError:
                context.status = 499
                return
            # FastAPI is given the parsed body; what is left to receive is the disconnect
            await self.app(scope, receive, send_with_id)
        except Exception:
            # the framework has answered 500 already, if nothing was sent before
            logger.exception("request %s failed", context.request_id)
            context.status = context.status or 500
        finally:
            metrics = context.metrics or self.metrics
            if context.status in REJECTED:
                metrics.rejected("unauthorized" if context.status in (401, 403) else "invalid")
            endpoint = self.endpoint_of(scope["path"])
            metrics.http_request(endpoint, context.status or 499, time.monotonic() - context.arrived_at)

    def endpoint_of(self, path: str) -> str:
        """A label for metrics: the route's path, or `other`."""
        if path.startswith("/v1/models/"):
            return "/v1/models/{name}"
        return path if path in self.paths else "other"

    def check_sizes(self, scope: Scope, headers: list[tuple[bytes, bytes]]) -> None:
        """What a header or an address may not be. Raises RequestError."""
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_URL_BYTES:
            raise RefusalError(414, f"the address is longer than {MAX_URL_BYTES} bytes", "url_too_long")
        if len(headers) > MAX_HEADERS or sum(len(n) + len(v) for n, v in headers) > MAX_HEADER_BYTES:
            raise RefusalError(
                431,
                f"more than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them",
                "headers_too_large",
            )
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1:
            raise RequestError(f"{len(hosts)} `Host` headers, one is needed", code="invalid_host")
        if self.check_host and host_name(hosts[0]) not in LOOPBACK_HOSTS:
            raise RequestError(
                "the `Host` header does not name this machine",
                hint="use 127.0.0.1 or localhost, or start the server with --api-key",
                code="invalid_host",
            )

    def authenticate(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """-> the key's cache salt; empty where no keys are set. Raises AuthenticationError."""
        return authenticated(headers, self.key_digests, "API key") if self.key_digests else b""

    def authenticate_admin(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Raises AuthenticationError, or RefusalError where nobody may."""
        if not self.admin_digests:
            raise RefusalError(
                403,
                f"`{ADMIN_PREFIX}` is off",
                "admin_off",
                hint="start the server with --admin-key, and send that key",
            )
        authenticated(headers, self.admin_digests, "admin key")

    async def read_body(self, headers: list[tuple[bytes, bytes]], receive: Receive) -> bytes:
        """The whole body, within its bounds. Raises RequestError or ClientGoneError."""
        fields = dict(headers)
        content_type = fields.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if content_type != b"application/json":
            raise RefusalError(415, "`Content-Type` must be `application/json`", "unsupported_media_type")
        if fields.get(b"content-encoding", b"identity").lower() != b"identity":
            raise RefusalError(415, "`Content-Encoding` is not supported", "unsupported_media_type")
        length = fields.get(b"content-length", b"")
        if length.isdigit() and int(length) > self.max_body_bytes:
            raise self.too_large()
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > self.max_body_bytes:
                        raise self.too_large()
                    if len(chunks) > MAX_BODY_CHUNKS:
                        raise RequestError(
                            f"the body comes in more than {MAX_BODY_CHUNKS} pieces", code="too_many_chunks"
                        )
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise RefusalError(
                408, f"the body took longer than {BODY_TIMEOUT_S:.0f} s", "request_timeout"
            ) from None

    def too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"the body is larger than {self.max_body_bytes} bytes",
            hint="send less, or start the server with a larger `max_body_bytes`",
        )


def digests_of(keys: list[str]) -> list[bytes]:
    return [hashlib.sha256(key.encode()).digest() for key in keys]


def authenticated(headers: list[tuple[bytes, bytes]], digests: list[bytes], kind: str) -> bytes:
    """-> the digest of the key that was sent, one of `digests`. Raises AuthenticationError."""
    given = [value for name, value in headers if name in (b"authorization", b"x-api-key")]
    bearer = [value for name, value in headers if name == b"authorization"]
    if len(given) != 1:
        raise AuthenticationError(
            f"one {kind} is needed" if not given else f"more than one {kind} was sent",
            hint="send `Authorization: Bearer KEY` or `x-api-key: KEY`",
        )
    key = given[0]
    if bearer:
        scheme, _, key = key.partition(b" ")
        if scheme.lower() != b"bearer":
            raise AuthenticationError("`Authorization` must be `Bearer KEY`")
    digest = hashlib.sha256(key.strip()).digest()
    # every key is compared, so the time tells nothing about which one was near
    if not any([hmac.compare_digest(digest, known) for known in digests]):
        raise AuthenticationError(f"the {kind} is not known here")
    return digest


class ClientGoneError(Exception):
    """The client hung up before its request was complete: there is nobody to answer."""


def request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's `X-Request-Id` where it is a plain short word, else a new one."""
    for name, value in headers:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            if REQUEST_ID.fullmatch(text):
                return text
    return uuid.uuid4().hex


def host_name(host: bytes) -> str:
    """`localhost:8000` -> `localhost`; `[::1]:8000` -> `[::1]`."""
    text = host.decode("latin-1").lower()
    return text.partition("]")[0] + "]" if text.startswith("[") else text.partition(":")[0]
