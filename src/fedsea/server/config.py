"""A server's settings: one frozen dataclass per section of its TOML file, checked when read.

    [server]   address = "127.0.0.1:50051"   model = "path or hub id"   span = "1:7"
    [model]    dtype = "fp32"   quantization = "none"   device = "cpu"   threads = 2
    [kv]       rows = 65536   page_rows = 16   max_context = 4096
    [quotas]   sessions = 64   [quotas.tenants.acme]   rows_per_second = 2000.0

Paths in a file are relative to the file. `docs/reference` lists every key with its default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from fedsea.errors import ConfigError
from fedsea.settings import Table, from_tables, need, read_toml, section, table_at, with_model
from fedsea.wire.limits import LARGEST_MESSAGE

DTYPES = ("fp32", "bf16", "fp16")
QUANTIZATIONS = ("none", "int8", "nf4")
DEVICES = ("cpu", "cuda", "mps")
MIN_ROWS = 16
EVERY_TENANT = "*"
"""Stands for all tenants where it is said who may use something; no tenant has this name."""
STRATEGIES = ("sequential", "client-batch", "server-hierarchical")
LOG_FORMATS = ("console", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_BYTES = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]i?)?B?")
_FACTORS = {None: 1} | {
    prefix + binary: (1024 if binary else 1000) ** power
    for power, prefix in enumerate("KMGT", start=1)
    for binary in ("", "i")
}

_S = TypeVar("_S")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSection:
    """What is served where.

    Attributes:
        model: folder of a checkpoint, or a hub id.
        address: host:port to listen on; port 0 takes a free one.
        span: blocks FIRST:END, the widest that a session may ask for; None for all.
        max_sessions: sessions of all tenants together.
        idle_timeout_s: a session without messages for so long ends; 0 for never.
        open_timeout_s: how long a new stream may take to send its first message.
        drain_grace_s: how long running sessions may go on after the signal to stop.
    """

    model: str
    address: str = "127.0.0.1:50051"
    span: str | None = None
    max_sessions: int = 256
    idle_timeout_s: float = 600.0
    open_timeout_s: float = 10.0
    drain_grace_s: float = 30.0

    def __post_init__(self) -> None:
        need(bool(self.model), "server.model is empty; give the folder of a checkpoint")
        _at_least(1, "server", self, "max_sessions")
        _at_least(0, "server", self, "idle_timeout_s", "drain_grace_s")
        need(self.open_timeout_s > 0, "server.open_timeout_s must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSection:
    """How the blocks are kept and computed; `threads` of 0 leaves torch's own number.

    `projections` are files whose decoders widen narrow rows before the first block.
    `compile` lets torch compile the decoding step before the server is ready, which takes a C++
    compiler and up to a few minutes.
    """

    dtype: str = "fp32"
    quantization: str = "none"
    device: str = "cpu"
    threads: int = 0
    compile: bool = False
    projections: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        _one_of(DTYPES, "model.dtype", self.dtype)
        _one_of(QUANTIZATIONS, "model.quantization", self.quantization)
        _one_of(DEVICES, "model.device", self.device.partition(":")[0])
        _at_least(0, "model", self, "threads")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSection:
    """Size of the KV pool, all of it taken at the start.

    Attributes:
        rows: rows of one token each, over all sessions; None to derive it from `memory`.
        memory: memory for the pool, as in "4GiB"; None for half of what is free.
        page_rows: rows in a page; every sequence takes whole pages.
        max_context: most rows of one sequence; None for what the model was trained for.
    """

    rows: int | None = None
    memory: str | None = None
    page_rows: int = 16
    max_context: int | None = None

    def __post_init__(self) -> None:
        need(
            self.rows is None or self.memory is None,
            "kv.rows and kv.memory are both given; give one of them",
        )
        if self.memory is not None:
            parse_bytes("kv.memory", self.memory)
        for name in ("rows", "max_context"):
            if getattr(self, name) is not None:
                _at_least(MIN_ROWS, "kv", self, name)
        _at_least(1, "kv", self, "page_rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSection:
    """How a step is filled.

    Attributes:
        max_step_rows: most rows in one step; bounds the memory of activations.
        small_append_rows: an Append of at most so many rows is decoding and goes first.
        stall_factor: while others decode, prompts may make a step this much longer than without.
        min_prefill_rows: rows of prompts in every step all the same, so that they advance.
        gather_factor: how long a step may wait for rows that are about to come and can share it,
            as a part of the step's own time; 0 to wait for nobody.
    """

    max_step_rows: int = 512
    small_append_rows: int = 16
    stall_factor: float = 1.7
    min_prefill_rows: int = 4
    gather_factor: float = 0.5

    def __post_init__(self) -> None:
        _at_least(1, "scheduler", self, "small_append_rows", "min_prefill_rows", "stall_factor")
        _at_least(0, "scheduler", self, "gather_factor")
        need(
            self.max_step_rows >= max(self.small_append_rows, self.min_prefill_rows),
            "scheduler.max_step_rows is below small_append_rows or min_prefill_rows; raise it",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaSection:
    """What one tenant may take; None for no limit of its own.

    Attributes:
        sessions: open at the same time.
        kv_rows: KV rows reserved by all of its sessions, in whole pages.
        rows_per_second: rows computed, averaged over time; more of them wait.
    """

    sessions: int | None = None
    kv_rows: int | None = None
    rows_per_second: float | None = None

    def __post_init__(self) -> None:
        for name in ("sessions", "kv_rows", "rows_per_second"):
            value = getattr(self, name)
            need(value is None or value > 0, f"quotas.{name} is {value}; give a positive number")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotasSection:
    """The quota of every tenant, and those of tenants named in `tenants`."""

    default: QuotaSection = field(default_factory=QuotaSection)
    tenants: Mapping[str, QuotaSection] = field(default_factory=dict)

    def of(self, tenant: str) -> QuotaSection:
        """The quota of one tenant."""
        return self.tenants.get(tenant, self.default)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecuritySection:
    """TLS files and the token file; `plaintext` does without TLS, on loopback only."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    tokens: Path | None = None
    plaintext: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("ca", "certificate", "key") if getattr(self, name) is not None]
        if self.plaintext:
            need(not given, "security.plaintext is set beside certificates; remove one of them")
        elif given:
            need(
                len(given) == 3,
                f"security names only {', '.join(given)}; give ca, certificate and key",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestationSection:
    """How clients that ask for it get proof of what this server runs.

    Attributes:
        command: a program and its arguments, run without a shell for each request. It gets two more
            arguments, a nonce and the SHA-256 of this server's TLS key, both in hex, and prints a
            signed token (a JWT) that holds both. Empty for no proof.
        timeout_s: how long the command may take.
        requests_per_second: of one tenant, averaged over a second; more are refused for now.
        key_sha256: names another TLS key, where a proxy within the same measured machine ends TLS;
            None for the key of `security.certificate`.
    """

    command: tuple[str, ...] = ()
    timeout_s: float = 30.0
    requests_per_second: float = 2.0
    key_sha256: str | None = None

    def __post_init__(self) -> None:
        need(
            not self.command or bool(self.command[0]),
            "attestation.command names no program; give its path first",
        )
        for name in ("timeout_s", "requests_per_second"):
            value = getattr(self, name)
            need(value > 0, f"attestation.{name} is {value}; give a positive number")
        need(
            self.key_sha256 is None or _SHA256.fullmatch(self.key_sha256) is not None,
            "attestation.key_sha256 is no SHA-256; write 64 lower-case hex digits",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSection:
    """A LoRA adapter that sessions name in place of NAME.

    Attributes:
        folder: where it is, in PEFT's format.
        tenants: who may name it; for all others it does not exist.
    """

    folder: Path
    tenants: tuple[str, ...]

    def __post_init__(self) -> None:
        need(bool(self.tenants), "an adapter without tenants is used by nobody; name some")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptersSection:
    """All adapters by name."""

    named: Mapping[str, AdapterSection] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSection:
    """A soft prompt that sessions name in place of NAME.

    Attributes:
        folder: where it is, in PEFT's format.
        tenants: who may name it; `["*"]` for everybody, and for all others it does not exist.
    """

    folder: Path
    tenants: tuple[str, ...]

    def __post_init__(self) -> None:
        need(bool(self.tenants), "a soft prompt without tenants is used by nobody; name some")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsSection:
    """All soft prompts by name."""

    named: Mapping[str, PromptSection] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSection:
    """Tenants that train together, in place of NAME.

    Attributes:
        strategy: how: `sequential`, `client-batch` or `server-hierarchical`.
        tenants: the members; for all others the group does not exist.
        deadline_s: how long members wait for one another; then they go on without the late ones.
        average_every: of `server-hierarchical`: the copies become their mean at every such step.
        weigh: of `server-hierarchical`: copies count by the weight that each member claims, which
            nothing proves; otherwise all the same.
        gather_s: of `client-batch`: how long a Forward waits for those of others to join it.
        min_members: of `client-batch`: the first step waits until so many members have come.
        seed: of the first values of what is trained, and of dropout; the members' own are not used.
    """

    strategy: str
    tenants: tuple[str, ...]
    deadline_s: float = 60.0
    average_every: int = 1
    weigh: bool = True
    gather_s: float = 0.05
    min_members: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of(STRATEGIES, "training.groups.NAME.strategy", self.strategy)
        need(bool(self.tenants), "a group without tenants is used by nobody; name some")
        _at_least(1, "training.groups.NAME", self, "average_every", "min_members")
        _at_least(0, "training.groups.NAME", self, "gather_s", "seed")
        need(self.deadline_s > 0, "training.groups.NAME.deadline_s must be positive")
        need(
            self.min_members <= len(self.tenants),
            "training.groups.NAME.min_members is above the number of tenants; lower it",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSection:
    """Training of adapters in the trunk; without a `folder` nothing is trained.

    Attributes:
        folder: where saved steps are kept, by tenant and name; of one server at a time.
        workers: trainings that are computed at the same time, beside the engine and behind it.
        threads: CPU threads of each worker; 0 for torch's own number.
        kept_rows: rows of one tenant whose activations are kept between Forward and Backward; for
            rows beyond it only their input is, and the Backward computes the forward again.
        pending_rows: rows of one tenant that wait for their Backward in all; more are refused.
        max_adapters: trainings of one tenant, in memory or saved.
        max_rank: greatest rank of an adapter.
        max_prompt_rows: most rows of a soft prompt.
        keep: so many of the last saved steps of a training stay.
        grace_s: how long a training stays in memory at its last step after its session has ended.
        groups: by name, who trains together; see below.
    """

    folder: Path | None = None
    workers: int = 1
    threads: int = 0
    kept_rows: int = 4096
    pending_rows: int = 65536
    max_adapters: int = 8
    max_rank: int = 64
    max_prompt_rows: int = 256
    keep: int = 2
    grace_s: float = 600.0
    groups: Mapping[str, GroupSection] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least(1, "training", self, "workers", "pending_rows", "max_adapters", "max_rank")
        _at_least(1, "training", self, "keep")
        _at_least(0, "training", self, "threads", "kept_rows", "max_prompt_rows", "grace_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsSection:
    """Caps on what one message and one session may hold; see `fedsea.wire.limits`.

    Unless `max_message_bytes` says else, a message has at most 8 MiB, or, where training is served,
    what a sequence of the longest context takes in fp32; never more than 256 MiB.
    """

    max_message_bytes: int | None = None
    max_rows_per_message: int = 8192
    max_segments: int = 256
    max_sequences: int = 256
    max_pending: int = 8
    max_forwards: int = 64

    def __post_init__(self) -> None:
        names = [entry.name for entry in fields(self) if getattr(self, entry.name) is not None]
        _at_least(1, "limits", self, *names)
        need(
            (self.max_message_bytes or 1) <= LARGEST_MESSAGE,
            f"limits.max_message_bytes is {self.max_message_bytes}; give at most {LARGEST_MESSAGE}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSection:
    """Where Prometheus reads the metrics: a loopback host:port; None for nowhere."""

    address: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSection:
    """How the log is written to standard error."""

    format: str = "console"
    level: str = "info"

    def __post_init__(self) -> None:
        _one_of(LOG_FORMATS, "log.format", self.format)
        _one_of(LOG_LEVELS, "log.level", self.level)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """All settings of a server."""

    server: ServerSection
    model: ModelSection = field(default_factory=ModelSection)
    kv: KVSection = field(default_factory=KVSection)
    scheduler: SchedulerSection = field(default_factory=SchedulerSection)
    quotas: QuotasSection = field(default_factory=QuotasSection)
    security: SecuritySection = field(default_factory=SecuritySection)
    attestation: AttestationSection = field(default_factory=AttestationSection)
    adapters: AdaptersSection = field(default_factory=AdaptersSection)
    prompts: PromptsSection = field(default_factory=PromptsSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    limits: LimitsSection = field(default_factory=LimitsSection)
    metrics: MetricsSection = field(default_factory=MetricsSection)
    log: LogSection = field(default_factory=LogSection)

    @classmethod
    def load(
        cls, path: str | Path, overrides: Mapping[str, Mapping[str, Any]] | None = None
    ) -> ServerConfig:
        """Read a TOML file; `overrides` replaces single keys of its sections.

        Raises:
            ConfigError: the file cannot be read, or a key or value in it cannot be used.
        """
        path = Path(path)
        return cls.from_table(read_toml(path), overrides, base=path.parent)

    @classmethod
    def from_table(
        cls,
        table: Table,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        base: Path | None = None,
    ) -> ServerConfig:
        """Settings out of nested tables, as in a TOML file; paths are relative to `base`.

        Overrides are not: they come from a command line, where paths are relative to its folder.

        Raises:
            ConfigError: a key or value cannot be used.
        """
        return from_tables(cls, table, base, overrides, _read)


def parse_bytes(key: str, text: str) -> int:
    """Bytes of a size such as "512MiB" or "4GB"; raises ConfigError naming `key`."""
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{key} is {text!r}; write a size such as 512MiB or 4GB")
    return int(float(match[1]) * _FACTORS[match[2]])


_NAMED: Mapping[Any, type[Any]] = {
    AdaptersSection: AdapterSection,
    PromptsSection: PromptSection,
}


def _read(
    kind: type[Any], name: str, table: Table, base: Path | None, overrides: Table | None
) -> Any:
    """One section, those with tables inside them too."""
    if kind in _NAMED:
        return kind(named=_named(_NAMED[kind], name, table, base))
    if kind is QuotasSection:
        return _quotas({**table, **(overrides or {})})
    if kind is TrainingSection:
        groups = _named(
            GroupSection, "training.groups", table_at(table, "groups", "training.groups"), base
        )
        flat = {key: value for key, value in table.items() if key != "groups"}
        return replace(section(kind, name, flat, base, overrides), groups=groups)
    if kind is ServerSection:
        table = with_model(table, base)
    return section(kind, name, table, base, overrides)


def _quotas(table: Table) -> QuotasSection:
    tenants = table_at(table, "tenants", "quotas.tenants")
    default = {key: value for key, value in table.items() if key != "tenants"}
    return QuotasSection(
        default=section(QuotaSection, "quotas", default),
        tenants={
            name: section(
                QuotaSection, f"quotas.tenants.{name}", {**default, **table_at(tenants, name)}
            )
            for name in tenants
        },
    )


def _named(kind: type[_S], name: str, table: Table, base: Path | None) -> dict[str, _S]:
    """One `kind` for each name in a section."""
    return {
        key: section(kind, f"{name}.{key}", table_at(table, key, f"{name}.{key}"), base)
        for key in table
    }


def _at_least(least: int, section: str, owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        need(value >= least, f"{section}.{name} is {value}; give at least {least}")


def _one_of(choices: tuple[str, ...], key: str, value: str) -> None:
    need(value in choices, f"{key} is {value!r}; choose one of {', '.join(choices)}")
