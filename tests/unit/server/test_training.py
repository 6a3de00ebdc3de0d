"""Trainings over the memory transport: steps are those of the model alone, and nothing is left."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import threading
from contextlib import asynccontextmanager, suppress

import pytest
import torch
from tests.training_client import LORA, TrainingClient, some_rows
from tests.trunk_client import BLOCKS

from fedsea import artifacts
from fedsea.errors import (
    ConfigError,
    ConnectionLost,
    FedseaError,
    PermissionDenied,
    PromptTooLong,
    QuotaExceeded,
    SessionLost,
    StaleStep,
)
from fedsea.model.adapters import read_adapter
from fedsea.model.attention import RaggedBatch
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import AdaptedRows, Adapter, LoraConfig
from fedsea.model.optimization import AdamWConfig, AdapterOptimizer, step_generator
from fedsea.model.partition import Span
from fedsea.model.spans import Placement, load_trunk
from fedsea.server import training_run
from fedsea.server.service import TrunkService
from fedsea.server.training_store import RunKey, TrainingStore
from fedsea.transport.memory import MemoryChannel
from fedsea.wire.codecs import Codec
from fedsea.wire.description import decode_description
from fedsea.wire.messages import Lora, Save, Step


def run(dialogue, seconds=60):
    """Run a dialogue; a hang is a failure."""
    return asyncio.run(asyncio.wait_for(dialogue, seconds))


@pytest.fixture
def training(serving, tmp_path):
    """A service that trains, and checks afterwards that nothing is held."""

    @asynccontextmanager
    async def serve(**keys):
        section = {"folder": str(tmp_path / "store"), "threads": 1, **keys}
        async with serving(training=section) as service:
            yield service
            budget = service.training._services.budget
        assert (budget.kept, budget.pending) == (0, 0)

    return serve


class Reference:
    """The same training without a server."""

    def __init__(self, folder, seed=7, dropout=0.0):
        self.seed = seed
        self.trunk = load_trunk(Checkpoint.open(folder), Span(1, BLOCKS), Placement())
        config = LoraConfig(rank=2, alpha=4.0, targets=("down_proj", "q_proj"), dropout=dropout)
        chance = step_generator(seed, 0, 0)
        self.adapter = Adapter.fresh(config, self.trunk.span, self.trunk.linears(), chance)
        self.trunk.accept(self.adapter)
        self.optimizer = AdapterOptimizer(dict(self.adapter.named_parameters()), AdamWConfig())
        self.passes = 0

    def backward(self, rows, counts=None):
        """Rows behind the trunk and the gradient of their sum of squares."""
        leaf = rows.clone().requires_grad_()
        adapters = (AdaptedRows(0, len(rows), self.adapter),)
        batch = RaggedBatch.whole(counts or [len(rows)], torch.device("cpu"), adapters)
        self.trunk.adapters.generator = step_generator(
            self.seed, self.optimizer.steps + 1, self.passes
        )
        self.passes += 1
        hidden = self.trunk.run(leaf, batch)
        hidden.square().sum().backward()
        return hidden.detach(), leaf.grad

    def step(self, learning_rate=0.1, max_grad_norm=None):
        """One optimizer step; the norm."""
        self.passes = 0
        return self.optimizer.apply(learning_rate, max_grad_norm)


def held(service):
    """Rows that the service holds: kept and pending."""
    budget = service.training._services.budget
    return budget.kept, budget.pending


async def until(is_so):
    """Let others run until something is so."""
    while not is_so():  # noqa: ASYNC110 - the loop's own work, of which nobody tells
        await asyncio.sleep(0)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("kept_rows", [4096, 0])
def test_steps_are_those_of_the_blocks_alone(
    training, fingerprint, checkpoint_folder, dropout, kept_rows
):
    """Activations, gradients and norms of three steps of two batches equal the local ones."""
    reference = Reference(checkpoint_folder, dropout=dropout)
    lora = Lora(rank=2, alpha=4.0, dropout=dropout, targets=LORA.targets)

    async def dialogue():
        async with training(kept_rows=kept_rows) as service:
            client = await TrainingClient.open(service, fingerprint, lora=lora)
            for number in (1, 2, 3):
                batches = some_rows(9, number), some_rows(4, 10 + number)
                sent = [await client.push(batches[0], (5, 4)), await client.push(batches[1])]
                for forward, batch, counts in zip(sent, batches, ((5, 4), (4,)), strict=True):
                    hidden, gradient = reference.backward(batch, counts)
                    found = await client.pull()
                    torch.testing.assert_close(found, hidden, rtol=1e-5, atol=1e-5)
                    if forward == sent[0]:
                        first = found, gradient
                        continue
                    back = await client.backward(forward, 2 * found)
                    torch.testing.assert_close(back, gradient, rtol=1e-5, atol=1e-5)
                back = await client.backward(sent[0], 2 * first[0])
                torch.testing.assert_close(back, first[1], rtol=1e-5, atol=1e-5)
                stepped = await client.take_step(number, max_grad_norm=0.5)
                norm = reference.step(max_grad_norm=0.5)
                assert stepped.applied
                assert stepped.grad_norm == pytest.approx(norm, rel=1e-5)
            await client.close()

    run(dialogue())


def test_equal_inputs_give_equal_bits(training, fingerprint):
    """Two trainings of the same seed with dropout are the same, bit for bit."""
    lora = Lora(rank=2, dropout=0.3, targets=LORA.targets)

    async def dialogue():
        found = []
        async with training() as service:
            for name in ("one", "two"):
                client = await TrainingClient.open(service, fingerprint, adapter=name, lora=lora)
                steps = [await client.train(n, some_rows(12, n)) for n in (1, 2)]
                found.append(steps)
                await client.close()
        for (h, g, s), (h2, g2, s2) in zip(*found, strict=True):
            assert torch.equal(h, h2)
            assert torch.equal(g, g2)
            assert s == s2

    run(dialogue())


def test_an_evaluation_changes_and_keeps_nothing(training, fingerprint, checkpoint_folder):
    """A Forward without gradients has no dropout, holds no rows, and leaves the step as it is."""
    reference = Reference(checkpoint_folder)
    expected = reference.backward(some_rows(5))[0]
    lora = Lora(rank=2, alpha=4.0, dropout=0.5, targets=LORA.targets)

    async def dialogue():
        async with training(pending_rows=4) as service:
            client = await TrainingClient.open(service, fingerprint, lora=lora)
            _, found = await client.forward(some_rows(5), no_grad=True)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert held(service) == (0, 0)
            await client.close()

    run(dialogue())


def test_without_an_adapter_rows_and_gradients_pass(training, fingerprint, checkpoint_folder):
    """A frozen trunk gives gradients; its steps only count."""
    reference = Reference(checkpoint_folder)
    expected = reference.backward(some_rows(5))

    async def dialogue():
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint, lora=None)
            hidden, gradient, stepped = await client.train(1, some_rows(5))
            torch.testing.assert_close(hidden, expected[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(gradient, expected[1], rtol=1e-5, atol=1e-5)
            assert (stepped.grad_norm, stepped.applied) == (0.0, True)
            assert await client.save(1) == ""
            await client.close()

    run(dialogue())


def test_a_repeated_step_is_applied_once(training, fingerprint):
    """The same number again is answered as before, also in a later session, and changes nothing."""

    async def dialogue():
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint)
            _, _, first = await client.train(1, some_rows(6))
            assert await client.take_step(1) == first
            _, after = await client.forward(some_rows(3), no_grad=True)
            await client.vanish()
            client = await TrainingClient.open(service, fingerprint, resume_steps=(0, 1))
            assert client.step == 1
            assert await client.take_step(1) == first
            _, again = await client.forward(some_rows(3), no_grad=True)
            assert torch.equal(after, again)
            await client.close()

    run(dialogue())


@pytest.mark.parametrize("number", [1, 4])
def test_stale_steps_end_the_session(training, fingerprint, number):
    """A step that is neither the next nor the last is refused, and the training goes on after."""

    async def dialogue():
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint)
            for done in (1, 2):
                await client.train(done, some_rows(6))
            with pytest.raises(StaleStep, match=f"step {number} was asked for and 2 are done"):
                await client.take_step(number)
            client = await TrainingClient.open(service, fingerprint, resume_steps=(2,))
            assert client.step == 2
            with pytest.raises(StaleStep, match="step 1 is to be saved and the server is at 2"):
                await client.save(1)

    run(dialogue())


def test_a_step_redone_is_the_same(training, fingerprint):
    """After Reset the step's forwards draw the same dropout and its gradients start anew."""
    lora = Lora(rank=2, dropout=0.3, targets=LORA.targets)

    async def dialogue():
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint, lora=lora)
            forward, hidden = await client.forward(some_rows(8))
            await client.backward(forward, 2 * hidden)
            await client.forward(some_rows(4, 3))
            await client.reset()
            again, gradient, stepped = await client.train(1, some_rows(8))
            other = await TrainingClient.open(service, fingerprint, adapter="other", lora=lora)
            expected = await other.train(1, some_rows(8))
            assert torch.equal(again, hidden)
            assert torch.equal(gradient, expected[1])
            assert stepped == expected[2]
            await client.close()
            await other.close()

    run(dialogue())


