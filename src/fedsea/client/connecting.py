"""From what a caller names to what a session needs: placement, codecs, servers and their channels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from fedsea.client.attested import Attestation
from fedsea.client.servers import Endpoint, Expectation
from fedsea.errors import ConfigError, FedseaError, TransportError
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.quantization import library_config
from fedsea.model.spans import Placement
from fedsea.transport.base import Channel
from fedsea.transport.credentials import ClientTLS, Plaintext
from fedsea.transport.grpc_client import GrpcChannel
from fedsea.wire.codecs import VALUE_CODECS, Codec
from fedsea.wire.messages import Description

Servers = str | Sequence[str] | Mapping[str, Callable[[], Channel]]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CODEC_OF = {
    torch.float32: Codec.FP32,
    torch.bfloat16: Codec.BF16,
    torch.float16: Codec.FP16,
}


def placement_of(checkpoint: Checkpoint, dtype: str, device: str, quantization: str) -> Placement:
    """Device, dtype and weight format by their names.

    Raises:
        ConfigError: a name is not known, or the format cannot be made there.
    """
    if dtype == "auto":
        found = getattr(checkpoint.config, "dtype", None)
        chosen = found if isinstance(found, torch.dtype) else torch.float32
    elif dtype in _DTYPES:
        chosen = _DTYPES[dtype]
    else:
        raise ConfigError(f"dtype {dtype!r} is not known; use auto, {', '.join(_DTYPES)}")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is not known; use cpu, cuda or mps") from error
    library_config(quantization, target, chosen)  # refuses what cannot be made
    return Placement(device=target, dtype=chosen, quantization=quantization)


def codec_of(name: str, dtype: torch.dtype) -> Codec:
    """A codec of floating rows by its name; "auto" is that of the dtype.

    Raises:
        ConfigError: the name is not known.
    """
    if name == "auto":
        return _CODEC_OF[dtype]
    known = {codec.value: codec for codec in VALUE_CODECS}
    if name not in known:
        raise ConfigError(f"codec {name!r} is not known; use auto, {', '.join(known)}")
    return known[name]


def endpoints_of(
    servers: Servers,
    tls: ClientTLS | Plaintext | None,
    attestation: Attestation | None,
) -> tuple[Endpoint, ...]:
    """The servers, each behind the proof that is demanded of it.

    Raises:
        ConfigError: no address, or no certificate.
    """
    makers = dict(_channel_makers(servers, tls))
    if attestation is not None:
        makers = {
            address: functools.partial(attestation.guard, address, connect)
            for address, connect in makers.items()
        }
    return tuple(Endpoint(address, connect) for address, connect in makers.items())


def _channel_makers(
    servers: Servers,
    tls: ClientTLS | Plaintext | None,
) -> Mapping[str, Callable[[], Channel]]:
    if isinstance(servers, Mapping):
        return servers
    addresses = [servers] if isinstance(servers, str) else list(servers)
    if not addresses:
        raise ConfigError("there is no server address; give HOST:PORT")
    if tls is None:
        raise ConfigError(
            "no certificate was given; pass tls=ClientTLS(...), made by `fedsea certs client`"
        )
    return {address: functools.partial(GrpcChannel, address, tls) for address in addresses}


async def first_description(endpoints: Sequence[Endpoint], expectation: Expectation) -> Description:
    """Describe the first server that answers; wrong models and identities are not passed over."""
    trouble: FedseaError = ConfigError("there is no server address; give HOST:PORT")
    for endpoint in endpoints:
        try:
            return await endpoint.describe(expectation)
        except TransportError as error:
            trouble = error
    raise trouble


async def close_all(endpoints: Sequence[Endpoint]) -> None:
    """Disconnect from all servers."""
    for endpoint in endpoints:
        await endpoint.close()
