"""Checkpoints open from every shape that they come in, and bad files are refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file, save_file
from tests.tiny_models import make_tiny, save_tiny

from fedsea.errors import CheckpointError, UnsupportedModel
from fedsea.model import checkpoint as checkpoint_module
from fedsea.model.checkpoint import Checkpoint, block_of

BLOCKS = 5


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny checkpoint that no test changes."""
    return save_tiny("llama", tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the tiny checkpoint that a test may break."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


@pytest.fixture
def sharded(tmp_path):
    """The same model in several files."""
    make_tiny("llama").save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    return tmp_path / "sharded"


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(kept))


def change_weights(folder: Path, name: str) -> None:
    """Train one tensor a little."""
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name] * 1.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file with the given parts, right or wrong."""
    size = len(header) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + header + data)


class TestOpening:
    """What can be opened, and what it tells."""

    def test_single_file(self, folder):
        """A folder with one file gives its sizes and names without reading weights."""
        checkpoint = Checkpoint.open(folder)
        assert (checkpoint.name, checkpoint.num_blocks, checkpoint.hidden_size) == ("tiny", 5, 48)
        assert checkpoint.tensors["model.embed_tokens.weight"].shape == (96, 48)
        assert checkpoint.bundle is None

    def test_shards_hold_the_same_tensors(self, folder, sharded):
        """A sharded checkpoint has the same names, shapes and values as a single file."""
        one, many = Checkpoint.open(folder), Checkpoint.open(sharded)
        assert len({info.file for info in many.tensors.values()}) > 1
        assert one.tensors.keys() == many.tensors.keys()
        for name in one.tensors:
            assert torch.equal(one.tensor(name), many.tensor(name))

    def test_path_as_text_and_relative(self, folder, monkeypatch):
        """Text, a relative path and a trailing slash open the same folder."""
        monkeypatch.chdir(folder)
        assert Checkpoint.open(".").name == "tiny"
        assert Checkpoint.open(f"{folder}/").name == "tiny"

    def test_hub_id_is_fetched_without_pickles(self, saved, monkeypatch):
        """A hub id is fetched: safetensors, configuration and tokenizer, nothing pickled."""
        asked: dict[str, Any] = {}

        def snapshot(repository, **options):
            asked.update(options, repository=repository)
            return str(saved)

        monkeypatch.setattr(checkpoint_module, "snapshot_download", snapshot)
        checkpoint = Checkpoint.open("owner/tiny-model", revision="main")
        assert checkpoint.name == "tiny-model"
        assert asked["repository"] == "owner/tiny-model"
        assert asked["revision"] == "main"
        assert not {"*.bin", "*.pt", "*"} & set(asked["allow_patterns"])

    @pytest.mark.parametrize(
        ("failure", "message"),
        [
            (HFValidationError("bad"), "neither a folder nor a hub id"),
            (LocalEntryNotFoundError("offline"), "could not be fetched"),
            (OfflineModeIsEnabled("offline"), "could not be fetched"),
            (ConnectionError("refused"), "could not be fetched"),
            (RepositoryNotFoundError, "could not be fetched"),
        ],
    )
    def test_hub_failures_say_what_to_check(self, monkeypatch, failure, message):
        """Each way in which the hub fails is one clear error."""
        if failure is RepositoryNotFoundError:
            failure = RepositoryNotFoundError.__new__(RepositoryNotFoundError)

        def snapshot(*_, **__):
            raise failure

        monkeypatch.setattr(checkpoint_module, "snapshot_download", snapshot)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open("owner/model")

    @pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "~/nothing-here", "a/b/c"])
    def test_missing_folder_is_never_looked_up_on_the_hub(self, monkeypatch, path):
        """What reads as a path is not sent to the hub."""
        monkeypatch.setattr(checkpoint_module, "snapshot_download", pytest.fail)
        with pytest.raises(CheckpointError, match="there is no folder"):
            Checkpoint.open(path)

    def test_file_instead_of_folder(self, folder):
        """The path of the weights file is answered with what to give instead."""
        with pytest.raises(CheckpointError, match="give the folder"):
            Checkpoint.open(folder / "model.safetensors")

    def test_block_numbers(self):
        """Names inside blocks give the block's number, others none."""
        assert block_of("model.layers.12.mlp.up_proj.weight") == 12
        assert block_of("model.norm.weight") is None
        assert block_of("other.model.layers.1.weight") is None