def test_a_gradient_that_overflows_is_not_applied(training, fingerprint):
    """What cannot be sent is answered with zeros; the step is not done and can be taken again."""

    async def dialogue():
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint, gradient_codec=Codec.FP16)
            # The norms in the blocks divide by the size of rows: gradients of small rows are large.
            forward, _ = await client.forward(1e-3 * some_rows(4))
            small = await client.backward(forward, 1e-3 * some_rows(4, 1))
            forward, _ = await client.forward(1e-3 * some_rows(4))
            found = await client.backward(forward, 1e4 * some_rows(4, 1))
            assert small.abs().max() > 0
            assert not found.any()
            stepped = await client.take_step(1)
            assert (stepped.applied, stepped.grad_norm) == (False, math.inf)
            _, _, stepped = await client.train(1, some_rows(4))
            assert stepped.applied
            await client.close()

    run(dialogue())


def test_a_gradient_that_is_not_finite_is_not_applied(training, fingerprint):
    """Gradients that overflow in the blocks leave the adapter and the step as they were."""

    async def dialogue():
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint)
            _, before = await client.forward(some_rows(3), no_grad=True)
            forward, hidden = await client.forward(some_rows(4))
            await client.backward(forward, torch.full_like(hidden, 3e38))
            stepped = await client.take_step(1)
            assert (stepped.applied, stepped.grad_norm) == (False, math.inf)
            _, after = await client.forward(some_rows(3), no_grad=True)
            assert torch.equal(before, after)
            assert (await client.train(1, some_rows(4)))[2].applied
            await client.close()

    run(dialogue())


