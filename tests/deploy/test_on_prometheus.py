"""Every panel and every alert, asked of a real Prometheus that scrapes two real servers under load.

tiny model in bf16 and nf4 --/metrics--> Prometheus <--the panels' own queries-- this test
"""

import asyncio
import contextlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import msgspec
import pytest

from loadtest.statistics import Record, percentile
from service.api.app import create_app
from service.config import load_settings
from service.energy import EnergyMeter
from service.front.host import Host
from service.front.supervisor import ENGINE_COMMAND
from service.messages import EngineInfo, StepStats
from service.metrics import Metrics
from service.metrics.counts import Histogram
from tests.deploy.panels_of import ALERTS, alerts, filled, panels
from tests.deploy.real_prometheus import Prometheus, program, scraping
from tests.front_thread import running
from tests.tiny_tokenizers import write_checkpoint

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
PRECISIONS = ("bf16", "nf4")
WATTS = 250.0
TIMEOUT_S = 120
FAKE_ENGINE = (sys.executable, str(ROOT / "tests" / "fake_engine.py"))
LATENCIES = ("time_to_first_token", "inter_token_latency", "time_per_output_token", "end_to_end")
SHAPE = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
}


class Meter(EnergyMeter):
    """A GPU's counter where there is no GPU: 250 W by the clock."""

    def __init__(self) -> None:
        pass

    def joules(self) -> float:
        return WATTS * time.monotonic()

    def watts(self) -> float:
        return WATTS

    def close(self) -> None:
        pass


def on_gpu(info: EngineInfo) -> EngineInfo:
    """As the front hears it of an engine on a GPU: there is energy to read."""
    return msgspec.structs.replace(info, device_uuid="GPU-1")


@dataclass
class Server:
    host: Host
    loop: asyncio.AbstractEventLoop
    load: dict[str, Any] = field(default_factory=dict)  # the load generator's JSON
    observed_s: dict[str, list[float]] = field(default_factory=dict)  # a latency -> each value, as counted

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(TIMEOUT_S)

    def version(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx2.get(f"{self.host.url}/version").json()
        return answer


@dataclass
class Observed:
    prometheus: Prometheus
    servers: dict[str, Server]


@contextlib.contextmanager
def serving(hosts: dict[str, Callable[[], Host]], folder: Path) -> Iterator[Observed]:
    """A server for each precision, and a Prometheus that has seen them idle."""
    program("prometheus")  # before anything slow
    with contextlib.ExitStack() as exits:
        patch = exits.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(EnergyMeter, "open", lambda device_uuid: Meter())
        ready = Metrics.engine_ready
        patch.setattr(Metrics, "engine_ready", lambda self, info: ready(self, on_gpu(info)))
        servers = {
            precision: Server(*exits.enter_context(running(make_host, TIMEOUT_S)))
            for precision, make_host in hosts.items()
        }
        for server in servers.values():
            server.wait(rare_events(server.host))
        targets = [server.host.metrics_url.removeprefix("http://") for server in servers.values()]
        yield Observed(exits.enter_context(scraping(folder, targets, ALERTS)), servers)


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """Real engines, which have answered a load and been evaluated; all of it has been scraped."""
    model, folder = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("observed")
    write_checkpoint(model, "byte_level")
    (model / "config.json").write_text(json.dumps(SHAPE))
    hosts = {
        precision: host_of(model, precision, load_format="random", metrics_compat="vllm")
        for precision in PRECISIONS
    }
    with serving(hosts, folder) as found:
        load(found, folder, "--concurrency", "4", "--requests", "16", "--output-tokens", "16", "--no-check")
        for server in found.servers.values():
            server.wait(evaluated(server.host))
        found.prometheus.until(
            lambda seen: has_seen_all(found) and len(seen.query("halftone_quality_perplexity")) == len(hosts)
        )
        yield found


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """Engines that sleep for about 80 ms a step, and 1600 before the first, so that neither they nor the
    client wait for a core; all that the fronts count is kept, value by value."""
    model, folder = tmp_path_factory.mktemp("tokenizer"), tmp_path_factory.mktemp("paced")
    write_checkpoint(model, "byte_level")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("STEP_MS", "80"),
            ("QUEUE_MS", "1600"),
            ("STEP_SPREAD", "0.5"),
            ("VOCAB", "400"),
        ):
            patch.setenv(f"FAKE_{name}", value)
        hosts = {precision: host_of(model, precision, command=FAKE_ENGINE) for precision in PRECISIONS}
        with serving(hosts, folder) as found:
            keep_latencies(patch, found.servers)
            options = ("--concurrency", "20", "--requests", "120", "--output-tokens", "10")
            load(found, folder, *options, "--no-check", "--records")
            found.prometheus.until(lambda _: has_seen_all(found))
            yield found


