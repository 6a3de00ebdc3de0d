"""Weight formats: which there are, and who makes them.

On the CPU int8 is our own (`model.linears`). Everything else is bitsandbytes, which transformers
calls while it loads a span. A checkpoint that is stored quantized needs no format of ours: its own
`quantization_config` says what transformers does.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig

from fedsea.errors import ConfigError

FORMATS = ("none", "int8", "nf4")


def is_own(quantization: str, device: torch.device) -> bool:
    """Whether `model.linears` makes the format."""
    return quantization == "int8" and device.type == "cpu"


def library_config(
    quantization: str, device: torch.device, dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """What transformers is asked for; None when the format is our own or there is none.

    Outliers are not computed apart (threshold 0): which columns hold them would depend on the rows
    of all tenants in a step, and so would everyone's result.

    Raises:
        ConfigError: the format is unknown, does not exist for the device, or bitsandbytes is not
            installed.
    """
    if quantization not in FORMATS:
        raise ConfigError(f"quantization {quantization!r} is not known; use {', '.join(FORMATS)}")
    if quantization == "none" or is_own(quantization, device):
        return None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"quantization {quantization} is for cpu and cuda; use none on {device.type}"
        )
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization {quantization} on {device.type} needs bitsandbytes; "
            "install fedsea with the extra `quantization`, or use none"
        )
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=[],
        )
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=[])
