"""Runs what the documentation shows: fenced blocks of a page, with real processes on free ports.

A block is run as a reader would run it, in a folder that looks like a clone of the repository:

* `console`: each line that begins with `$ ` is a command; other lines are its output, not compared.
  `fedsea serve` runs on until the page ends; `make TARGET` is only looked up.
* `toml`: written to the file that its first line names, as in `# fedsea.toml`.
* `python`: all blocks of a page are one script, which runs after the commands.

`<!-- not run: REASON -->` above a block excludes it. Ports of this machine are replaced by free ones.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.ports import free_port

from fedsea.demo import CHAT_PROMPT

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
LANGUAGES = {"console", "python", "toml", "text"}

COMMAND_SECONDS = 60
START_SECONDS = 60
STOP_SECONDS = 20
DEFAULT_PORT = "50051"

_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
_LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost):(\d+)")
_READY = re.compile(r"^serving blocks .* at (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: where it is, what it holds, and why it is not run, if so."""

    page: Path
    line: int
    language: str
    code: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The commands of a console block, continued lines joined."""
        joined = self.code.replace("\\\n", "")
        return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


@dataclass(frozen=True, slots=True)
class Ran:
    """A command or script that ended well, and what it wrote."""

    command: str
    output: str
    notes: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return list(_blocks(page))


def _blocks(page: Path) -> Iterator[Block]:
    reason: str | None = None
    language: str | None = None
    first, code = 0, list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if language is None and line.startswith("```"):
            language, first, code = line[3:].strip(), number, []
        elif language is not None and line.startswith("```"):
            yield Block(page, first, language, "\n".join(code) + "\n", reason)
            language, reason = None, None
        elif language is not None:
            code.append(line)
        elif line.strip():
            marker = _NOT_RUN.fullmatch(line)
            reason = marker[1] if marker else None


@dataclass(slots=True)
class _Server:
    process: subprocess.Popen[str]
    log: Path


@dataclass(slots=True)
class Workplace:
    """A folder that looks like a clone after `make demo`, and the servers that run in it."""

    folder: Path
    _ports: dict[str, str] = field(default_factory=dict)
    _servers: dict[str, _Server] = field(default_factory=dict)

    def __enter__(self) -> Self:
        for name in ("src", "scripts"):
            (self.folder / name).symlink_to(ROOT / name)
        binaries = self.folder / ".venv" / "bin"
        binaries.mkdir(parents=True)
        (binaries / "activate").write_text(f"export PATH={shlex.quote(str(binaries))}:$PATH\n")
        for name, module in (("python", ""), ("fedsea", "-m fedsea ")):
            program = binaries / name
            program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module}"$@"\n')
            program.chmod(0o755)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        codes = [self._stop(port) for port in list(self._servers)]
        if exc_type is None:
            assert codes == [0] * len(codes), "a server did not stop in order"

    def run_page(self, page: Path) -> list[Ran]:
        """Run everything that a page shows; returns what ended, in order.

        Raises AssertionError, with what was written, for a command that fails.
        """
        wanted = [block for block in blocks(page) if block.not_run is None]
        ran: list[Ran] = []
        for block in wanted:
            if block.language == "toml":
                self._write(block)
            elif block.language == "console":
                ran += [found for command in block.commands for found in self.run(command)]
        script = "\n".join(block.code for block in wanted if block.language == "python")
        if script:
            path = self.folder / f"{page.stem}.py"
            path.write_text(self._with_free_ports(script))
            ran += self.run(f"python {path.name}")
        return ran

    def run(self, command: str) -> list[Ran]:
        """Run one command; a server is awaited, and runs on."""
        command = self._with_free_ports(command)
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            assert_target(words[1])
            return []
        if words[:2] == ["fedsea", "serve"]:
            self._serve(words)
            return []
        process = subprocess.Popen(
            ["bash", "-c", f". .venv/bin/activate; {command}"],
            cwd=self.folder,
            env=self._environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, notes = process.communicate(f"{CHAT_PROMPT}\n", COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, notes = process.communicate()
            notes += f"\nkilled after {COMMAND_SECONDS} s"
        assert process.returncode == 0, f"{command}\n{output}\n{notes}\n{self._logs()}"
        return [Ran(command, output, notes)]

    def _serve(self, words: list[str]) -> None:
        words, port = self._with_address(words)
        self._stop(port)
        log = self.folder / f"server-{port}.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=self.folder,
                env=self._environment(),
                stdout=stream,
                stderr=stream,
                text=True,
            )
        self._servers[port] = _Server(process, log)
        deadline = time.monotonic() + START_SECONDS
        while _READY.search(log.read_text()) is None:
            assert process.poll() is None, f"{shlex.join(words)}\n{log.read_text()}"
            assert time.monotonic() < deadline, f"no server after {START_SECONDS} s"
            time.sleep(0.05)

    def _with_address(self, words: list[str]) -> tuple[list[str], str]:
        """The command with an address in any case, and its port."""
        if "--address" in words:
            address = words[words.index("--address") + 1]
        elif "--config" in words:
            path = self.folder / words[words.index("--config") + 1]
            address = tomllib.loads(path.read_text())["server"]["address"]
        else:
            address = f"127.0.0.1:{self._free_port(DEFAULT_PORT)}"
            words = [*words, "--address", address]
        return words, address.rpartition(":")[2]

    def _stop(self, port: str) -> int:
        server = self._servers.pop(port, None)
        if server is None:
            return 0
        server.process.send_signal(signal.SIGTERM)
        try:
            return server.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.process.kill()
            return server.process.wait()

    def _write(self, block: Block) -> None:
        name = block.code.splitlines()[0].removeprefix("# ")
        (self.folder / name).write_text(self._with_free_ports(block.code))

    def _with_free_ports(self, text: str) -> str:
        return _LOOPBACK.sub(lambda found: f"{found[1]}:{self._free_port(found[2])}", text)

    def _free_port(self, port: str) -> str:
        """The free port that stands for a port of the documentation."""
        if port in self._ports.values():
            return port
        if port not in self._ports:
            self._ports[port] = str(free_port())
        return self._ports[port]

    def _environment(self) -> dict[str, str]:
        address = f"127.0.0.1:{self._free_port(DEFAULT_PORT)}"
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "FEDSEA_SERVER": address}
        return {**os.environ, **settings}

    def _logs(self) -> str:
        return "\n".join(server.log.read_text()[-2000:] for server in self._servers.values())


def assert_target(name: str) -> None:
    """The Makefile has this target and says what it does."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{re.escape(name)}:.*## ", makefile, re.MULTILINE), f"make {name}"
