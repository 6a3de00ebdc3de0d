"""A soft prompt at the server, used through the cut: PEFT's answers, and those of an unsplit run."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from tests.conftest import memory_config
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from fedsea.client.huggingface import SplitForCausalLM
from fedsea.client.llm import LLM
from fedsea.client.training import SplitForTraining
from fedsea.errors import PermissionDenied
from fedsea.evaluation.frozen import FrozenModel
from fedsea.evaluation.victim import ServerHere
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.model.prompts import SoftPrompt, read_prompt, write_prompt
from fedsea.server import loading
from fedsea.server.service import TrunkService
from fedsea.transport.base import LOCAL_TENANT
from fedsea.transport.recording import Direction
from fedsea.wire.messages import Open

PROMPT = [5, 9, 14, 7, 21]
LONGER = [8, 3, 30, 12, 12, 6, 41]
NEW_TOKENS = 12
ROWS = 6


def written(folder, entrance):
    """A random prompt that changes answers, and its section of a server's settings."""
    chance = torch.Generator().manual_seed(entrance)
    prompt = SoftPrompt(torch.randn(ROWS, 48, generator=chance), entrance)
    write_prompt(folder, prompt, "tiny")
    section = {"folder": str(folder), "tenants": [LOCAL_TENANT]}
    return prompt, {"prompts": {"calm": section}}


def unsplit_answer(tiny_model, partition, prompt, ids):
    """Greedy tokens of the whole model in one process, all rows anew at every step."""
    model = FrozenModel(Checkpoint.open(tiny_model), partition)
    found = list(ids)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            rows = model.rows(torch.tensor([found]))
            found.append(int(model.logits(model.outputs(rows, prompt))[0, -1].argmax()))
    return found[len(ids) :]


def answers(llm, *prompts):
    """Greedy tokens for prompts in one request."""
    pending = llm.submit([list(prompt) for prompt in prompts], max_new_tokens=NEW_TOKENS)
    return [list(completion.samples[0].token_ids) for completion in pending.result()]


def test_answers_are_those_of_peft(make_split, tiny_model, tmp_path, greedy):
    """All blocks at the server: prompt tuning on the unsplit model, token for token."""
    _, server = written(tmp_path, 0)
    split = make_split(server, partition=(0, 0), trunk_prompt="calm")
    whole = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    peft = PeftModel.from_pretrained(whole, tmp_path).eval()
    expected = list(PROMPT)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            expected.append(int(peft(torch.tensor([expected])).logits[0, -1].argmax()))

    (found,) = answers(split.llm, PROMPT)

    assert found == expected[len(PROMPT) :]
    assert found != greedy(PROMPT, NEW_TOKENS)


@pytest.mark.parametrize("partition", [Partition(1, 1), Partition(2, 0)])
def test_answers_are_those_of_the_unsplit_computation(make_split, tiny_model, tmp_path, partition):
    """Prompts of several lengths in one request, their sequences behind one soft prompt."""
    prompt, server = written(tmp_path, partition.bottom)
    split = make_split(server, partition=partition, trunk_prompt="calm")

    found = answers(split.llm, PROMPT, LONGER, PROMPT)

    expected = [unsplit_answer(tiny_model, partition, prompt, ids) for ids in (PROMPT, LONGER)]
    assert found == [expected[0], expected[1], expected[0]]


def test_samples_behind_a_prompt_do_not_depend_on_each_other(make_split, tmp_path):
    """Forks of one prompt's rows: the same sample alone and among others."""
    _, server = written(tmp_path, 1)
    split = make_split(server, trunk_prompt="calm")
    sampled = {"max_new_tokens": 10, "temperature": 1.0, "seed": 4}
    several = split.llm.generate(PROMPT, n=3, **sampled)
    alone = split.llm.generate(PROMPT, **sampled)
    assert several.samples[0].token_ids == alone.samples[0].token_ids
    assert len({sample.token_ids for sample in several.samples}) == 3


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_beam_search_is_that_of_peft(make_split, tiny_model, tmp_path):
    """Beams fork and are dropped at every step, behind the prompt."""
    _, server = written(tmp_path, 0)
    split = make_split(server, partition=(0, 0), trunk_prompt="calm")
    whole = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    peft = PeftModel.from_pretrained(whole, tmp_path).eval()
    ids = torch.tensor([PROMPT])
    options = {
        "num_beams": 3, "max_new_tokens": 8, "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    found = SplitForCausalLM(split.llm).generate(ids, **options)
    expected = peft.generate(input_ids=ids, **options)
    assert found.tolist() == expected.tolist()


def test_a_broken_connection_is_not_noticed(make_split, wire, tiny_model, tmp_path):
    """The next session asks for the same prompt, and the answer is the same."""
    prompt, server = written(tmp_path, 1)
    split = make_split(server, trunk_prompt="calm")
    wire.cut_at = Direction.DOWN, wire.counts[Direction.DOWN] + 5

    (found,) = answers(split.llm, PROMPT)

    assert found == unsplit_answer(tiny_model, Partition(1, 1), prompt, PROMPT)
    assert [event.prompt for event in wire.of(Open)] == ["calm", "calm"]


def test_a_prompt_of_others_cannot_be_named(make_split, tmp_path):
    """The error comes with the first request."""
    _, server = written(tmp_path, 1)
    split = make_split(server, trunk_prompt="loud")
    with pytest.raises(PermissionDenied, match="no soft prompt"):
        answers(split.llm, PROMPT)


def test_a_prompt_that_a_client_had_trained_is_its_own_afterwards(tiny_model, tmp_path):
    """Two steps through bottom, trunk and top lower the loss as unsplit; then answers name it."""
    partition, ids = Partition(1, 1), torch.tensor([*PROMPT, *LONGER])
    config = memory_config(tiny_model, training={"folder": str(tmp_path / "store")})
    trunk = loading.load(config)

    def server():
        return ServerHere(lambda: TrunkService(config, trunk))

    with SplitForTraining.connect(
        tiny_model, {"memory": server}, name="notes", partition=partition, prompt_rows=ROWS
    ) as model:
        losses = []
        for _ in range(2):
            loss = cross_entropy(model.logits([ids])[:-1], ids[1:])
            loss.backward()
            model.step(0.05)
            losses.append(loss.item())
        model.save()

    prompt = read_prompt(tmp_path / "store/local/notes/step-00000002/prompt")
    whole = FrozenModel(Checkpoint.open(tiny_model), partition)
    with torch.no_grad():
        rows = whole.rows(ids[None])
        after = cross_entropy(whole.logits(whole.outputs(rows, prompt))[0, :-1], ids[1:]).item()
    assert after < losses[1] < losses[0]
    with LLM.connect(
        tiny_model, {"memory": server}, partition=partition, trunk_prompt="notes"
    ) as llm:
        (found,) = answers(llm, PROMPT)
    assert found == unsplit_answer(tiny_model, partition, prompt, PROMPT)
