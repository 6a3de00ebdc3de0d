"""Bundles hold one side each, run like the whole checkpoint, and appear whole or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.tiny_models import save_tiny

from fedsea.errors import CheckpointError, ConfigError, PartitionError, UnsupportedModel
from fedsea.model import bundles, tensor_files
from fedsea.model.bundles import split_checkpoint
from fedsea.model.checkpoint import Checkpoint, block_of
from fedsea.model.partition import Partition, Span
from fedsea.model.runner import NewRows, SpanRunner
from fedsea.model.spans import Placement, load_bottom, load_top, load_trunk

BLOCKS = 5
IDS = torch.tensor([5, 17, 3, 90, 41, 8, 8, 2])
TEXT_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
}
FORMS = {
    "untied": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "experts": ("mixtral", {}),
    "experts with dense blocks": ("qwen3_moe", {}),
}


def save(form: str, folder: Path, **options: object) -> Path:
    """A tiny checkpoint with every kind of tokenizer file beside it."""
    family, overrides = FORMS[form]
    save_tiny(family, folder, **overrides)
    for name in TEXT_FILES:
        (folder / name).write_text("{}")
    (folder / "LICENSE").write_text("as is")
    (folder / "pytorch_model.bin").write_text("pickle")
    (folder / "notes.json").write_text("{}")
    return folder


@pytest.fixture(scope="module", params=FORMS)
def source(request, tmp_path_factory):
    """Checkpoints of every form; no test changes them."""
    return save(request.param, tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One untied checkpoint; no test changes it."""
    return save("untied", tmp_path_factory.mktemp("plain") / "tiny")


def logits(client: Path, trunk: Path, partition: Partition) -> torch.Tensor:
    """Logits (n, vocabulary) of a split model whose sides come from two folders."""
    blocks, placement = BLOCKS, Placement()
    ours, theirs = Checkpoint.open(client), Checkpoint.open(trunk)
    bottom = load_bottom(ours, partition.bottom_span(), placement)
    middle = load_trunk(theirs, partition.trunk_span(blocks), placement)
    top = load_top(ours, partition.top_span(blocks), placement)
    rows = IDS
    for span in (bottom, middle, top.span):
        runner = SpanRunner(span, 16, placement)
        account = runner.pool.open(16)
        runner.pool.begin(account, 0, 16)
        rows = runner.run(rows, runner.advance([NewRows(account, 0, len(IDS))]))
    with torch.inference_mode():
        return top.logits(rows)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by safetensors itself."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def bundle_files(folder: Path) -> set[str]:
    """Names of all files below a folder."""
    return {path.name for path in folder.rglob("*") if path.is_file()}


