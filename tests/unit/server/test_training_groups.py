"""Groups over the memory transport: who waits for whom, and what the members' steps add up to."""

from __future__ import annotations

import asyncio
import math
import random
from contextlib import asynccontextmanager

import pytest
import torch
from tests.training_client import LORA, TrainingClient, some_rows
from tests.trunk_client import BLOCKS

from fedsea.errors import Capacity, ConfigError, PermissionDenied, RemoteProtocolError, StaleStep
from fedsea.model.attention import RaggedBatch
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import AdaptedRows, Adapter, LoraConfig
from fedsea.model.optimization import AdamWConfig, AdapterOptimizer, step_generator
from fedsea.model.partition import Span
from fedsea.model.spans import Placement, load_trunk
from fedsea.server.training_run import TrainingRun
from fedsea.server.training_store import GROUPS, RunKey
from fedsea.wire.messages import Forward, Lora

WARD = RunKey(GROUPS, "ward")
TENANTS = ("acme", "globex", "initech")


def run(dialogue, seconds=60):
    """Run a dialogue; a hang is a failure."""
    return asyncio.run(asyncio.wait_for(dialogue, seconds))


@pytest.fixture
def group(serving, tmp_path):
    """A service with one group, `ward`; nothing is held afterwards."""

    @asynccontextmanager
    async def serve(strategy, grace_s=600.0, workers=1, limits=None, **keys):
        section = {
            "folder": str(tmp_path / "store"),
            "threads": 1,
            "workers": workers,
            "grace_s": grace_s,
            "groups": {"ward": {"strategy": strategy, "tenants": list(TENANTS), "seed": 7, **keys}},
        }
        async with serving(training=section, limits=limits or {}) as service:
            yield service
            budget = service.training._services.budget
        assert (budget.kept, budget.pending) == (0, 0)

    return serve


@pytest.fixture
def join(fingerprint):
    """Open a session of a member."""

    async def open_member(service, tenant, **options):
        options = {"adapter": "ward", **options}
        return await TrainingClient.open(service, fingerprint, tenant, **options)

    return open_member


class Copy:
    """The trunk's part of a training, in this process."""

    def __init__(self, folder):
        self.trunk = load_trunk(Checkpoint.open(folder), Span(1, BLOCKS), Placement())
        config = LoraConfig(rank=2, alpha=4.0, targets=tuple(sorted(LORA.targets)))
        chance = step_generator(7, 0, 0)
        self.adapter = Adapter.fresh(config, self.trunk.span, self.trunk.linears(), chance)
        self.trunk.accept(self.adapter)
        self.named = dict(self.adapter.named_parameters())
        self.optimizer = AdapterOptimizer(self.named, AdamWConfig())

    def hidden(self, rows):
        """Rows behind the trunk."""
        adapters = (AdaptedRows(0, len(rows), self.adapter),)
        return self.trunk.run(rows, RaggedBatch.whole([len(rows)], torch.device("cpu"), adapters))

    def backward(self, rows, scale=1.0):
        """Add the gradient of the sum of squares; that of the rows."""
        leaf = rows.clone().requires_grad_()
        (scale * self.hidden(leaf).square().sum()).backward()
        return leaf.grad

    def step(self):
        """One step as the clients take it; the norm."""
        return self.optimizer.apply(0.1, None)


async def look(client, rows=None):
    """What a member's trunk makes of some rows."""
    _, hidden = await client.forward(some_rows(6, 50) if rows is None else rows, no_grad=True)
    return hidden


# One after another


def test_members_train_one_after_another(group, join):
    """A second member is sent away with a time to come back, and goes on from the first's steps."""

    async def dialogue():
        async with group("sequential") as service:
            first = await join(service, "acme")
            for number in (1, 2):
                await first.train(number, some_rows(5, number))
            with pytest.raises(Capacity, match="another member of the group") as refused:
                await join(service, "globex")
            assert refused.value.retry_after == 5.0
            expected = await look(first)
            await first.close()
            second = await join(service, "globex")
            assert second.step == 0
            assert torch.equal(await look(second), expected)
            await second.train(1, some_rows(5, 3))
            expected = await look(second)
            await second.vanish()
            first = await join(service, "acme", resume_steps=(0, 2))
            assert first.step == 2
            assert torch.equal(await look(first), expected)
            await first.close()

    run(dialogue())


