"""A trunk server as a second process: started, awaited, killed, and never left behind."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from fedsea.errors import DeadlineExceeded, TransportError

START_SECONDS = 60.0
STOP_SECONDS = 10.0


class TrunkProcess:
    """`fedsea serve` with the given arguments, in a process of its own.

    Use it as a context manager: the process is gone at the end, however the block is left.

    Args:
        arguments: what follows `fedsea serve` on the command line.
        log: file that takes the server's log.
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("ab") as opened:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fedsea", "serve", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=opened,
                text=True,
            )

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def address(self, within: float = START_SECONDS) -> str:
        """Wait until the server is ready; the address is the last word of what it says then.

        Raises:
            DeadlineExceeded: it was not ready in time.
            TransportError: it ended instead.
        """
        alarm = threading.Timer(within, self._process.kill)
        alarm.start()
        try:
            line = self._process.stdout.readline() if self._process.stdout else ""
        finally:
            in_time = alarm.is_alive()
            alarm.cancel()
        if line:
            return line.split()[-1]
        if not in_time:
            raise DeadlineExceeded(f"the server was not ready after {within:g} s; try again")
        raise TransportError(f"the server did not start: {self._last_words()}")

    def kill(self) -> None:
        """End it at once, as a crash would (SIGKILL)."""
        self._process.kill()

    def close(self) -> None:
        """End it in order, or by force when it takes too long."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.removeprefix("error: ") for line in lines if line.strip()]
        return said[-1] if said else "it ended without a word; run `fedsea serve` by hand"
