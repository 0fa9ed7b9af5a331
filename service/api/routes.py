"""The endpoints: typed request in, answer out; what they decide is decided elsewhere.

guard --parsed body--> routes --> schema, admission, front/generation --> answers, sse
"""

import uuid
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from service import __version__
from service.api import admission
from service.api.answers import AnswerFormat, ChatFormat, CompletionFormat
from service.api.guard import RequestContext
from service.api.schema import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse,
)
from service.api.sse import Collector, EventStream
from service.config import Settings
from service.errors import EngineUnavailableError, RequestError
from service.front.engine_client import EngineClient
from service.front.generation import Generation
from service.front.text import TextCodec
from service.messages import EngineInfo
from service.metrics import CONTENT_TYPE, Metrics

CLIENT_GONE = 499


@dataclass(frozen=True, slots=True)
class Server:
    """What the endpoints answer from."""

    settings: Settings
    client: EngineClient
    codec: TextCodec
    metrics: Metrics
    started_at: int  # unix seconds

    def info(self) -> EngineInfo:
        """What is served. Raises EngineUnavailableError while no engine has been ready."""
        self.client.admit(0)
        info = self.client.info
        if info is None:
            raise EngineUnavailableError(
                "the engine is loading the model", hint="try again when `/ready` says 200"
            )
        return info


def json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, {"cache-control": "no-store"}, media_type="application/json")


def body_schema(body_type: type[Body]) -> dict[str, Any]:
    """The request body's place in /openapi.json; `app` adds the schemas it refers to."""
    reference = {"$ref": f"#/components/schemas/{body_type.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def make_router(server: Server) -> APIRouter:
    router = APIRouter()
    settings, client, codec, metrics = server.settings, server.client, server.codec, server.metrics

    async def answer(
        request: Request,
        admitted: admission.Admission,
        stream: bool,
        format_type: type[AnswerFormat],
        id: str,
    ) -> Response:
        info = server.info()
        cache = "" if info.kv_dtype == info.dtype else f"-kv-{info.kv_dtype}"
        fingerprint = f"halftone-{__version__}-{info.precision}{cache}"
        response = EventStream(context_of(request).send) if stream else Collector()
        generation = Generation(
            admitted.plan, client, codec.pieces, metrics, response.on_delta, response.on_end
        )
        format = format_type(id, settings.name, fingerprint, admitted.wanted, codec, generation)
        response.attach(generation, format)
        generation.start()
        if isinstance(response, EventStream):
            return response
        body = await response.body(request.receive)
        if body is None:
            return Response(status_code=CLIENT_GONE)
        return Response(body, headers={"cache-control": "no-store"}, media_type="application/json")

    @router.post("/v1/completions", openapi_extra=body_schema(CompletionRequest))
    async def completions(request: Request) -> Response:
        context = context_of(request)
        typed = parse(CompletionRequest, context.body)
        admission.check_model(typed.model, settings)
        admitted = await admission.admit_completion(typed, context, codec, server.info(), settings)
        return await answer(
            request, admitted, bool(typed.stream), CompletionFormat, f"cmpl-{uuid.uuid4().hex}"
        )

    @router.post("/v1/chat/completions", openapi_extra=body_schema(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        context = context_of(request)
        typed = parse(ChatRequest, context.body)
        admission.check_model(typed.model, settings)
        admitted = await admission.admit_chat(typed, context, codec, server.info(), settings)
        return await answer(request, admitted, bool(typed.stream), ChatFormat, f"chatcmpl-{uuid.uuid4().hex}")

    @router.post("/tokenize", openapi_extra=body_schema(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        typed = parse(TokenizeRequest, context_of(request).body)
        admission.check_model(typed.model, settings)
        if (typed.prompt is None) == (typed.messages is None):
            raise RequestError(
                "one of `prompt` and `messages` is needed", param="prompt", code="invalid_value"
            )
        if typed.messages is not None:
            if typed.add_special_tokens is not None:
                raise RequestError(
                    "`add_special_tokens` goes with `prompt`; a template writes its own",
                    param="add_special_tokens",
                    code="invalid_value",
                )
            tokens = await admission.encoded_chat(codec, admission.messages_of(typed.messages))
        else:
            (tokens,) = await admission.encoded(
                codec, [typed.prompt or ""], typed.add_special_tokens is not False
            )
        window = client.info.max_context_tokens if client.info else None
        return json({"tokens": tokens, "count": len(tokens), "max_model_len": window})

    @router.post("/detokenize", openapi_extra=body_schema(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        typed = parse(DetokenizeRequest, context_of(request).body)
        admission.check_model(typed.model, settings)
        codec.require_text("tokens")
        if any(id >= codec.num_tokens for id in typed.tokens):
            raise RequestError(
                f"`tokens` holds an id beyond the tokenizer's; accepted are 0 to {codec.num_tokens - 1}",
                param="tokens",
                code="invalid_token_id",
            )
        return json({"prompt": codec.decode(typed.tokens)})

    def card() -> dict[str, Any]:
        return {"id": settings.name, "object": "model", "created": server.started_at, "owned_by": "halftone"}

    @router.get("/v1/models")
    async def models() -> Response:
        return json({"object": "list", "data": [card()]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        admission.check_model(name, settings)
        return json(card())

    @router.get("/health")
    async def health() -> Response:
        """200 through loading and restarts; 503 once there will be no other engine: restart the server."""
        if client.failure is not None:
            return json({"status": "failed", "error": client.failure.message}, 503)
        return json({"status": "alive"})

    @router.get("/ready")
    async def ready() -> Response:
        loading = client.loading
        progress = (
            {"stage": loading.stage, "done": loading.done, "total": loading.total, "unit": loading.unit}
            if loading is not None
            else None
        )
        body: dict[str, Any] = {"state": client.state, "loading": progress}
        if client.failure is not None:
            body["error"] = client.failure.message
        return json(body, 200 if client.state == "ready" else 503)

    @router.get("/version")
    async def version() -> Response:
        """What is served: the engine's own account, from the moment it has been ready once."""
        engine = msgspec.to_builtins(client.info)
        return json({"version": __version__, "model": settings.name, "state": client.state, "engine": engine})

    if not settings.metrics_port:

        @router.get("/metrics")
        async def scrape() -> Response:
            return Response(metrics.render(settings.metrics_compat), headers={"content-type": CONTENT_TYPE})

    return router


def context_of(request: Request) -> RequestContext:
    context: RequestContext = request.scope["halftone"]
    return context
