"""A LoRA adapter through the cut: the answers of PEFT on the unsplit model, for its tenants only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fedsea.client.llm import LLM
from fedsea.client.local import LocalParts
from fedsea.errors import CheckpointError, PermissionDenied
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.model.spans import Placement
from fedsea.transport.base import LOCAL_TENANT

PROMPT = [5, 9, 14, 7, 21]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """A random PEFT adapter of the tiny model that changes its answers."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(3)
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    adapted = get_peft_model(model, PeftConfig(r=4, lora_alpha=8, target_modules=targets))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def with_adapter(tiny_model, adapter):
    """What PEFT answers greedily."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    peft = PeftModel.from_pretrained(model, adapter).eval()

    def answer(ids):
        prompt = torch.tensor([ids])
        whole = peft.generate(
            input_ids=prompt,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            attention_mask=torch.ones_like(prompt),
        )
        return whole[0, prompt.shape[1] :].tolist()

    return answer


def served(adapter, *tenants):
    """Settings of a server that has the adapter for some tenants."""
    return {"adapters": {"notes": {"folder": str(adapter), "tenants": list(tenants)}}}


def answer(llm) -> list[int]:
    """The greedy answer to the prompt."""
    return list(llm.generate(PROMPT, max_new_tokens=NEW_TOKENS).samples[0].token_ids)


def test_answers_are_those_of_peft(make_split, adapter, with_adapter, greedy):
    """Greedy tokens through three parts of an adapter equal PEFT's, and not the base model's."""
    split = make_split(served(adapter, LOCAL_TENANT), adapter=adapter, trunk_adapter="notes")

    found = answer(split.llm)

    assert found == with_adapter(PROMPT)
    assert found != greedy(PROMPT, NEW_TOKENS)
    assert split.notices == []


def test_sessions_with_and_without_it_run_together(
    make_split, adapter, with_adapter, greedy, tiny_model
):
    """Sessions of one server at the same time, some with the adapter, each get their own answer."""
    split = make_split(served(adapter, LOCAL_TENANT), adapter=adapter, trunk_adapter="notes")
    checkpoint = Checkpoint.open(tiny_model)
    parts = LocalParts.load(checkpoint, Partition(1, 1), Placement(), 2048)
    base = replace(split.llm.split, adapter="", parts=parts)
    plain = LLM(checkpoint, base, split.llm.tokenizer, split.llm.background)

    pending = [
        llm.submit([PROMPT] * 2, max_new_tokens=NEW_TOKENS) for llm in (split.llm, plain) * 3
    ]

    expected = [with_adapter(PROMPT), greedy(PROMPT, NEW_TOKENS)] * 3
    found = [
        [list(completion.samples[0].token_ids) for completion in each.result()] for each in pending
    ]
    assert found == [[answer, answer] for answer in expected]


@pytest.mark.parametrize("name", ["notes", "letters"], ids=["another tenant's", "nobody's"])
def test_an_adapter_of_others_cannot_be_named(make_split, adapter, name):
    """Whether a name exists for somebody else cannot be told from the refusal."""
    split = make_split(served(adapter, "globex"), adapter=adapter, trunk_adapter=name)

    with pytest.raises(PermissionDenied, match="no adapter of that name is served to this tenant"):
        answer(split.llm)


def test_a_forgotten_half_is_noticed(make_split, adapter):
    """Blocks that the server computes without the adapter are named."""
    split = make_split(served(adapter, LOCAL_TENANT), adapter=adapter)

    assert any("trunk_adapter" in line for line in split.notices)


def test_missing_adapter_is_an_error_of_ours(make_split, tmp_path):
    """At the client and at the server the missing file is named."""
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is not there"):
        make_split(adapter=tmp_path)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is not there"):
        make_split(served(tmp_path, LOCAL_TENANT))
