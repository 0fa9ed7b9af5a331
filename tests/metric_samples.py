"""One number off the page that a scrape would get."""

from prometheus_client.parser import text_string_to_metric_families

from service.metrics import Metrics


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    """Of the one series with this name and these labels, whatever others it has; None where there is none."""
    found = [
        sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) <= 1, (name, labels, found)
    return found[0] if found else None
