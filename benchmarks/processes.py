"""Processes that a measurement starts: awaited in bounded time, spoken to by lines, always ended."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.settings import THREADS, environment

# Compilation before the first line can take minutes.
START_SECONDS = 900.0
STOP_SECONDS = 10.0


class ProcessFailed(RuntimeError):
    """A process that was started for a measurement ended before its time."""


class Child:
    """`python -m MODULE ARGUMENTS` in the environment of the measurements.

    Use it as a context manager: the process is gone at the end, however the block is left.

    Args:
        arguments: module and what follows it.
        log: file that takes its standard error.
        threads: threads for one operation.
        spin: how often a thread looks for work before it sleeps; None for that of all others.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        threads: int = THREADS,
        spin: int | None = None,
    ) -> None:
        own = {"OMP_NUM_THREADS": str(threads)}
        if spin is not None:
            own["GOMP_SPINCOUNT"] = str(spin)
        self._log = log
        self._name = arguments[0]
        with log.open("wb") as opened:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=opened,
                text=True,
                env={**environment(), **own},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def line(self, within: float = START_SECONDS) -> str:
        """The next line that the process writes; it is killed when none comes in time.

        Raises:
            ProcessFailed: it ended instead.
        """
        alarm = threading.Timer(within, self._process.kill)
        alarm.start()
        try:
            line = self._process.stdout.readline() if self._process.stdout else ""
        finally:
            alarm.cancel()
        if not line:
            raise ProcessFailed(f"{self._name} ended: {self._last_words()}")
        return line.strip()

    def tell(self, line: str) -> None:
        """Write a line to the process."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """End it in order, or by force when it takes too long."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line for line in lines if line.strip()]
        return said[-1] if said else f"it said nothing; see {self._log.name}"
