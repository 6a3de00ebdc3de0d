"""Options that several commands share, as groups: what they are called, what they make.

A group is a dataclass whose fields are options. `flattened` lets a command take groups as
parameters. Modules of the library are imported when a group is used, not when it is declared, so
that help and errors about options come at once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from fedsea.errors import ConfigError

if TYPE_CHECKING:
    from fedsea.client.llm import LLM
    from fedsea.client.protection import Protection
    from fedsea.client.sampling import SamplingParams
    from fedsea.privacy.attestation import Verifier
    from fedsea.privacy.placeholders.config import Placeholders
    from fedsea.transport.credentials import ClientTLS, Plaintext
    from fedsea.transport.recording import Observer

DEFAULT_ADDRESS = "127.0.0.1:50051"
CLIENT_PREFIX = "client-"

_CONNECTION = "Connection"
_MODEL = "Model"
_SAMPLING = "Sampling"


class DType(StrEnum):
    """Number formats that a model is computed in."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class ClientDType(StrEnum):
    """The same, or that of the checkpoint."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class RowCodec(StrEnum):
    """How rows travel."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"


class Quantization(StrEnum):
    """Weight formats."""

    NONE = "none"
    INT8 = "int8"
    NF4 = "nf4"


Model = Annotated[
    str, typer.Argument(help="Folder of a checkpoint or a bundle, or a hub id.", show_default=False)
]
Bottom = Annotated[
    int, typer.Option(help="Blocks after the embedding that stay here.", rich_help_panel=_MODEL)
]
Top = Annotated[
    int, typer.Option(help="Blocks before the final norm that stay here.", rich_help_panel=_MODEL)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """Where the servers are, and how this client proves who it is."""

    server: Annotated[
        list[str] | None,
        typer.Option(
            help="HOST:PORT of a server; repeat it for those that take over when it fails.",
            envvar="FEDSEA_SERVER",
            show_default=DEFAULT_ADDRESS,
            rich_help_panel=_CONNECTION,
        ),
    ] = None
    certs: Annotated[
        Path | None,
        typer.Option(
            help="Folder with ca.pem and client-TENANT.pem and .key.",
            envvar="FEDSEA_CERTS",
            show_default=False,
            rich_help_panel=_CONNECTION,
        ),
    ] = None
    tenant: Annotated[
        str | None,
        typer.Option(
            help="Which client of --certs, when it holds several.",
            show_default=False,
            rich_help_panel=_CONNECTION,
        ),
    ] = None
    ca: Annotated[
        Path | None,
        typer.Option(help="CA certificate.", show_default=False, rich_help_panel=_CONNECTION),
    ] = None
    cert: Annotated[
        Path | None,
        typer.Option(help="Client certificate.", show_default=False, rich_help_panel=_CONNECTION),
    ] = None
    key: Annotated[
        Path | None,
        typer.Option(
            help="Key of the client certificate.",
            show_default=False,
            rich_help_panel=_CONNECTION,
        ),
    ] = None
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File that holds a bearer token.",
            show_default=False,
            rich_help_panel=_CONNECTION,
        ),
    ] = None
    server_name: Annotated[
        str | None,
        typer.Option(
            help="Name in the server's certificate, when it is not the host that is dialled.",
            show_default=False,
            rich_help_panel=_CONNECTION,
        ),
    ] = None
    plaintext: Annotated[
        bool,
        typer.Option("--plaintext", help="No TLS; on loopback only.", rich_help_panel=_CONNECTION),
    ] = False
    attestation_policy: Annotated[
        Path | None,
        typer.Option(
            help="TOML file; send nothing to a server that does not prove to run what it lists.",
            envvar="FEDSEA_ATTESTATION_POLICY",
            show_default=False,
            rich_help_panel=_CONNECTION,
        ),
    ] = None

    @property
    def addresses(self) -> list[str]:
        """The servers in order of preference."""
        return self.server or [DEFAULT_ADDRESS]

    def credentials(self) -> ClientTLS | Plaintext:
        """The identity to connect with.

        Raises:
            ConfigError: options that contradict each other, or none at all.
        """
        from fedsea.transport.credentials import ClientTLS, Plaintext

        single = (self.ca, self.cert, self.key)
        token = None if self.token_file is None else read_token(self.token_file)
        if self.plaintext:
            if self.certs is not None or any(single):
                raise ConfigError("--plaintext is given beside certificates: remove one of them")
            return Plaintext(allow_insecure=True, token=token)
        if self.certs is not None:
            folder = self.certs
            stem = CLIENT_PREFIX + (self.tenant or only_tenant(folder))
            found = (folder / "ca.pem", folder / f"{stem}.pem", folder / f"{stem}.key")
        elif self.ca and self.cert and self.key:
            found = (self.ca, self.cert, self.key)
        else:
            raise ConfigError(
                "no certificate: give --certs DIR, or --ca, --cert and --key; "
                "`fedsea certs client` makes them"
            )
        ca, cert, key = (given or default for given, default in zip(single, found, strict=True))
        return ClientTLS(ca, cert, key, token=token, server_name=self.server_name)

    def verifier(self) -> Verifier | None:
        """Who decides whether a server may get anything; None when no proof is demanded.

        Raises:
            ConfigError: the policy cannot be used, or there is no TLS to bind a proof to.
        """
        if self.attestation_policy is None:
            return None
        if self.plaintext:
            raise ConfigError(
                "--attestation-policy is given beside --plaintext: a proof is bound to a TLS key, "
                "use certificates"
            )
        from fedsea.privacy.attestation import TokenVerifier

        return TokenVerifier.from_file(self.attestation_policy)


