"""What an operator may change while the server runs: the precision that is served.

guard (admin key) --SwapRequest--> front/swap --events--> one JSON object a line
"""

from collections.abc import AsyncIterator

import orjson
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response, StreamingResponse

from service.api.guard import ADMIN_PREFIX
from service.api.schema import Body, body_schema, parse
from service.errors import RequestError
from service.front.residents import Residents
from service.front.swap import Swap

MAX_DRAIN_S = 86_400
MAX_PRECISION_CHARACTERS = 256
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


class SwapRequest(Body):
    """`POST /admin/precision`"""

    precision: str = Field(
        min_length=1,
        max_length=MAX_PRECISION_CHARACTERS,
        description="`name[:option=value,...]`, as for `--precision`.",
    )
    drain_timeout_s: float | None = Field(
        None,
        ge=0,
        le=MAX_DRAIN_S,
        description="Seconds that open requests have to end, before the swap is given up. Default: the "
        "setting.",
    )


def make_admin_router(residents: Residents) -> APIRouter:
    router = APIRouter(prefix=ADMIN_PREFIX)

    @router.post("/precision", openapi_extra=body_schema(SwapRequest))
    async def precision(request: Request) -> Response:
        """Swaps the precision; 200 as soon as the swap has begun. The last line says how it ended."""
        typed = parse(SwapRequest, request.scope["halftone"].body)
        if len(residents.all) > 1:
            raise RequestError(
                "this server holds several precisions at once, and none of them is swapped",
                hint=f"name one in `model`: {', '.join(residents.names)}",
                code="several_residents",
            )
        swap = await residents.first.swapper.begin(typed.precision, typed.drain_timeout_s)
        return StreamingResponse(lines(swap), media_type="application/x-ndjson", headers=HEADERS)

    return router


async def lines(swap: Swap) -> AsyncIterator[bytes]:
    async for event in swap.events():
        yield orjson.dumps(event) + b"\n"
