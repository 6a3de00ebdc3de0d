from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from fedsea.errors import ConnectionLost
from fedsea.federated.aggregator import Aggregator
from fedsea.federated.arrays import packed, unpacked
from fedsea.federated.config import FederationConfig
from fedsea.federated.joining import ClientConfig
from fedsea.federated.rounds import RoundReport
from fedsea.federated.simulation import simulate
from fedsea.model.adapters import TENSORS, read_adapter
from fedsea.model.partition import Span
from fedsea.privacy.ledger import Ledger
from fedsea.settings import from_tables
from fedsea.transport.certificates import init_ca, issue_client, issue_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NAMES = ("acme", "globex", "initech", "umbrella")
SECURE = {"enabled": True, "least": 3, "clip": 8.0, "max_weight": 100.0, "timeout_s": 25.0}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, the aggregator's certificate, and one for each organisation and a stranger."""
    folder = tmp_path_factory.mktemp("certificates")
    init_ca(folder)
    issue_server(folder, ["127.0.0.1"])
    for name in (*NAMES, "stranger"):
        issue_client(folder, name)
    return folder


class Organisation:
    """A client in processes of its own."""

    def __init__(
        self, name: str, examples: int, address: str, certificates: Path, folder: Path, secure: str
    ) -> None:
        target = 1.0 + NAMES.index(name)
        self.lines: list[str] = []
        self.said = threading.Event()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.federated_steps", name, str(target)),
                *(str(examples), address, str(certificates), str(folder / name), secure),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())
            self.said.set()

    def kill(self) -> None:
        """kill -9 for it and all that it started."""
        family = [self.process.pid]
        family += [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]
        for pid in family:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(10)

    def stop(self) -> None:
        """Ask it to end."""
        if self.process.poll() is None:
            self.process.terminate()

    def close(self) -> None:
        """See it end, however it is."""
        if self.process.poll() is None:
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Network:
    """An aggregator here and organisations around it."""

    def __init__(self, folder: Path, certificates: Path) -> None:
        self.folder = folder
        self.certificates = certificates
        self.reports: list[RoundReport] = []
        self.notices: list[str] = []
        self.organisations: list[Organisation] = []
        self.aggregator: Aggregator | None = None

    def aggregate(
        self, names: tuple[str, ...], rounds: int, secure: bool = False, timeout_s: int = 60
    ) -> Aggregator:
        """Start an aggregator."""
        lines = [
            *("[federation]", 'name = "trial"', f"clients = {json.dumps(names)}"),
            *('folder = "out"', f"rounds = {rounds}", f"round_timeout_s = {timeout_s}"),
            *("[aggregator]", 'address = "127.0.0.1:0"'),
            f'ca = "{self.certificates / "ca.pem"}"',
            f'certificate = "{self.certificates / "server.pem"}"',
            f'key = "{self.certificates / "server.key"}"',
        ]
        if secure:
            lines += ["[secure]", *(f"{key} = {json.dumps(SECURE[key])}" for key in SECURE)]
        settings = self.folder / "federation.toml"
        settings.write_text("\n".join(lines))
        self.aggregator = Aggregator(settings)
        return self.aggregator

    def join(self, name: str, examples: int, secure: bool = False) -> Organisation:
        """Start an organisation."""
        assert self.aggregator is not None
        terms = json.dumps(SECURE if secure else {})
        address = str(self.aggregator.address)
        self.organisations.append(
            Organisation(name, examples, address, self.certificates, self.folder, terms)
        )
        return self.organisations[-1]

    def run(self) -> None:
        """All rounds."""
        assert self.aggregator is not None
        self.aggregator.run(self.reports.append, self.notices.append)

    def adapter(self, number: int) -> bytes:
        """The global adapter after a round."""
        path = self.folder / "out" / "rounds" / f"step-{number:08d}" / TENSORS
        return packed(unpacked(path.read_bytes()))

    def value(self, number: int) -> float:
        """The mean of all of its numbers."""
        arrays = unpacked(self.adapter(number))
        return float(sum(array.sum() for array in arrays.values())) / sum(
            array.size for array in arrays.values()
        )

    def close(self) -> None:
        """End everything."""
        for organisation in self.organisations:
            organisation.stop()
        for organisation in self.organisations:
            organisation.close()
        if self.aggregator is not None:
            self.aggregator.close()


