"""Peak memory of a client, in a process of its own: the real `LLM` with an echo for a trunk.

Prints one JSON object: bytes at the peak after the imports, after loading and after an answer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.peak_memory import peak
from fedsea.client.llm import LLM
from fedsea.model.checkpoint import Checkpoint
from fedsea.transport.base import Peer, ServerStream
from fedsea.transport.memory import MemoryChannel
from fedsea.wire.codecs import Codec
from fedsea.wire.connection import Connection
from fedsea.wire.description import encode_description
from fedsea.wire.messages import Append, Description, Open, Opened, Output, Role

PROMPT, NEW_TOKENS, KV_ROWS = 512, 16, 1024


class Echo:
    """A server that gives every row back as it came; prompts and answers are one sequence."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._about = Description(
            model=checkpoint.name,
            family="llama",
            fingerprint=checkpoint.fingerprint(),
            hidden_size=checkpoint.hidden_size,
            num_blocks=checkpoint.num_blocks,
            first_block=0,
            end_block=checkpoint.num_blocks,
            codecs=tuple(Codec),
            max_context=KV_ROWS,
            max_rows_per_message=8192,
            max_message_bytes=8 * 2**20,
            dtype="bf16",
        )

    async def describe(self, peer: Peer) -> bytes:  # noqa: ARG002 - a handler's interface
        return encode_description(self._about)

    async def session(self, peer: Peer, stream: ServerStream) -> None:  # noqa: ARG002
        connection = Connection(Role.SERVER, hidden_size=self._about.hidden_size)
        while (data := await stream.receive()) is not None:
            event = connection.receive(data)
            if isinstance(event, Open):
                await stream.send(connection.send(Opened("echo")))
            elif isinstance(event, Append):
                await stream.send(connection.send(Output(event.id, event.answer(), event.rows)))


def _main(model: Path) -> None:
    sizes = {"imports": peak()}
    echo = Echo(Checkpoint.open(model))
    servers = {"echo": lambda: MemoryChannel(echo)}
    with LLM.connect(model, servers, dtype="bf16", kv_rows=KV_ROWS) as llm:
        sizes["loaded"] = peak()
        llm.generate(range(100, 100 + PROMPT), max_new_tokens=NEW_TOKENS, ignore_eos=True)
        sizes["answered"] = peak()
    print(json.dumps(sizes))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