class TestContent:
    """Each side gets its own and nothing else."""

    def test_every_tensor_is_on_one_side_unchanged(self, source, tmp_path):
        """Together the bundles are the checkpoint, byte for byte, and they share nothing."""
        split_checkpoint(Checkpoint.open(source), Partition(1, 2), tmp_path / "out")
        client, trunk = stored(tmp_path / "out" / "client"), stored(tmp_path / "out" / "trunk")
        whole = stored(source)
        assert not client.keys() & trunk.keys()
        assert client.keys() | trunk.keys() == whole.keys()
        for name, tensor in (client | trunk).items():
            assert tensor.dtype == whole[name].dtype
            assert torch.equal(tensor, whole[name])

    def test_trunk_bundle_reveals_no_text(self, source, tmp_path):
        """The provider's folder has blocks and configuration: no embedding, head or tokenizer."""
        split_checkpoint(Checkpoint.open(source), Partition(1, 2), tmp_path / "out", {"trunk"})
        trunk = tmp_path / "out" / "trunk"
        assert {block_of(name) for name in stored(trunk)} == {1, 2}
        assert bundle_files(tmp_path / "out") == {
            "config.json",
            "fedsea.json",
            "model.safetensors",
            "LICENSE",
        }

    def test_client_bundle_has_the_tokenizer(self, plain, tmp_path):
        """The data owner's folder has every tokenizer file, nothing pickled, nothing unknown."""
        split_checkpoint(Checkpoint.open(plain), Partition(1, 2), tmp_path / "out", {"client"})
        files = bundle_files(tmp_path / "out" / "client")
        assert files == TEXT_FILES | {"config.json", "fedsea.json", "model.safetensors", "LICENSE"}
        assert {block_of(name) for name in stored(tmp_path / "out" / "client")} == {None, 0, 3, 4}

    def test_report(self, plain, tmp_path):
        """The result tells what was written where."""
        seen: list[int] = []
        client, trunk = split_checkpoint(
            Checkpoint.open(plain), Partition(1, 2), tmp_path / "out", on_bytes=seen.append
        )
        assert (client.part, trunk.part) == ("client", "trunk")
        assert client.spans == (Span(0, 1), Span(3, 5))
        assert trunk.spans == (Span(1, 3),)
        for bundle in (client, trunk):
            assert bundle.folder == tmp_path / "out" / bundle.part
            assert bundle.num_tensors == len(stored(bundle.folder))
            assert bundle.size == (bundle.folder / "model.safetensors").stat().st_size
        whole = sum(tensor.nbytes for tensor in stored(plain).values())
        assert sum(seen) == whole

    def test_record(self, plain, tmp_path):
        """fedsea.json says what the folder is, for people and for other programs."""
        split_checkpoint(Checkpoint.open(plain), Partition(1, 2), tmp_path / "out")
        record = json.loads((tmp_path / "out" / "trunk" / "fedsea.json").read_text())
        assert record["part"] == "trunk"
        assert record["spans"] == ["1:3"]
        assert record["source"] == "tiny"
        assert record["partition"] == {"bottom": 1, "top": 2}
        assert record["fingerprint"] == Checkpoint.open(plain).fingerprint()

    @pytest.mark.parametrize("shard_bytes", [1, 20_000, 60_000])
    def test_shards(self, plain, tmp_path, shard_bytes):
        """Files stay below the limit where a tensor allows it, and hold the same tensors."""
        split_checkpoint(
            Checkpoint.open(plain),
            Partition(1, 2),
            tmp_path / "out",
            max_shard_bytes=shard_bytes,
        )
        client = tmp_path / "out" / "client"
        assert (client / "model.safetensors.index.json").exists()
        for path in client.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
            assert len(sizes) == 1 or sum(sizes) <= shard_bytes
        assert Checkpoint.open(client).tensors.keys() == stored(client).keys()


