"""Write docs/reference/configuration.md from the dataclasses that read a server's settings.

    python scripts/configuration_reference.py

A test compares the page with what this script would write.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from enum import StrEnum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from fedsea.federated.config import AggregatorConfig
from fedsea.federated.joining import ClientSection, ProtectionSection
from fedsea.server.config import (
    DEVICES,
    DTYPES,
    LOG_FORMATS,
    LOG_LEVELS,
    QUANTIZATIONS,
    AdapterSection,
    AdaptersSection,
    GroupSection,
    LimitsSection,
    PromptSection,
    PromptsSection,
    QuotaSection,
    QuotasSection,
    ServerConfig,
    TrainingSection,
)
from fedsea.wire.limits import Limits

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "configuration.md"
HEAD = """\
# Server configuration

<!-- Written by scripts/configuration_reference.py from fedsea.server.config; change it there. -->

`fedsea serve --config FILE` reads a TOML file with the sections below; only `server.model` is
required. A key that is not listed here is an error. Paths are relative to the file.
Options of the command override the file, and `--set SECTION.KEY=VALUE` reaches every key:
see [the command](cli.md#fedsea-serve) and [how to serve a trunk](../how-to/serve-a-trunk.md).
"""
FEDERATION = """\
## Files of a federation

`fedsea federate run` reads the sections `federation`, `strategy`, `secure`, `privacy` and
`aggregator`. `fedsea federate client` reads `client`, `secure`, `privacy` and `protection`, and those of
[`fedsea finetune`](finetuning.md): `run`, `parts`, `lora`, `data` and `training`, where
`training.steps` or `training.epochs` says how long a round is. `fedsea federate simulate` reads one
file of the first kind, without `aggregator`, and one of the second for each client.
See [how to federate](../how-to/federate.md).
"""
QUOTAS = """\
The keys above hold for every tenant. A section `[quotas.tenants.NAME]` takes the same keys for one
tenant; what it does not name stays as above.
"""


def _choice(text: str, values: tuple[str, ...]) -> str:
    return f"{text}: {', '.join(f'`{value}`' for value in values)}"


# What a key means where its section says it for all keys together.
MEANINGS = {
    "model.dtype": _choice("number format of the blocks", DTYPES),
    "model.quantization": _choice("weight format of the blocks", QUANTIZATIONS),
    "model.device": _choice("where the blocks run", DEVICES) + ", or `cuda:1` and so on",
    "model.threads": "CPU threads; 0 leaves torch's own number",
    "model.projections": "files whose decoders widen narrow rows; `fedsea serve --projection FILE`",
    "model.compile": "compile the decoding step before the server is ready; takes a C++ compiler",
    "security.ca": "certificate of the authority that signs clients",
    "security.certificate": "the server's certificate",
    "security.key": "key of the server's certificate",
    "security.tokens": "token file; each call then needs a token too",
    "security.plaintext": "no TLS; on loopback only",
    "metrics.address": "where Prometheus reads the metrics: a loopback host:port; unset for nowhere",
    "log.format": _choice("how lines are written to standard error", LOG_FORMATS),
    "log.level": _choice("the least that is logged", LOG_LEVELS),
}
_OWNERS: dict[type[Any], type[Any]] = {
    QuotasSection: QuotaSection,
    AdaptersSection: AdapterSection,
    PromptsSection: PromptSection,
}
_NAMED: dict[type[Any], str] = {AdaptersSection: "adapter", PromptsSection: "soft prompt"}
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "text", Path: "path"}
_LISTS: dict[Any, str] = {
    tuple[Path, ...]: "list of paths",
    tuple[str, ...]: "list of texts",
    tuple[int, ...]: "list of integers",
}
_ATTRIBUTE = re.compile(r"^    (\w+): (.+(?:\n        .+)*)", re.MULTILINE)


def page() -> str:
    """The whole page."""
    sections = get_type_hints(ServerConfig)
    federation = get_type_hints(AggregatorConfig) | {
        "client": ClientSection,
        "protection": ProtectionSection,
    }
    return "\n".join(
        [
            HEAD,
            *(section_text(name, kind) for name, kind in sections.items()),
            FEDERATION,
            *(section_text(name, kind) for name, kind in federation.items()),
        ]
    )


def section_text(name: str, section: type[Any]) -> str:
    """One section with a table of its keys."""
    owner = _OWNERS.get(section, section)
    lines = [f"## {name}", "", _summary(owner), ""]
    if section in _NAMED:
        lines += [f"Each {_NAMED[section]} has a section `[{name}.NAME]` of its own.", ""]
    lines += ["| key | value | default | |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cells)} |" for cells in _rows(name, owner)] + [""]
    if section is TrainingSection:
        lines += ["Each group has a section `[training.groups.NAME]` of its own.", ""]
        lines += [_summary(GroupSection), "", "| key | value | default | |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(cells)} |" for cells in _rows("groups", GroupSection)] + [""]
    return "\n".join([*lines, QUOTAS] if section is QuotasSection else lines)


def _rows(name: str, section: type[Any]) -> Iterator[list[str]]:
    described = _attributes(section)
    if section is LimitsSection:
        described = _attributes(Limits)
    hints = get_type_hints(section)
    declared: tuple[Field[Any], ...] = fields(section)
    for entry in declared:
        meaning = described.get(entry.name) or MEANINGS.get(f"{name}.{entry.name}")
        if meaning is None:
            raise LookupError(f"nothing says what {name}.{entry.name} means: document it")
        yield [f"`{entry.name}`", _value(hints[entry.name]), _default(entry), meaning]


def _summary(section: type[Any]) -> str:
    text = (inspect.getdoc(section) or "").partition("Attributes:\n")[0]
    return _for_toml(text.strip())


def _attributes(section: type[Any]) -> dict[str, str]:
    _, _, listed = (inspect.getdoc(section) or "").partition("Attributes:\n")
    return {
        name: _for_toml(" ".join(text.split())).removesuffix(".")
        for name, text in _ATTRIBUTE.findall(listed)
    }


def _for_toml(text: str) -> str:
    """TOML has no None: a key that is None is one that is not there."""
    return text.replace("None", "unset")


def _value(hint: Any) -> str:
    if hint == Mapping[str, GroupSection]:
        return "sections"
    kind = hint
    if isinstance(hint, UnionType):
        kind = next(each for each in get_args(hint) if each is not NoneType)
    if kind in _LISTS:
        return _LISTS[kind]
    return "text" if issubclass(kind, StrEnum) else _TYPES[kind]


def _default(entry: Field[Any]) -> str:
    if entry.default_factory is not MISSING:
        return "none"
    if entry.default is MISSING:
        return "required"
    if entry.default is None:
        return "unset"
    if isinstance(entry.default, bool):
        return f"`{str(entry.default).lower()}`"
    if isinstance(entry.default, tuple):
        return f"`{json.dumps(entry.default)}`"
    return f'`"{entry.default}"`' if isinstance(entry.default, str) else f"`{entry.default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
