"""A Hugging Face checkpoint on disk: its configuration, its tensors by name, its fingerprint.

Only safetensors files are read. Tensors are memory-mapped: naming one costs nothing until its
bytes are used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from fedsea.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BUNDLE_FILE = "fedsea.json"
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]

_SAMPLES = 4
_SAMPLE_ELEMENTS = 64
# What says how the weights are used; names, paths and library versions do not belong to it.
_UNUSED_CONFIG_KEYS = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache"}
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Header entry of one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files were found and whose headers were read.

    `bundle` is the content of ``fedsea.json`` when the folder holds only some spans.
    """

    folder: Path
    name: str
    config: PretrainedConfig
    tensors: Mapping[str, TensorInfo]
    bundle: Mapping[str, Any] | None = None

    @classmethod
    def open(cls, model: str | Path, revision: str | None = None) -> Checkpoint:
        """Open a local folder or a hub id.

        Raises:
            CheckpointError: nothing there, or files that cannot be read.
        """
        folder = _find_folder(str(model), revision)
        config = _read_config(folder)
        return cls(
            folder=folder,
            name=str(model).rstrip("/").rsplit("/", 1)[-1] or "model",
            config=config,
            tensors=_read_headers(folder),
            bundle=_read_json(folder / BUNDLE_FILE) if (folder / BUNDLE_FILE).exists() else None,
        )

    @property
    def num_blocks(self) -> int:
        """Decoder blocks of the whole model."""
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width of a hidden row."""
        return int(self.config.hidden_size)

    def tensor(self, name: str) -> Tensor:
        """Memory-mapped tensor.

        Raises:
            CheckpointError: there is no such tensor, or its file is corrupt.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.name} has no tensor {name}; this bundle holds other parts, "
                "or the files are not complete"
            )
        try:
            with safe_open(info.file, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _corrupt(info.file, error) from error
        return tensor

    def fingerprint(self) -> str:
        """Hex digest of the configuration and of samples of every tensor.

        The same for one file, shards, and the bundles of a split. Weights that differ nearly
        everywhere, as any two trained models do, differ in the samples.

        Raises:
            CheckpointError: a file is corrupt.
        """
        if self.bundle is not None:
            return str(self.bundle["fingerprint"])
        digest = hashlib.sha256()
        digest.update(json.dumps(_used_config(self.config), sort_keys=True, default=str).encode())
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(f"{name} {info.dtype} {info.shape}".encode())
            digest.update(_sample(self.tensor(name)))
        return digest.hexdigest()


def _find_folder(model: str, revision: str | None) -> Path:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{model} is a file; give the folder that holds config.json")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"there is no folder {model}; check the path")
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_PATTERNS))
    except HFValidationError as error:
        raise CheckpointError(
            f"{model} is neither a folder nor a hub id such as owner/name"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model} is no local folder and could not be fetched from the hub; "
            "check the name, your access and the network"
        ) from error


def _read_config(folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json; give the folder of a checkpoint")
    _read_json(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"transformers does not know the model type in {folder}/config.json; "
            "update transformers or choose another model"
        ) from error
    return _text_config(config)


def _text_config(config: PretrainedConfig) -> PretrainedConfig:
    text: PretrainedConfig = config.get_text_config(decoder=True)
    return text


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON; fetch the file again") from error
    return content


def _read_headers(folder: Path) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for file in _tensor_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    entry = opened.get_slice(name)
                    found[name] = TensorInfo(file, entry.get_dtype(), tuple(entry.get_shape()))
        except (SafetensorError, OSError) as error:
            raise _corrupt(file, error) from error
    return found


def _tensor_files(folder: Path) -> list[Path]:
    if (folder / INDEX_FILE).exists():
        index = _read_json(folder / INDEX_FILE).get("weight_map", {})
        files = sorted({folder / str(file) for file in index.values()})
    else:
        files = [folder / SINGLE_FILE]
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{file} is missing; fetch the checkpoint again as safetensors")
    return files


def _corrupt(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} is corrupt ({type(error).__name__}); fetch the file again")


def _used_config(config: PretrainedConfig) -> dict[str, Any]:
    values = config.to_diff_dict()
    return {key: value for key, value in values.items() if key not in _UNUSED_CONFIG_KEYS}


def _sample(tensor: Tensor) -> bytes:
    """A few runs of elements spread over the tensor."""
    flat = tensor.reshape(-1)
    if flat.numel() <= _SAMPLES * _SAMPLE_ELEMENTS:
        runs = [flat]
    else:
        step = (flat.numel() - _SAMPLE_ELEMENTS) // (_SAMPLES - 1)
        runs = [flat[i * step : i * step + _SAMPLE_ELEMENTS] for i in range(_SAMPLES)]
    return b"".join(run.contiguous().view(torch.uint8).numpy().tobytes() for run in runs)