class TestConfiguration:
    """What is wrong with config.json is said."""

    def test_missing(self, folder):
        """No config.json: this is no checkpoint."""
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match="has no config"):
            Checkpoint.open(folder)

    @pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "[" * 100_000])
    def test_not_a_json_object(self, folder, text):
        """Text that is no JSON object is refused without a traceback of the parser."""
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="JSON"):
            Checkpoint.open(folder)

    @pytest.mark.parametrize("model_type", ["foo", 3, ["llama"], None])
    def test_unknown_model_type(self, folder, model_type):
        """A model type that transformers does not know is named."""
        edit_json(folder / "config.json", model_type=model_type)
        with pytest.raises(UnsupportedModel, match="does not know the model type"):
            Checkpoint.open(folder)

    def test_no_decoder(self, folder):
        """A model type without decoder blocks cannot be cut."""
        (folder / "config.json").write_text(json.dumps({"model_type": "resnet"}))
        with pytest.raises(UnsupportedModel, match="only decoders can be cut"):
            Checkpoint.open(folder)

    @pytest.mark.parametrize("changes", [{"hidden_size": "big"}, {"num_attention_heads": 7}])
    def test_impossible_values(self, folder, changes):
        """Values of the wrong type, or that contradict each other, name the file."""
        edit_json(folder / "config.json", **changes)
        with pytest.raises(CheckpointError, match="is not a configuration of a 'llama' model"):
            Checkpoint.open(folder)

    def test_no_blocks(self, folder):
        """A model of no blocks is refused."""
        edit_json(folder / "config.json", num_hidden_layers=0)
        with pytest.raises(CheckpointError, match="num_hidden_layers=0"):
            Checkpoint.open(folder)


