"""Starting and ending Flower's processes, with nothing of theirs left to chance.

Telemetry, update checks and the installation of dependencies at run time are off; the environment
holds no proxies; the search path holds three programs, which lead back to this installation
(`flower_process`); home and state are inside the folder of the federation. Whatever was started
ends with the process that started it, by its number.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import psutil

from fedsea.errors import ConfigError, TransportError
from fedsea.federated.flower_process import APP
from fedsea.federated.gate import LOOPBACK

_STARTED_BY_FLOWER: Final = ("flower-superexec", "flwr-serverapp", "flwr-clientapp")
_CONNECTION: Final = "federation"
_START_S: Final = 120.0
_END_S: Final = 5.0
_POLL_S: Final = 0.1
_PROXIES: Final = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class Programs:
    """Flower's programs under one folder.

    Args:
        folder: state, logs and search path go there; only the owner can read it.
        variables: more of the environment of what is started.
    """

    def __init__(self, folder: Path, variables: Mapping[str, str]) -> None:
        self._folder = folder.absolute()
        try:
            for place in (folder, folder / "bin", folder / "home"):
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in _STARTED_BY_FLOWER:
                self._write_program(name)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written ({error.strerror})") from error
        self._variables = dict(variables)
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a program; what it writes goes to NAME.log in the folder."""
        with (self._folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                self._command(name, arguments),
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def run(self, name: str, *arguments: str) -> None:
        """Run a program to its end.

        Raises:
            TransportError: it failed, or took too long.
        """
        process = self.start(name, *arguments)
        try:
            failed = process.wait(_START_S) != 0
        except subprocess.TimeoutExpired:
            failed = True
        if failed:
            raise TransportError(f"{name} failed; see {self._folder / f'{name}.log'}")

    def wait_for(self, process: subprocess.Popen[bytes], name: str, port: int) -> None:
        """Wait until a program listens on a port of loopback.

        Raises:
            TransportError: it ended, or did not listen in time.
        """
        deadline = time.monotonic() + _START_S
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection((LOOPBACK, port), timeout=1.0).close()
                return
            time.sleep(_POLL_S)
        raise TransportError(f"{name} did not start; see {self._folder / f'{name}.log'}")

    def close(self) -> None:
        """End what was started and what that started, by number."""
        end(self._started)
        self._started.clear()

    def environment(self) -> dict[str, str]:
        """The environment of Flower's processes."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith("FLWR_") and key.lower() not in _PROXIES
        }
        return {
            **kept,
            "PATH": str(self._folder / "bin"),
            "FLWR_HOME": str(self._folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            "PYTHONUNBUFFERED": "1",
            **self._variables,
        }

    def submit(self, port: int) -> None:
        """Give our app to the SuperLink on a port of loopback, which starts the run.

        Raises:
            TransportError: it was not taken.
        """
        app = self._folder / "fedsea-federation"
        for name, content in APP.items():
            path = app / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        connections = self._folder / "home" / "config.toml"
        connections.write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
            f'address = "{LOOPBACK}:{port}"\ninsecure = true\n',
            encoding="utf-8",
        )
        self.run("flwr", "run", str(app), _CONNECTION)

    def _command(self, name: str, arguments: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", "fedsea.federated.flower_process", name, *arguments]

    def _write_program(self, name: str) -> None:
        path = self._folder / "bin" / name
        command = shlex.join(self._command(name, ()))
        path.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        path.chmod(0o700)


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes and all of their children: asked first, then killed."""
    family: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(process.pid)
            family += [found, *found.children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(family, timeout=_END_S)
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, timeout=_END_S)
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
