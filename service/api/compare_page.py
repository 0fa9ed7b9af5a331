"""GET /compare: one static page that streams two precisions side by side, and nothing from anywhere else.

create_app() --origins--> make_compare_router() --the page, made once--> browser --> this API, others

The page needs no key, as a browser has none when it opens an address; what it asks of the API does. Its
policy allows the script and the style that stand in it, by their hashes, and connections to this server and
to the origins of `allowed_origins`, which are the servers that it offers as the other side.
"""

import base64
import hashlib
import html
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

COMPARE_PATH = "/compare"
FOLDER = Path(__file__).with_name("page")


def make_compare_router(allowed_origins: list[str]) -> APIRouter:
    router = APIRouter()
    page = compare_page(allowed_origins)
    headers = {
        "content-security-policy": policy(allowed_origins),
        "cache-control": "no-store",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    @router.get(COMPARE_PATH, include_in_schema=False)
    async def compare() -> Response:
        return Response(page, headers=headers, media_type="text/html")

    return router


def compare_page(allowed_origins: list[str]) -> str:
    """The page with its style, its script and the other servers that it may ask."""
    page = part("compare.html")
    for place, content in (
        ("PEERS", html.escape(" ".join(allowed_origins))),
        ("STYLE", part("compare.css")),
        ("SCRIPT", part("compare.js")),
    ):
        page = page.replace(place, content, 1)
    return page


def policy(allowed_origins: list[str]) -> str:
    """The page's Content-Security-Policy."""
    rules = {
        "default-src": "'none'",
        "script-src": source_hash(part("compare.js")),
        "style-src": source_hash(part("compare.css")),
        "img-src": "data:",
        "connect-src": " ".join(["'self'", *allowed_origins]),
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def source_hash(content: str) -> str:
    """An inline script or style as a policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def part(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
