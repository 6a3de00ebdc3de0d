"""Training through the cut: equal to PEFT on the unsplit model, and nothing but rows on the wire."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conftest import memory_config
from tests.tiny_models import VOCABULARY, save_tiny
from tests.training_trunk import TinyTrainingTrunk
from tests.unit.client.conftest import BRIEF, Wire
from tests.unit.client.split_training import LENGTHS, LORA, ONE_EACH, Split
from tests.unsplit_training import (
    assert_equal_gradients,
    examples_of,
    factors,
    gradients,
    padded,
    saved_gradients,
    unsplit,
)
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedsea.client.training import SplitForTraining
from fedsea.errors import (
    AttestationError,
    ConfigError,
    PartitionError,
    RequestError,
)
from fedsea.model.adapters import read_adapter, write_adapter
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import TARGETS, LoraConfig
from fedsea.model.optimization import AdamWConfig, part_seed
from fedsea.model.partition import Partition, Span
from fedsea.model.projection import Projection
from fedsea.model.spans import FAMILIES, Placement
from fedsea.privacy.attestation import Attested, Evidence, Verifier
from fedsea.server.service import TrunkService
from fedsea.transport.base import Channel, ClientStream
from fedsea.transport.memory import MemoryChannel
from fedsea.wire.messages import (
    Backward,
    Forward,
    Gradients,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of five blocks."""
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


class InProcess(Channel):
    """A channel to a server that runs as long as the channel is open."""

    def __init__(self, service: TrunkService) -> None:
        self._service = service
        self._channel = MemoryChannel(service)
        self._started = False

    async def describe(self) -> bytes:
        """Start the server when it is asked for the first time."""
        if not self._started:
            self._started = True
            await self._service.__aenter__()
        return await self._channel.describe()

    async def open_stream(self) -> ClientStream:
        """A session."""
        return await self._channel.open_stream()

    async def close(self) -> None:
        """End both."""
        await self._channel.close()
        if self._started:
            await self._service.__aexit__(None, None, None)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_trains_as_unsplit(family: str, tmp_path: Path) -> None:
    """Logits, loss and the gradient of every factor in all three parts, for every family.

    At a whole server in this process; the trunk's gradients are what it saved of its first step.
    """
    folder = save_tiny(family, tmp_path / family)
    ids, mask, labels = padded(examples_of(LENGTHS))
    config = memory_config(folder, training={"folder": str(tmp_path / "runs")})
    with SplitForTraining.connect(
        folder,
        {"memory": lambda: InProcess(TrunkService.load(config))},
        name="run",
        partition=(1, 2),
        lora=LORA,
        optimizer=AdamWConfig(betas=(0.0, 0.999)),
        patience=BRIEF,
    ) as model:
        model.save()
        saved = tmp_path / "runs" / "local" / "run"
        trunk = read_adapter(saved / "step-00000000", Span(1, 3))
        whole = unsplit(folder, [*model.adapters(), trunk], LORA)
        expected = whole(ids, attention_mask=mask, labels=labels)
        expected.loss.backward()

        found = model(ids, mask, labels)
        found.loss.backward()
        logits = model.eval()(ids, mask).logits
        model.step(1e-3)
        model.save()

    assert logits is not None
    assert found.loss is not None
    real, largest = mask != 0, float(expected.logits.detach().abs().max())
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits[real], expected.logits[real], rtol=1e-5, atol=1e-5 * largest)
    gradient = gradients(model.adapters()) | saved_gradients(saved / "step-00000001", Span(1, 3))
    assert_equal_gradients(gradient, whole)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cut=st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda cut: sum(cut) < 5),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5).filter(lambda n: max(n) > 1),
    side=st.sampled_from(["left", "right"]),
)
def test_any_partition_and_batch_trains_as_unsplit(
    folder: Path, cut: tuple[int, int], lengths: list[int], side: str
) -> None:
    """Whatever the cut, the lengths and the side of the padding, no bottom or no top included."""
    ids, mask, labels = padded(examples_of(lengths), side)
    with Split(folder, Partition(*cut)) as split:
        split.randomize()
        whole = unsplit(folder, split.adapters(), LORA)
        positions = (mask.cumsum(1) - 1).clamp_min(0)

        expected = whole(ids, attention_mask=mask, position_ids=positions, labels=labels)
        expected.loss.backward()
        found = split.model(ids, mask, labels)
        found.loss.backward()

        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
        assert_equal_gradients(gradients(split.adapters()), whole)


