"""`fedsea serve`: settings from a file and from options, then a server until it is told to stop."""

from __future__ import annotations

import shlex
import tomllib
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsea.cli import screen
from fedsea.cli.options import DType, Quantization, flattened
from fedsea.errors import ConfigError

if TYPE_CHECKING:
    from fedsea.server.config import ServerConfig

_SERVER = "Server"
_MODEL = "Model"
_SECURITY = "Security"

Overrides = dict[str, dict[str, Any]]


class LogFormat(StrEnum):
    """How the log is written."""

    CONSOLE = "console"
    JSON = "json"


class LogLevel(StrEnum):
    """What is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SettingOptions:
    """The settings of a server that have an option of their own; None leaves the file's.

    Each field says which key of which section it overrides.
    """

    address: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT to listen on; port 0 takes a free one.",
            show_default="127.0.0.1:50051",
            rich_help_panel=_SERVER,
        ),
    ] = None
    max_sessions: Annotated[
        int | None,
        typer.Option(
            help="Sessions of all tenants together.", show_default=False, rich_help_panel=_SERVER
        ),
    ] = None
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Loopback HOST:PORT for Prometheus.",
            show_default=False,
            rich_help_panel=_SERVER,
        ),
    ] = None
    log_format: Annotated[
        LogFormat | None,
        typer.Option(
            help="How the log is written.",
            show_default="console",
            rich_help_panel=_SERVER,
        ),
    ] = None
    log_level: Annotated[
        LogLevel | None,
        typer.Option(help="What is logged.", show_default="info", rich_help_panel=_SERVER),
    ] = None
    span: Annotated[
        str | None,
        typer.Option(
            help="Blocks FIRST:END, the widest that a session may ask for.",
            show_default="all",
            rich_help_panel=_MODEL,
        ),
    ] = None
    dtype: Annotated[
        DType | None,
        typer.Option(
            help="Number format of the blocks.",
            show_default="fp32",
            rich_help_panel=_MODEL,
        ),
    ] = None
    quantization: Annotated[
        Quantization | None,
        typer.Option(help="Weight format.", show_default="none", rich_help_panel=_MODEL),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or mps.", show_default="cpu", rich_help_panel=_MODEL),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads; 0 leaves torch's own number.",
            show_default="0",
            rich_help_panel=_MODEL,
        ),
    ] = None
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile",
            help="Compile the decoding step first; takes a C++ compiler and a few minutes.",
            show_default=False,
            rich_help_panel=_MODEL,
        ),
    ] = None
    projection: Annotated[
        list[Path] | None,
        typer.Option(
            help="File whose decoder widens narrow rows; repeat it for several.",
            show_default=False,
            rich_help_panel=_MODEL,
        ),
    ] = None
    kv_rows: Annotated[
        int | None,
        typer.Option(
            help="Rows of the KV pool, one for each token of context.",
            show_default=False,
            rich_help_panel=_MODEL,
        ),
    ] = None
    kv_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of the KV pool, as in 4GiB.",
            show_default="half of what is free",
            rich_help_panel=_MODEL,
        ),
    ] = None
    max_context: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of one sequence.",
            show_default="the model's",
            rich_help_panel=_MODEL,
        ),
    ] = None
    ca: Annotated[
        Path | None,
        typer.Option(
            help="Certificate of the CA that signs clients.",
            show_default=False,
            rich_help_panel=_SECURITY,
        ),
    ] = None
    cert: Annotated[
        Path | None,
        typer.Option(help="Server certificate.", show_default=False, rich_help_panel=_SECURITY),
    ] = None
    key: Annotated[
        Path | None,
        typer.Option(
            help="Key of the server certificate.", show_default=False, rich_help_panel=_SECURITY
        ),
    ] = None
    tokens: Annotated[
        Path | None,
        typer.Option(
            help="Token file; each call then needs a token too.",
            show_default=False,
            rich_help_panel=_SECURITY,
        ),
    ] = None
    attestation_command: Annotated[
        str | None,
        typer.Option(
            help="Program that prints a token for NONCE and KEY_SHA256, its last arguments.",
            show_default=False,
            rich_help_panel=_SECURITY,
        ),
    ] = None


# Options whose name is not that of their key, and all whose section is not [server].
_KEYS = {
    "metrics": ("metrics", "address"),
    "log_format": ("log", "format"),
    "log_level": ("log", "level"),
    "dtype": ("model", "dtype"),
    "quantization": ("model", "quantization"),
    "device": ("model", "device"),
    "threads": ("model", "threads"),
    "compile": ("model", "compile"),
    "projection": ("model", "projections"),
    "kv_rows": ("kv", "rows"),
    "kv_memory": ("kv", "memory"),
    "max_context": ("kv", "max_context"),
    "ca": ("security", "ca"),
    "cert": ("security", "certificate"),
    "key": ("security", "key"),
    "tokens": ("security", "tokens"),
    "attestation_command": ("attestation", "command"),
}


@flattened
def serve(
    settings: SettingOptions,
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a checkpoint or a trunk bundle, or a hub id.", show_default=False
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file with all settings; options come before it.", show_default=False
        ),
    ] = None,
    certs: Annotated[
        Path | None,
        typer.Option(
            help="Folder with ca.pem, server.pem and server.key.",
            show_default=False,
            rich_help_panel=_SECURITY,
        ),
    ] = None,
    plaintext: Annotated[
        bool,
        typer.Option("--plaintext", help="No TLS; on loopback only.", rich_help_panel=_SECURITY),
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any other setting, as SECTION.KEY=VALUE; repeat it for several.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve the trunk of MODEL to clients with a certificate.

    SIGTERM and Ctrl-C let running sessions finish; a second one stops at once.
    """
    overrides: Overrides = {}
    for entry in set_ or ():
        section, key, value = parse_setting(entry)
        overrides.setdefault(section, {})[key] = value
    if model is not None:
        overrides.setdefault("server", {})["model"] = model
    if certs is not None:
        overrides.setdefault("security", {}).update(_files(certs))
    if plaintext:
        overrides.setdefault("security", {})["plaintext"] = True
    for entry_ in fields(settings):
        value = getattr(settings, entry_.name)
        if value is not None:
            section, key = _KEYS.get(entry_.name, ("server", entry_.name))
            words = entry_.name == "attestation_command"
            overrides.setdefault(section, {})[key] = _words(value) if words else _plain(value)
    raise typer.Exit(_serve(_load(config, overrides)))


