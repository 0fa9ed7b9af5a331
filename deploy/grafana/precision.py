"""*Precision side by side*: what each precision costs and what it gives, on one page."""

from panels import (
    Panel,
    bars,
    each_precision,
    gauge,
    heatmap,
    lines,
    mean,
    quantile,
    quantiles,
    rate,
    ratio,
    row,
    scatter,
    table,
)

GENERATED = 'kind="generated"'
WEIGHTS = gauge("memory_bytes", 'part=~"weights.*"')
TOKENS_A_JOULE = ratio(rate("tokens_total", GENERATED), rate("energy_joules_total"))
NO_COUNTER = "None on a CPU, which has no such counter."


def panels() -> list[Panel]:
    return [
        table(
            "At a glance",
            {
                "Weights": ("bytes", WEIGHTS),
                "All memory": ("bytes", gauge("memory_bytes")),
                "KV tokens": ("short", gauge("kv_cache_tokens", 'state="capacity"')),
                "Tokens/s served": ("short", rate("tokens_total", GENERATED, over="$__range")),
                "TTFT p50": ("s", quantile(0.5, "time_to_first_token_seconds", over="$__range")),
                "TTFT p95": ("s", quantile(0.95, "time_to_first_token_seconds", over="$__range")),
                "ITL p50": ("s", quantile(0.5, "inter_token_latency_seconds", over="$__range")),
                "ITL p95": ("s", quantile(0.95, "inter_token_latency_seconds", over="$__range")),
                "Tokens/J": (
                    "short",
                    ratio(
                        rate("tokens_total", GENERATED, over="$__range"),
                        rate("energy_joules_total", over="$__range"),
                    ),
                ),
                "Perplexity": ("short", gauge("quality_perplexity", 'mode="prefill"', how="max")),
                "KL, nats": ("short", gauge("quality_divergence_nats", how="max")),
            },
            "Over the time range above. Quality stands where it was evaluated, joules where a GPU counts.",
        ),
        row("Speed"),
        lines("Time to first token", "s", quantiles("time_to_first_token_seconds", 0.5, 0.95)),
        lines("Inter-token latency", "s", quantiles("inter_token_latency_seconds", 0.5, 0.95)),
        lines(
            "Time per output token",
            "s",
            quantiles("time_per_output_token_seconds", 0.5, 0.95),
            "Mean of a request after its first token.",
        ),
        lines(
            "End to end",
            "s",
            quantiles("end_to_end_seconds", 0.5, 0.95),
            "From arrival to the end of the answer.",
        ),
        lines(
            "Generated tokens per second", "count:tok/s", {"{{precision}}": rate("tokens_total", GENERATED)}
        ),
        lines("Engine step", "s", quantiles("step_seconds", 0.5, 0.95), "One forward pass with sampling."),
        row("Each precision"),
        each_precision(
            lines(
                "Memory by part",
                "bytes",
                {"{{part}}": gauge("memory_bytes", by="precision, part")},
                "Parts are disjoint: docs/memory.md names them.",
                stacked=True,
            )
        ),
        each_precision(
            heatmap("Inter-token latency", "inter_token_latency_seconds", "Tokens a second in each bucket.")
        ),
        row("Memory"),
        bars("Weights", "bytes", {"{{precision}}": WEIGHTS}),
        bars(
            "What the rest buys: KV cache",
            "short",
            {"{{precision}}": gauge("kv_cache_tokens", 'state="capacity"')},
            "Tokens that fit.",
        ),
        bars(
            "Peak by phase",
            "bytes",
            {"{{precision}} {{phase}}": gauge("memory_peak_bytes", by="precision, phase")},
        ),
        scatter(
            "Latency against memory",
            ("Memory of weights", "bytes", WEIGHTS),
            ("Inter-token latency p50", "s", quantile(0.5, "inter_token_latency_seconds", over="$__range")),
            "Down and to the left is better: a precision that another beats in both is not worth serving.",
            width=6,
        ),
        row("Energy"),
        lines(
            "Tokens per joule",
            "short",
            {"{{precision}}": TOKENS_A_JOULE},
            f"Generated tokens over the whole GPU's energy, at the load that there was. {NO_COUNTER}",
        ),
        lines(
            "Power",
            "watt",
            {"{{precision}}": gauge("power_watts", how="max")},
            f"Of the whole GPU. {NO_COUNTER}",
        ),
        lines(
            "Joules per generated token",
            "joule",
            {"{{precision}}": ratio(rate("energy_joules_total"), rate("tokens_total", GENERATED))},
            NO_COUNTER,
        ),
        row("Quality"),
        bars(
            "Perplexity",
            "short",
            {"{{precision}} {{mode}}": gauge("quality_perplexity", by="precision, mode", how="max")},
            "Of the last text evaluated.",
        ),
        bars(
            "KL divergence from the reference",
            "short",
            {"{{precision}}": gauge("quality_divergence_nats", how="max")},
            "Nats a token, in the last evaluation.",
        ),
        bars(
            "Likeliest token is the reference's",
            "percentunit",
            {"{{precision}}": gauge("quality_agreement_ratio", how="max")},
            "In the last evaluation.",
        ),
        lines(
            "Activations in 16 bits (int8)",
            "percentunit",
            {
                "{{precision}} {{layer}}": ratio(
                    rate("int8_outliers_total", by="precision, layer"),
                    rate("int8_activations_total", by="precision, layer"),
                )
            },
            "Share of numbers that int8's decomposition multiplied in 16 bits; counted on a GPU.",
            width=6,
        ),
        row("Where a request's time goes"),
        *(
            lines(title, "s", {"{{precision}}": mean(histogram)}, help)
            for title, histogram, help in (
                ("Queue, mean", "queue_seconds", "From arrival at the engine to the first step."),
                ("Prefill, mean", "prefill_seconds", "From the first step to the first token."),
                ("Decode, mean", "decode_seconds", "From the first token to the end."),
            )
        ),
        row("Load"),
        lines(
            "Requests running and waiting",
            "short",
            {
                "{{precision}} running": gauge("requests_running"),
                "{{precision}} waiting": gauge("requests_waiting"),
            },
        ),
        lines(
            "KV cache in use",
            "percentunit",
            {"{{precision}}": gauge("kv_cache_usage_ratio", how="max")},
            maximum=1,
        ),
        lines("Requests in a step", "short", quantiles("batch_size", 0.5, 0.95)),
        row("What serves"),
        bars(
            "Seconds to load, by stage",
            "s",
            {"{{precision}} {{stage}}": gauge("model_load_seconds", by="precision, stage", how="max")},
            width=12,
        ),
        bars(
            "A decode step of one row, by op",
            "s",
            {"{{precision}} {{op}}": gauge("kernel_seconds", 'rows="1"', by="precision, op", how="max")},
            "All layers' together, each op timed alone at the start of a server with --time-kernels.",
            width=12,
        ),
        bars(
            "Kernel by layer class",
            "none",
            {
                "{{precision}} {{layer}}: {{kernel}}": gauge(
                    "kernel_info", by="precision, layer, kernel", how="max"
                )
            },
            "Which code multiplies: a name that surprises explains a figure that does.",
            width=12,
        ),
    ]