def test_accumulated_steps_equal_unsplit_ones(folder: Path) -> None:
    """Ten steps of three ragged batches each, clipped by nothing: losses and factors agree."""
    with Split(folder) as split:
        whole = unsplit(folder, split.adapters(), LORA)
        ours = torch.optim.AdamW(split.model.parameters(), lr=5e-3)
        theirs = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=5e-3)
        for step in range(10):
            for number in range(3):
                examples = examples_of([4 + number, 9, 2 + step % 3], seed=3 * step + number)
                ids, mask, labels = padded(examples)
                expected = whole(ids, attention_mask=mask, labels=labels).loss / 3
                expected.backward()
                found = split.model(ids, mask, labels).loss / 3
                found.backward()
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.zero_grad()
            assert split.model.step(5e-3).number == step + 1
        state = dict(whole.named_parameters())
        for name, parameter in factors(split.adapters()):
            torch.testing.assert_close(parameter, state[name], rtol=1e-3, atol=1e-4)


def test_losses_agree_after_two_hundred_steps(folder: Path) -> None:
    """The course of a whole training is that of the unsplit model, to a thousandth."""
    data = [padded(examples_of([8, 12, 5], seed=seed)) for seed in range(4)]
    with Split(folder, Partition(2, 1)) as split:
        whole = unsplit(folder, split.adapters(), LORA)
        ours = torch.optim.AdamW(split.model.parameters(), lr=5e-4)
        theirs = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=5e-4)
        losses = []
        for step in range(200):
            ids, mask, labels = data[step % len(data)]
            pair = (
                split.model(ids, mask, labels).loss,
                whole(ids, attention_mask=mask, labels=labels).loss,
            )
            losses.append([loss.item() for loss in pair])
            for loss, optimizer in zip(pair, (ours, theirs), strict=True):
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            split.model.step(5e-4)

        assert losses[-1][0] < 0.5 * losses[0][0]
        for found, expected in losses:
            assert found == pytest.approx(expected, rel=1e-3)


def test_clipping_is_by_the_norm_of_the_trunk(folder: Path) -> None:
    """`max_grad_norm` shrinks the trunk's gradient; the norm that comes back is the one before."""
    ids, mask, labels = padded(examples_of(LENGTHS))
    with Split(folder) as split:
        split.randomize()
        split.model(ids, mask, labels).loss.backward()
        assert split.server.adapter is not None
        gradients = [one.grad for one in split.server.adapter.parameters() if one.grad is not None]
        expected = float(torch.nn.utils.get_total_norm(gradients))

        stepped = split.model.step(1e-3, max_grad_norm=expected / 10)

        assert stepped.grad_norm == pytest.approx(expected)
        assert stepped.applied


def test_logits_of_kept_rows_only(folder: Path) -> None:
    """`logits` gives the rows that were asked for, example after example, and their gradients."""
    examples = examples_of(LENGTHS)
    keep = [torch.tensor([2, 5]), torch.tensor([], dtype=torch.long), torch.tensor([10])]
    with Split(folder) as split:
        split.randomize()
        every = split.model.logits(examples)
        some = split.model.logits(examples, keep)

        assert every.shape == (sum(LENGTHS), VOCABULARY)
        rows = [2, 5, LENGTHS[0] + LENGTHS[1] + 10]
        torch.testing.assert_close(some, every[rows], rtol=1e-5, atol=1e-5)
        cross_entropy(some, torch.tensor([3, 4, 5])).backward()
        assert all(one.grad is not None for one in split.model.parameters())