def test_a_tiny_scale_does_not_make_an_infinite_norm(training, fingerprint):
    """A finite gradient whose unscaled square overflows is not applied, and leaves no trace."""

    async def dialogue():
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint)
            forward, hidden = await client.forward(some_rows(4))
            await client.backward(forward, 1e12 * hidden)
            stepped = await client.take_step(1, scale=2.0**-40)
            assert (stepped.applied, stepped.grad_norm) == (False, math.inf)
            assert (await client.train(1, some_rows(4)))[2].applied
            assert torch.isfinite((await client.forward(some_rows(4), no_grad=True))[1]).all()
            await client.close()

    run(dialogue())


def test_the_scale_of_gradients_is_taken_back(training, fingerprint):
    """Gradients that are a thousand times too large make the same step."""

    async def dialogue():
        async with training() as service:
            norms = []
            for name, scale in (("one", 1.0), ("two", 1024.0)):
                client = await TrainingClient.open(service, fingerprint, adapter=name)
                forward, hidden = await client.forward(some_rows(4))
                await client.backward(forward, scale * hidden)
                norms.append((await client.take_step(1, scale=scale)).grad_norm)
                await client.close()
            assert norms[0] == pytest.approx(norms[1], rel=1e-6)

    run(dialogue())


@pytest.mark.parametrize("end", ["vanish", "close", "discard"])
def test_rows_are_free_when_nobody_waits_for_them(training, fingerprint, end):
    """A client that goes away between Forward and Backward, or gives up, holds nothing."""

    async def dialogue():
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint)
            number, _ = await client.forward(some_rows(7))
            assert held(service) == (7, 7)
            if end == "discard":
                await client.discard(number)
            else:
                await getattr(client, end)()
            await until(lambda: held(service) == (0, 0))
            if end == "discard":
                await client.close()

    run(dialogue())


def test_a_client_that_vanishes_while_it_is_computed_for(training, fingerprint):
    """What was begun is finished and forgotten; the tenant goes on in a new session."""

    async def dialogue():
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint)
            for seed in range(6):
                await client.push(some_rows(200, seed))
            await client.vanish()
            client = await TrainingClient.open(service, fingerprint)
            assert held(service) == (0, 0)
            assert (await client.train(1, some_rows(4)))[2].applied
            await client.close()

    run(dialogue())


