"""The processes of Flower, each started through here: `python -m fedsea.federated.flower_process`.

A process of Flower runs the code of an app that comes over the network. Here it runs the code that
is installed: an app is taken only when it is, file by file, the one that this installation would
send itself. Which programs Flower may start in turn is settled by `flower.Programs`.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import threading
import time
import tomllib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, Final

from fedsea.errors import ConfigError, PermissionDenied

PROGRAMS: Final[Mapping[str, str]] = {
    "flower-superlink": "flwr.superlink.cli:flower_superlink",
    "flower-supernode": "flwr.supernode.cli:flower_supernode",
    "flower-superexec": "flwr.supercore.cli:flower_superexec",
    "flwr-serverapp": "flwr.superlink.cli:flwr_serverapp",
    "flwr-clientapp": "flwr.supernode.cli:flwr_clientapp",
    "flwr": "flwr.cli.app:app",
}
APP: Final[Mapping[str, bytes]] = {
    "pyproject.toml": b"""\
[project]
name = "fedsea-federation"
version = "1.0.0"
description = "Averages adapters; the code is that of fedsea, on each machine its own."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedsea"

[tool.flwr.app.components]
serverapp = "fedsea_federation.server:app"
clientapp = "fedsea_federation.client:app"
""",
    "fedsea_federation/__init__.py": b"",
    "fedsea_federation/client.py": b"""\
from fedsea.federated.client_app import from_environment

app = from_environment()
""",
    "fedsea_federation/server.py": b"""\
from fedsea.federated import server_app

app = server_app.app
""",
}
_INSTALLS: Final[Mapping[str, str]] = {
    "flwr-clientapp": "flwr.supernode.runtime.run_clientapp",
    "flwr-serverapp": "flwr.superlink.runtime.run_serverapp",
}
_DESCRIPTION: Final = "pyproject.toml"
_MANIFEST: Final = ".info/CONTENT"
_FILES_MOST: Final = 64
_BYTES_MOST: Final = 1 << 20
_PARENT_S: Final = 1.0
_LAST_S: Final = 10.0


def contents(packed: bytes) -> dict[str, bytes]:
    """The files of a packed app.

    Raises:
        PermissionDenied: it is none, or a large one.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as opened:
            entries = opened.infolist()
            if len(entries) > _FILES_MOST or sum(e.file_size for e in entries) > _BYTES_MOST:
                raise PermissionDenied("a large app came; nothing of it was run")
            return {entry.filename: opened.read(entry) for entry in entries}
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise PermissionDenied("what came is no app; nothing of it was run") from error


def check_app(packed: bytes) -> None:
    """Refuse every app but our own.

    Raises:
        PermissionDenied: its files or its description are others than those of this installation.
    """
    found = contents(packed)
    found.pop(_MANIFEST, None)  # Flower checks it against the files
    same = found.keys() == APP.keys() and all(
        _described(found[name]) == _described(APP[name])
        if name == _DESCRIPTION
        else found[name] == APP[name]
        for name in APP
    )
    if not same:
        raise PermissionDenied(
            "the aggregator sent other code than this installation's; nothing of it was run: "
            "use equal versions of fedsea and flwr"
        )


def _described(text: bytes) -> object:
    try:
        return tomllib.loads(text.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        return None


def pin_app(program: str) -> None:
    """Let one of Flower's programs, in this process, install no other app than our own.

    Raises:
        ConfigError: this version of Flower installs apps in another place.
    """
    name = _INSTALLS.get(program)
    if name is None:
        return
    module: Any = importlib.import_module(name)
    install = getattr(module, "install_from_fab", None)
    if install is None:
        raise ConfigError(
            "this version of Flower installs apps in another place, where they would not be "
            "checked; install flwr 1.41"
        )
    module.install_from_fab = _checked(install)


def _checked(install: Callable[..., Any]) -> Callable[..., Any]:
    def checked(packed: bytes, *arguments: Any, **options: Any) -> Any:
        check_app(packed)
        return install(packed, *arguments, **options)

    return checked


def main(program: str, arguments: list[str]) -> None:
    """Become one of Flower's programs.

    Raises:
        ConfigError: no such program.
    """
    if program not in PROGRAMS:
        raise ConfigError(f"{program} is no program of Flower that is started here")
    pin_app(program)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    module, _, function = PROGRAMS[program].partition(":")
    sys.argv = [program, *arguments]
    getattr(importlib.import_module(module), function)()


def _end_with_parent(parent: int) -> None:
    """Do not outlive the process that started this one, however that ends."""
    while os.getppid() == parent:
        time.sleep(_PARENT_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_LAST_S)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
