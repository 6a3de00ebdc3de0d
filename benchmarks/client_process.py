"""A client in a process of its own, told what to do line by line.

Commands on standard input, answers on standard output, one JSON object per line; times are those of
the monotonic clock, which all processes of a machine share.

    prefill N       -> {}                              a session with a prompt of N tokens
    decode N        -> {"began": s, "ended": s}        N more tokens; the session ends
    first N         -> {"began": s, "ended": s}        a prompt of N tokens and one token
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.processes import Child
from benchmarks.settings import THREADS

_numbers = itertools.count()


class ClientProcess:
    """The controlling side. Use it as a context manager, or call `close`."""

    def __init__(
        self, model: Path, address: str, certificates: Path, tenant: str, threads: int = THREADS
    ) -> None:
        arguments = [__name__, str(model), address, str(certificates), tenant]
        log = certificates.parent / f"client-{next(_numbers)}.log"
        self._child = Child(arguments, log, threads)

    def __enter__(self) -> Self:
        self.wait()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def wait(self) -> dict[str, Any]:
        """The answer to the last command; right after the start, that it is connected.

        Raises:
            ProcessFailed: the process has ended.
        """
        answer: dict[str, Any] = json.loads(self._child.line())
        return answer

    def tell(self, command: str) -> None:
        """Send a command; `wait` for its answer."""
        self._child.tell(command)

    def first_token(self, prompt: int) -> tuple[float, float]:
        """When a prompt of so many tokens began and when its first token was there."""
        self.tell(f"first {prompt}")
        answer = self.wait()
        return answer["began"], answer["ended"]

    def close(self) -> None:
        """End the process."""
        self._child.close()


def _main(model: Path, address: str, certificates: Path, tenant: str) -> None:
    from benchmarks import checkpoints
    from benchmarks.bench import client_tls
    from benchmarks.engines import Split
    from fedsea.client.llm import LLM
    from fedsea.client.sessions import Session

    vocabulary = checkpoints.vocabulary_of(model)
    tls = client_tls(certificates, tenant)
    session: Session | None = None

    def prompt(count: int) -> list[int]:
        return checkpoints.prompt_ids(count, vocabulary)

    with LLM.connect(model, address, tls=tls, on_notice=_to_stderr) as llm:
        llm.generate(prompt(32), max_new_tokens=4, ignore_eos=True)
        _answer()
        for line in sys.stdin:
            command, number = line.split()
            began = time.monotonic()
            if command == "prefill":
                session = Session.open(llm, 2 * int(number) + 512)
                session.generate(prompt(int(number)), max_new_tokens=1, ignore_eos=True)
                _answer()
            elif command == "decode" and session is not None:
                session.generate((), max_new_tokens=int(number), ignore_eos=True)
                _answer(began=began, ended=time.monotonic())
                session.close()
            elif command == "first":
                seconds = Split(llm).first_token(prompt(int(number)))
                _answer(began=began, ended=began + seconds)


def _answer(**times: float) -> None:
    print(json.dumps(times), flush=True)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4])
