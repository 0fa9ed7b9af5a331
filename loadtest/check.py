"""Two accounts of one run, the clients' and the server's own: where they differ, one of them is wrong.

runs --records, Totals before and after--> compare() --> `server_check` of the run, exit status 4

The server's clock starts when a request has arrived and the client's when it begins to connect, so latencies
may differ by a network's time. Counts should be equal; a server that others use as well counts these too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from loadtest.scrape import Totals
from loadtest.statistics import Record

MAX_DIFFERENCE = 0.05  # of the larger of the two
HTTP_S = 0.002  # of a request: its way there and back and two event loops, besides its connecting
NAMES = {
    "requests": "answered requests",
    "output_tokens": "output tokens",
    "prompt_tokens": "prompt tokens",
    "ttft_s": "sum of TTFT, s",
    "e2e_s": "sum of E2E, s",
}
LATENCIES = ("ttft_s", "e2e_s")


def unchecked(why: str) -> dict[str, Any]:
    """A run whose server tells nothing."""
    return {"agrees": None, "source": "", "figures": {}, "not_checked": {"everything": why}}


def compare(records: Sequence[Record], before: Totals, after: Totals) -> dict[str, Any]:
    """All records of a run, with its warm-up where that is a part of it -> what agrees and what does not.

    `agrees` is None where nothing could be compared.
    """
    server = after.since(before)
    done = [record for record in records if record.ok]
    client = sums(done)
    figures, not_checked = {}, {}
    for name in NAMES:
        why = reason_against(name, server, records, done)
        if why:
            not_checked[NAMES[name]] = why
            continue
        spare = sum(record.connected_s - record.sent_s + HTTP_S for record in done)
        figures[NAMES[name]] = agreement(client[name], server[name], spare if name in LATENCIES else 0.0)
    agrees = all(figure["agrees"] for figure in figures.values()) if figures else None
    return {"agrees": agrees, "source": after.kind, "figures": figures, "not_checked": not_checked}


def sums(done: Sequence[Record]) -> dict[str, float]:
    """The clients' account. Times count from the sending: a server knows nothing of a schedule."""
    return {
        "requests": len(done),
        "output_tokens": sum(record.output_tokens for record in done),
        "prompt_tokens": sum(record.prompt_tokens for record in done),
        "ttft_s": sum(record.arrivals[0][0] - record.sent_s for record in done),
        "e2e_s": sum(record.finished_s - record.sent_s for record in done),
    }


def reason_against(
    name: str, server: Mapping[str, float], records: Sequence[Record], done: Sequence[Record]
) -> str:
    """Why a quantity cannot be compared; empty where it can."""
    if name not in server:
        return "the server does not count it"
    if name != "requests" and len(done) < len(records):
        return "some requests failed, and the server counts what they had got"
    if name.endswith("tokens") and any(record.counted_by == "events" for record in done):
        return "the server's answers carry no usage"
    if name == "prompt_tokens" and server.get("preemptions"):
        return "the server preempted requests, and counts their prompts twice"
    return ""


def agreement(client: float, server: float, spare: float) -> dict[str, Any]:
    """`difference` is the server's less the client's, over the larger; `spare` is allowed besides 5 %."""
    larger = max(client, server)
    return {
        "client": client,
        "server": server,
        "difference": (server - client) / larger if larger else 0.0,
        "agrees": abs(server - client) <= MAX_DIFFERENCE * larger + spare,
    }
