"""Soft prompts trained over the wire: the unsplit computation's gradients, kept and served."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import torch
from tests.training_client import LORA, TrainingClient, some_rows
from tests.trunk_client import BLOCKS, HIDDEN

from fedsea.errors import ConfigError, PermissionDenied
from fedsea.model.adapters import CONFIG
from fedsea.model.attention import RaggedBatch
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import AdaptedRows, Adapter, LoraConfig
from fedsea.model.optimization import AdamWConfig, AdapterOptimizer, step_generator
from fedsea.model.partition import Span
from fedsea.model.prompts import SoftPrompt, read_prompt, write_prompt
from fedsea.model.spans import Placement, load_trunk

ROWS = 5
SEED = 7
CPU = torch.device("cpu")

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    """The engine lives on a loop of asyncio."""
    return "asyncio"


@pytest.fixture
def training(serving, tmp_path):
    """A service that trains, and checks afterwards that nothing is held."""

    @asynccontextmanager
    async def serve(sections=None, **keys):
        section = {"folder": str(tmp_path / "store"), "threads": 1, **keys}
        async with serving(training=section, **(sections or {})) as service:
            yield service
            budget = service.training._services.budget
        assert (budget.kept, budget.pending) == (0, 0)

    return serve


class Reference:
    """The same training without a server: the prompt in front of rows, run through all blocks."""

    def __init__(self, folder, first, lora):
        self.trunk = load_trunk(Checkpoint.open(folder), Span(1, BLOCKS), Placement())
        chosen = torch.randint(len(first), (ROWS,), generator=step_generator(SEED, 0, 1))
        self.prompt = SoftPrompt(first[chosen], 1)
        parameters = {"prompt/rows": self.prompt.rows}
        self.adapter = None
        if lora:
            config = LoraConfig(rank=2, alpha=4.0, targets=("down_proj", "q_proj"))
            chance = step_generator(SEED, 0, 0)
            linears = self.trunk.linears()
            self.adapter = Adapter.fresh(config, self.trunk.span, linears, chance)
            self.trunk.accept(self.adapter)
            named = self.adapter.named_parameters()
            parameters = {f"adapter/{name}": one for name, one in named} | parameters
        self.optimizer = AdapterOptimizer(parameters, AdamWConfig())

    def hidden(self, rows, counts):
        """Rows behind the blocks, those of the prompt left out."""
        longer = self.prompt.prepended(rows, counts)
        adapted = () if self.adapter is None else (AdaptedRows(0, len(longer), self.adapter),)
        batch = RaggedBatch.whole([ROWS + count for count in counts], CPU, adapted)
        return self.prompt.stripped(self.trunk.run(longer, batch), counts)

    def backward(self, rows, counts):
        """Rows behind the trunk, and the gradient of their sum of squares."""
        leaf = rows.clone().requires_grad_()
        hidden = self.hidden(leaf, counts)
        hidden.square().sum().backward()
        return hidden.detach(), leaf.grad


@pytest.mark.parametrize("lora", [False, True], ids=["alone", "with lora"])
@pytest.mark.parametrize("kept_rows", [4096, 0], ids=["kept", "computed again"])
async def test_steps_are_those_of_the_unsplit_computation(
    training, fingerprint, checkpoint_folder, kept_rows, lora
):
    """Activations, gradients of rows, norms and the prompt itself, over three ragged steps."""
    options = {"lora": LORA if lora else None, "prompt_rows": ROWS, "seed": SEED}
    batches, counts = [some_rows(9, number) for number in (1, 2, 3)], (5, 4)
    reference = Reference(checkpoint_folder, batches[0], lora)
    async with training(kept_rows=kept_rows) as service:
        client = await TrainingClient.open(service, fingerprint, **options)
        for number, batch in enumerate(batches, start=1):
            hidden, gradient = reference.backward(batch, counts)
            forward, found = await client.forward(batch, counts)
            torch.testing.assert_close(found, hidden, rtol=1e-5, atol=1e-5)
            back = await client.backward(forward, 2 * found)
            torch.testing.assert_close(back, gradient, rtol=1e-4, atol=1e-5)
            (entry,) = service.training._entries.values()
            ours = entry.live.run.prompt.rows.grad
            expected = reference.prompt.rows.grad
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
            stepped = await client.take_step(number, max_grad_norm=0.5)
            assert stepped.applied
            norm = reference.optimizer.apply(0.1, 0.5)
            assert stepped.grad_norm == pytest.approx(norm, rel=1e-4)
        found = entry.live.run.prompt.rows
        torch.testing.assert_close(found, reference.prompt.rows, rtol=1e-3, atol=1e-4)
        await client.close()


async def test_a_training_goes_on_from_what_was_saved(training, fingerprint, tmp_path):
    """Four steps at once and two steps twice, with another server in between, are equal bits."""
    found = []
    for name, breaks in (("whole", False), ("broken", True)):
        options = {"lora": None, "prompt_rows": ROWS, "adapter": name}

        async def steps(numbers, options=options, **more):
            async with training() as service:
                client = await TrainingClient.open(service, fingerprint, **options, **more)
                for number in numbers:
                    forward, rows = await client.forward(some_rows(8, number), (3, 5))
                    await client.backward(forward, rows)
                    await client.take_step(number)
                await client.save(numbers[-1])
                await client.close()

        if breaks:
            await steps((1, 2))
            await steps((3, 4), resume_steps=(2,))
        else:
            await steps((1, 2, 3, 4))
        folder = tmp_path / "store" / "local" / name / "step-00000004" / "prompt"
        found.append(read_prompt(folder))
    assert torch.equal(found[0].rows, found[1].rows)
    found[0].check_fits(HIDDEN, 1, fingerprint)


async def test_what_was_trained_is_served_by_its_name(
    training, fingerprint, connect, checkpoint_folder, tmp_path
):
    """To its tenant, behind the operator's prompts; with and without the adapter beside it."""
    batch = some_rows(8, 1)
    reference = Reference(checkpoint_folder, batch, lora=True)
    write_prompt(tmp_path / "own", SoftPrompt(torch.ones(2, HIDDEN), 1), "tiny")
    own = {"folder": str(tmp_path / "own"), "tenants": ["*"]}
    async with training({"prompts": {"shared": own}}) as service:
        client = await TrainingClient.open(service, fingerprint, prompt_rows=ROWS)
        forward, rows = await client.forward(batch)
        await client.backward(forward, rows)
        await client.take_step(1)
        await client.save(1)
        await client.close()
        trained = read_prompt(tmp_path / "store/local/clinic/step-00000001/prompt")
        with torch.no_grad():
            reference.prompt.rows.copy_(trained.rows)
            reference.adapter = None
            expected = reference.hidden(batch, [8])

        session = await connect(service, span=(1, BLOCKS), prompt="clinic")
        await session.begin()
        found = await session.run(batch)
        await session.close()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

        both = await connect(service, span=(1, BLOCKS), prompt="clinic", adapter="clinic")
        await both.begin()
        assert not torch.allclose(await both.run(batch), expected, atol=1e-3)
        await both.close()

        with pytest.raises(PermissionDenied, match="no soft prompt of that name"):
            await connect(service, "globex", span=(1, BLOCKS), prompt="clinic")
        with pytest.raises(PermissionDenied, match="no soft prompt of that name"):
            await connect(service, span=(1, BLOCKS), prompt="../local/clinic")
        with pytest.raises(ConfigError, match="use bottom=1"):
            await connect(service, span=(2, BLOCKS), prompt="clinic")
        shared = await connect(service, "globex", span=(1, BLOCKS), prompt="shared")
        await shared.close()


async def test_an_adapter_alone_is_no_prompt(training, fingerprint, connect, tmp_path):
    """A name under which no prompt was trained is none of a prompt."""
    async with training() as service:
        client = await TrainingClient.open(service, fingerprint)
        forward, rows = await client.forward(some_rows(4, 1))
        await client.backward(forward, rows)
        await client.take_step(1)
        await client.save(1)
        await client.close()
        assert (tmp_path / "store/local/clinic/step-00000001" / CONFIG).exists()
        with pytest.raises(PermissionDenied, match="no soft prompt"):
            await connect(service, span=(1, BLOCKS), prompt="clinic")
