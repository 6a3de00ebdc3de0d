"""`fedsea chat`: a conversation, one line at a time, in a terminal or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsea.cli import screen
from fedsea.cli.generate import quiet_recorder, show_pieces
from fedsea.cli.options import (
    ClientModelOptions,
    ConnectionOptions,
    Model,
    SamplingOptions,
    flattened,
)
from fedsea.cli.placeholders import PlaceholderOptions, show_substituted
from fedsea.cli.protection import ProtectionOptions, show_mode, show_spent
from fedsea.errors import BudgetExceeded, PromptTooLong, UnsafeRows

if TYPE_CHECKING:
    from fedsea.client.sampling import SamplingParams
    from fedsea.client.sessions import Chat
    from fedsea.transport.recording import Recorder

_PROMPT = "you> "
_HELP = "/undo takes back the last turn, /reset all of them; /stats, /help, /quit"


@flattened
def chat(
    model: Model,
    connection: ConnectionOptions,
    parts: ClientModelOptions,
    sampling: SamplingOptions,
    replacing: PlaceholderOptions,
    protecting: ProtectionOptions,
    system: Annotated[
        str | None, typer.Option(help="System message that opens it.", show_default=False)
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of the whole conversation.",
            show_default="up to 2048",
        ),
    ] = None,
) -> None:
    """Talk with MODEL, whose trunk is served elsewhere.

    One line is one turn. Ctrl-C stops an answer; Ctrl-D or /quit ends. Works in a pipe too.
    """
    params, placeholders = sampling.params(), replacing.chosen()
    privacy = protecting.chosen(connection)
    recorder = quiet_recorder()
    with screen.loading(f"loading {Path(model).name}"):
        llm = parts.connect(model, connection, screen.notice, recorder, placeholders, privacy)
        from fedsea.client.sessions import Chat

    with llm:
        show_mode(llm)
        # Says at once when the model has no chat template.
        llm.encode_chat([{"role": "user", "content": "?"}])
        with Chat(llm, system, max_context) as conversation:
            _Repl(conversation, params, recorder).run()


@dataclass(slots=True)
class _Repl:
    """Reads lines and does what they say until there are no more."""

    conversation: Chat
    params: SamplingParams
    recorder: Recorder
    last: str = "nothing was said yet"
    substituted: Mapping[str, int] = field(default_factory=dict)

    def run(self) -> None:
        interactive = sys.stdin.isatty()
        if interactive:
            _enable_line_editing()
            screen.detail(_HELP)
        while (line := _read_line(interactive)) is not None:
            if line in {"/quit", "/exit"}:
                return
            if line:
                self._do(line)

    def _do(self, line: str) -> None:
        commands: dict[str, Callable[[], None]] = {
            "/undo": self._undo,
            "/reset": self._reset,
            "/stats": self._stats,
            "/help": lambda: screen.detail(_HELP),
        }
        if line in commands:
            commands[line]()
        elif line.startswith("/"):
            screen.notice(f"{line.split(maxsplit=1)[0]} is no command: {_HELP}")
        else:
            self._say(line)

    def _say(self, line: str) -> None:
        try:
            stream = self.conversation.send(line, self.params)
            try:
                show_pieces(stream)
            except KeyboardInterrupt:
                stream.cancel()
                screen.notice("stopped; the turn is not kept")
                return
            completion = stream.result()
        except CancelledError:
            return
        except PromptTooLong as error:
            screen.fail(f"{error} (/undo or /reset makes room)")
            return
        except (BudgetExceeded, UnsafeRows) as error:
            screen.fail(str(error))
            return
        show_spent(completion)
        if completion.substituted != self.substituted:
            show_substituted(completion.substituted, self.substituted)
            self.substituted = completion.substituted
        self.last = (
            f"{completion.prompt_tokens} new tokens in, {len(completion.token_ids)} out; "
            f"first token after {screen.seconds_text(completion.timing.first_token)}, then "
            f"{completion.tokens_per_second:.1f} tokens/s"
        )

    def _undo(self) -> None:
        self.conversation.undo()
        screen.detail(f"{len(self.conversation.messages)} messages are left")

    def _reset(self) -> None:
        self.conversation.reset()
        screen.detail("the conversation is empty")

    def _stats(self) -> None:
        screen.detail(self.last)
        screen.detail(
            f"{self.conversation.session.position} tokens of context; "
            f"wire: {screen.bytes_text(self.recorder.up.bytes)} up, "
            f"{screen.bytes_text(self.recorder.down.bytes)} down"
        )


def _read_line(interactive: bool) -> str | None:
    try:
        return input(_PROMPT if interactive else "").strip()
    except EOFError:
        if interactive:
            screen.write("\n")
        return None


def _enable_line_editing() -> None:
    """Arrow keys and history in `input`, where the platform has them."""
    try:
        import readline  # noqa: F401 - importing it is what switches it on
    except ImportError:
        return
