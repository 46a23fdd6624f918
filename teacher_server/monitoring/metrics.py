"""Defines the Prometheus metrics of a replica in one list, and holds their values.

From the list come the metrics, the table in docs/operations.md and the Grafana dashboard
(`python -m deploy.dashboard`). Labels are names of declared teams and reasons of refusals, never
anything that a caller chooses.
"""

import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Metric,
    disable_created_metrics,
    make_wsgi_app,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import ThreadingWSGIServer

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
TEAM = ("team",)

Kind = Literal["counter", "gauge", "histogram"]
Group = Literal["Teams", "Replicas", "Ledger and access"]
Value = float | Mapping[str, float] | None
"""One number, one per team, or None while it is unknown."""


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """The definition of one metric."""

    name: str
    """As Prometheus shows it; a histogram's without _bucket, _sum and _count."""
    kind: Kind
    text: str
    group: Group
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS = (
    MetricSpec(
        "teacher_team_tokens_total",
        "counter",
        "Tokens dispatched to the teacher; they count towards quotas.",
        "Teams",
        TEAM,
    ),
    MetricSpec(
        "teacher_team_cost_total",
        "counter",
        "Cost of what was dispatched; shares are shares of it.",
        "Teams",
        TEAM,
    ),
    MetricSpec(
        "teacher_team_share_ratio",
        "gauge",
        "Share of the cost that the replica dispatched in the last minute.",
        "Teams",
        TEAM,
    ),
    MetricSpec(
        "teacher_team_entitled_ratio",
        "gauge",
        "What that share would be by the weights of the teams that had work.",
        "Teams",
        TEAM,
    ),
    MetricSpec(
        "teacher_team_waiting_seconds",
        "histogram",
        "How long a sequence of a team waited for its batch.",
        "Teams",
        TEAM,
        SECONDS,
    ),
    MetricSpec(
        "teacher_team_in_flight_tokens",
        "gauge",
        "Tokens of sequences that were admitted and are not answered yet.",
        "Teams",
        TEAM,
    ),
    MetricSpec(
        "teacher_team_queued_tokens",
        "gauge",
        "Of these, tokens that wait for a batch.",
        "Teams",
        TEAM,
    ),
    MetricSpec(
        "teacher_team_quota_left_tokens",
        "gauge",
        "What is left of today's quota of the whole service, as far as the replica knows; teams with "
        "a quota and requests in the last minutes.",
        "Teams",
        TEAM,
    ),
    MetricSpec(
        "teacher_written_tokens_total",
        "counter",
        "Tokens drawn for texts that are written.",
        "Teams",
        TEAM,
    ),
    MetricSpec("teacher_bytes_sent_total", "counter", "Payload bytes written.", "Teams", TEAM),
    MetricSpec(
        "teacher_head_bytes_sent_total",
        "counter",
        "Bytes of the vocabulary head written: each client needs them once.",
        "Teams",
        TEAM,
    ),
    MetricSpec(
        "teacher_rejected_total",
        "counter",
        "Requests answered with an error, and calls that were refused (team empty).",
        "Teams",
        ("team", "reason"),
    ),
    MetricSpec("teacher_queued_tokens", "gauge", "Tokens that wait for a batch.", "Replicas"),
    MetricSpec(
        "teacher_queued_work_seconds",
        "gauge",
        "How long what waits, texts too, would take at the rate of the last passes; autoscaling goes by it.",
        "Replicas",
    ),
    MetricSpec("teacher_streams", "gauge", "Open Score streams.", "Replicas"),
    MetricSpec("teacher_connections", "gauge", "Connections to the replica's ports.", "Replicas"),
    MetricSpec(
        "teacher_strangers",
        "gauge",
        "Of these, connections over which no caller was let in yet.",
        "Replicas",
    ),
    MetricSpec(
        "teacher_gate_share",
        "gauge",
        "Share of new connections from misbehaving addresses that is accepted; 1: all.",
        "Replicas",
    ),
    MetricSpec(
        "teacher_connections_shut_down_total",
        "counter",
        "Connections that were shut down, mostly those of strangers.",
        "Replicas",
        ("reason",),
    ),
    MetricSpec(
        "teacher_busy_seconds_total",
        "counter",
        "Time in which the teacher was computing.",
        "Replicas",
    ),
    MetricSpec(
        "teacher_batch_tokens",
        "histogram",
        "Tokens of one forward pass; its count is that of forward passes.",
        "Replicas",
        (),
        TOKENS,
    ),
    MetricSpec(
        "teacher_queue_seconds",
        "histogram",
        "How long a sequence waited for its batch.",
        "Replicas",
        (),
        SECONDS,
    ),
    MetricSpec(
        "teacher_forward_seconds",
        "histogram",
        "Time in the base model, per forward pass.",
        "Replicas",
        (),
        SECONDS,
    ),
    MetricSpec(
        "teacher_head_seconds",
        "histogram",
        "Time in the vocabulary head and selection, per forward pass.",
        "Replicas",
        (),
        SECONDS,
    ),
    MetricSpec(
        "teacher_encode_seconds",
        "histogram",
        "Time to encode the targets of one sequence, the wait for an encode thread included.",
        "Replicas",
        (),
        SECONDS,
    ),
    MetricSpec(
        "teacher_compact_seconds",
        "histogram",
        "Time to make targets of what was selected for one sequence; part of the encode time.",
        "Replicas",
        (),
        SECONDS,
    ),
    MetricSpec(
        "teacher_stage_seconds",
        "histogram",
        "Time of one forward pass in its other stages: fill (laying sequences out), launch (handing "
        "the work to the device; on a CPU, computing), wait (for the device), copy (to the host).",
        "Replicas",
        ("stage",),
        SECONDS,
    ),
    MetricSpec(
        "teacher_first_token_seconds",
        "histogram",
        "How long a text waited until its first token was drawn.",
        "Replicas",
        (),
        SECONDS,
    ),
    MetricSpec(
        "teacher_write_steps_total",
        "counter",
        "Launches that drew a token of each of some texts.",
        "Replicas",
    ),
    MetricSpec("teacher_texts_running", "gauge", "Texts that are being written.", "Replicas"),
    MetricSpec(
        "teacher_texts_waiting",
        "gauge",
        "Texts that wait for a slot or for pages of keys.",
        "Replicas",
    ),
    MetricSpec(
        "teacher_preemptions_total",
        "counter",
        "Texts whose pages were taken away for others, and that are computed again.",
        "Replicas",
    ),
    MetricSpec("teacher_key_pages", "gauge", "Pages for the keys of texts.", "Replicas"),
    MetricSpec("teacher_free_key_pages", "gauge", "Of these, pages without a user.", "Replicas"),
    MetricSpec(
        "teacher_unencoded_bytes",
        "gauge",
        "Upper bound of the bytes of answers that are scored and not encoded; above "
        "--targets.max-reply-mib the teacher waits.",
        "Replicas",
    ),
    MetricSpec(
        "teacher_answer_bytes",
        "gauge",
        "Upper bound of the bytes of unfinished answers, of all streams.",
        "Replicas",
    ),
    MetricSpec(
        "teacher_stream_answer_bytes_max",
        "gauge",
        "Upper bound of the bytes of unfinished answers, of the stream that has most.",
        "Replicas",
    ),
    MetricSpec("teacher_memory_bytes", "gauge", "Resident memory of the process.", "Replicas"),
    MetricSpec(
        "teacher_device_memory_bytes",
        "gauge",
        "Memory of tensors on the accelerator; 0 on a CPU.",
        "Replicas",
    ),
    MetricSpec(
        "teacher_directory_away",
        "gauge",
        "1 while quotas and usage cannot reach the directory.",
        "Ledger and access",
    ),
    MetricSpec(
        "teacher_ledger_sync_age_seconds",
        "gauge",
        "Time since the replica's use last reached the directory; usually about 1 s.",
        "Ledger and access",
    ),
    MetricSpec(
        "teacher_journal_segments",
        "gauge",
        "Segments of the replica's journal that wait for the directory.",
        "Ledger and access",
    ),
    MetricSpec(
        "teacher_certificate_expires_timestamp_seconds",
        "gauge",
        "When the certificate in --tls-cert expires, in seconds since 1970; absent without TLS.",
        "Ledger and access",
    ),
)
"""All metrics."""


