"""What a replica counts for Prometheus: one list of names, and their values.

From the list come the metrics, the table in docs/operations.md and the Grafana dashboard
(`python -m deploy.dashboard`). Labels are names of declared teams and reasons of refusals, nothing that a
caller chooses.
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
"""One number, one per team, or nothing that could be said."""


@dataclass(frozen=True, slots=True)
class Named:
    """One metric."""

    name: str
    """As Prometheus shows it; of a histogram without _bucket, _sum and _count."""
    kind: Kind
    text: str
    group: Group
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


NAMES = (
    Named(
        "teacher_team_tokens_total",
        "counter",
        "Padded tokens dispatched to the teacher; they count towards quotas.",
        "Teams",
        TEAM,
    ),
    Named(
        "teacher_team_cost_total",
        "counter",
        "Cost of what was dispatched; shares are shares of it.",
        "Teams",
        TEAM,
    ),
    Named(
        "teacher_team_share_ratio",
        "gauge",
        "Share of the cost that the replica dispatched in the last minute.",
        "Teams",
        TEAM,
    ),
    Named(
        "teacher_team_entitled_ratio",
        "gauge",
        "What that share would be by the weights of the teams that had work.",
        "Teams",
        TEAM,
    ),
    Named(
        "teacher_team_waiting_seconds",
        "histogram",
        "How long a sequence of a team waited for its batch.",
        "Teams",
        TEAM,
        SECONDS,
    ),
    Named(
        "teacher_team_in_flight_tokens",
        "gauge",
        "Padded tokens of sequences that have room for their answer and are not answered.",
        "Teams",
        TEAM,
    ),
    Named(
        "teacher_team_queued_tokens",
        "gauge",
        "The part of them that waits for a batch.",
        "Teams",
        TEAM,
    ),
    Named(
        "teacher_team_quota_left_tokens",
        "gauge",
        "What is left of today's quota of the whole service, as the replica knows it; teams with a "
        "quota that asked for something in the last minutes.",
        "Teams",
        TEAM,
    ),
    Named("teacher_bytes_sent_total", "counter", "Payload bytes written.", "Teams", TEAM),
    Named(
        "teacher_rejected_total",
        "counter",
        "Requests answered by an error, and calls that were not let in (team empty).",
        "Teams",
        ("team", "reason"),
    ),
    Named("teacher_queued_tokens", "gauge", "Padded tokens that wait.", "Replicas"),
    Named("teacher_streams", "gauge", "Open Score streams.", "Replicas"),
    Named("teacher_connections", "gauge", "Connections to the replica's ports.", "Replicas"),
    Named(
        "teacher_strangers",
        "gauge",
        "Of these, connections over which nobody was let in yet.",
        "Replicas",
    ),
    Named(
        "teacher_gate_share",
        "gauge",
        "Of new connections from addresses that misbehave, the share that is let in; 1: all.",
        "Replicas",
    ),
    Named(
        "teacher_connections_shut_down_total",
        "counter",
        "Connections that had to go, mostly those of strangers.",
        "Replicas",
        ("reason",),
    ),
    Named(
        "teacher_busy_seconds_total",
        "counter",
        "Time in which the teacher was computing.",
        "Replicas",
    ),
    Named(
        "teacher_batch_tokens",
        "histogram",
        "Tokens of one forward pass, padding included; its count is that of forward passes.",
        "Replicas",
        (),
        TOKENS,
    ),
    Named(
        "teacher_queue_seconds",
        "histogram",
        "How long a sequence waited for its batch.",
        "Replicas",
        (),
        SECONDS,
    ),
    Named(
        "teacher_forward_seconds",
        "histogram",
        "Base model, one forward pass.",
        "Replicas",
        (),
        SECONDS,
    ),
    Named(
        "teacher_head_seconds",
        "histogram",
        "Vocabulary head and selection, one forward pass.",
        "Replicas",
        (),
        SECONDS,
    ),
    Named(
        "teacher_encode_seconds",
        "histogram",
        "Targets of one sequence to bytes, the wait for the encode thread included.",
        "Replicas",
        (),
        SECONDS,
    ),
    Named(
        "teacher_unencoded_bytes",
        "gauge",
        "Bytes, at most, of answers that are scored and not encoded; above --targets.max-reply-mib "
        "the teacher waits.",
        "Replicas",
    ),
    Named(
        "teacher_answer_bytes",
        "gauge",
        "Bytes that unfinished answers may take, of all streams.",
        "Replicas",
    ),
    Named(
        "teacher_stream_answer_bytes_max",
        "gauge",
        "Bytes that unfinished answers may take, of the stream that has most.",
        "Replicas",
    ),
    Named("teacher_memory_bytes", "gauge", "Resident memory of the process.", "Replicas"),
    Named(
        "teacher_device_memory_bytes",
        "gauge",
        "Memory of tensors on the accelerator; 0 on a CPU.",
        "Replicas",
    ),
    Named(
        "teacher_directory_away",
        "gauge",
        "1 while quotas and usage cannot reach the directory.",
        "Ledger and access",
    ),
    Named(
        "teacher_ledger_sync_age_seconds",
        "gauge",
        "Since when the directory has not heard of the replica's use; about 1 s as a rule.",
        "Ledger and access",
    ),
    Named(
        "teacher_journal_segments",
        "gauge",
        "Pieces of the replica's journal that wait for the directory.",
        "Ledger and access",
    ),
    Named(
        "teacher_certificate_expires_timestamp_seconds",
        "gauge",
        "When the certificate in --tls-cert ends, in seconds since 1970; nothing without TLS.",
        "Ledger and access",
    ),
)
"""Every metric there is."""


class Metrics:
    """The metrics of one replica, in a registry of their own."""

    def __init__(self, why_not_serving: Callable[[], str] = str) -> None:
        """why_not_serving: what /healthz says; empty where the replica serves."""
        self._why_not_serving = why_not_serving
        disable_created_metrics()  # one more series per counter, which nobody asked for
        self.registry = CollectorRegistry()
        self._metrics_page = make_wsgi_app(self.registry)
        counters = {
            one.name: Counter(one.name, one.text, one.labels, registry=self.registry)
            for one in NAMES
            if one.kind == "counter"
        }
        histograms = {
            one.name: Histogram(
                one.name, one.text, one.labels, buckets=one.buckets, registry=self.registry
            )
            for one in NAMES
            if one.kind == "histogram"
        }
        self.queue_s = histograms["teacher_queue_seconds"]
        self.forward_s = histograms["teacher_forward_seconds"]
        self.head_s = histograms["teacher_head_seconds"]
        self.encode_s = histograms["teacher_encode_seconds"]
        self.batch_tokens = histograms["teacher_batch_tokens"]
        self.busy_s = counters["teacher_busy_seconds_total"]
        self.bytes_sent = counters["teacher_bytes_sent_total"]
        self.rejected = counters["teacher_rejected_total"]
        self.connections_shut_down = counters["teacher_connections_shut_down_total"]
        self._team_tokens = counters["teacher_team_tokens_total"]
        self._team_cost = counters["teacher_team_cost_total"]
        self._team_waiting_s = histograms["teacher_team_waiting_seconds"]
        self._gauges = _Gauges()
        self.registry.register(self._gauges)

    def dispatched(self, team: str, tokens: int, cost: float, waited_s: float) -> None:
        """A sequence of so many padded tokens was given to the teacher."""
        self._team_tokens.labels(team).inc(tokens)
        self._team_cost.labels(team).inc(cost)
        self._team_waiting_s.labels(team).observe(waited_s)

    def watch(self, name: str, value: Callable[[], Value]) -> None:
        """Says where a gauge of NAMES is read whenever somebody asks, by any thread."""
        self._gauges.watch(name, value)

    def serve(self, host: str, port: int) -> int:
        """Serves /metrics and /healthz over HTTP; returns the port. Raises OSError if it is taken."""
        host = host.strip("[]")
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = type("_Server", (ThreadingWSGIServer,), {"address_family": family})
        server = make_server(host, port, self._page, made, _SilentHandler)
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        return server.server_port

    def _page(self, request: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        """One answer of the HTTP server, as WSGI has it."""
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
    """All gauges; one without a value is there by name only."""

    def __init__(self) -> None:
        self._named = {one.name: one for one in NAMES if one.kind == "gauge"}
        self._values: dict[str, Callable[[], Value]] = {}

    def watch(self, name: str, value: Callable[[], Value]) -> None:
        assert name in self._named, name
        self._values[name] = value

    def collect(self) -> Iterator[Metric]:
        for one in self._named.values():
            family = GaugeMetricFamily(one.name, one.text, labels=one.labels)
            value = self._values[one.name]() if one.name in self._values else None
            if isinstance(value, Mapping):
                for team, number in value.items():
                    family.add_metric([team], number)
            elif value is not None:
                family.add_metric([], value)
            yield family