def test_beyond_the_kept_rows_the_forward_is_computed_again(training, fingerprint):
    """Only rows within the quota are kept; gradients are the same for the others."""

    async def dialogue():
        async with training(kept_rows=10) as service:
            client = await TrainingClient.open(service, fingerprint)
            first, hidden = await client.forward(some_rows(8))
            assert held(service) == (8, 8)
            second, again = await client.forward(some_rows(8))
            assert held(service) == (8, 16)
            torch.testing.assert_close(hidden, again)
            kept = await client.backward(first, hidden)
            computed_again = await client.backward(second, again)
            torch.testing.assert_close(kept, computed_again)
            await client.close()

    run(dialogue())


def test_pending_rows_are_bounded(training, fingerprint):
    """A tenant that never sends gradients is stopped, over all of its trainings; others are not."""

    async def dialogue():
        async with training(pending_rows=20) as service:
            client = await TrainingClient.open(service, fingerprint, adapter="one")
            second = await TrainingClient.open(service, fingerprint, adapter="two")
            other = await TrainingClient.open(service, fingerprint, tenant="globex")
            await client.forward(some_rows(12))
            with pytest.raises(QuotaExceeded, match=r"holds 12 rows.*asks for 9 more.*quota of 20"):
                await second.forward(some_rows(9))
            await other.forward(some_rows(20))
            await client.close()
            await other.close()

    run(dialogue())


def test_trainings_of_a_tenant_are_bounded(training, fingerprint):
    """In memory and saved count alike; a known name is always welcome."""

    async def dialogue():
        async with training(max_adapters=2) as service:
            for name in ("one", "two"):
                client = await TrainingClient.open(service, fingerprint, adapter=name)
                await client.save(0)
                await client.close()
            with pytest.raises(QuotaExceeded, match="has 2 trainings"):
                await TrainingClient.open(service, fingerprint, adapter="three")
            await (await TrainingClient.open(service, fingerprint, adapter="one")).close()
            other = await TrainingClient.open(service, fingerprint, "globex", adapter="three")
            await other.close()

    run(dialogue())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": Lora(rank=65, targets=("q_proj",))}, "rank of 65 is above 64.*training.max_rank"),
        ({"lora": Lora(targets=("query",))}, "'query' is no linear of these blocks; use down_proj"),
        ({"prompt_rows": 300}, "300 prompt rows are above 256"),
        ({"adapter": "../other"}, "cannot have this name"),
        ({"adapter": ".hidden"}, "cannot have this name"),
        ({"adapter": "a/b"}, "cannot have this name"),
        ({"adapter": "step-00000001"}, "cannot have this name"),
    ],
)
def test_what_cannot_be_trained(training, fingerprint, options, message):
    """Each wrong OpenTraining is refused with the reason and the fix."""

    async def dialogue():
        async with training() as service:
            with pytest.raises(ConfigError, match=message):
                await TrainingClient.open(service, fingerprint, **options)

    run(dialogue())


def test_a_server_without_a_folder_trains_nothing(serving, fingerprint):
    """It says so in its description, and to whoever asks all the same what the operator sets."""

    async def dialogue():
        async with serving() as service:
            assert decode_description(await MemoryChannel(service).describe()).max_forwards == 0
            with pytest.raises(ConfigError, match=r"trains nothing.*training.folder"):
                await TrainingClient.open(service, fingerprint)

    run(dialogue())


def test_int8_weights_are_refused_at_the_start(make_config, tmp_path):
    """They give no gradients; the operator is told before a client is."""
    config = make_config(model={"quantization": "int8"}, training={"folder": str(tmp_path)})
    with pytest.raises(ConfigError, match="int8 gives no gradients"):
        TrunkService.load(config)


def test_a_long_sequence_is_refused(training, fingerprint):
    """Positions end where the model's do."""

    async def dialogue():
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint)
            with pytest.raises(PromptTooLong, match="600 rows was sent and this server holds 512"):
                await client.forward(some_rows(600))

    run(dialogue())