def test_steps_of_a_sequence_are_applied_once(group, join):
    """Members count their own steps; a repeat is answered as before, other numbers are stale."""

    async def dialogue():
        async with group("sequential") as service:
            first = await join(service, "acme")
            await first.train(1, some_rows(5))
            await first.close()
            second = await join(service, "globex")
            _, _, stepped = await second.train(1, some_rows(5, 1))
            expected = await look(second)
            await second.vanish()
            second = await join(service, "globex", resume_steps=(1, 0))
            assert (second.step, await second.take_step(1)) == (1, stepped)
            assert torch.equal(await look(second), expected)
            with pytest.raises(StaleStep, match="step 3 was asked for and 1 are done"):
                await second.take_step(3)

    run(dialogue())


def test_a_sequence_is_saved_and_resumed(group, join):
    """After a restart each member finds its own count; a step back takes nobody else's work away."""

    async def dialogue():
        async with group("sequential") as service:
            first = await join(service, "acme")
            await first.train(1, some_rows(5))
            assert await first.save(1) == ""
            await first.train(2, some_rows(5))
            await first.close()
            # Nobody else has trained since: back to the saved step.
            first = await join(service, "acme", resume_steps=(1,))
            again = await first.train(2, some_rows(5))
            await first.close()
            second = await join(service, "globex")
            await second.train(1, some_rows(5, 1))
            assert await second.save(1) == ""
            expected = await look(second)
            await second.close()
            # Now somebody has: the member goes on with what it has, the trunk stays.
            first = await join(service, "acme", resume_steps=(1,))
            assert first.step == 1
            assert torch.equal(await look(first), expected)
            await first.close()
        async with group("sequential") as service:
            first = await join(service, "acme", resume_steps=(2, 1))
            assert first.step == 2
            assert torch.equal(await look(first), expected)
            assert again[2].applied
            await first.close()

    run(dialogue())


def test_a_stranger_has_its_own(group, join, connect):
    """Whoever is no member trains alone under the same name, and is served nothing of the group."""

    async def dialogue():
        async with group("sequential") as service:
            member = await join(service, "acme")
            await member.train(1, some_rows(5))
            await member.save(1)
            stranger = await join(service, "mallory")
            assert stranger.step == 0
            assert not torch.equal(await look(stranger), await look(member))
            with pytest.raises(PermissionDenied):
                await connect(service, "mallory", span=(1, BLOCKS), adapter="ward")
            session = await connect(service, "globex", span=(1, BLOCKS), adapter="ward")
            await session.begin()
            torch.testing.assert_close(
                await session.run(some_rows(6, 50)), await look(member), rtol=1e-4, atol=1e-5
            )
            for each in (member, stranger, session):
                await each.close()

    run(dialogue())


# One batch


@pytest.fixture
def passes(monkeypatch):
    """How many parts each pass that trains has had."""
    counted = []
    forward = TrainingRun.forward

    def counting(self, worker, parts, **options):
        if options["trains"]:
            counted.append(len(parts))
        return forward(self, worker, parts, **options)

    monkeypatch.setattr(TrainingRun, "forward", counting)
    return counted


async def trained(client, number, rows):
    """One step of one member, whose answers depend on the others."""
    return await client.train(number, rows)


def test_a_batch_of_two_is_the_mean_of_two(group, join, checkpoint_folder, passes):
    """Rows meet in one pass; steps are those of the mean of both gradients; both are told."""
    copy = Copy(checkpoint_folder)

    async def dialogue():
        async with group("client-batch", gather_s=20.0) as service:
            members = [await join(service, tenant) for tenant in TENANTS[:2]]
            for number in (1, 2):
                batches = some_rows(5, number), some_rows(7, 10 + number)
                found = await asyncio.gather(*map(trained, members, (number,) * 2, batches))
                for (hidden, gradient, _), rows in zip(found, batches, strict=True):
                    torch.testing.assert_close(hidden, copy.hidden(rows), rtol=1e-5, atol=1e-5)
                    expected = copy.backward(rows, 0.5)
                    torch.testing.assert_close(gradient, 2 * expected, rtol=1e-4, atol=1e-4)
                norm = copy.step()
                assert found[0][2] == found[1][2]
                assert found[0][2].grad_norm == pytest.approx(norm, rel=1e-4)
                problems = await asyncio.gather(*(member.save(number) for member in members))
                assert problems == ["", ""]
            assert passes == [2, 2]
            for member in members:
                await member.close()

    run(dialogue())


