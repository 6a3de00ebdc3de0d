"""Reading and writing addresses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import ConfigError
from fedsea.transport.address import Address, parse_address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:50051", Address("127.0.0.1", 50051)),
        ("trunk.example.org:0", Address("trunk.example.org", 0)),
        ("[::1]:443", Address("::1", 443)),
    ],
)
def test_addresses_are_read_and_written(text, expected):
    """What is read is written back the same."""
    assert parse_address(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    ["", ":", "host", "host:", ":80", "::1:80", "[::1]", "[host]:80", "a b:80", "a/b:80", "h\n:80"],
)
def test_other_text_is_no_address(text):
    """Anything else is refused with the form to use."""
    with pytest.raises(ConfigError, match=r"host:port|valid port"):
        parse_address(text)


@pytest.mark.parametrize("port", ["65536", "-1", "x", "1.5", "٣", "999999999999"])
def test_ports_out_of_range_are_refused(port):
    """A port is a plain decimal number up to 65535."""
    with pytest.raises(ConfigError, match="port"):
        parse_address(f"host:{port}")


@given(st.text(max_size=40))
def test_no_text_breaks_the_parser(text):
    """Every text gives an address or our own error."""
    try:
        address = parse_address(text)
    except ConfigError:
        return
    assert parse_address(str(address)) == address


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1"])
def test_loopback_hosts(host):
    """These can be reached from this machine only."""
    assert Address(host, 1).is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.evil.org", "127.0.0.1.x"])
def test_hosts_that_are_not_loopback(host):
    """A wildcard, or a name that merely looks local, is not loopback."""
    assert not Address(host, 1).is_loopback


def test_a_wildcard_is_reached_over_loopback():
    """A server bound to every address is reached from here at the loopback one."""
    assert Address("0.0.0.0", 7).from_here == Address("127.0.0.1", 7)
    assert Address("::", 7).from_here == Address("::1", 7)
    assert Address("10.0.0.1", 7).from_here == Address("10.0.0.1", 7)