def test_the_later_session_of_a_tenant_takes_over(training, fingerprint):
    """A client that comes back before its old stream has broken is not kept out by itself."""

    async def dialogue():
        async with training() as service:
            old = await TrainingClient.open(service, fingerprint)
            await old.train(1, some_rows(5))
            await old.forward(some_rows(5))
            new = await TrainingClient.open(service, fingerprint, resume_steps=(1,))
            assert new.step == 1
            with pytest.raises(SessionLost, match="has taken over"):
                await old.receive()
            assert held(service) == (0, 0)
            assert (await new.train(2, some_rows(5)))[2].applied
            await new.close()

    run(dialogue())


def test_a_run_stays_in_memory_for_a_while(training, fingerprint):
    """A client that lost its stream goes on from a step that nobody saved; the gradient is gone."""

    async def dialogue():
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint)
            await client.train(1, some_rows(5))
            forward, hidden = await client.forward(some_rows(5, 1))
            await client.backward(forward, 2 * hidden)
            await client.vanish()
            client = await TrainingClient.open(service, fingerprint, resume_steps=(0, 1))
            assert client.step == 1
            _, _, stepped = await client.train(2, some_rows(5, 1))
            whole = await TrainingClient.open(service, fingerprint, adapter="whole")
            await whole.train(1, some_rows(5))
            assert stepped == (await whole.train(2, some_rows(5, 1)))[2]
            await client.close()
            await whole.close()

    run(dialogue())


def test_a_run_is_not_forgotten_during_a_save(training, fingerprint, monkeypatch):
    """A session that opens meanwhile waits for it: two savers would write to one folder."""
    begun, may_end, writing = threading.Event(), threading.Event(), []

    def slow(self, *given):
        writing.append(1)
        begun.set()
        assert may_end.wait(30)
        assert len(writing) == 1
        try:
            return save(self, *given)
        finally:
            writing.pop()

    save = TrainingStore.save
    monkeypatch.setattr(TrainingStore, "save", slow)

    async def dialogue():
        async with training(workers=2, grace_s=0.0) as service:
            client = await TrainingClient.open(service, fingerprint)
            await client.train(1, some_rows(3))
            await client.send(Save(1))
            await asyncio.to_thread(begun.wait, 30)
            await client.vanish()
            while service.num_sessions:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)  # the timer of the grace has come
            opening = asyncio.create_task(
                TrainingClient.open(service, fingerprint, resume_steps=(0, 1))
            )
            await asyncio.sleep(0.05)
            assert not opening.done()
            may_end.set()
            again = await opening
            assert again.step == 1
            assert await again.save(1) == ""
            await again.close()

    run(dialogue())


def test_without_grace_only_saved_steps_stay(training, fingerprint):
    """A run is forgotten with its session when the operator wants it so."""

    async def dialogue():
        async with training(grace_s=0) as service:
            client = await TrainingClient.open(service, fingerprint)
            await client.train(1, some_rows(5))
            await client.save(1)
            await client.train(2, some_rows(5))
            await client.close()
            await until(lambda: not service.training._entries)
            with pytest.raises(StaleStep, match="go on from step 2 and the server from step 0, 1"):
                await TrainingClient.open(service, fingerprint, resume_steps=(2,))
            client = await TrainingClient.open(service, fingerprint, resume_steps=(2, 1, 0))
            assert client.step == 1
            await client.close()

    run(dialogue())


def test_a_restarted_server_goes_on_bit_for_bit(training, fingerprint):
    """Adapter, moments, dropout and the answer to the last step survive the server."""
    lora = Lora(rank=2, dropout=0.2, targets=LORA.targets, freeze_a=True)

    async def dialogue():
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint, lora=lora)
            _, _, second = [await client.train(n, some_rows(9, n)) for n in (1, 2)][1]
            assert await client.save(2) == ""
            expected = [await client.train(n, some_rows(9, n)) for n in (3, 4)]
            await client.close()
        async with training() as service:
            client = await TrainingClient.open(
                service, fingerprint, lora=lora, resume_steps=(0, 2, 3)
            )
            assert client.step == 2
            assert await client.take_step(2) == second
            for number, (hidden, gradient, stepped) in zip((3, 4), expected, strict=True):
                found = await client.train(number, some_rows(9, number))
                assert torch.equal(found[0], hidden)
                assert torch.equal(found[1], gradient)
                assert found[2] == stepped
            await client.close()

    run(dialogue())


