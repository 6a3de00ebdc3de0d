"""The data owner under attack: the real client and the real server, and an observer between them.

Both run in this process, over the in-memory transport. What the observer sees are the bytes that a
server gets and gives; token ids and logits stay with the client, and serve only to score attacks
and to measure utility.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from fedsea.client.llm import LLM
from fedsea.client.protection import Protection
from fedsea.errors import FedseaError
from fedsea.model.partition import Partition
from fedsea.privacy.clipping import checked_rows
from fedsea.privacy.mechanism import Mechanism, Unit
from fedsea.privacy.noise import NoiseSource
from fedsea.server import loading
from fedsea.server.config import ServerConfig
from fedsea.server.service import TrunkService
from fedsea.transport.base import Channel, ClientStream
from fedsea.transport.memory import MemoryChannel
from fedsea.transport.recording import Message, Recorder, RecordingChannel

MAX_KV_ROWS = 16384
_RECORDED_MESSAGES = 1 << 20
SERVER = "server in this process"


@dataclass(frozen=True, slots=True)
class Observed:
    """What one text was, and what crossed the wire for it.

    Attributes:
        ids: (n,) token ids; the secret.
        logits: (n, vocabulary) after every position, at the client.
        messages: everything that crossed the wire, in order.
    """

    ids: Tensor = field(repr=False)
    logits: Tensor = field(repr=False)
    messages: tuple[Message, ...] = field(repr=False)


class Victim:
    """A client with a server of its own; use it as a context manager.

    Args:
        model: folder of a checkpoint.
        partition: what stays with the client.
        trunk: a loaded trunk of the same checkpoint; loaded here when it is not given.
        mechanism: what protects the rows; None for mode plain.
        public_prefix: ids with which every text begins; their rows are not protected.
        projection: file of a pair that narrows the rows first, also where no mechanism protects them;
            a trunk that is given serves it.
        denoiser: file of the denoiser that the client restores answers with; it needs a mechanism.

    Raises:
        ModelError, ConfigError: the model cannot be loaded or cut so.
    """

    def __init__(
        self,
        model: str | Path,
        partition: Partition,
        trunk: loading.Trunk | None = None,
        mechanism: Mechanism | None = None,
        public_prefix: tuple[int, ...] = (),
        projection: Path | None = None,
        denoiser: Path | None = None,
    ) -> None:
        config = server_config(model, projection)
        loaded = trunk if trunk is not None else loading.load(config)
        self._recorder = Recorder(_RECORDED_MESSAGES)
        self._folder = TemporaryDirectory(prefix="fedsea-victim-")
        channel = ServerHere(lambda: TrunkService(config, loaded))
        try:
            self.llm = LLM.connect(
                model,
                {SERVER: lambda: RecordingChannel(channel, self._recorder)},
                partition=partition,
                dtype="fp32",
                kv_rows=min(MAX_KV_ROWS, 4 * loaded.max_context),
                privacy=self._protection(partition, mechanism, public_prefix, projection, denoiser),
            )
        except FedseaError:
            self._folder.cleanup()
            raise

    def read(self, ids: Sequence[int]) -> Observed:
        """Send a text through the split model, as a prompt, in a session of its own.

        Raises:
            PromptTooLong: it does not fit the model's context.
            PrivacyError: the mechanism refused its rows.
        """
        tokens = torch.tensor(self.llm.checked(ids))
        self._recorder.messages.clear()
        logits = self.llm.background.run(self._logits(tokens))
        return Observed(tokens, logits, tuple(self._recorder.messages))

    def answer(self, prompt: Sequence[int], count: int) -> tuple[int, ...]:
        """The greedy answer to a prompt, at most `count` tokens long."""
        return self.llm.generate(prompt, max_new_tokens=count).token_ids

    def close(self) -> None:
        """Disconnect and stop the server."""
        self.llm.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _protection(
        self,
        partition: Partition,
        mechanism: Mechanism | None,
        public_prefix: tuple[int, ...],
        projection: Path | None,
        denoiser: Path | None,
    ) -> Protection | None:
        """What stands at the cut, with a ledger of its own without a budget; None for nothing."""
        if mechanism is None and projection is None and denoiser is None:
            return None
        return Protection(
            mechanism=mechanism or _Unchanged(),
            unit=Unit.PROMPT if partition.bottom or denoiser is not None else Unit.TOKEN,
            projection=projection,
            denoiser=denoiser,
            tenant="redteam",
            ledger=Path(self._folder.name) / "ledger.sqlite",
            public_prefix=len(public_prefix),
        )

    async def _logits(self, ids: Tensor) -> Tensor:
        session = await self.llm.split.open([len(ids)])
        try:
            sequence = session.begin(len(ids))
            result = await session.feed(sequence, ids, keep=len(ids))
            return result.logits
        finally:
            await session.close()


def load_trunk(model: str | Path, projection: Path | None = None) -> loading.Trunk:
    """A trunk that several victims of one model share; it serves every partition."""
    return loading.load(server_config(model, projection))


def server_config(
    model: str | Path, projection: Path | None = None, training: Path | None = None
) -> ServerConfig:
    """Settings of a server in this process that serves all blocks of a model in fp32.

    With a folder for `training` it trains adapters and keeps them there.
    """
    return ServerConfig.from_table(
        {
            "server": {"model": str(model)},
            "model": {"projections": [] if projection is None else [str(projection)]},
            "kv": {"rows": MAX_KV_ROWS},
            "security": {"plaintext": True},
            **({} if training is None else {"training": {"folder": str(training)}}),
        }
    )


class _Unchanged(Mechanism):
    """Rows as they are: the control in which a projection stands at the cut alone."""

    __slots__ = ()

    name = "unchanged"

    def protect(self, rows: Tensor, noise: NoiseSource) -> Tensor:  # noqa: ARG002 - there is none
        return checked_rows(rows).to("cpu", torch.float32)

    def loss(self) -> None:
        return None

    def _scores(self, released: Tensor, clean: Tensor) -> Tensor:
        return -(clean - released).square().sum(dim=1)

    def parameters(self) -> dict[str, str]:
        return {}

    def describe(self) -> str:
        return "not differentially private: rows leave as they are"


class ServerHere(Channel):
    """A channel to a server that starts, on the client's loop, when it is first used."""

    def __init__(self, make: Callable[[], TrunkService]) -> None:
        self._make = make
        self._starting = asyncio.Lock()
        self._running = AsyncExitStack()
        self._channel: MemoryChannel | None = None

    async def describe(self) -> bytes:
        return await (await self._started()).describe()

    async def open_stream(self) -> ClientStream:
        return await (await self._started()).open_stream()

    async def close(self) -> None:
        await self._running.aclose()
        self._channel = None

    async def _started(self) -> MemoryChannel:
        async with self._starting:
            if self._channel is None:
                service = await self._running.enter_async_context(self._make())
                self._channel = MemoryChannel(service)
                self._running.push_async_callback(self._channel.close)
            return self._channel