def test_batches_are_ragged(folder: Path) -> None:
    """Examples together are what each is alone: no row sees another example's."""
    examples = examples_of(LENGTHS)
    with Split(folder) as split, torch.no_grad():
        split.randomize()
        together = split.model.logits(examples).split(LENGTHS)
        for one, found in zip(examples, together, strict=True):
            torch.testing.assert_close(found, split.model.logits([one]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_follows_full_precision(folder: Path, dtype: str) -> None:
    """In bf16 and fp16 factors and their gradients stay fp32 and point the same way; it learns."""
    ids, mask, labels = padded(examples_of(LENGTHS))
    placement = Placement(dtype=torch.bfloat16 if dtype == "bf16" else torch.float16)
    with (
        Split(folder) as full,
        Split(folder, dtype=dtype, placement=placement) as half,
    ):
        for split in (full, half):
            split.randomize()
            split.model(ids, mask, labels).loss.backward()
        for (_, expected), (_, found) in zip(
            factors(full.adapters()), factors(half.adapters()), strict=True
        ):
            assert found.dtype is torch.float32
            assert expected.grad is not None
            assert found.grad is not None
            assert found.grad.dtype is torch.float32
            cosine = torch.cosine_similarity(expected.grad.flatten(), found.grad.flatten(), dim=0)
            assert cosine > 0.9
        half.model.zero_grad()
        half.model.reset()
        optimizer = torch.optim.AdamW(half.model.parameters(), lr=5e-3)
        losses = []
        for _ in range(15):
            loss = half.model(ids, mask, labels).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            half.model.step(5e-3)
        assert losses[-1] < 0.7 * losses[0]


def test_parts_that_are_not_trained_have_no_factors(folder: Path) -> None:
    """`train` chooses; gradients pass through a trunk that is not trained, as unsplit."""
    ids, mask, labels = padded(examples_of(LENGTHS))
    for train in (("bottom",), ("trunk",), ("top",), ("bottom", "top")):
        with Split(folder, train=train) as split:
            split.randomize()
            bottom, top = split.model.adapters()
            trained = {"bottom": bottom, "top": top, "trunk": split.server.adapter}
            whole = unsplit(folder, split.adapters(), LORA)
            whole(ids, attention_mask=mask, labels=labels).loss.backward()
            split.model(ids, mask, labels).loss.backward()

            assert {part for part, one in trained.items() if one and one.factors} == set(train)
            assert_equal_gradients(gradients(split.adapters()), whole)
            # Nobody below the top is trained: gradients have no reason to travel.
            assert bool(split.wire.of(Backward)) is (train != ("top",))
            assert all(event.no_grad is (train == ("top",)) for event in split.wire.of(Forward))
            assert split.model.step(1e-3).applied


def test_dropout_follows_from_seed_step_and_forward(folder: Path) -> None:
    """A step that is done anew has the same masks; the next forward and the next step have others."""
    ids, mask, labels = padded(examples_of(LENGTHS))
    lora = replace(LORA, dropout=0.4)
    with Split(folder, lora=lora) as split:
        split.randomize()
        split.model.train()
        model = split.model
        first, second = (model(ids, mask, labels).loss.item() for _ in range(2))
        model.reset()
        again = model(ids, mask, labels).loss.item()
        model.step(0.0)
        later = model(ids, mask, labels).loss.item()
        model.eval()
        plain = model(ids, mask, labels).loss.item()

        assert again == first
        assert len({first, second, later, plain}) == 4


def test_parts_draw_masks_of_their_own(folder: Path) -> None:
    """The server gets a seed that does not tell the client's."""
    with Split(folder, seed=5) as split:
        assert split.server.opened is not None
        assert split.server.opened.seed not in (5, part_seed(5, "bottom"), part_seed(5, "top"))


def test_a_batch_without_labels_has_no_loss(folder: Path) -> None:
    """Labels that are all -100 give a loss of zero and gradients of zero, not NaN."""
    ids, mask, _ = padded(examples_of(LENGTHS))
    with Split(folder) as split:
        split.model.train()
        output = split.model(ids, mask, torch.full_like(ids, -100))
        output.loss.backward()
        assert output.loss.item() == 0
        assert output.logits is None


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(3, dtype=torch.long), None, "add the dimension"),
        (torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 2), "attention mask has shape"),
        (torch.zeros(1, 3, dtype=torch.long), torch.tensor([[1, 0, 1]]), "between its tokens"),
        (torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3), "has no tokens"),
        (torch.full((1, 3), VOCABULARY), None, "outside the vocabulary"),
        (torch.full((1, 3), -1), None, "outside the vocabulary"),
    ],
    ids=str,
)
def test_batches_that_cannot_be_used_are_refused(
    folder: Path, ids: Tensor, mask: Tensor | None, message: str
) -> None:
    """Each has its own words, and nothing is sent."""
    with Split(folder) as split:
        with pytest.raises(RequestError, match=message):
            split.model(ids, mask)
        assert not split.wire.of(Forward)