def test_resuming_with_other_options_is_refused(training, fingerprint):
    """In memory and from the store alike, and the options that differ are named."""

    async def dialogue():
        other = Lora(rank=3, alpha=4.0, targets=LORA.targets)
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint)
            await client.train(1, some_rows(5))
            await client.close()
            with pytest.raises(ConfigError, match="another lora"):
                await TrainingClient.open(service, fingerprint, lora=other, resume_steps=(1,))
            client = await TrainingClient.open(service, fingerprint, resume_steps=(1,))
            await client.save(1)
            await client.close()
            with pytest.raises(ConfigError, match="another seed"):
                await TrainingClient.open(service, fingerprint, seed=8, resume_steps=(1,))
            client = await TrainingClient.open(service, fingerprint, lora=other)
            assert client.step == 0
            await client.close()

    run(dialogue())


def test_two_servers_do_not_share_a_folder(training):
    """The second is refused at its start."""

    async def dialogue():
        async with training():
            with pytest.raises(ConfigError, match="used by another server"):
                async with training():
                    pass

    run(dialogue())


def test_what_was_trained_is_served_to_its_tenant(training, fingerprint, connect):
    """A session names the training; its rows are those of the last saved step."""

    async def dialogue():
        rows = some_rows(6)
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint)
            await client.train(1, some_rows(5))
            await client.save(1)
            _, expected = await client.forward(rows, no_grad=True)
            session = await connect(service, span=(1, BLOCKS), adapter="clinic")
            await session.begin()
            torch.testing.assert_close(await session.run(rows), expected, rtol=1e-4, atol=1e-5)
            plain = await connect(service, span=(1, BLOCKS))
            await plain.begin()
            assert not torch.allclose(await plain.run(rows), expected, rtol=1e-3, atol=1e-3)
            for tenant, name in (("globex", "clinic"), ("local", "other"), ("local", "../x")):
                with pytest.raises(PermissionDenied, match="no adapter of that name"):
                    await connect(service, tenant, span=(1, BLOCKS), adapter=name)
            for each in (client, session, plain):
                await each.close()

    run(dialogue())


def test_what_is_served_is_the_last_save(training, fingerprint, connect, monkeypatch):
    """Another save of the same number is another adapter; one save is read once for all sessions."""
    readings = []

    def reading(folder, span):
        readings.append(folder)
        return read_adapter(folder, span)

    monkeypatch.setattr("fedsea.server.training_store.read_adapter", reading)

    async def dialogue():
        rows = some_rows(6)
        async with training() as service:
            sessions = []
            for course in (1, 2):
                client = await TrainingClient.open(service, fingerprint)
                await client.train(1, some_rows(5, course))
                await client.save(1)
                _, expected = await client.forward(rows, no_grad=True)
                await client.close()
                opened = await asyncio.gather(
                    *(connect(service, span=(1, BLOCKS), adapter="clinic") for _ in range(4))
                )
                assert len(readings) == course
                for session in opened:
                    await session.begin()
                    found = await session.run(rows)
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
                sessions += opened
            for session in sessions:
                await session.close()

    run(dialogue())


def test_training_beside_decoding_leaves_both_as_they_are(training, fingerprint, connect):
    """Sessions that decode while others train get the rows that they get alone, and so do those."""

    async def decoded(service, count):
        session = await connect(service, span=(1, BLOCKS))
        await session.begin()
        found = [await session.run(some_rows(20, 99))]
        found += [await session.run(some_rows(1, 100 + n)) for n in range(count)]
        await session.close()
        return torch.cat(found)

    async def trained(service, name, tenant):
        client = await TrainingClient.open(service, fingerprint, tenant, adapter=name)
        found = [await client.train(n, some_rows(40, n)) for n in range(1, 9)]
        await client.close()
        return torch.cat([part for hidden, gradient, _ in found for part in (hidden, gradient)])

    async def dialogue():
        async with training(workers=2) as service:
            alone = await decoded(service, 30), await trained(service, "alone", "local")
            together = await asyncio.gather(
                decoded(service, 30),
                decoded(service, 30),
                trained(service, "one", "local"),
                trained(service, "two", "globex"),
            )
            for found in together[:2]:
                torch.testing.assert_close(found, alone[0], rtol=1e-4, atol=1e-5)
            for found in together[2:]:
                assert torch.equal(found, alone[1])

    run(dialogue())


