"""`fedsea finetune` in a process of its own: either side dies at any moment, the losses are the same."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import CHARACTERS

STEPS = 36
SECONDS = 200.0
# Each test starts several processes, one after the other.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TRUNK = ("adapter_model.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and completions of random characters."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    chance = random.Random(3)

    def text(most: int) -> str:
        return "".join(chance.choices(CHARACTERS, k=chance.randint(2, most)))

    lines = [json.dumps({"prompt": text(40), "completion": text(20)}) for _ in range(60)]
    path.write_text("\n".join(lines))
    return path


@dataclass(slots=True)
class Run:
    """A run in its folder: the command, started as often as needed."""

    model: Path
    data: Path
    certificates: Path
    folder: Path
    options: tuple[str, ...] = ()
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, address: str) -> subprocess.Popen[str]:
        """The client's process."""
        command = [sys.executable, "-m", "fedsea", "finetune", str(self.data)]
        command += ["--model", str(self.model), "--out", str(self.folder / "run"), "--threads", "1"]
        command += ["--server", address, "--certs", str(self.certificates), "--tenant", "acme"]
        command += ["--evaluation-share", "0.1", "--steps", str(STEPS), "--batch-size", "4"]
        command += ["--learning-rate", "0.01"]
        settings = ("save_every=5", "evaluate_every=7", "accumulate=2", "warmup_steps=3", "seed=9")
        for setting in ("lora.dropout=0.1", *(f"training.{each}" for each in settings)):
            command += ["--set", setting]
        self.processes.append(
            subprocess.Popen(
                [*command, *self.options],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )
        )
        return self.processes[-1]

    def finish(self, process: subprocess.Popen[str]) -> str:
        """Wait for its good end; what it wrote to standard error."""
        output, notes = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, f"{output}\n{notes}"
        return notes

    def steps(self) -> int:
        """The last step that was written down."""
        path = self.folder / "run" / "metrics.csv"
        rows = path.read_text().splitlines() if path.exists() else []
        return int(rows[-1].partition(",")[0]) if len(rows) > 1 else 0

    def wait_for(self, step: int, process: subprocess.Popen[str]) -> None:
        """Until so many steps are written down."""
        deadline = time.monotonic() + SECONDS
        while self.steps() < step:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def curve(self) -> dict[str, list[tuple[str, ...]]]:
        """Losses and norms of all steps and evaluations, to the last digit."""
        found = {}
        for name, columns in (
            ("metrics.csv", ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens")),
            ("evaluations.csv", ("step", "loss")),
        ):
            with (self.folder / "run" / name).open() as opened:
                rows = list(csv.DictReader(opened))
            found[name] = [tuple(row[column] for column in columns) for row in rows]
        return found

    def trained(self) -> dict[str, bytes]:
        """What is trained and its moments, of both sides."""
        client = self.folder / "run" / "checkpoints" / f"step-{STEPS:08}"
        server = self.folder / "trained" / "acme" / "run" / f"step-{STEPS:08}"
        return {
            f"{side}/{name}": (folder / name).read_bytes()
            for side, folder in (("client", client), ("server", server))
            for name in TRUNK
        }


Begin = Callable[[], Run]
Start = Callable[..., Any]


@pytest.fixture
def begin(tiny_model: Path, data: Path, certificates: Path, tmp_path: Path) -> Iterator[Begin]:
    """A new run in a folder of its own, whose processes end with the test."""
    made: list[Run] = []

    def make() -> Run:
        folder = tmp_path / f"place-{len(made)}"
        folder.mkdir()
        made.append(Run(tiny_model, data, certificates, folder))
        return made[-1]

    yield make
    for run in made:
        for process in run.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


def serving(run: Run) -> tuple[str, ...]:
    """Options of the server for a run."""
    return ("--set", f"training.folder={run.folder / 'trained'}")


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    """Filled by the first test that needs it."""
    return {}


@pytest.fixture
def expected(undisturbed: dict[str, Any], begin: Begin, start_server: Start) -> dict[str, Any]:
    """The curve and the end of a run to which nothing happens."""
    if not undisturbed:
        run = begin()
        server = start_server(*serving(run))
        run.finish(run.start(server.address))
        server.close()
        undisturbed |= {"curve": run.curve(), "trained": run.trained()}
        assert len(run.curve()["metrics.csv"]) == STEPS
    return undisturbed


def check(run: Run, expected: dict[str, Any]) -> None:
    """The run has the same losses, and ended with the same bytes on both sides."""
    assert run.curve() == expected["curve"]
    assert run.trained() == expected["trained"]


def test_client_dies(begin, start_server, expected):
    """kill -9 of the client at random moments: the same command goes on, bit for bit."""
    run, chance = begin(), random.Random(1)
    server = start_server(*serving(run))
    for step in sorted(chance.sample(range(1, STEPS), 2)):
        process = run.start(server.address)
        run.wait_for(step, process)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.communicate()
    run.finish(run.start(server.address))
    check(run, expected)


def test_server_dies(begin, start_server, expected):
    """kill -9 of the server at random moments: the client waits for it and goes on, bit for bit."""
    run, chance = begin(), random.Random(1)
    server = start_server(*serving(run))
    address = server.address
    process = run.start(address)
    for step in sorted(chance.sample(range(1, STEPS - 4), 2)):
        run.wait_for(step, process)
        time.sleep(chance.uniform(0, 0.05))
        server.close()
        server = start_server("--address", address, *serving(run))
        assert server.address == address
    notes = run.finish(process)
    assert "connecting again" in notes
    check(run, expected)


def test_both_die(begin, start_server, expected):
    """Both sides at once, as when a machine loses its power."""
    run = begin()
    server = start_server(*serving(run))
    process = run.start(server.address)
    run.wait_for(STEPS // 2, process)
    process.kill()
    server.close()
    process.communicate()
    server = start_server(*serving(run))
    run.finish(run.start(server.address))
    check(run, expected)


def test_cut_connections(begin, start_server, make_proxy, expected):
    """Connections that break in mid-message cost the unfinished step and nothing else."""
    run = begin()
    server = start_server(*serving(run))
    proxy = make_proxy(server.address, cut_after=900_000)
    notes = run.finish(run.start(proxy.address))
    assert proxy.cuts
    assert "going back" not in notes
    check(run, expected)


def test_ctrl_c(begin, start_server, expected):
    """Ctrl-C ends behind the step under way, with exit code 130; the same command goes on."""
    run = begin()
    server = start_server(*serving(run))
    process = run.start(server.address)
    run.wait_for(8, process)
    process.send_signal(signal.SIGINT)
    _, notes = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, notes
    assert "the same command goes on" in notes
    stopped = run.steps()
    process = run.start(server.address)
    notes = run.finish(process)
    assert "going on" in notes
    assert stopped >= 8
    check(run, expected)


def test_server_is_away_for_good(begin, start_server):
    """A server that does not come back ends the run with one line and an exit code of its own."""
    run = begin()
    run.options = ("--set", "training.reconnect_s=2")
    server = start_server(*serving(run))
    process = run.start(server.address)
    run.wait_for(3, process)
    killer = threading.Timer(0.0, server.close)
    killer.start()
    _, notes = process.communicate(timeout=SECONDS)
    killer.join()
    assert process.returncode == 5, notes
    assert "Traceback" not in notes
    assert notes.strip().splitlines()[-1].startswith("error: ")