def test_a_member_alone_needs_nobody(group, join, checkpoint_folder):
    """One member of a batch trains like a tenant of its own."""
    copy = Copy(checkpoint_folder)

    async def dialogue():
        async with group("client-batch", gather_s=20.0) as service:
            member = await join(service, "acme")
            _, _, stepped = await member.train(1, some_rows(5))
            copy.backward(some_rows(5))
            assert stepped.grad_norm == pytest.approx(copy.step(), rel=1e-5)
            await member.close()

    run(dialogue())


def test_several_batches_of_one_member(group, join, passes):
    """Members accumulate as they like: one with three batches, one with one, one step."""

    async def accumulating(client, count):
        for batch in range(count):
            number, hidden = await client.forward(some_rows(4, batch))
            await client.backward(number, 2 * hidden)
        return await client.take_step(1)

    async def dialogue():
        async with group("client-batch", gather_s=0.01) as service:
            members = [await join(service, tenant) for tenant in TENANTS[:2]]
            stepped = await asyncio.gather(*map(accumulating, members, (3, 1)))
            assert stepped[0] == stepped[1]
            assert sum(passes) == 4
            for member in members:
                await member.close()

    run(dialogue())


def test_a_joint_pass_is_no_larger_than_a_forward_alone(group, join, passes):
    """Members together cannot make the server compute with more rows at once than one of them."""

    async def dialogue():
        async with group(
            "client-batch", gather_s=20.0, limits={"max_rows_per_message": 10}
        ) as service:
            members = [await join(service, tenant) for tenant in TENANTS]
            batches = some_rows(4, 1), some_rows(6, 2), some_rows(1, 3)
            found = await asyncio.gather(*map(trained, members, (1,) * 3, batches))
            assert found[0][2] == found[1][2] == found[2][2]
            assert passes == [2, 1]
            for member in members:
                await member.close()

    run(dialogue())


@pytest.mark.parametrize("end", ["vanish", "discard"])
def test_a_joint_pass_is_held_until_it_is_free(group, join, end):
    """What a member gave up counts against it for as long as another's gradient may need it."""

    async def dialogue():
        async with group("client-batch", gather_s=20.0) as service:
            budget = service.training._services.budget
            staying, going = [await join(service, tenant) for tenant in TENANTS[:2]]
            (one, hidden), (two, _) = await asyncio.gather(
                staying.forward(some_rows(5)), going.forward(some_rows(7))
            )
            if end == "discard":
                await going.discard(two)
                await look(going)
            else:
                await going.vanish()
                while service.num_sessions > 1:  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.01)
            assert (budget.kept, budget.pending) == (12, 12)
            await staying.backward(one, 2 * hidden)
            assert (budget.kept, budget.pending) == (0, 0)
            await staying.close()

    run(dialogue())


@pytest.mark.parametrize("end", ["vanish", "close", "discard", "reset"])
def test_a_member_that_goes_is_not_waited_for(group, join, checkpoint_folder, end):
    """Between Forward and Backward of a joint pass; the other's gradient is its own alone."""
    copy = Copy(checkpoint_folder)

    async def dialogue():
        async with group("client-batch", gather_s=20.0) as service:
            stays, goes = [await join(service, tenant) for tenant in TENANTS[:2]]
            (number, hidden), (other, _) = await asyncio.gather(
                stays.forward(some_rows(5)), goes.forward(some_rows(7))
            )
            await stays.send_back(number, 2 * hidden)
            if end == "discard":
                await goes.discard(other)
            else:
                await getattr(goes, end)()
            found = await stays.gradients()
            torch.testing.assert_close(found, copy.backward(some_rows(5)), rtol=1e-4, atol=1e-4)
            if end in ("discard", "reset"):
                steps = list(await asyncio.gather(stays.take_step(1), goes.take_step(1)))
                assert steps[0] == steps[1]
                await goes.close()
            else:
                steps = [await stays.take_step(1)]
            assert steps[0].grad_norm == pytest.approx(copy.step(), rel=1e-4)
            await stays.close()

    run(dialogue())


