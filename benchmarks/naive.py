"""The naive split protocol, as the papers' baseline: no cache, whole sequences, full masks.

For each token the client computes bottom over all rows so far, sends all of them in fp32 together
with the causal mask of the whole context as fp32, and the server computes its blocks over all of
them and sends all of them back; then the client computes top over all rows. Nothing is kept between
tokens. It runs over gRPC with mutual TLS, with the same blocks, so the difference is the protocol.
It is kinder than the papers' released code, which sends masks of 4096 x 4096 in both directions.

    message = rows, mask side (two uint32), rows in fp32, mask in fp32
"""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import fedsea.transport  # noqa: F401 - settles the TLS version before gRPC is imported

# isort: split
import grpc
import torch
from torch import Tensor

from benchmarks.settings import HOST, THREADS
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.model.runner import NewRows, SpanRunner
from fedsea.model.spans import Placement, load_bottom, load_top, load_trunk
from fedsea.transport.credentials import ClientTLS

_PARTITION = Partition(1, 1)
METHOD = "/naive.Trunk/Forward"
_HEADER = struct.Struct("<II")
_KV_ROWS = 4096
_UNLIMITED: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]


@dataclass(frozen=True, slots=True)
class Token:
    """Seconds and bytes, in both directions, that one token took."""

    seconds: float
    bytes_up: int
    bytes_down: int


class NaiveClient:
    """Bottom and top without caches, and a channel to the naive server."""

    def __init__(self, model: Path, address: str, tls: ClientTLS) -> None:
        checkpoint = Checkpoint.open(model)
        placement = Placement()
        self._top = load_top(checkpoint, _PARTITION.top_span(checkpoint.num_blocks), placement)
        bottom = load_bottom(checkpoint, _PARTITION.bottom_span(), placement)
        self._bottom_runner = SpanRunner(bottom, _KV_ROWS, placement)
        self._top_runner = SpanRunner(self._top.span, _KV_ROWS, placement)
        credentials = grpc.ssl_channel_credentials(
            tls.ca.read_bytes(), tls.key.read_bytes(), tls.certificate.read_bytes()
        )
        self._channel = grpc.secure_channel(address, credentials, options=_UNLIMITED)
        self._forward: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(
            METHOD
        )

    def tokens(self, context: Sequence[int], count: int) -> list[Token]:
        """Tokens after a context, each of which sends everything again."""
        ids = list(context)
        found = []
        for _ in range(count):
            began = time.perf_counter()
            rows = run_whole(self._bottom_runner, torch.tensor(ids))
            request = pack(rows, causal_mask(len(ids)))
            answer = self._forward(request)
            hidden = run_whole(self._top_runner, unpack(answer)[0])
            ids.append(int(self._top.logits(hidden[-1:]).argmax()))
            found.append(Token(time.perf_counter() - began, len(request), len(answer)))
        return found

    def close(self) -> None:
        """Disconnect."""
        self._channel.close()


def causal_mask(side: int) -> Tensor:
    """The additive mask (side, side) that the naive protocol ships: 0, and the least fp32 above."""
    return torch.full((side, side), torch.finfo(torch.float32).min).triu_(1)


def pack(rows: Tensor, mask: Tensor) -> bytes:
    """One message of rows (n, hidden) and a mask (m, m); an answer has a mask of side 0."""
    head = _HEADER.pack(rows.shape[0], mask.shape[0])
    return b"".join((head, rows.numpy().tobytes(), mask.numpy().tobytes()))


def unpack(data: bytes) -> tuple[Tensor, Tensor]:
    """Rows and mask of a message."""
    count, side = _HEADER.unpack_from(data)
    numbers = torch.frombuffer(bytearray(data[_HEADER.size :]), dtype=torch.float32)
    mask_at = numbers.numel() - side * side
    return numbers[:mask_at].view(count, -1), numbers[mask_at:].view(side, side)


@torch.inference_mode()
def run_whole(runner: SpanRunner, rows: Tensor) -> Tensor:
    """Run all rows of a sequence and keep nothing."""
    account = runner.pool.open(runner.pool.num_rows)
    try:
        runner.pool.begin(account, 0, runner.pool.num_rows)
        return runner.run(rows, runner.advance([NewRows(account, 0, len(rows))]))
    finally:
        runner.pool.close(account)


def serve(model: Path, certificates: Path) -> None:
    """Serve the trunk until the process is ended; writes its address when it is ready."""
    torch.set_num_threads(THREADS)
    checkpoint = Checkpoint.open(model)
    placement = Placement()
    span = _PARTITION.trunk_span(checkpoint.num_blocks)
    runner = SpanRunner(load_trunk(checkpoint, span, placement), _KV_ROWS, placement)

    def forward(request: bytes, _: grpc.ServicerContext) -> bytes:
        rows, mask = unpack(request)
        if mask.shape[0] != rows.shape[0]:
            raise ValueError("the mask has another side than there are rows")
        return pack(run_whole(runner, rows), torch.empty(0, 0))

    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(forward)
    _, service, method = METHOD.split("/")
    server = grpc.server(ThreadPoolExecutor(1), options=_UNLIMITED)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    key, certificate = (certificates / name for name in ("server.key", "server.pem"))
    credentials = grpc.ssl_server_credentials(
        [(key.read_bytes(), certificate.read_bytes())],
        (certificates / "ca.pem").read_bytes(),
        require_client_auth=True,
    )
    port = server.add_secure_port(f"{HOST}:0", credentials)
    server.start()
    print(f"{HOST}:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
