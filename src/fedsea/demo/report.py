"""How the demo looks: the picture of the cut, the streamed text, what crossed the wire."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fedsea.client.generation import Completion
from fedsea.model.partition import Partition
from fedsea.transport.recording import Direction, Message, Recorder
from fedsea.wire.codecs import RowFormat
from fedsea.wire.framing import decode_event
from fedsea.wire.limits import DEFAULT_LIMITS
from fedsea.wire.messages import Append, Open, Output, Role

_SENDERS = {Direction.UP: Role.CLIENT, Direction.DOWN: Role.SERVER}
_SHOWN_VALUES = 4
_WORDS = re.compile(r"\s+|\S+")


@dataclass(frozen=True, slots=True)
class Flow:
    """One direction of an answer: all of it, and its last message, which carries one row."""

    messages: int
    bytes: int
    bytes_per_token: int
    row: Tensor


def flow(recorder: Recorder, direction: Direction, hidden_size: int) -> Flow:
    """What went one way, in the formats that the session was opened with."""
    total = recorder.up if direction is Direction.UP else recorder.down
    message, event = last_rows(recorder.messages, direction)
    count = sum(segment.count for segment in event.segments)
    rows = _format(recorder, direction, hidden_size).decode(event.rows, count)
    return Flow(total.messages, total.bytes, len(message.data), rows[-1])


def _format(recorder: Recorder, direction: Direction, hidden_size: int) -> RowFormat:
    for message in recorder.messages:
        if message.direction is Direction.UP:
            event = decode_event(message.data, Role.CLIENT, DEFAULT_LIMITS)
            if isinstance(event, Open):
                is_up = direction is Direction.UP
                return (event.up_format if is_up else event.down_format)(hidden_size)
    raise LookupError("no session was opened")


def last_rows(messages: Iterable[Message], direction: Direction) -> tuple[Message, Append | Output]:
    """The last message of one direction that carries rows, as bytes and as what they mean.

    Raises:
        LookupError: there is none.
    """
    for message in reversed(list(messages)):
        if message.direction is direction:
            event = decode_event(message.data, _SENDERS[direction], DEFAULT_LIMITS)
            if isinstance(event, Append | Output):
                return message, event
    raise LookupError(f"no rows went {direction.value}")


def introduce(console: Console, num_blocks: int, partition: Partition) -> None:
    """The picture: who computes what."""
    bottom, trunk = partition.bottom_span(), partition.trunk_span(num_blocks)
    top = partition.top_span(num_blocks)
    picture = Table.grid(padding=(0, 1))
    for style in ("green", "dim", "yellow"):
        picture.add_column(style=style, no_wrap=True)
    picture.add_row("this process (data owner)", "|", "second process (provider)")
    picture.add_row(f"text > tokenizer > embedding > blocks {bottom} >", "|", f"> blocks {trunk}")
    picture.add_row(f"text < sample < lm_head < norm < blocks {top} <", "|", "<")
    console.print(Panel(picture, title="fedsea demo", title_align="left", expand=False))


def ready(console: Console, pid: int, address: str) -> None:
    """The server is there."""
    console.print(
        f"process {pid} serves at {address}: TLS 1.3, certificates made for this run\n",
        style="dim",
        highlight=False,
    )


class Typewriter:
    """Writes a text as it comes, and breaks its lines between words; threads may share it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._column = 0
        self._gap = ""
        self._word = ""

    def write(self, text: str, style: str = "") -> None:
        """Take the next piece; its last word waits for what follows it."""
        with self._lock:
            for part in _WORDS.findall(text):
                if part.isspace():
                    self._put_word(style)
                    self._gap += part
                else:
                    self._word += part

    def end(self) -> None:
        """Write what waits and leave the line."""
        with self._lock:
            self._put_word("")
            self._gap = ""
            self._column = 0
            self._console.print()

    def _put_word(self, style: str) -> None:
        gap, word = self._gap, self._word
        if not word:
            return
        if "\n" not in gap and self._column + len(gap) + len(word) > self._console.width:
            gap = "\n"
        before = 0 if "\n" in gap else self._column
        self._column = before + len(gap.rpartition("\n")[2]) + len(word)
        self._gap = self._word = ""
        self._console.print(Text(gap + word, style=style), end="", soft_wrap=True)


def event(console: Console, text: str) -> None:
    """Something that happened to the connection."""
    console.print(Text(f"  > {text}", style="yellow"), soft_wrap=True)


def wire(console: Console, recorder: Recorder, hidden_size: int, mode: str) -> None:
    """What crossed the wire for one answer, with values, and what did not."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    for _ in range(3):
        table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_row("", "messages", "bytes", "per token", "the last row", style="dim")
    for name, direction in (("up", Direction.UP), ("down", Direction.DOWN)):
        way = flow(recorder, direction, hidden_size)
        table.add_row(
            name, f"{way.messages}", f"{way.bytes:,}", f"{way.bytes_per_token:,} B", values(way.row)
        )
    name, _, words_of_mode = mode.partition(": ")
    words = Text.assemble(
        "\nNever on the wire: text, token ids, logits, tokenizer, embedding, lm_head.\n",
        (name[:1].upper() + name[1:] + ": ", "bold"),
        words_of_mode,
    )
    grid = Table.grid()
    grid.add_row(table)
    grid.add_row(words)
    console.print(Panel(grid, title="what crossed the wire", title_align="left", expand=False))
    console.print()


def values(row: Tensor) -> str:
    """The first numbers of a row (hidden,)."""
    shown = ", ".join(f"{value:.2f}" for value in row[:_SHOWN_VALUES].tolist())
    return f"[{shown}, … {row.shape[0]}]"


def noisy_results(
    console: Console, completions: Sequence[Completion], expected: Sequence[Sequence[int]]
) -> None:
    """Speed, what the mechanism changed, and what was charged."""
    pairs = [
        (made, wanted)
        for completion, whole in zip(completions, expected, strict=True)
        for made, wanted in zip(completion.token_ids, whole, strict=False)
    ]
    same = sum(made == wanted for made, wanted in pairs)
    charges = "\n".join(
        completion.spent.describe() for completion in completions if completion.spent is not None
    )
    figures = (
        f"{completions[0].tokens_per_second:,.0f} tokens/s; {same} of {len(pairs)} tokens equal "
        "those of the unsplit model at the same place\n"
    )
    console.print(Panel(Text(figures + charges), title="result", title_align="left", expand=False))


def results(console: Console, completions: Sequence[Completion], *, equal: bool) -> None:
    """Speed, and whether the tokens are those of the unsplit model."""
    undisturbed = completions[0]
    tokens = sum(len(completion.token_ids) for completion in completions)
    verdict = (
        Text(f"all {tokens} tokens equal those of the unsplit model", style="bold green")
        if equal
        else Text("the tokens DIFFER from those of the unsplit model", style="bold red")
    )
    figures = (
        f"{undisturbed.tokens_per_second:,.0f} tokens/s, first token after "
        f"{undisturbed.timing.first_token * 1e3:.0f} ms; computed again here by transformers:\n"
    )
    console.print(
        Panel(Text.assemble(figures, verdict), title="result", title_align="left", expand=False)
    )
