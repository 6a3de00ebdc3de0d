"""Network addresses as people write them: host:port."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from fedsea.errors import ConfigError

WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - recognised, never a default


@dataclass(frozen=True, slots=True)
class Address:
    """A host (name or IP without brackets) and a TCP port; port 0 asks for a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only processes on this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def from_here(self) -> Address:
        """The address at which this machine reaches a server bound to it."""
        return Address(WILDCARDS.get(self.host, self.host), self.port)


def parse_address(text: str) -> Address:
    """Read `host:port` or `[ipv6]:port`; raises ConfigError for anything else."""
    host, separator, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    well_formed = separator and host and host.isprintable() and not set(host) & set("[]/ ")
    if not well_formed or (":" in host) != bracketed:
        raise ConfigError(f"{text!r} is not an address: write host:port, or [ipv6]:port")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise ConfigError(f"{text!r} has no valid port: use a number from 0 to 65535")
    return Address(host, int(port))
