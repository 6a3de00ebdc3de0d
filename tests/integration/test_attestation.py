"""The mode attested over real processes and real TLS: who gets rows, and who gets nothing.

The attestation service and the program that asks it are the test's own; a relay with another key, a
man in the middle of TCP, restarts and failovers are real.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests import attestation_command
from tests.integration.conftest import processes, tls_of
from tests.ports import free_port
from tests.signing_service import IMAGE, ISSUER, SigningService, good_claims

from fedsea.client.background import Background
from fedsea.client.link import Patience
from fedsea.client.sessions import Session
from fedsea.errors import AttestationError, FedseaError, Unreachable
from fedsea.privacy.attestation import Attested, Evidence, TokenVerifier, Verifier
from fedsea.transport.base import Peer, PinnedChannel, ServerStream
from fedsea.transport.certificates import issue_server
from fedsea.transport.credentials import ServerTLS
from fedsea.transport.grpc_client import GrpcChannel
from fedsea.transport.grpc_server import GrpcServer
from fedsea.transport.recording import Recorder, RecordingChannel

pytestmark = pytest.mark.slow

PROMPT = "The patient came in on Monday and"
OPTIONS: dict[str, Any] = {"max_new_tokens": 60, "ignore_eos": True}
OTHER_IMAGE = {"submods": {"container": {"image_digest": "sha256:" + "bd" * 32}}}
SERVICE = SigningService()


class Machine:
    """Where a server runs: says what a test lets it say, and notes each time that it was asked."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._state = folder / "state.json"
        self._log = folder / "log"
        program = [sys.executable, attestation_command.__file__, str(self._state)]
        self.options = ("--attestation-command", shlex.join(program))
        self.says()

    def forget(self) -> None:
        """Say good things again, and know of no request."""
        self._log.unlink(missing_ok=True)
        self.says()

    def says(self, **changes: Any) -> None:
        """From now on tokens have good claims with these changes."""
        claims = {**good_claims(b"", "KEY_SHA256"), "eat_nonce": "NONCE", **changes}
        state = {
            "key": SERVICE.private_pem().decode(),
            "algorithm": SERVICE.algorithm,
            "key_id": SERVICE.key_id,
            "claims": json.dumps(claims),
        }
        self._state.write_text(json.dumps(state))

    @property
    def asked(self) -> list[tuple[str, str]]:
        """Nonce and key of each request so far."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [(line.split()[0], line.split()[1]) for line in lines]


OFTEN = ("--set", "attestation.requests_per_second=1000.0")


@pytest.fixture(scope="module")
def good_server(tiny_model, certificates, tmp_path_factory) -> Iterator[tuple[Machine, Any]]:
    """A machine, and a server on it that no test harms."""
    folder = tmp_path_factory.mktemp("good")
    machine = Machine(folder / "machine")
    with processes(tiny_model, certificates, folder) as start:
        yield machine, start(*machine.options, *OFTEN)


@pytest.fixture
def good(good_server) -> tuple[Machine, Any]:
    """The same for a test that begins: in good order, and not asked yet."""
    good_server[0].forget()
    return good_server  # type: ignore[no-any-return]


@pytest.fixture
def make_machine(tmp_path) -> Callable[[str], Machine]:
    """Machines by name."""
    return lambda name: Machine(tmp_path / name)


@pytest.fixture
def verifier(tmp_path) -> TokenVerifier:
    """The data owner's policy, read from files."""
    return TokenVerifier.from_file(SERVICE.write_policy(tmp_path))


@pytest.fixture(scope="module")
def expected(shared_server, tiny_model, certificates):
    """The answer without attestation."""
    from tests.integration.conftest import Clients

    made = Clients(tiny_model, certificates)
    tokens = made.connect(shared_server.address).generate(PROMPT, **OPTIONS).token_ids
    made.close()
    return tokens


def rows(server) -> float:
    """Rows that a server process has computed for anybody."""
    found: float = server.metric("fedsea_rows_total")
    return found


def opened(server) -> float:
    """Sessions that a server process has opened for anybody."""
    found: float = server.metric("fedsea_sessions_opened_total")
    return found


