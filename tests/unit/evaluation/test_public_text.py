"""Public text as windows: what is cut, what is held out, what is refused."""

from __future__ import annotations

import pytest
import torch

from fedsea.errors import CheckpointError, ConfigError
from fedsea.evaluation.public_text import PublicText
from fedsea.model.checkpoint import Checkpoint

BOS = 1


def test_windows_are_the_text_in_order_behind_the_start():
    """Every window begins with the start, and together they hold the text."""
    text = PublicText.of(torch.arange(100, 200), [BOS], 11)
    windows = torch.cat([text.training, text.held_out])
    assert text.prefix == 1
    assert (windows[:, 0] == BOS).all()
    assert sorted(windows[:, 1:].flatten().tolist()) == list(range(100, 200))


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (9, 1), (10, 1), (40, 4), (5000, 63)])
def test_part_of_the_text_is_held_out(count, held_out):
    """About a tenth, at least one window, never more than are needed, spread over the text."""
    text = PublicText.of(torch.arange(count * 4), [], 4)
    assert len(text.held_out) == held_out
    assert len(text.training) == count - held_out
    assert not set(text.held_out[:, 0].tolist()) & set(text.training[:, 0].tolist())


def test_batches_follow_from_seed_and_step():
    """The same step gives the same windows; another step or seed gives others."""
    text = PublicText.of(torch.arange(4000), [], 4)
    first = text.batch(8, seed=0, step=3)
    assert first.shape == (8, 4)
    assert torch.equal(first, text.batch(8, seed=0, step=3))
    assert not torch.equal(first, text.batch(8, seed=0, step=4))
    assert not torch.equal(first, text.batch(8, seed=1, step=3))


def test_the_digest_tells_texts_apart():
    """Another token, or another length of the windows, is another text."""
    ids = torch.arange(400)
    digests = {PublicText.of(ids + shift, [], length).digest() for shift, length in
               ((0, 4), (1, 4), (0, 8))}  # fmt: skip
    assert len(digests) == 3


def test_a_file_is_read_with_the_models_tokenizer(tiny_model, tmp_path):
    """One token for each character here; this tokenizer adds no start."""
    file = tmp_path / "text"
    file.write_text("ABCDEFGH" * 10, encoding="utf-8")
    text = PublicText.read(file, Checkpoint.open(tiny_model), 8)
    assert text.prefix == 0
    assert len(text.training) + len(text.held_out) == 10
    assert (text.training == text.training[0]).all()


@pytest.mark.parametrize("length", [0, 1, 2049])
def test_windows_that_the_model_does_not_hold_are_refused(tiny_model, tmp_path, length):
    """From two tokens to the context of the model."""
    with pytest.raises(ConfigError, match="window"):
        PublicText.read(tmp_path / "text", Checkpoint.open(tiny_model), length)


def test_unreadable_texts_are_refused(tiny_model, tmp_path):
    """Missing, not UTF-8 and too short; no message shows any of it."""
    checkpoint, file = Checkpoint.open(tiny_model), tmp_path / "text"
    with pytest.raises(ConfigError, match="cannot be read"):
        PublicText.read(file, checkpoint, 8)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        PublicText.read(file, checkpoint, 8)
    file.write_text("SECRET", encoding="utf-8")
    with pytest.raises(ConfigError, match="two windows") as caught:
        PublicText.read(file, checkpoint, 8)
    assert "SECRET" not in str(caught.value)


def test_a_model_without_tokenizer_is_refused(tiny_model, tmp_path):
    """Text cannot be read without one."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    (tmp_path / "text").write_text("text" * 10, encoding="utf-8")
    with pytest.raises(CheckpointError, match="tokenizer"):
        PublicText.read(tmp_path / "text", Checkpoint.open(tmp_path), 8)