class TestUse:
    """Bundles stand in for the checkpoint."""

    @pytest.mark.parametrize("shard_bytes", [30_000, 1 << 30])
    def test_logits_equal_those_of_the_whole(self, source, tmp_path, shard_bytes):
        """A model split over two bundles computes exactly what it computes from one folder."""
        partition = Partition(1, 2)
        split_checkpoint(
            Checkpoint.open(source), partition, tmp_path / "out", max_shard_bytes=shard_bytes
        )
        split = logits(tmp_path / "out" / "client", tmp_path / "out" / "trunk", partition)
        assert torch.equal(split, logits(source, source, partition))

    def test_sharded_source(self, plain, tmp_path):
        """A checkpoint in several files splits into the same bundles."""
        partition = Partition(1, 2)
        checkpoint = Checkpoint.open(plain)
        bundles_of_shards = tmp_path / "from shards"
        sharded = tmp_path / "sharded"
        sharded.mkdir()
        for name in ("config.json",):
            (sharded / name).write_bytes((plain / name).read_bytes())
        shards = bundles._shards(checkpoint.tensors, 40_000)
        names = bundles._file_names(len(shards))
        for name, tensors in zip(names, shards, strict=True):
            tensor_files.write_tensors(sharded / name, tensors)
        index = bundles._index(dict(zip(names, shards, strict=True)))
        (sharded / "model.safetensors.index.json").write_text(json.dumps(index))

        split_checkpoint(Checkpoint.open(sharded), partition, bundles_of_shards)
        split = logits(bundles_of_shards / "client", bundles_of_shards / "trunk", partition)
        assert torch.equal(split, logits(plain, plain, partition))

    def test_fingerprint_is_that_of_the_whole(self, source, tmp_path):
        """Both bundles have the checkpoint's fingerprint and name."""
        whole = Checkpoint.open(source)
        split_checkpoint(whole, Partition(2, 1), tmp_path / "out")
        for part in ("client", "trunk"):
            bundle = Checkpoint.open(tmp_path / "out" / part)
            assert bundle.fingerprint() == whole.fingerprint()
            assert bundle.name == whole.name

    @pytest.mark.parametrize("part", ["client", "trunk"])
    def test_changed_bundle_has_another_fingerprint(self, plain, tmp_path, part):
        """A bundle whose weights were changed is not taken for the original."""
        whole = Checkpoint.open(plain)
        split_checkpoint(whole, Partition(2, 1), tmp_path / "out")
        path = tmp_path / "out" / part / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        assert Checkpoint.open(tmp_path / "out" / part).fingerprint() != whole.fingerprint()

    def test_narrower_partition(self, plain, tmp_path):
        """Bundles of the widest sides serve every partition inside them."""
        whole = Checkpoint.open(plain)
        split_checkpoint(whole, Partition(2, 1), tmp_path / "client", {"client"})
        split_checkpoint(whole, Partition(1, 0), tmp_path / "trunk", {"trunk"})
        client, trunk = tmp_path / "client" / "client", tmp_path / "trunk" / "trunk"
        for partition in (Partition(2, 1), Partition(1, 1), Partition(1, 0), Partition(2, 0)):
            assert torch.equal(logits(client, trunk, partition), logits(plain, plain, partition))

    def test_what_a_bundle_lacks_is_named(self, plain, tmp_path):
        """Asking a bundle for the other side's parts is an error of the checkpoint."""
        split_checkpoint(Checkpoint.open(plain), Partition(1, 1), tmp_path / "out")
        client = Checkpoint.open(tmp_path / "out" / "client")
        trunk = Checkpoint.open(tmp_path / "out" / "trunk")
        for load, checkpoint, span in (
            (load_bottom, client, Span(0, 2)),
            (load_top, client, Span(3, 5)),
            (load_trunk, client, Span(1, 4)),
            (load_trunk, trunk, Span(0, 4)),
            (load_bottom, trunk, Span(0, 0)),
            (load_top, trunk, Span(5, 5)),
        ):
            with pytest.raises(CheckpointError, match="bundle"):
                load(checkpoint, span, Placement())

    @pytest.mark.parametrize(
        "changes",
        [
            {"format": 2},
            {"part": "server"},
            {"part": None},
            {"source": 3},
            {"digests": []},
            {"partition": {"bottom": 1}},
            {"partition": {"bottom": "1", "top": 1}},
            {"partition": {"bottom": -1, "top": 1}},
        ],
    )
    def test_bad_record(self, plain, tmp_path, changes):
        """A fedsea.json that is not ours, or not complete, says to split again."""
        split_checkpoint(Checkpoint.open(plain), Partition(1, 1), tmp_path / "out")
        path = tmp_path / "out" / "client" / "fedsea.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="split the checkpoint again"):
            Checkpoint.open(tmp_path / "out" / "client")