def test_an_accepted_server_answers(good, clients, verifier, expected):
    """The same tokens as ever, asked once; mode and grounds are shown."""
    machine, server = good
    llm = clients.connect(server.address, verifier=verifier)
    assert llm.generate(PROMPT, **OPTIONS).token_ids == expected
    assert llm.generate(PROMPT, **OPTIONS).token_ids == expected
    assert len(machine.asked) == 1
    assert llm.mode == "attested"
    assert llm.attested is not None
    assert (llm.attested.issuer, llm.attested.key_sha256) == (ISSUER, machine.asked[0][1])
    assert f"mode attested: attested by {ISSUER}: " in repr(llm)
    assert IMAGE in llm.describe_mode()


def test_a_refused_server_gets_nothing(good, tiny_model, certificates, verifier):
    """One with another image: no session, no row, no message; the recorder saw none go out."""
    from fedsea.client.llm import LLM

    machine, server = good
    machine.says(**OTHER_IMAGE)
    before = opened(server), rows(server)
    recorder = Recorder()
    channel = GrpcChannel(server.address, tls_of(certificates, "acme"))
    servers = {server.address: lambda: RecordingChannel(channel, recorder)}
    with pytest.raises(AttestationError, match=r"at its measurement.*nothing was sent"):
        LLM.connect(tiny_model, servers, verifier=verifier)
    assert len(machine.asked) == 1
    assert recorder.up.messages == 0
    assert (opened(server), rows(server)) == before


def test_a_server_without_proof_gets_nothing(shared_server, clients, verifier):
    """A server that has no attestation is refused by a client that demands one."""
    before = opened(shared_server)
    with pytest.raises(AttestationError, match="has no proof of what it runs"):
        clients.connect(shared_server.address, verifier=verifier)
    assert opened(shared_server) == before


def test_a_program_that_fails(start_server, clients, verifier):
    """The server says that it cannot prove anything, and gets nothing."""
    server = start_server("--attestation-command", f"{sys.executable} -c 'raise SystemExit(3)'")
    with pytest.raises(AttestationError, match="could not get proof"):
        clients.connect(server.address, verifier=verifier)
    assert opened(server) == 0


class Thief:
    """A server with a certificate of the same CA that wants rows, and relays requests for proof."""

    def __init__(self, tls: ServerTLS, relay: GrpcChannel | None = None) -> None:
        self.descriptions = 0
        self.sessions = 0
        self.relayed = 0
        self._relay = relay
        self._pinned: PinnedChannel | None = None
        self._background = Background("thief")
        self._server = GrpcServer(self, "127.0.0.1:0", tls, attester=self)
        self.address = str(self._background.run(self._server.start()))

    async def describe(self, peer: Peer) -> bytes:
        self.descriptions += 1
        return b""

    async def session(self, peer: Peer, stream: ServerStream) -> None:
        self.sessions += 1
        await stream.receive()

    async def attest(self, peer: Peer, request: bytes) -> bytes:
        assert self._relay is not None
        self.relayed += 1
        self._pinned = self._pinned or await self._relay.pin()
        return await self._pinned.attest(request)

    async def _stop(self) -> None:
        for channel in (self._pinned, self._relay):
            if channel is not None:
                await channel.close()
        await self._server.stop()

    def close(self) -> None:
        """Stop serving."""
        self._background.run(self._stop())
        self._background.stop()


@pytest.fixture
def other_certificate(certificates, tmp_path) -> ServerTLS:
    """A certificate for the same names, by the same CA, with another key."""
    folder = tmp_path / "stolen"
    folder.mkdir()
    for name in ("ca.pem", "ca.key"):
        shutil.copy(certificates / name, folder)
    return issue_server(folder, ["localhost", "127.0.0.1"])


@pytest.fixture
def make_thief(other_certificate) -> Iterator[Callable[..., Thief]]:
    """Thieves that are caught with the test."""
    made: list[Thief] = []

    def make(relay: GrpcChannel | None = None) -> Thief:
        made.append(Thief(other_certificate, relay))
        return made[-1]

    yield make
    for thief in made:
        thief.close()


