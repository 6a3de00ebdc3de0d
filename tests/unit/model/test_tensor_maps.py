"""Mapped tensors have the stored values, give their pages back, and never write to a file."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedsea.errors import CheckpointError
from fedsea.model.tensor_files import TensorInfo, read_header, write_tensors
from fedsea.model.tensor_maps import TensorMaps

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, comparable for every dtype."""
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.fixture
def stored(tmp_path):
    """A file of odd sizes in many dtypes, and what safetensors itself reads from it."""
    torch.manual_seed(3)
    tensors = {
        f"{dtype}".removeprefix("torch."): torch.randn(3, 7 + index).mul(20).to(dtype)
        for index, dtype in enumerate(DTYPES)
    }
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "large": torch.randn(70_000),
    }
    path = tmp_path / "some.safetensors"
    save_file(tensors, path)
    return path, load_file(path)


def test_values_are_those_of_safetensors(stored):
    """Every dtype, shape and alignment reads as safetensors' own library reads it."""
    path, expected = stored
    tensors = TensorMaps(read_header(path)).tensors
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.shape == expected[name].shape
        assert torch.equal(as_bytes(tensor), as_bytes(expected[name]))


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
        max_size=6,
    )
)
def test_written_files_read_back(tmp_path_factory, layout):
    """What `write_tensors` makes of ranges, our maps and safetensors read alike."""
    folder = tmp_path_factory.mktemp("layout")
    tensors = {str(i): torch.ones(shape).to(dtype) for i, (dtype, shape) in enumerate(layout)}
    save_file(tensors, folder / "source.safetensors")
    write_tensors(folder / "copy.safetensors", read_header(folder / "source.safetensors"))
    theirs = load_file(folder / "copy.safetensors")
    ours = TensorMaps(read_header(folder / "copy.safetensors")).tensors
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for read in (ours[name], theirs[name]):
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(as_bytes(read), as_bytes(tensor))


def test_unaligned_tensor(tmp_path):
    """A tensor at an odd place in its file is readable and aligned in memory."""
    values = torch.arange(6, dtype=torch.float32)
    path = tmp_path / "odd"
    path.write_bytes(b"x" * 13 + values.numpy().tobytes())
    info = TensorInfo(path, "F32", (2, 3), 13, 24)
    tensor = TensorMaps({"odd": info}).tensors["odd"]
    assert torch.equal(tensor, values.reshape(2, 3))
    assert tensor.data_ptr() % 4 == 0


def test_scattered_tensors_of_several_files(tmp_path):
    """Far-apart tensors and files are mapped apart, and each has its own values."""
    names = [f"{number}" for number in range(8)]
    for file in ("a", "b"):
        save_file(
            {f"{file}{name}": torch.full((5_000,), float(name)) for name in names}, tmp_path / file
        )
    infos = read_header(tmp_path / "a") | read_header(tmp_path / "b")
    chosen = {name: infos[name] for name in ("b7", "a0", "a1", "a5", "b2")}
    maps = TensorMaps(chosen)
    assert len(maps._runs) == 4
    for name, tensor in maps.tensors.items():
        assert torch.equal(tensor, torch.full((5_000,), float(name[1])))


def resident_kib(path: Path) -> int:
    """Memory that maps of a file hold, by the kernel's account."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            counts = line.endswith(str(path))
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts pages as Linux does")
def test_release_gives_pages_back(tmp_path):
    """A released tensor takes no memory, its neighbours keep theirs, and it can be read again."""
    path = tmp_path / "pages.safetensors"
    save_file({name: torch.full((1 << 20,), 3, dtype=torch.uint8) for name in "abc"}, path)
    maps = TensorMaps(read_header(path))
    assert all(int(tensor.sum()) == 3 << 20 for tensor in maps.tensors.values())
    full = resident_kib(path)
    assert full >= 3 * 1024
    maps.release(maps.tensors["b"])
    assert full - 1024 <= resident_kib(path) <= full - 1024 + 8
    assert all(int(tensor.sum()) == 3 << 20 for tensor in maps.tensors.values())


def test_release_of_foreign_tensors_does_nothing(stored):
    """Memory that is not of this map is never touched."""
    maps = TensorMaps(read_header(stored[0]))
    other = torch.ones(100_000)
    maps.release(other)
    maps.release(torch.ones(4, device="meta"))
    maps.release(torch.empty(0))
    assert float(other.sum()) == 100_000


def test_views_outlive_the_maps(stored):
    """A tensor stays readable when the object that mapped it is gone."""
    path, expected = stored
    large = TensorMaps(read_header(path)).tensors["large"]
    assert torch.equal(large, expected["large"])


def test_writing_does_not_reach_the_file(stored):
    """A change in memory stays in memory."""
    path, expected = stored
    TensorMaps(read_header(path)).tensors["large"].zero_()
    assert torch.equal(load_file(path)["large"], expected["large"])


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "U64"])
def test_dtype_without_torch_equivalent(tmp_path, dtype):
    """A stored dtype that nothing here computes with is named."""
    path = tmp_path / "odd"
    path.write_bytes(bytes(64))
    with pytest.raises(CheckpointError, match=f"as {dtype}, which torch cannot"):
        TensorMaps({"odd": TensorInfo(path, dtype, (1,), 0, 8)})


def test_file_that_shrank(stored):
    """A file that became shorter since its header was read is an error, not a crash."""
    path, _ = stored
    infos = read_header(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="shorter"):
        TensorMaps(infos)