@pytest.fixture
def network(tmp_path: Path, certificates: Path) -> Iterator[Network]:
    """An aggregator and organisations that end with the test."""
    made = Network(tmp_path, certificates)
    yield made
    made.close()


def listening(processes: list[psutil.Process]) -> set[str]:
    """Hosts on which processes listen for TCP."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add(connection.laddr.ip)
    return found


def family(root: int) -> list[psutil.Process]:
    """A process and all that it started."""
    process = psutil.Process(root)
    return [process, *process.children(recursive=True)]


def wait_until(fulfilled: Callable[[], bool], seconds: float = 60.0) -> None:
    """Poll a condition of other processes, up to a deadline."""
    deadline = time.monotonic() + seconds
    while not fulfilled():
        assert time.monotonic() < deadline
        threading.Event().wait(0.1)


def answer(network: Network, tenant: str, method: str, path: str) -> int | None:
    """The status with which the gate answers a certificate; None when it hangs up."""
    assert network.aggregator is not None
    files = network.certificates
    context = ssl.create_default_context(cafile=str(files / "ca.pem"))
    context.load_cert_chain(files / f"client-{tenant}.pem", files / f"client-{tenant}.key")
    address = network.aggregator.address
    connection = http.client.HTTPSConnection(
        address.host, address.port, context=context, timeout=10
    )
    try:
        connection.request(method, path, body=b"")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def test_two_organisations_over_mutual_tls(network):
    """FedAvg over real processes is exact, goes on after a kill, and listens on loopback only."""
    two = NAMES[:2]
    others = family(os.getpid())[1:]  # servers of other tests
    network.aggregate(two, rounds=2)
    assert answer(network, "stranger", "POST", "/v1/fleet/pull-messages") is None
    assert answer(network, "acme", "POST", "/v1/control/start-run") == 403
    assert answer(network, "acme", "GET", "/v1/fleet/pull-messages") == 403
    assert answer(network, "acme", "POST", "/v1/fleet/pull-messages") == 403  # of no node
    assert answer(network, "acme", "POST", "/v1/fleet/register-node") not in (None, 403)
    acme = network.join("acme", 100)
    network.join("globex", 300)
    network.reports = FirstOnly()

    with pytest.raises(KilledError):
        network.run()
    ours = [process for process in family(os.getpid()) if process not in others]
    assert listening(ours) == {"127.0.0.1"}
    assert listening(family(acme.process.pid)) == {"127.0.0.1"}
    assert network.value(1) == pytest.approx((100 * 0.5 + 300 * 1.0) / 400, rel=1e-6)
    for organisation in network.organisations:
        organisation.kill()
    network.aggregator.close()

    network.reports = []
    network.aggregate(two, rounds=2)
    network.join("acme", 100)
    network.join("globex", 300)
    network.run()

    assert [report.round for report in network.reports] == [2]
    first = network.value(1)
    wanted = (100 * (first + 1.0) / 2 + 300 * (first + 2.0) / 2) / 400
    assert network.value(2) == pytest.approx(wanted, rel=1e-6)
    for organisation in network.organisations[2:]:
        assert organisation.process.wait(60) == 0


class KilledError(Exception):
    """Ends the aggregator's side after a round."""


class FirstOnly(list[RoundReport]):
    """Reports of which only one is taken."""

    def append(self, report):
        super().append(report)
        raise KilledError


def test_a_killed_client_in_a_secure_round(network):
    """One of four is killed while it trains: the mean of the other three comes out."""
    network.aggregate(NAMES, rounds=1, secure=True, timeout_s=40)
    for name, examples in zip(NAMES[:3], (10, 20, 30), strict=True):
        network.join(name, examples, secure=True)
    victim = network.join("umbrella", 0, secure=True)
    killer = threading.Thread(target=lambda: (victim.said.wait(200), victim.kill()), daemon=True)
    killer.start()

    network.run()
    killer.join(10)

    (report,) = network.reports
    assert (report.clients, report.missing) == (NAMES[:3], ("umbrella",))
    wanted = (10 * 0.5 + 20 * 1.0 + 30 * 1.5) / 60
    assert network.value(1) == pytest.approx(wanted, abs=1e-4)


