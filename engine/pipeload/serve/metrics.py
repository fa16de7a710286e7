"""Figures for Prometheus: those of requests as they end, those of the engine when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipeload.machine.memory import peak_rss_bytes, rss_bytes
from pipeload.serve.admission import Admission
from pipeload.serve.models import Models

if TYPE_CHECKING:
    from pipeload.tasks.generate.sequence import Generation

__all__ = ["Count", "Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_RATES = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Count(msgspec.Struct, frozen=True, array_like=True):
    """A count of a figure: a sample, as Prometheus has it."""

    sample: str
    labels: Mapping[str, str]
    value: float


class Metrics:
    """The figures of a server.

    Args:
        models: those of the engine.
        admission: calls that are served or wait.
        earlier: counts of requests of the processes before this one, which it goes on with.

    Attributes:
        tokens_per_s: model -> tokens a second of its latest answer after its first token.
    """

    def __init__(
        self, models: Models, admission: Admission, earlier: Mapping[str, Sequence[Count]] | None = None
    ) -> None:
        self.tokens_per_s: dict[str, float] = {}
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "pipeload_requests", "Requests by route and status.", ("route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "pipeload_request_seconds",
            "From a request to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first = Histogram(
            "pipeload_first_token_seconds",
            "From the beginning of a generation to its first token.",
            ("model",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._rate = Histogram(
            "pipeload_tokens_per_second",
            "Tokens a second of one answer after its first token.",
            ("model",),
            buckets=_RATES,
            registry=self._registry,
        )
        self._prompt_tokens = self._tokens("prompt_tokens", "Tokens of prompts.")
        self._new_tokens = self._tokens("generated_tokens", "Tokens of answers.")
        self._drafted = self._tokens("drafted_tokens", "Guessed tokens that sweeps have checked.")
        self._accepted = self._tokens("accepted_tokens", "Guessed tokens that were right.")
        self._idled = Counter(
            "pipeload_idled",
            "Times that the process was replaced, as all models were idle.",
            registry=self._registry,
        )
        self._requested = _Summed(self._registry, earlier or {})
        self._all = CollectorRegistry()
        self._all.register(self._requested)
        self._all.register(_Engine(models, admission))

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request has ended."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        """The first token of a generation has come."""
        self._first.labels(model).observe(seconds)

    def generated(self, model: str, results: Sequence[Generation], prompt_tokens: int, seconds: float) -> None:
        """A generation has ended, this long after its first token."""
        tokens = [len(one.token_ids) for one in results]
        self._prompt_tokens.labels(model).inc(prompt_tokens)
        self._new_tokens.labels(model).inc(sum(tokens))
        self._drafted.labels(model).inc(sum(one.drafted_tokens for one in results))
        self._accepted.labels(model).inc(sum(one.accepted_tokens for one in results))
        if seconds > 0 and max(tokens) > 1:
            rate = self.tokens_per_s[model] = (max(tokens) - 1) / seconds
            self._rate.labels(model).observe(rate)

    def text(self) -> bytes:
        """All figures in Prometheus' format."""
        return generate_latest(self._all)

    def counts(self) -> dict[str, list[Count]]:
        """Counts of requests, for a process that takes the place of this one."""
        return {
            figure.name: [
                Count(one.name, one.labels, one.value) for one in figure.samples if not one.name.endswith("_created")
            ]
            for figure in self._requested.collect()
        }

    def idled(self) -> None:
        """The process has taken the place of one whose models were idle."""
        self._idled.inc()

    def _tokens(self, name: str, text: str) -> Counter:
        return Counter(f"pipeload_{name}", text, ("model",), registry=self._registry)


