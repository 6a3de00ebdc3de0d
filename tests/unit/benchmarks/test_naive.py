"""Messages of the naive protocol."""

import torch
from benchmarks.naive import causal_mask, pack, unpack


def test_messages_come_back_as_they_were():
    """Rows and mask survive the way."""
    rows, mask = torch.randn(5, 8), causal_mask(5)
    again, mask_again = unpack(pack(rows, mask))
    assert torch.equal(again, rows)
    assert torch.equal(mask_again, mask)


def test_an_answer_carries_no_mask():
    """Side 0 means none."""
    rows, mask = unpack(pack(torch.ones(3, 4), torch.empty(0, 0)))
    assert rows.shape == (3, 4)
    assert mask.shape == (0, 0)


def test_the_mask_hides_what_comes_later():
    """Row i sees columns up to i, as additive fp32."""
    mask = causal_mask(4)
    visible = mask == 0
    assert torch.equal(visible, torch.ones(4, 4, dtype=torch.bool).tril())
    assert len(pack(torch.empty(0, 8), mask)) == 8 + 4 * 16
