"""A Hugging Face checkpoint on disk: its configuration, its tensors by name, its fingerprint.

Only safetensors files are read. Opening reads headers alone, tensors are memory-mapped, and a
fingerprint reads a few hundred bytes of each tensor.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from fedsea.errors import CheckpointError, PartitionError, UnsupportedModel
from fedsea.model.partition import Partition, Span
from fedsea.model.tensor_files import TensorInfo, corrupt, open_file, read_header, sample
from fedsea.model.tensor_maps import TensorMaps

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BUNDLE_FILE = "fedsea.json"
BUNDLE_FORMAT = 1
PARTS = ("client", "trunk")
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
# Copies in other formats, in folders or under the original's names.
HUB_IGNORED = ["*/*", "consolidated*"]

_SAMPLE_RUNS = 4
_SAMPLE_BYTES = 256
# Names, versions and the loader's settings: they do not change what the weights compute.
_UNUSED_CONFIG_KEYS = frozenset(
    {
        "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "use_cache",
        "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id",
    }
)  # fmt: skip
_BLOCK = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class BundleInfo:
    """Content of ``fedsea.json``: which part of which checkpoint a bundle holds.

    `digests` has one entry for each block and each tensor outside the blocks of the whole
    checkpoint, so that a bundle has the fingerprint of the checkpoint that it was cut from.
    """

    part: str
    partition: Partition
    source: str
    digests: Mapping[str, str]

    def __str__(self) -> str:
        return (
            f"the {self.part} bundle for bottom={self.partition.bottom}, top={self.partition.top}"
        )


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files were found and whose headers were read.

    `bundle` is set when the folder holds only some parts of a checkpoint.
    """

    folder: Path
    name: str
    config: PretrainedConfig
    tensors: Mapping[str, TensorInfo]
    bundle: BundleInfo | None = None

    @classmethod
    def open(cls, model: str | Path, revision: str | None = None) -> Checkpoint:
        """Open a local folder or a hub id.

        Raises:
            CheckpointError: nothing there, or files that cannot be read.
            UnsupportedModel: a model type without decoder blocks, or one not known.
        """
        folder = _find_folder(str(model), revision)
        config = _read_config(folder)
        bundle = _read_bundle(folder / BUNDLE_FILE)
        return cls(
            folder=folder,
            name=bundle.source if bundle else folder_name(str(model)),
            config=config,
            tensors=_read_tensors(folder),
            bundle=bundle,
        )

    @property
    def num_blocks(self) -> int:
        """Decoder blocks of the whole model."""
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width of a hidden row."""
        return int(self.config.hidden_size)

    @property
    def contents(self) -> str:
        """What the folder holds, for messages."""
        return f"{self.name} is {self.bundle}" if self.bundle else f"{self.name} is not complete"

    def block_tensors(self, span: Span) -> dict[str, TensorInfo]:
        """Tensors of the blocks of a span.

        Raises:
            CheckpointError: a block has none.
        """
        blocks = set(range(span.first, span.end))
        found = {name: info for name, info in self.tensors.items() if block_of(name) in blocks}
        absent = blocks - {block_of(name) for name in found}
        if absent:
            raise CheckpointError(f"there is no block {min(absent)}: {self.contents}; use another")
        return found

    def outer_tensors(self) -> dict[str, TensorInfo]:
        """Tensors outside the blocks: embedding, final norm, head."""
        return {name: info for name, info in self.tensors.items() if block_of(name) is None}

    def tensor(self, name: str) -> Tensor:
        """Memory-mapped tensor.

        Raises:
            CheckpointError: there is no such tensor, or its file is corrupt.
        """
        return self.map([name]).tensors[name]

    def map(self, names: Iterable[str]) -> TensorMaps:
        """Memory-map some tensors.

        Raises:
            CheckpointError: there is no such tensor, or its file is corrupt.
        """
        infos = {}
        for name in names:
            if name not in self.tensors:
                raise CheckpointError(f"there is no {name}: {self.contents}; use one that has it")
            infos[name] = self.tensors[name]
        return TensorMaps(infos)

    def fingerprint(self) -> str:
        """Hex digest of the configuration and of samples of every tensor.

        The same for one file, shards, and the bundles of a split. Weights that differ nearly
        everywhere, as any two trained models do, differ in the samples.

        Raises:
            CheckpointError: a file is corrupt.
        """
        digest = hashlib.sha256()
        content = _used_config(_read_json(self.folder / CONFIG_FILE))
        digest.update(json.dumps(content, sort_keys=True).encode())
        digest.update(json.dumps(sorted(self.digests().items())).encode())
        return digest.hexdigest()

    def digests(self) -> dict[str, str]:
        """Hex digest of each block and of each tensor outside the blocks.

        What a bundle lacks is taken from its record; what it holds is read.

        Raises:
            CheckpointError: a file is corrupt.
        """
        hashes: dict[str, Any] = {}
        for file, names in sorted(self._names_by_file().items()):
            with open_file(file) as opened:
                for name in names:
                    info = self.tensors[name]
                    digest = hashlib.sha256(f"{name} {info.dtype} {info.shape}".encode())
                    digest.update(sample(opened, info, _SAMPLE_RUNS, _SAMPLE_BYTES))
                    hashes[name] = digest.digest()
        groups: dict[str, Any] = {}
        for name in sorted(hashes):
            groups.setdefault(_group(name), hashlib.sha256()).update(hashes[name])
        recorded = self.bundle.digests if self.bundle else {}
        return {**recorded, **{group: digest.hexdigest() for group, digest in groups.items()}}

    def _names_by_file(self) -> dict[Path, list[str]]:
        names: dict[Path, list[str]] = {}
        for name, info in self.tensors.items():
            names.setdefault(info.file, []).append(name)
        return names


def block_of(tensor: str) -> int | None:
    """Number of the block that a tensor belongs to; None outside the blocks."""
    match = _BLOCK.match(tensor)
    return int(match.group(1)) if match else None


def folder_name(model: str) -> str:
    """Last part of a path or a hub id."""
    return Path(model).expanduser().resolve().name or "model"


def _group(tensor: str) -> str:
    block = block_of(tensor)
    return tensor if block is None else f"block {block}"


def _find_folder(model: str, revision: str | None) -> Path:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{model} is a file; give the folder that holds {CONFIG_FILE}")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"there is no folder {model}; check the path")
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=HUB_PATTERNS,
                ignore_patterns=HUB_IGNORED,
            )
        )
    except HFValidationError as error:
        raise CheckpointError(
            f"{model} is neither a folder nor a hub id; give a path or owner/name"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model} is no local folder and could not be fetched from the hub; "
            "check the name, your access and the network"
        ) from error


def _read_config(folder: Path) -> PretrainedConfig:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}; give the folder of a checkpoint")
    model_type = _read_json(path).get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UnsupportedModel(
            f"transformers {transformers.__version__} does not know the model type '{model_type}' "
            f"in {path}; update transformers or choose another model"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text: PretrainedConfig = config.get_text_config(decoder=True)
    except (StrictDataclassError, ValueError, TypeError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a configuration of a '{model_type}' model; fetch the file again"
        ) from error
    _check_sizes(path, text)
    return text


def _check_sizes(path: Path, config: PretrainedConfig) -> None:
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        value = getattr(config, key, None)
        if not isinstance(value, int):
            raise UnsupportedModel(
                f"models of type '{config.model_type}' have no {key}; only decoders can be cut"
            )
        if value <= 0:
            raise CheckpointError(f"{path} says {key}={value}; fetch the file again")


def _read_bundle(path: Path) -> BundleInfo | None:
    if not path.exists():
        return None
    content = _read_json(path)
    if content.get("format") != BUNDLE_FORMAT:
        raise CheckpointError(
            f"{path} has format {content.get('format')!r} and {BUNDLE_FORMAT} is understood; "
            "split the checkpoint again with this version of fedsea"
        )
    try:
        return _parse_bundle(content)
    except (PartitionError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not complete; split the checkpoint again") from error


def _parse_bundle(content: Mapping[str, Any]) -> BundleInfo:
    part, source, digests = content["part"], content["source"], content["digests"]
    bottom, top = content["partition"]["bottom"], content["partition"]["top"]
    if part not in PARTS or not isinstance(source, str) or not isinstance(digests, dict):
        raise ValueError("wrong type of part, source or digests")
    if type(bottom) is not int or type(top) is not int:
        raise TypeError("bottom and top are integers")
    return BundleInfo(part, Partition(bottom, top), source, digests)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON; fetch the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; fetch the file again")
    return content


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    indexed = _read_index(folder / INDEX_FILE)
    files = sorted(set(indexed.values())) if indexed else [SINGLE_FILE]
    tensors: dict[str, TensorInfo] = {}
    for name in files:
        if not (folder / name).is_file():
            raise _missing_file(folder, name)
        tensors.update(read_header(folder / name))
    absent = next((name for name in indexed if name not in tensors), None)
    if absent is not None:
        raise CheckpointError(
            f"{folder / indexed[absent]} lacks the tensor {absent} that the index promises; "
            "fetch the checkpoint again"
        )
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """File of each tensor in a sharded checkpoint; empty when there is no index."""
    if not path.exists():
        return {}
    index = _read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise corrupt(path, "it has no weight_map")
    for file in index.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise corrupt(path, "its weight_map names something else than files beside it")
    return index


def _missing_file(folder: Path, name: str) -> CheckpointError:
    present = {path.suffix for path in folder.iterdir()}
    if name == SINGLE_FILE and present & {".bin", ".pt", ".pth"} and ".safetensors" not in present:
        return CheckpointError(
            f"{folder} holds pickled weights, which fedsea never reads; convert them with "
            "transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    return CheckpointError(f"{folder / name} is missing; fetch the checkpoint again as safetensors")


def _used_config(content: Any) -> Any:
    """Configuration without what does not matter; a null says the same as an absent key."""
    if not isinstance(content, dict):
        return content
    return {
        key: _used_config(value)
        for key, value in content.items()
        if key not in _UNUSED_CONFIG_KEYS and value is not None
    }
