"""*Operations*: is it up, is it fast enough, what is it short of. For whoever is on call."""

from panels import (
    Panel,
    bars,
    buckets,
    each_precision,
    gauge,
    heatmap,
    labels,
    lines,
    mean,
    quantile,
    quantiles,
    rate,
    ratio,
    row,
    share_below,
    share_of,
    table,
    tile,
)

ENDED = rate("requests_total")
GENERATED = 'kind="generated"'
PROMPT = 'kind=~"prompt|cached"'
HIT_SHARE = ratio(rate("tokens_total", 'kind="cached"'), rate("tokens_total", PROMPT))
RESPONSES = "request_duration_seconds_count"
SERVER_ERRORS = ratio(rate(RESPONSES, 'status=~"5.."'), rate(RESPONSES))
MODEL = "model, precision"


def increase(counter: str) -> str:
    return f"round(sum by ({MODEL}) (increase(halftone_{counter}{{{labels()}}}[$__range])))"


def most(gauge_name: str) -> str:
    return f"max by ({MODEL}) (max_over_time(halftone_{gauge_name}{{{labels()}}}[$__range]))"


def per_precision(expression: str) -> dict[str, str]:
    return {"{{precision}}": expression}


def tiles() -> list[Panel]:
    return [
        tile("Requests/s", "reqps", per_precision(ENDED), "Ended, for any reason."),
        tile(
            "Prompt tokens/s",
            "count:tok/s",
            per_precision(rate("tokens_total", PROMPT)),
            "Computed, or found in the prefix cache.",
        ),
        tile("Generated tokens/s", "count:tok/s", per_precision(rate("tokens_total", GENERATED))),
        tile(
            "5xx",
            "percentunit",
            per_precision(f"{SERVER_ERRORS} or 0 * {rate(RESPONSES)}"),
            "Share of HTTP responses. An error inside a stream is in *Errors by kind*.",
            orange=0.001,
            red=0.01,
        ),
        tile("TTFT p95", "s", per_precision(quantile(0.95, "time_to_first_token_seconds"))),
        tile("ITL p95", "s", per_precision(quantile(0.95, "inter_token_latency_seconds"))),
        tile("End to end p95", "s", per_precision(quantile(0.95, "end_to_end_seconds"))),
        tile(
            "Ready",
            "short",
            per_precision(gauge("engine_up")),
            "Engines that take requests.",
            orange=1,
            red=0.5,
            empty="none",
        ),
        tile("Running", "short", per_precision(gauge("requests_running"))),
        tile("Waiting", "short", per_precision(gauge("requests_waiting")), orange=1, red=32),
        tile(
            "KV cache",
            "percentunit",
            per_precision(gauge("kv_cache_usage_ratio", how="max")),
            "Of the fullest engine.",
            orange=0.9,
            red=0.98,
        ),
        tile(
            "Preemptions/s",
            "ops",
            per_precision(rate("preemptions_total")),
            "Requests put back for room.",
            orange=0.01,
            red=1,
        ),
        tile("Prefix cache", "percentunit", per_precision(HIT_SHARE), "Share of prompt tokens found there."),
        tile(
            "TTFT in time",
            "percentunit",
            per_precision(share_below("time_to_first_token_seconds", "$ttft_slo")),
            "Share of requests whose first token came within `ttft_slo` seconds.",
            orange=0.99,
            red=0.95,
        ),
        tile(
            "TPOT in time",
            "percentunit",
            per_precision(share_below("time_per_output_token_seconds", "$tpot_slo")),
            "Share of requests whose time per token was within `tpot_slo` seconds.",
            orange=0.99,
            red=0.95,
        ),
        tile(
            "Unreachable",
            "short",
            {"servers": 'count(up{job="halftone"} == 0) or vector(0)'},
            "Servers that Prometheus cannot scrape; their other series end there.",
            orange=0.5,
            red=1,
        ),
    ]