def keep_latencies(patch: pytest.MonkeyPatch, servers: dict[str, Server]) -> None:
    """From here on each value that a front counts also goes into its Server's `observed_s`."""
    observe = Histogram.observe
    place_of = {}
    for server in servers.values():
        (counts,) = server.host.metrics.counts()
        for latency in LATENCIES:
            server.observed_s[latency] = []
            place_of[counts.histogram(f"halftone_{latency}_seconds")] = server.observed_s[latency]

    def observe_and_keep(histogram: Histogram, value: float, count: int = 1) -> None:
        observe(histogram, value, count)
        if histogram in place_of:
            place_of[histogram].extend([value] * count)

    patch.setattr(Histogram, "observe", observe_and_keep)


def has_seen_all(found: Observed) -> bool:
    """Is what the servers count now what was scraped last?"""
    name = "halftone_requests_total"
    seen = {
        (labels["precision"], labels["finish_reason"]): number
        for labels, number in found.prometheus.query(name)
    }
    return seen == {
        (precision, reason): number
        for precision, server in found.servers.items()
        for (reason,), number in server.host.metrics.numbers(name).items()
    }


def host_of(
    model: Path, precision: str, command: Sequence[str] = ENGINE_COMMAND, **flags: Any
) -> Callable[[], Host]:
    settings = load_settings(
        model=str(model), served_model_name="tiny", precision=precision, device="cpu", threads=1,
        kv_tokens=8192, port=0, time_kernels=True, **flags,
    )  # fmt: skip
    return lambda: Host(settings, model, create_app, command=command)


def load(found: Observed, folder: Path, *options: str) -> None:
    """The load generator on all servers at once; what it saw is theirs."""
    clients = {}
    for precision, server in found.servers.items():
        command = [sys.executable, "-m", "loadtest", "--url", server.host.url, "--warmup", "0", "--seed", "1",
                   "--input-tokens", "48", "--clients", "1", *options,
                   "--json", str(folder / f"{precision}.json")]  # fmt: skip
        clients[precision] = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    for precision, client in clients.items():
        said, _ = client.communicate(timeout=TIMEOUT_S)
        assert client.returncode == 0, said
        found.servers[precision].load = json.loads((folder / f"{precision}.json").read_text())


async def evaluated(host: Host) -> None:
    await host.client.evaluate([list(range(3, 35))], ["prefill"], reference="bf16")
    await rare_events(host)


async def rare_events(host: Host) -> None:
    """What only a GPU counts, and only int8 there; and what one server of one precision never does."""
    host.metrics.step(StepStats(outliers={"down_proj.0": [2, 100]}))
    host.metrics.swapped("swapped", 2.5)


@pytest.mark.parametrize(("name", "expression"), panels(), ids=lambda text: text[:60])
def test_a_panel_has_a_series_of_each_precision(observed: Observed, name: str, expression: str) -> None:
    found = observed.prometheus.query(expression)
    if "Unreachable" in name:  # what does not answer does not say its precision
        assert [number for _, number in found] in ([0], [0] * len(PRECISIONS))
        return
    # a quantile of what did not happen lately is no number: of an endpoint that nobody asks now
    told = {labels["precision"] for labels, number in found if not math.isnan(number)}
    assert told == set(PRECISIONS), expression


@pytest.mark.parametrize("latency", LATENCIES)
def test_a_median_is_that_of_all_values(
    paced: Observed, latency: str, record_property: Callable[[str, object], None]
) -> None:
    """By the query of the panels, from buckets; and from the values themselves."""
    medians = (
        text for _, text in panels() if text.startswith("histogram_quantile(0.5, sum by (le, precision) ")
    )
    (expression,) = {text for text in medians if f"halftone_{latency}_seconds" in text}
    found = paced.prometheus.query(expression)
    assert {labels["precision"] for labels, _ in found} == set(PRECISIONS)
    for labels, seconds in found:
        exact = statistics.median(paced.servers[labels["precision"]].observed_s[latency])
        told = f"{seconds / exact - 1:+.1%} of {exact * 1e3:.0f} ms"
        record_property("figure", f"median {latency}, {labels['precision']}, by Prometheus: {told}")
        assert seconds == pytest.approx(exact, rel=0.05), labels


