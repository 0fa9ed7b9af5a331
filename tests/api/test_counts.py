"""What /metrics says over HTTP is what the clients saw, whatever became of the engine meanwhile."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

import httpx2
from api_rig import TIMEOUT_S, Server, serving
from prometheus_client.parser import text_string_to_metric_families

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]

NUM_REQUESTS = 100
NUM_SCRAPES = 20


@dataclass
class Seen:
    """What one client saw of one request."""

    status: int
    num_tokens: int = 0
    finish_reason: str = ""  # `error` where the stream ended with one


async def ask(http: httpx2.AsyncClient, number: int) -> Seen:
    """One stream, read to its end."""
    body = {"model": "tiny", "prompt": [5 + number, 7], "max_tokens": 3 + number % 20, "stream": True}
    async with http.stream("POST", "/v1/completions", json={**body, "return_token_ids": True}) as response:
        seen = Seen(response.status_code)
        if response.status_code != 200:
            await response.aread()
            return seen
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                seen.finish_reason = "error"
                continue
            for choice in event["choices"]:
                seen.num_tokens += len(choice.get("token_ids") or ())
                seen.finish_reason = choice["finish_reason"] or seen.finish_reason
    return seen


async def scrape(http: httpx2.AsyncClient) -> Series:
    """Counters and what of histograms counts."""
    text = (await http.get("/metrics")).raise_for_status().text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if family.type in ("counter", "histogram")
    }


async def drive(server: Server) -> tuple[list[Seen], list[Series]]:
    """100 requests in five waves, and four scrapes at once beside each -> what clients saw, the scrapes."""
    seen: list[Seen] = []
    scrapes: list[Series] = []
    async with httpx2.AsyncClient(base_url=server.url, timeout=TIMEOUT_S, verify=False) as http:
        for wave in range(5):
            while (await http.get("/ready")).status_code != 200:
                await asyncio.sleep(0.01)
            streams = [asyncio.create_task(ask(http, 20 * wave + number)) for number in range(20)]
            readings = [asyncio.create_task(scrape(http)) for _ in range(4)]
            seen += await asyncio.gather(*streams)
            scrapes += await asyncio.gather(*readings)
        server.settle()
        scrapes.append(await scrape(http))
    return seen, scrapes


def test_counts_are_what_clients_saw_and_never_fall(tmp_path: Path) -> None:
    """The engine is killed in its 55th step, of some 110 in all."""
    env = {"FAKE_STEP_MS": "3", "FAKE_DIE_AT_STEP": "55", "FAKE_ONCE": str(tmp_path / "fired")}
    with serving(tmp_path, env) as server:
        seen, scrapes = asyncio.run(drive(server))
        restarts = server.metric("halftone_engine_restarts_total")
        rejected = sum(
            server.metric("halftone_requests_rejected_total", reason=reason)
            for reason in ("down", "starting", "overloaded")
        )
        ended = {
            reason: server.metric("halftone_requests_total", finish_reason=reason)
            for reason in ("stop", "length", "abort", "error")
        }
        accepted = server.metric("halftone_requests_accepted_total")
        generated, discarded = (
            server.metric("halftone_tokens_total", kind=kind) for kind in ("generated", "discarded")
        )
        answered = server.metric(
            "halftone_request_duration_seconds_count", endpoint="/v1/completions", status="200"
        )
    assert len(seen) == NUM_REQUESTS
    assert len(scrapes) == NUM_SCRAPES + 1
    for earlier, later in ((a, b) for i, a in enumerate(scrapes) for b in scrapes[4 * (i // 4) + 4 :]):
        for series, value in earlier.items():
            assert later[series] >= value, series

    assert restarts == 1
    started = [one for one in seen if one.status == 200]
    assert accepted == len(started) == answered
    assert rejected == NUM_REQUESTS - len(started)
    for reason, count in ended.items():
        assert count == sum(one.finish_reason == reason for one in started), reason
    assert ended["error"] > 0
    assert sum(ended.values()) == accepted
    assert generated - discarded == sum(one.num_tokens for one in started)