def panels() -> list[Panel]:
    over = "$__range"
    return [
        *tiles(),
        table(
            "Each model and precision",
            {
                "Engines": ("none", gauge("engine_up", by=MODEL)),
                "Requests/s": ("reqps", rate("requests_total", by=MODEL, over=over)),
                "Generated tokens/s": ("count:tok/s", rate("tokens_total", GENERATED, by=MODEL, over=over)),
                "TTFT p95": ("s", quantile(0.95, "time_to_first_token_seconds", MODEL, over)),
                "ITL p95": ("s", quantile(0.95, "inter_token_latency_seconds", MODEL, over)),
                "End to end p95": ("s", quantile(0.95, "end_to_end_seconds", MODEL, over)),
                "Errors": (
                    "percentunit",
                    ratio(
                        rate("requests_total", 'finish_reason="error"', by=MODEL, over=over),
                        rate("requests_total", by=MODEL, over=over),
                    ),
                ),
                "Most KV cache": ("percentunit", most("kv_cache_usage_ratio")),
                "Preemptions": ("short", increase("preemptions_total")),
                "Restarts": ("short", increase("engine_restarts_total")),
            },
            "Over the time range above.",
            by=MODEL,
        ),
        row("Latency"),
        *(
            lines(title, "s", quantiles(histogram, 0.5, 0.95, 0.99, with_mean=True), help)
            for title, histogram, help in (
                ("Time to first token", "time_to_first_token_seconds", "From arrival at the server."),
                (
                    "Inter-token latency",
                    "inter_token_latency_seconds",
                    "From one token of a request to its next.",
                ),
                (
                    "Time per output token",
                    "time_per_output_token_seconds",
                    "Mean of a request after its first token.",
                ),
                ("End to end", "end_to_end_seconds", "From arrival to the end of the answer."),
                ("Time in the queue", "queue_seconds", "From arrival at the engine to the first step."),
            )
        ),
        lines(
            "Where a request's time goes",
            "s",
            {
                f"{{{{precision}}}} {phase}": mean(f"{phase}_seconds")
                for phase in ("queue", "prefill", "decode")
            },
            "Means; together about the time from end to end.",
            stacked=True,
        ),
        *(
            each_precision(heatmap(title, histogram, "Observations a second in each bucket."))
            for title, histogram in (
                ("Time to first token", "time_to_first_token_seconds"),
                ("Inter-token latency", "inter_token_latency_seconds"),
                ("End to end", "end_to_end_seconds"),
            )
        ),
        row("Throughput and errors"),
        lines(
            "Tokens",
            "count:tok/s",
            {"{{precision}} {{kind}}": rate("tokens_total", by="precision, kind")},
            "*prompt*: computed. *cached*: found in the prefix cache. *discarded*: of the generated, those "
            "behind a stop or an abort.",
            width=6,
        ),
        lines(
            "Requests ended, by reason",
            "reqps",
            {"{{precision}} {{finish_reason}}": rate("requests_total", by="precision, finish_reason")},
            "*abort*: the client went away.",
            width=6,
        ),
        lines(
            "Errors by kind",
            "reqps",
            {"{{precision}} {{kind}}": rate("request_errors_total", by="precision, kind")},
            "*model*: numbers that are not finite. *memory*: none left for this request.",
            width=6,
        ),
        lines(
            "Requests refused, by reason",
            "reqps",
            {"{{precision}} {{reason}}": rate("requests_rejected_total", by="precision, reason")},
            "*overloaded*: the queue was full (429).",
            width=6,
        ),
        row("Saturation"),
        lines(
            "Requests",
            "short",
            {
                "{{precision}} running": gauge("requests_running"),
                "{{precision}} waiting": gauge("requests_waiting"),
                "{{precision}} batch limit": gauge("requests_limit", 'limit="batch"'),
            },
        ),
        lines(
            "KV cache in use",
            "percentunit",
            per_precision(gauge("kv_cache_usage_ratio", how="max")),
            "Of the fullest engine. Near 100 % under load is meant; what comes then waits, or is preempted.",
            maximum=1,
        ),
        lines(
            "Preemptions",
            "ops",
            per_precision(rate("preemptions_total")),
            "More than now and then: a larger `kv_tokens`, `kv_dtype = int8`, or fewer `max_batch_requests`.",
        ),
        lines("Tokens in a step", "count:tok", quantiles("step_tokens", 0.5, 0.99, with_mean=True)),
        lines("Requests in a step", "short", quantiles("batch_size", 0.5, 0.99, with_mean=True)),
        lines("Engine step", "s", quantiles("step_seconds", 0.5, 0.99, with_mean=True)),
        row("Caching"),
        lines("Prompt tokens found in the prefix cache", "percentunit", per_precision(HIT_SHARE), maximum=1),
        lines(
            "Prompt tokens by source",
            "count:tok/s",
            {"{{precision}} {{kind}}": rate("tokens_total", PROMPT, by="precision, kind")},
            stacked=True,
        ),
        lines(
            "KV cache by state",
            "short",
            {"{{precision}} {{state}}": gauge("kv_cache_tokens", by="precision, state")},
            "Tokens. *reusable*: held only for their prefix, given up when room is needed.",
        ),
        row("Workload"),
        lines(
            "Prompt length", "count:tok", quantiles("request_prompt_tokens", 0.5, 0.95, 0.99, with_mean=True)
        ),
        lines(
            "Answer length",
            "count:tok",
            quantiles("request_generated_tokens", 0.5, 0.95, 0.99, with_mean=True),
        ),
        lines(
            "Share of each finish reason",
            "percentunit",
            {
                "{{precision}} {{finish_reason}}": share_of(
                    rate("requests_total", by="precision, finish_reason"), ENDED
                )
            },
            "More *length*: answers are cut by `max_tokens` or the context.",
            maximum=1,
        ),
        *(
            bars(
                title,
                "percentunit",
                {
                    "{{precision}} ≤ {{le}}": share_of(
                        buckets(histogram, over=over), rate(f"{histogram}_count", over=over)
                    )
                },
                "Share of requests up to a length.",
                width=12,
            )
            for title, histogram in (
                ("Prompts up to a length", "request_prompt_tokens"),
                ("Answers up to a length", "request_generated_tokens"),
            )
        ),
        row("HTTP"),
        lines(
            "Responses by status",
            "reqps",
            {"{{precision}} {{status}}": rate(RESPONSES, by="precision, status")},
        ),
        lines(
            "Responses by endpoint",
            "reqps",
            {"{{precision}} {{endpoint}}": rate(RESPONSES, by="precision, endpoint")},
        ),
        lines(
            "Duration p95 by endpoint",
            "s",
            {"{{precision}} {{endpoint}}": quantile(0.95, "request_duration_seconds", "precision, endpoint")},
            "To the end of the response: a streamed one lasts as long as its answer.",
        ),
        row("Engine"),
        lines("Ready", "short", per_precision(gauge("engine_up")), width=6),
        lines("Restarts", "short", per_precision(gauge("engine_restarts_total")), width=6),
        lines(
            "Precision swaps by outcome",
            "ops",
            {"{{precision}} {{outcome}}": rate("precision_swaps_total", by="precision, outcome")},
            "Under the precision that was served after it. *rolled_back*: what served before serves again.",
            width=12,
        ),
        bars(
            "Requests held for a swap, mean",
            "s",
            per_precision(mean("precision_swap_seconds", over=over)),
            "From the moment on that requests wait until they go on.",
            width=12,
        ),
        bars(
            "Loading",
            "percentunit",
            {
                "{{precision}} {{stage}}": ratio(
                    gauge("loading_done", by="precision, stage, unit"),
                    gauge("loading_expected", by="precision, stage, unit"),
                )
            },
            "How far each stage of the present engine's load is.",
        ),
        bars(
            "Seconds to load, by stage",
            "s",
            {"{{precision}} {{stage}}": gauge("model_load_seconds", by="precision, stage", how="max")},
        ),
        lines(
            "Memory by part",
            "bytes",
            {"{{precision}} {{part}}": gauge("memory_bytes", by="precision, part")},
            width=12,
            stacked=True,
        ),
        lines("Power", "watt", per_precision(gauge("power_watts", how="max")), "None on a CPU.", width=6),
        lines(
            "Unreachable",
            "short",
            {"{{instance}}": 'up{job="halftone"} == bool 0'},
            "1: Prometheus cannot scrape it; its other series end here.",
            width=6,
        ),
    ]