@pytest.mark.parametrize("late_at", ["backward", "step"])
def test_a_straggler_is_waited_for_until_the_deadline(group, join, late_at):
    """Then the others go on; the late one is told, and may come back."""

    async def dialogue():
        async with group("client-batch", gather_s=20.0, deadline_s=0.2) as service:
            fast, slow = [await join(service, tenant) for tenant in TENANTS[:2]]
            (number, hidden), (other, back) = await asyncio.gather(
                fast.forward(some_rows(5)), slow.forward(some_rows(7))
            )
            await fast.send_back(number, 2 * hidden)
            if late_at == "step":
                await slow.send_back(other, 2 * back)
                await slow.gradients()
            await fast.gradients()
            assert (await fast.take_step(1)).applied
            with pytest.raises(StaleStep, match=r"waited 0.2 s for this member"):
                await slow.receive()
            slow = await join(service, "globex", resume_steps=(0,))
            assert slow.step == 0
            found = await asyncio.gather(fast.train(2, some_rows(5)), slow.train(1, some_rows(7)))
            assert [stepped.number for _, _, stepped in found] == [2, 1]
            assert found[0][2].grad_norm == found[1][2].grad_norm
            for member in (fast, slow):
                await member.close()

    run(dialogue())


def test_what_was_contributed_counts_once(group, join, checkpoint_folder):
    """A member that starts its step anew gets gradients again; the shared adapter gets them once."""
    copy = Copy(checkpoint_folder)

    async def dialogue():
        async with group("client-batch", gather_s=0.01) as service:
            one, two = [await join(service, tenant) for tenant in TENANTS[:2]]
            number, hidden = await one.forward(some_rows(5))
            first = await one.backward(number, 2 * hidden)
            await one.vanish()
            one = await join(service, "acme", resume_steps=(0,))
            number, hidden = await one.forward(some_rows(5))
            again = await one.backward(number, 2 * hidden)
            torch.testing.assert_close(first, again)
            number, hidden = await two.forward(some_rows(7))
            await two.backward(number, 2 * hidden)
            steps = list(await asyncio.gather(one.take_step(1), two.take_step(1)))
            copy.backward(some_rows(5), 0.5)
            copy.backward(some_rows(7), 0.5)
            assert steps[0].grad_norm == pytest.approx(copy.step(), rel=1e-4)
            for member in (one, two):
                await member.close()

    run(dialogue())


def test_a_gradient_of_one_that_is_not_finite_stops_the_step_of_all(group, join):
    """All are told; nothing is applied, and the step can be taken again."""

    async def dialogue():
        async with group("client-batch", gather_s=20.0) as service:
            one, two = [await join(service, tenant) for tenant in TENANTS[:2]]
            before = await look(one)
            (number, hidden), (other, back) = await asyncio.gather(
                one.forward(some_rows(5)), two.forward(some_rows(7))
            )
            await asyncio.gather(
                one.backward(number, 2 * hidden), two.backward(other, torch.full_like(back, 3e38))
            )
            steps = await asyncio.gather(one.take_step(1), two.take_step(1))
            assert [(s.applied, s.grad_norm) for s in steps] == [(False, math.inf)] * 2
            assert torch.equal(await look(two), before)
            found = await asyncio.gather(one.train(1, some_rows(5)), two.train(1, some_rows(7)))
            assert all(stepped.applied for _, _, stepped in found)
            for member in (one, two):
                await member.close()

    run(dialogue())


def test_members_have_to_agree_about_a_step(group, join):
    """One that asks for another learning rate is told, and the others go on."""

    async def dialogue():
        async with group("client-batch", gather_s=20.0) as service:
            one, two = [await join(service, tenant) for tenant in TENANTS[:2]]
            first = asyncio.create_task(one.take_step(1, learning_rate=0.1))
            await asyncio.sleep(0)
            with pytest.raises(ConfigError, match="same learning rate"):
                await two.take_step(1, learning_rate=0.2)
            assert (await first).applied
            await one.close()

    run(dialogue())


