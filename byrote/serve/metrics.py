"""`/metrics`: what the server and its engine have done, in Prometheus' text form."""

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from byrote.serve.link import EngineLink

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_KNOWN = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/memories", "/health", "/metrics", "/")
_GAUGES = {
    "waiting": "sequences that wait",
    "running": "sequences in the batch",
    "pages_used": "cache pages in use",
    "pages_total": "cache pages",
    "pages_kept": "cache pages in use by nobody now, kept for later prompts",
}
_COUNTERS = {
    "prefix_hit_tokens": "prompt tokens found in the prefix cache",
    "prompt_tokens": "prompt tokens",
    "output_tokens": "tokens made",
    "preemptions": "sequences that gave up their cache to others",
    "finished": "sequences that ended by themselves",
    "aborted": "sequences whose client went away",
    "errors": "sequences that ended with an error",
}


class Metrics:
    def __init__(self, link: EngineLink) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("byrote_requests", "answers by path and status", ("path", "status"), registry=self.registry)
        self._first = Histogram("byrote_first_token_seconds", "from request to first token", buckets=_SECONDS, registry=self.registry)
        self._between = Histogram(
            "byrote_between_tokens_seconds", "between two events of a stream", buckets=_SECONDS, registry=self.registry
        )
        self.registry.register(_EngineStats(link))

    def count(self, path: str, status: int, _seconds: float) -> None:
        """An answer; unknown paths share one label, or clients could make any number of them."""
        self._requests.labels(path if path in _KNOWN else "other", str(status)).inc()

    def pace(self) -> "Pace":
        return Pace(self._first, self._between)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Pace:
    """Times the events of one request."""

    def __init__(self, first: Histogram, between: Histogram) -> None:
        self._first, self._between, self._last, self._begun = first, between, time.perf_counter(), False

    def tick(self) -> None:
        now = time.perf_counter()
        (self._between if self._begun else self._first).observe(now - self._last)
        self._last, self._begun = now, True


class _EngineStats:
    """The engine's own counters, as it last told them. They start anew with its process."""

    def __init__(self, link: EngineLink) -> None:
        self._link = link

    def collect(self) -> Iterator[Metric]:
        stats: dict[str, Any] = self._link.stats
        yield GaugeMetricFamily("byrote_engine_up", "whether the engine can serve", value=float(self._link.ready.is_set()))
        yield GaugeMetricFamily("byrote_under_way", "requests whose clients wait", value=self._link.under_way)
        yield CounterMetricFamily("byrote_engine_deaths", "times the engine's process died", value=len(self._link.deaths))
        for name, what in _GAUGES.items():
            yield GaugeMetricFamily(f"byrote_{name}", what, value=stats.get(name, 0))
        for name, what in _COUNTERS.items():
            yield CounterMetricFamily(f"byrote_{name}", what, value=stats.get(name, 0))
        for name in ("drafted", "accepted"):
            family = CounterMetricFamily(f"byrote_{name}_tokens", f"draft tokens {name}, by position", labels=("position",))
            for position, count in enumerate(stats.get(name, ()), 1):
                family.add_metric((str(position),), count)
            yield family
