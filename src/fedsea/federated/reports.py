"""What the process that computes rounds tells the one that shows them: lines of JSON on a socket."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from fedsea.errors import ConnectionLost, FedseaError, Unreachable, error_classes
from fedsea.federated.rounds import RoundReport

_LONGEST: Final = 1 << 16


class Teller:
    """The side that tells.

    Raises:
        Unreachable: nobody listens at `path`.
    """

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise Unreachable(
                f"nobody listens to this federation ({error.strerror}); "
                "start it with `fedsea federate run`"
            ) from error

    def close(self) -> None:
        """Say no more."""
        self._socket.close()

    def round(self, report: RoundReport) -> None:
        """A round was made."""
        self._tell({"round": asdict(report)})

    def notice(self, text: str) -> None:
        """Something in words."""
        self._tell({"notice": text})

    def end(self, error: FedseaError | None = None) -> None:
        """The federation has ended, well or with an error."""
        if error is None:
            self._tell({"end": "done"})
        else:
            self._tell({"end": str(error), "code": error.code})

    def _tell(self, line: dict[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise ConnectionLost("nobody listens to this federation any more") from error


class Reports:
    """The side that listens, to one teller.

    Attributes:
        path: of the socket, in a folder that only its owner can enter.
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="fedsea-")
        self.path = str(Path(self._folder) / "reports.sock")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(self.path)
        self._socket.listen(1)

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()
        with contextlib.suppress(OSError):
            Path(self.path).unlink()
            Path(self._folder).rmdir()

    def lines(self, begin_s: float) -> Iterator[RoundReport | str]:
        """Rounds and notices until the federation has ended.

        Args:
            begin_s: how long it may take to begin.

        Raises:
            ConnectionLost: the process of the federation is gone.
            FedseaError: with which the federation ended.
        """
        self._socket.settimeout(begin_s)
        try:
            teller, _ = self._socket.accept()
        except OSError as error:
            raise ConnectionLost("the federation did not begin; see the logs") from error
        with teller, teller.makefile("rb") as opened:
            while line := opened.readline(_LONGEST):
                found = json.loads(line)
                if "end" in found:
                    if "code" in found:
                        cls = error_classes().get(found["code"], FedseaError)
                        raise cls(found["end"])
                    return
                yield found["notice"] if "notice" in found else _report(found["round"])
        raise ConnectionLost(
            "the process of the federation is gone; start again, it goes on from the last round"
        )


def _report(found: dict[str, Any]) -> RoundReport:
    lists = {key: tuple(found[key]) for key in ("clients", "missing")}
    return RoundReport(**{**found, **lists})


def variable(name: str) -> str:
    """A variable of the environment that the starting process has set.

    Raises:
        Unreachable: it was not started so.
    """
    found = os.environ.get(name)
    if not found:
        raise Unreachable(f"{name} is not set; start with `fedsea federate`")
    return found
