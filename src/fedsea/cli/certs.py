"""`fedsea certs`: a private CA, certificates and tokens, and who gets which file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsea.cli import screen

_CA_DAYS = 5 * 365
_LEAF_DAYS = 90

app = typer.Typer(
    name="certs",
    help="Make a private CA, certificates and tokens.",
    no_args_is_help=True,
)

Folder = Annotated[
    Path, typer.Option("--dir", help="Folder of the CA and of what it issues.", metavar="DIR")
]
Days = Annotated[int, typer.Option(help="How long it is valid.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]


@app.command("init")
def init(
    directory: Folder = Path("certs"),
    days: Days = _CA_DAYS,
    force: Force = False,
) -> None:
    """Make a CA: ca.pem, and ca.key, which signs and stays where it is."""
    from fedsea.transport.certificates import CA_KEY, init_ca

    certificate = init_ca(directory, days=days, force=force)
    _show(
        (certificate, "every server and every client"),
        (directory / CA_KEY, "nobody: it stays here, and signs with `fedsea certs`"),
    )


@app.command("server")
def server(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Host names and IP addresses under which clients reach the server.",
            show_default=False,
        ),
    ],
    directory: Folder = Path("certs"),
    days: Days = _LEAF_DAYS,
    force: Force = False,
) -> None:
    """Issue a server's certificate: server.pem and server.key."""
    from fedsea.transport.certificates import issue_server

    files = issue_server(directory, names, days=days, force=force)
    _show(
        (files.ca, "the server"),
        (files.certificate, "the server"),
        (files.key, "the server only, never a client"),
    )
    screen.detail("there: fedsea serve MODEL --certs DIR, with these three files in DIR")


@app.command("client")
def client(
    tenant: Annotated[
        str,
        typer.Argument(help="Name by which the server knows this client.", show_default=False),
    ],
    directory: Folder = Path("certs"),
    days: Days = _LEAF_DAYS,
    force: Force = False,
) -> None:
    """Issue a client's certificate: client-TENANT.pem and .key. Its name is the tenant."""
    from fedsea.transport.certificates import issue_client

    files = issue_client(directory, tenant, days=days, force=force)
    _show(
        (files.ca, f"the client {tenant}"),
        (files.certificate, f"the client {tenant}"),
        (files.key, f"the client {tenant} only, never the server"),
    )
    screen.detail("there: fedsea generate MODEL --certs DIR, with these three files in DIR")


@app.command("token")
def token(
    tenant: Annotated[
        str, typer.Argument(help="Tenant that the token belongs to.", show_default=False)
    ],
    file: Annotated[
        Path, typer.Option(help="The server's token file; it keeps hashes only.")
    ] = Path("tokens.json"),
    days: Days = _LEAF_DAYS,
) -> None:
    """Make a bearer token and show it, once; add its hash to the server's token file."""
    from fedsea.transport.tokens import add_token

    made = add_token(file, tenant, days=days)
    screen.write(f"{made}\n")
    _show((file, "the server: fedsea serve --tokens"))
    screen.detail(f"the token goes to {tenant}, in a file: fedsea generate --token-file FILE")


def _show(*files: tuple[Path, str]) -> None:
    for path, owner in files:
        screen.detail(f"{path} -> {owner}")
