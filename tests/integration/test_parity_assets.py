"""Pretrained checkpoints: greedy text over the split equals that of the unsplit model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.conftest import memory_config
from transformers import AutoModelForCausalLM

from fedsea.client.llm import LLM
from fedsea.model.checkpoint import Checkpoint
from fedsea.server.service import TrunkService
from fedsea.transport.memory import MemoryChannel

ASSETS = Path(__file__).parents[2].parent / "shared" / "assets" / "models"
MODELS = ("stories260K", "tinystories656K")
PROMPTS = ("Once upon a time", "Lily and Tom went to the park. They", "The dog")
NEW_TOKENS = 64

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not ASSETS.is_dir(), reason="the folder of shared assets is absent"),
]


@pytest.fixture(params=MODELS)
def folder(request):
    """The folder of one checkpoint."""
    path = ASSETS / request.param
    if not path.is_dir():
        pytest.skip(f"{request.param} is not among the shared assets")
    return path


@pytest.fixture
def connect(folder):
    """Connect a client to a server of the checkpoint in this process."""
    made = []

    def connected(**options):
        service = TrunkService.load(memory_config(folder))
        llm = LLM.connect(folder, {"memory": lambda: MemoryChannel(service)}, **options)
        llm.background.run(service.__aenter__())
        made.append((llm, service))
        return llm

    yield connected
    for llm, service in made:
        llm.background.run(service.__aexit__(None, None, None))
        llm.close()


def unsplit(folder, tokenizer, prompt):
    """Greedy ids of `transformers` in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    whole = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tuple(whole[0, inputs.input_ids.shape[1] :].tolist())


def partitions(folder):
    """Several cuts: no block kept, one on either side or on both, all but one."""
    blocks = Checkpoint.open(folder).num_blocks
    cuts = {(0, 0), (1, 0), (0, 1), (1, 1), (blocks - 1, 0), (1, blocks - 2)}
    return sorted(cut for cut in cuts if sum(cut) < blocks)


def test_greedy_text_equals_the_unsplit_model(folder, connect):
    """With fp32 rows every partition gives exactly the tokens of `transformers`."""
    for partition in partitions(folder):
        llm = connect(partition=partition, codec="fp32", dtype="fp32")
        completions = llm.submit(PROMPTS, max_new_tokens=NEW_TOKENS).result(60)
        for prompt, completion in zip(PROMPTS, completions, strict=True):
            assert completion.token_ids == unsplit(folder, llm.tokenizer, prompt), partition


@pytest.mark.parametrize(("codec", "agreeing"), [("bf16", 4), ("fp16", 16), ("int8", 4)])
def test_smaller_rows_give_sane_text(folder, connect, codec, agreeing):
    """Rounded rows run, begin like the exact text, and stay words."""
    llm = connect(partition=(1, 0), codec=codec, dtype="fp32")
    completion = llm.generate(PROMPTS[0], max_new_tokens=NEW_TOKENS)
    exact = unsplit(folder, llm.tokenizer, PROMPTS[0])
    assert completion.token_ids[:agreeing] == exact[:agreeing]
    assert completion.text.isprintable() or "\n" in completion.text
    assert " " in completion.text
