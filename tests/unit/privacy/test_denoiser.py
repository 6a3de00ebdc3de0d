"""The denoiser: causal, windowed, the same along a stream as over a whole text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsea import artifacts
from fedsea.errors import CheckpointError, ConfigError, FingerprintMismatch
from fedsea.privacy.denoiser import Denoiser, Purpose, Shape

MODEL = "ab" * 32
SHAPE = Shape(hidden=10, noise=6, inner=16, layers=2, heads=4, window=4)
PURPOSE = Purpose(MODEL, 1, 1, "gaussian:clip_norm=1,mu=8,by=row")
LENGTH = 30


def denoiser():
    """A denoiser with random weights, so that every part matters."""
    made = Denoiser(SHAPE, PURPOSE, {"steps": 3})
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=chance))
        made.scales.copy_(torch.tensor([1.5, 0.5, 2.0]))
    return made.eval()


def text(length=LENGTH):
    """Outputs, clean rows and noise of one text."""
    chance = torch.Generator().manual_seed(1)
    sizes = (SHAPE.hidden, SHAPE.hidden, SHAPE.noise)
    return tuple(torch.randn(length, size, generator=chance) for size in sizes)


def whole(made, parts):
    """What the denoiser makes of a whole text."""
    with torch.inference_mode():
        return made(*(rows[None] for rows in parts))[0]


def test_an_untrained_denoiser_changes_nothing():
    """Its start gives the outputs back as they are."""
    noisy, clean, noise = text()
    assert torch.allclose(whole(Denoiser(SHAPE, PURPOSE), (noisy, clean, noise)), noisy)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=LENGTH))
def test_a_stream_gives_what_the_whole_text_gives(counts):
    """However the text is cut into pieces."""
    made, parts = denoiser(), text()
    expected, restorer, start, found = whole(made, parts), denoiser().sequence(), 0, []
    for count in counts:
        found.append(restorer.restore(*(rows[start : start + count] for rows in parts)))
        start += count
        if start >= LENGTH:
            break
    assert torch.allclose(torch.cat(found), expected[:start], atol=1e-4)
    assert restorer.length == min(start, LENGTH)


def test_outputs_that_were_not_asked_for_are_not_needed():
    """Of a prompt only the last output may come back; the result is the same."""
    made, (noisy, clean, noise) = denoiser(), text()
    expected, restorer = whole(made, (noisy, clean, noise)), made.sequence()
    assert restorer.restore(noisy[:0], clean[:20], noise[:20]).shape == (0, SHAPE.hidden)
    found = restorer.restore(noisy[29:], clean[20:], noise[20:])
    assert torch.allclose(found, expected[29:], atol=1e-4)


def test_no_position_sees_the_future():
    """Changing later rows changes nothing before them."""
    made, (noisy, clean, noise) = denoiser(), text()
    changed = [rows.clone() for rows in (noisy, clean, noise)]
    for rows in changed:
        rows[17:] += 1
    before, after = whole(made, (noisy, clean, noise)), whole(made, changed)
    assert torch.equal(before[:17], after[:17])
    assert not torch.isclose(before[17:], after[17:]).all(dim=1).any()


def test_the_window_is_bounded():
    """With L layers of window W nothing earlier than L (W - 1) positions matters."""
    made, (noisy, clean, noise) = denoiser(), text()
    changed, reach = clean.clone(), SHAPE.layers * (SHAPE.window - 1)
    changed[0] += 1
    before, after = whole(made, (noisy, clean, noise)), whole(made, (noisy, changed, noise))
    assert torch.equal(before[reach + 1 :], after[reach + 1 :])
    assert not torch.equal(before[reach], after[reach])


def test_rollback_and_fork_are_exact():
    """A sequence that was rolled back or forked goes on as if the rest had never been."""
    made, parts = denoiser(), text()
    expected, restorer = whole(made, parts), made.sequence()
    restorer.restore(*(rows[:25] + 1 if index else rows[:25] for index, rows in enumerate(parts)))
    restorer.rollback(0)
    restorer.restore(*(rows[:20] for rows in parts))
    forked = restorer.fork(12)
    restorer.rollback(15)
    again = restorer.restore(*(rows[15:] for rows in parts))
    assert torch.allclose(again, expected[15:], atol=1e-4)
    found = forked.restore(*(rows[12:] for rows in parts))
    assert torch.allclose(found, expected[12:], atol=1e-4)


def test_no_rows_give_no_rows():
    """An empty step is harmless at the start and later."""
    parts, restorer = text(), denoiser().sequence()
    for _ in range(2):
        assert restorer.restore(*(rows[:0] for rows in parts)).shape == (0, SHAPE.hidden)
        restorer.restore(*(rows[:3] for rows in parts))


@pytest.mark.parametrize("part", [0, 1, 2])
def test_rows_of_another_width_are_refused(part):
    """Every input is checked."""
    parts = list(text())
    parts[part] = parts[part][:, 1:]
    with pytest.raises(ConfigError, match="denoiser takes"):
        denoiser().sequence().restore(*parts)


def test_more_outputs_than_positions_are_refused():
    """An output belongs to a position that was read."""
    noisy, clean, noise = text()
    with pytest.raises(ConfigError, match="positions"):
        denoiser().sequence().restore(noisy, clean[:3], noise[:3])


def test_a_file_gives_the_denoiser_back(tmp_path):
    """Weights, sizes, purpose and recipe survive."""
    made, parts = denoiser(), text()
    made.save(tmp_path / "file")
    found = Denoiser.load(tmp_path / "file")
    assert (found.shape, found.purpose, found.recipe) == (SHAPE, PURPOSE, {"steps": 3})
    assert torch.equal(whole(found, parts), whole(made, parts))
    assert not any(parameter.requires_grad for parameter in found.parameters())


@pytest.mark.parametrize(
    "changes", [{"layers": 0}, {"hidden": -1}, {"window": 0}, {"heads": 3}, {"inner": 0}]
)
def test_impossible_sizes_are_refused(changes):
    """Sizes are positive, and heads divide the inner size."""
    with pytest.raises(ConfigError):
        Shape(**{"hidden": 10, "noise": 6, "inner": 16, "heads": 4, **changes})


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "cd" * 32}, FingerprintMismatch),
        ({"bottom": 2}, ConfigError),
        ({"top": 0}, ConfigError),
        ({"mechanism": "gaussian:clip_norm=1,mu=9,by=row"}, ConfigError),
        ({"projection": "cd" * 32}, ConfigError),
    ],
)
def test_another_use_is_refused(changes, error):
    """A denoiser is for one checkpoint, partition, mechanism and projection."""
    PURPOSE.check(PURPOSE)
    used = {name: getattr(PURPOSE, name) for name in PURPOSE.__slots__}
    with pytest.raises(error):
        PURPOSE.check(Purpose(**{**used, **changes}))


@pytest.mark.parametrize(
    ("description", "tensors"),
    [
        ({"shape": {"hidden": 10, "noise": 6, "inner": 16, "layers": 2, "heads": 3}}, {}),
        ({"shape": {"hidden": "10", "noise": 6}}, {}),
        ({"shape": {"hidden": 10}}, {}),
        ({"purpose": {"model": MODEL}}, {}),
        ({"purpose": {"model": 1, "bottom": 1, "top": 1, "mechanism": "x"}}, {}),
        ({"purpose": {"model": "x", "bottom": 1, "top": 1, "mechanism": "x"}}, {}),
        ({"purpose": {"model": MODEL, "bottom": -1, "top": 1, "mechanism": "x"}}, {}),
        ({"extra": 1}, {}),
        ({}, {"scales": torch.zeros(3)}),
        ({}, {"out.bias": torch.full((10,), torch.nan)}),
        ({}, {"out.bias": torch.zeros(11)}),
        ({}, {"extra": torch.zeros(1)}),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, description, tensors):
    """Sizes, purposes and weights that cannot be are corrupt."""
    path = tmp_path / "file"
    denoiser().save(path)
    found = artifacts.read(path, "denoiser")
    artifacts.write(
        path, "denoiser", {**found.description, **description}, {**found.tensors, **tensors}
    )
    with pytest.raises(CheckpointError):
        Denoiser.load(path)