class Metrics:
    """The metrics of one replica, in a registry of their own."""

    def __init__(self, why_not_serving: Callable[[], str] = str) -> None:
        """why_not_serving: says why /healthz fails; empty while the replica serves."""
        self._why_not_serving = why_not_serving
        disable_created_metrics()  # they double the number of series, and nothing here uses them
        self.registry = CollectorRegistry()
        self._metrics_page = make_wsgi_app(self.registry)
        counters = {
            spec.name: Counter(spec.name, spec.text, spec.labels, registry=self.registry)
            for spec in METRICS
            if spec.kind == "counter"
        }
        histograms = {
            spec.name: Histogram(
                spec.name, spec.text, spec.labels, buckets=spec.buckets, registry=self.registry
            )
            for spec in METRICS
            if spec.kind == "histogram"
        }
        self.queue_s = histograms["teacher_queue_seconds"]
        self._forward_s = histograms["teacher_forward_seconds"]
        self._head_s = histograms["teacher_head_seconds"]
        self.encode_s = histograms["teacher_encode_seconds"]
        self.compact_s = histograms["teacher_compact_seconds"]
        self._stage_s = histograms["teacher_stage_seconds"]
        self._batch_tokens = histograms["teacher_batch_tokens"]
        self.busy_s = counters["teacher_busy_seconds_total"]
        self.first_token_s = histograms["teacher_first_token_seconds"]
        self.written = counters["teacher_written_tokens_total"]
        self.steps = counters["teacher_write_steps_total"]
        self.preemptions = counters["teacher_preemptions_total"]
        self.bytes_sent = counters["teacher_bytes_sent_total"]
        self.head_bytes_sent = counters["teacher_head_bytes_sent_total"]
        self.rejected = counters["teacher_rejected_total"]
        self.connections_shut_down = counters["teacher_connections_shut_down_total"]
        self._team_tokens = counters["teacher_team_tokens_total"]
        self._team_cost = counters["teacher_team_cost_total"]
        self._team_waiting_s = histograms["teacher_team_waiting_seconds"]
        self._gauges = _Gauges()
        self.registry.register(self._gauges)

    def dispatched(self, team: str, tokens: int, cost: float, waited_s: float | None) -> None:
        """Counts a sequence, or a piece of a text, that was dispatched to the teacher.

        waited_s: None for a piece of a text that has waited before.
        """
        self._team_tokens.labels(team).inc(tokens)
        self._team_cost.labels(team).inc(cost)
        if waited_s is not None:
            self._team_waiting_s.labels(team).observe(waited_s)

    def passed(self, tokens: int, stage_s: Mapping[str, float]) -> None:
        """Counts a successful forward pass, and the seconds that it took in each stage."""
        self._batch_tokens.observe(tokens)
        self._forward_s.observe(stage_s["forward"])
        self._head_s.observe(stage_s["head"])
        for stage in ("fill", "launch", "wait", "copy"):
            self._stage_s.labels(stage).observe(stage_s[stage])

    def watch(self, name: str, value: Callable[[], Value]) -> None:
        """Sets the function that reads a gauge at every scrape, in any thread."""
        self._gauges.watch(name, value)

    def serve(self, host: str, port: int) -> int:
        """Serves /metrics and /healthz over HTTP; returns the port. Raises OSError if it is taken."""
        host = host.strip("[]")
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        server_class = type("_Server", (ThreadingWSGIServer,), {"address_family": family})
        server = make_server(host, port, self._page, server_class, _SilentHandler)
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        return server.server_port

    def _page(self, request: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        """Answers one HTTP request, as a WSGI application."""
        path = request["PATH_INFO"]
        if path == "/metrics":
            return self._metrics_page(request, start)
        if path == "/healthz":
            why = self._why_not_serving()
            status, text = ("503 Service Unavailable", why) if why else ("200 OK", "serving")
        else:
            status, text = "404 Not Found", "there are /metrics and /healthz"
        start(
            status, [("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store")]
        )
        return [f"{text}\n".encode()]


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Gauges:
    """Collects all gauges; those without a value appear by name only."""

    def __init__(self) -> None:
        self._specs = {spec.name: spec for spec in METRICS if spec.kind == "gauge"}
        self._values: dict[str, Callable[[], Value]] = {}

    def watch(self, name: str, value: Callable[[], Value]) -> None:
        assert name in self._specs, name
        self._values[name] = value

    def collect(self) -> Iterator[Metric]:
        for spec in self._specs.values():
            family = GaugeMetricFamily(spec.name, spec.text, labels=spec.labels)
            value = self._values[spec.name]() if spec.name in self._values else None
            if isinstance(value, Mapping):
                for team, number in value.items():
                    family.add_metric([team], number)
            elif value is not None:
                family.add_metric([], value)
            yield family
