"""The front's ASGI application: FastAPI behind the guard.

front/host --create_app(...)--> uvicorn --> Guard --> FastAPI --> routes
"""

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from service import __version__
from service.api.admin import SwapRequest, make_admin_router
from service.api.compare_page import COMPARE_PATH, make_compare_router
from service.api.errors import error_response
from service.api.guard import Guard, RefusalError
from service.api.routes import Server, make_router
from service.api.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from service.config import Settings
from service.errors import HalftoneError
from service.front.residents import Residents
from service.front.text import TextCodec

BODY_TYPES = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest, SwapRequest)


def create_app(settings: Settings, residents: Residents, codec: TextCodec) -> ASGIApp:
    """The whole API over the engines of a server; uvicorn serves what is returned."""
    app = FastAPI(
        title="Halftone",
        version=__version__,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"auto_configure": False, "tracing": False, "metrics": False, "logs": False},
    )
    routers = (
        make_router(Server(settings, residents, codec, int(time.time()))),
        make_admin_router(residents),
    )
    for router in (*routers, make_compare_router(settings.origins)):
        app.include_router(router)
    app.add_exception_handler(HalftoneError, answered_error)
    app.add_exception_handler(HTTPException, answered_error)
    app.add_exception_handler(Exception, answered_error)
    app.openapi = lambda: openapi(app)  # type: ignore[method-assign]
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    return Guard(
        app,
        residents.first.metrics,
        paths=[*(route.path for route in routes), COMPARE_PATH],
        json_paths=[route.path for route in routes if "POST" in (route.methods or ())],
        api_keys=settings.api_keys,
        admin_keys=settings.admin_keys,
        max_body_bytes=settings.max_body_bytes,
        loopback_only=settings.is_local,
        allowed_origins=settings.origins,
    )


async def answered_error(request: Request, error: Exception) -> Response:
    """Whatever a route raised, in OpenAI's envelope; the guard logs what nobody expected."""
    if isinstance(error, HTTPException):
        codes = {404: "not_found", 405: "method_not_allowed"}
        code = codes.get(error.status_code, "invalid_request")
        known = RefusalError(error.status_code, f"{error.detail}".lower(), code)
        return error_response(known, error.headers)
    return error_response(error if isinstance(error, HalftoneError) else HalftoneError("internal error"))


def openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document with the request bodies, which the guard reads in its stead."""
    if not app.openapi_schema:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, bodies = models_json_schema(
            [(body_type, "validation") for body_type in BODY_TYPES],
            ref_template="#/components/schemas/{model}",
        )
        document.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
        app.openapi_schema = document
    return app.openapi_schema
