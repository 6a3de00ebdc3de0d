from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import psutil
import pytest
from flwr.cli.build import build_fab_from_files

from fedsea.errors import ConfigError, PermissionDenied
from fedsea.federated import flower_process
from fedsea.federated.flower import Programs, end
from fedsea.federated.flower_process import APP, check_app, contents, main, pin_app

# Flower packs its apps with a deprecated kind of pattern.
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


def packed(**changes):
    """Our app as Flower packs it, with some files changed."""
    return build_fab_from_files({**APP, **changes})[0]


def test_our_own_app_is_taken():
    """What this installation would send itself passes."""
    check_app(packed())


@pytest.mark.parametrize(
    "changes",
    [
        {"fedsea_federation/client.py": b"app = None\n"},
        {"fedsea_federation/more.py": b"import os\n"},
        {"pyproject.toml": APP["pyproject.toml"].replace(b"client:app", b"server:app")},
    ],
)
def test_other_code_is_refused(changes):
    """A changed file, another file, or another entry point: nothing of it is run."""
    with pytest.raises(PermissionDenied, match="other code"):
        check_app(packed(**changes))


def test_a_missing_file_is_refused():
    """All of our files have to be there."""
    files = contents(packed())
    del files["fedsea_federation/server.py"]
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as opened:
        for name, content in files.items():
            opened.writestr(name, content)

    with pytest.raises(PermissionDenied):
        check_app(made.getvalue())


def test_what_is_no_app_is_refused():
    """Neither bytes that are no archive nor an archive that would fill the memory."""
    with pytest.raises(PermissionDenied, match="no app"):
        check_app(b"no archive")
    large = io.BytesIO()
    with zipfile.ZipFile(large, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("zeros", bytes(2 << 20))
    with pytest.raises(PermissionDenied, match="large"):
        check_app(large.getvalue())


@pytest.mark.parametrize("program", ["flwr-clientapp", "flwr-serverapp"])
def test_flower_installs_through_the_check(program, monkeypatch):
    """The function with which Flower installs an app is the checked one."""
    import importlib

    module = importlib.import_module(flower_process._INSTALLS[program])
    installed = []
    monkeypatch.setattr(module, "install_from_fab", lambda fab, **_: installed.append(fab))
    pin_app(program)

    with pytest.raises(PermissionDenied):
        module.install_from_fab(b"other code", skip_prompt=True)
    module.install_from_fab(packed(), skip_prompt=True)
    assert len(installed) == 1


def test_another_flower_is_refused(monkeypatch):
    """Where apps are installed elsewhere, they would not be checked."""
    import importlib

    module = importlib.import_module(flower_process._INSTALLS["flwr-clientapp"])
    monkeypatch.delattr(module, "install_from_fab")

    with pytest.raises(ConfigError, match=r"flwr 1\.41"):
        pin_app("flwr-clientapp")


def test_other_programs_are_refused():
    """Only what a federation needs can be started."""
    with pytest.raises(ConfigError):
        main("flwr-agentapp", [])


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Programs under a folder, in an environment that would let Flower talk."""
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setenv("FLWR_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example.org:3128")
    made = Programs(tmp_path / "flower", {"EXTRA": "1"})
    yield made
    made.close()


def test_flower_keeps_to_itself(programs, tmp_path):
    """No telemetry, no update checks, no installations, no proxies; its own home and search path."""
    found = programs.environment()

    assert found["FLWR_TELEMETRY_ENABLED"] == "0"
    assert found["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert found["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert found["FLWR_HOME"] == str(tmp_path / "flower" / "home")
    assert found["EXTRA"] == "1"
    assert "FLWR_LOG_LEVEL" not in found
    assert not {name for name in found if name.lower().endswith("_proxy")}
    (place,) = found["PATH"].split(os.pathsep)
    assert sorted(path.name for path in Path(place).iterdir()) == [
        "flower-superexec",
        "flwr-clientapp",
        "flwr-serverapp",
    ]


def test_its_folder_is_private(programs, tmp_path):
    """State and search path can be entered by their owner only."""
    for place in ("flower", "flower/bin", "flower/home"):
        assert (tmp_path / place).stat().st_mode & 0o077 == 0


def test_children_of_children_are_ended():
    """Whatever was started ends, by number, with what it started."""
    inner = "import time; time.sleep(600)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    process = subprocess.Popen([sys.executable, "-c", outer], start_new_session=True)
    parent = psutil.Process(process.pid)
    while not parent.children():
        pass
    (child,) = parent.children()

    end([process])

    assert process.poll() is not None
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
