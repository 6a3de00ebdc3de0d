from __future__ import annotations

import socket
import stat
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsea.errors import ConnectionLost, NotFinite, RemoteProtocolError, Unreachable
from fedsea.federated.channel import MAX_BODY, MAX_HEADER, Listener, call, decode, encode

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}


@pytest.fixture
def listener():
    """Answers with what it was asked, or with an error."""

    def answer(header, arrays):
        if header.get("request") == "fail":
            raise NotFinite("the loss is NaN")
        return {"asked": header}, arrays

    with Listener(answer) as made:
        yield made


def reader(data):
    """Reads from bytes as from a socket that ends."""
    at = 0

    def read(length):
        nonlocal at
        part = data[at : at + length]
        at += length
        if len(part) < length:
            raise ConnectionLost("the end")
        return part

    return read


def test_a_request_is_answered(listener):
    """Header and arrays come through in both directions."""
    header, arrays = call(listener.path, {"request": "echo", "round": 3}, ARRAYS)

    assert header == {"asked": {"request": "echo", "round": 3}}
    assert arrays["a"].tolist() == ARRAYS["a"].tolist()


def test_errors_come_back_as_themselves(listener):
    """The shim raises what the client process raised."""
    with pytest.raises(NotFinite, match="the loss is NaN"):
        call(listener.path, {"request": "fail"}, {})


def test_nobody_else_can_reach_the_socket(listener):
    """The folder is its owner's alone, and so is the socket."""
    path = Path(listener.path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_nobody_answers():
    """A client process that is not there is said to be not there."""
    with pytest.raises(Unreachable, match="start it again"):
        call("/nonexistent/client.sock", {}, {})


def test_closing_removes_the_socket(listener):
    """Nothing is left behind."""
    listener.close()

    assert not Path(listener.path).parent.exists()


def test_whoever_hangs_up_does_not_stop_the_others(listener):
    """A shim that was killed in mid-message costs nothing but its own request."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as broken:
        broken.connect(listener.path)
        broken.sendall(b"\x10")

    assert call(listener.path, {"request": "echo"}, {})[0]["asked"] == {"request": "echo"}


def test_requests_are_computed_one_after_the_other():
    """Two shims at once do not compute at once."""
    running, most, lock = 0, 0, threading.Lock()

    def answer(header, arrays):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        with lock:
            running -= 1
        return {}, {}

    with Listener(answer) as made:
        askers = [threading.Thread(target=call, args=(made.path, {}, {})) for _ in range(8)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join(10)

    assert most == 1


@given(st.binary(max_size=300))
def test_any_bytes_give_a_message_or_an_error_of_ours(data):
    """Nothing but our own errors, whatever comes."""
    try:
        header, arrays = decode(reader(data))
    except (RemoteProtocolError, ConnectionLost):
        return
    assert isinstance(header, dict)
    assert isinstance(arrays, dict)


@given(st.integers(0, 60), st.binary(min_size=1, max_size=4))
def test_a_damaged_message_gives_a_message_or_an_error_of_ours(at, damage):
    """The same for messages that are nearly right."""
    data = bytearray(encode({"request": "fit", "round": 1}, ARRAYS))
    data[at : at + len(damage)] = damage
    try:
        decode(reader(bytes(data)))
    except (RemoteProtocolError, ConnectionLost):
        return


@pytest.mark.parametrize(
    ("head", "body"), [(MAX_HEADER + 1, 0), (0, MAX_BODY + 1), (2**32 - 1, 2**64 - 1)]
)
def test_lengths_are_checked_before_memory_is_taken(head, body):
    """A length beyond its cap is refused without reading on."""
    asked = []

    def read(length):
        asked.append(length)
        return struct.pack("<IQ", head, body)

    with pytest.raises(RemoteProtocolError, match="caps"):
        decode(read)
    assert asked == [12]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.binary(max_size=100))
def test_the_listener_outlives_any_bytes(listener, data):
    """After anything at all it still answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as opened:
        opened.connect(listener.path)
        opened.sendall(data)
        opened.shutdown(socket.SHUT_WR)
        opened.recv(1 << 16)

    assert call(listener.path, {"request": "echo"}, {})[0]["asked"] == {"request": "echo"}