def test_a_killed_computation_is_told(network):
    """When the process that computes rounds dies, the command says so and how to go on."""
    network.aggregate(NAMES[:2], rounds=1)

    def computing() -> psutil.Process | None:
        """The process that computes rounds, once it is connected to this one."""
        for process in family(os.getpid()):
            with contextlib.suppress(psutil.Error):
                if "flwr-serverapp" in process.cmdline() and process.net_connections("unix"):
                    return process
        return None

    def kill() -> None:
        wait_until(lambda: computing() is not None)
        process = computing()
        assert process is not None
        process.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(ConnectionLost, match="start again"):
        network.run()
    killer.join(10)


def test_a_simulation_trains_through_a_real_server(tiny_model, tmp_path):
    """`simulate`: two owners, personal tops, rows over TLS, the adapter in PEFT's format.

    One of them protects rows and gradients, and every release of every round is charged.
    """
    configs = []
    spec = "gaussian:clip_norm=100,mu=0.5,by=frobenius"
    protections = {NAMES[0]: {"rows": spec, "gradients": spec, "ledger": "ledger"}}
    for name in NAMES[:2]:
        lines = [
            json.dumps(
                {"prompt": f"{name} {number}", "completion": " yes" if number % 2 else " no"}
            )
            for number in range(8)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        configs.append(
            ClientConfig.from_table(
                {
                    "client": {"name": name, "personal": ["top"], "share_loss": True},
                    "run": {
                        "model": str(tiny_model),
                        "data": f"{name}.jsonl",
                        "evaluation": f"{name}.jsonl",
                        "out": f"out-{name}",
                    },
                    "lora": {"rank": 2, "train": ["bottom", "top"], "freeze_a": True},
                    "training": {"steps": 2, "batch_size": 4},
                    "protection": protections.get(name, {}),
                },
                tmp_path,
            )
        )
    section = {"name": "trial", "clients": list(NAMES[:2]), "folder": tmp_path / "out", "rounds": 2}
    config = from_tables(FederationConfig, {"federation": {**section, "evaluate": True}})
    reports: list[RoundReport] = []

    simulate(config, configs, reports.append, print)

    assert [report.round for report in reports] == [1, 2]
    assert all(report.loss is not None for report in reports)
    with Ledger.open(tmp_path / "ledger", create=False) as ledger:
        (statement,) = ledger.statements()
    # Two rounds of eight examples each way, and the evaluation of eight after each.
    assert (statement.tenant, statement.releases) == (NAMES[0], 2 * (8 + 8 + 8))
    shared = read_adapter(tmp_path / "out" / "rounds" / "step-00000002", Span(0, 5))
    assert {place.block for place in shared.factors} == {0}
    tops = [read_adapter(tmp_path / f"out-{name}" / "adapter", Span(4, 5)) for name in NAMES[:2]]
    first, second = ([factors.b.detach() for factors in top.factors.values()] for top in tops)
    assert any(not torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_nothing_is_looked_up(network, tmp_path):
    """An aggregator and its Flower connect to loopback only: no telemetry, no names, no updates."""
    strace = shutil.which("strace")
    if strace is None or subprocess.run([strace, "-qq", "true"], check=False).returncode != 0:
        pytest.skip("no strace that may trace here")
    network.aggregate(NAMES[:2], rounds=1).close()
    code = (
        "import sys; from pathlib import Path; from fedsea.federated.aggregator import Aggregator\n"
        "made = Aggregator(Path(sys.argv[1])); made._programs.submit(made._link); made.close()"
    )
    traced = tmp_path / "traced"
    command = [strace, "-f", "-qq", "-e", "trace=connect,sendto", "-o", str(traced)]
    subprocess.run(
        [*command, sys.executable, "-c", code, str(tmp_path / "federation.toml")],
        check=True,
        timeout=200,
    )

    lines = [line for line in traced.read_text().splitlines() if "AF_INET" in line]

    assert lines
    assert all('inet_addr("127.0.0.1")' in line for line in lines)