class TestRefusals:
    """What cannot be split is refused before anything is written."""

    @pytest.mark.parametrize(
        ("partition", "options", "error", "message"),
        [
            (Partition(3, 2), {}, PartitionError, "leave no trunk"),
            (Partition(1, 1), {"parts": {"server"}}, ConfigError, "parts server"),
            (Partition(1, 1), {"parts": set()}, ConfigError, "parts are missing"),
            (Partition(1, 1), {"max_shard_bytes": 0}, ConfigError, "shards of 0 bytes"),
        ],
    )
    def test_bad_options(self, plain, tmp_path, partition, options, error, message):
        """Options that make no sense are named."""
        with pytest.raises(error, match=message):
            split_checkpoint(Checkpoint.open(plain), partition, tmp_path / "out", **options)
        assert not list(tmp_path.iterdir())

    def test_existing_folder_is_kept(self, plain, tmp_path):
        """Nothing is overwritten."""
        (tmp_path / "out").mkdir()
        with pytest.raises(ConfigError, match="exists already"):
            split_checkpoint(Checkpoint.open(plain), Partition(1, 1), tmp_path / "out")

    def test_bundle_of_a_bundle(self, plain, tmp_path):
        """A bundle cannot be split again, because it lacks the rest."""
        split_checkpoint(Checkpoint.open(plain), Partition(1, 1), tmp_path / "out")
        with pytest.raises(CheckpointError, match="split the whole checkpoint"):
            split_checkpoint(
                Checkpoint.open(tmp_path / "out" / "client"), Partition(1, 1), tmp_path / "again"
            )

    def test_incomplete_checkpoint(self, plain, tmp_path):
        """A checkpoint without one of its blocks is noticed before anything is written."""
        part = tmp_path / "part"
        part.mkdir()
        whole = Checkpoint.open(plain)
        kept = {name: info for name, info in whole.tensors.items() if block_of(name) != 2}
        tensor_files.write_tensors(part / "model.safetensors", kept)
        (part / "config.json").write_bytes((plain / "config.json").read_bytes())
        with pytest.raises(CheckpointError, match="no block 2: part is not complete"):
            split_checkpoint(Checkpoint.open(part), Partition(1, 1), tmp_path / "out")

    def test_unsupported_family(self, plain, tmp_path):
        """A family that cannot be cut is refused."""
        config = json.loads((plain / "config.json").read_text()) | {"model_type": "gpt_neox"}
        (tmp_path / "neox").mkdir()
        (tmp_path / "neox" / "config.json").write_text(json.dumps(config))
        (tmp_path / "neox" / "model.safetensors").symlink_to(plain / "model.safetensors")
        with pytest.raises(UnsupportedModel, match="gpt_neox"):
            split_checkpoint(Checkpoint.open(tmp_path / "neox"), Partition(1, 1), tmp_path / "out")

    def test_too_little_disk(self, plain, tmp_path, monkeypatch):
        """Both sizes are named when the bundles do not fit the disk."""
        usage = (10**12, 10**12, 10)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(*usage))
        with pytest.raises(ConfigError, match=r"take 0\.0 GB and 0\.0 GB are free"):
            split_checkpoint(Checkpoint.open(plain), Partition(1, 1), tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_disk_that_fills_up(self, plain, tmp_path, monkeypatch):
        """An error in the middle leaves nothing behind."""

        def fail(*_):
            raise OSError(28, "No space left on device")

        with pytest.raises(ConfigError, match="No space left on device"):
            split_checkpoint(
                Checkpoint.open(plain), Partition(1, 1), tmp_path / "out", on_bytes=fail
            )
        assert not list(tmp_path.iterdir())

    def test_source_that_ends_early(self, plain, tmp_path):
        """A source that lost bytes after it was opened is corrupt, and nothing is left behind."""
        (tmp_path / "tiny").mkdir()
        for name in ("config.json", "model.safetensors"):
            (tmp_path / "tiny" / name).write_bytes((plain / name).read_bytes())
        checkpoint = Checkpoint.open(tmp_path / "tiny")
        weights = tmp_path / "tiny" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="it ends early"):
            split_checkpoint(checkpoint, Partition(1, 1), tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


class _Usage:
    def __init__(self, total: int, used: int, free: int) -> None:
        self.total, self.used, self.free = total, used, free
