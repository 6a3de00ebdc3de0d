"""Projections: a pair with one fingerprint, whole or in halves, and what does not fit it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedsea import artifacts
from fedsea.errors import CheckpointError, ConfigError, FingerprintMismatch
from fedsea.model.projection import Projection

MODEL = "ab" * 32
HIDDEN, WIDTH = 12, 5


def pair(seed=0, **changes):
    """A random pair."""
    chance = torch.Generator().manual_seed(seed)
    encoder = torch.randn(WIDTH, HIDDEN, generator=chance)
    decoder = torch.randn(HIDDEN, WIDTH, generator=chance)
    return Projection.of(
        **{"encoder": encoder, "decoder": decoder, "bottom": 1, "model": MODEL, **changes}
    )


def test_encode_and_decode_are_the_two_linear_maps():
    """encode is E h, decode is D z, in fp32, for rows of any float dtype."""
    made, rows = pair(), torch.randn(7, HIDDEN)
    narrow = made.encode(rows)
    assert torch.allclose(narrow, rows @ made.encoder.T)
    assert torch.allclose(made.decode(narrow), narrow @ made.decoder.T)
    assert made.encode(rows.bfloat16()).dtype == torch.float32


@given(
    arrays("float32", (3, HIDDEN), elements=st.floats(-100, 100, width=32)),
    st.floats(-4, 4, width=32),
)
def test_the_maps_have_no_bias(values, factor):
    """A scaled row gives the scaled result, and zero gives zero."""
    made, rows = pair(), torch.from_numpy(values)
    assert torch.allclose(made.encode(rows * factor), made.encode(rows) * factor, atol=1e-2)
    assert not made.decode(made.encode(rows * 0)).any()


def test_a_file_gives_the_pair_back(tmp_path):
    """Sizes, numbers, recipe and fingerprint survive."""
    made = pair(recipe={"objective": "nll", "steps": 3})
    made.save(tmp_path / "pair")
    found = Projection.load(tmp_path / "pair")
    rows = torch.randn(4, HIDDEN)
    assert torch.equal(found.encode(rows), made.encode(rows))
    assert torch.equal(found.decode(rows[:, :WIDTH]), made.decode(rows[:, :WIDTH]))
    assert (found.hidden_size, found.width, found.bottom) == (HIDDEN, WIDTH, 1)
    assert found.recipe == made.recipe
    assert found.fingerprint() == made.fingerprint()


def test_halves_share_the_fingerprint_and_lack_the_other(tmp_path):
    """The client's file has no decoder, the server's no encoder and no recipe."""
    made = pair(recipe={"steps": 3})
    made.for_client().save(tmp_path / "client")
    made.for_server().save(tmp_path / "server")
    client, server = Projection.load(tmp_path / "client"), Projection.load(tmp_path / "server")
    assert client.fingerprint() == server.fingerprint() == made.fingerprint()
    rows = torch.randn(2, HIDDEN)
    assert torch.equal(client.encode(rows), made.encode(rows))
    assert torch.equal(server.decode(rows[:, :WIDTH]), made.decode(rows[:, :WIDTH]))
    assert server.recipe == {}
    assert set(artifacts.read(tmp_path / "server", "projection").tensors) == {"decoder"}
    with pytest.raises(ConfigError, match="no decoder"):
        client.decode(rows[:, :WIDTH])
    with pytest.raises(ConfigError, match="no encoder"):
        server.encode(rows)


def test_the_fingerprint_tells_pairs_apart():
    """It depends on every number, the model and the cut, and not on the recipe."""
    made = pair()
    assert made.fingerprint() == pair(recipe={"note": "x"}).fingerprint()
    nudged = made.decoder.clone()
    nudged[-1, -1] += 1e-6
    others = [pair(1), pair(bottom=2), pair(model="cd" * 32), pair(decoder=nudged)]
    assert len({made.fingerprint(), *(other.fingerprint() for other in others)}) == 5


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder": torch.randn(WIDTH, HIDDEN)},
        {"encoder": torch.randn(HIDDEN)},
        {"encoder": torch.randn(13, HIDDEN), "decoder": torch.randn(HIDDEN, 13)},
        {"encoder": torch.randn(0, HIDDEN), "decoder": torch.randn(HIDDEN, 0)},
        {"encoder": torch.full((WIDTH, HIDDEN), torch.nan)},
        {"decoder": torch.full((HIDDEN, WIDTH), torch.inf)},
        {"bottom": -1},
        {"model": "not a fingerprint"},
    ],
)
def test_what_is_no_pair_is_refused(changes):
    """Shapes, numbers, cut and fingerprint are checked."""
    with pytest.raises(ConfigError):
        pair(**changes)


def test_a_projection_of_something_else_is_refused():
    """Rows of another width, another cut and another checkpoint are told apart."""
    made = pair()
    made.check_fits(HIDDEN, 1, MODEL)
    with pytest.raises(ConfigError, match="rows of 12"):
        made.check_fits(HIDDEN + 1, 1, MODEL)
    with pytest.raises(ConfigError, match="bottom=1"):
        made.check_fits(HIDDEN, 2, MODEL)
    with pytest.raises(FingerprintMismatch, match="abab"):
        made.check_fits(HIDDEN, 1, "cd" * 32)


@pytest.mark.parametrize("shape", [(3, HIDDEN + 1), (HIDDEN,), (1, 3, HIDDEN)])
def test_rows_of_another_shape_are_refused(shape):
    """Neither map broadcasts."""
    with pytest.raises(ConfigError, match="encoder"):
        pair().encode(torch.zeros(shape))


def rewritten(path, description=None, **tensors):
    """The file of a pair with other entries; None removes one."""
    pair().save(path)
    found = artifacts.read(path, "projection")
    entries = {**found.description, **(description or {})}
    kept = {**found.tensors, **tensors}
    artifacts.write(
        path,
        "projection",
        {key: value for key, value in entries.items() if value is not None},
        {name: tensor for name, tensor in kept.items() if tensor is not None},
    )
    return path


@pytest.mark.parametrize(
    "description",
    [
        {"width": None},
        {"width": 0},
        {"width": HIDDEN + 1},
        {"width": "5"},
        {"width": 5.0},
        {"hidden": HIDDEN + 1},
        {"bottom": -1},
        {"bottom": True},
        {"model": "short"},
        {"model": 7},
        {"recipe": "text"},
        {"encoder": "00" * 32},
        {"decoder": None},
        {"extra": 1},
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path, description):
    """Missing, unknown, wrong and contradicting entries are corrupt."""
    with pytest.raises(CheckpointError):
        Projection.load(rewritten(tmp_path / "pair", description))


@pytest.mark.parametrize(
    "tensors",
    [
        {"encoder": torch.full((WIDTH, HIDDEN), torch.nan)},
        {"encoder": torch.zeros(WIDTH, HIDDEN)},
        {"encoder": torch.zeros(WIDTH, HIDDEN + 1)},
        {"decoder": torch.zeros(HIDDEN, WIDTH).half()},
        {"bias": torch.zeros(WIDTH)},
        {"encoder": None, "decoder": None},
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, tensors):
    """NaN, other numbers than recorded, other shapes and dtypes, biases and empty files."""
    if tensors.get("encoder", 0) is None:
        tensors = {**tensors, "nothing": torch.zeros(1)}
    with pytest.raises(CheckpointError):
        Projection.load(rewritten(tmp_path / "pair", None, **tensors))