class TestFiles:
    """What is wrong with the weights is said."""

    def test_missing(self, folder):
        """No weights at all."""
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
            Checkpoint.open(folder)

    def test_pickled_only(self, folder):
        """Pickled weights are never read; the error tells how to convert them."""
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="convert them"):
            Checkpoint.open(folder)

    def test_missing_shard(self, sharded):
        """A shard that the index names and nobody fetched."""
        shard = sorted(sharded.glob("*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
            Checkpoint.open(sharded)

    def test_tensor_missing_in_its_shard(self, sharded):
        """An index that promises a tensor which its file lacks."""
        index = json.loads((sharded / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.other.weight"] = next(iter(index["weight_map"].values()))
        (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"lacks the tensor model\.other\.weight"):
            Checkpoint.open(sharded)

    @pytest.mark.parametrize(
        "weight_map", [None, {}, [], {"a": 1}, {"a": "../secret.safetensors"}, {"a": "/etc/x"}]
    )
    def test_bad_index(self, sharded, weight_map):
        """An index without files, or with files elsewhere, is corrupt."""
        edit_json(sharded / "model.safetensors.index.json", weight_map=weight_map)
        with pytest.raises(CheckpointError, match=r"corrupt: it(s weight_map| has no weight_map)"):
            Checkpoint.open(sharded)

    @pytest.mark.parametrize("keep", [0, 5, 8, 200, -1])
    def test_truncated(self, folder, keep):
        """A download that broke off anywhere is noticed at opening."""
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match=r"corrupt: .*fetch the file again"):
            Checkpoint.open(folder)

    def test_longer_than_its_tensors(self, folder):
        """Bytes that belong to no tensor are refused, as the format demands."""
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes() + b"x")
        with pytest.raises(CheckpointError, match="1 bytes follow"):
            Checkpoint.open(folder)

    @pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
    def test_giant_header(self, folder, length):
        """A header length over the cap is refused before anything of that size is read."""
        write_raw(folder / "model.safetensors", b"{}", length=length)
        with pytest.raises(CheckpointError, match=f"claims {length} bytes"):
            Checkpoint.open(folder)

    @pytest.mark.parametrize("header", [b"", b"nonsense", b"\xff\xfe", b"[]", b"[" * 100_000])
    def test_header_is_no_json_object(self, folder, header):
        """A header that is no JSON object is corrupt."""
        write_raw(folder / "model.safetensors", header)
        with pytest.raises(CheckpointError, match="its header is not"):
            Checkpoint.open(folder)

    @pytest.mark.parametrize(
        "entry",
        [
            None,
            {},
            {"dtype": "F32", "shape": [1]},
            {"dtype": "F32", "shape": [1], "data_offsets": [0]},
            {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
            {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
            {"dtype": 32, "shape": [1], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        ],
    )
    def test_malformed_entry(self, folder, entry):
        """Every kind of wrong header entry is corrupt, never a crash."""
        write_raw(folder / "model.safetensors", json.dumps({"a": entry}).encode(), b"\0" * 4)
        with pytest.raises(CheckpointError, match="corrupt"):
            Checkpoint.open(folder)

    def test_unknown_dtype(self, folder):
        """A dtype that the format does not know is named."""
        entry = {"dtype": "X7", "shape": [1], "data_offsets": [0, 4]}
        write_raw(folder / "model.safetensors", json.dumps({"a": entry}).encode(), b"\0" * 4)
        with pytest.raises(CheckpointError, match="as X7"):
            Checkpoint.open(folder)

    def test_unreadable(self, folder):
        """A file that cannot be opened is an error about access."""
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(folder / "model.safetensors")
        with pytest.raises(CheckpointError):
            Checkpoint.open(folder)

    def test_unknown_tensor(self, folder):
        """Asking for a tensor that is not there names it."""
        with pytest.raises(CheckpointError, match=r"there is no model\.nothing"):
            Checkpoint.open(folder).tensor("model.nothing")

    def test_file_that_vanished(self, folder):
        """A file deleted after opening is an error of the checkpoint, in every reader."""
        checkpoint = Checkpoint.open(folder)
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError):
            checkpoint.tensor("model.norm.weight")
        with pytest.raises(CheckpointError):
            checkpoint.fingerprint()


class TestFingerprint:
    """The same model has the same fingerprint, another model has another."""

    def test_single_and_sharded_agree(self, folder, sharded):
        """How the tensors are spread over files does not matter."""
        assert Checkpoint.open(folder).fingerprint() == Checkpoint.open(sharded).fingerprint()

    @pytest.mark.parametrize(
        "name",
        [
            "model.embed_tokens.weight",
            "model.layers.3.self_attn.q_proj.weight",
            "model.norm.weight",
            "lm_head.weight",
        ],
    )
    def test_trained_tensor_changes_it(self, folder, name):
        """A change to any tensor is seen."""
        before = Checkpoint.open(folder).fingerprint()
        change_weights(folder, name)
        assert Checkpoint.open(folder).fingerprint() != before

    @pytest.mark.parametrize("changes", [{"rms_norm_eps": 0.5}, {"rope_parameters": {}}])
    def test_configuration_changes_it(self, folder, changes):
        """A setting that changes what the weights compute is seen."""
        before = Checkpoint.open(folder).fingerprint()
        edit_json(folder / "config.json", **changes)
        assert Checkpoint.open(folder).fingerprint() != before

    @pytest.mark.parametrize(
        "changes", [{"transformers_version": "9"}, {"dtype": "float16"}, {"eos_token_id": 7}]
    )
    def test_names_and_versions_do_not_matter(self, folder, changes):
        """Who saved the files, and with which end token, does not change the blocks."""
        before = Checkpoint.open(folder).fingerprint()
        edit_json(folder / "config.json", **changes)
        assert Checkpoint.open(folder).fingerprint() == before

    def test_renamed_tensor_changes_it(self, folder):
        """The same bytes under another name are another model."""
        before = Checkpoint.open(folder).fingerprint()
        weights = load_file(folder / "model.safetensors")
        one, two = (f"model.layers.{block}.mlp.up_proj.weight" for block in (0, 1))
        weights[one], weights[two] = weights[two], weights[one]
        save_file(weights, folder / "model.safetensors")
        assert Checkpoint.open(folder).fingerprint() != before

    @pytest.mark.parametrize(
        "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool]
    )
    def test_every_dtype(self, folder, dtype):
        """Samples are bytes, so no dtype is special; scalars and empty tensors are fine."""
        extra = {
            "odd": torch.ones(7, 129).to(dtype),
            "scalar": torch.ones(()).to(dtype),
            "empty": torch.ones(0, 3).to(dtype),
        }
        weights = load_file(folder / "model.safetensors") | extra
        save_file(weights, folder / "model.safetensors")
        assert len(Checkpoint.open(folder).fingerprint()) == 64

    def test_large_files_are_sampled(self, folder):
        """A tensor of a terabyte is sampled, not read: a sparse file is done in no time."""
        size = 1 << 40
        entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
        path = folder / "model.safetensors"
        write_raw(path, json.dumps({"giant": entry}).encode())
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + size)
        assert len(Checkpoint.open(folder).fingerprint()) == 64
