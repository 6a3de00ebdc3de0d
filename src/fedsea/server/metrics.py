"""What a server counts, for Prometheus: numbers of rows, steps and refusals, never their contents."""

from __future__ import annotations

import threading
from collections.abc import Callable
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from fedsea.errors import BindError, ConfigError
from fedsea.transport.address import Address, parse_address
from fedsea.wire.messages import Output

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._steps = self._counter("steps", "Steps computed")
        self._rows = self._counter("rows", "Rows computed, by tenant", "tenant")
        self._kinds = self._counter("step_rows", "Rows computed, by kind", "kind")
        self._refusals = self._counter("ended", "Sessions ended with an error, by code", "code")
        self._opened = self._counter("sessions_opened", "Sessions opened, by tenant", "tenant")
        self._batch = self._histogram("batch_sessions", "Sessions in one step", _ROWS)
        self._step = self._histogram("step_seconds", "Duration of one step", _SECONDS)
        self._queue = self._histogram("queue_seconds", "Wait of one Append", _SECONDS)
        self._compute = self._histogram("compute_seconds", "Computation of one Append", _SECONDS)
        self._forwards = self._counter("training_forwards", "Forwards, by tenant", "tenant")
        self._trained = self._counter("training_rows", "Rows of Forwards, by tenant", "tenant")
        self._backwards = self._counter("training_backwards", "Backwards, by tenant", "tenant")
        self._stepped = self._counter(
            "training_steps", "Optimizer steps, by tenant and outcome", "tenant", "outcome"
        )
        self._decode_rows = self._kinds.labels("decode")
        self._prefill_rows = self._kinds.labels("prefill")
        self._tenants: dict[str, Counter] = {}

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show a number that somebody else keeps."""
        Gauge(f"fedsea_{name}", text, registry=self.registry).set_function(value)

    def step(self, decode_rows: int, prefill_rows: int, sessions: int, seconds: float) -> None:
        """Count one step."""
        self._steps.inc()
        self._decode_rows.inc(decode_rows)
        self._prefill_rows.inc(prefill_rows)
        self._batch.observe(sessions)
        self._step.observe(seconds)

    def rows(self, tenant: str, count: int) -> None:
        """Count rows of a tenant."""
        counter = self._tenants.get(tenant)
        if counter is None:
            counter = self._tenants[tenant] = self._rows.labels(tenant)
        counter.inc(count)

    def answered(self, output: Output) -> None:
        """Count one answered Append."""
        self._queue.observe(output.queue_us / 1e6)
        self._compute.observe(output.compute_us / 1e6)

    def opened(self, tenant: str) -> None:
        """Count a session that was opened."""
        self._opened.labels(tenant).inc()

    def forward(self, tenant: str, rows: int) -> None:
        """Count a Forward of a training."""
        self._forwards.labels(tenant).inc()
        self._trained.labels(tenant).inc(rows)

    def backward(self, tenant: str) -> None:
        """Count a Backward of a training."""
        self._backwards.labels(tenant).inc()

    def stepped(self, tenant: str, *, applied: bool) -> None:
        """Count a Step; one whose gradients were not finite is not applied."""
        self._stepped.labels(tenant, "applied" if applied else "not_finite").inc()

    def ended(self, code: str) -> None:
        """Count a session that ended with an error, or was refused."""
        self._refusals.labels(code).inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"fedsea_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"fedsea_{name}", text, buckets=buckets, registry=self.registry)


class MetricsServer:
    """Answers Prometheus over HTTP on a loopback address.

    Raises ConfigError for an address that other machines can reach, BindError when it is taken.
    """

    def __init__(self, metrics: Metrics, address: str) -> None:
        wanted = parse_address(address)
        if not wanted.is_loopback:
            raise ConfigError(
                f"metrics.address {wanted} can be reached from outside and has no access control; "
                "use 127.0.0.1, and a proxy where others must read it"
            )
        try:
            served = start_http_server(wanted.port, wanted.host, metrics.registry)
        except OSError as error:
            raise BindError(
                f"metrics.address {wanted} cannot be listened on ({error.strerror}); "
                "choose another port"
            ) from None
        self._server: WSGIServer = served[0]
        self._thread: threading.Thread = served[1]
        self.address = Address(wanted.host, self._server.server_port)

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