def test_a_defect_ends_the_session_and_not_the_server(training, fingerprint, monkeypatch, caplog):
    """Its message says nothing of the cause; the broken run is not gone on with."""

    def fail(*_, **__):
        raise RuntimeError("secret rows")

    async def dialogue():
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint)
            await client.train(1, some_rows(5))
            with monkeypatch.context() as patched:
                patched.setattr(training_run.TrainingRun, "_through_blocks", fail)
                with pytest.raises(FedseaError, match="failed to compute for a training"):
                    await client.forward(some_rows(5))
            with pytest.raises(StaleStep):
                await TrainingClient.open(service, fingerprint, resume_steps=(1,))
            client = await TrainingClient.open(service, fingerprint)
            assert (await client.train(1, some_rows(5)))[2].applied
            await client.close()

    run(dialogue())
    assert "secret" not in caplog.text


def test_stopping_ends_training_sessions(training, fingerprint):
    """A drain is announced; the stop ends the sessions and their threads."""

    async def dialogue():
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint)
            service.drain()
            await client.forward(some_rows(5))
            assert len(client.notices) == 1
            with pytest.raises(FedseaError, match="stopping"):
                await TrainingClient.open(service, fingerprint, adapter="two")
        with pytest.raises((SessionLost, ConnectionLost)):
            await client.receive()

    run(dialogue())


def test_nothing_of_a_training_is_logged(training, fingerprint, caplog):
    """Logs hold names, steps and codes, and no number that was computed."""
    caplog.set_level("DEBUG")

    async def dialogue():
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint)
            _, _, stepped = await client.train(1, some_rows(5))
            await client.save(1)
            await client.close()
            return stepped.grad_norm, service

    norm, service = run(dialogue())
    assert "training_opened" in caplog.text
    assert f"{norm:.3f}"[:5] not in caplog.text
    lines = {
        sample.name: sample.value
        for metric in service.metrics.registry.collect()
        for sample in metric.samples
        if sample.name.startswith("fedsea_training") and "created" not in sample.name
    }
    assert lines["fedsea_training_forwards_total"] == 1
    assert lines["fedsea_training_rows_total"] == 5
    assert lines["fedsea_training_backwards_total"] == 1
    assert lines["fedsea_training_steps_total"] == 1
    assert norm not in lines.values()


def test_a_save_without_room_is_told_and_can_be_repeated(training, fingerprint, monkeypatch):
    """The session goes on behind a full disk; what was saved before is what is resumed from."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(path, content):
        raise ConfigError("cannot be written") from full

    async def dialogue():
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint)
            await client.train(1, some_rows(5))
            assert await client.save(1) == ""
            await client.train(2, some_rows(5))
            with monkeypatch.context() as patched:
                patched.setattr(artifacts, "replace_file", write)
                problem = await client.save(2)
            assert "could not save step 2 (No space left on device)" in problem
            assert service.training._services.store.steps(RunKey("local", "clinic")) == [1]
            assert (await client.train(3, some_rows(5)))[2].applied
            assert await client.save(3) == ""
            await client.close()

    run(dialogue())


def test_a_flood_of_resets_waits_for_its_turn(training, fingerprint):
    """Events without an answer are read no faster than they are applied."""

    async def dialogue():
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint)
            await client.push(some_rows(400))
            for _ in range(300):
                await client.reset()
            (entry,) = service.training._entries.values()
            assert len(entry.live.line._waiting) < 10
            await client.pull()
            assert (await client.train(1, some_rows(4)))[2].applied
            await client.close()

    run(dialogue())


def test_a_broken_run_is_not_saved(training, fingerprint, monkeypatch):
    """What was asked for behind a defect is refused: the last good step stays the saved one."""

    def fail(*_, **__):
        raise RuntimeError("half a step")

    async def dialogue():
        async with training() as service:
            client = await TrainingClient.open(service, fingerprint)
            await client.train(1, some_rows(5))
            assert await client.save(1) == ""
            monkeypatch.setattr(AdapterOptimizer, "apply", fail)
            await client.send(Step(2, 0.1))
            with suppress(FedseaError):
                await client.send(Save(2))
                await client.send(Save(1))
            with pytest.raises(FedseaError, match="failed to compute"):
                await client.receive()
            (entry,) = service.training._entries.values()
            with pytest.raises(FedseaError, match="failed to compute"):
                await entry.live.put(lambda _: service.training._services.store)
            assert service.training._services.store.steps(RunKey("local", "clinic")) == [1]
            monkeypatch.undo()
            client = await TrainingClient.open(service, fingerprint, resume_steps=(1,))
            assert (await client.train(2, some_rows(5)))[2].applied
            await client.close()

    run(dialogue())