@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_front_counts_what_the_client_saw(paced: Observed, precision: str, latency: str) -> None:
    """Percentile by percentile. A busy machine moves what it delays, in one of them and not in the other, but
    never all percentiles; a clock that starts or stops elsewhere does."""
    server = paced.servers[precision]
    (run,) = server.load["levels"][0]["runs"]
    client = seen_by_client([msgspec.convert(one, Record) for one in run["requests"]], latency)
    front = server.observed_s[latency]
    pairs = [(percentile(front, percent), percentile(client, percent)) for percent in range(1, 100)]
    agreeing = [pair for pair in pairs if pair[0] == pytest.approx(pair[1], rel=0.05)]
    assert len(agreeing) >= 25, pairs


def seen_by_client(records: Sequence[Record], latency: str) -> list[float]:
    if latency == "inter_token_latency":
        return [gap_s for record in records for gap_s in record.gaps_s()]
    property_of = {"time_to_first_token": "ttft_s", "time_per_output_token": "tpot_s", "end_to_end": "e2e_s"}
    return [getattr(record, property_of[latency]) for record in records]


def test_bytes_are_those_of_version(observed: Observed) -> None:
    """All that the weights take, part by part, and the whole KV cache."""
    for labels, size in observed.prometheus.query('halftone_memory_bytes{part=~"weights.*"}'):
        told = observed.servers[labels["precision"]].version()["engine"]["memory_bytes"]
        assert size == told[labels["part"]], labels
    whole = 'sum by (precision) (halftone_memory_bytes{part=~"%s.*"})'
    for group in ("weights", "kv"):
        for labels, size in observed.prometheus.query(whole % group):
            told = observed.servers[labels["precision"]].version()["engine"]["memory_bytes"]
            assert size == sum(bytes for part, bytes in told.items() if part.startswith(group)), labels


@pytest.mark.parametrize(
    "query",
    [
        "sum by (precision) (vllm:num_requests_running)",  # KServe's and KEDA's examples scale on these two
        'sum by (precision) (vllm:num_requests_waiting{model_name="tiny"})',
        "max by (precision) (vllm:kv_cache_usage_perc)",
        "sum by (precision) (rate(vllm:request_success_total[5m]))",
        "histogram_quantile(0.9, sum by (le, precision) (rate(vllm:time_to_first_token_seconds_bucket[5m])))",
        "histogram_quantile(0.5, sum by (le, precision) (rate(vllm:iteration_tokens_total_bucket[5m])))",
        "max by (precision, block_size, num_gpu_blocks) (vllm:cache_config_info)",
        'sum by (precision) (rate(http_requests_total{status="2xx"}[5m]))',
    ],
)
def test_who_knows_vllm_finds_its_names(observed: Observed, query: str) -> None:
    assert {labels["precision"] for labels, _ in observed.prometheus.query(query)} == set(PRECISIONS)


def test_nf4_takes_less_than_bf16(observed: Observed) -> None:
    """What the dashboard is for, as it would be read off."""
    (expression,) = {e for name, e in panels() if name.startswith("Precision side by side: Weights")}
    size = {labels["precision"]: number for labels, number in observed.prometheus.query(expression)}
    assert size["nf4"] < size["bf16"]


def test_joules_are_the_meters(observed: Observed) -> None:
    found = observed.prometheus.query("deriv(halftone_energy_joules_total[5m])")
    assert [watts for _, watts in found] == [pytest.approx(WATTS, rel=0.05)] * len(PRECISIONS)


@pytest.mark.parametrize(("name", "expression"), alerts().items(), ids=lambda text: text[:40])
def test_an_alert_is_evaluated_and_quiet(observed: Observed, name: str, expression: str) -> None:
    def evaluated(prometheus: Prometheus) -> list[dict[str, Any]]:
        return [rule for rule in prometheus.alerts() if rule["name"] == name and rule["health"] != "unknown"]

    (rule,) = observed.prometheus.until(evaluated)
    assert rule["health"] == "ok", rule
    assert rule["state"] != "firing"
    observed.prometheus.query(filled(expression))