class _Summed(Collector):
    """The counts of this process, and those of the processes before it."""

    def __init__(self, registry: CollectorRegistry, earlier: Mapping[str, Sequence[Count]]) -> None:
        self._registry = registry
        self._earlier = {
            figure: {(one.sample, *sorted(one.labels.items())): one for one in counts}
            for figure, counts in earlier.items()
        }

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        for figure in self._registry.collect():
            summed = Metric(figure.name, figure.documentation, figure.type)
            earlier = dict(self._earlier.get(figure.name, {}))
            for one in figure.samples:
                before = earlier.pop((one.name, *sorted(one.labels.items())), None)
                summed.add_sample(one.name, one.labels, one.value + (before.value if before else 0))
            for before in earlier.values():
                summed.add_sample(before.sample, dict(before.labels), before.value)
            yield summed


class _Engine(Collector):
    """Reads the figures of the process and of open models."""

    def __init__(self, models: Models, admission: Admission) -> None:
        self._models, self._admission = models, admission

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("pipeload_calls", "Calls that are served or wait.", len(self._admission.places))
        yield GaugeMetricFamily("pipeload_rss_bytes", "Memory of the process.", rss_bytes())
        yield GaugeMetricFamily("pipeload_peak_rss_bytes", "The most that it was.", peak_rss_bytes())
        gauges = {
            name: GaugeMetricFamily(f"pipeload_{name}", text, labels=("model",))
            for name, text in (
                ("open", "1 if the model is open, 0 if it is closed."),
                ("budget_bytes", "The budget of the process."),
                ("resident_bytes", "Weights that stay in memory between sweeps."),
                ("streamed_bytes", "Weights that each sweep reads."),
                ("cache_bytes", "KV caches that are planned for."),
                ("prefix_bytes", "KV caches of ended texts, for requests that begin as they do."),
                ("prefix_entries", "Texts whose KV caches are kept."),
                ("sweep_callers", "Calls that the latest sweep served."),
                ("sweep_seconds", "Duration of the latest sweep."),
                ("read_bytes_per_second", "Bandwidth of the latest sweep, while it read."),
                ("peak_read_bytes_per_second", "The best bandwidth that the profile knows, which follows passes."),
                ("efficiency", "T*, the shortest time of the latest sweep, by its own."),
            )
        }
        counters = {
            name: CounterMetricFamily(f"pipeload_{name}", text, labels=("model",))
            for name, text in (
                ("sweeps", "Passes over the weights."),
                ("read_bytes", "Bytes of weights that were read."),
                ("opened", "Times that the model was opened."),
                ("closed", "Times that the model was closed, since it was idle."),
                ("prefix_hits", "Generations that have found the beginning of their prompt."),
                ("prefix_reused_tokens", "Tokens of prompts that were not computed again."),
            )
        }
        for served in self._models.served.values():
            model, name = served.model, (served.name,)
            gauges["open"].add_metric(name, int(model is not None))
            gauges["prefix_bytes"].add_metric(name, served.prefixes.nbytes)
            gauges["prefix_entries"].add_metric(name, served.prefixes.entries)
            sweeps, read_bytes = served.sweeps, served.read_bytes
            if model is not None:
                stats = model.stats
                sweeps, read_bytes = sweeps + stats.passes, read_bytes + stats.read_bytes
            if served.here is not None:
                plan = served.here.plan
                found: dict[str, float | None] = {
                    "budget_bytes": plan.budget_bytes,
                    "resident_bytes": plan.resident_bytes,
                    "streamed_bytes": plan.streamed_bytes,
                    "cache_bytes": plan.cache_bytes,
                    "peak_read_bytes_per_second": stats.peak_read_bytes_per_s,
                }
                if (last := stats.last) is not None:
                    found |= {
                        "sweep_callers": last.calls,
                        "sweep_seconds": last.seconds,
                        "read_bytes_per_second": last.read_bytes_per_s,
                        "efficiency": last.efficiency,
                    }
                for key, value in found.items():
                    if value is not None:
                        gauges[key].add_metric(name, value)
            for key, count in (
                ("sweeps", sweeps),
                ("read_bytes", read_bytes),
                ("opened", served.opened),
                ("closed", served.closed),
                ("prefix_hits", served.prefixes.hits),
                ("prefix_reused_tokens", served.prefixes.reused_tokens),
            ):
                counters[key].add_metric(name, count)
        yield from gauges.values()
        yield from counters.values()