@dataclass(frozen=True, slots=True)
class ClientModelOptions:
    """Which part of the model runs here, and how."""

    bottom: Bottom = 1
    top: Top = 1
    dtype: Annotated[
        ClientDType,
        typer.Option(
            help="Number format of the blocks here; auto is the checkpoint's.",
            rich_help_panel=_MODEL,
        ),
    ] = ClientDType.AUTO
    codec: Annotated[
        RowCodec,
        typer.Option(
            help="How rows travel; auto is exact for the dtype, int8 is the smallest.",
            rich_help_panel=_MODEL,
        ),
    ] = RowCodec.AUTO
    quantization: Annotated[
        Quantization,
        typer.Option(help="Weight format of the blocks here.", rich_help_panel=_MODEL),
    ] = Quantization.NONE
    device: Annotated[
        str,
        typer.Option(help="Where the blocks here run: cpu, cuda or mps.", rich_help_panel=_MODEL),
    ] = "cpu"
    threads: Annotated[
        int,
        typer.Option(
            help="CPU threads; 0 leaves torch's own number.", min=0, rich_help_panel=_MODEL
        ),
    ] = 0

    adapter: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a LoRA adapter; its parts for the blocks here are used.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    trunk_adapter: Annotated[
        str,
        typer.Option(
            help="The server's name for the adapter's other part.",
            show_default="none",
            rich_help_panel=_MODEL,
        ),
    ] = ""
    trunk_prompt: Annotated[
        str,
        typer.Option(
            help="The server's name for a soft prompt in front of every sequence.",
            show_default="none",
            rich_help_panel=_MODEL,
        ),
    ] = ""
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the decoding steps here first; takes a C++ compiler and a minute.",
            rich_help_panel=_MODEL,
        ),
    ] = False

    def connect(
        self,
        model: str,
        connection: ConnectionOptions,
        on_notice: Callable[[str], None],
        observer: Observer,
        placeholders: Placeholders | None = None,
        privacy: Protection | None = None,
    ) -> LLM:
        """Load the parts and find a server; `observer` sees all messages."""
        credentials, verifier = connection.credentials(), connection.verifier()
        from fedsea.transport.grpc_client import GrpcChannel
        from fedsea.transport.recording import RecordingChannel

        channels = {
            address: functools.partial(
                RecordingChannel, GrpcChannel(address, credentials), observer
            )
            for address in connection.addresses
        }
        import torch

        from fedsea.client.llm import LLM

        if self.threads:
            torch.set_num_threads(self.threads)
        return LLM.connect(
            model,
            channels,
            partition=(self.bottom, self.top),
            dtype=self.dtype.value,
            device=self.device,
            codec=self.codec.value,
            quantization=self.quantization.value,
            compile=self.compile,
            adapter=self.adapter,
            trunk_adapter=self.trunk_adapter,
            trunk_prompt=self.trunk_prompt,
            on_notice=on_notice,
            placeholders=placeholders,
            privacy=privacy,
            verifier=verifier,
        )


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are chosen, and when an answer ends."""

    max_new_tokens: Annotated[
        int, typer.Option(help="Most tokens to produce.", rich_help_panel=_SAMPLING)
    ] = 128
    temperature: Annotated[
        float,
        typer.Option(help="0 is greedy; higher is more random.", rich_help_panel=_SAMPLING),
    ] = 0.0
    top_k: Annotated[
        int, typer.Option(help="Keep the k most likely; 0 keeps all.", rich_help_panel=_SAMPLING)
    ] = 0
    top_p: Annotated[
        float,
        typer.Option(
            help="Keep the most likely that reach this probability; 1 keeps all.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 1.0
    min_p: Annotated[
        float,
        typer.Option(
            help="Keep those at least this likely relative to the first; 0 keeps all.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        typer.Option(
            help="Above 1 makes tokens that were there less likely.", rich_help_panel=_SAMPLING
        ),
    ] = 1.0
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="End before this text; repeat it for several.",
            show_default=False,
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            help="Start of the random numbers, for the same answer again.",
            show_default=False,
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    min_new_tokens: Annotated[
        int, typer.Option(help="Do not end before so many tokens.", rich_help_panel=_SAMPLING)
    ] = 0
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos", help="Go on after an end-of-text token.", rich_help_panel=_SAMPLING
        ),
    ] = False

    def params(self, n: int = 1) -> SamplingParams:
        """The same as the library's parameters.

        Raises:
            ConfigError: a value is out of range.
        """
        from fedsea.client.sampling import SamplingParams

        given = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return SamplingParams.from_mapping({**given, "stop": self.stop or (), "n": n})


def flattened(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose parameters are those of `command`, with groups taken apart into options."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type[Any]] = {}
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if is_dataclass(hint) and isinstance(hint, type):
            groups[parameter.name] = hint
            parameters.extend(_parameters_of(hint))
        else:
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(kind=keyword, annotation=hint))

    def run(**values: Any) -> Any:
        for name, group in groups.items():
            values[name] = group(**{entry.name: values.pop(entry.name) for entry in fields(group)})
        return command(**values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def only_tenant(folder: Path) -> str:
    """The one tenant whose certificate is in a folder.

    Raises:
        ConfigError: there is none, or there are several.
    """
    names = sorted(
        path.stem.removeprefix(CLIENT_PREFIX) for path in folder.glob(f"{CLIENT_PREFIX}*.pem")
    )
    if not names:
        raise ConfigError(
            f"{folder} holds no client certificate: make one with `fedsea certs client`, "
            "or fix --certs"
        )
    if len(names) > 1:
        raise ConfigError(
            f"{folder} holds certificates of {', '.join(names)}: choose one with --tenant"
        )
    return names[0]


def read_token(path: Path) -> str:
    """The bearer token in a file.

    Raises:
        ConfigError: the file cannot be read or is empty.
    """
    try:
        token = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise ConfigError(f"the token file {path} does not exist: fix the path") from None
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"the token file {path} cannot be read: check it") from None
    if not token:
        raise ConfigError(f"the token file {path} is empty: put the token into it")
    return token


def _parameters_of(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            entry.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if entry.default is MISSING else entry.default,
            annotation=hints[entry.name],
        )
        for entry in fields(group)
    ]
