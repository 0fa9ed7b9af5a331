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
from service.api.planning import DOCUMENTED, answer_plan
from service.api.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
    body_schema,
    parse,
)
from service.api.sse import Collector, EventStream
from service.config import Settings
from service.errors import EngineUnavailableError, RequestError
from service.front.generation import Generation
from service.front.residents import Resident, Residents
from service.front.text import TextCodec
from service.messages import EngineInfo
from service.metrics import CONTENT_TYPE

CLIENT_GONE = 499


@dataclass(frozen=True, slots=True)
class Server:
    """What the endpoints answer from."""

    settings: Settings
    residents: Residents
    codec: TextCodec
    started_at: int  # unix seconds

    async def engine_for(self, name: str | None, context: RequestContext) -> tuple[Resident, EngineInfo]:
        """The engine that `model` names and what it serves, past a swap. Raises ModelNotFoundError, and
        EngineUnavailableError while no engine has been ready."""
        resident = self.residents.find(name)
        context.metrics = resident.metrics
        await resident.client.engine_state.past_swap()
        self.residents.find(name)  # a precision that was promised by name may be gone behind the swap
        resident.client.admit(0)
        info = resident.client.info
        if info is None:
            raise resident.client.engine_state.unavailable()
        return resident, info


def json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, {"cache-control": "no-store"}, media_type="application/json")


def make_router(server: Server) -> APIRouter:
    router = APIRouter()
    settings, residents, codec = server.settings, server.residents, server.codec

    async def answer(
        request: Request,
        typed: GenerationRequest,
        engine: tuple[Resident, EngineInfo],
        admitted: admission.Admission,
        format_type: type[AnswerFormat],
        id: str,
    ) -> Response:
        resident, info = engine
        client = resident.client
        if client.info is not info:
            raise EngineUnavailableError(
                "the engine was replaced while the prompt was tokenized", hint="send the request again"
            )
        cache = "" if info.kv_dtype == info.dtype else f"-kv-{info.kv_dtype}"
        fingerprint = f"halftone-{__version__}-{info.precision}{cache}"
        response = EventStream(context_of(request).send) if typed.stream else Collector()
        generation = Generation(
            admitted.plan, client, codec.pieces, resident.metrics, response.on_delta, response.on_end
        )
        format = format_type(id, typed.model, fingerprint, admitted.wanted, codec, generation)
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
        engine = await server.engine_for(typed.model, context)
        admitted = await admission.admit_completion(typed, context, codec, engine[1], settings)
        return await answer(request, typed, engine, admitted, CompletionFormat, f"cmpl-{uuid.uuid4().hex}")

    @router.post("/v1/chat/completions", openapi_extra=body_schema(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        context = context_of(request)
        typed = parse(ChatRequest, context.body)
        engine = await server.engine_for(typed.model, context)
        admitted = await admission.admit_chat(typed, context, codec, engine[1], settings)
        return await answer(request, typed, engine, admitted, ChatFormat, f"chatcmpl-{uuid.uuid4().hex}")

    @router.post("/tokenize", openapi_extra=body_schema(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        typed = parse(TokenizeRequest, context_of(request).body)
        info = residents.find(typed.model).client.info
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
        window = info.max_context_tokens if info else None
        return json({"tokens": tokens, "count": len(tokens), "max_model_len": window})

    @router.post("/detokenize", openapi_extra=body_schema(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        typed = parse(DetokenizeRequest, context_of(request).body)
        residents.find(typed.model)
        codec.require_text("tokens")
        if any(id >= codec.num_tokens for id in typed.tokens):
            raise RequestError(
                f"`tokens` holds an id beyond the tokenizer's; accepted are 0 to {codec.num_tokens - 1}",
                param="tokens",
                code="invalid_token_id",
            )
        return json({"prompt": codec.decode(typed.tokens)})

    def card(name: str, resident: Resident) -> dict[str, Any]:
        common = {"object": "model", "created": server.started_at, "owned_by": "halftone"}
        return {"id": name, **common, "precision": resident.precision}

    @router.get("/v1/models")
    async def models() -> Response:
        cards = [card(name, resident) for name, resident in zip(residents.names, residents.all, strict=True)]
        return json({"object": "list", "data": cards})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return json(card(name, residents.find(name)))

    @router.get("/health")
    async def health() -> Response:
        """200 through loading, restarts and swaps; 503 once an engine stays down: restart the server."""
        for resident in residents.all:
            if (failure := resident.client.failure) is not None:
                return json({"status": "failed", "error": failure.message}, 503)
        return json({"status": "alive"})

    @router.get("/ready")
    async def ready() -> Response:
        """200 when every engine is ready. `state` is that of the first that is not."""
        laggard = next(
            (resident for resident in residents.all if resident.client.state != "ready"), residents.first
        )
        client = laggard.client
        loading = client.loading
        progress = (
            {"stage": loading.stage, "done": loading.done, "total": loading.total, "unit": loading.unit}
            if loading is not None
            else None
        )
        body: dict[str, Any] = {"state": client.state, "precision": laggard.precision, "loading": progress}
        if client.failure is not None:
            body["error"] = client.failure.message
        return json(body, 200 if client.state == "ready" else 503)

    @router.get("/version")
    async def version() -> Response:
        """What is served: the engines' own accounts, from the moment on that they have been ready once."""
        accounts = [
            {
                "model": resident.name,
                "state": resident.client.state,
                "engine": msgspec.to_builtins(resident.client.info),
            }
            for resident in residents.all
        ]
        first = {"model": settings.name, "state": accounts[0]["state"], "engine": accounts[0]["engine"]}
        others = {"residents": accounts} if len(accounts) > 1 else {}
        return json({"version": __version__, **first, **others})

    @router.get("/plan", openapi_extra=DOCUMENTED)
    async def plan(request: Request) -> Response:
        """Which precisions of this model would fit, and what they would leave for users."""
        client = residents.first.client
        if client.info is None:
            raise client.engine_state.unavailable()
        asked = request.query_params.multi_items()
        return json(await answer_plan(asked, client.info, settings, residents.model_path))

    if not settings.metrics_port:

        @router.get("/metrics")
        async def scrape() -> Response:
            return Response(await residents.render_metrics(), headers={"content-type": CONTENT_TYPE})

    return router


def context_of(request: Request) -> RequestContext:
    context: RequestContext = request.scope["halftone"]
    return context
