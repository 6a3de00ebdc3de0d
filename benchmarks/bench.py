"""One run: certificates, server processes and clients, each started once and ended at the end."""

from __future__ import annotations

import socket
import tempfile
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from benchmarks import checkpoints
from benchmarks.engines import Split, Unsplit, Whole
from benchmarks.processes import Child
from benchmarks.settings import HOST, OTHER_TENANT, TENANT, THREADS, Scale, Shape
from fedsea.client.llm import LLM
from fedsea.transport.certificates import init_ca, issue_client, issue_server
from fedsea.transport.credentials import ClientTLS

KV_ROWS = 16384

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """How the measured side computes: settings of the server and options of the client."""

    name: str = "fp32"
    dtype: str = "fp32"
    quantization: str = "none"
    settings: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


FP32 = Mode()
BF16 = Mode(name="bf16", dtype="bf16")
INT8 = Mode(name="int8", quantization="int8")


@dataclass(frozen=True, slots=True)
class Served:
    """A server process and where it answers."""

    address: str
    metrics_address: str

    def counters(self) -> dict[str, float]:
        """What the server has counted so far, by Prometheus name with labels."""
        url = f"http://{self.metrics_address}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return parse_metrics(answer.read().decode())


class Bench:
    """What the cases share. Everything is made at first use and kept until the end.

    Args:
        scale: how much is measured.
        folder: for checkpoints, which are kept; certificates and logs are not.
        say: shows what is happening.
    """

    def __init__(self, scale: Scale, folder: Path, say: Callable[[str], None]) -> None:
        self.scale = scale
        self.folder = checkpoints.prepare_folder(folder)
        self.say = say
        self._stack = ExitStack()
        own = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fedsea-bench-"))
        self.logs = Path(own)
        self.certificates = self.logs / "certificates"
        init_ca(self.certificates, force=True)
        issue_server(self.certificates, [HOST], force=True)
        self.tls = issue_client(self.certificates, TENANT, force=True)
        self.other_tls = issue_client(self.certificates, OTHER_TENANT, force=True)
        self._made: dict[tuple[Any, ...], Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def model(self, shape: Shape) -> Path:
        """The checkpoint of a shape."""
        return self._once(
            ("model", shape),
            f"checkpoint {shape.name}",
            lambda: checkpoints.random_llama(self.folder, shape),
        )

    def whole(self, model: Path) -> Whole:
        """The model in `transformers`, fp32."""
        return self._once(("whole", model), f"loading {model.name}", lambda: Whole(model))

    def unsplit(self, model: Path, mode: Mode = FP32) -> Unsplit:
        """All blocks in our own engine in this process."""
        return self._once(
            ("unsplit", model, mode),
            f"loading {model.name} unsplit, {mode.name}",
            lambda: Unsplit(model, mode.dtype, mode.quantization),
        )

    def served(self, model: Path, mode: Mode = FP32) -> Served:
        """A server of all blocks but the first and the last."""
        return self._once(
            ("served", model, mode),
            f"starting a server of {model.name}, {mode.name}",
            lambda: self._serve(model, mode),
        )

    def split(self, model: Path, mode: Mode = FP32) -> Split:
        """A client of that server over loopback TLS, warmed up."""
        return self._once(
            ("split", model, mode),
            f"connecting to {model.name}, {mode.name}",
            lambda: self.connect(model, self.served(model, mode).address, mode),
        )

    def connect(self, model: Path, address: str, mode: Mode = FP32, **more: Any) -> Split:
        """One more client of a server at `address`."""
        options = {**dict(mode.options), **more}
        llm = LLM.connect(
            model,
            address,
            tls=options.pop("tls", self.tls),
            partition=checkpoints.partition_of(model),
            dtype=mode.dtype,
            quantization=mode.quantization,
            on_notice=self.say,
            **options,
        )
        return Split(self._stack.enter_context(llm))

    def keep(self, resource: Any) -> Any:
        """Enter a context that is left at the end of the run."""
        return self._stack.enter_context(resource)

    def _serve(self, model: Path, mode: Mode) -> Served:
        metrics = f"{HOST}:{free_port()}"
        blocks = checkpoints.blocks_of(model)
        arguments = [
            *("fedsea", "serve", str(model)),
            *("--address", f"{HOST}:0", "--metrics", metrics),
            *("--span", str(checkpoints.partition_of(model).trunk_span(blocks))),
            *("--dtype", mode.dtype, "--quantization", mode.quantization),
            *("--threads", str(THREADS), "--kv-rows", str(KV_ROWS)),
            *("--certs", str(self.certificates), "--log-level", "warning"),
            *("--set", "server.drain_grace_s=1"),
        ]
        for setting in mode.settings:
            arguments += ["--set", setting]
        child = self._stack.enter_context(
            Child(arguments, self.logs / f"server-{model.name}-{mode.name}.log")
        )
        # The address is the last word of what a server says when it is ready.
        return Served(child.line().split()[-1], metrics)

    def _once(self, key: tuple[Any, ...], doing: str, make: Callable[[], T]) -> T:
        if key not in self._made:
            self.say(doing)
            self._made[key] = make()
        made: T = self._made[key]
        return made


def client_tls(folder: Path, tenant: str) -> ClientTLS:
    """The certificate of a tenant, issued by a `Bench` before."""
    return ClientTLS(
        folder / "ca.pem", folder / f"client-{tenant}.pem", folder / f"client-{tenant}.key"
    )


def free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def parse_metrics(text: str) -> dict[str, float]:
    """Samples of the Prometheus text format by name with labels."""
    samples = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            samples[name] = float(value)
    return samples