def test_what_most_members_ask_for_is_done(group, join):
    """A member that asks first, and for something else, does not send the others away."""

    async def dialogue():
        async with group("client-batch", gather_s=20.0) as service:
            members = [await join(service, tenant) for tenant in TENANTS]
            for member, (number, hidden) in zip(
                members,
                await asyncio.gather(*(member.forward(some_rows(3)) for member in members)),
                strict=True,
            ):
                await member.send_back(number, 2 * hidden)
            await asyncio.gather(*(member.gradients() for member in members))
            odd = asyncio.create_task(members[0].take_step(1, learning_rate=1.0))
            while not service.training._entries[WARD].batch._asked:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
            one, two = await asyncio.gather(*(member.take_step(1) for member in members[1:]))
            assert one == two
            assert one.applied
            with pytest.raises(ConfigError, match="same learning rate"):
                await odd
            for member in members[1:]:
                await member.close()

    run(dialogue())


def test_members_have_to_train_the_same(group, join):
    """Another rank than the group's is refused while the group trains."""

    async def dialogue():
        for strategy in ("client-batch", "server-hierarchical"):
            async with group(strategy, grace_s=0) as service:
                one = await join(service, "acme")
                with pytest.raises(ConfigError, match="another lora"):
                    await join(service, "globex", lora=Lora(rank=3, targets=LORA.targets))
                await one.train(1, some_rows(5))
                await one.close()

    run(dialogue())


def test_the_first_step_waits_for_members(group, join):
    """Too few members are sent away after the deadline; enough of them train."""

    async def dialogue():
        async with group("client-batch", gather_s=0.01, min_members=2, deadline_s=0.2) as service:
            one = await join(service, "acme")
            with pytest.raises(Capacity, match="1 of 2 members have come") as refused:
                await one.forward(some_rows(5))
            assert refused.value.retry_after == 5.0
            one = await join(service, "acme")
            waiting = asyncio.create_task(one.train(1, some_rows(5)))
            await asyncio.sleep(0)
            two = await join(service, "globex")
            found = await asyncio.gather(waiting, two.train(1, some_rows(7)))
            assert found[0][2] == found[1][2]
            for member in (one, two):
                await member.close()

    run(dialogue())


def test_bad_rows_of_one_do_not_hurt_another(group, join):
    """A member that sends NaN ends its own session only."""

    async def dialogue():
        async with group("client-batch", gather_s=20.0) as service:
            one, two = [await join(service, tenant) for tenant in TENANTS[:2]]
            good = asyncio.create_task(one.train(1, some_rows(5)))
            data = torch.full((3, 32), math.nan).numpy().tobytes()
            await two.send(Forward(1, (3,), data))
            with pytest.raises(RemoteProtocolError, match="not finite"):
                await two.receive()
            assert (await good)[2].applied
            await one.close()

    run(dialogue())


def test_a_batch_goes_on_after_a_restart(group, join):
    """All members come back to the step that was saved and take the same steps again."""

    async def dialogue():
        async with group("client-batch", gather_s=20.0) as service:
            members = [await join(service, tenant) for tenant in TENANTS[:2]]
            for number in (1, 2, 3):
                rows = some_rows(5, number), some_rows(7, 10 + number)
                expected = await asyncio.gather(*map(trained, members, (number,) * 2, rows))
                if number == 2:
                    await asyncio.gather(*(member.save(2) for member in members))
            for member in members:
                await member.close()
        async with group("client-batch", gather_s=20.0) as service:
            members = [await join(service, tenant, resume_steps=(3, 2)) for tenant in TENANTS[:2]]
            assert [member.step for member in members] == [2, 2]
            found = await asyncio.gather(*map(trained, members, (3, 3), rows))
            assert [each[2] for each in found] == [each[2] for each in expected]
            for member in members:
                await member.close()

    run(dialogue())


def test_a_batch_begins_anew_while_nothing_is_saved(group, join):
    """Members that were all killed before their first save take the same steps again."""

    async def dialogue():
        async with group("client-batch", gather_s=20.0) as service:
            found = []
            for _ in range(2):
                members = [await join(service, tenant) for tenant in TENANTS[:2]]
                rows = some_rows(5), some_rows(7)
                found.append(await asyncio.gather(*map(trained, members, (1, 1), rows)))
                for member in members:
                    await member.vanish()
                await until_empty(service)
            assert [each[2] for each in found[0]] == [each[2] for each in found[1]]
            # What one member has saved is not given up because another has lost its files.
            one = await join(service, "acme", resume_steps=(1,))
            await one.save(1)
            await one.close()
            other = await join(service, "globex", resume_steps=(0,))
            _, _, stepped = await other.train(1, some_rows(3))
            assert (stepped.number, service.training._entries[WARD].live.run.steps) == (1, 2)
            await other.close()

    run(dialogue())


