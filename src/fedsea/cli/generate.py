"""`fedsea generate`: one prompt, its answer as it comes, and what it took."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsea.cli import screen
from fedsea.cli.options import (
    AsJson,
    ClientModelOptions,
    ConnectionOptions,
    Model,
    SamplingOptions,
    flattened,
)
from fedsea.cli.placeholders import PlaceholderOptions, show_substituted
from fedsea.cli.protection import (
    ProtectionOptions,
    show_mode,
    show_spent,
    summary_of,
)
from fedsea.errors import RequestError

if TYPE_CHECKING:
    from fedsea.client.generation import Completion
    from fedsea.client.llm import LLM
    from fedsea.client.sampling import SamplingParams
    from fedsea.transport.recording import Message, Observer, Recorder


@flattened
def generate(
    model: Model,
    connection: ConnectionOptions,
    parts: ClientModelOptions,
    sampling: SamplingOptions,
    replacing: PlaceholderOptions,
    protecting: ProtectionOptions,
    prompt: Annotated[
        str | None,
        typer.Argument(help="Text to continue; without it, standard input.", show_default=False),
    ] = None,
    n: Annotated[int, typer.Option(help="Samples of the answer.", rich_help_panel="Sampling")] = 1,
    stats: Annotated[
        bool, typer.Option("--stats", help="Show speed and traffic at the end.")
    ] = False,
    recording: Annotated[
        Path | None,
        typer.Option(
            help="Write all messages to a new file, for `fedsea redteam --recording`.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text with MODEL, whose trunk is served elsewhere.

    Text goes to standard output as it comes; notices and figures go to standard error.
    """
    text = read_prompt(prompt)
    params, placeholders = sampling.params(n), replacing.chosen()
    privacy = protecting.chosen(connection)
    recorder, notices = quiet_recorder(), []

    def take_notice(line: str) -> None:
        notices.append(line)
        screen.notice(line)

    with recorded(recording, recorder) as observer:
        with screen.loading(f"loading {Path(model).name}"):
            llm = parts.connect(model, connection, take_notice, observer, placeholders, privacy)
        with llm:
            if not as_json:
                show_mode(llm)
            completion = (
                llm.generate(text, params) if as_json or n > 1 else show_stream(llm, text, params)
            )
            figures = {**summary(completion, recorder), **summary_of(llm, completion)}
    if as_json:
        screen.write_json({**figures, "notices": notices})
    elif n > 1:
        _show_samples(completion)
    if placeholders is not None and not as_json:
        show_substituted(completion.substituted)
    if not as_json:
        show_spent(completion)
    if stats:
        show_stats(completion, recorder)


def read_prompt(argument: str | None) -> str:
    """The prompt from the command line or from standard input.

    Raises:
        RequestError: there is none, or it is no text.
    """
    if argument is not None:
        return argument
    if sys.stdin.isatty():
        raise RequestError("there is no prompt: give PROMPT, or pipe text in")
    try:
        text = sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError:
        raise RequestError("standard input is not UTF-8 text; convert it, then ask again") from None
    if not text:
        raise RequestError("standard input is empty: give a prompt")
    return text


@contextmanager
def recorded(path: Path | None, recorder: Recorder) -> Iterator[Observer]:
    """The recorder, and beside it a file when there is a path for one."""
    if path is None:
        yield recorder
        return
    from fedsea.transport.recording_file import RecordingWriter

    with RecordingWriter(path) as writer:

        def observe(message: Message) -> None:
            recorder(message)
            writer(message)

        yield observe


def quiet_recorder() -> Recorder:
    """A recorder that counts and keeps nothing."""
    from fedsea.transport.recording import Recorder

    return Recorder(kept=0)


def show_stream(llm: LLM, text: str, params: SamplingParams) -> Completion:
    """Show an answer as it comes; Ctrl-C ends it."""
    progress = screen.PromptBar()
    stream = llm.stream(text, params, progress=progress)
    try:
        show_pieces(stream)
        return stream.result()
    finally:
        stream.cancel()
        progress.close()


def show_pieces(pieces: Iterable[str]) -> None:
    """Write a text as it comes; its line is ended, however far it came."""
    begun = False
    try:
        for piece in pieces:
            begun = True
            screen.write(piece)
    finally:
        if begun:
            screen.write("\n")


def summary(completion: Completion, recorder: Recorder) -> dict[str, Any]:
    """What a program wants to know of an answer."""
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason.value,
        "token_ids": completion.token_ids,
        "samples": [asdict(sample) for sample in completion.samples],
        "prompt_tokens": completion.prompt_tokens,
        "substituted": dict(completion.substituted),
        "first_token_seconds": round(completion.timing.first_token, 6),
        "seconds": round(completion.timing.total, 6),
        "tokens_per_second": round(completion.tokens_per_second, 3),
        "wire": {"up": asdict(recorder.up), "down": asdict(recorder.down)},
    }


def show_stats(completion: Completion, recorder: Recorder) -> None:
    """Two lines: how fast, and what crossed the wire."""
    tokens = sum(len(sample.token_ids) for sample in completion.samples)
    timing = completion.timing
    screen.detail(
        f"{completion.prompt_tokens} tokens in, {tokens} out ({completion.finish_reason}) in "
        f"{screen.seconds_text(timing.total)}; first token after "
        f"{screen.seconds_text(timing.first_token)}, then "
        f"{completion.tokens_per_second:.1f} tokens/s"
    )
    screen.detail(
        f"wire: {recorder.up.messages} messages up with {screen.bytes_text(recorder.up.bytes)}, "
        f"{recorder.down.messages} down with {screen.bytes_text(recorder.down.bytes)}"
    )


def _show_samples(completion: Completion) -> None:
    for number, sample in enumerate(completion.samples, start=1):
        screen.err.rule(f"sample {number}", align="left", style="dim")
        screen.write(f"{sample.text}\n")