def test_servers_that_cannot_train_are_refused(folder: Path) -> None:
    """A server without training says so; parts that do not exist are named."""
    with pytest.raises(ConfigError, match="trains nothing"):
        Split(folder, max_forwards=0)
    with pytest.raises(ConfigError, match="names no parts"):
        Split(folder, train=("botom",))
    with pytest.raises(ConfigError, match="no linear"):
        Split(folder, lora=LoraConfig(targets=("query",)))
    with pytest.raises(PartitionError, match="serves blocks"):
        Split(folder, served=Partition(2, 2))


def test_a_verifier_is_asked_before_anything_is_sent(folder: Path) -> None:
    """Where there is no TLS key to attest, a client that demands proof sends nothing."""

    class Asked(Verifier):
        def verify(self, evidence: Evidence) -> Attested:
            raise AssertionError("there is nothing to verify")

    wire = Wire()
    server = TinyTrainingTrunk(folder, ONE_EACH)
    with pytest.raises(AttestationError, match="no TLS key"):
        SplitForTraining.connect(
            folder,
            {"memory": lambda: wire.channel(server)},
            name="run",
            lora=LORA,
            verifier=Asked(),
        )
    assert not wire.events


def test_only_factors_are_parameters(folder: Path) -> None:
    """Optimizers, `state_dict` and `to` see the adapters of bottom and top and nothing else."""
    with Split(folder) as split:
        expected = 2 * 2 * len(TARGETS)
        assert len(list(split.model.parameters())) == expected
        assert len(split.model.state_dict()) == expected
        assert all(one.requires_grad for one in split.model.parameters())
        for move in (split.model.half, split.model.double, lambda: split.model.to("meta")):
            with pytest.raises(ConfigError, match="when you connect"):
                move()
        assert split.model.to("cpu").float() is split.model
    with Split(folder, lora=replace(LORA, freeze_a=True)) as split:
        split.model(*padded(examples_of(LENGTHS))).loss.backward()
        trained = [one for one in split.model.parameters() if one.requires_grad]
        assert len(trained) == expected // 2
        assert all(one.grad is not None for one in trained)


def test_blocks_chosen_by_number(folder: Path) -> None:
    """`blocks` may leave any part without an adapter, the trunk's included."""
    ids, mask, labels = padded(examples_of(LENGTHS))
    for blocks in ((0, 2), (0, 4), (3,)):
        with Split(folder, lora=replace(LORA, blocks=blocks)) as split:
            split.randomize()
            whole = unsplit(folder, split.adapters(), LORA)
            whole(ids, attention_mask=mask, labels=labels).loss.backward()
            split.model(ids, mask, labels).loss.backward()
            assert_equal_gradients(gradients(split.adapters()), whole)
            assert {p.block for one in split.adapters() for p in one.factors} == set(blocks)


def test_saved_factors_come_back(folder: Path, tmp_path: Path) -> None:
    """Adapters of bottom and top are one PEFT adapter on disk and are loaded exactly."""
    with Split(folder) as split:
        split.randomize()
        write_adapter(tmp_path, split.model.adapters(), "tiny")
        with Split(folder) as other:
            other.model.load_adapters(tmp_path)
            for one, two in zip(split.model.parameters(), other.model.parameters(), strict=True):
                assert torch.equal(one, two)
    with Split(folder, lora=LoraConfig(rank=2)) as other, pytest.raises(ConfigError):
        other.model.load_adapters(tmp_path)


def test_narrow_rows_pass_a_projection(folder: Path) -> None:
    """With a projection fewer numbers travel up, and gradients come back as narrow."""
    ids, mask, labels = padded(examples_of(LENGTHS))
    generator = torch.Generator().manual_seed(2)
    checkpoint = Checkpoint.open(folder)
    projection = Projection.of(
        torch.randn(12, 48, generator=generator),
        torch.randn(48, 12, generator=generator),
        1,
        checkpoint.fingerprint(),
    )
    with Split(folder, projection=projection) as split:
        split.model(ids, mask, labels).loss.backward()
        rows = sum(LENGTHS)
        assert [len(event.rows) for event in split.wire.of(Forward)] == [rows * 12 * 4]
        assert [len(event.rows) for event in split.wire.of(Gradients)] == [rows * 12 * 4]
        assert all(one.grad is not None for one in split.model.parameters())
