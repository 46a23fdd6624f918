"""What a replica counts, under the names that dashboards use (docs/deploying.md lists them)."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


class Metrics:
    """The metrics of one replica, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=self.registry)

        self.queue_s = histogram(
            "teacher_queue_seconds", "How long a sequence waited for its batch.", SECONDS
        )
        self.forward_s = histogram(
            "teacher_forward_seconds", "Base model's forward of one batch.", SECONDS
        )
        self.head_s = histogram(
            "teacher_head_seconds", "Vocabulary head and selection of one batch.", SECONDS
        )
        self.encode_s = histogram(
            "teacher_encode_seconds", "Targets of one sequence to bytes.", SECONDS
        )
        self.batch_tokens = histogram(
            "teacher_batch_tokens", "Tokens of one batch, padding included.", TOKENS
        )
        self.bytes_sent = Counter(
            "teacher_bytes_sent", "Payload bytes written.", ["team"], registry=self.registry
        )
        self.rejected = Counter(
            "teacher_rejected",
            "Requests answered by an error.",
            ["team", "reason"],
            registry=self.registry,
        )

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge that is read when somebody asks."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def serve(self, host: str, port: int) -> int:
        """Serves the metrics over HTTP; returns the port. Raises OSError if it is taken."""
        server, _ = start_http_server(port, addr=host, registry=self.registry)
        return server.server_port