async def until_empty(service):
    """Wait until the service has noticed that nobody is there."""
    while any(entry.seated for entry in service.training._entries.values()):  # noqa: ASYNC110
        await asyncio.sleep(0)


# A copy for each


@pytest.mark.parametrize(("weigh", "share"), [(True, 0.25), (False, 0.5)])
def test_copies_become_their_weighted_mean(group, join, checkpoint_folder, weigh, share):
    """Every second step; between them each goes its own way. A claimed weight may be left out."""
    copies = [Copy(checkpoint_folder) for _ in range(2)]

    async def dialogue():
        async with group("server-hierarchical", average_every=2, workers=2, weigh=weigh) as service:
            members = [
                await join(service, tenant, weight=weight)
                for tenant, weight in zip(TENANTS, (1.0, 3.0), strict=False)
            ]
            for number in (1, 2, 3):
                rows = some_rows(5, number), some_rows(7, 10 + number)
                found = await asyncio.gather(*map(trained, members, (number,) * 2, rows))
                for copy, own, (_, _, stepped) in zip(copies, rows, found, strict=True):
                    copy.backward(own)
                    assert stepped.grad_norm == pytest.approx(copy.step(), rel=1e-3)
                if number == 2:
                    with torch.no_grad():
                        for name, one in copies[0].named.items():
                            other = copies[1].named[name]
                            one.copy_(share * one + (1 - share) * other)
                            other.copy_(one)
                for copy, member in zip(copies, members, strict=True):
                    expected = copy.hidden(some_rows(6, 50)).detach()
                    torch.testing.assert_close(await look(member), expected, rtol=1e-3, atol=1e-3)
            newcomer = await join(service, "initech")
            assert newcomer.step == 0
            assert not torch.allclose(
                await look(newcomer), Copy(checkpoint_folder).hidden(some_rows(6, 50)), atol=1e-3
            )
            for member in (*members, newcomer):
                await member.close()

    run(dialogue())


def test_a_broken_copy_does_not_break_the_mean(group, join):
    """A member whose factors are no longer finite gets the mean of the others, at any weight."""

    async def dialogue():
        async with group("server-hierarchical", average_every=2) as service:
            sound, broken = (
                await join(service, "acme", weight=1e308),
                await join(service, "globex", weight=1e308),
            )
            await asyncio.gather(sound.train(1, some_rows(5)), broken.train(1, some_rows(7)))
            for each in service.training._entries.values():
                if each.live.key.member == "globex":
                    next(each.live.run.adapter.parameters()).data.fill_(math.nan)
            number, hidden = await sound.forward(some_rows(5))
            await sound.backward(number, 2 * hidden)
            await asyncio.gather(sound.take_step(2), broken.take_step(2))
            assert torch.equal(await look(sound), await look(broken))
            for member in (sound, broken):
                await member.close()

    run(dialogue())


@pytest.mark.parametrize("end", ["deadline", "vanish"])
def test_a_mean_waits_for_nobody_for_ever(group, join, end):
    """After the deadline, or when the others have gone, a member goes on."""

    async def dialogue():
        seconds = 0.2 if end == "deadline" else 60.0
        async with group("server-hierarchical", deadline_s=seconds) as service:
            fast, slow = [await join(service, tenant) for tenant in TENANTS[:2]]
            stepping = asyncio.create_task(fast.train(1, some_rows(5)))
            await asyncio.wait([stepping], timeout=0.05)
            if end == "vanish":
                await slow.vanish()
            assert (await stepping)[2].applied
            if end == "deadline":
                await slow.close()
            await fast.close()

    run(dialogue())


def test_a_mean_that_fails_is_told(group, join, monkeypatch):
    """Copies of which some may be the mean and others not are not gone on with, nor saved."""

    def failing(_):
        raise MemoryError

    monkeypatch.setattr("fedsea.server.training_groups._averaged", failing)

    async def dialogue():
        async with group("server-hierarchical") as service:
            members = [await join(service, tenant) for tenant in TENANTS[:2]]
            answers = await asyncio.gather(
                *(member.train(1, some_rows(3)) for member in members), return_exceptions=True
            )
            assert [str(answer).split(":")[0] for answer in answers] == [
                "the server failed to compute for a training"
            ] * 2
            again = await join(service, "acme")
            assert again.step == 0
            await again.close()

    run(dialogue())