def parse_setting(text: str) -> tuple[str, str, Any]:
    """Section, key and value of SECTION.KEY=VALUE; a value that is no TOML is taken as text.

    Raises:
        ConfigError: the text has another form.
    """
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"--set {text}: write SECTION.KEY=VALUE, as in kv.page_rows=32")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    return section, key, parsed


def _load(path: Path | None, overrides: Overrides) -> ServerConfig:
    from fedsea.server.config import ServerConfig

    if path is not None:
        return ServerConfig.load(path, overrides)
    if "model" not in overrides.get("server", {}):
        raise ConfigError("there is no model: give MODEL, or a --config that names one")
    return ServerConfig.from_table({}, overrides)


def _serve(config: ServerConfig) -> int:
    with screen.loading(f"loading {Path(config.server.model).name}") as bar:
        from fedsea.server.app import serve as serve_until_stopped

        def announce(line: str) -> None:
            bar.close()
            screen.write(f"{line}\n")

        return serve_until_stopped(config, announce)


def _files(folder: Path) -> dict[str, Path]:
    return {
        "ca": folder / "ca.pem",
        "certificate": folder / "server.pem",
        "key": folder / "server.key",
    }


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, StrEnum) else value


def _words(command: str) -> list[str]:
    """A command line taken apart as a shell would, which never sees it."""
    try:
        return shlex.split(command)
    except ValueError:
        raise ConfigError("--attestation-command has an open quotation: close it") from None
