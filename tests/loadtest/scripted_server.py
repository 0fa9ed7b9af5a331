"""A server that follows a script, in this process, and the command run against it."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from loadtest.__main__ import main

Reply = Callable[[dict[str, Any]], bytes]
About = tuple[int, Any] | Callable[[], str]  # status and JSON, or a text at the time of asking

VOCAB_SIZE = 50
WINDOW = 4096
ABOUT: dict[str, tuple[int, Any]] = {
    "/ready": (200, {"state": "ready", "loading": None}),
    "/v1/models": (200, {"object": "list", "data": [{"id": "m", "object": "model"}]}),
    "/version": (200, {"version": "9", "engine": {"vocab_size": VOCAB_SIZE, "max_context_tokens": WINDOW}}),
}


def event(
    text: str = "",
    *,
    usage: int | None = None,
    finish: str | None = None,
    chat: bool = False,
    prompt: int = 7,
    cached: int = 0,
) -> dict[str, Any]:
    body = {"delta": {"content": text}} if chat else {"text": text}
    chunk: dict[str, Any] = {"choices": [{"index": 0, **body, "finish_reason": finish}]}
    if usage is not None:
        chunk["usage"] = usage_of(usage, prompt, cached)
    return chunk


def usage_of(tokens: int, prompt: int = 7, cached: int = 0) -> dict[str, Any]:
    details = {"cached_tokens": cached}
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "prompt_tokens_details": details}


def sse(*events: dict[str, Any]) -> bytes:
    body = b"".join(b"data: " + json.dumps(item).encode() + b"\n\n" for item in events) + b"data: [DONE]\n\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


def plain(status: int, body: Any) -> bytes:
    raw = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


def text(body: str) -> bytes:
    raw = body.encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s" % (len(raw), raw)


def refusal(status: int, message: str) -> bytes:
    return plain(status, {"error": {"message": message}})


def full_answer(request: dict[str, Any]) -> bytes:
    """What a server with every extension says: an event a token, the last token in the last event."""
    count, chat = request["max_tokens"], "messages" in request
    each = request["stream_options"].get("continuous_usage_stats")
    prompt = len(request.get("prompt", ""))
    return sse(
        *(
            event(
                f"t{n}",
                usage=n if each else None,
                finish="length" if n == count else None,
                chat=chat,
                prompt=prompt,
            )
            for n in range(1, count + 1)
        ),
        {"choices": [], "usage": usage_of(count, prompt)},
    )


def run_against(
    reply: Reply, out: Path, *flags: str, about: dict[str, About] | None = None
) -> tuple[int, dict[str, Any]]:
    """Run the command against a server on a free port -> exit status, what it wrote.

    `reply` answers completions, with `path` and `authorization` beside the body's fields; `about` the rest.
    `{port}` in a flag is the server's.
    """
    routes: dict[str, About] = {**ABOUT, **(about or {})}

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError:  # a client that looked for the address only
            writer.close()
            return
        method, path, _ = head.split(maxsplit=2)
        fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        if method == "GET":
            said = routes.get(path, (404, {"error": {"message": "no such route"}}))
            writer.write(text(said()) if callable(said) else plain(*said))
        else:
            request = json.loads(await reader.readexactly(int(fields["content-length"])))
            writer.write(reply(request | {"path": path, "authorization": fields.get("authorization", "")}))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def serve(work: Callable[[int], Awaitable[int]]) -> int:
        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            return await work(server.sockets[0].getsockname()[1])

    async def command(port: int) -> int:
        arguments = ["--url", f"http://127.0.0.1:{port}", "--json", str(out), "--records"]
        arguments += [flag.replace("{port}", str(port)) for flag in flags]
        return await asyncio.to_thread(main, arguments)

    status = asyncio.run(serve(command))
    return status, json.loads(out.read_bytes()) if out.exists() else {}
