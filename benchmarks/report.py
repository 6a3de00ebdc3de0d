"""What comes out: a table for people, a JSON and a Markdown file, and one line for programs."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Row, Verdict

KEYS = (
    "decode_512x8", "decode_1024x12", "int8_1024x12", "clients4", "clients16", "trunk16",
    "trunk16_bf16", "ttft_512x8", "split_ms", "naive_speedup", "prefill_stall",
    "mechanism_1024x12", "training_step_1024x12",
)  # fmt: skip
_PACKAGES = ("fedsea", "torch", "transformers", "grpcio", "protobuf", "tokenizers")
_VARIABLES = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")
_STYLES = {Verdict.MET: "green", Verdict.MISSED: "red", Verdict.NONE: ""}


@dataclass(frozen=True, slots=True)
class Circumstances:
    """Where, when, with what, and how busy the machine was.

    Attributes:
        load_before: load average of the last minute when the run began; `load_after` at its end.
        others: cores that other processes used during the run, on average. Far above zero, the
            run says little.
    """

    date: str
    commit: str
    command: str
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    environment: Mapping[str, str]
    load_before: float
    load_after: float
    others: float
    seconds: float


class Clock:
    """What was spent since it was made: seconds, and cores by processes that are not ours."""

    def __init__(self) -> None:
        self.load = os.getloadavg()[0]
        self._began, self._all, self._own = time.monotonic(), _all_seconds(), _own_seconds()

    def seconds(self) -> float:
        """Of the wall clock."""
        return time.monotonic() - self._began

    def others(self) -> float:
        """Cores used by others on average; our child processes count once they have ended."""
        theirs = (_all_seconds() - self._all) - (_own_seconds() - self._own)
        return max(0.0, theirs / self.seconds())


def summary(rows: Sequence[Row]) -> dict[str, float | None]:
    """The medians of the keyed rows, under exactly `KEYS`; None for what was not measured.

    Raises:
        ValueError: a key is unknown or given twice.
    """
    found: dict[str, float | None] = dict.fromkeys(KEYS)
    for row in rows:
        if row.key is None:
            continue
        if row.key not in found or found[row.key] is not None:
            raise ValueError(f"the key {row.key} is unknown or given twice")
        found[row.key] = round(row.spread.median, 3)
    return found


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the table."""
    table = Table(title="fedsea beside transformers", title_justify="left")
    table.add_column("measured", overflow="fold", ratio=3)
    for name in ("median", "least", "greatest", "target"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    table.add_column("note", overflow="fold", ratio=2, style="dim")
    case = None
    for row in rows:
        if case not in (None, row.case):
            table.add_section()
        case = row.case
        table.add_row(
            row.name,
            *(format_value(value, row.unit) for value in _values(row)),
            str(row.target or ""),
            f"[{_STYLES[row.verdict]}]{row.verdict.value}[/]" if row.target else "",
            row.note,
        )
    console.print(table)


def as_json(rows: Sequence[Row], about: Circumstances) -> dict[str, Any]:
    """Everything as plain values."""
    return {
        **asdict(about),
        "summary": summary(rows),
        "rows": [
            {
                "case": row.case,
                "name": row.name,
                "unit": row.unit,
                **asdict(row.spread),
                "target": str(row.target) if row.target else None,
                "verdict": row.verdict.value or None,
                "key": row.key,
                "note": row.note,
            }
            for row in rows
        ],
    }


def as_markdown(rows: Sequence[Row], about: Circumstances) -> str:
    """The same as a page."""
    hardware = ", ".join(f"{name} {value}" for name, value in about.hardware.items())
    versions = ", ".join(f"{name} {value}" for name, value in about.versions.items())
    settings = ", ".join(f"{name}={value}" for name, value in about.environment.items())
    lines = [
        f"# Measured on {about.date}",
        "",
        f"- command: `{about.command}`, {about.seconds:.0f} s, commit {about.commit}",
        f"- hardware: {hardware}",
        f"- versions: {versions}",
        f"- environment of all processes: {settings}",
        f"- load average before {about.load_before:.2f}, after {about.load_after:.2f}; "
        f"other processes used {about.others:.2f} cores",
        "",
        "| measured | median | least to greatest | target | | note |",
        "|---|---:|---:|---:|---|---|",
    ]
    for row in rows:
        median, low, high = (format_value(value, row.unit) for value in _values(row))
        spread = f"{low} to {high}" if row.spread.count > 1 else ""
        target = str(row.target or "")
        lines.append(
            f"| {row.case}: {row.name} | {median} | {spread} | {target} | "
            f"{row.verdict.value} | {row.note} |"
        )
    return "\n".join(lines) + "\n"


def save(rows: Sequence[Row], about: Circumstances, folder: Path, suffix: str) -> list[Path]:
    """Write both files; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{about.date[:10]}-{slug(str(about.hardware['processor']))}{suffix}"
    written = [folder / f"{stem}.json", folder / f"{stem}.md"]
    written[0].write_text(json.dumps(as_json(rows, about), indent=1) + "\n", encoding="utf-8")
    written[1].write_text(as_markdown(rows, about), encoding="utf-8")
    return written


def circumstances(command: str, clock: Clock) -> Circumstances:
    """What is known about this machine and these packages."""
    return Circumstances(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=_commit(),
        command=command,
        hardware=_hardware(),
        versions={"python": platform.python_version(), **{n: version(n) for n in _PACKAGES}},
        environment={name: os.environ.get(name, "") for name in _VARIABLES},
        load_before=clock.load,
        load_after=os.getloadavg()[0],
        others=round(clock.others(), 2),
        seconds=clock.seconds(),
    )


def slug(text: str) -> str:
    """Lower-case words joined by hyphens, for a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"


def format_value(value: float, unit: str) -> str:
    """A number with its unit, as precise as is useful."""
    if unit == "x":
        return f"{value:.2f}x"
    digits = 0 if value >= 1000 or unit == "B" else 2 if unit in ("ms", "GB", "ppl") else 1
    return f"{value:,.{digits}f} {unit}"


def _values(row: Row) -> tuple[float, float, float]:
    return row.spread.median, row.spread.low, row.spread.high


def _all_seconds() -> float:
    """Processor seconds of all processes of this machine so far."""
    times = psutil.cpu_times()
    return float(sum(getattr(times, name, 0.0) for name in ("user", "nice", "system")))


def _own_seconds() -> float:
    """Processor seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _hardware() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^model name\s*: (.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
