"""Every family: the split model equals the whole one, in every way that rows can arrive."""

import functools

import pytest
import torch
from tests import tiny_models
from tests.tiny_models import NUM_BLOCKS, VOCABULARY, make_tiny, save_tiny
from tests.unit.model.conftest import Split

from fedsea.errors import PartitionError, UnsupportedModel
from fedsea.model.attention import RaggedBatch
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition, Span
from fedsea.model.spans import FAMILIES, Placement, load_trunk

TOLERANCE = 5e-5
LENGTHS = (14, 9, 3)
PARTITIONS = [Partition(0, 0), Partition(2, 1)]
# Dense, scaled, capped, latent, routed, with sinks: one of each for the longer list of partitions.
REPRESENTATIVES = ["llama", "granite", "gemma2", "deepseek_v3", "qwen3_moe", "gpt_oss"]
CASES = [
    *[(family, partition) for family in sorted(FAMILIES) for partition in PARTITIONS],
    *[
        (family, partition)
        for family in REPRESENTATIVES
        for partition in (Partition(1, 1), Partition(0, 4), Partition(4, 0), Partition(3, 1))
    ],
]


@functools.cache
def prompts() -> tuple[torch.Tensor, ...]:
    """Token ids of three unequal prompts."""
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randint(3, VOCABULARY, (n,), generator=generator) for n in LENGTHS)


class Case:
    """A family cut in one way, and its whole model."""

    def __init__(self, folder, family, partition) -> None:
        self.split = Split(folder, partition)
        self.model = whole_model(family)

    def expected(self, ids):
        return whole_logits(self.model, ids)


@functools.lru_cache(maxsize=1)
def whole_model(family):
    """The unsplit model that `tiny_folder` wrote."""
    return make_tiny(family)


@torch.no_grad()
def whole_logits(model, ids):
    """Logits (n, vocabulary) of the unsplit model."""
    return model(input_ids=ids[None], use_cache=False).logits[0]


@pytest.fixture(
    scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1].bottom}-{case[1].top}"
)
def case(request, tiny_folder):
    """One family cut in one way, loaded once for all tests of this module."""
    family, partition = request.param
    return Case(tiny_folder(family), family, partition)


@pytest.fixture
def split(case):
    """The cut model of the case, with no sequences."""
    case.split.drop_all()
    return case.split


def assert_equal(found, wanted):
    """Equal within rounding."""
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=1e-5)


def test_tiny_models_cover_all_families():
    """Whatever is said to be cuttable is tested here."""
    assert set(tiny_models.FAMILIES) == FAMILIES


def test_prefill(case, split):
    """A prompt in one piece gives the logits of the whole model."""
    split.begin(0)
    assert_equal(split.feed({0: prompts()[0]})[0], case.expected(prompts()[0]))


def test_ragged_batch_then_decode(case, split):
    """Unequal prompts in one call, then one token of each per call, equal the whole model."""
    split.begin(0, 1, 2)
    heads = split.feed({i: ids[: 2 + i] for i, ids in enumerate(prompts())})
    parts = {i: [logits] for i, logits in heads.items()}
    for step in range(max(LENGTHS)):
        ready = {
            i: ids[2 + i + step : 3 + i + step]
            for i, ids in enumerate(prompts())
            if 2 + i + step < len(ids)
        }
        if ready:
            for i, logits in split.feed(ready).items():
                parts[i].append(logits)
    for i, ids in enumerate(prompts()):
        assert_equal(torch.cat(parts[i])[: len(ids)], case.expected(ids))


def test_chunked_prefill_beside_decode(case, split):
    """A prompt in chunks, with another sequence decoding beside it, equals the whole model."""
    long, short = prompts()[0], prompts()[1]
    split.begin(0, 1)
    first = split.feed({0: long[:6], 1: short[:4]})
    second = split.feed({1: short[4:5], 0: long[6:7]})
    third = split.feed({0: long[7:], 1: short[5:6]})
    assert_equal(torch.cat([first[0], second[0], third[0]]), case.expected(long))
    assert_equal(torch.cat([first[1], second[1], third[1]]), case.expected(short[:6]))


def test_rollback(case, split):
    """Rows after a rollback equal rows of a fresh sequence."""
    long, other = prompts()[0], prompts()[1]
    split.begin(0)
    split.feed({0: long})
    split.rollback(0, 5)
    ids = torch.cat([long[:5], other])
    assert_equal(split.feed({0: other})[0], case.expected(ids)[5:])


def test_fork(case, split):
    """A fork and its source share their first rows and then go their own ways."""
    long, other = prompts()[0], prompts()[1]
    split.begin(0)
    split.feed({0: long[:7]})
    split.fork(0, 1, 6)
    found = split.feed({0: long[7:9], 1: other[:3]})
    assert_equal(found[0], case.expected(long[:9])[7:])
    assert_equal(found[1], case.expected(torch.cat([long[:6], other[:3]]))[6:])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_input_gradients(family, tiny_folder):
    """The gradient of the trunk's output with respect to its input is that of the whole model."""
    span = Span(1, NUM_BLOCKS - 1)
    entered, left = boundary_rows(whole_model(family), span)
    weights = [torch.randn_like(rows) for rows in left]
    wanted = torch.cat(
        [
            torch.autograd.grad((output * weight).sum(), rows)[0]
            for rows, output, weight in zip(entered, left, weights, strict=True)
        ]
    )

    trunk = load_trunk(Checkpoint.open(tiny_folder(family)), span, Placement())
    rows = torch.cat(entered).detach().requires_grad_()
    output = trunk.run(rows, RaggedBatch.whole(LENGTHS[:2], rows.device))
    (found,) = torch.autograd.grad((output * torch.cat(weights)).sum(), rows)

    torch.testing.assert_close(output, torch.cat(left), atol=1e-4, rtol=1e-5)
    scale = wanted.abs().max()
    torch.testing.assert_close(found / scale, wanted / scale, atol=1e-5, rtol=0)


def boundary_rows(model, span):
    """Rows that enter and leave the blocks of `span`, under autograd, for each of two prompts."""
    entered, left = [], []

    def enter(block, args):
        entered.append(args[0][0].detach().requires_grad_())
        return (entered[-1][None], *args[1:])

    def leave(block, args, output):
        left.append(output[0])

    blocks = model.model.layers
    hooks = [
        blocks[span.first].register_forward_pre_hook(enter),
        blocks[span.end - 1].register_forward_hook(leave),
    ]
    for ids in prompts()[:2]:
        model(input_ids=ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return entered, left


def test_refuses_other_families(tmp_path):
    """A family that cannot be cut is refused by name, with the list of those that can."""
    folder = save_tiny("opt", tmp_path, ffn_dim=64, word_embed_proj_dim=48)
    with pytest.raises(UnsupportedModel, match=r"'opt' cannot be cut.*llama.*qwen3"):
        load_trunk(Checkpoint.open(folder), Span(1, 2), Placement())


def test_refuses_blocks_of_another_kind(tmp_path):
    """A family that can be cut is refused when some of its blocks keep another kind of state."""
    folder = save_tiny("llama", tmp_path, layer_types=["full_attention"] * 4 + ["linear_attention"])
    with pytest.raises(UnsupportedModel, match="linear_attention"):
        load_trunk(Checkpoint.open(folder), Span(1, 2), Placement())


def test_refuses_a_span_outside_the_model(tiny_folder):
    """Blocks that the model does not have cannot be asked for."""
    with pytest.raises(PartitionError, match="outside the model's 5 blocks"):
        load_trunk(Checkpoint.open(tiny_folder("llama")), Span(1, 6), Placement())
