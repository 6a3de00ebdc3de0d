"""Rules of the whole project that no linter checks."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fedsea

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "fedsea"
MODULES = sorted(path for path in SOURCE.rglob("*.py") if not path.stem.endswith(("_pb2", "_grpc")))
SCRIPTS = sorted(path for name in ("benchmarks", "scripts") for path in (ROOT / name).rglob("*.py"))

RUNS_CODE = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_BUILTINS = {"compile", "eval", "exec"}
UNSAFE_ATTRIBUTES = {("torch", "load"), ("torch", "save")}
SHAPELESS_NAMES = {"common", "helper", "helpers", "misc", "util", "utils"}


def relative(path: Path) -> str:
    """A path as a test id."""
    return str(path.relative_to(ROOT))


def unsafe_nodes(tree: ast.AST) -> list[str]:
    """What in this code could run code out of data, as `line: construct`."""
    return [f"{line}: {what}" for node in ast.walk(tree) for line, what in _unsafe(node)]


def _unsafe(node: ast.AST) -> list[tuple[int, str]]:
    match node:
        case ast.Import(names=names):
            found = [name.name for name in names if name.name.split(".")[0] in RUNS_CODE]
        case ast.ImportFrom(module=str(module), names=names):
            found = [module] if module.split(".")[0] in RUNS_CODE else []
            found += [n.name for n in names if (module, n.name) in UNSAFE_ATTRIBUTES]
        case ast.Attribute(value=ast.Name(id=owner), attr=attr):
            found = [f"{owner}.{attr}"] if (owner, attr) in UNSAFE_ATTRIBUTES else []
        case ast.Call(func=ast.Name(id=name)) if name in UNSAFE_BUILTINS:
            found = [name]
        case ast.keyword(arg="allow_pickle", value=value):
            refused = isinstance(value, ast.Constant) and value.value is False
            found = [] if refused else ["allow_pickle"]
        case _:
            return []
    return [(node.lineno, what) for what in found]


def root_imports(tree: ast.AST) -> list[int]:
    """Lines that import the package root, or a name of it that is no submodule."""
    lines = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names) if any(name.name == "fedsea" for name in names):
                lines.append(node.lineno)
            case ast.ImportFrom(module="fedsea", names=names):
                if not all(_is_submodule(name.name) for name in names):
                    lines.append(node.lineno)
            case _:
                pass
    return lines


def third_party_imports(tree: ast.AST) -> set[str]:
    """Top-level packages that this code imports and that neither Python nor we provide."""
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=imported):
                names |= {name.name for name in imported}
            case ast.ImportFrom(module=str(module), level=0):
                names.add(module)
            case _:
                pass
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"fedsea"}


def _is_submodule(name: str) -> bool:
    return (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").is_file()


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=relative)
def test_no_data_can_run_as_code(path):
    """No module reads pickles, calls torch.load, evaluates strings or allows pickled arrays."""
    assert unsafe_nodes(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "from torch import load",
        "torch.load(path)",
        "torch.save(x, path)",
        "eval('1')",
        "exec(text)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
    ],
)
def test_checker_finds_unsafe_code(code):
    """The check above sees each of the constructs that it forbids."""
    assert len(unsafe_nodes(ast.parse(code))) == 1


@pytest.mark.parametrize(
    "code", ["model.eval()", "re.compile(x)", "torch.compile(f)", "np.load(p, allow_pickle=False)"]
)
def test_checker_lets_safe_code_pass(code):
    """The check above does not mistake a method for a builtin."""
    assert unsafe_nodes(ast.parse(code)) == []


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_modules_do_not_import_the_package_root(path):
    """Nothing inside imports `fedsea` itself: one such line ties all modules into one cycle."""
    assert root_imports(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_modules_are_named_for_what_they_own():
    """No module or folder has a name under which anything could be put."""
    names = {part for path in MODULES for part in path.relative_to(SOURCE).with_suffix("").parts}

    assert names & SHAPELESS_NAMES == set()


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_every_module_says_what_it_owns(path):
    """Each module starts with a docstring."""
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_public_namespace_equals_all():
    """What `fedsea` shows is what it lists, and each listed name can be had."""
    listed = {name for name in fedsea.__all__ if hasattr(fedsea, name)}
    shown = {
        name
        for name, member in vars(fedsea).items()
        if not name.startswith("_") and not _is_own_module(member) and name != "annotations"
    }

    assert listed == set(fedsea.__all__)
    assert shown == {name for name in listed if not name.startswith("_")}


def _is_own_module(member: object) -> bool:
    return isinstance(member, ModuleType) and member.__name__.startswith("fedsea.")


def test_version_is_that_of_the_installed_package():
    """The version in the code is a release number, the one that packaging reads."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", fedsea.__version__)


def test_package_is_typed():
    """Type checkers of others may use our annotations."""
    assert (SOURCE / "py.typed").is_file()


@pytest.fixture(scope="module")
def project():
    """The `[project]` table."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def pins():
    """The exact version of every pinned distribution."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    entries = [line for line in lines if line and not line.startswith("#")]
    matches = [re.fullmatch(r"([a-z0-9-]+)==(\d[\w.]*)", entry) for entry in entries]
    assert all(matches), "every line of constraints.txt is name==version"
    return {match[1]: match[2] for match in matches if match}


def test_every_requirement_is_pinned_inside_its_range(project, pins):
    """constraints.txt fixes each direct requirement, at a version that pyproject.toml accepts."""
    declared = project["dependencies"] + project["optional-dependencies"]["dev"]
    requirements = [Requirement(text) for text in declared]

    for requirement in requirements:
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement.name


def test_every_import_is_a_declared_requirement(project):
    """The package imports nothing that only some other requirement happens to bring."""
    extras = project["optional-dependencies"]
    for_users = [text for extra in extras if extra != "dev" for text in extras[extra]]
    requirements = project["dependencies"] + for_users
    declared = {canonicalize_name(Requirement(text).name) for text in requirements}
    owners = packages_distributions()
    imported = {
        name
        for path in MODULES
        for name in third_party_imports(ast.parse(path.read_text(encoding="utf-8")))
    }

    assert {
        name
        for name in imported
        if not declared & {canonicalize_name(owner) for owner in owners.get(name, [])}
    } == set()


@pytest.mark.parametrize(
    "requirement",
    ["torch==2.13.0", "protobuf<7", "typer<0.21", "rich<15", "packaging<26", "cryptography==50.*"],
)
def test_pins_leave_room_for_neighbours(requirement, pins):
    """The pinned set has a CPU build of torch and shares an environment with Flower 1.41."""
    wanted = Requirement(requirement)

    assert pins[wanted.name] in wanted.specifier


def test_command_points_at_a_module(project):
    """The `fedsea` command is declared inside the package."""
    module, _, function = project["scripts"]["fedsea"].partition(":")

    assert (module, function) == ("fedsea.cli", "main")


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_every_module_can_be_imported(path):
    """Importing any module works and raises no warning."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    if parts[-1] != "__main__":
        assert importlib.import_module(name).__name__ == name