def test_a_copy_is_saved_and_resumed(group, join):
    """Each member's copy is its own in the store too."""

    async def dialogue():
        async with group("server-hierarchical", average_every=5) as service:
            members = [await join(service, tenant) for tenant in TENANTS[:2]]
            for place, member in enumerate(members):
                await member.train(1, some_rows(5, place))
                assert await member.save(1) == ""
            expected = [await look(member) for member in members]
            for member in members:
                await member.close()
        async with group("server-hierarchical", average_every=5) as service:
            members = [await join(service, tenant, resume_steps=(1,)) for tenant in TENANTS[:2]]
            for member, hidden in zip(members, expected, strict=True):
                assert torch.equal(await look(member), hidden)
                await member.close()

    run(dialogue())


def test_a_waiting_member_that_vanishes(group, join):
    """A session that ends while it waits for the mean leaves its copy usable."""

    async def dialogue():
        async with group("server-hierarchical") as service:
            one, two = [await join(service, tenant) for tenant in TENANTS[:2]]
            number, hidden = await one.forward(some_rows(5))
            await one.backward(number, 2 * hidden)
            stepping = asyncio.create_task(one.take_step(1))
            await asyncio.wait([stepping], timeout=0.05)
            await one.vanish()
            await asyncio.gather(stepping, return_exceptions=True)
            one = await join(service, "acme", resume_steps=(0, 1))
            assert one.step == 1
            found = await asyncio.gather(one.train(2, some_rows(5)), two.train(1, some_rows(7)))
            assert all(stepped.applied for _, _, stepped in found)
            for member in (one, two):
                await member.close()

    run(dialogue())


class Restless:
    """A member that does what it likes within the protocol, and comes back whenever it is sent away."""

    def __init__(self, service, join, tenant, seed):
        self.service, self.join, self.tenant = service, join, tenant
        self.chance = random.Random(f"{tenant} {seed}")
        self.done = 0

    async def live(self):
        """Take four steps, whatever happens in between."""
        client = await self.open()
        while self.done < 4:
            try:
                if self.chance.random() < 0.15:
                    await client.vanish()
                    client = await self.open()
                await self.step(client)
            except (StaleStep, Capacity):
                client = await self.open()
        await client.close()

    async def open(self):
        """Begin, or go on."""
        while True:
            try:
                client = await self.join(self.service, self.tenant, resume_steps=(self.done,))
            except Capacity:
                await asyncio.sleep(0.005)
                continue
            assert client.step == self.done
            return client

    async def step(self, client):
        """Some forwards, most of their gradients, in any order, and a step."""
        sent = []
        for _ in range(self.chance.randint(0, 3)):
            rows = some_rows(self.chance.randint(1, 6), self.chance.randint(0, 99))
            sent.append((await client.push(rows), rows))
        hidden = {number: await client.pull() for number, _ in sent}
        self.chance.shuffle(sent)
        for number, _ in sent:
            match self.chance.choice(["back", "back", "back", "discard", "reset", "vanish"]):
                case "back":
                    await client.backward(number, 2 * hidden[number])
                case "discard":
                    await client.discard(number)
                case "reset":
                    await client.reset()
                    break
                case "vanish":
                    await client.vanish()
                    raise StaleStep("gone")
        stepped = await client.take_step(self.done + 1)
        assert stepped.applied
        self.done += 1


@pytest.mark.parametrize("strategy", ["sequential", "client-batch", "server-hierarchical"])
@pytest.mark.parametrize("seed", range(2))
def test_whatever_members_do_the_group_goes_on(group, join, strategy, seed):
    """Three members that forget, vanish and come back all take their steps; nothing is left."""

    async def dialogue():
        async with group(
            strategy, gather_s=0.005, deadline_s=0.2, workers=2, average_every=2
        ) as service:
            members = [Restless(service, join, tenant, seed) for tenant in TENANTS]
            await asyncio.gather(*(member.live() for member in members))
            assert [member.done for member in members] == [4, 4, 4]

    run(dialogue())
