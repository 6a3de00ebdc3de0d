"""What `fedsea demo` does: a client here, a server beside it, and a proof that nothing changed.

A second process serves the middle blocks over TLS with certificates made for this run. The first
answer shows what crosses the wire. During the second one the server is killed and started again.
Both are compared with the unsplit model, computed in this process by `transformers`.
"""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import torch
from rich.console import Console

from fedsea.client.generation import Completion
from fedsea.client.llm import LLM
from fedsea.client.protection import Protection
from fedsea.demo import report, unsplit
from fedsea.demo.trunk_process import TrunkProcess
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.transport.certificates import init_ca, issue_client, issue_server
from fedsea.transport.credentials import ClientTLS, ServerTLS
from fedsea.transport.grpc_client import GrpcChannel
from fedsea.transport.recording import Message, Recorder, RecordingChannel

TENANT = "clinic"
HOST = "127.0.0.1"
# Messages of the server in the second answer before it is killed: the answer is under way then.
OUTPUTS_BEFORE_KILL = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What to show: a model, its cut, a prompt, and one more for the answer with the crash.

    `mechanism` is the spec of what is done to rows before they leave, None for nothing.
    """

    model: Path
    partition: Partition
    prompt: str
    crash_prompt: str | None
    max_new_tokens: int
    mechanism: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a prompt and what crossed the wire for it."""

    prompt: str
    completion: Completion
    recorder: Recorder


def run(options: DemoOptions, console: Console) -> bool:
    """Show everything; returns whether all tokens equal those of the unsplit model, or need not.

    Raises:
        FedseaError: something could not be started, or no answer came.
    """
    torch.set_num_threads(1)
    with (
        _terminated_in_order(),
        tempfile.TemporaryDirectory(prefix="fedsea-demo-") as folder,
        _Provider(options, Path(folder)) as provider,
    ):
        return _show(options, provider, console, Path(folder))


def _show(options: DemoOptions, provider: _Provider, console: Console, folder: Path) -> bool:
    checkpoint = Checkpoint.open(options.model)
    report.introduce(console, checkpoint.num_blocks, options.partition)
    with console.status("starting the server and loading the blocks of this side"):
        address = provider.wait()
        client = _Client(options, provider, address, console, folder / "privacy.ledger")
    with client:
        report.ready(console, provider.process.pid, address)
        answers = [client.answer(options.prompt)]
        report.wire(
            console, answers[0].recorder, checkpoint.hidden_size, client.llm.describe_mode()
        )
        if options.crash_prompt is not None:
            answers.append(client.answer(options.crash_prompt, crash=True))
        with console.status("computing the same with the unsplit model"):
            expected = unsplit.tokens(
                options.model,
                [client.llm.encode(answer.prompt) for answer in answers],
                options.max_new_tokens,
            )
    completions = [answer.completion for answer in answers]
    if options.mechanism is not None:
        report.noisy_results(console, completions, expected)
        return True
    equal = [completion.token_ids for completion in completions] == expected
    report.results(console, completions, equal=equal)
    return equal


class _Provider:
    """The provider's side: certificates for both, and a server process that can crash."""

    def __init__(self, options: DemoOptions, folder: Path) -> None:
        init_ca(folder)
        self._server: ServerTLS = issue_server(folder, [HOST])
        self.client: ClientTLS = issue_client(folder, TENANT)
        self._options = options
        self._log = folder / "server.log"
        self.process = self._start(f"{HOST}:0")

    def wait(self) -> str:
        """Wait until the server is ready; returns its address."""
        return self.process.address()

    def restart(self, address: str) -> None:
        """A new process at the address of the one that was killed."""
        self.process.close()
        self.process = self._start(address)

    def _start(self, address: str) -> TrunkProcess:
        blocks = Checkpoint.open(self._options.model).num_blocks
        tls = self._server
        return TrunkProcess(
            [
                str(self._options.model),
                *("--span", str(self._options.partition.trunk_span(blocks))),
                *("--address", address),
                *("--ca", str(tls.ca), "--cert", str(tls.certificate), "--key", str(tls.key)),
                *("--threads", "1", "--kv-rows", "8192"),
            ],
            self._log,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.close()


class _Client:
    """The data owner's side, which prints its answers as they come."""

    def __init__(
        self,
        options: DemoOptions,
        provider: _Provider,
        address: str,
        console: Console,
        ledger: Path,
    ) -> None:
        self._options = options
        self._provider = provider
        self._address = address
        self._console = console
        self._recorder = Recorder()
        self._crash_due = False
        self._crashed = False
        self._page = report.Typewriter(console)
        channel = GrpcChannel(address, provider.client)
        self.llm = LLM.connect(
            options.model,
            {address: partial(RecordingChannel, channel, self._observe)},
            partition=options.partition,
            dtype="fp32",
            on_notice=self._notice,
            privacy=None
            if options.mechanism is None
            else Protection(mechanism=options.mechanism, ledger=ledger),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.llm.close()

    def answer(self, prompt: str, *, crash: bool = False) -> Answer:
        """Answer a prompt, with a crash of the server on the way or without."""
        self._recorder, self._crash_due = Recorder(), crash
        self._page.write(prompt, style="bold")
        stream = self.llm.stream(prompt, max_new_tokens=self._options.max_new_tokens)
        for piece in stream:
            self._page.write(piece)
        self._page.end()
        self._console.print()
        return Answer(prompt, stream.result(), self._recorder)

    def _observe(self, message: Message) -> None:
        """Runs on the client's loop for every message."""
        self._recorder(message)
        if self._crash_due and self._recorder.down.messages >= OUTPUTS_BEFORE_KILL:
            self._crash_due, self._crashed = False, True
            self._provider.process.kill()

    def _notice(self, line: str) -> None:
        """Runs on the client's loop when the connection breaks and when it is back."""
        if self._crashed:
            self._crashed = False
            self._page.end()
            report.event(self._console, f"kill -9 {self._provider.process.pid}, the server")
            self._provider.restart(self._address)
            report.event(self._console, f"process {self._provider.process.pid} takes its place")
        report.event(self._console, line)


@contextmanager
def _terminated_in_order() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that the server process does not outlive this one."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