def test_a_relayed_token_is_refused(good, clients, make_thief, verifier, certificates):
    """A good token of a good server, for our very nonce, shown by a server with another key."""
    machine, server = good
    before = opened(server)
    thief = make_thief(GrpcChannel(server.address, tls_of(certificates, "globex")))
    with pytest.raises(AttestationError, match="at its TLS key"):
        clients.connect(thief.address, verifier=verifier)
    assert (thief.relayed, thief.descriptions, thief.sessions) == (1, 0, 0)
    assert len(machine.asked) == 1
    assert opened(server) == before


class Switch:
    """TCP in the middle: the first connections go to one server, all later ones to another."""

    def __init__(self, first: str, then: str, count: int = 1) -> None:
        self._targets = [first] * count
        self._then = then
        self._background = Background("switch")
        self._server = self._background.run(self._start())
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _start(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _serve(self, near: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target = self._targets.pop(0) if self._targets else self._then
        host, _, port = target.rpartition(":")
        far, far_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(_copy(near, far_writer), _copy(far, writer))

    async def _stop(self) -> None:
        self._server.close()

    def close(self) -> None:
        """Stop; open connections break."""
        self._background.stop(self._stop())


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@pytest.mark.parametrize("honest_first", [True, False])
def test_a_man_in_the_middle_of_tls(
    good, clients, make_thief, verifier, certificates, honest_first
):
    """Whoever is shown in the handshake is the only one to whom anything can be sent.

    The man in the middle lets one of both connections through to the good server, and ends the
    other himself, with a certificate of the same CA.
    """
    machine, server = good
    before = opened(server)
    thief = make_thief(GrpcChannel(server.address, tls_of(certificates, "globex")))
    order = (server.address, thief.address) if honest_first else (thief.address, server.address)
    switch = Switch(*order)
    with pytest.raises(Unreachable, match="shows another TLS key"):
        clients.connect(switch.address, verifier=verifier)
    switch.close()
    assert (thief.relayed, thief.descriptions, thief.sessions) == (0, 0, 0)
    assert (len(machine.asked), opened(server)) == (0, before)


def test_a_connection_that_is_taken_over_later(
    good, clients, make_thief, make_proxy, verifier, certificates
):
    """Cut in mid-answer, and then a thief answers: it gets not one message."""
    _, server = good
    cut = make_proxy(server.address, cut_after=9000)
    thief = make_thief(GrpcChannel(server.address, tls_of(certificates, "globex")))
    switch = Switch(cut.address, thief.address, count=2)  # the handshake, and the connection
    llm = clients.connect(switch.address, verifier=verifier, patience=Patience(recover=3.0))
    with pytest.raises(FedseaError) as caught:
        llm.generate(PROMPT, **{**OPTIONS, "max_new_tokens": 300})
    switch.close()
    assert isinstance(caught.value, AttestationError)
    assert "at its TLS key" in str(caught.value)
    assert cut.cuts == 1
    assert (thief.descriptions, thief.sessions) == (0, 0)


def session_of(llm) -> Session:
    """A session that can go on after its server went away."""
    return Session.open(llm, 512)


def test_failover_asks_the_other_server_first(
    start_server, clients, make_machine, verifier, expected
):
    """The first server dies in mid-session; the second proves itself, and the answer is the same."""
    machines = [make_machine("one"), make_machine("two")]
    one, two = (start_server(*machine.options) for machine in machines)
    llm = clients.connect(one.address, two.address, verifier=verifier)
    with session_of(llm) as session:
        first = session.generate(PROMPT, max_new_tokens=20, ignore_eos=True).token_ids
        assert [len(machine.asked) for machine in machines] == [1, 0]
        one.kill()
        rest = session.generate((), max_new_tokens=40, ignore_eos=True).token_ids
    assert first + rest == expected
    assert [len(machine.asked) for machine in machines] == [1, 1]
    assert any(f"{two.address} attested by {ISSUER}" in line for line in clients.notices)


def test_failover_to_a_server_that_is_refused(start_server, clients, make_machine, verifier):
    """The second server runs something else: the session ends, and no row reaches it."""
    good, bad = make_machine("good"), make_machine("bad")
    bad.says(**OTHER_IMAGE)
    one, two = start_server(*good.options), start_server(*bad.options)
    llm = clients.connect(one.address, two.address, verifier=verifier)
    with session_of(llm) as session:
        session.generate(PROMPT, max_new_tokens=20, ignore_eos=True)
        one.kill()
        with pytest.raises(AttestationError, match="at its measurement"):
            session.generate((), max_new_tokens=40, ignore_eos=True)
    assert len(bad.asked) == 1
    assert (opened(two), rows(two)) == (0, 0)


@pytest.mark.parametrize("changed", [False, True])
def test_a_restarted_server_is_asked_again(
    start_server, clients, make_machine, verifier, expected, changed
):
    """At the same address, with the same key: it has to prove what it runs now."""
    machine = make_machine("machine")
    address = f"127.0.0.1:{free_port()}"
    server = start_server(*machine.options, "--address", address)
    assert server.address == address
    llm = clients.connect(address, verifier=verifier)
    with session_of(llm) as session:
        first = session.generate(PROMPT, max_new_tokens=20, ignore_eos=True).token_ids
        server.kill()
        if changed:
            machine.says(**OTHER_IMAGE)
        again = start_server(*machine.options, "--address", address)
        assert again.address == address
        if changed:
            with pytest.raises(AttestationError, match="at its measurement"):
                session.generate((), max_new_tokens=40, ignore_eos=True)
            assert rows(again) == 0
        else:
            rest = session.generate((), max_new_tokens=40, ignore_eos=True).token_ids
            assert first + rest == expected
    assert len(machine.asked) == 2
    assert len({nonce for nonce, _ in machine.asked}) == 2
    assert len({key for _, key in machine.asked}) == 1


class Impatient(Verifier):
    """Another verifier's acceptance, for a moment only."""

    def __init__(self, verifier: Verifier, seconds: float) -> None:
        self._verifier = verifier
        self._seconds = seconds

    def verify(self, evidence: Evidence) -> Attested:
        found = self._verifier.verify(evidence)
        return replace(found, expires=time.time() + self._seconds)


def test_a_running_session_proves_itself_again(good, clients, verifier, expected):
    """Acceptance expires in mid-answer: the stream goes on after a new proof, without a break."""
    machine, server = good
    before = opened(server)
    llm = clients.connect(server.address, verifier=Impatient(verifier, 0.02))
    assert llm.generate(PROMPT, **OPTIONS).token_ids == expected
    assert len(machine.asked) > 2
    assert opened(server) == before + 1
    assert not clients.notices


def test_a_running_session_that_is_not_accepted_again(good, clients, verifier):
    """The machine changes under an open session: the next row stays here."""
    machine, server = good
    llm = clients.connect(server.address, verifier=Impatient(verifier, 0.2))
    with session_of(llm) as session:
        session.generate(PROMPT, max_new_tokens=5, ignore_eos=True)
        before = rows(server)
        machine.says(dbgstat="enabled")
        while time.time() < llm.attested.expires:
            pass  # only the clock has to move on
        with pytest.raises(AttestationError, match="at its debug state"):
            session.generate((), max_new_tokens=5, ignore_eos=True)
    assert rows(server) == before


def test_from_the_command_line(good, tiny_model, certificates, tmp_path):
    """The policy file decides there too; a refusal has the exit code of security."""
    machine, server = good
    before = opened(server)
    policy = SERVICE.write_policy(tmp_path)
    command = [sys.executable, "-m", "fedsea", "generate", str(tiny_model), PROMPT]
    command += ["--certs", str(certificates), "--tenant", "acme", "--server", server.address]
    command += ["--attestation-policy", str(policy), "--max-new-tokens", "4", "--ignore-eos"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert f"attested by {ISSUER}" in done.stderr
    machine.says(**OTHER_IMAGE)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == AttestationError.exit_code
    assert "at its measurement" in done.stderr
    assert opened(server) == before + 1
