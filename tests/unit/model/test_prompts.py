"""Soft prompts at the entrance of the trunk: PEFT's numbers, PEFT's files, gradients, refusals."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedsea.errors import CheckpointError, ConfigError, FingerprintMismatch
from fedsea.model.adapters import CONFIG, TENSORS
from fedsea.model.attention import RaggedBatch
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.model.prompts import SoftPrompt, read_prompt, write_prompt
from fedsea.model.spans import (
    Placement,
    embedding_factor,
    load_bottom,
    load_top,
    load_trunk,
)

CPU = torch.device("cpu")
HIDDEN, ROWS = 48, 5
IDS = (torch.tensor([3, 9, 4, 17, 5, 11]), torch.tensor([8, 2, 7]))
# One that keeps embeddings as they are, and all ways in which others multiply them.
FAMILIES = ("llama", "gemma", "granite", "afmoe")


def random_prompt(entrance=0, count=ROWS, **options) -> SoftPrompt:
    """A prompt of visible size."""
    chance = torch.Generator().manual_seed(1)
    return SoftPrompt(torch.randn(count, HIDDEN, generator=chance), entrance, **options)


def split_logits(folder, prompt, partition):
    """Logits of both texts through bottom, trunk with the prompt, and top."""
    checkpoint = Checkpoint.open(folder)
    blocks = checkpoint.num_blocks
    bottom = load_bottom(checkpoint, partition.bottom_span(), Placement())
    trunk = load_trunk(checkpoint, partition.trunk_span(blocks), Placement())
    top = load_top(checkpoint, partition.top_span(blocks), Placement())
    counts = [len(ids) for ids in IDS]
    rows = bottom.run(torch.cat(IDS), RaggedBatch.whole(counts, CPU))
    longer = [prompt.count + count for count in counts]
    rows = trunk.run(prompt.prepended(rows, counts), RaggedBatch.whole(longer, CPU))
    rows = prompt.stripped(rows, counts)
    found = top.run(rows, RaggedBatch.whole(counts, CPU), torch.arange(sum(counts)))
    return found.split(counts)


def peft_model(folder, prompt_folder=None):
    """PEFT's prompt tuning on the unsplit model: random, or loaded."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if prompt_folder is not None:
        return PeftModel.from_pretrained(model, prompt_folder).eval()
    torch.manual_seed(2)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=ROWS)
    return get_peft_model(model, config).eval()


def peft_logits(model):
    """Logits of both texts, without those of the prompt's rows."""
    return [model(ids[None]).logits[0, ROWS:] for ids in IDS]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_peft_gives_its_logits(tiny_folder, tmp_path, family):
    """The whole model as trunk: what PEFT wrote is read and gives PEFT's logits."""
    folder = tiny_folder(family)
    whole = peft_model(folder)
    whole.save_pretrained(tmp_path)
    factor = embedding_factor(Checkpoint.open(folder).config)
    prompt = read_prompt(tmp_path, factor)

    with torch.no_grad():
        found = split_logits(folder, prompt, Partition(0, 0))
        expected = peft_logits(whole)

    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_prompt_of_ours_loads_in_peft(tiny_folder, tmp_path):
    """Without a warning, and with the logits of the split model."""
    folder = tiny_folder("llama")
    prompt = random_prompt(model="ab" * 32)
    write_prompt(tmp_path, prompt, "tiny")

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        expected = peft_logits(peft_model(folder, tmp_path))
        found = split_logits(folder, prompt, Partition(0, 0))

    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_warns_about_a_later_entrance(tiny_folder, tmp_path):
    """PEFT has no such place: it names the key that it leaves out."""
    write_prompt(tmp_path, random_prompt(2), "tiny")

    with pytest.warns(UserWarning, match="fedsea_entrance"):
        peft_model(tiny_folder("llama"), tmp_path)


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_gradients_of_a_prompt_equal_peft(tiny_folder, tmp_path, family):
    """Of a loss over both texts, through ragged rows."""
    folder = tiny_folder(family)
    whole = peft_model(folder)
    whole.save_pretrained(tmp_path)
    prompt = read_prompt(tmp_path, embedding_factor(Checkpoint.open(folder).config))

    sum(logits.square().mean() for logits in peft_logits(whole)).backward()
    sum(
        logits.square().mean() for logits in split_logits(folder, prompt, Partition(0, 0))
    ).backward()

    (theirs,) = (p.grad for n, p in whole.named_parameters() if "prompt_encoder" in n)
    assert prompt.rows.grad is not None
    torch.testing.assert_close(prompt.rows.grad, theirs, rtol=1e-3, atol=1e-5)


def test_what_is_put_in_front_is_taken_off(tiny_folder):
    """In a trunk in the middle, a text's rows do not depend on its neighbours."""
    folder, prompt = tiny_folder("llama"), random_prompt(2)
    with torch.no_grad():
        both = split_logits(folder, prompt, Partition(2, 1))
        none = split_logits(folder, random_prompt(2, count=1), Partition(2, 1))
    assert [len(part) for part in both] == [len(ids) for ids in IDS]
    assert not torch.allclose(both[0], none[0], atol=1e-2)


