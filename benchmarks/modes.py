"""The ways to compute in fp32 that this version of fedsea has, the default first."""

from __future__ import annotations

from dataclasses import fields

from benchmarks.bench import FP32, Mode
from fedsea.server.config import ModelSection

COMPILED = Mode(
    name="fp32 compiled", settings=("model.compile=true",), options=(("compile", True),)
)
EAGER = FP32


def fp32_modes() -> tuple[Mode, ...]:
    """The default mode first, then the others."""
    has_compilation = any(entry.name == "compile" for entry in fields(ModelSection))
    return (EAGER, COMPILED) if has_compilation else (EAGER,)
