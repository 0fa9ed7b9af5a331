"""Every Prometheus name, label, unit and bucket, and the counts behind them.

engine_client, api/ --events--> Metrics --> Counts, one a precision --render--> /metrics

catalogue    names, labels, units, buckets: what documentation and dashboards are checked against
counts       the numbers of one precision
server       Metrics: the events of a server's life -> counts
exposition   counts -> Prometheus' text format
vllm         the same counts under vLLM's names, for what reads those
"""

from service.metrics.catalogue import Family, catalogue
from service.metrics.exposition import CONTENT_TYPE
from service.metrics.server import Compat, Metrics, render
from service.metrics.vllm import TWINS

__all__ = ["CONTENT_TYPE", "TWINS", "Compat", "Family", "Metrics", "catalogue", "render"]
