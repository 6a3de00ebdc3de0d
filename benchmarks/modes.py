"""The ways to compute, the default one first.

Compilation is an option of server and client and off by default. The first compilation on a machine
takes minutes, so only full runs measure it.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.bench import FP32, INT8, Mode
from benchmarks.settings import Scale


def _compiled(mode: Mode) -> Mode:
    return replace(
        mode,
        name=f"{mode.name} compiled",
        settings=("model.compile=true",),
        options=(("compile", True),),
    )


FP32_COMPILED = _compiled(FP32)
INT8_COMPILED = _compiled(INT8)


def fp32_modes(scale: Scale) -> tuple[Mode, ...]:
    """fp32, as fedsea computes by default, then compiled."""
    return (FP32,) if scale.quick else (FP32, FP32_COMPILED)


def int8_modes(scale: Scale) -> tuple[Mode, ...]:
    """The same with int8 weights."""
    return (INT8,) if scale.quick else (INT8, INT8_COMPILED)