@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=5), count=st.integers(1, 7))
def test_stripping_undoes_prepending(counts, count):
    """For any lengths, and gradients reach both."""
    prompt = random_prompt(1, count)
    rows = torch.randn(sum(counts), HIDDEN, requires_grad=True)
    longer = prompt.prepended(rows, counts)
    assert len(longer) == sum(counts) + count * len(counts)
    assert torch.equal(prompt.stripped(longer, counts), rows)
    longer.sum().backward()
    assert rows.grad is not None
    assert prompt.rows.grad is not None
    assert torch.equal(rows.grad, torch.ones_like(rows))
    assert torch.equal(prompt.rows.grad, torch.full_like(prompt.rows, float(len(counts))))


@pytest.mark.parametrize("entrance", [0, 3])
def test_files_keep_everything(tmp_path, entrance):
    """Rows bit for bit, the place of entry and the model; the factor is the model's own."""
    prompt = random_prompt(entrance, model="ab" * 32, factor=3.0)
    write_prompt(tmp_path, prompt, "tiny")
    found = read_prompt(tmp_path, 3.0)
    assert torch.equal(found.rows, prompt.rows)
    assert (found.entrance, found.model) == (entrance, "ab" * 32)
    assert torch.equal(found.entering(torch.float32), prompt.rows * (1.0 if entrance else 3.0))


def test_half_precision_files_are_read(tmp_path):
    """A prompt that was kept in bf16 is used in fp32."""
    write_prompt(tmp_path, random_prompt(), "tiny")
    rows = load_file(tmp_path / TENSORS)["prompt_embeddings"].bfloat16()
    save_file({"prompt_embeddings": rows}, tmp_path / TENSORS)
    assert read_prompt(tmp_path).rows.dtype is torch.float32


def test_a_prompt_fits_one_model_and_one_cut():
    """The error names what differs."""
    prompt = random_prompt(1, model="ab" * 32)
    prompt.check_fits(HIDDEN, 1, "ab" * 32)
    random_prompt(1).check_fits(HIDDEN, 1, "ab" * 32)
    with pytest.raises(ConfigError, match="rows of 48 numbers"):
        prompt.check_fits(64, 1, "ab" * 32)
    with pytest.raises(ConfigError, match="enters block 1"):
        prompt.check_fits(HIDDEN, 2, "ab" * 32)
    with pytest.raises(FingerprintMismatch, match="abababababab"):
        prompt.check_fits(HIDDEN, 1, "cd" * 32)


@pytest.mark.parametrize(
    "rows", [torch.zeros(0, HIDDEN), torch.zeros(HIDDEN), torch.full((2, HIDDEN), torch.nan)]
)
def test_rows_that_are_no_prompt_are_refused(rows):
    """None at all, another shape, or not finite."""
    with pytest.raises(ConfigError, match="soft prompt"):
        SoftPrompt(rows, 0)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"peft_type": "LORA"}, ConfigError, "PROMPT_TUNING"),
        ({"num_virtual_tokens": ROWS + 1}, CheckpointError, "has no 6 rows"),
        ({"num_virtual_tokens": None}, CheckpointError, "lacks num_virtual_tokens"),
        ({"fedsea_entrance": -1}, CheckpointError, "lacks num_virtual_tokens, or a number"),
        ({"fedsea_entrance": "1"}, CheckpointError, "lacks num_virtual_tokens, or a number"),
    ],
)
def test_configurations_that_cannot_be_used_are_refused(tmp_path, changed, error, message):
    """Another kind of adapter, and numbers that contradict the rows."""
    write_prompt(tmp_path, random_prompt(), "tiny")
    described = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**described, **changed}))
    with pytest.raises(error, match=message):
        read_prompt(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompt_embeddings": torch.full((ROWS, HIDDEN), torch.inf)}, "NaN or infinity"),
        ({"prompt_embeddings": torch.zeros(ROWS * HIDDEN)}, "has no 5 rows"),
        ({"prompt_embeddings": torch.zeros(ROWS, HIDDEN, dtype=torch.int8)}, "no floating-point"),
        ({"other": torch.zeros(ROWS, HIDDEN)}, "holds no prompt_embeddings"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(tmp_path, tensors, message):
    """Whatever else the file holds."""
    write_prompt(tmp_path, random_prompt(), "tiny")
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(CheckpointError, match=message):
        read_prompt(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    """The one that is not there, and the one that is no safetensors."""
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is not there"):
        read_prompt(tmp_path)
    write_prompt(tmp_path, random_prompt(), "tiny")
    (tmp_path / TENSORS).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_prompt(tmp_path)
    (tmp_path / TENSORS).unlink()
    with pytest.raises(CheckpointError, match="is not there"):
        read_prompt(tmp_path)
